"""Attacks against foolbox, closed forms of linear networks, and their own limits."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lab.measures.subjects import PIXELS, both_forms, convolutional, images, left_alone, subject
from manifold_mixup.lab import streams
from manifold_mixup.lab.criterion import bce_softmax
from manifold_mixup.lab.errors import UsageError
from manifold_mixup.lab.measures import attacks
from manifold_mixup.lab.measures.attacks import (
    FgsmOptions,
    PgdOptions,
    compute_fgsm,
    compute_pgd,
    fgsm,
    loss_gradient,
    pgd,
)
from manifold_mixup.lab.measures.registry import MEASURES, measure

with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # it reads scipy by an old name
    import foolbox

X, Y = images(40)
UNIT = X.float() / 255
MEAN, SD = (torch.tensor(v)[:, None, None] for v in (PIXELS.mean, PIXELS.sd))


def measured(model, n=40, **settings):
    return subject(model, pixels=PIXELS, test=(X[:n], Y[:n]), **settings)


def smooth(seed=0):
    """A convolutional network that tells these images apart, without gradients that are exactly 0."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Tanh(), nn.Flatten(), nn.Linear(96, 3)).eval()


def foolboxed(model, dtype=torch.float64):
    preprocessing = {"mean": list(PIXELS.mean), "std": list(PIXELS.sd), "axis": -3}
    wrapped = foolbox.PyTorchModel(model.to(dtype).eval(), bounds=(0, 1), preprocessing=preprocessing, device="cpu")
    return wrapped, UNIT.to(dtype)


def share_right(model, x):
    with torch.no_grad():
        return 100 * (model((x - MEAN.to(x)) / SD.to(x)).argmax(dim=1) == Y[: len(x)]).double().mean().item()


@pytest.mark.parametrize("size", [1, 8])
def test_fgsm_images_are_foolboxs(size):
    model = smooth().double()
    theirs, x = foolboxed(model)
    expected, _, success = foolbox.attacks.LinfFastGradientAttack()(theirs, x, Y, epsilons=size / 255)
    found = fgsm(x, loss_gradient(measured(model), x, Y), size / 255)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert (found - x).abs().max() == pytest.approx(size / 255)
    model.float()
    accuracy = compute_fgsm(measured(model), FgsmOptions(epsilon=[size], normalised=[]))
    assert accuracy == {f"fgsm_{size}_accuracy": pytest.approx(100 - 100 * success.double().mean().item())}


@pytest.mark.parametrize("steps", [1, 7])
def test_pgd_images_from_the_same_start_are_foolboxs(steps):
    model = smooth().double()
    theirs, x = foolboxed(model)
    options = {"epsilon": 8 / 255, "step": 2 / 255, "steps": steps}
    attack = foolbox.attacks.LinfProjectedGradientDescentAttack(
        rel_stepsize=None, abs_stepsize=2 / 255, steps=steps, random_start=False
    )
    expected, _, _ = attack(theirs, x, Y, epsilons=8 / 255)
    path = list(pgd(measured(model), x, Y, **options))
    assert len(path) == steps
    torch.testing.assert_close(path[-1], expected, rtol=0, atol=1e-12)

    start = 2 * torch.rand(x.shape, dtype=x.dtype) - 1

    class FromThere(type(attack)):
        def get_random_start(self, x0, epsilon):
            return x0 + epsilon * type(x0)(start)

    attack = FromThere(rel_stepsize=None, abs_stepsize=2 / 255, steps=steps, random_start=True)
    expected, _, _ = attack(theirs, x, Y, epsilons=8 / 255)
    torch.testing.assert_close(
        list(pgd(measured(model), x, Y, start=start, **options))[-1], expected, rtol=0, atol=1e-12
    )


def test_pgd_accuracies_are_foolboxs_from_the_measures_own_starts():
    model = smooth()
    task = measured(model)
    found = compute_pgd(task, PgdOptions(steps=[3, 7]))
    start = 2 * torch.rand(UNIT.shape, generator=streams.generator(0, "measures/pgd/0")) - 1

    class FromThere(foolbox.attacks.LinfProjectedGradientDescentAttack):
        def get_random_start(self, x0, epsilon):
            return x0 + epsilon * type(x0)(start)

    theirs, x = foolboxed(model, torch.float32)
    for steps in (3, 7):
        attack = FromThere(rel_stepsize=None, abs_stepsize=2 / 255, steps=steps, random_start=True)
        _, _, success = attack(theirs, x, Y, epsilons=8 / 255)
        assert found[f"pgd{steps}_8_accuracy"] == pytest.approx(100 - 100 * success.double().mean().item())
    assert 0 < found["pgd7_8_accuracy"] < 100


