"""Mix_λ on tensors: who is whose partner, how λ is drawn, and one differentiable operation.

Mix_λ(a, b) = λ·a + (1 - λ)·b (Verma et al., ICML 2019, section 2). This module knows nothing of networks.

The operation is linear in the tensor it mixes, so its backward is another operation of the same kind (the transpose):
a permutation turns into its inverse, and no scatter-add is needed. A :class:`Plan` is such a linear map; it holds
indices and weights alone, and that is all that autograd keeps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from manifold_mixup.errors import BatchMismatch, PairingError

__all__ = ["PAIRINGS", "Pairing", "Partner", "Plan", "apply_plan", "draw_lam", "draw_partner", "interpolate"]

PAIRINGS = ("random", "halves", "two-batches")
Pairing = str | Callable[[Any, torch.Generator], Any]
Weight = float | Tensor


@dataclass(frozen=True, eq=False)
class Partner:
    """The partner of every row of a batch of ``size`` rows.

    ``kind`` says how partners are found: ``"shift"`` (row i + ``shift``, cyclic), ``"permutation"`` (``index``, each
    row used once), ``"gather"`` (``index``, rows may repeat) or ``"fold"`` (row i of the second half for row i of the
    first; half as many rows come out). ``index`` and ``inverse`` are int64 on the CPU, shape (size,).
    """

    kind: Literal["shift", "permutation", "gather", "fold"]
    size: int
    shift: int = 0
    index: Tensor | None = None
    inverse: Tensor | None = None

    @classmethod
    def from_index(cls, index: Tensor | Sequence[int], size: int) -> Partner:
        """Partners given as row numbers.

        Args:
            index: integers in [0, size), shape (size,).
            size: rows of the batch.

        Raises:
            PairingError: ``index`` has another shape, is not integral, or points outside the batch.
        """
        index = torch.as_tensor(index)
        countable = not (index.dtype.is_floating_point or index.dtype.is_complex or index.dtype == torch.bool)
        if index.numel() and not countable:
            raise PairingError(f"Partner indices must be integers, not {index.dtype}.")
        index = index.detach().to("cpu", torch.int64)
        if index.shape != (size,):
            raise PairingError(
                f"Expected {size} partner indices, shape ({size},), but got shape {tuple(index.shape)}: the pairing "
                "has to give one row number for every row of the batch."
            )
        if size and (int(index.min()) < 0 or int(index.max()) >= size):
            raise PairingError(
                f"Partner indices must lie in [0, {size}), but range over [{int(index.min())}, {int(index.max())}]."
            )
        if bool((torch.bincount(index, minlength=size) == 1).all()):
            return cls("permutation", size, index=index, inverse=torch.argsort(index))
        return cls("gather", size, index=index)

    @property
    def rows_out(self) -> int:
        """How many rows come out of the mixing."""
        return self.size // 2 if self.kind == "fold" else self.size

    @functools.cached_property
    def indices(self) -> Tensor:
        """The partner of every row that comes out, int64 on the CPU, shape (rows_out,)."""
        if self.index is not None:
            return self.index
        if self.kind == "fold":
            return torch.arange(self.rows_out, self.size)
        return (torch.arange(self.size) + self.shift) % max(self.size, 1)

    def on(self, device: torch.device) -> Tensor:
        """``indices`` on a device, copied there once."""
        if device not in self._copies:
            self._copies[device] = self.indices.to(device, non_blocking=True)
        return self._copies[device]

    @functools.cached_property
    def _copies(self) -> dict[torch.device, Tensor]:
        return {}

    @property
    def is_matching(self) -> bool:
        """Whether everybody is the partner of their own partner."""
        index = self.indices
        return self.kind != "fold" and bool((index[index] == torch.arange(self.size)).all())

    @functools.cached_property
    def turned(self) -> Partner:
        """The inverse of a shift or permutation: whose partner every row is."""
        if self.kind == "shift":
            return Partner("shift", self.size, shift=(self.size - self.shift) % max(self.size, 1))
        if self.inverse is None:
            raise PairingError(f"Partners of kind {self.kind!r} have no inverse.")
        return Partner("permutation", self.size, index=self.inverse, inverse=self.index)

    def own(self, rows: Tensor) -> Tensor:
        """The rows that keep weight λ: all of them, or the first half of two batches."""
        return rows[: self.rows_out] if self.kind == "fold" else rows

    def of(self, rows: Tensor) -> Tensor:
        """The partners' rows, which get weight 1 - λ."""
        if self.kind == "fold":
            return rows[self.rows_out :]
        if self.kind == "shift":
            return rows.roll(-self.shift, 0)
        return rows.index_select(0, self.on(rows.device))


