"""Noise against a loop that adds it to one image at a time."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import accuracy_score, log_loss
from torch import nn

from lab.measures.subjects import PIXELS, both_forms, convolutional, images, left_alone, subject
from manifold_mixup.lab import streams
from manifold_mixup.lab.errors import UsageError
from manifold_mixup.lab.measures.noise import NoiseOptions, compute
from manifold_mixup.lab.measures.registry import MEASURES, measure

MEAN, SD = (np.array(v, dtype=np.float64)[:, None, None] for v in (PIXELS.mean, PIXELS.sd))


class Seen(nn.Module):
    """Keeps what it reads, as pixels where white is 1, and returns what is asked for."""

    def __init__(self, output=None):
        super().__init__()
        self.rows = []
        self.output = output or (lambda x: x.flatten(1)[:, :3])

    def forward(self, x):
        self.rows.append(x.numpy() * SD + MEAN)
        return self.output(x)


def seen(options, x, **settings):
    model = Seen()
    compute(subject(model, pixels=PIXELS, test=(x, torch.zeros(len(x))), **settings), options)
    return np.concatenate(model.rows)


@pytest.mark.parametrize("clamp", [True, False])
def test_accuracy_and_nll_are_those_of_a_loop_over_images(clamp):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 3))
    x, y = images(40)
    found = compute(subject(model, pixels=PIXELS, test=(x, y)), NoiseOptions(clamp=clamp))
    weight, bias = (p.detach().double().numpy() for p in model[1].parameters())
    for sd in (0.1, 0.2, 0.3):
        rng = np.random.default_rng(streams.stream_seed(0, "measures/noise"))
        rows = []
        for image in x.numpy():
            noisy = image / 255 + sd * rng.standard_normal((3, 6, 6), dtype=np.float32)
            noisy = np.clip(noisy, 0, 1) if clamp else noisy
            logits = weight @ ((noisy - MEAN) / SD).ravel() + bias
            rows.append(np.exp(logits) / np.exp(logits).sum())
        assert found[f"noise_{sd}_accuracy"] == pytest.approx(100 * accuracy_score(y, np.argmax(rows, axis=1)))
        assert found[f"noise_{sd}_nll"] == pytest.approx(log_loss(y, np.array(rows), labels=range(3)), rel=1e-5)


def test_noise_is_gaussian_with_the_sd_in_pixels_where_white_is_one():
    x = torch.full((60, 3, 6, 6), 128, dtype=torch.uint8)
    noise = seen(NoiseOptions(sd=[0.3], clamp=False), x) - 128 / 255
    assert noise.std() == pytest.approx(0.3, rel=0.03)
    assert stats.kstest(noise.ravel() / 0.3, "norm").pvalue > 0.01
    cut = seen(NoiseOptions(sd=[0.3]), x)
    np.testing.assert_allclose(cut, np.clip(noise + 128 / 255, 0, 1), atol=1e-6)
    assert (cut < 1e-6).any()
    assert (cut > 1 - 1e-6).any()


def test_every_network_and_run_is_shown_the_same_images_and_every_sd_the_same_noise():
    x, _ = images(20)
    first = seen(NoiseOptions(sd=[0.1]), x)
    for same in (
        seen(NoiseOptions(sd=0.1), x, seed=5),
        seen(NoiseOptions(sd="0.1"), x, batch_size=3),
        np.concatenate([seen(NoiseOptions(sd=[0.1], examples=5), x), first[5:]]),
    ):
        np.testing.assert_array_equal(first, same)
    assert not np.array_equal(first, seen(NoiseOptions(sd=[0.1], seed=1), x))
    small, large = (seen(NoiseOptions(sd=[sd], clamp=False), x) - x.numpy() / 255 for sd in (0.1, 0.4))
    np.testing.assert_allclose(4 * small, large, atol=1e-5)


def test_without_noise_the_numbers_are_those_of_the_test_split():
    model = convolutional()
    task = subject(model, pixels=PIXELS, test=images(25))
    found = compute(task, NoiseOptions(sd=[0]))
    clean = MEASURES["classification"].compute(task, MEASURES["classification"].options())
    assert found["noise_0_accuracy"] == pytest.approx(100 - clean["test_error"])
    assert found["noise_0_nll"] == pytest.approx(clean["test_nll"], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_logits_of_any_floating_type_are_measured_in_float64(dtype):
    x, y = images(30)

    def output(x):
        return x.flatten(1)[:, :3].to(dtype)

    narrow = compute(subject(Seen(output), pixels=PIXELS, test=(x, y)), NoiseOptions())
    wide = compute(subject(Seen(lambda x: output(x).double()), pixels=PIXELS, test=(x, y)), NoiseOptions())
    assert narrow == wide


def test_a_diverged_network_is_always_wrong_and_has_no_nll():
    task = subject(Seen(lambda x: x.flatten(1)[:, :3] * math.nan), pixels=PIXELS, test=images(1))
    found = measure(task, [(MEASURES["noise"], NoiseOptions(sd=[0.2]))])
    assert found == {"noise_0.2_accuracy": 0.0, "noise_0.2_nll": None}


def test_the_network_and_the_examples_are_left_as_they_were():
    model = convolutional().train()
    x, y = images(12)
    task = subject(model, pixels=PIXELS, test=(x, y))
    before = x.clone()
    model.train()
    with left_alone(model):
        assert compute(task, NoiseOptions()) == compute(task, NoiseOptions())
    assert torch.equal(x, before)


def test_examples_that_are_no_images_are_refused():
    task = subject(nn.Linear(2, 2), test=(torch.zeros(3, 2), [0, 1, 0]))
    with pytest.raises(UsageError, match="measure 'noise' needs images"):
        measure(task, [(MEASURES["noise"], NoiseOptions())])


@pytest.mark.parametrize("clamp", [True, False])
def test_images_from_0_to_1_that_are_read_as_they_are_give_the_numbers_of_their_bytes(clamp):
    stored, floating = both_forms(convolutional())
    request = [(MEASURES["noise"], NoiseOptions(clamp=clamp))]
    assert measure(floating, request) == measure(stored, request)


def test_every_number_has_words():
    assert MEASURES["noise"].describe("noise_0.1_accuracy").title == "accuracy, noise 0.1"
    assert MEASURES["noise"].describe("noise_0.1_nll").title == "NLL, noise 0.1"
    assert MEASURES["noise"].describe("noise_nll") is None
