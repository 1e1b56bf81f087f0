"""Hidden states of a trained network: what chosen modules return for stored examples.

Beside the names of modules, as in ``model.named_modules()``, three words name a layer: ``"input"`` is what the network
reads (normalised), ``"features"`` is what its classifier reads, the input of the last linear layer, and ``"logits"`` is
what it returns. The words win over modules of the same name; such a module is reached through its last child. A module
that is called several times in one forward pass is ``name`` at the first call, then ``name#2`` and so on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from manifold_mixup.lab import streams
from manifold_mixup.lab.data.base import Examples
from manifold_mixup.lab.errors import UnknownName, UsageError
from manifold_mixup.lab.measures.base import Subject
from manifold_mixup.lab.measures.inference import evaluation_mode
from manifold_mixup.lab.options import Options

__all__ = [
    "FEATURES",
    "INPUT",
    "LOGITS",
    "Reduce",
    "Split",
    "StateOptions",
    "classifier_head",
    "hidden_states",
    "labelled_states",
    "pooled",
    "rows_per_class",
    "split_of",
    "vectors",
]

INPUT, FEATURES, LOGITS = "input", "features", "logits"
Reduce = Literal["pool", "flatten"]
Split = Literal["test", "validation", "train"]


class StateOptions(Options):
    """Which examples are measured, and how their hidden states become vectors."""

    split: Split = Field(default="test", description="which examples: test, validation or train")
    reduce: Reduce = Field(
        default="pool", description="states with positions: pool averages over them, flatten takes them all"
    )
    per_class: int | None = Field(default=None, ge=1, description="examples of each class, drawn; unset takes all")


def split_of(subject: Subject, split: str) -> Examples:
    """The examples of a split.

    Raises:
        UsageError: There are none.
    """
    examples = subject.parts.get(split)
    if examples is None or len(examples) == 0:
        raise UsageError(f"there are no {split} examples to measure on; choose another split")
    return examples


def rows_per_class(y: Tensor, per_class: int | None, generator: torch.Generator) -> Tensor:
    """Up to ``per_class`` examples of every class, drawn without replacement; None takes all.

    Args:
        y: Classes, ``(n,)``.
        per_class: How many of each.
        generator: Where the draw comes from; not used if all are taken.

    Returns:
        Their indices, in ascending order.
    """
    if per_class is None:
        return torch.arange(len(y))
    order = torch.randperm(len(y), generator=generator)
    order = order[y[order].argsort(stable=True)]  # class by class, in random order within each
    sizes = torch.bincount(y)
    rank = torch.arange(len(y)) - (sizes.cumsum(0) - sizes)[y[order]]
    return order[rank < per_class].sort().values


def labelled_states(subject: Subject, layer: str, options: StateOptions) -> tuple[Tensor, Tensor]:
    """Hidden states of one layer and the classes of the examples, ``(n, features)`` float32 and ``(n,)``."""
    examples = split_of(subject, options.split)
    generator = streams.generator(subject.seed, f"measures/states/{options.split}")
    rows = rows_per_class(examples.y, options.per_class, generator)
    x = examples.x if options.per_class is None else examples.x[rows]
    return hidden_states(subject, x, [layer], reduce=options.reduce)[layer], examples.y[rows]


def hidden_states(
    subject: Subject, x: Tensor, layers: Sequence[str], *, reduce: Reduce = "pool", dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """What layers return for stored examples: in evaluation mode, un-mixed, without gradients, batch by batch.

    One pass over the examples serves all layers; ``"features"`` costs one more forward of two examples.

    Args:
        subject: The network, and how it reads examples.
        x: Stored examples, at least one.
        layers: Names; see the top of this module.
        reduce: How a state with positions becomes a vector: :func:`vectors`. ``"input"`` is always flattened.
        dtype: Floating point type of the result.

    Returns:
        For every name ``(len(x), features)``, on the CPU, in the order of ``layers``.

    Raises:
        UnknownName: The network has no such module.
        UsageError: There are no examples, a layer is not called or returns no tensor with one row per example, or the
            classifier's head cannot be told.
    """
    if len(x) == 0:
        raise UsageError("there are no examples to take hidden states of")
    sites = {name: _site(subject.model, name) for name in layers if name not in (INPUT, FEATURES, LOGITS)}
    head = _call(classifier_head(subject, x)) if FEATURES in layers else None
    states: dict[str, Tensor] = {}
    with evaluation_mode(subject.model), _tapped(subject.model, sites, head) as seen:
        for start in range(0, len(x), subject.batch_size):
            rows = x[start : start + subject.batch_size]
            seen.start(len(rows), reduce, dtype)
            inputs = subject.prepare(rows.to(subject.device))
            if INPUT in layers:
                seen.keep(INPUT, inputs, "flatten")
            output = subject.model(inputs)
            if LOGITS in layers:
                seen.keep(LOGITS, output)
            for name in layers:
                found = seen.take(name)
                if name not in states:
                    states[name] = torch.empty(len(x), found.shape[1], dtype=dtype)
                states[name][start : start + len(rows)] = found
    return {name: states[name] for name in layers}


def pooled(subject: Subject, x: Tensor, *, reduce: Reduce = "pool", dtype: torch.dtype = torch.float32) -> Tensor:
    """The features that the classifier reads, ``(len(x), features)``: those of the layer ``"features"``."""
    return hidden_states(subject, x, [FEATURES], reduce=reduce, dtype=dtype)[FEATURES]


def classifier_head(subject: Subject, x: Tensor) -> str:
    """The call of a linear layer that produces the logits, as ``name`` or ``name#2``.

    The one whose output is the network's output; where that is something else (logits that are scaled or normalised),
    the one that has as many outputs as there are logits.

    Args:
        subject: The network.
        x: Stored examples, of which up to two are run.

    Raises:
        UsageError: There is no such layer, or there are several, as in networks that average two heads.
    """
    calls: list[tuple[str, int, Tensor]] = []  # what is alive cannot be confused with what was freed
    counts: dict[str, int] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            counts[name] = counts.get(name, 0) + 1
            calls.append((name, module.out_features, output))  # type: ignore[arg-type]

        return hook

    linear = [(name, module) for name, module in subject.model.named_modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_hook(note(name)) for name, module in linear]
    try:
        with evaluation_mode(subject.model):
            output = subject.model(subject.prepare(x[:2].to(subject.device)))
    finally:
        _remove(handles)
    logits = output.shape[-1] if isinstance(output, Tensor) and output.ndim == 2 else None
    same = [i for i, (_, _, out) in enumerate(calls) if out is output]
    fitting = [i for i, (_, width, _) in enumerate(calls) if width == logits]
    if not same and len(fitting) != 1:
        found = " and ".join(repr(name) for name in dict.fromkeys(calls[i][0] for i in fitting)) or "none"
        raise UsageError(
            "the features before the classifier cannot be told: no linear layer returns the network's output, and of "
            f"those as wide there is not one ({found}); name a layer instead of {FEATURES!r}"
        )
    place = (same or fitting)[-1]
    name = calls[place][0]
    call = sum(other == name for other, _, _ in calls[: place + 1])
    return name if call == 1 else f"{name}#{call}"


def vectors(state: Tensor, reduce: Reduce) -> Tensor:
    """A hidden state as one vector per example.

    Args:
        state: ``(n,)``, ``(n, features)``, ``(n, tokens, features)``, or ``(n, channels, *positions)`` with two or more
            dimensions of positions.
        reduce: ``"pool"`` is the mean over tokens or positions, ``"flatten"`` keeps every number.

    Returns:
        ``(n, numbers)``.
    """
    if state.ndim < 3 or reduce == "flatten":
        return state.reshape(len(state), -1)
    return state.mean(dim=1) if state.ndim == 3 else state.flatten(2).mean(dim=2)


class _Seen:
    """The states of one batch, copied as soon as they are there: what follows may change them in place."""

    def __init__(self) -> None:
        self.start(0, "pool", torch.float32)

    def start(self, rows: int, reduce: Reduce, dtype: torch.dtype) -> None:
        self._states: dict[str, Tensor] = {}
        self.calls: dict[str, int] = {}
        self._rows, self._reduce, self._dtype = rows, reduce, dtype

    def keep(self, name: str, value: Any, reduce: Reduce | None = None) -> None:
        if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != self._rows:
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise UsageError(
                f"layer {name!r} returns {found} for {self._rows} examples, where one tensor with one row per example "
                "is needed; name a module inside or after it"
            )
        state = vectors(value.detach().to(self._dtype), reduce or self._reduce)
        self._states[name] = state.to("cpu", copy=True)

    def take(self, name: str) -> Tensor:
        if name not in self._states:
            base = name.partition("#")[0]
            times = self.calls.get(base, 0)
            raise UsageError(
                f"layer {name!r} was not reached: a forward pass calls the module {base!r} "
                + ("never" if times == 0 else "once" if times == 1 else f"{times} times")
            )
        return self._states[name]


@contextmanager
def _tapped(model: nn.Module, sites: dict[str, tuple[str, int]], head: tuple[str, int] | None) -> Iterator[_Seen]:
    """Hooks that keep what the sites return and what the head reads; none is left afterwards."""
    seen = _Seen()

    def count(base: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen.calls[base] = seen.calls.get(base, 0) + 1
            if (base, seen.calls[base]) == head:
                seen.keep(FEATURES, args[0] if args else None)

        return hook

    def collect(base: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            for name, site in sites.items():
                if site == (base, seen.calls[base]):
                    seen.keep(name, output)

        return hook

    handles: list[RemovableHandle] = []
    try:
        for base in dict.fromkeys(base for base, _ in [*sites.values(), *([head] if head else [])]):
            module = model.get_submodule(base)
            handles += [module.register_forward_pre_hook(count(base)), module.register_forward_hook(collect(base))]
        yield seen
    finally:
        _remove(handles)


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _site(model: nn.Module, name: str) -> tuple[str, int]:
    """The module and which of its calls a name means."""
    base, mark, number = name.partition("#")
    known = {module for module, _ in model.named_modules() if module}
    if base not in known or (mark and not (number.isdecimal() and int(number) > 0)):
        raise UnknownName("layer", name, known | {INPUT, FEATURES, LOGITS})
    return _call(name)


def _call(name: str) -> tuple[str, int]:
    base, mark, number = name.partition("#")
    return base, int(number) if mark else 1
