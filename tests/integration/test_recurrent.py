"""Recurrent networks: tuples of outputs, the batch in dimension 1 of the last hidden state, packed sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from integration.exactness import (
    LAM,
    assert_equal,
    call,
    check,
    check_layers,
    mixture,
    on_rows,
    order_of,
    prepared,
    put_back,
    recorded,
    set_lam,
)
from manifold_mixup import ManifoldMixup, cut_points, errors

N, LENGTH, CLASSES = 5, 7, 3


class Stack(nn.Module):
    """Two recurrent layers. ``feature``: "last" output, "mean" of the outputs, or the "hidden" state."""

    def __init__(self, kind: str, feature: str, *, batch_first: bool = True, **arguments: Any) -> None:
        super().__init__()
        width = 12 if arguments.get("bidirectional") else 6
        self.embed = nn.Linear(4, 6)
        self.first = getattr(nn, kind)(6, 6, batch_first=batch_first, **arguments)
        self.second = getattr(nn, kind)(width, 6, batch_first=batch_first, **arguments)
        self.head = nn.Linear(width, CLASSES)
        self.feature, self.time = feature, int(batch_first)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.first(self.embed(x))
        states, hidden = self.second(states)
        if self.feature == "hidden":
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
            return self.head(torch.cat([hidden[-2], hidden[-1]], -1) if self.second.bidirectional else hidden[-1])
        return self.head(states.mean(self.time) if self.feature == "mean" else states.select(self.time, -1))


def sequences(n: int = N) -> Tensor:
    return torch.randn(n, LENGTH, 4, dtype=torch.float64)


KINDS = [
    ("LSTM", {}),
    ("LSTM", {"num_layers": 2}),
    ("LSTM", {"num_layers": 2, "bidirectional": True}),
    ("LSTM", {"proj_size": 6, "hidden_size": 8}),
    ("GRU", {}),
    ("GRU", {"num_layers": 2, "bidirectional": True}),
    ("RNN", {}),
]


def stack(kind: str, feature: str, arguments: dict[str, Any], **more: Any) -> nn.Module:
    if "proj_size" in arguments:
        model = Stack(kind, feature, **more)
        model.first = nn.LSTM(6, 8, batch_first=True, proj_size=6)
        model.second = nn.LSTM(6, 8, batch_first=True, proj_size=6)
        return prepared(model)
    return prepared(Stack(kind, feature, **arguments, **more))


@pytest.mark.parametrize(("kind", "arguments"), KINDS, ids=str)
def test_outputs_over_time_are_mixed_in_every_layer(kind, arguments, monkeypatch):
    model, x = stack(kind, "mean" if arguments.get("bidirectional") else "last", arguments), sequences()
    names = {p.name for p in cut_points(model, x)}
    assert names == {"input", "embed", "first", "second", "head"}
    check(model, x, N, monkeypatch, more=5)


@pytest.mark.parametrize(("kind", "arguments"), KINDS, ids=str)
def test_the_last_hidden_state_has_the_batch_in_dimension_1_and_is_refused(kind, arguments, monkeypatch):
    model, x = stack(kind, "hidden", arguments), sequences()
    names = {p.name for p in cut_points(model, x)}
    assert names == {"input", "embed", "first", "head"}
    layers = ManifoldMixup(model, seed=0).discover(x)
    assert "second" not in layers
    check_layers(model, x, N, ["first"], monkeypatch)
    depth = 2 if arguments.get("bidirectional") else 1
    depth *= arguments.get("num_layers", 1)
    with pytest.raises(errors.NotACutPoint, match=rf"one row per example in dimension 0.*\({depth}, 2, 6\)"):
        ManifoldMixup(model, layers=["second"])(x, torch.arange(N))


@pytest.mark.parametrize("rows", [2, 3])
def test_as_many_layers_as_rows_of_discovery_do_not_pass_for_a_batch(rows):
    """h_n of shape (layers, rows, width): with as many layers as rows dimension 0 has the right length by chance."""
    model = prepared(Stack("GRU", "hidden", num_layers=rows))
    assert "second" not in {p.name for p in cut_points(model, sequences())}


class Ensemble(nn.Module):
    """Reads the whole stack of hidden states, layers put into the features."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 6, num_layers=2, batch_first=True)
        self.swap = Swap()
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.swap(self.gru(x)[1]))