def draw_partner(
    pairing: Pairing, size: int, generator: torch.Generator, y: Any = None, *, matching: bool = False
) -> Partner:
    """Draw the partner of every row of a batch.

    Args:
        pairing: ``"random"``, ``"halves"``, ``"two-batches"``, or a callable ``(y, generator) -> partner indices``.
        size: rows of the batch.
        generator: the only source of randomness.
        y: the targets, for a callable pairing.
        matching: partners must be mutual (a perfect matching; with an odd size one row is its own partner), as
            mixing every pair at a layer of its own needs.

    Raises:
        PairingError: the pairing does not exist, does not fit the batch, or is not mutual though it has to be.
    """
    if callable(pairing):
        partner = Partner.from_index(pairing(y, generator), size)
        if matching and not partner.is_matching:
            raise PairingError(
                "per='example' needs mutual partners (the partner of i's partner is i), "
                "but the pairing callable returned others. Use per='batch', or return a matching."
            )
        return partner
    half = size // 2
    if pairing == "random":
        order = torch.randperm(size, generator=generator)
        if not matching:
            return Partner("permutation", size, index=order, inverse=torch.argsort(order))
        index = torch.arange(size)
        index[order[:half]], index[order[half : 2 * half]] = order[half : 2 * half], order[:half]
        return Partner("permutation", size, index=index, inverse=index)
    if pairing == "halves":
        if not matching or size % 2 == 0:
            return Partner("shift", size, shift=half)
        index = torch.cat([torch.arange(half, 2 * half), torch.arange(half), torch.arange(2 * half, size)])
        return Partner("permutation", size, index=index, inverse=index)
    if pairing == "two-batches":
        if matching:
            raise PairingError("pairing='two-batches' mixes all rows at one layer: use it with per='batch'.")
        if size % 2:
            raise BatchMismatch(
                f"pairing='two-batches' takes two equal batches one after the other, [x; x'], but got {size} rows."
            )
        return Partner("fold", size)
    raise PairingError(f"Unknown pairing {pairing!r}: expected one of {', '.join(map(repr, PAIRINGS))} or a callable.")


def draw_lam(alpha: float, generator: torch.Generator, size: int = 1) -> Tensor:
    """Draw λ ~ Beta(α, α).

    As a ratio of two Gamma(α) variates, taken in the log domain: Gamma(α) = Gamma(α + 1)·U^(1/α) (Marsaglia and Tsang,
    2000), so that a small α gives λ near 0 and 1 and never 0/0.

    Returns:
        float64 on the CPU, shape (size,). All ones where α is 0.
    """
    if alpha == 0:
        return torch.ones(size, dtype=torch.float64)
    shape = torch.full((2, size), alpha + 1.0, dtype=torch.float64)
    gamma = torch._standard_gamma(shape, generator=generator).log()
    uniform = 1.0 - torch.rand((2, size), dtype=torch.float64, generator=generator)  # in (0, 1]
    log_gamma = gamma + uniform.log() / alpha
    return torch.sigmoid(log_gamma[0] - log_gamma[1])


