"""A step against the network run part by part, with targets, mixing and loss done by hand."""

import math

import pytest
import torch
from torch import nn

from lab.methods.two_batches import (
    LAYERS,
    SEED,
    Draws,
    assert_same_gradients,
    attached,
    batch,
    copied,
    criterion,
    labelled_loss,
    mixed,
    network,
    run_mixed,
    squares,
    statistics,
)
from manifold_mixup.lab import storage
from manifold_mixup.lab.errors import UsageError
from manifold_mixup.lab.methods import make_method
from manifold_mixup.lab.methods.base import Batch
from manifold_mixup.lab.methods.consistency import fixed_statistics
from manifold_mixup.lab.models import build_model
from manifold_mixup.mixup import ManifoldMixup

MODES = [("train", "logits"), ("train", "probabilities"), ("eval", "logits"), ("eval", "probabilities")]


def own_targets(model, u, mode, kind):
    """What a copy of the network says, so that nothing of the network itself moves."""
    with torch.no_grad():
        logits = copied(model).train(mode == "train")(u)
    return logits.softmax(1) if kind == "probabilities" else logits


def by_hand(reference, given, draws, *, mode="train", kind="logits", weight=1.0, ramp=0.4):
    """The loss of a step; the labelled batch has moved the statistics when the targets are computed."""
    loss = labelled_loss(reference, given, draws[0])
    targets = own_targets(reference, given.unlabelled, mode, kind)
    output = run_mixed(reference, given.unlabelled, draws[1])
    output = output.softmax(1) if kind == "probabilities" else output
    length = ramp * given.steps
    done = 1.0 if length == 0 else min(given.step / length, 1.0)
    return loss + weight * math.exp(-5 * (1 - done) ** 2) * squares(output, mixed(targets, draws[1]))


@pytest.mark.parametrize(("mode", "kind"), MODES)
@pytest.mark.parametrize("layers", [["input"], ["0"], ["1"], LAYERS], ids=str)
def test_a_step_is_the_loss_written_out(mode, kind, layers, monkeypatch):
    model = network()
    reference = copied(model)
    options = {"alpha": 0.8, "layers": layers, "targets": kind, "target_mode": mode, "weight": 1.7}
    method = attached("consistency", model, **options)
    draws = Draws(method, monkeypatch)
    for step in (0, 3, 8, 19):
        given = batch(step)
        loss = method.step(model, criterion, given)
        expected = by_hand(reference, given, draws.found[-2:], mode=mode, kind=kind, weight=1.7)
        assert_same_gradients(loss, model, expected, reference)
    assert {draw.layer for draw in draws.found} <= set(layers)
    assert draws.found[0].partner.shape == (6,)
    assert draws.found[1].partner.shape == (9,)


@pytest.mark.parametrize(("n", "m"), [(6, 2), (2, 7)])
def test_batches_of_any_sizes_are_mixed_each_within_itself(n, m, monkeypatch):
    model = network()
    reference = copied(model)
    method = attached("consistency", model, alpha=1.0, targets="logits", weight=1.0)
    draws = Draws(method, monkeypatch)
    given = batch(3, n=n, m=m)
    loss = method.step(model, criterion, given)
    assert_same_gradients(loss, model, by_hand(reference, given, draws.found), reference)


def images(m, seed=0):
    """A network that can be trained on one example, and a batch with m unlabelled ones."""
    torch.manual_seed(0)
    model = build_model("wrn_28_2", {"width": 0.1, "negative_slope": 0.01}, (3, 8, 8), 4).train()
    generator = torch.Generator().manual_seed(seed)
    x, u = torch.randn(4, 3, 8, 8, generator=generator), torch.randn(m, 3, 8, 8, generator=generator)
    return model, Batch(x, torch.arange(4), u, 0, 10)


def test_one_unlabelled_example_is_its_own_partner_and_should_be_what_it_is():
    model, given = images(1)
    reference = copied(model)
    method = attached("consistency", model, alpha=0.0, layers=["stage1"], targets="probabilities")
    loss = method.step(model, criterion, given)
    expected = criterion(reference(given.x), given.y)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)  # λh + (1 - λ)h is h


def test_layers_are_found_as_the_core_finds_them():
    model, given = images(3)
    expected = ManifoldMixup(copied(model)).discover(given.x)
    method = attached("consistency", model)
    method.step(model, criterion, given).backward()
    assert method.facts()["layers"] == expected
    assert len(expected) == 3


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_statistics_move_once_for_each_mixed_batch_and_modes_come_back(mode):
    model = network()
    frozen = model[1][1].eval()
    before, modes = statistics(frozen), [module.training for module in model.modules()]
    method = attached("consistency", model, target_mode=mode)
    for step in range(3):
        method.step(model, criterion, batch(step)).backward()
    assert model[0][1].num_batches_tracked == 6
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in frozen.named_buffers())
    assert all(m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm1d))


