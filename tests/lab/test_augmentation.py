"""Batches of images against one image after the other, by hand."""

import pytest
import torch
from torch.nn import functional as F

from manifold_mixup.lab.augmentation import Augmentation
from manifold_mixup.lab.data import Pixels

MEAN, SD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.1)


def images(n=7, channels=3, height=6, width=9):
    return torch.randint(256, (n, channels, height, width), dtype=torch.uint8)


def by_hand(image, down, right, flip, pixels):
    """Pad with black, cut out, mirror, scale to [0, 1], normalise: one image."""
    p, (_, height, width) = pixels.crop_padding, image.shape
    padded = F.pad(image, (p, p, p, p))
    cut = padded[:, p + down : p + down + height, p + right : p + right + width]
    cut = cut.flip(-1) if flip else cut
    mean, sd = (torch.tensor(v)[:, None, None] for v in (pixels.mean, pixels.sd))
    return (cut.double() / 255 - mean) / sd


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("padding", [0, 1, 4, 8])
@pytest.mark.parametrize("flip", [False, True])
def test_a_batch_is_its_images_one_by_one(channels, padding, flip):
    pixels = Pixels(MEAN[:channels], SD[:channels], padding, flip)
    stored = images(channels=channels)
    augmentation = Augmentation(pixels, stored, seed=0)
    rows = torch.tensor([3, 0, 3, 6, 5, 1, 2, 4] * 4)
    draws = augmentation.draw(len(rows))
    batch = augmentation.batch(rows, draws)
    assert batch.dtype == torch.float32
    assert batch.is_contiguous(memory_format=torch.channels_last)
    for i, row in enumerate(rows):
        expected = by_hand(stored[row], *draws[:, i].tolist(), pixels)
        assert torch.allclose(batch[i].double(), expected, atol=1e-5)


def test_every_offset_and_flip_occurs_about_equally_often():
    augmentation = Augmentation(Pixels(MEAN, SD, 2, True), images(), seed=0)
    draws = augmentation.draw(20_000)
    for offsets in draws[:2]:
        counts = torch.bincount(offsets + 2, minlength=5)
        assert len(counts) == 5
        assert (counts - 4000).abs().max() < 5 * (20_000 * 0.2 * 0.8) ** 0.5
    assert abs(int(draws[2].sum()) - 10_000) < 5 * 5000**0.5
    assert abs(torch.corrcoef(draws.double())[0, 1]) < 0.05


def test_what_is_switched_off_draws_nothing():
    augmentation = Augmentation(Pixels(MEAN, SD), images(), seed=0)
    before = augmentation.state_dict()["generator"].clone()
    assert torch.equal(augmentation.draw(5), torch.zeros(3, 5, dtype=torch.int64))
    assert torch.equal(augmentation.state_dict()["generator"], before)


def test_without_augmentation_a_batch_is_what_evaluation_sees():
    pixels, stored = Pixels(MEAN, SD), images()
    augmentation = Augmentation(pixels, stored, seed=0)
    rows = torch.arange(7)
    assert torch.allclose(augmentation.batch(rows, augmentation.draw(7)), pixels.normalise(stored), atol=1e-6)


def test_draws_go_on_where_they_were():
    first, second = (Augmentation(Pixels(MEAN, SD, 3, True), images(), seed=4) for _ in range(2))
    first.draw(5)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.draw(9), second.draw(9))
    other = Augmentation(Pixels(MEAN, SD, 3, True), images(), seed=5)
    assert not torch.equal(Augmentation(Pixels(MEAN, SD, 3, True), images(), seed=4).draw(9), other.draw(9))


def test_the_stored_images_stay_as_they_are():
    stored = images()
    before = stored.clone()
    augmentation = Augmentation(Pixels(MEAN, SD, 3, True), stored, seed=4)
    augmentation.batch(torch.arange(7), augmentation.draw(7))
    assert torch.equal(stored, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalising_uint8_and_fractions_agree(dtype):
    pixels, stored = Pixels(MEAN, SD), images()
    expected = pixels.normalise(stored)
    found = pixels.normalise(stored.to(dtype) / 255)
    assert found.dtype == dtype
    assert torch.allclose(found.float(), expected, atol=1e-5)