@dataclass(frozen=True, eq=False)
class Plan:
    """A linear map over the rows of a tensor: out[i] = own[i]·h[i] + other[i]·h[partner[i]], or its transpose.

    ``own`` and ``other`` are floats, or float64 CPU tensors with one weight for every row that comes out (of the map
    that is not transposed).
    """

    partner: Partner
    own: Weight
    other: Weight
    transposed: bool = False

    @classmethod
    def mix(cls, partner: Partner, lam: Weight) -> Plan:
        """Mix_λ with the given partners."""
        if isinstance(lam, Tensor):
            lam = lam.detach().to("cpu", torch.float64)
        return cls(partner, lam, 1.0 - lam)

    def transpose(self) -> Plan:
        """The map that carries the gradient of what comes out back to what went in."""
        p = self.partner
        if p.kind not in ("shift", "permutation"):
            return Plan(p, self.own, self.other, not self.transposed)
        turned = p.turned
        return Plan(turned, self.own, _at(self.other, turned.indices))

    def run(self, h: Tensor) -> Tensor:
        """Apply the map to the rows of ``h``. Dtype and memory format are kept; nothing is recorded by autograd."""
        kind = self.partner.kind
        if kind == "fold":
            return self._unfold(h) if self.transposed else self._fold(h)
        if kind == "gather" and self.transposed:
            out = _scaled(h, self.own)
            return out.index_add_(0, self.partner.on(h.device), _scaled(h, self.other))
        if kind == "shift" and not isinstance(self.other, Tensor):
            return self._shift(h)
        return self._gather(h)

    def _shift(self, h: Tensor) -> Tensor:
        """Two blocks, no gather."""
        out, s, n = torch.empty_like(h), self.partner.shift, h.shape[0]
        assert not isinstance(self.own, Tensor)
        assert not isinstance(self.other, Tensor)
        _combine(h[: n - s], h[s:], self.own, self.other, out[: n - s])
        _combine(h[n - s :], h[:s], self.own, self.other, out[n - s :])
        return out

    def _gather(self, h: Tensor) -> Tensor:
        """The partners' rows are gathered into what comes out, and the rows are mixed in: two passes, two kernels.

        One small kernel per row would save the second pass, up to a third of the time on an idle machine. But where
        other processes keep the cores busy it is several times slower, for each kernel waits for all of its threads.
        """
        out = _rows(h, self.partner.on(h.device))
        if not isinstance(self.own, Tensor) and not isinstance(self.other, Tensor):
            return _combine(h, out, self.own, self.other, out)
        # Weights of their own for every row: in float32 at least, for a half-precision λ has 8 or 11 bits.
        wide = torch.promote_types(h.dtype, torch.float32)
        own, other = (_column(w, h, wide) for w in (self.own, self.other))
        if wide == h.dtype:
            return out.mul_(other).addcmul_(h, torch.as_tensor(own, dtype=wide))
        return out.copy_(own * h.to(wide) + other * out.to(wide))

    def _fold(self, h: Tensor) -> Tensor:
        half = self.partner.rows_out
        first, second = h[:half], h[half:]
        if isinstance(self.own, Tensor) or isinstance(self.other, Tensor):
            wide = torch.promote_types(h.dtype, torch.float32)
            own, other = (_column(w, first, wide) for w in (self.own, self.other))
            return torch.empty_like(first).copy_(own * first.to(wide) + other * second.to(wide))
        return _combine(first, second, self.own, self.other, torch.empty_like(first))

    def _unfold(self, g: Tensor) -> Tensor:
        return torch.cat([_scaled(g, self.own), _scaled(g, self.other)])


def _at(weight: Weight, index: Tensor) -> Weight:
    return weight[index] if isinstance(weight, Tensor) else weight


def _rows(h: Tensor, index: Tensor) -> Tensor:
    """h[index] in the memory format of ``h``, by index_select, which is several times faster than indexing."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if h.dim() in formats and not h.is_contiguous() and h.is_contiguous(memory_format=formats[h.dim()]):
        return h.movedim(1, -1).index_select(0, index).movedim(-1, 1)
    return h.index_select(0, index)


def _column(weight: Weight, like: Tensor, dtype: torch.dtype) -> Weight:
    """One weight per row of ``like``, shaped to broadcast over the rest of the row."""
    if not isinstance(weight, Tensor):
        return weight
    return weight.to(like.device, dtype).view(-1, *[1] * (like.dim() - 1))


def _scaled(h: Tensor, weight: Weight) -> Tensor:
    if not isinstance(weight, Tensor):
        return h * weight
    wide = torch.promote_types(h.dtype, torch.float32)
    return (h.to(wide) * _column(weight, h, wide)).to(h.dtype)


def _combine(own: Tensor, other: Tensor, a: float, b: float, out: Tensor) -> Tensor:
    if a + b == 1.0:
        # lerp with a number for a weight is one vectorised pass in every dtype, rounded once.
        return torch.lerp(other, own, a, out=out)
    return torch.add(torch.mul(own, a), other, alpha=b, out=out)


class _Interpolate(torch.autograd.Function):
    """The linear map of a plan; its derivative is the plan's transpose, at every order."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        return plan.run(h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        turned = ctx.plan.transpose()
        return apply_plan(grad, turned) if torch.is_grad_enabled() else turned.run(grad), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return apply_plan(tangent, ctx.plan)


class _TransformedInterpolate(_Interpolate):
    """The same for ``torch.func``, which wants the context set up apart: a form that costs more at every call."""

    @staticmethod
    def forward(h: Tensor, plan: Plan) -> Tensor:  # type: ignore[override]
        return plan.run(h)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Plan], output: Tensor) -> None:
        ctx.plan = inputs[1]


def apply_plan(h: Tensor, plan: Plan) -> Tensor:
    """Apply a plan to ``h`` of shape (plan.partner.size, ...), differentiably to any order."""
    transformed = torch._C._are_functorch_transforms_active()
    out: Tensor = (_TransformedInterpolate if transformed else _Interpolate).apply(h, plan)  # type: ignore[no-untyped-call]
    return out


