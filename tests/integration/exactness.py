"""Mixing on any network against its slow twin: a plain forward is recorded, mixed by hand and put back by a plain hook.

The twin shares nothing with the library: it finds the calls of modules with its own hooks and walks through what they
return with ``torch.utils._pytree``.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from manifold_mixup import ManifoldMixup, cut_points

LAM = 0.3
Change = Callable[[Any], Any]


def prepared(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random float64 parameters and statistics everywhere, so that no branch is zero; only the root is in training.

    The mixer mixes where the root is in training. Its parts are in eval mode: no dropout, no batch statistics.
    """
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()

    def normal(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(0.2 * normal(parameter))
            elif parameter.dim() < 2 or parameter.numel() == parameter.shape[0]:  # scales: norms, layer scale
                parameter.copy_(1 + 0.2 * normal(parameter))
            else:
                inputs = parameter[0].numel()
                parameter.copy_(1.5 * normal(parameter) / inputs**0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.2 * normal(buffer))
            elif name.endswith("running_var"):
                buffer.copy_(1 + 0.2 * normal(buffer).tanh())
    model.training = True
    return model


def call(model: nn.Module, x: Any) -> Any:
    """Call a model with what ``mixup(x, y)`` was given for it."""
    if isinstance(x, Mapping):
        return model(**x)
    return model(*x) if isinstance(x, tuple) else model(x)


def tensors(value: Any) -> list[Tensor]:
    """All tensors of a structure, caches of keys and values aside."""
    if dataclasses.is_dataclass(value) and not isinstance(value, Mapping):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def on_rows(function: Callable[[Tensor], Tensor], n: int) -> Change:
    """``function`` on every floating tensor with n rows in dimension 0, wherever it is in a structure."""

    def change(value: Any) -> Any:
        def leaf(item: Any) -> Any:
            rows = isinstance(item, Tensor) and item.is_floating_point() and item.shape[:1] == (n,)
            return function(item) if rows else item

        return tree_map(leaf, value)

    return change


def rows_of(value: Any, partner: Tensor, n: int) -> Any:
    """The batch with its rows in another order, integer tensors too."""
    return tree_map(lambda t: t[partner] if isinstance(t, Tensor) and t.shape[:1] == (n,) else t, value)


def mixture(lam: float, partner: Tensor) -> Callable[[Tensor], Tensor]:
    """λ h + (1 - λ) h[partner], written as it stands in the paper."""
    return lambda h: lam * h + (1 - lam) * h[partner]


class Calls:
    """Hooks on modules that count calls: the first is ``name``, the second ``name#2``."""

    def __init__(self, model: nn.Module, act: Callable[[str, Any], Any]) -> None:
        counts: dict[str, int] = defaultdict(int)

        def hook(name: str) -> Callable[..., Any]:
            def after(module: nn.Module, args: Any, output: Any) -> Any:
                counts[name] += 1
                return act(name if counts[name] == 1 else f"{name}#{counts[name]}", output)

            return after

        # Prepended, so that they see what the module returned before a mixer's hook does.
        self.handles = [m.register_forward_hook(hook(n), prepend=True) for n, m in model.named_modules() if n]

    def __enter__(self) -> Calls:
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()


def recorded(model: nn.Module, x: Any) -> tuple[dict[str, Any], Any]:
    """What every module call returned in a plain forward, in order, and the output."""
    states: dict[str, Any] = {}

    def keep(key: str, output: Any) -> None:
        states[key] = tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, output)

    with Calls(model, keep):
        output = call(model, x)
    return states, output


def put_back(model: nn.Module, x: Any, key: str, state: Any) -> Any:
    """The output of a plain forward in which one module call returns ``state``."""
    with Calls(model, lambda name, output: state if name == key else None):
        return call(model, x)


def by_hand(model: nn.Module, x: Any, key: str, change: Callable[[Tensor], Tensor], n: int) -> Any:
    """The slow twin: the network in two halves, with ``change`` on the hidden state between them."""
    if key == "input":
        return call(model, on_rows(change, n)(x))
    states, _ = recorded(model, x)
    return put_back(model, x, key, on_rows(change, n)(states[key]))


