"""Inputs away from the data: that they are what they are said to be, and what is counted on them."""

import math

import pytest
import torch
from scipy.stats import kstest
from torch import Tensor, nn

from lab.measures.subjects import PIXELS, Given, convolutional, images, left_alone, subject
from manifold_mixup.lab.measures import off_data
from manifold_mixup.lab.measures.off_data import (
    OffDataOptions,
    compute,
    confidence,
    gaussian,
    midpoints,
    shuffled,
    uniform,
)
from manifold_mixup.lab.measures.registry import MEASURES


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_uniform_images_take_every_value_alike():
    noise = uniform(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), 400, 1.0, seeded())
    assert noise.dtype == torch.uint8
    assert noise.shape == (400, 3, 8, 8)
    counts = torch.bincount(noise.flatten().long(), minlength=256).double()
    expected = noise.numel() / 256
    # chi-square with 255 degrees of freedom: mean 255, standard deviation 22.6
    assert 255 - 5 * 22.6 < ((counts - expected) ** 2 / expected).sum() < 255 + 5 * 22.6


@pytest.mark.parametrize("box", [1.0, 2.5])
def test_uniform_vectors_fill_the_box_around_the_data(box):
    like = torch.tensor([[-1.0, 10.0], [3.0, 10.5], [0.0, 12.0]])
    noise = uniform(like, 3000, box, seeded())
    for column, (middle, width) in enumerate([(1.0, 4.0), (11.0, 2.0)]):
        unit = (noise[:, column] - middle) / (width * box) + 0.5
        assert 0 <= float(unit.min()) < 0.01
        assert 0.99 < float(unit.max()) <= 1
        assert kstest(unit.double().numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("chunk", [7, 1000])
def test_gaussian_images_have_the_means_and_deviations_of_the_channels(chunk, monkeypatch):
    monkeypatch.setattr(off_data, "CHUNK", chunk)
    g = seeded(1)
    mean, sd = torch.tensor([100.0, 120.0, 140.0]), torch.tensor([10.0, 20.0, 30.0])
    like = (torch.randn(50, 3, 8, 8, generator=g) * sd[:, None, None] + mean[:, None, None]).clamp(0, 255).byte()
    noise = gaussian(like, 2000, seeded())
    assert noise.dtype == torch.uint8
    assert noise.shape == (2000, 3, 8, 8)
    found = noise.double().transpose(0, 1).flatten(1)
    wanted = like.double().transpose(0, 1).flatten(1)
    # 128,000 pixels per channel: a standard error of 0.08 at most; rounding adds 1/12 to variances of 100 and more
    torch.testing.assert_close(found.mean(dim=1), wanted.mean(dim=1), rtol=0, atol=0.3)
    torch.testing.assert_close(found.std(dim=1), wanted.std(dim=1), rtol=0.03, atol=0)
    centred = (found - found.mean(dim=1, keepdim=True)) / found.std(dim=1, keepdim=True)
    assert centred.pow(4).mean().item() == pytest.approx(3, abs=0.1)  # as of a normal distribution


def test_gaussian_pixels_stay_within_black_and_white():
    like = torch.tensor([0, 255], dtype=torch.uint8)[torch.arange(64) % 2].view(1, 1, 8, 8)
    noise = gaussian(like, 100, seeded())  # mean 127.5 and standard deviation 127.5: a third is cut
    share = ((noise == 0) | (noise == 255)).double().mean().item()
    assert share == pytest.approx(0.317, abs=0.03)


def test_gaussian_vectors_have_the_moments_of_every_number():
    like = torch.randn(200, 2, generator=seeded(1)) * torch.tensor([0.1, 5.0]) + torch.tensor([3.0, -7.0])
    noise = gaussian(like, 4000, seeded())
    assert noise.dtype == torch.float32
    torch.testing.assert_close(noise.mean(dim=0), like.mean(dim=0), rtol=0.05, atol=0.01)
    torch.testing.assert_close(noise.std(dim=0), like.std(dim=0), rtol=0.06, atol=0)


def test_shuffled_images_have_the_same_pixels_in_other_places():
    x, _ = images(12)
    moved = shuffled(x, seeded())
    assert moved.shape == x.shape
    assert moved.dtype == x.dtype

    def pixels(image: Tensor) -> list[tuple[int, ...]]:
        return sorted(map(tuple, image.flatten(1).T.tolist()))

    assert all(pixels(a) == pixels(b) for a, b in zip(x, moved, strict=True))
    # every image in its own way
    places = shuffled(torch.arange(36, dtype=torch.uint8).view(1, 1, 6, 6).repeat(50, 1, 1, 1), seeded())
    assert len(places.flatten(1).unique(dim=0)) == 50
    assert places.float().mean(dim=0).sub(17.5).abs().max() < 5 * 10.4 / 50**0.5


def test_midpoints_are_means_of_two_classes_and_partners_are_uniform():
    y = torch.tensor([2, 0, 0, 1, 0, 2, 4])
    x = 2.0 ** torch.arange(7)[:, None]  # a sum of two tells which two
    pairs = {}
    for seed in range(700):
        sums = (2 * midpoints(x, y, seeded(seed))).long().flatten().tolist()
        assert len(sums) == 7
        for first, total in zip([1, 2, 4, 3, 0, 5, 6], sums, strict=True):  # sorted by class
            second = int(math.log2(total - 2**first))
            assert y[first] != y[second]
            pairs[first, second] = pairs.get((first, second), 0) + 1
    for first in range(7):
        counts = [count for (a, _), count in pairs.items() if a == first]
        others = int((y != y[first]).sum())
        assert len(counts) == others  # every example of another class occurs
        expected, sd = 700 / others, math.sqrt(700 / others * (1 - 1 / others))
        assert all(abs(count - expected) < 4.5 * sd for count in counts)


def test_midpoints_of_images_are_exact_and_one_class_has_none():
    x = torch.tensor([255, 254], dtype=torch.uint8).view(2, 1, 1, 1)
    found = midpoints(x, torch.tensor([0, 1]), seeded())
    assert found.flatten().tolist() == pytest.approx([509 / 510] * 2, rel=1e-6)
    assert len(midpoints(x, torch.tensor([1, 1]), seeded())) == 0


def test_confidence_counts_what_is_below_the_threshold():
    top = torch.tensor([0.5, 0.8999, 0.9, 0.95, 1.0], dtype=torch.float64)
    logits = torch.stack([top, 1 - top], dim=1).log()
    low, mean = confidence(subject(Given()), logits, 0.9 - 1e-9)
    assert low == pytest.approx(40)
    assert mean == pytest.approx(100 * top.mean().item())
    logits[2, 0] = math.nan
    assert all(math.isnan(value) for value in confidence(subject(Given()), logits, 0.9))
    assert all(math.isnan(value) for value in confidence(subject(Given()), logits[:0], 0.9))


class Constant(nn.Module):
    """Always as sure of the first of two classes."""

    def __init__(self, probability: float):
        super().__init__()
        self.logit = nn.Parameter(torch.tensor([math.log(probability / (1 - probability)), 0.0]))

    def forward(self, x):
        return self.logit.expand(len(x), 2)


@pytest.mark.parametrize(("probability", "low"), [(0.6, 100.0), (0.95, 0.0)])
def test_a_constant_network_is_as_sure_everywhere(probability, low):
    found = compute(subject(Constant(probability), pixels=PIXELS, test=images(20)), OffDataOptions(examples=10))
    assert len(found) == 10
    for name, value in found.items():
        assert value == pytest.approx(100 * probability if name.endswith("confidence") else low)
        assert MEASURES["off_data"].describe(name) is not None


def test_every_kind_reaches_the_network_as_it_is_normalised():
    seen = []
    model = convolutional()
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x, y = images(30)
    task = subject(model, pixels=PIXELS, batch_size=100, test=(x, y))
    compute(task, OffDataOptions(examples=20))
    assert [len(batch) for batch in seen] == [20] * 5
    mean, sd = (torch.tensor(v)[:, None, None] for v in (PIXELS.mean, PIXELS.sd))
    test, noise, normal, middle, moved = ((batch * sd + mean) * 255 for batch in seen)
    stored = {tuple(image.flatten().tolist()) for image in x}
    assert all(tuple(image.round().int().flatten().tolist()) in stored for image in test)
    torch.testing.assert_close(moved.flatten(2).sort(dim=2).values, test.flatten(2).sort(dim=2).values)
    for batch in (noise, normal):
        torch.testing.assert_close(batch, batch.round(), rtol=0, atol=1e-3)
        assert -1e-3 < float(batch.min()) < float(batch.max()) < 255.001
    halves = 2 * middle
    torch.testing.assert_close(halves, halves.round(), rtol=0, atol=1e-3)


def test_inputs_depend_on_the_seed_alone_and_the_network_is_left_alone():
    x, y = images(25)
    model = convolutional().train()
    tasks = [subject(model, pixels=PIXELS, test=(x, y), train=(x[:9], y[:9]), seed=seed) for seed in (3, 3, 4)]
    model.train()
    model[1].eval()
    with left_alone(model):
        first, second, third = (compute(task, OffDataOptions(examples=15)) for task in tasks)
    assert first == second
    assert all(first[name] != third[name] for name in first if name.endswith("confidence"))


def test_vectors_are_compared_with_the_training_examples():
    # logits are the coordinates: the farther out, the surer
    train = (torch.tensor([[0.0, 0.0], [0.0, 80.0]]), [0, 1])
    test = (torch.tensor([[0.0, 0.1], [0.1, 0.0]]), [1, 0])
    found = compute(subject(Given(), train=train, test=test), OffDataOptions(examples=400))
    assert set(found) == {
        f"off_{kind}_{number}"
        for kind in ("test", "uniform", "gaussian", "midpoints")
        for number in ("unsure", "confidence")
    }
    assert found["off_test_unsure"] == found["off_midpoints_unsure"] == 100
    assert found["off_uniform_unsure"] == pytest.approx(100 * math.log(9) / 80, abs=4)
    assert found["off_midpoints_confidence"] == pytest.approx(50, abs=1e-4)
    without = compute(subject(Given(), test=test), OffDataOptions(examples=400))
    assert without["off_uniform_unsure"] == 100


def test_one_class_and_outputs_that_are_no_numbers_are_results():
    x, _ = images(8)
    one = compute(subject(convolutional(), pixels=PIXELS, test=(x, [1] * 8)), OffDataOptions(examples=8))
    unknown = {name for name, value in one.items() if math.isnan(value)}
    assert unknown == {"off_midpoints_unsure", "off_midpoints_confidence"}
    model = convolutional()
    nn.init.constant_(model[0].weight, math.nan)
    found = compute(subject(model, pixels=PIXELS, test=images(8)), OffDataOptions(examples=8))
    assert all(math.isnan(value) for value in found.values())