def test_with_fixed_statistics_batches_are_normalised_by_themselves_and_forgotten():
    x = torch.randn(5, 3).double()
    model = network()
    expected, before = copied(model)(x), statistics(model)
    with fixed_statistics(model):
        assert torch.equal(model(x), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    with pytest.raises(ZeroDivisionError), fixed_statistics(model):
        raise ZeroDivisionError
    model(x)
    assert model[0][1].num_batches_tracked == 1


def test_a_norm_that_its_owner_froze_still_reads_its_statistics():
    frozen = nn.InstanceNorm1d(2, track_running_stats=True).eval()
    x = torch.randn(4, 2, 5)
    expected = frozen(x)
    with fixed_statistics(nn.Sequential(frozen)):
        assert torch.equal(frozen(x), expected)


@pytest.mark.parametrize(("mode", "forwards"), [("train", 3), ("eval", 2)])
def test_dropout_is_active_in_the_pass_for_the_targets_in_train_mode_only(mode, forwards):
    model = network(dropout=0.5)
    method = attached("consistency", model, target_mode=mode)
    method.step(model, criterion, batch())  # finds the layers
    active = []
    model[2].register_forward_hook(lambda module, args, output: active.append(module.training))
    torch.manual_seed(1)
    method.step(model, criterion, batch())
    after = torch.get_rng_state()
    assert sum(active) == forwards
    assert len(active) == 3
    torch.manual_seed(1)
    nn.functional.dropout(torch.ones(6, 8), 0.5)
    for _ in range(forwards - 1):
        nn.functional.dropout(torch.ones(9, 8), 0.5)
    assert torch.equal(torch.get_rng_state(), after)  # nothing but dropout reads the global generator


@pytest.mark.parametrize("alpha", [0.0, 0.1, 2.0])
def test_without_weight_it_is_manifold_mixup_bit_for_bit_and_sees_no_unlabelled_example(alpha):
    model, control = network(), network()
    method = attached("consistency", model, alpha=alpha, layers=LAYERS, weight=0.0)
    other = make_method("manifold_mixup", {"alpha": alpha, "layers": LAYERS})
    transform = other.attach(control, [], SEED)
    for step in range(4):
        given = batch(step)
        x, y = transform(given.x, given.y)
        loss, expected = method.step(model, criterion, given), criterion(control(x), y)
        assert torch.equal(loss, expected)
        loss.backward()
        expected.backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), control.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), control.buffers(), strict=True))
    assert method.facts()["mixing"] == other.facts()["mixing"]
    assert method.facts()["mixing_unlabelled"]["layers"] == {}


def test_without_mixing_it_is_plain_training_and_plain_consistency():
    model = network()
    reference = copied(model)
    method = attached("consistency", model, alpha=0.0, alpha_unlabelled=0.0, target_mode="eval", weight=1.0)
    given = batch(19)
    loss = method.step(model, criterion, given)
    expected = criterion(reference(given.x), given.y)
    targets = own_targets(reference, given.unlabelled, "eval", "probabilities")
    expected = expected + nn.functional.mse_loss(reference(given.unlabelled).softmax(1), targets)
    assert_same_gradients(loss, model, expected, reference)
    found = method.facts()
    assert found["mixing"]["unmixed"] == found["mixing_unlabelled"]["unmixed"] == 1


def test_unmixed_in_train_mode_the_network_agrees_with_its_own_targets():
    model = network()
    reference = copied(model)
    method = attached("consistency", model, alpha=0.0, alpha_unlabelled=0.0, weight=1000.0)
    given = batch(19)
    loss, expected = method.step(model, criterion, given), criterion(reference(given.x), given.y)
    reference(given.unlabelled)  # moves the statistics
    assert_same_gradients(loss, model, expected, reference)


