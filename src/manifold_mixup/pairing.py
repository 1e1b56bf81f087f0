"""Who is whose partner, and how λ is drawn (Verma et al., ICML 2019, section 2)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from manifold_mixup.errors import BatchMismatch, PairingError

__all__ = ["PAIRINGS", "Pairing", "Partner", "draw_lam", "draw_partner", "float64_on"]

PAIRINGS = ("random", "halves", "two-batches")
Pairing = str | Callable[[Any, torch.Generator], Any]


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


def float64_on(weights: Tensor, device: torch.device) -> Tensor:
    """On the device, in float64 where it has that."""
    return weights.to(device, torch.float32 if device.type == "mps" else torch.float64, non_blocking=True)
