"""Hidden states against the same modules called by hand, and what may go wrong on the way to them."""

import math

import pytest
import torch
from torch import nn

from lab.measures.subjects import PIXELS, Given, convolutional, images, left_alone, subject
from manifold_mixup.lab.errors import UnknownName, UsageError
from manifold_mixup.lab.measures.hidden import (
    StateOptions,
    classifier_head,
    hidden_states,
    labelled_states,
    pooled,
    rows_per_class,
    split_of,
    vectors,
)

X, Y = images(23)


def measured(model, **options):
    return subject(model, pixels=PIXELS, test=(X, Y), **options)


class Module(nn.Module):
    """A network of the parts given, run as ``forward`` says."""

    def __init__(self, forward, **parts):
        super().__init__()
        self._forward = forward
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x):
        return self._forward(self, x)


@pytest.mark.parametrize("reduce", ["pool", "flatten"])
def test_states_are_those_of_the_modules_called_one_after_another(reduce):
    model = convolutional().eval()
    layers = ["input", "0", "2", "features", "logits"]
    found = hidden_states(measured(model), X, layers, reduce=reduce)
    assert list(found) == layers
    with torch.no_grad():
        x = PIXELS.normalise(X)
        first = model[0](x)
        active = torch.relu(model[1](first))
        pooled_states = active.mean(dim=(2, 3))
    by_hand = {
        "input": x.flatten(1),
        "0": first.mean(dim=(2, 3)) if reduce == "pool" else first.flatten(1),
        "2": active.mean(dim=(2, 3)) if reduce == "pool" else active.flatten(1),
        "features": pooled_states,
        "logits": model[6](pooled_states).detach(),
    }
    for name, expected in by_hand.items():
        assert found[name].dtype == torch.float32
        assert found[name].shape == expected.shape
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6)


def test_what_a_later_module_changes_in_place_is_still_what_its_module_returned():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True), nn.Linear(2, 2))
    x = torch.randn(9, 2)
    found = hidden_states(subject(model, test=(x, torch.zeros(9))), x, ["0", "1"])
    assert float(found["0"].min()) < 0
    assert torch.equal(found["1"], found["0"].relu())


def test_one_pass_serves_all_layers_and_float64_is_kept():
    calls = []
    model = convolutional().double().eval()
    model.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    x = torch.rand(23, 3, 6, 6, dtype=torch.float64)
    found = hidden_states(measured(model), x, ["0", "2", "logits"], dtype=torch.float64)
    assert calls == [7, 7, 7, 2]
    assert all(state.dtype == torch.float64 for state in found.values())
    with torch.no_grad():
        torch.testing.assert_close(found["logits"], model(PIXELS.normalise(x)), rtol=1e-12, atol=1e-12)


def test_the_batch_size_does_not_matter():
    model = convolutional()
    one, all_ = (pooled(measured(model, batch_size=size), X) for size in (1, 100))
    torch.testing.assert_close(one, all_, rtol=1e-5, atol=1e-6)


def test_the_network_is_left_as_it_was():
    model = convolutional().train()
    task = measured(model)
    model.train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[6].weight.grad = torch.ones_like(model[6].weight)
    with left_alone(model):
        first = hidden_states(task, X, ["0", "features"])
        second = hidden_states(task, X, ["0", "features"])
    assert torch.equal(first["features"], second["features"])  # dropout was off
    assert not first["0"].requires_grad


def test_hooks_are_gone_after_an_error():
    model, x = nn.Sequential(nn.Linear(2, 4), nn.Linear(5, 2)), torch.zeros(3, 2)
    task = subject(model)
    with left_alone(model), pytest.raises(RuntimeError):
        hidden_states(task, x, ["0"])
    with left_alone(model), pytest.raises(RuntimeError):
        classifier_head(task, x)


def test_unknown_names_come_with_the_nearest_ones():
    task = measured(nn.Sequential(nn.ModuleDict({"stage1": nn.Flatten()})["stage1"], nn.Linear(108, 3)))
    with pytest.raises(UnknownName, match="unknown layer 'feature': did you mean 'features'"):
        hidden_states(task, X, ["feature"])
    for wrong in ("", "1#0", "1#x", "#2"):
        with pytest.raises(UnknownName, match="unknown layer"):
            hidden_states(task, X, [wrong])


def test_tuples_and_states_without_a_row_per_example_are_refused_by_name():
    lstm = nn.LSTM(3, 4, batch_first=True)
    model = Module(lambda m, x: m.head(m.turn(m.lstm(x)[0])).mean(dim=0), lstm=lstm, turn=Turn(), head=nn.Linear(4, 2))
    x = torch.zeros(5, 6, 3)
    with pytest.raises(UsageError, match="layer 'lstm' returns a tuple for 5 examples"):
        hidden_states(subject(model), x, ["lstm"])
    with pytest.raises(UsageError, match=r"layer 'turn' returns shape \(6, 5, 4\) for 5 examples"):
        hidden_states(subject(model), x, ["turn"])


class Turn(nn.Module):
    def forward(self, x):
        return x.transpose(0, 1)


def test_calls_of_one_module_are_told_apart():
    def forward(m, x):
        return m.head(m.shared(m.shared(x)))

    model = Module(forward, shared=nn.Linear(2, 2), head=nn.Linear(2, 3), idle=nn.Linear(2, 2))
    x = torch.randn(10, 2)
    task = subject(model)
    found = hidden_states(task, x, ["shared#2", "shared", "shared#1"])
    once = model.shared(x).detach()
    assert torch.allclose(found["shared"], once)
    assert torch.equal(found["shared"], found["shared#1"])
    assert torch.allclose(found["shared#2"], model.shared(once).detach())
    with pytest.raises(UsageError, match="'shared#3' was not reached: .* calls the module 'shared' 2 times"):
        hidden_states(task, x, ["shared#3"])
    with pytest.raises(UsageError, match="'idle' was not reached: .* never"):
        hidden_states(task, x, ["idle"])
    with pytest.raises(UsageError, match="'head#2' was not reached: .* once"):
        hidden_states(task, x, ["head#2"])


