"""Noise where it is used: its laws, its layout, its state."""

import math

import pytest
import torch

from manifold_mixup.lab.methods.generators import (
    DeviceGenerators,
    normal_like,
    truncated_normal_like,
    uniform_like,
)

DRAWS = [normal_like, uniform_like, truncated_normal_like]


def test_on_the_cpu_it_is_what_a_generator_of_that_seed_draws():
    own = torch.Generator().manual_seed(5)
    noise = normal_like(torch.zeros(4, 3), DeviceGenerators(5))
    assert torch.equal(noise, torch.randn(4, 3, generator=own))


@pytest.mark.parametrize(
    ("draw", "low", "high", "variance"),
    [
        (normal_like, -math.inf, math.inf, 1.0),
        (uniform_like, -1.0, 1.0, 1 / 3),
        # 1 - 2·2·φ(2) / (Φ(2) - Φ(-2))
        (truncated_normal_like, -2.0, 2.0, 0.773741),
    ],
)
def test_laws(draw, low, high, variance):
    values = draw(torch.zeros(100_000), DeviceGenerators(0))
    assert values.dtype == torch.float32
    assert low <= values.min()
    assert values.max() <= high
    assert abs(values.mean().item()) < 5 * math.sqrt(variance / 100_000)
    assert values.var().item() == pytest.approx(variance, rel=0.025)


def test_the_truncated_law_is_the_normal_one_between_its_ends():
    values = truncated_normal_like(torch.zeros(50_000), DeviceGenerators(0)).double()
    for edge in (-1.5, -0.5, 0.3, 1.0, 1.9):
        share = (values < edge).double().mean().item()
        phi = torch.special.ndtr(torch.tensor([edge, -2.0, 2.0], dtype=torch.float64))
        expected = ((phi[0] - phi[1]) / (phi[2] - phi[1])).item()
        assert share == pytest.approx(expected, abs=5 * 0.5 / math.sqrt(50_000))


@pytest.mark.parametrize("draw", DRAWS)
def test_numbers_lie_in_memory_as_the_values_do(draw):
    value = torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    noise = draw(value, DeviceGenerators(1))
    assert noise.shape == value.shape
    assert noise.is_contiguous(memory_format=torch.channels_last)
    plain = draw(torch.zeros(2, 4, 5, 3), DeviceGenerators(1))
    assert torch.equal(noise.permute(0, 2, 3, 1), plain)
    assert (value + noise).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("before", [0, 2])
def test_a_saved_state_goes_on(draw, before):
    first, second = DeviceGenerators(1), DeviceGenerators(2)
    for _ in range(before):
        draw(torch.zeros(7), first)
    draw(torch.zeros(3), second)
    second.load_state_dict(first.state_dict())
    resaved = second.state_dict()  # a checkpoint right after a resume, before anything is drawn
    third = DeviceGenerators(3)
    third.load_state_dict(resaved)
    expected = draw(torch.zeros(5), first)
    assert torch.equal(draw(torch.zeros(5), second), expected)
    assert torch.equal(draw(torch.zeros(5), third), expected)


@pytest.mark.parametrize("draw", DRAWS)
def test_neighbours_are_independent(draw):
    values = draw(torch.zeros(2, 20_000), DeviceGenerators(0)).double()
    assert abs(torch.corrcoef(values)[0, 1].item()) < 0.04
    assert abs(torch.corrcoef(torch.stack([values[0, :-1], values[0, 1:]]))[0, 1].item()) < 0.04