class _TracedInterpolate(torch.autograd.Function):
    """The same map for ``torch.compile``: all that changes from step to step is a tensor, so nothing recompiles.

    The compiler fuses the expression into one kernel; the backward stays a gather by the inverse permutation.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, index: Tensor, inverse: Tensor, own: Tensor, other: Tensor) -> Tensor:
        ctx.save_for_backward(index, inverse, own, other)
        return _expression(h, h.index_select(0, index), own, other)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        _, inverse, own, other = ctx.saved_tensors
        turned = other.index_select(0, inverse) if other.dim() else other
        return _expression(grad, grad.index_select(0, inverse), own, turned), None, None, None, None


def _expression(h: Tensor, partner: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """own·h + other·partner in float32 at least, back in the dtype of ``h``. Weights: 0-d, or one for every row."""
    wide = torch.promote_types(h.dtype, torch.float32)
    shape = (-1, *[1] * (h.dim() - 1)) if own.dim() else ()
    own, other = own.to(wide).view(shape), other.to(wide).view(shape)
    return (own * h.to(wide) + other * partner.to(wide)).to(h.dtype)


def apply_traced(h: Tensor, kind: str, index: Tensor, inverse: Tensor | None, lam: Tensor) -> Tensor:
    """What :func:`apply_plan` does, in terms that ``torch.compile`` turns into one graph.

    Args:
        h: shape (n, ...).
        kind: the kind of the partners.
        index: partner of every row that comes out, on the device of ``h``.
        inverse: the inverse permutation, or None where there is none.
        lam: 0-d, or shape (rows out,), on the device of ``h``.
    """
    other = 1.0 - lam
    if kind == "fold":
        half = h.shape[0] // 2
        return _expression(h[:half], h[half:], lam, other)
    if inverse is None:
        return _expression(h, h.index_select(0, index), lam, other)
    out: Tensor = _TracedInterpolate.apply(h, index, inverse, lam, other)  # type: ignore[no-untyped-call]
    return out


def interpolate(h: Tensor, partner: Tensor | Sequence[int] | Partner, lam: Weight, *, dim: int = 0) -> Tensor:
    """Mix every row with its partner's: λ·h[i] + (1 - λ)·h[partner[i]].

    Differentiable with respect to ``h`` to any order; autograd keeps the partner indices and nothing else. With a
    permutation the backward is the same operation with the inverse permutation. A ``lam`` that requires grad gets its
    gradient too (then autograd keeps the two operands).

    Args:
        h: any floating (or complex) dtype; rows along ``dim``. Dtype and memory format are kept.
        partner: row numbers, shape (n,), or a :class:`Partner`.
        lam: λ in [0, 1]: a number, a 0-d tensor, or one value for every row, shape (n,).
        dim: the dimension that holds the batch.

    Returns:
        The shape of ``h``; with a ``Partner`` of kind "fold", half as many rows.

    Raises:
        TypeError: ``h`` is not a floating tensor.
        BatchMismatch: ``lam`` or the partner is made for another number of rows.
        PairingError: partner indices are malformed.
        ValueError: λ is not in [0, 1].

    Source: Verma et al., ICML 2019, section 2, steps (2) and (3).
    """
    if not (h.is_floating_point() or h.is_complex()):
        raise TypeError(f"Only floating tensors can be mixed, not {h.dtype}.")
    if dim != 0:
        return interpolate(h.movedim(dim, 0), partner, lam).movedim(0, dim)
    if not isinstance(partner, Partner):
        partner = Partner.from_index(partner, h.shape[0])
    if partner.size != h.shape[0]:
        raise BatchMismatch(f"The partners are made for {partner.size} rows, but the tensor has {h.shape[0]}.")
    if isinstance(lam, Tensor) and lam.dim() and lam.shape != (partner.rows_out,):
        raise BatchMismatch(f"Expected one λ or {partner.rows_out} of them, but got shape {tuple(lam.shape)}.")
    if isinstance(lam, Tensor) and lam.requires_grad:
        return _expression(partner.own(h), partner.of(h), lam, 1.0 - lam)
    if isinstance(lam, Tensor) and not lam.dim():
        lam = float(lam)
    inside = bool(((lam >= 0) & (lam <= 1)).all()) if isinstance(lam, Tensor) else 0.0 <= lam <= 1.0
    if not inside or (isinstance(lam, float) and math.isnan(lam)):
        raise ValueError(f"λ must lie in [0, 1], but is {lam}.")
    return apply_plan(h, Plan.mix(partner, lam))