class Swap(nn.Module):
    """(layers, n, width) -> (n, layers * width)."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.transpose(0, 1).flatten(1)


def test_a_module_that_puts_the_batch_in_front_makes_the_hidden_state_mixable(monkeypatch):
    model, x = prepared(Ensemble()), sequences()
    assert {p.name for p in cut_points(model, x)} == {"input", "swap", "head"}
    check_layers(model, x, N, ["swap"], monkeypatch)


# ---------------------------------------------------------------- time first


def test_time_first_is_refused_where_the_targets_show_it():
    model = prepared(Stack("LSTM", "last", batch_first=False))
    with pytest.raises(errors.BatchMismatch, match=f"x has {LENGTH} rows.*{N}"):
        ManifoldMixup(model)(sequences().transpose(0, 1), torch.arange(N))


def test_time_first_is_refused_where_the_batch_is_as_long_as_the_sequences():
    """Sizes alone do not show it: the output does, whose rows do not follow those of x."""
    model = prepared(Stack("LSTM", "last", batch_first=False))
    x = sequences(LENGTH).transpose(0, 1).contiguous()
    assert x.shape[0] == x.shape[1] == LENGTH
    with pytest.raises(errors.ManifoldMixupError, match="dimension 0"):
        ManifoldMixup(model)(x, torch.arange(LENGTH))


class TimeFirst(nn.Module):
    """The wrapper that the errors ask for: batch first outside, time first inside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(0, 1))


def test_a_wrapper_makes_a_time_first_network_usable(monkeypatch):
    model, x = prepared(TimeFirst(Stack("LSTM", "last", batch_first=False))), sequences()
    assert {p.name for p in cut_points(model, x)} == {"input", "inner", "inner.head"}
    check_layers(model, x, N, ["input"], monkeypatch)
    with pytest.raises(errors.NotACutPoint, match="one row per example in dimension 0"):
        ManifoldMixup(model, layers=["inner.first"])(x, torch.arange(N))


# ---------------------------------------------------------------- packed sequences


class Packed(nn.Module):
    """Packs, runs two LSTMs, and reads the last hidden state or the padded outputs."""

    def __init__(self, feature: str) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 6)
        self.first = nn.LSTM(6, 6, batch_first=True)
        self.second = nn.LSTM(6, 6, batch_first=True)
        self.hidden = nn.Linear(6, 6)
        self.head = nn.Linear(6, CLASSES)
        self.feature = feature

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embed(x), lengths.cpu(), batch_first=True, enforce_sorted=False)
        states, (last, _) = self.second(self.first(packed)[0])
        if self.feature == "hidden":
            return self.head(torch.tanh(self.hidden(last[-1])))
        states, _ = pad_packed_sequence(states, batch_first=True)
        return self.head(torch.tanh(self.hidden(states.sum(1) / lengths.unsqueeze(1))))


LENGTHS = torch.tensor([5, 7, 2, 4, 6])


@pytest.mark.parametrize("feature", ["hidden", "mean"])
@pytest.mark.parametrize("layer", ["first", "second"])
def test_a_packed_sequence_is_refused_and_the_error_says_what_to_do(feature, layer):
    model, x = prepared(Packed(feature)), sequences()
    with pytest.raises(errors.NotACutPoint, match=r"PackedSequence.*pad_packed_sequence"):
        ManifoldMixup(model, layers=[layer])((x, LENGTHS), torch.arange(N))


def test_a_packed_sequence_is_refused_also_on_the_users_word():
    """Rows of a packed sequence are time steps of all examples: as many of them as examples is chance."""
    model, x = prepared(Packed("hidden")), sequences()
    mixup = ManifoldMixup(model, layers=["first"], check=False, seed=0)
    mixup((x, torch.ones_like(LENGTHS)), torch.arange(N))  # one step each: the packed data has N rows
    with pytest.raises(errors.ManifoldMixupError, match="PackedSequence"):
        model(x, torch.ones_like(LENGTHS))


def test_what_a_module_makes_of_the_last_hidden_state_can_be_mixed(monkeypatch):
    model, x = prepared(Packed("hidden")), (sequences(), LENGTHS)
    names = {p.name for p in cut_points(model, *x)}
    assert {"hidden", "head"} <= names
    assert not {"first", "second"} & names
    check_layers(model, x, N, ["hidden"], monkeypatch)


def test_lengths_of_the_union_make_the_embedding_mixable_by_hand(monkeypatch):
    """What the user of a packed network can do: mix before the packing, and pack as much as the longer of the two."""
    set_lam(monkeypatch, LAM)
    model, partner = prepared(Packed("hidden")), order_of(N)
    valid = torch.arange(LENGTH) < LENGTHS.unsqueeze(1)
    x = sequences() * valid.unsqueeze(-1)
    mixup = ManifoldMixup(model, layers=["embed"], check=False, pairing=lambda y, generator: partner, seed=0)
    mixup((x, LENGTHS), torch.arange(N))
    mixed = model(x, torch.maximum(LENGTHS, LENGTHS[mixup.last.partner]))
    mixup.remove()
    states, _ = recorded(model, (x, LENGTHS))
    state = on_rows(mixture(LAM, partner), N)(states["embed"])
    assert_equal(mixed, put_back(model, (x, torch.maximum(LENGTHS, LENGTHS[partner])), "embed", state))


def test_padded_tensors_without_lengths_are_read_as_they_are(monkeypatch):
    """The plain stack takes padding for input, and mixes it as such."""
    model, x = prepared(Stack("LSTM", "last")), sequences()
    x[:, 4:] = 0
    check_layers(model, x, N, ["first", "second"], monkeypatch)
    assert call(model, x).shape == (N, CLASSES)