@pytest.mark.parametrize(("ramp", "step", "factor"), [(0.0, 0, 1.0), (1.0, 0, math.exp(-5)), (0.5, 5, math.exp(-1.25))])
def test_the_weight_grows_over_its_share_of_all_updates(ramp, step, factor):
    losses = []
    for weight in (0.0, 3.0, 6.0):
        model = network()
        method = attached("consistency", model, ramp=ramp, weight=weight, alpha=0.0)
        losses.append(method.step(model, criterion, batch(step, 20)).item())
    model = network()
    whole = attached("consistency", model, ramp=0.0, weight=1.0, alpha=0.0)
    unsupervised = whole.step(model, criterion, batch(step, 20)).item() - losses[0]
    assert unsupervised > 1e-3
    assert losses[1] - losses[0] == pytest.approx(3 * factor * unsupervised, rel=1e-3, abs=1e-6)
    assert losses[2] - losses[0] == pytest.approx(6 * factor * unsupervised, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", ["consistency", "ict"])
def test_half_precision_outputs_are_compared_in_single_precision(name, monkeypatch):
    model, given = images(5)
    method = attached(name, model, alpha=1.0, layers=["input", "stage1"])
    seen = []
    monkeypatch.setattr(
        nn.functional, "mse_loss", lambda a, b: seen.append((a.dtype, b.dtype)) or (a - b).square().mean()
    )
    with torch.autocast("cpu", torch.bfloat16):
        loss = method.step(model, criterion, given)
    assert seen == [(torch.float32, torch.float32)]
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["consistency", "ict"])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_batch_without_unlabelled_examples_is_refused(name, weight):
    model = network()
    method = attached(name, model, weight=weight)
    given = batch()
    with pytest.raises(UsageError, match=f"method '{name}' learns from unlabelled .* task 'semi_supervised'"):
        method.step(model, criterion, Batch(given.x, given.y, None, 0, 10))


@pytest.mark.parametrize("name", ["consistency", "ict"])
def test_a_layer_that_is_not_there_is_named(name):
    problems = make_method(name, {"layers": ["input", "stge1"]}).problems(["", "stage1"], [])
    assert problems == ["options.layers: the model has no module named 'stge1': did you mean 'stage1'?"]
    assert make_method(name, {}).problems(["stage1"], []) == []


@pytest.mark.parametrize("name", ["consistency", "ict"])
def test_each_kind_of_batch_has_its_own_log_with_its_own_alpha(name, monkeypatch):
    model = network()
    method = attached(name, model, layers=LAYERS, alpha=0.5, alpha_unlabelled=4.0)
    assert method.facts() == {}
    draws = Draws(method, monkeypatch)
    for step in range(12):
        method.step(model, criterion, batch(step))
    found = method.facts()
    assert found["layers"] == LAYERS
    for key, alpha, drawn in (("mixing", 0.5, draws.found[::2]), ("mixing_unlabelled", 4.0, draws.found[1::2])):
        log = found[key]
        assert (log["unit"], log["alpha"], log["unmixed"]) == ("batches", alpha, 0)
        assert log["layers"] == {layer: sum(draw.layer == layer for draw in drawn) for layer in LAYERS}
        assert log["lam"] == torch.histc(torch.tensor([draw.lam for draw in drawn]), 50, 0, 1).int().tolist()


@pytest.mark.parametrize("name", ["consistency", "ict"])
@pytest.mark.parametrize("done", [0, 1, 4])
def test_a_restored_method_goes_on_to_the_same_bits(name, done):
    def steps(model, method, numbers):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        for step in numbers:
            optimizer.zero_grad()
            loss = method.step(model, criterion, batch(step))
            loss.backward()
            optimizer.step()
            method.after_step()
            losses.append(loss.item())
        return losses

    model = network()
    method = attached(name, model, layers=LAYERS, decay=0.7) if name == "ict" else attached(name, model)
    steps(model, method, range(done))
    tensors = {}
    packed, weights = storage.pack(method.state_dict(), tensors), copied(model).state_dict()
    expected = steps(model, method, range(done, 8))
    other = network()
    restored = make_method(name, method.options.model_dump())
    restored.attach(other, [], SEED + 1)
    other.load_state_dict(weights)
    restored.load_state_dict(storage.unpack(packed, tensors))
    assert steps(other, restored, range(done, 8)) == expected
    assert restored.facts() == method.facts()
    for ours, theirs in ((other, model), (restored.teacher() or other, method.teacher() or model)):
        assert all(
            torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
        )


def test_before_it_is_attached_there_is_no_state():
    for name in ("consistency", "ict"):
        method = make_method(name, {})
        method.load_state_dict({})
        method.detach()
        assert method.state_dict() == method.facts() == {}
        assert method.teacher() is None


def test_defaults_are_the_authors_mixings_and_ramp_with_the_tamer_targets():
    options = make_method("consistency", {}).options
    assert (options.alpha, options.alpha_unlabelled, options.weight, options.ramp) == (0.1, 2.0, 10.0, 0.4)
    assert (options.layers, options.targets, options.target_mode) == ("auto", "probabilities", "train")