def test_in_normalised_units_the_step_is_the_same_for_every_channel_and_not_cut():
    model = smooth()
    normal = PIXELS.normalise(X).requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(normal), Y), normal)
    moved = (normal + 0.3 * gradient.sign()).detach()
    with torch.no_grad():
        expected = 100 * (model(moved).argmax(dim=1) == Y).double().mean().item()
    read = []
    handle = model.register_forward_pre_hook(lambda module, args: read.append(args[0].detach()))
    found = compute_fgsm(measured(model, batch_size=40), FgsmOptions(epsilon=[], normalised=[0.3]))
    handle.remove()
    assert found == {"fgsm_normalised_0.3_accuracy": pytest.approx(expected)}
    torch.testing.assert_close(read[-1], moved, rtol=0, atol=1e-5)
    pixels = moved * SD + MEAN
    assert pixels.min() < 0
    assert pixels.max() > 1


def test_a_linear_network_loses_by_what_its_weights_allow():
    # two classes: the margin w·x + b falls by ε |w|₁, and no attack in the box does better
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 2))
    x = torch.randint(60, 196, X.shape, dtype=torch.uint8)  # nothing is cut
    y = torch.arange(40) % 2
    w = (model[1].weight[1] - model[1].weight[0]).detach().view(3, 6, 6) / SD
    b = (model[1].bias[1] - model[1].bias[0]).detach() - (w * MEAN).sum()
    margin = (2 * y - 1) * ((w * x.float() / 255).sum(dim=(1, 2, 3)) + b)
    task = subject(model, pixels=PIXELS, test=(x, y))
    sizes = [1, 2, 4, 8]
    expected = [100 * (margin - size / 255 * w.abs().sum() > 0).double().mean().item() for size in sizes]
    assert expected[0] > expected[-1]
    found = compute_fgsm(task, FgsmOptions(normalised=[]))
    assert list(found.values()) == pytest.approx(expected)
    searched = compute_pgd(task, PgdOptions(epsilon=sizes, step=8, steps=[2]))
    assert list(searched) == [f"pgd2_{size}_accuracy" for size in sizes]
    assert list(searched.values()) == pytest.approx(expected)


def test_images_stay_in_the_box_and_among_valid_pixels():
    x = X.float() / 255
    x[:, :, :3], x[:, :, 3:] = 0.0, 1.0
    task = measured(smooth())
    start = 2 * torch.rand(x.shape) - 1
    for at in pgd(task, x, Y, epsilon=0.1, step=0.07, steps=5, start=start):
        assert (at - x).abs().max() <= 0.1 + 1e-6
        assert at.min() >= 0
        assert at.max() <= 1
    cut = fgsm(x, loss_gradient(task, x, Y), 0.1)
    assert cut.min() >= 0
    assert cut.max() <= 1


@pytest.mark.parametrize(("name", "criterion"), [("cross-entropy", F.cross_entropy), ("bce-softmax", bce_softmax)])
def test_gradients_are_those_of_the_loss_of_each_example_alone(name, criterion):
    model = smooth().double()
    x = UNIT.double()
    found = loss_gradient(measured(model), x, Y, name)
    if name == "cross-entropy":
        with torch.no_grad():
            true = model(PIXELS.normalise(x)).softmax(dim=1).gather(1, Y[:, None])
        found = found * (1 - true)[:, :, None, None]
    for i in range(5):
        own = x[i : i + 1].clone().requires_grad_()
        (expected,) = torch.autograd.grad(criterion(model(PIXELS.normalise(own)), Y[i : i + 1]), own)
        torch.testing.assert_close(found[i : i + 1], expected, rtol=1e-9, atol=1e-14)


def test_the_loss_is_the_one_asked_for(monkeypatch):
    asked = []
    real = attacks.loss_gradient
    monkeypatch.setattr(attacks, "loss_gradient", lambda *a: asked.append(a[3]) or real(*a))
    for compute, options in ((compute_fgsm, FgsmOptions), (compute_pgd, lambda **o: PgdOptions(steps=1, **o))):
        compute(measured(smooth(), n=5), options())
        compute(measured(smooth(), n=5), options(loss="bce-softmax"))
    assert asked == ["cross-entropy", "bce-softmax"] * 2
    signs = [loss_gradient(measured(smooth()), UNIT, Y, name).sign() for name in asked[:2]]
    assert 0 < (signs[0] != signs[1]).double().mean() < 0.2  # nearly parallel


