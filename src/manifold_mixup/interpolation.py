"""Mix_λ on tensors: one differentiable operation.

Mix_λ(a, b) = λ·a + (1 - λ)·b (Verma et al., ICML 2019, section 2). This module knows nothing of networks.

The operation is linear in the tensor it mixes, so its backward is another operation of the same kind (the transpose):
a permutation turns into its inverse, and no scatter-add is needed. A :class:`Plan` is such a linear map; it holds
indices and weights alone, and that is all that autograd keeps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manifold_mixup.errors import BatchMismatch
from manifold_mixup.pairing import Partner

__all__ = ["Plan", "apply_plan", "apply_traced", "interpolate"]

Weight = float | Tensor


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
