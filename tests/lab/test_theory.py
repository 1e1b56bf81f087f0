"""The theory's checks: exact against slow references, and failing where what they test is not so."""

import dataclasses
import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import optimize, special, stats

from manifold_mixup.lab import theory, theory_affine, theory_checks, theory_counterexamples, theory_deep
from manifold_mixup.lab.errors import CorruptedFile, UsageError
from manifold_mixup.lab.theory import Check, TheoryResult, run_theory
from manifold_mixup.lab.theory_affine import Affine, affine_checks, check_solution, closed_form, least_loss, solve
from manifold_mixup.lab.theory_checks import flatness, labels, mixed_squares, moved_outputs, one_hot, segment_deviations
from manifold_mixup.lab.theory_counterexamples import SegmentHead, plane_checks, segment_checks
from manifold_mixup.lab.theory_deep import Setting, deep_checks, losses, train

COMMITTED = Path(__file__).parents[2] / "docs" / "results" / "desk" / "theory.jsonl"
PLAIN = Setting(network=False, mode="plain", loss="squared error")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def expected_by_quadrature(residuals, alpha):
    """The expectation over all ordered pairs, and over λ by a quadrature that is exact for polynomials."""
    nodes, weights = special.roots_jacobi(4, alpha - 1, alpha - 1)
    total = 0.0
    for node, weight in zip((nodes + 1) / 2, weights / weights.sum(), strict=True):
        mixed = node * residuals[:, None] + (1 - node) * residuals[None]
        total += weight * (mixed**2).sum(-1).mean()
    return total


def outcomes(checks):
    return {check.name: check.passed for check in checks}


def solved(d, dim, seed=0, alternations=500):
    y = labels([6 + c for c in range(d)])
    return (*solve(normal(len(y), dim, seed=seed), one_hot(y, d), alternations), y)


# ------------------------------------------------------------------ the objective


@pytest.mark.parametrize("alpha", [0.2, 1.0, 2.0, 7.0])
def test_the_closed_form_is_the_expectation_over_pairs_and_lambda(alpha):
    residuals = normal(9, 4) + 0.7  # with a mean, which the second term sees
    assert closed_form(residuals, alpha) == pytest.approx(expected_by_quadrature(residuals.numpy(), alpha), rel=1e-12)


def test_without_mixing_the_closed_form_is_the_plain_squared_error():
    residuals = normal(9, 4) + 0.7
    assert closed_form(residuals, 0) == pytest.approx(float((residuals**2).sum(1).mean()), rel=1e-14)


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_sampling_agrees_with_the_closed_form_of_its_alpha_and_with_no_other(alpha):
    states, y = normal(30, 2), labels([10, 10, 10])
    head, targets = Affine(normal(3, 2, seed=1), normal(3, seed=2)), one_hot(y, 3)
    squares = mixed_squares(head, states, targets, 20_000, generator(3), alpha)
    error = float(squares.std()) / math.sqrt(20_000)
    residuals = head(states) - targets
    assert abs(float(squares.mean()) - closed_form(residuals, alpha)) < 5 * error
    assert abs(float(squares.mean()) - closed_form(residuals, 0)) > 5 * error


# ------------------------------------------------------------------ the least loss


def test_the_least_loss_of_three_classes_on_a_line_agrees_with_brute_force():
    y = np.array([0, 0, 1, 1, 1, 2, 2])
    targets = np.eye(3)[y]

    def objective(flat):
        states, weight, bias = flat[:7], flat[7:10], flat[10:]
        return expected_by_quadrature(states[:, None] * weight + bias - targets, 2.0)

    rng = np.random.default_rng(0)
    found = min(optimize.minimize(objective, rng.normal(size=13)).fun for _ in range(3))
    assert found == pytest.approx(least_loss(torch.tensor(targets), 1), rel=1e-6)


def test_no_direction_on_a_grid_is_better_than_the_least_loss():
    targets = one_hot(labels([5, 3, 9]), 3)
    centred = (targets - targets.mean(0)).numpy()
    polar, around = np.meshgrid(np.linspace(0, np.pi, 181), np.linspace(0, np.pi, 181))
    along = np.stack([np.sin(polar) * np.cos(around), np.sin(polar) * np.sin(around), np.cos(polar)], -1).reshape(-1, 3)
    left = (centred**2).sum() - ((centred @ along.T) ** 2).sum(0)  # after the best states for each direction
    best = 0.6 * left.min() / len(centred)
    least = least_loss(targets, 1)
    assert least <= best <= least * 1.001


