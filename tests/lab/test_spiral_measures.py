"""The spiral's measures on networks whose boundary, confidence and hidden states are known exactly."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from manifold_mixup.lab.measures import decision_margin, spiral_measures, within_between_ratio


def classifier(rule):
    """A labelling of the plane; counts the points it is asked about."""

    def classify(points):
        classify.points += len(points)
        return rule(points).long()

    classify.points = 0
    return classify


class Planar(nn.Module):
    """Logits (0, f(bottleneck(x))), with an affine bottleneck of the plane."""

    def __init__(self, function, matrix=((1.0, 0.0), (0.0, 1.0))):
        super().__init__()
        self.bottleneck = nn.Linear(2, 2, bias=False)
        self.bottleneck.weight.data = torch.tensor(matrix)
        self.dropout = nn.Dropout()
        self.function = function

    def forward(self, x):
        value = self.function(self.bottleneck(x))
        return self.dropout(torch.stack([torch.zeros_like(value), value], dim=1))


def points(n=40, seed=0, spread=10.0):
    return (torch.rand(n, 2, generator=torch.Generator().manual_seed(seed)) - 0.5) * spread


# ---------------------------------------------------------------- the margin


@pytest.mark.parametrize("turn", [0.0, 0.3, 1.0, 2.5])
@pytest.mark.parametrize("offset", [0.0, 1.7, -3.0])
def test_margin_of_a_line_is_the_distance_of_the_nearest_point(turn, offset):
    normal = torch.tensor([math.cos(turn), math.sin(turn)], dtype=torch.float64)
    x = points().double()
    signed = x @ normal - offset
    found = decision_margin(lambda p: (p.double() @ normal > offset).long(), x.float(), (signed > 0).long())
    assert found == pytest.approx(float(signed.abs().min()), abs=1e-4)


@pytest.mark.parametrize("radius", [1.0, 2.5, 4.0])
def test_margin_of_a_circle_from_inside_and_outside(radius):
    x = points(60, seed=1)
    distance = (x.double().norm(dim=1) - radius).abs()
    found = decision_margin(lambda p: (p.norm(dim=1) > radius).long(), x, (x.norm(dim=1) > radius).long())
    assert found == pytest.approx(float(distance.min()), abs=1e-4)


def test_margin_of_a_corner_where_the_nearest_point_of_the_boundary_is_the_tip():
    def rule(p):
        return ((p[:, 0] > 1) & (p[:, 1].abs() < 0.5 * (p[:, 0] - 1))).long()  # a wedge that points at the origin

    x, y = torch.tensor([[0.0, 0.0], [6.0, 1.3]]), torch.tensor([0, 1])  # the tip is in no special direction
    assert decision_margin(rule, x, y) == pytest.approx(1.0, abs=1e-4)


def test_margin_finds_what_is_too_small_for_the_first_scan():
    islands = [(torch.tensor([-20.0, 1.4]), 0.5), (torch.tensor([-40.6, 0.0]), 0.05)]

    def rule(p):
        inside = [(p - centre).norm(dim=1) < radius for centre, radius in islands]
        return ((p[:, 0] > 5) | torch.stack(inside).any(dim=0)).long()

    x, y = torch.tensor([[0.0, 0.0], [-20.0, 0.0], [-40.0, 0.0], [9.0, 0.0]]), torch.tensor([0, 0, 0, 1])
    # 5 to the half-plane, then 0.9 to the large island, then 0.55 to the small one
    assert decision_margin(rule, x, y) == pytest.approx(0.55, abs=1e-4)


def test_margin_finds_an_island_near_a_point_that_is_far_from_every_other_point():
    centre, size = torch.tensor([0.31, 0.77]), 0.31

    def rule(p):
        return ((p[:, 0] > 5) | ((p - centre).norm(dim=1) < size)).long()

    x, y = torch.tensor([[0.0, 0.0], [9.0, 0.0]]), torch.tensor([0, 1])
    assert decision_margin(rule, x, y) == pytest.approx(float(centre.norm()) - size, abs=1e-4)


def test_margin_of_a_real_network_agrees_with_a_brute_force_grid():
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2))
    net[0].weight.data *= 2

    def classify(p):
        with torch.no_grad():
            return net(p).argmax(dim=1)

    x = points(20, seed=2, spread=6.0)
    with torch.no_grad():
        net[4].bias[0] -= (net(x)[:, 0] - net(x)[:, 1]).sort().values[9:11].mean()  # half of the points on either side
    y = classify(x)
    assert y.sum() == 10
    axis = torch.linspace(-4, 4, 801)
    grid = torch.cartesian_prod(axis, axis)
    labels = classify(grid)
    brute = min(float((grid[labels != label] - point).norm(dim=1).min()) for point, label in zip(x, y, strict=True))
    assert abs(decision_margin(classify, x, y) - brute) < 0.0071  # half a diagonal of a cell


def test_margin_is_zero_when_a_training_point_is_misclassified():
    counted = classifier(lambda p: p[:, 0] > 0)
    x = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    assert decision_margin(counted, x, torch.tensor([0, 1, 0])) == 0.0
    assert counted.points == 3


def test_margin_scales_with_the_units_of_the_input():
    def rule(unit):
        return lambda p: (p[:, 0] / unit + (p[:, 1] / unit) ** 2 > 0.4).long()

    x = points(30, seed=4, spread=4.0)
    y = rule(1.0)(x)
    assert decision_margin(rule(1e3), x * 1e3, y) == pytest.approx(1e3 * decision_margin(rule(1.0), x, y), rel=1e-3)


def test_margin_is_affordable():
    counted = classifier(lambda p: p[:, 0] + 0.5 * torch.sin(3 * p[:, 1]) > 0)
    x = points(120, seed=5, spread=26.0)
    decision_margin(counted, x, counted(x))
    assert counted.points < 1_000_000


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(3), "two classes"),
        (torch.zeros(3, 3), torch.zeros(3), r"\(n, 2\)"),
        (torch.zeros(3, 2), torch.zeros(2), r"\(n, 2\)"),
    ],
)
def test_margin_refuses_what_has_no_boundary(x, y, message):
    with pytest.raises(ValueError, match=message):
        decision_margin(lambda p: torch.zeros(len(p)), x, y)


# ---------------------------------------------------------------- within / between


@pytest.mark.parametrize(("features", "classes"), [(1, 2), (2, 2), (5, 4)])
def test_ratio_against_scatter_matrices_in_numpy(features, classes):
    rng = np.random.default_rng(features)
    labels = rng.integers(classes, size=50)
    hidden = rng.normal(size=(50, features)) + labels[:, None]
    total = (len(hidden) - 1) * np.cov(hidden.T, ddof=1).reshape(features, features)
    within = sum(
        (np.sum(labels == c) - 1) * np.cov(hidden[labels == c].T, ddof=1).reshape(features, features)
        for c in range(classes)
    )
    found = within_between_ratio(torch.tensor(hidden), torch.tensor(labels))
    assert found == pytest.approx(np.trace(within) / np.trace(total - within))


def test_ratio_of_one_feature_is_the_f_statistic_upside_down():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 30)
    hidden = rng.normal(size=(60, 1)) + 2 * labels[:, None]
    f = stats.f_oneway(hidden[labels == 0, 0], hidden[labels == 1, 0]).statistic
    assert within_between_ratio(torch.tensor(hidden), torch.tensor(labels)) == pytest.approx(58 / f)


def test_ratio_does_not_change_under_shift_turn_and_scale():
    torch.manual_seed(0)
    hidden, labels = torch.randn(40, 2, dtype=torch.float64), torch.arange(40) % 2
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    expected = within_between_ratio(hidden, labels)
    assert within_between_ratio(7.0 * hidden @ turn + 3.0, labels) == pytest.approx(expected)


def test_ratio_at_the_edges():
    labels = torch.tensor([0, 0, 1, 1])
    spread = torch.tensor([[-1.0], [1.0], [-1.0], [1.0]])
    assert within_between_ratio(torch.tensor([[0.0], [0.0], [1.0], [1.0]]), labels) == 0.0
    assert within_between_ratio(spread, labels) == math.inf
    assert math.isnan(within_between_ratio(torch.zeros(4, 1), labels))
    assert math.isnan(within_between_ratio(torch.full((4, 1), math.nan), labels))
    with pytest.raises(ValueError, match="two classes"):
        within_between_ratio(spread, torch.zeros(4, dtype=torch.long))


# ---------------------------------------------------------------- all together


def measured(model, seed=0):
    x, fresh = points(30, seed=6, spread=20.0), points(200, seed=7, spread=20.0)
    return spiral_measures(model, x, (x[:, 0] > 0).long(), fresh, (fresh[:, 0] > 0).long(), seed), x


def test_a_linear_network_measured_exactly():
    # P(class 1) = sigmoid(x1), so the top probability is below 0.9 where |x1| < log 9: a band of the square.
    model = Planar(lambda h: h[:, 0] / 2, matrix=((2.0, 0.0), (0.0, 3.0))).train()
    (metrics, pictures), x = measured(model)
    assert metrics["train_accuracy"] == metrics["test_accuracy"] == 100.0
    assert metrics["low_confidence_share"] == pytest.approx(100 * 2 * math.log(9) / 30, abs=100 / 400)
    assert metrics["margin"] == pytest.approx(float(x[:, 0].abs().min()), abs=1e-4)
    scaled = x * torch.tensor([2.0, 3.0])
    assert metrics["within_between_ratio"] == pytest.approx(within_between_ratio(scaled, (x[:, 0] > 0).long()))
    assert np.allclose(pictures["train_hidden"], scaled, atol=1e-5)
    assert model.training
    assert model.dropout.training
    assert not model.bottleneck._forward_hooks


def test_pictures_are_placed_as_their_extent_says():
    (_, pictures), x = measured(Planar(lambda h: h[:, 0] + 100 * (h[:, 1] > 0)))
    surface = pictures["surface"]
    assert surface.shape == (200, 200)
    assert surface.dtype == np.float16
    assert pictures["extent"].tolist() == [-15, 15, -15, 15]
    centres = (np.arange(200) + 0.5) * 0.15 - 15
    assert np.allclose(surface[20], 1 / (1 + np.exp(-centres)), atol=2e-3)  # a row near the bottom: columns follow x1
    assert np.all(surface[100:] > 0.99)  # rows go up in x2
    assert np.array_equal(pictures["train_x"], x)
    assert pictures["train_y"].dtype == np.int64
    uniform, top = pictures["uniform_hidden"], pictures["uniform_top"]
    assert uniform.shape == (2000, 2)
    assert np.abs(uniform).max() <= 15
    assert abs(uniform.mean()) < 4 * 15 / math.sqrt(3 * 4000)
    value = uniform[:, 0] + 100 * (uniform[:, 1] > 0)
    assert np.allclose(top, 1 / (1 + np.exp(-np.abs(value))), atol=1e-5)


def test_uniform_inputs_follow_the_seed_and_nothing_global():
    model = Planar(lambda h: h[:, 0])
    torch.manual_seed(1)
    (_, one), _ = measured(model, seed=3)
    state = torch.get_rng_state()
    (_, again), _ = measured(model, seed=3)
    (_, other), _ = measured(model, seed=4)
    assert np.array_equal(one["uniform_hidden"], again["uniform_hidden"])
    assert not np.array_equal(one["uniform_hidden"], other["uniform_hidden"])
    assert torch.equal(state, torch.get_rng_state())


def test_pictures_survive_safetensors(tmp_path):
    from safetensors.numpy import load_file, save_file

    (_, pictures), _ = measured(Planar(lambda h: h[:, 0]))
    save_file(pictures, tmp_path / "pictures.safetensors")
    assert all(np.array_equal(pictures[k], v) for k, v in load_file(tmp_path / "pictures.safetensors").items())


def test_a_wrapped_network_is_measured_as_well():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            return self.module(x)

    model = Planar(lambda h: h[:, 0])
    assert measured(Wrapper(model))[0][0] == measured(model)[0][0]


def test_a_network_that_diverged_is_wrong_everywhere_and_not_confident():
    (metrics, _), _ = measured(Planar(lambda h: h[:, 0] * math.nan))
    assert metrics["train_accuracy"] == metrics["test_accuracy"] == metrics["margin"] == 0.0
    assert math.isnan(metrics["low_confidence_share"])


def test_a_misfit_has_no_margin():
    (metrics, _), _ = measured(Planar(lambda h: h[:, 1]))
    assert 0 < metrics["train_accuracy"] < 100
    assert metrics["margin"] == 0.0


def test_a_network_without_such_a_bottleneck_is_refused():
    with pytest.raises(ValueError, match="exactly one submodule named 'bottleneck'"):
        measured(nn.Linear(2, 2))
    wide = nn.Sequential()
    wide.add_module("bottleneck", nn.Linear(2, 3))
    wide.add_module("head", nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"\(30, 2\) hidden states"):
        measured(wide)
    assert not wide.bottleneck._forward_hooks


def test_labels_other_than_two_classes_are_refused():
    x = points(4)
    with pytest.raises(ValueError, match="two classes 0 and 1"):
        spiral_measures(Planar(lambda h: h[:, 0]), x, torch.zeros(4, dtype=torch.long), x, torch.zeros(4), 0)
