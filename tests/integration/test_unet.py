"""A U-Net: its skips go past everything between the first branching and the last concatenation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from integration.exactness import (
    LAM,
    by_hand,
    check,
    check_layers,
    differ,
    mixed_output,
    mixture,
    order_of,
    prepared,
    put_back,
    recorded,
    set_lam,
)
from manifold_mixup import ManifoldMixup, cut_points, errors

N, CLASSES = 5, 3


def block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class UNet(nn.Module):
    """Two levels; ``skips=False`` leaves the path through the bottom alone."""

    def __init__(self, skips: bool = True) -> None:
        super().__init__()
        self.skips = skips
        extra = 1 + skips
        self.stem = block(3, 4)
        self.down1, self.down2 = block(4, 6), block(6, 8)
        self.bottom = block(8, 8)
        self.up2, self.up1 = nn.ConvTranspose2d(8, 6, 2, 2), nn.ConvTranspose2d(6, 4, 2, 2)
        self.merge2, self.merge1 = block(6 * extra, 6), block(4 * extra, 4)
        self.refine = block(4, 4)
        self.head = nn.Conv2d(4, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        down1 = self.down1(F.max_pool2d(stem, 2))
        bottom = self.bottom(self.down2(F.max_pool2d(down1, 2)))
        up = self.up2(bottom)
        up = self.merge2(torch.cat([down1, up], 1) if self.skips else up)
        up = self.up1(up)
        up = self.merge1(torch.cat([stem, up], 1) if self.skips else up)
        return self.head(self.refine(up))


def images() -> Tensor:
    return torch.randn(N, 3, 8, 8, dtype=torch.float64)


OUTSIDE = {"input", "stem", "merge1", "refine", "head"}
INSIDE = {"down1", "down2", "bottom", "up2", "merge2", "up1"}


def test_cut_points_lie_before_the_first_branching_and_behind_the_last_concatenation():
    model = prepared(UNet())
    names = {p.name for p in cut_points(model, images())}
    assert names & (OUTSIDE | INSIDE) == OUTSIDE
    assert not any(name.split(".")[0] in INSIDE for name in names)


def test_without_skips_every_block_is_a_cut_point():
    names = {p.name for p in cut_points(prepared(UNet(skips=False)), images())}
    assert names >= OUTSIDE | INSIDE


def test_mixing_is_exact_and_the_blocks_between_really_are_bypassed(monkeypatch):
    model, x = prepared(UNet()), images()
    layers = check(model, x, N, monkeypatch, more=4, rejected=40)
    assert layers[0] == "input"
    assert set(layers) <= OUTSIDE | {f"{name}.{i}" for name in OUTSIDE for i in range(3)}
    check_layers(model, x, N, sorted(OUTSIDE - {"input"}), monkeypatch)


@pytest.mark.parametrize(
    ("layer", "origin", "where"),
    [
        ("down2", "down1", "merge2"),
        ("bottom", "down1", "merge2"),
        ("up2", "down1", "merge2"),
        ("merge2", "stem", "merge1"),
    ],
)
def test_a_refused_block_is_explained_by_the_origin_of_the_nearest_skip(layer, origin, where):
    with pytest.raises(errors.NotACutPoint) as caught:
        ManifoldMixup(UNet().double(), layers=[layer])(images(), torch.zeros(N, 8, 8).long())
    text = str(caught.value)
    assert text.startswith(f"{layer!r} is not a cut point of the model: what '{origin}")
    assert caught.value.bypass.startswith(origin)
    # The concatenation is the model's own code, or belongs to the block that reads it: the error says which.
    assert "cat" in text or where in text


def test_swapping_below_a_skip_mixes_a_part_only(monkeypatch):
    """What would happen without the refusal: neither the image nor its partner's map."""
    model, x, partner = prepared(UNet()), images(), order_of(N)
    states, plain = recorded(model, x)
    swapped = put_back(model, x, "bottom", states["bottom"][partner])
    assert differ(swapped, plain)
    assert differ(swapped, plain[partner])
    set_lam(monkeypatch, 0.0)
    with pytest.raises(errors.NotACutPoint):
        mixed_output(model, x, N, "bottom")


def test_dense_targets_are_mixed_position_by_position(monkeypatch):
    set_lam(monkeypatch, LAM)
    model, x, y = prepared(UNet()), images(), torch.randint(CLASSES, (N, 8, 8))
    mixup = ManifoldMixup(model, layers=["merge1"], pairing=lambda y, generator: order_of(N), seed=0)
    inputs, target = mixup(x, y)
    maps = model(inputs)
    loss, accuracy = F.cross_entropy(maps, target), target.accuracy(maps)
    mixup.remove()
    reference = by_hand(model, x, "merge1", mixture(LAM, order_of(N)), N)
    expected = LAM * F.cross_entropy(reference, y) + (1 - LAM) * F.cross_entropy(reference, y[order_of(N)])
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    hits = LAM * (maps.argmax(1) == y).double() + (1 - LAM) * (maps.argmax(1) == y[order_of(N)]).double()
    assert float(accuracy) == pytest.approx(float(hits.mean()), abs=1e-6)