@pytest.mark.parametrize("d", [3, 5, 10])
def test_the_least_loss_of_equal_classes_is_known(d):
    targets = one_hot(labels([4] * d), d)
    for dim in range(1, d - 1):
        assert least_loss(targets, dim) == pytest.approx(0.6 * (d - 1 - dim) / d, rel=1e-12)
    assert [least_loss(targets, dim) for dim in (d - 1, d, d + 3)] == [0, 0, 0]


# ------------------------------------------------------------------ the affine head


@pytest.mark.parametrize(("d", "dim"), [(2, 1), (2, 2), (3, 1), (3, 2), (3, 6), (5, 3)])
def test_every_check_of_the_affine_head_passes(d, dim):
    found = outcomes(affine_checks(d, dim, seed=4))
    always = {"closed form", "same zeros"}
    reached = {"loss", "segments", "rank", *(("spread",) if dim == d - 1 else ("rank filled", "null space"))}
    assert found == dict.fromkeys(always | ({"least loss"} if dim < d - 1 else reached), True)


def test_the_default_shapes_hold_both_sides_of_the_limit_for_every_number_of_classes():
    for d in (3, 5, 10):
        assert {(d, d - 2), (d, d - 1), (d, d), (d, d + 3)} <= set(theory_affine.SHAPES)
    assert {(2, 1), (2, 2), (2, 5)} <= set(theory_affine.SHAPES)
    assert min(dim for _, dim in theory_affine.SHAPES) == 1


def test_the_minimisation_never_goes_up():
    values = []
    for alternations in range(1, 6):
        states, head, y = solved(5, 3, alternations=alternations)
        values.append(closed_form(head(states) - one_hot(y, 5)))
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(values))
    assert values[-1] < 0.99 * values[0]


def test_what_the_head_does_not_see_stays_as_it_was_drawn():
    states, head, y = solved(3, 5)
    unseen = torch.linalg.svd(head.weight).Vh[2:].T  # the null space of a 3 x 5 matrix of rank 2
    assert torch.allclose((states - normal(len(y), 5)) @ unseen, torch.zeros(len(y), 3).double(), atol=1e-11)
    assert float((states - normal(len(y), 5)).norm()) > 1


# ------------------------------------------------------------------ checks that have to fail


@pytest.mark.parametrize(("dim", "own"), [(2, "spread"), (4, "null space")])
def test_plainly_trained_representations_fail_every_consequence(dim, own):
    trained = train(PLAIN, 3, dim, seed=0, steps=150)
    middle = trained.states.mean(0)
    targets = one_hot(trained.y, 3)
    weight = torch.linalg.lstsq(trained.states - middle, targets - targets.mean(0)).solution.T
    head = Affine(weight, targets.mean(0) - weight @ middle)
    assert trained.wrong == 0
    found = outcomes(check_solution(trained.states, head, trained.y, 0, generator()))
    assert {name: found[name] for name in ("loss", "segments", "rank", own)} == dict.fromkeys(
        ("loss", "segments", "rank", own), False
    )


@pytest.mark.parametrize(("dim", "failing"), [(2, {"rank", "spread"}), (4, {"rank", "null space"})])
def test_one_example_that_is_off_by_a_millionth_is_noticed(dim, failing):
    states, head, y = solved(3, dim)
    states[4] += 1e-6 * states.std() * torch.linalg.svd(head.weight).Vh[0]
    found = outcomes(check_solution(states, head, y, 0, generator()))
    assert {name for name, passed in found.items() if passed is False} == failing | {"loss", "segments"}


def test_classes_without_any_spread_do_not_pass_for_flat_in_the_null_space():
    states, head, y = solved(3, 4)
    points = torch.stack([states[y == c].mean(0) for c in range(3)])[y]
    found = outcomes(check_solution(points, head, y, 0, generator()))
    assert {name for name, passed in found.items() if passed is False} == {"rank filled", "null space"}


def test_the_least_loss_check_fails_above_the_bound_and_below_it(monkeypatch):
    states, head, y = solved(5, 3, alternations=2)
    assert outcomes(check_solution(states, head, y, 0, generator())) == {"least loss": False}
    states, head, y = solved(5, 3)
    assert outcomes(check_solution(states, head, y, 0, generator())) == {"least loss": True}
    monkeypatch.setattr(theory_affine, "least_loss", lambda targets, dim: 1.001 * least_loss(targets, dim))
    assert outcomes(check_solution(states, head, y, 0, generator())) == {"least loss": False}