def assert_equal(mine: Any, reference: Any, tolerance: float = 1e-8) -> None:
    """All tensors of two outputs are the same."""
    mine, reference = tensors(mine), tensors(reference)
    assert len(mine) == len(reference) > 0
    for one, other in zip(mine, reference, strict=True):
        assert bool(other.isfinite().all()), "the reference itself is not finite: the test is at fault"
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def differ(mine: Any, reference: Any) -> bool:
    """Whether two outputs differ by more than rounding, in any tensor."""
    pairs = zip(tensors(mine), tensors(reference), strict=True)
    return any(a.shape != b.shape or not torch.allclose(a, b, rtol=1e-6, atol=1e-6) for a, b in pairs)


def parameter_gradients(model: nn.Module, output: Any) -> list[Tensor]:
    """Gradients of a fixed combination of all numbers of the output."""
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for tensor in tensors(output):
        if tensor.requires_grad:
            total = total + (tensor * torch.linspace(-1, 1, tensor.numel(), dtype=torch.float64).view_as(tensor)).sum()
    total.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def set_lam(monkeypatch: pytest.MonkeyPatch, lam: float) -> None:
    """Every mixer draws this λ."""
    monkeypatch.setattr(
        "manifold_mixup.mixup.draw_lam",
        lambda alpha, generator, size=1: torch.full((size,), lam, dtype=torch.float64),
    )


def order_of(n: int) -> Tensor:
    """A permutation without fixed points that is not its own inverse (n > 2)."""
    return torch.arange(1, n + 1) % n


def mixed_output(model: nn.Module, x: Any, n: int, layer: str, **arguments: Any) -> Any:
    """One training forward through a mixer that may mix this layer only, rows paired with those of :func:`order_of`."""
    mixup = ManifoldMixup(model, layers=[layer], pairing=lambda y, generator: order_of(n), seed=0, **arguments)
    try:
        inputs, _ = mixup(x, torch.arange(n))
        output = call(model, inputs)
        assert mixup.last.layer == layer
    finally:
        mixup.remove()
    return output


def spread(names: Iterable[str], count: int) -> list[str]:
    """At most so many of the names, evenly spread."""
    names = list(names)
    if len(names) <= count:
        return names
    return [names[round(i * (len(names) - 1) / (count - 1))] for i in range(count)] if count > 1 else names[:count]


def check_layers(
    model: nn.Module, x: Any, n: int, layers: Iterable[str], monkeypatch: pytest.MonkeyPatch, **arguments: Any
) -> None:
    """λ = 0 gives the output for the permuted batch; λ = 0.3 gives what the slow twin gives, and its gradients."""
    partner = order_of(n)
    permuted = call(model, rows_of(x, partner, n))
    assert differ(permuted, call(model, x)), "the network has to tell the examples of this batch apart"
    for layer in layers:
        set_lam(monkeypatch, 0.0)
        assert_equal(mixed_output(model, x, n, layer, **arguments), permuted)
        set_lam(monkeypatch, LAM)
        mine = mixed_output(model, x, n, layer, **arguments)
        twin = by_hand(model, x, layer, mixture(LAM, partner), n)
        assert_equal(mine, twin)
        assert differ(mine, permuted)
        gradients, references = parameter_gradients(model, mine), parameter_gradients(model, twin)
        assert len(gradients) == len(references) > 0
        for gradient, reference in zip(gradients, references, strict=True):
            torch.testing.assert_close(gradient, reference, rtol=1e-7, atol=1e-8)


def missed(model: nn.Module, x: Any, n: int, accepted: Iterable[str], count: int) -> list[str]:
    """Rejected module calls for which a plain swap of rows does give the output for the permuted batch."""
    partner = order_of(n)
    permuted = call(model, rows_of(x, partner, n))
    states, _ = recorded(model, x)
    swap = on_rows(lambda h: h[partner], n)
    known = set(accepted)
    rejected = [
        key
        for key, state in states.items()
        if key not in known and any(t.is_floating_point() and t.shape[:1] == (n,) for t in tensors(state))
    ]
    chosen = spread(rejected, count)
    return [key for key in chosen if not differ(put_back(model, x, key, swap(states[key])), permuted)]