def test_sure_predictions_have_gradients_too():
    # logits 100 times as large have the same order and, in two classes, directions; the probabilities round to 1
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 2))
    task = measured(model)
    labels = task.predict(X).argmax(dim=1)
    signs = loss_gradient(task, UNIT, labels).sign()
    expected = compute_fgsm(subject(model, pixels=PIXELS, test=(X, labels)), FgsmOptions())
    with torch.no_grad():
        model[1].weight.mul_(1000)
        model[1].bias.mul_(1000)
        normal = PIXELS.normalise(UNIT).requires_grad_()
    (plain,) = torch.autograd.grad(F.cross_entropy(model(normal), labels), normal)
    assert (plain.flatten(1) == 0).all(dim=1).double().mean() > 0.5
    assert torch.equal(loss_gradient(task, UNIT, labels).sign(), signs)
    assert compute_fgsm(subject(model, pixels=PIXELS, test=(X, labels)), FgsmOptions()) == expected


def test_longer_attacks_pass_through_the_shorter_ones_and_batches_do_not_matter():
    model = smooth()
    both = compute_pgd(measured(model), PgdOptions(steps="2+5"))
    alone = [compute_pgd(measured(model, batch_size=11), PgdOptions(steps=steps)) for steps in (2, 5)]
    assert both == alone[0] | alone[1]
    few = compute_pgd(measured(model), PgdOptions(steps=2, examples=10))
    assert few == compute_pgd(measured(model, n=10, seed=3), PgdOptions(steps=[2]))
    assert compute_fgsm(measured(model, batch_size=1), FgsmOptions()) == compute_fgsm(measured(model), FgsmOptions())


def test_starts_are_drawn_from_the_seed_for_all_networks_alike(monkeypatch):
    starts = []
    real = attacks.pgd
    monkeypatch.setattr(attacks, "pgd", lambda *a, start, **k: starts.append(start) or real(*a, start=start, **k))
    for seed, run in ((0, 0), (0, 1), (1, 0)):
        compute_pgd(measured(smooth(run), seed=run, batch_size=100), PgdOptions(steps=1, seed=seed))
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    assert -1 <= starts[0].min() < -0.99
    assert 0.99 < starts[0].max() <= 1
    assert abs(starts[0].mean()) < 0.05


def test_with_restarts_the_network_has_to_be_right_after_every_one(monkeypatch):
    model = smooth()
    options = {"steps": 1, "step": 1.0, "epsilon": 30}
    found = compute_pgd(measured(model), PgdOptions(**options, restarts=6))
    kept = torch.ones(40, dtype=torch.bool)
    for i in range(6):
        start = 2 * torch.rand(UNIT.shape, generator=streams.generator(0, f"measures/pgd/{i}")) - 1
        *_, at = pgd(measured(model), UNIT, Y, epsilon=30 / 255, step=1 / 255, steps=1, start=start)
        kept &= model(PIXELS.normalise(at)).argmax(dim=1) == Y
    assert found == {"pgd1_30_accuracy": pytest.approx(100 * kept.double().mean().item())}
    assert found["pgd1_30_accuracy"] < compute_pgd(measured(model), PgdOptions(**options))["pgd1_30_accuracy"]


@pytest.mark.parametrize("frozen", [True, False])
def test_the_network_is_left_as_it_was(frozen):
    model = convolutional().train()
    task = measured(model)
    model.train()[1].eval()
    model.requires_grad_(not frozen)
    model[0].weight.requires_grad_(False)
    if not frozen:
        model[6].weight.grad = torch.ones_like(model[6].weight)
    with left_alone(model):
        for compute, options in ((compute_fgsm, FgsmOptions()), (compute_pgd, PgdOptions(steps=[2]))):
            first = compute(task, options)
            assert compute(task, options) == first
    with torch.no_grad():
        assert compute_fgsm(task, FgsmOptions()) == compute_fgsm(task, FgsmOptions())
        assert not torch.is_grad_enabled()


def test_of_size_0_nothing_changes():
    task = measured(convolutional())
    clean = 100 - MEASURES["classification"].compute(task, MEASURES["classification"].options())["test_error"]
    one_step = compute_fgsm(task, FgsmOptions(epsilon=0, normalised=0))
    assert one_step == pytest.approx({"fgsm_0_accuracy": clean, "fgsm_normalised_0_accuracy": clean})
    assert compute_pgd(task, PgdOptions(epsilon=0, steps=2)) == pytest.approx({"pgd2_0_accuracy": clean})