def test_states_that_are_not_finite_fail():
    states, head, y = solved(3, 2)
    states[0, 0] = math.nan
    assert set(outcomes(check_solution(states, head, y, 0, generator())).values()) == {False}


def test_a_wrong_closed_form_fails(monkeypatch):
    monkeypatch.setattr(theory_affine, "closed_form", lambda r, alpha=2.0: 1.1 * closed_form(r, alpha))
    assert outcomes(affine_checks(3, 2, 0))["closed form"] is False
    monkeypatch.setattr(theory_affine, "closed_form", lambda r, alpha=2.0: closed_form(r, 0) * (1 if alpha == 0 else 2))
    assert outcomes(affine_checks(3, 2, 0))["same zeros"] is False


# ------------------------------------------------------------------ quantities


def test_flatness_agrees_with_numpy():
    y, states = labels([7, 9, 11]), normal(27, 4) * torch.tensor([3.0, 1.0, 0.1, 0.0])
    found = flatness(states, y, 3)
    classes = [states.numpy()[y.numpy() == c] for c in range(3)]
    means = np.array([rows.mean(0) for rows in classes])
    unit = np.sqrt(((means - means.mean(0)) ** 2).sum(1).mean())
    spreads = [np.sqrt(((rows - rows.mean(0)) ** 2).sum(1).mean()) for rows in classes]
    roots = [np.sqrt(np.linalg.eigvalsh(np.cov(rows.T, bias=True)).clip(0)) for rows in classes]
    assert found.spread == pytest.approx(max(spreads) / unit, rel=1e-12)
    assert found.absolute == pytest.approx(max(spreads), rel=1e-12)
    assert found.excess == pytest.approx(max(np.sqrt((r[:-2] ** 2).sum()) for r in roots) / unit, rel=1e-6)
    assert (found.rank, found.least_rank) == (3, 3)
    assert found.effective_rank == pytest.approx(np.mean([np.exp(stats.entropy(r)) for r in roots]), rel=1e-6)


def test_ranks_are_those_of_the_flattest_and_of_the_least_flat_class():
    y, states = labels([5, 5]), normal(10, 3)
    states[:5] = torch.tensor([[1.0, 2.0, 3.0]])
    assert (flatness(states, y, 2).rank, flatness(states, y, 2).least_rank) == (3, 0)


def test_outputs_are_moved_by_differences_within_a_class_alone():
    y = labels([6, 8])
    states = normal(14, 2) + 100.0 * y[:, None]
    found = moved_outputs(lambda h: h, states, y, generator())
    possible = torch.cat([torch.cdist(states[y == c], states[y == c]).flatten() for c in (0, 1)])
    assert len(found) == theory_checks.ROUNDS * 14
    assert float((found[:, None] - possible).abs().min(dim=1).values.max()) < 1e-9
    assert float(found.max()) > 1


def test_a_head_that_does_not_see_the_difference_is_not_moved():
    y = labels([6, 8])
    states = torch.stack([normal(14), y.double()], 1)
    assert float(moved_outputs(lambda h: h[:, 1:], states, y, generator()).max()) == 0


def test_an_affine_head_is_straight_on_segments_wherever_they_lead():
    y, states = labels([5, 5]), normal(10, 3)
    head = Affine(normal(2, 3, seed=1), normal(2, seed=2))
    wrong, bent = segment_deviations(head, states, y, one_hot(y, 2), generator())
    assert float(bent.max()) < 1e-13
    assert float(wrong.min()) > 1e-3
    assert len(wrong) == len(bent) > 0
    _, bent = segment_deviations(lambda h: head(h) ** 2, states, y, one_hot(y, 2), generator())
    assert float(bent.mean()) > 0.1


# ------------------------------------------------------------------ deep heads


def test_cross_entropy_minus_its_floor_is_the_divergence_from_the_target():
    targets = torch.softmax(normal(6, 4), 1)
    targets[0] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    logits = normal(6, 4, seed=1)
    expected = [stats.entropy(t, p) for t, p in zip(targets.numpy(), logits.softmax(1).numpy(), strict=True)]
    assert losses(logits, targets, "cross-entropy").tolist() == pytest.approx(expected, rel=1e-12)
    floor = losses(targets[1:].log(), targets[1:], "cross-entropy")
    assert float(floor.abs().max()) < 1e-14
    assert losses(logits, targets, "squared error").tolist() == pytest.approx(
        [float(((o - t) ** 2).sum()) for o, t in zip(logits, targets, strict=True)]
    )


