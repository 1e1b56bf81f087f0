"""Boxes and their areas against one pixel after the other, by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from manifold_mixup import MixedTarget
from manifold_mixup.lab.methods import make_method
from manifold_mixup.lab.methods.cutmix import boxes, paste


def by_hand(lam, row, column, height, width):
    """The pixels of the box that lie inside the image."""
    tall, wide = math.floor(height * math.sqrt(1 - lam)), math.floor(width * math.sqrt(1 - lam))
    square = {(row - tall // 2 + i, column - wide // 2 + j) for i in range(tall) for j in range(wide)}
    return {(r, c) for r, c in square if 0 <= r < height and 0 <= c < width}


def numbered(n, channels=2, height=7, width=5):
    """Images of one colour each, which is their number."""
    return torch.arange(n).float().view(n, 1, 1, 1).expand(n, channels, height, width).clone()


def attached(seed=0, **options):
    method = make_method("cutmix", {"probability": 1.0, **options})
    return method.attach(torch.nn.Identity(), [], seed)


@pytest.mark.parametrize("lam", [0.0, 1e-9, 0.1, 0.3, 0.5, 0.75, 0.98, 1 - 1e-12, 1.0])
@pytest.mark.parametrize(("height", "width"), [(7, 5), (8, 8), (1, 4)])
def test_every_box_at_every_centre_has_the_pixels_and_the_area_by_hand(lam, height, width):
    rows, columns = torch.cartesian_prod(torch.arange(height), torch.arange(width)).T
    shares = torch.full((len(rows),), lam, dtype=torch.float64)
    box, kept = boxes(shares, rows, columns, (height, width))
    x = numbered(2, 1, height, width)
    for k in range(len(rows)):
        expected = by_hand(lam, rows[k].item(), columns[k].item(), height, width)
        pasted = paste(x, torch.tensor([1, 0]), box[:, k : k + 1])[0, 0] == 1
        assert set(map(tuple, pasted.nonzero().tolist())) == expected
        assert kept[k].item() == pytest.approx(1 - len(expected) / (height * width), abs=1e-12)


def test_the_limits_are_the_partners_image_and_ones_own():
    lam, centre = torch.tensor([0.0, 1.0], dtype=torch.float64), torch.tensor([4, 4])
    box, kept = boxes(lam, centre, centre, (8, 8))
    assert kept.tolist() == [0.0, 1.0]
    x = numbered(2, height=8, width=8)
    assert torch.equal(paste(x, torch.tensor([1, 0]), box[:, :1]), x.flip(0))
    assert torch.equal(paste(x, torch.tensor([1, 0]), box[:, 1:]), x)


def test_a_box_at_the_border_is_clipped_and_lambda_follows():
    lam = torch.full((2,), 0.75, dtype=torch.float64)  # sides of 4 of 8 pixels
    box, kept = boxes(lam, torch.tensor([4, 0]), torch.tensor([4, 0]), (8, 8))
    assert box.T.tolist() == [[2, 6, 2, 6], [0, 2, 0, 2]]
    assert kept.tolist() == [1 - 16 / 64, 1 - 4 / 64]


@pytest.mark.parametrize("per", ["batch", "example"])
@pytest.mark.parametrize("n", [1, 2, 9])
@pytest.mark.parametrize(("height", "width"), [(7, 5), (8, 8)])
def test_lambda_is_the_share_of_pixels_that_were_kept(per, n, height, width):
    transform = attached(per=per)
    y = torch.arange(n) + 100
    for _ in range(20):
        mixed, target = transform(numbered(n, 2, height, width), y)
        partner = target.y_partner - 100
        assert torch.equal(target.y, y)
        assert sorted(partner.tolist()) == list(range(n))
        own = mixed == torch.arange(n).view(n, 1, 1, 1)
        assert (own | (mixed == partner.view(n, 1, 1, 1))).all()
        assert torch.equal(own[:, 0], own[:, 1])  # the same pixels of every channel
        lam = torch.as_tensor(target.lam).expand(n)
        for i in range(n):
            if partner[i] != i:  # of a row that is its own partner nothing can be seen
                assert own[i].float().mean().item() == pytest.approx(lam[i].item(), abs=1e-6)


def test_one_box_for_all_or_one_for_each():
    x, y = numbered(40, 1, 8, 8), torch.arange(40)
    mixed, target = attached(per="batch")(x, y)
    partner = target.y_partner
    moved = partner != y
    assert isinstance(target.lam, float)
    assert len({tuple(row.flatten().tolist()) for row in (mixed != x)[moved]}) == 1
    mixed, target = attached(per="example")(x, y)
    assert target.lam.shape == (40,)
    assert len({tuple(row.flatten().tolist()) for row in (mixed != x)[target.y_partner != y]}) > 20


def test_the_loss_weighs_both_labels_by_the_area():
    x, y = torch.rand(6, 1, 8, 8), torch.arange(6) % 3
    for per in ("batch", "example"):
        mixed, target = attached(per=per)(x, y)
        logits = mixed.flatten(1)[:, :3].double()
        lam = torch.as_tensor(target.lam, dtype=torch.float64).expand(6)
        expected = sum(
            lam[i] * F.cross_entropy(logits[i], y[i]) + (1 - lam[i]) * F.cross_entropy(logits[i], target.y_partner[i])
            for i in range(6)
        )
        loss = F.cross_entropy(logits, target, reduction="none").mean()
        assert loss.item() == pytest.approx(expected.item() / 6, rel=1e-6)


def test_images_too_narrow_for_a_box_stay_whole():
    x, y = numbered(2, 1, 100, 1), torch.arange(2)  # a box is no pixel wide unless λ is 0
    mixed, target = attached()(x, y)
    assert torch.equal(mixed, x)
    assert target.lam == 1.0


def test_the_area_of_the_boxes_is_that_of_uniform_shares_and_centres():
    transform, x, y = attached(), numbered(2, 1, 64, 64), torch.arange(2)
    kept = torch.tensor([transform(x, y)[1].lam for _ in range(2000)], dtype=torch.float64)
    # for s = sqrt(1 - λ) the clipped side of a uniformly centred box is s - s² / 4 on average; E[s²] = 1/2,
    # E[s³] = 2/5, E[s⁴] = 1/3, so the area is E[(s - s²/4)²] = 1/2 - 1/5 + 1/48 of the image
    assert 1 - kept.mean().item() == pytest.approx(0.5 - 0.2 + 1 / 48, abs=0.03)


@pytest.mark.parametrize("probability", [0.25, 0.5, 1.0])
def test_so_many_batches_are_mixed_and_the_others_pass(probability):
    transform, x, y = attached(probability=probability), numbered(2), torch.arange(2)
    mixed = 0
    for _ in range(1000):
        out, target = transform(x, y)
        mixed += isinstance(target, MixedTarget)
        assert isinstance(target, MixedTarget) or (out is x and target is y)
    assert abs(mixed - 1000 * probability) <= 5 * (1000 * probability * (1 - probability)) ** 0.5


def test_what_one_batch_did_does_not_shift_the_next_one():
    x, y = numbered(5), torch.arange(5)
    always, sometimes = attached(seed=3), attached(seed=3, probability=0.5)
    same = 0
    for _ in range(20):
        (full, target), (part, other) = always(x, y), sometimes(x, y)
        if isinstance(other, MixedTarget):
            same += 1
            assert torch.equal(full, part)
            assert target.lam == other.lam
    assert 0 < same < 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("per", ["batch", "example"])
def test_dtype_and_memory_format_are_kept(dtype, memory_format, per):
    x = numbered(6, 3).to(dtype).contiguous(memory_format=memory_format)
    before = x.clone()
    mixed, _ = attached(per=per)(x, torch.arange(6))
    assert mixed.dtype == dtype
    assert mixed.is_contiguous(memory_format=memory_format)
    assert torch.equal(x, before)


def test_nothing_waits_for_the_device():
    x, partner = torch.empty(3, 2, 6, 6, device="meta"), torch.empty(3, dtype=torch.int64, device="meta")
    box = torch.tensor([[1], [4], [0], [3]])
    assert paste(x, partner, box).shape == x.shape
    assert paste(x, partner, box.expand(4, 3)).shape == x.shape
