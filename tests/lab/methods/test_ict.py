"""A step and the teacher against a second network that is averaged and run by hand."""

import copy

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
)
from manifold_mixup.errors import AlreadyAttached
from manifold_mixup.lab.methods import make_method
from manifold_mixup.lab.methods.base import Batch
from manifold_mixup.lab.models import build_model
from manifold_mixup.mixup import ManifoldMixup


def update(model, method=None):
    """Every weight a little further along its gradient."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
    model.zero_grad()
    if method is not None:
        method.after_step()


def averaged(teacher, model, t, decay, statistics):
    """One update of the teacher, weight by weight."""
    keep = min(1 - 1 / (t + 1), decay)
    state, other = teacher.state_dict(), model.state_dict()
    names = dict(teacher.named_parameters()).keys()
    for name in state:
        if name in names or (statistics and state[name].is_floating_point()):
            state[name].copy_(keep * state[name] + (1 - keep) * other[name])
        elif statistics:
            state[name].copy_(other[name])


def by_hand(reference, teacher, given, draws, mix, weight):
    loss = labelled_loss(reference, given, draws[0])
    with torch.no_grad():
        logits = teacher(given.unlabelled)
        target = mixed(logits.softmax(1), draws[1]) if mix == "probabilities" else mixed(logits, draws[1]).softmax(1)
    output = run_mixed(reference, given.unlabelled, draws[1]).softmax(1)
    return loss + weight * squares(output, target)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("mix", ["probabilities", "logits"])
@pytest.mark.parametrize("layers", [["input"], ["1"], LAYERS], ids=str)
def test_steps_and_teacher_are_those_written_out(mode, mix, layers, monkeypatch):
    model = network()
    reference, teacher = copied(model), copied(model).train(mode == "train")
    options = {"layers": layers, "mix": mix, "teacher_mode": mode, "decay": 0.7, "ramp": 0.0, "weight": 7.0}
    method = attached("ict", model, **options)
    draws = Draws(method, monkeypatch)
    for t in range(1, 7):
        given = batch(t)
        loss = method.step(model, criterion, given)
        expected = by_hand(reference, teacher, given, draws.found[-2:], mix, 7.0)
        assert_same_gradients(loss, model, expected, reference)
        update(model, method)
        update(reference)
        averaged(teacher, reference, t, 0.7, statistics=mode == "eval")
        for (name, ours), theirs in zip(
            method.teacher().state_dict().items(), teacher.state_dict().values(), strict=True
        ):
            assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12), (t, name)
    assert {draw.layer for draw in draws.found} <= set(layers)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999, 1.0])
def test_the_teacher_is_the_average_of_all_weights_until_that_is_too_slow(decay):
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 5.0)
    method = attached("ict", model, decay=decay)
    expected, seen = 5.0, [5.0]
    for t in range(1, 9):
        value = float(t * t)
        nn.init.constant_(model.weight, value)
        method.after_step()
        seen.append(value)
        keep = min(1 - 1 / (t + 1), decay)
        expected = keep * expected + (1 - keep) * value
        assert method.teacher().weight.item() == pytest.approx(expected, rel=1e-5)
        if decay >= 0.999:
            assert expected == pytest.approx(sum(seen) / len(seen))
    assert decay or expected == 64.0


def test_the_teacher_is_a_copy_without_hooks_whose_weights_are_nobody_elses():
    model = network()
    method = attached("ict", model)
    teacher = method.teacher()
    assert teacher.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), model.parameters(), strict=True))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not {id(p) for p in teacher.parameters()} & {id(p) for p in model.parameters()}
    assert all(parameter.requires_grad for parameter in model.parameters())
    method.step(model, criterion, batch()).backward()
    for module in teacher.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert method.companion() is None  # what a companion has would be given to the optimiser


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_teacher_is_never_mixed(mode, monkeypatch):
    model = network()
    method = attached("ict", model, layers=LAYERS, teacher_mode=mode)
    teacher, said = method.teacher(), []
    teacher.register_forward_hook(lambda module, args, output: said.append((args[0], output)))
    draws = Draws(method, monkeypatch)
    for step in range(6):
        given = batch(step)
        plain = copy.deepcopy(teacher)
        plain._forward_hooks.clear()
        expected = plain(given.unlabelled)
        method.step(model, criterion, given)
        assert torch.equal(said[-1][0], given.unlabelled)
        assert torch.equal(said[-1][1], expected)
    assert len(said) == 6
    assert {draw.layer for draw in draws.found[1::2]} > {"input"}


@pytest.mark.parametrize(("mode", "forwards"), [("eval", 2), ("train", 3)])
def test_dropout_of_the_teacher_follows_its_mode(mode, forwards):
    model = network(dropout=0.5)
    method = attached("ict", model, teacher_mode=mode)
    torch.manual_seed(1)
    method.step(model, criterion, batch())
    after = torch.get_rng_state()
    torch.manual_seed(1)
    for rows in (6, 9, 9)[:forwards]:
        nn.functional.dropout(torch.ones(rows, 8), 0.5)
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_statistics_of_the_network_move_once_for_each_mixed_batch(mode):
    model = network()
    method = attached("ict", model, teacher_mode=mode)
    for step in range(3):
        method.step(model, criterion, batch(step)).backward()
        update(model, method)
    assert model[0][1].num_batches_tracked == 6
    assert method.teacher()[0][1].num_batches_tracked == (6 if mode == "eval" else 3)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_without_weight_it_is_input_mixup_bit_for_bit_with_an_average_beside_it(alpha):
    model, control = network(), network()
    method = attached("ict", model, alpha=alpha, weight=0.0)
    other = make_method("input_mixup", {"alpha": alpha})
    transform = other.attach(control, [], SEED)
    for step in range(4):
        given = batch(step)
        x, y = transform(given.x, given.y)
        loss, expected = method.step(model, criterion, given), criterion(control(x), y)
        assert torch.equal(loss, expected)
        loss.backward()
        expected.backward()
        update(model, method)
        update(control)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), control.state_dict().values(), strict=True)
    )
    assert method.facts()["mixing"] == other.facts()["mixing"]
    assert not torch.equal(method.teacher()[3].weight, model[3].weight)


def test_without_mixing_it_is_plain_training_and_a_plain_mean_teacher():
    model = network()
    reference, teacher = copied(model), copied(model).eval()
    method = attached("ict", model, alpha=0.0, alpha_unlabelled=0.0)
    given = batch(19)
    loss = method.step(model, criterion, given)
    expected = criterion(reference(given.x), given.y)
    with torch.no_grad():
        target = teacher(given.unlabelled).softmax(1)
    expected = expected + 100 * nn.functional.mse_loss(reference(given.unlabelled).softmax(1), target)
    assert_same_gradients(loss, model, expected, reference)


def test_hidden_layers_can_be_mixed_in_the_networks_of_the_lab():
    torch.manual_seed(0)
    model = build_model("wrn_28_2", {"width": 0.1}, (3, 8, 8), 4).to(memory_format=torch.channels_last)
    method = attached("ict", model, layers=["stage1", "stage2"])
    generator = torch.Generator().manual_seed(0)
    x, u = torch.randn(4, 3, 8, 8, generator=generator), torch.randn(1, 3, 8, 8, generator=generator)
    for step in range(3):
        method.step(model, criterion, Batch(x, torch.arange(4), u, step, 10)).backward()
        update(model, method)
    assert set(method.facts()["mixing_unlabelled"]["layers"]) == {"stage1", "stage2"}
    assert model.norm.num_batches_tracked == 6
    weight = method.teacher().stage3[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_a_network_with_a_mixer_of_its_own_is_refused():
    model = network()
    mixer = ManifoldMixup(model)
    with pytest.raises(AlreadyAttached):
        attached("ict", model)
    mixer.remove()


def test_after_it_is_detached_the_network_is_bare_and_the_teacher_is_there():
    model = network()
    method = attached("ict", model, layers=LAYERS)
    method.step(model, criterion, batch())
    method.detach()
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 0
    assert method.teacher().eval()(batch().x).shape == (6, 4)


def test_defaults_are_those_of_the_authors_command_for_cifar10():
    options = make_method("ict", {}).options
    assert (options.alpha, options.alpha_unlabelled, options.weight, options.ramp) == (1.0, 1.0, 100.0, 0.25)
    assert (options.decay, options.layers) == (0.999, ["input"])
    assert (options.mix, options.teacher_mode) == ("probabilities", "eval")