def check(
    model: nn.Module, x: Any, n: int, monkeypatch: pytest.MonkeyPatch, *, more: int = 3, rejected: int = 8
) -> list[str]:
    """All of it for one network: S and ``more`` other cut points are exact, rejected modules really are bypassed.

    Args:
        model: the network, :func:`prepared`.
        x: a batch as ``mixup(x, y)`` takes it.
        n: its rows; no other dimension of a hidden state may be as large.
        monkeypatch: of the test.
        more: how many cut points beside S.
        rejected: how many of the modules that are no cut points.

    Returns:
        S.
    """
    mixup = ManifoldMixup(model, seed=0)
    args, kwargs = ((), x) if isinstance(x, Mapping) else (x if isinstance(x, tuple) else (x,), {})
    chosen = mixup.discover(*args, **kwargs)
    mixup.remove()
    accepted = [point.name for point in cut_points(model, *args, **kwargs)]
    others = spread([name for name in accepted if name not in chosen], more)
    check_layers(model, x, n, [*chosen, *others], monkeypatch)
    assert missed(model, x, n, accepted, rejected) == []
    return chosen


# ---------------------------------------------------------------- masks


def united(own: Tensor, lam: float, partner: Tensor, *, ignored: bool = False) -> Tensor:
    """Both rows' masks as one; a row with weight zero has no say. ``ignored``: True marks padding."""
    attended = own == 0 if ignored else own != 0
    both = attended[partner] if lam == 0 else attended if lam == 1 else attended | attended[partner]
    return (~both if ignored else both).to(own.dtype)


def united_ids(own: Tensor, lam: float, partner: Tensor, pad: int) -> Tensor:
    """Token ids for code that looks for padding in them: a position is padding where it is padding in both rows."""
    other = own[partner]
    return other if lam == 0 else own if lam == 1 else torch.where(own == pad, other, own)


def by_hand_with_masks(
    model: nn.Module,
    x: Mapping[str, Any],
    key: str,
    lam: float,
    partner: Tensor,
    after: Mapping[str, Any],
    attended: Tensor,
) -> Any:
    """The slow twin where masks reach past the cut.

    The hidden state is recorded with every row's own masks and the two rows are mixed: what is padding in one of them
    counts as zero, and what is padding in both stays as it is. The second forward has the inputs ``after`` (the united
    masks); what comes before the cut in it does not count.

    Args:
        model: the network.
        x: the batch with its own masks.
        key: the call to mix.
        lam: λ.
        partner: row numbers, shape (n,).
        after: the batch with the united masks.
        attended: which positions of the hidden state are no padding, bool, shape (n, positions).
    """
    n = len(partner)

    def mixed(h: Tensor) -> Tensor:
        if lam == 0.0 or h.dim() != 3 or h.shape[1] != attended.shape[1]:
            return mixture(lam, partner)(h)
        either = (attended | attended[partner]).unsqueeze(-1)
        return torch.where(either, mixture(lam, partner)(h * attended.unsqueeze(-1)), h)

    if key == "input":
        return call(model, {**after, **on_rows(mixed, n)({k: v for k, v in x.items() if k not in _changed(x, after)})})
    states = recorded(model, x)[0]

    def act(name: str, current: Any) -> Any:
        if name != key:
            return None
        flat, structure = tree_flatten(current)
        known = tree_leaves(states[key])
        # What has four dimensions is no hidden state but a position bias that the mask was added to.
        fresh = [
            mixed(old) if isinstance(old, Tensor) and old.is_floating_point() and old.dim() <= 3 else new
            for old, new in zip(known, flat, strict=True)
        ]
        return tree_unflatten(fresh, structure)

    with Calls(model, act):
        return call(model, after)


def _changed(x: Mapping[str, Any], after: Mapping[str, Any]) -> set[str]:
    return {key for key in x if x[key] is not after[key]}


def check_masked_layers(
    model: nn.Module,
    x: Mapping[str, Any],
    n: int,
    layers: Iterable[str],
    after: Callable[[float, Tensor], Mapping[str, Any]],
    attended: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As :func:`check_layers`, where masks reach past the cut. ``after(lam, partner)``: inputs with united masks."""
    partner = order_of(n)
    permuted = call(model, rows_of(x, partner, n))
    assert differ(permuted, call(model, x))
    for layer in layers:
        set_lam(monkeypatch, 0.0)
        assert_equal(mixed_output(model, x, n, layer), permuted)
        set_lam(monkeypatch, LAM)
        mine = mixed_output(model, x, n, layer)
        twin = by_hand_with_masks(model, x, layer, LAM, partner, after(LAM, partner), attended)
        assert_equal(mine, twin)
        gradients, references = parameter_gradients(model, mine), parameter_gradients(model, twin)
        assert len(gradients) == len(references) > 0
        for gradient, reference in zip(gradients, references, strict=True):
            torch.testing.assert_close(gradient, reference, rtol=1e-7, atol=1e-8)