def test_the_head_is_the_layer_whose_output_is_the_output():
    # "last" is called after the head, and is as wide, but its output is not the network's.
    def forward(m, x):
        logits = m.head(m.body(x))
        m.last(logits)
        return logits

    model = Module(forward, head=nn.Linear(4, 3), last=nn.Linear(3, 3), body=nn.Linear(2, 4))
    x = torch.randn(8, 2)
    assert classifier_head(subject(model), x) == "head"
    assert torch.allclose(pooled(subject(model), x), model.body(x).detach())


def test_without_such_a_layer_the_one_of_the_right_width_is_the_head():
    # As in networks that scale their logits, or that gate features by linear layers.
    model = Module(lambda m, x: 2 * m.head(x) + m.gate(x).mean(), head=nn.Linear(2, 3), gate=nn.Linear(2, 5))
    assert classifier_head(subject(model), torch.randn(8, 2)) == "head"
    twice = Module(lambda m, x: m.layer(m.layer(x)), layer=nn.Linear(3, 3))
    x = torch.randn(8, 3)
    assert classifier_head(subject(twice), x) == "layer#2"
    assert torch.allclose(pooled(subject(twice), x), twice.layer(x).detach())


def test_a_bare_linear_layer_reads_its_features_from_the_input():
    x = torch.randn(8, 3)
    assert torch.equal(pooled(subject(nn.Linear(3, 2)), x), x)


def test_a_network_without_a_linear_head_says_so():
    model = Module(lambda m, x: m.conv(x).mean(dim=(2, 3)), conv=nn.Conv2d(3, 2, 1))
    with pytest.raises(UsageError, match=r"cannot be told: .* there is not one \(none\); name a layer"):
        pooled(measured(model), X)


def test_of_two_heads_none_is_guessed():
    model = Module(lambda m, x: (m.a(x) + m.b(x)) / 2, a=nn.Linear(2, 3), b=nn.Linear(2, 3))
    with pytest.raises(UsageError, match=r"there is not one \('a' and 'b'\); name a layer instead of 'features'"):
        pooled(subject(model), torch.randn(4, 2))


def test_positions_are_averaged_or_kept():
    tokens, maps = torch.randn(4, 5, 6), torch.randn(4, 3, 2, 2)
    assert torch.equal(vectors(tokens, "pool"), tokens.mean(dim=1))
    assert torch.allclose(vectors(maps, "pool"), maps.mean(dim=(2, 3)))
    assert vectors(tokens, "flatten").shape == (4, 30)
    assert vectors(maps, "flatten").shape == (4, 12)
    assert vectors(torch.randn(4), "pool").shape == (4, 1)
    assert vectors(torch.randn(4, 2), "pool").shape == (4, 2)


def test_states_that_are_no_numbers_pass_and_nothing_to_measure_does_not():
    x = torch.tensor([[math.nan, 1.0], [math.inf, 0.0]])
    found = hidden_states(subject(Given()), x, ["state"])["state"]
    assert torch.equal(found.isfinite(), x.isfinite())
    with pytest.raises(UsageError, match="no examples"):
        hidden_states(subject(Given()), x[:0], ["state"])


def test_splits_that_are_missing_or_empty_are_named():
    task = subject(Given(), test=(torch.zeros(2, 2), [0, 1]), validation=(torch.zeros(0, 2), []))
    assert len(split_of(task, "test")) == 2
    for split in ("validation", "train"):
        with pytest.raises(UsageError, match=f"no {split} examples"):
            split_of(task, split)


def test_rows_per_class_are_capped_uniform_and_without_repetition():
    y = torch.tensor([0] * 5 + [3] * 2 + [1] * 40)
    counts = torch.zeros(47)
    for seed in range(600):
        rows = rows_per_class(y, 3, torch.Generator().manual_seed(seed))
        assert torch.equal(torch.bincount(y[rows]), torch.tensor([3, 3, 0, 2]))
        assert torch.equal(rows, rows.unique())
        counts[rows] += 1
    assert torch.equal(counts[5:7], torch.full((2,), 600.0))
    # binomial with mean 360 and 45; five standard deviations are 60 and 32
    assert (counts[:5] - 360).abs().max() < 60
    assert (counts[7:] - 45).abs().max() < 32
    assert torch.equal(rows_per_class(y, None, torch.Generator()), torch.arange(47))


def test_labelled_states_belong_to_their_classes_and_to_the_seed():
    x = torch.arange(40.0).view(20, 2)
    y = torch.arange(20) % 4
    drawn = [
        labelled_states(subject(Given(), test=(x, y), seed=seed), "state", StateOptions(per_class=2))
        for seed in (0, 0, 1)
    ]
    for states, labels in drawn:
        rows = (states[:, 0] / 2).long()
        assert torch.equal(labels, y[rows])
        assert torch.equal(torch.bincount(labels), torch.full((4,), 2))
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert not torch.equal(drawn[0][0], drawn[2][0])
    states, labels = labelled_states(subject(Given(), train=(x, y)), "input", StateOptions(split="train"))
    assert torch.equal(states, x)
    assert torch.equal(labels, y)
