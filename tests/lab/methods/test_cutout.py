"""Holes against one pixel after the other, by hand."""

import pytest
import torch

from manifold_mixup.lab.errors import UsageError
from manifold_mixup.lab.methods import make_method
from manifold_mixup.lab.methods.cutout import cut_out


def by_hand(image, row, column, size):
    """Blank every pixel of the square that lies inside the image."""
    result = image.clone()
    for i in range(size):
        for j in range(size):
            r, c = row - size // 2 + i, column - size // 2 + j
            if 0 <= r < image.shape[1] and 0 <= c < image.shape[2]:
                result[:, r, c] = 0
    return result


def images(n, channels=2, height=7, width=5):
    return torch.rand(n, channels, height, width) + 1  # nowhere zero


def every_centre(height, width):
    return torch.cartesian_prod(torch.arange(height), torch.arange(width)).T


def attached(seed=0, **options):
    return make_method("cutout", options).attach(torch.nn.Identity(), [], seed)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 20])
@pytest.mark.parametrize(("height", "width"), [(7, 5), (4, 4), (1, 3)])
def test_every_hole_at_every_centre_is_the_one_by_hand(size, height, width):
    centres = every_centre(height, width)
    x = images(centres.shape[1], 2, height, width)
    expected = torch.stack([by_hand(image, *c, size) for image, c in zip(x, centres.T.tolist(), strict=True)])
    assert torch.equal(cut_out(x, centres, size), expected)


def test_a_hole_may_hang_over_the_border():
    blank = (cut_out(images(4, 1, 9, 9), torch.tensor([[4, 0, 8, 0], [4, 0, 8, 4]]), 4) == 0).flatten(1).sum(1)
    assert blank.tolist() == [16, 4, 9, 8]  # whole, two corners, an edge


def test_every_pixel_is_as_likely_to_be_the_centre():
    holes = attached(size=1)(images(21_000, 1, 7, 5), None)[0] == 0
    counts = holes.sum(dim=(0, 1)).flatten().double()
    assert counts.sum() == 21_000
    expected = 21_000 / 35
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert 10 < chi_square < 75  # 34 degrees of freedom: mean 34, standard deviation 8.2


def test_rows_and_columns_are_drawn_apart():
    holes = attached(size=1)(images(5000, 1, 8, 8), None)[0][:, 0] == 0
    rows, columns = holes.any(2).double().argmax(1), holes.any(1).double().argmax(1)
    assert abs(torch.corrcoef(torch.stack([rows, columns]).double())[0, 1].item()) < 0.07


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_dtype_memory_format_and_the_callers_batch_are_kept(dtype, memory_format):
    x = images(6, 3).to(dtype).contiguous(memory_format=memory_format)
    before = x.clone()
    holed, labels = attached(size=3)(x, y := torch.arange(6))
    assert holed.dtype == dtype
    assert holed.is_contiguous(memory_format=memory_format)
    assert torch.equal(x, before)
    assert labels is y
    assert (holed == 0).flatten(1).any(1).all()


def test_a_batch_of_one():
    x = images(1)
    assert 1 <= (attached(size=3)(x, None)[0] == 0).sum() / 2 <= 9


def test_nothing_waits_for_the_device():
    # tensors without values: reading a number of one raises
    x, centres = torch.empty(3, 2, 6, 6, device="meta"), torch.empty(2, 3, dtype=torch.int64, device="meta")
    assert cut_out(x, centres, 3).shape == x.shape


def test_a_hole_larger_than_the_images_is_refused():
    assert attached(size=9)(images(2, 1, 6, 6), None)[0].any()
    with pytest.raises(UsageError, match="a hole of 16 pixels blanks images of 8 x 8 pixels whole"):
        attached()(images(2, 1, 8, 8), None)


def test_the_largest_hole_that_is_not_refused_leaves_something():
    for size in (13, 14):
        centres = every_centre(8, 8)
        assert cut_out(images(64, 1, 8, 8), centres, size).any()
    assert not cut_out(images(64, 1, 8, 8), every_centre(8, 8), 15).any()
    with pytest.raises(UsageError):
        attached(size=15)(images(2, 1, 8, 8), None)
