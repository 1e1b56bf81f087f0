"""Distances and spectral decay on the sphere against slow loops and scipy."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist
from scipy.stats import entropy

from lab.measures.subjects import PIXELS, Given, convolutional, images, left_alone, subject
from manifold_mixup.lab.measures import geometry
from manifold_mixup.lab.measures.geometry import (
    GeometryOptions,
    class_distances,
    compute,
    mean_distance,
    on_sphere,
    rho,
)
from manifold_mixup.lab.measures.registry import MEASURES


def far(a, b, distance):
    return 1 - a @ b if distance == "cosine" else math.sqrt(((a - b) ** 2).sum())


def by_loops(states, y, distance):
    points = [row / np.linalg.norm(row) for row in np.asarray(states, dtype=np.float64)]
    within, centres = [], []
    for label in sorted(set(y.tolist())):
        rows = [p for p, c in zip(points, y.tolist(), strict=True) if c == label]
        pairs = [far(a, b, distance) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
        within += [np.mean(pairs)] if pairs else []
        centre = sum(rows) / len(rows)
        centres.append(centre / np.linalg.norm(centre))
    inter = np.mean([far(a, b, distance) for a, b in itertools.combinations(centres, 2)])
    return {"pi_intra": np.mean(within), "pi_inter": inter, "pi_density": np.mean(within) / inter}


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("block", [1, 7, 1024])
def test_distances_agree_with_loops_over_all_pairs(distance, block, monkeypatch):
    monkeypatch.setattr(geometry, "BLOCK", block)
    states = torch.randn(40, 5) * torch.rand(40, 1) * 10 + 1
    y = torch.tensor([0] * 19 + [2] * 1 + [3] * 12 + [7] * 8)[torch.randperm(40)]
    found = class_distances(states, y, distance)
    assert (found.pop("geometry_classes"), found.pop("geometry_single_classes")) == (4, 1)
    assert found == pytest.approx(by_loops(states.numpy(), y, distance), rel=1e-12)


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_mean_distance_agrees_with_scipy(distance):
    points = on_sphere(torch.randn(30, 4))
    assert mean_distance(points, distance) == pytest.approx(pdist(points.numpy(), distance).mean(), rel=1e-12)


def test_lengths_of_states_do_not_matter():
    states, y = torch.randn(24, 3), torch.arange(24) % 3
    scaled = states * torch.rand(24, 1).add(0.1)
    assert class_distances(scaled, y) == pytest.approx(class_distances(states, y), rel=1e-5)
    assert rho(scaled) == pytest.approx(rho(states), rel=1e-5)


def test_collapsed_classes_have_density_zero_and_coinciding_ones_infinity():
    corners = torch.tensor([[1.0, 2.0], [2.0, -1.0]])
    y = torch.arange(10) % 2
    found = class_distances(corners[y], y)
    assert found["pi_intra"] == found["pi_density"] == 0
    assert found["pi_inter"] == pytest.approx(math.sqrt(2))
    assert class_distances(corners[y], y, "cosine")["pi_intra"] == pytest.approx(0, abs=1e-15)
    same = torch.tensor([[1.0, 1.0], [1.0, -1.0]] * 2)
    found = class_distances(same, torch.tensor([0, 0, 1, 1]))
    assert found["pi_inter"] == 0
    assert found["pi_density"] == math.inf
    everything = class_distances(torch.ones(4, 2), torch.tensor([0, 0, 1, 1]))
    assert math.isnan(everything["pi_density"])


def test_one_class_has_no_distance_between_and_classes_of_one_none_within():
    states = torch.randn(6, 3)
    one = class_distances(states, torch.zeros(6, dtype=torch.long))
    assert math.isfinite(one["pi_intra"])
    assert math.isnan(one["pi_inter"])
    assert math.isnan(one["pi_density"])
    singles = class_distances(states, torch.arange(6))
    assert singles["geometry_classes"] == singles["geometry_single_classes"] == 6
    assert math.isnan(singles["pi_intra"])
    assert singles["pi_inter"] == pytest.approx(pdist(on_sphere(states).numpy()).mean())
    alone = class_distances(states[:1], torch.tensor([4]))
    assert alone["geometry_single_classes"] == 1
    assert all(math.isnan(alone[name]) for name in ("pi_intra", "pi_inter", "pi_density"))


@pytest.mark.parametrize(("distance", "to_zero"), [("euclidean", 1.0), ("cosine", 1.0)])
def test_a_state_of_zeros_stays_in_the_middle_of_the_sphere(distance, to_zero):
    states = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 5.0], [0.0, 2.0]])
    found = class_distances(states, torch.tensor([0, 0, 1, 1]), distance)
    assert found["pi_intra"] == pytest.approx((to_zero + 0) / 2)
    # the centre of class 0 is put back on the sphere
    assert found["pi_inter"] == pytest.approx(math.sqrt(2) if distance == "euclidean" else 1)
    # a centre of zeros stays in the middle too
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    assert class_distances(opposite, torch.tensor([0, 0, 1]), distance)["pi_inter"] == pytest.approx(to_zero)


@pytest.mark.parametrize("shape", [(50, 6), (6, 50)])
@pytest.mark.parametrize("drop", [0, 1, 3])
@pytest.mark.parametrize("reverse", [False, True])
def test_rho_is_scipys_divergence_of_the_full_spectrum(shape, drop, reverse):
    states = (torch.randn(shape) * torch.linspace(0.2, 2, shape[1]) + 0.5).double()
    points = states.numpy() / np.linalg.norm(states.numpy(), axis=1, keepdims=True)
    share = np.linalg.svd(points, compute_uv=False)[drop:]
    share = share / share.sum()
    flat = np.full(len(share), 1 / len(share))
    expected = entropy(share, flat) if reverse else entropy(flat, share)
    assert len(share) == 6 - drop
    assert rho(states, drop=drop, reverse=reverse) == pytest.approx(expected, rel=1e-9)


def test_rho_is_zero_for_a_flat_spectrum_and_not_centred():
    directions = torch.eye(5).repeat(3, 1)
    assert rho(directions) == pytest.approx(0, abs=1e-12)
    assert rho(directions, drop=0) == pytest.approx(0, abs=1e-12)
    # the mean of these points is along a direction of its own, which the largest value belongs to
    shifted = torch.cat([torch.full((10, 1), 30.0), torch.cat([torch.eye(5), -torch.eye(5)])], dim=1)
    assert rho(shifted) == pytest.approx(0, abs=1e-12)
    assert rho(shifted, drop=0) > 1


def test_rho_of_spectra_with_zeros():
    dead = torch.cat([torch.randn(20, 3), torch.zeros(20, 1)], dim=1)
    assert rho(dead) == math.inf
    assert 0 <= rho(dead, reverse=True) < math.inf
    assert rho(dead, reverse=True) > rho(dead[:, :3], reverse=True)
    # rounding leaves 1e-17 in place of the zero
    double = torch.randn(20, 4, dtype=torch.float64)
    repeated = torch.cat([double, double[:, :2] @ torch.randn(2, 1, dtype=torch.float64)], dim=1)
    assert rho(repeated) == math.inf
    assert math.isnan(rho(torch.ones(5, 3)))  # nothing but the first value
    assert rho(torch.ones(5, 3), drop=0) == math.inf
    assert math.isnan(rho(torch.randn(5, 3), drop=3))
    assert math.isnan(rho(torch.randn(5, 3), drop=9))
    assert math.isnan(rho(torch.zeros(5, 3), drop=0))
    assert math.isnan(rho(torch.randn(1, 3)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_a_state_that_is_no_number_is_a_result(bad, distance):
    states = torch.randn(8, 3)
    states[0, 0] = bad
    found = class_distances(states, torch.arange(8) % 2, distance)
    assert found["geometry_classes"] == 2
    assert all(math.isnan(found[name]) for name in ("pi_intra", "pi_inter", "pi_density"))
    assert math.isnan(rho(states))
    assert math.isnan(rho(states, reverse=True))


def test_the_measure_reads_features_and_leaves_the_network_alone():
    x, y = images(30)
    model = convolutional()
    task = subject(model, pixels=PIXELS, test=(x, y), train=(x[:9], y[:9]))
    with torch.no_grad():
        states = model[:6](PIXELS.normalise(x))
    model.train()
    with left_alone(model):
        found = compute(task, GeometryOptions())
    expected = {
        **by_loops(states.numpy(), y, "euclidean"),
        "rho": rho(states),
        "rho_zeros": 0,
        "geometry_classes": 3,
        "geometry_single_classes": 0,
    }
    assert found == pytest.approx(expected, rel=1e-4)
    assert all(MEASURES["geometry"].describe(name) for name in found)
    # all options arrive
    options = GeometryOptions(split="train", layer="logits", per_class=1, distance="cosine", drop=0, reverse=True)
    other = compute(task, options)
    assert other["geometry_single_classes"] == 3
    assert math.isnan(other["pi_intra"])
    logits = task.predict(x[:9]).float()
    candidates = [torch.stack(rows) for rows in itertools.product(*(logits[y[:9] == c] for c in range(3)))]
    assert any(other["rho"] == pytest.approx(rho(c, drop=0, reverse=True), rel=1e-4) for c in candidates)


def test_given_states_are_measured_as_they_are():
    x, y = torch.randn(20, 4), torch.arange(20) % 2
    found = compute(subject(Given(), test=(x, y)), GeometryOptions(layer="state", distance="cosine"))
    assert found == {**class_distances(x, y, "cosine"), "rho": rho(x), "rho_zeros": 0}


def test_unused_directions_say_why_rho_is_infinite():
    x, y = torch.randn(20, 6), torch.arange(20) % 2
    x[:, [1, 4]] = 0
    found = compute(subject(Given(), test=(x, y)), GeometryOptions(layer="state"))
    assert (found["rho"], found["rho_zeros"]) == (math.inf, 2)
    x[3, 0] = math.nan
    assert math.isnan(compute(subject(Given(), test=(x, y)), GeometryOptions(layer="state"))["rho_zeros"])