def test_all_settings_of_a_seed_start_from_the_same_network_and_examples():
    starts = [train(setting, 3, 2, 0, steps=0).states for setting in theory_deep.SETTINGS if setting.network]
    assert len(starts) == 6
    assert all(torch.equal(starts[0], other) for other in starts)
    assert not torch.equal(starts[0], train(theory_deep.SETTINGS[-1], 3, 2, 1, steps=0).states)


def test_manifold_mixup_with_a_deep_head_is_flatter_than_input_mixup():
    spread = {}
    for mode in ("input mixup", "manifold mixup"):
        found = train(Setting(True, mode, "cross-entropy"), 3, 2, 0, steps=300)
        spread[mode] = flatness(found.states, found.y, 3).spread
    assert 2 * spread["manifold mixup"] < spread["input mixup"]


@pytest.mark.parametrize(
    ("setting", "dim", "own"),
    [
        (PLAIN, 5, "control excess"),
        (Setting(False, "plain", "cross-entropy"), 2, "control spread"),
        (Setting(True, "plain", "squared error"), 2, "control spread"),
        (Setting(True, "input mixup", "squared error"), 2, "control spread"),
        (Setting(True, "input mixup", "cross-entropy"), 5, "control excess"),
    ],
)
def test_controls_are_far_from_flat_once_they_fit(setting, dim, own):
    found = [check for check in deep_checks(setting, 3, dim, 0, steps=120) if check.passed is not None]
    assert outcomes(found) == dict.fromkeys(("control moved", own, "control segments"), True)


def test_a_control_that_does_not_fit_its_examples_proves_nothing():
    found = [check for check in deep_checks(PLAIN, 3, 2, 0, steps=1) if check.passed is not None]
    assert max(check.value for check in found) > theory_deep.MARGIN
    assert [check.passed for check in found] == [False] * 3


def test_nothing_is_demanded_of_manifold_mixup_with_a_deep_head():
    setting = dataclasses.replace(PLAIN, mode="manifold mixup")
    found = list(deep_checks(setting, 3, 2, 0, steps=1))
    assert {check.name for check in found} == set(theory.MEASURED)
    assert {check.passed for check in found} == {None}


# ------------------------------------------------------------------ counterexamples


def test_four_classes_fit_in_a_plane_with_a_deep_head_and_not_without_training():
    assert outcomes(plane_checks(0, steps=400)) == {"four classes in a plane": True}
    assert outcomes(plane_checks(0, steps=1)) == {"four classes in a plane": False}


def test_a_head_that_looks_segments_up_knows_points_on_segments():
    states = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    head = SegmentHead(states, torch.eye(3, dtype=torch.float64))
    points = torch.tensor([[0.5, 0.0], [1.0, 2.0], [0.0, -9.0], [1.0, -0.5]], dtype=torch.float64)
    expected = [[0.75, 0.25, 0], [0, 0.5, 0.5], [1, 0, 0], [0.5, 0.5, 0]]
    assert torch.allclose(head(points), torch.tensor(expected, dtype=torch.float64), atol=1e-15)


def test_random_representations_have_zero_loss_in_space_and_not_on_a_line():
    (space,), (line,) = segment_checks(3, 3, 0), segment_checks(3, 1, 0)
    assert space.passed is True
    assert line.passed is False
    assert line.value > 0.1


# ------------------------------------------------------------------ the run


@pytest.fixture(scope="module")
def short():
    return run_theory([3], steps=2)


def test_a_short_run_has_every_part_and_only_training_can_fail_in_it(short):
    assert {check.seed for check in short.checks} == {3}
    shapes = {(check.d, check.dim) for check in short.checks}
    assert shapes == {*theory_affine.SHAPES, *theory_deep.SHAPES, *theory_counterexamples.SHAPES, (4, 2)}
    failed = {check.name for check in short.checks if check.passed is False}
    assert failed >= {"four classes in a plane", "least loss"}
    assert all(name.startswith("control") for name in failed - {"four classes in a plane", "least loss"})
    assert short.passed is False
    settings = {check.setting for check in short.checks if check.passed is None}
    assert settings == {f"{setting.title}, deep head" for setting in theory_deep.SETTINGS}