def test_a_network_that_rules_all_other_classes_out_stays_right():
    class Sure(nn.Module):
        def forward(self, x):
            return torch.stack([x.mean(dim=(1, 2, 3)), torch.full((len(x),), -math.inf)], dim=1)

    task = subject(Sure(), pixels=PIXELS, test=(X, torch.zeros(40)))
    assert set(compute_fgsm(task, FgsmOptions()).values()) == {100.0}
    assert set(compute_pgd(task, PgdOptions(steps=2)).values()) == {100.0}


def test_a_gradient_that_is_no_number_does_not_make_a_prediction_wrong():
    class Root(nn.Module):
        def forward(self, x):
            return torch.stack([1 + (x - x).sqrt().sum(dim=(1, 2, 3)), torch.zeros(len(x))], dim=1)

    task = subject(Root(), pixels=PIXELS, test=(X, torch.zeros(40)))
    assert set(compute_fgsm(task, FgsmOptions()).values()) == {100.0}
    assert set(compute_pgd(task, PgdOptions(steps=2)).values()) == {100.0}


class Const(nn.Module):
    def forward(self, x):
        return torch.tensor([[1.0, 0.0, 1.0]]).expand(len(x), 3)


class Nan(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :3] * math.nan


def test_a_constant_prediction_cannot_be_attacked_and_one_that_is_no_number_is_wrong():
    share = 100 * int((Y == 0).sum()) / len(Y)
    for compute, options in ((compute_fgsm, FgsmOptions()), (compute_pgd, PgdOptions(steps=[2]))):
        assert set(compute(measured(Const()), options).values()) == {share}
        assert set(compute(measured(Nan(), n=1), options).values()) == {0.0}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_network_that_ends_in_low_precision_can_be_attacked(dtype):
    class Low(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = smooth()

        def forward(self, x):
            return self.inner(x).to(dtype)

    low, full = (compute_fgsm(measured(model), FgsmOptions(epsilon=8)) for model in (Low(), smooth()))
    assert low == pytest.approx(full, abs=6)


def test_examples_that_are_no_images_are_refused():
    task = subject(nn.Linear(2, 2), test=(torch.zeros(3, 2), [0, 1, 0]))
    for name in ("fgsm", "pgd"):
        with pytest.raises(UsageError, match=f"measure '{name}' needs images"):
            measure(task, [(MEASURES[name], MEASURES[name].options())])


def test_images_from_0_to_1_that_are_read_as_they_are_give_the_numbers_of_their_bytes():
    stored, floating = both_forms(smooth())
    requests = [
        (MEASURES["fgsm"], FgsmOptions(epsilon=[1, 8, 32], normalised=[0.03, 0.2])),
        (MEASURES["pgd"], PgdOptions(epsilon=[8, 32], steps=[2, 5], restarts=2)),
    ]
    found = measure(floating, requests)
    assert len(set(found.values())) > 3
    assert found == measure(stored, requests)


def test_a_normalised_unit_of_images_that_are_read_as_they_are_is_white():
    _, floating = both_forms(smooth())
    x, y = floating.parts["test"].x, floating.parts["test"].y
    moved = x + 0.2 * loss_gradient(floating, x, y).sign()
    with torch.no_grad():
        right = (floating.model(moved).argmax(dim=1) == y).double().mean().item()
    found = compute_fgsm(floating, FgsmOptions(epsilon=[], normalised=[0.2]))
    assert found == {"fgsm_normalised_0.2_accuracy": pytest.approx(100 * right)}


@pytest.mark.parametrize("value", [0, -1, 1.5, "7+", [], "none", True])
def test_counts_of_steps_that_are_none_are_refused(value):
    with pytest.raises(ValueError, match="should be one or more whole numbers above 0, such as"):
        PgdOptions(steps=value)


def test_every_number_has_words_with_its_size_and_unit():
    task = measured(convolutional(), n=3)
    titles = [MEASURES["fgsm"].describe(name).title for name in compute_fgsm(task, FgsmOptions())]
    assert titles == [*(f"accuracy, FGSM {n}/255" for n in (1, 2, 4, 8)), "accuracy, FGSM 0.03 normalised"]
    titles = [MEASURES["pgd"].describe(name).title for name in compute_pgd(task, PgdOptions())]
    assert titles == ["accuracy, PGD-7 8/255", "accuracy, PGD-20 8/255"]