def test_a_seed_gives_the_same_records_alone_and_among_others_and_leaves_the_global_state_alone(short, monkeypatch):
    monkeypatch.setattr(theory_affine, "SHAPES", ((2, 5), (10, 8), (10, 13)))
    monkeypatch.setattr(theory_deep, "SHAPES", ((3, 2),))
    monkeypatch.setattr(theory_counterexamples, "SHAPES", ((2, 3),))
    torch.manual_seed(77)
    before = torch.random.get_rng_state()
    seen = []
    both = run_theory([8, 3], steps=2, progress=lambda done, total: seen.append((done, total)))
    assert torch.equal(torch.random.get_rng_state(), before)
    first, second = ([c for c in both.checks if c.seed == seed] for seed in (8, 3))
    shapes = {(c.setting, c.d, c.dim) for c in second}
    assert second == [c for c in short.checks if (c.setting, c.d, c.dim) in shapes]
    assert [c.name for c in first] == [c.name for c in second]
    assert [c.value for c in first] != [c.value for c in second]
    total = 2 * (3 + len(theory_deep.SETTINGS) + 2)
    assert seen == [(done, total) for done in range(total + 1)]


def test_the_minimisation_is_the_same_to_the_last_bit():
    kept = []
    for size in range(40):
        kept.append(torch.randn(37 * size + 1))  # so that the memory is another each time
        states, head, _ = solved(10, 9, alternations=3)
        kept.append(states)
        assert torch.equal(states, kept[1])
        assert head.weight.isfinite().all()


@pytest.mark.parametrize(("seeds", "steps"), [([], None), ([-1], None), ([1, 1], None), ([0], 0)])
def test_arguments_that_make_no_sense_are_refused(seeds, steps):
    with pytest.raises(UsageError, match="seeds|steps=0"):
        run_theory(seeds, steps=steps)


# ------------------------------------------------------------------ records and tables


def check(value, seed=0, *, bound=1.0, passed=True, relation="<=", **changes):
    return dataclasses.replace(Check("c", "s", 3, 2, seed, value, bound, passed, f"n{seed}", relation, "x"), **changes)


def test_records_survive_json(short):
    text = json.dumps(short.to_records(), allow_nan=False)
    assert TheoryResult.from_records(json.loads(text)) == short


def test_a_value_that_is_no_number_is_null_and_comes_back():
    (record,) = TheoryResult((check(math.nan, passed=False),)).to_records()
    assert record["value"] is None
    (back,) = TheoryResult.from_records([record]).checks
    assert math.isnan(back.value)
    assert back.passed is False


def test_records_of_another_form_are_refused(short):
    record = short.to_records()[0]
    del record["bound"]
    with pytest.raises(CorruptedFile, match="record 0"):
        TheoryResult.from_records([record])


def test_the_table_of_verdicts_counts_over_seeds_and_shapes():
    checks = (check(0.5), check(2.0, 1, passed=False), check(0.1, dim=4), check(7.0, bound=None, passed=None, name="m"))
    grid = TheoryResult(checks).verdict_grid()
    assert grid.rows == [("c", "s", "(3, 2), (3, 4)", "2 of 3", "2", "<= 1")]
    assert grid.notes == ["2 of 3 checks passed."]


def test_the_table_of_measurements_has_one_way_of_training_a_row():
    checks = tuple(
        check(value, seed, bound=None, passed=None, relation="", name=name)
        for name, values in (("loss", [0.001, 0.003]), ("spread", [0.25, 0.75]))
        for seed, value in enumerate(values)
    )
    grid = TheoryResult((*checks, check(0.1))).measured_grid()
    (row,) = grid.rows
    assert row[:5] == ("3", "2", "x", "2.0e-03", "0.500 ± 0.354")
    assert row[5:] == ("-", "-", "-", "-", "-", "2")
    assert len(grid.head) == len(row)


@pytest.mark.skipif(not COMMITTED.exists(), reason="the published results have no records of the theory")
def test_the_committed_records_are_of_the_checks_as_they_are_today(short):
    found = TheoryResult.from_records(map(json.loads, COMMITTED.read_text(encoding="utf-8").splitlines()))
    assert found.passed
    for seed in {check.seed for check in found.checks}:
        own = [(c.name, c.statement, c.setting, c.d, c.dim) for c in found.checks if c.seed == seed]
        assert own == [(c.name, c.statement, c.setting, c.d, c.dim) for c in short.checks]
