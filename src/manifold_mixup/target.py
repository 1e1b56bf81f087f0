"""MixedTarget: what a loss sees instead of y when the features were mixed.

The targets are mixed as the features are, Mix_λ(y, y') (Verma et al., ICML 2019, section 2). Labels cannot be added up,
so the loss is: λ·ℓ(output, y) + (1 - λ)·ℓ(output, y'). For a loss that is linear in its target, such as cross-entropy,
that equals the loss of the mixed one-hot labels; for any other it is the definition. This module knows nothing of
networks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from manifold_mixup._structures import check_pair, leaves_of, map_leaves, summary
from manifold_mixup._torch_losses import is_loss, is_reduced, weight_of_l1_loss
from manifold_mixup.errors import BatchMismatch, MixedTargetMisuse

__all__ = ["MixedTarget"]

_INSTEAD = (
    "Call target.loss(criterion, output) for a loss, target.accuracy(logits) for the accuracy, target.soft(num_classes) "
    "for the mixed one-hot labels as a tensor. The labels are target.y and target.y_partner, the weight of the first is "
    "target.lam."
)
_ROWS = (slice, list, tuple, Tensor, type(None), type(...))  # indices of rows; any other is a key of a structure
Lam = float | Tensor


def _on_each(name: str) -> Callable[..., MixedTarget]:
    """A method that acts on every tensor of both halves and leaves the rows what they are."""

    def method(self: MixedTarget, *args: Any, **kwargs: Any) -> MixedTarget:
        y, partner = (
            map_leaves(lambda t: getattr(t, name)(*args, **kwargs), half) for half in (self.y, self.y_partner)
        )
        lam = self.lam.to(leaves_of(y)[0].device) if isinstance(self.lam, Tensor) else self.lam
        return self._like(y, partner, lam)

    return _named(method, name, "λ follows to the device and keeps its dtype.")


def _on_shape(name: str) -> Callable[..., MixedTarget]:
    """A method that keeps the elements and their row-major order."""

    def method(self: MixedTarget, *args: Any, **kwargs: Any) -> MixedTarget:
        y, partner = self._tensors(f"{name}()")
        new, lam = getattr(y, name)(*args, **kwargs), self.lam
        if isinstance(lam, Tensor) and new.shape[:1] != lam.shape:
            if not new.dim() or not len(lam) or len(new) % len(lam):
                raise MixedTargetMisuse(
                    f"{name}() from {tuple(y.shape)} to {tuple(new.shape)} puts examples of different λ into one row."
                )
            lam = lam.repeat_interleave(len(new) // len(lam))
        return self._like(new, getattr(partner, name)(*args, **kwargs), lam)

    return _named(method, name, "The λ of every example is repeated where its row is split, as (n, t) to (n·t,).")


def _named(method: Callable[..., MixedTarget], name: str, note: str) -> Callable[..., MixedTarget]:
    method.__name__, method.__qualname__ = name, f"MixedTarget.{name}"
    method.__doc__ = f"As ``Tensor.{name}``, on both halves. {note}"
    return method


class MixedTarget:
    """Two targets for every example: λ of ``y`` and 1 - λ of ``y_partner``.

    Every loss of ``torch.nn.functional``, and so every ``torch.nn.*Loss`` module built on one, takes it in place of y.
    A criterion of your own that does more with the unreduced loss than average it (focal loss) belongs into
    :meth:`loss`: λ must weigh its results, not what it is made of. Moves that keep the meaning (``to``, ``view``,
    ``flatten``, ``long``, rows by index, ...) act on both halves; anything else raises.

    Args:
        y: targets, a tensor of shape (n, ...) or a tuple, list, named tuple or mapping of such tensors.
        y_partner: the partners' targets, of the same structure and shapes.
        lam: λ in [0, 1], a float for the batch or a floating tensor of shape (n,) with one λ per example.
        ready: called before every loss, accuracy and :meth:`soft`; raises if the target may not be used yet.

    Raises:
        BatchMismatch: the tensors, or ``lam``, differ in their first dimension, or the two targets in shape.
        ValueError: λ is no number in [0, 1].
        TypeError: a target is, or holds, something else than tensors; the two targets differ in structure.
    """

    def __init__(self, y: Any, y_partner: Any, lam: Lam, *, ready: Callable[[], object] | None = None) -> None:
        rows = check_pair(y, y_partner)
        self.y = y
        self.y_partner = y_partner
        self.lam = _checked_lam(lam, rows)
        self.ready = ready

    # What it is for

    @property
    def mixed(self) -> bool:
        """False when λ is 1 for every example, so that the target is plain y."""
        return bool((self.lam != 1).any()) if isinstance(self.lam, Tensor) else self.lam != 1.0

    def loss(self, criterion: Callable[[Any, Any], Tensor], output: Any) -> Tensor:
        """λ·criterion(output, y) + (1 - λ)·criterion(output, y_partner), whatever the criterion.

        A half of weight zero is not evaluated: with λ = 1 the result is criterion(output, y), bit for bit.

        Args:
            criterion: any loss, called with ``output`` and one of the two targets.
            output: what the network returned.

        Returns:
            What the criterion returns; with one λ per example its unreduced loss, shape (n, ...), weighted.

        Raises:
            MixedTargetMisuse: λ differs per example and the criterion returned a reduced loss.
        """
        return self._weigh(lambda half: criterion(output, getattr(self, half)))

    def soft(self, num_classes: int | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
        """The mixed targets as one tensor, λ·y + (1 - λ)·y_partner, with class indices as one-hot rows.

        Args:
            num_classes: C; needed for class indices, not read for targets that are floating or boolean.
            dtype: of the result; the default dtype for class indices, that of y for floating targets.

        Returns:
            Shape (n, C) for class indices of shape (n,), and (n, C, d1, ...) for (n, d1, ...), as ``F.cross_entropy``
            takes them. For floating and boolean targets the shape of y.

        Raises:
            ValueError: a class index lies outside [0, C), or ``num_classes`` is missing.
        """
        y, partner = self._tensors("soft()")
        if self.ready is not None:
            self.ready()
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            dtype = dtype or (torch.get_default_dtype() if y.dtype == torch.bool else y.dtype)
            lam, rest = self._weights(y.dim(), dtype, y.device)
            return lam * y.to(dtype) + rest * partner.to(dtype)
        if num_classes is None:
            raise ValueError("Class indices need num_classes to become one-hot rows: call target.soft(num_classes).")
        for labels in (y, partner):
            outside = labels[(labels < 0) | (labels >= num_classes)]
            if outside.numel():
                raise ValueError(
                    f"Label {int(outside[0])} lies outside [0, {num_classes}) and has no one-hot row. If it is the "
                    "ignore_index of the loss, use the loss form, which honours it: F.cross_entropy(output, target, "
                    "ignore_index=...) or target.loss(criterion, output)."
                )
        dtype = dtype or torch.get_default_dtype()
        lam, rest = self._weights(y.dim() + 1, dtype, y.device)
        y, partner = y.long().unsqueeze(1), partner.long().unsqueeze(1)
        soft = torch.zeros(y.shape[0], num_classes, *y.shape[2:], dtype=dtype, device=y.device)
        soft.scatter_add_(1, y, lam.expand(y.shape))
        return soft.scatter_add_(1, partner, rest.expand(y.shape))

    def accuracy(self, logits: Tensor, *, ignore_index: int = -100) -> Tensor:
        """The share of hits, where a hit on y counts λ and a hit on the partner's label 1 - λ.

        Args:
            logits: scores of shape (n, C) for labels of shape (n,), or (n, C, d1, ...) for (n, d1, ...).
            ignore_index: labels of this value are left out, as in ``F.cross_entropy``.

        Returns:
            A tensor without dimensions.

        Raises:
            BatchMismatch: the shapes of logits and labels do not fit.
            MixedTargetMisuse: the target is no tensor of class indices.
        """
        halves = self._tensors("accuracy()")
        if self.ready is not None:
            self.ready()
        y = halves[0]
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise MixedTargetMisuse(f"accuracy() counts class indices, but the labels are {y.dtype}.")
        if logits.dim() < 2 or logits.shape[:1] + logits.shape[2:] != y.shape:
            raise BatchMismatch(
                f"Labels of shape {tuple(y.shape)} need logits of shape ({', '.join(map(str, (*y.shape[:1], 'C', *y.shape[1:])))}), "
                f"but these are {tuple(logits.shape)}."
            )
        guess = logits.argmax(1)
        hits: Any = 0
        labelled: Any = 0
        weights = self._weights(y.dim(), torch.float32, y.device)
        for weight, labels in zip(weights, halves, strict=True):
            valid = labels != ignore_index
            hits = hits + (weight * (valid & (guess == labels))).sum()
            labelled = labelled + (weight * valid).sum()
        share: Tensor = hits / labelled
        return share

    def _weigh(self, loss_of: Callable[[str], Any]) -> Tensor:
        """``loss_of("y")`` and ``loss_of("y_partner")``, weighted by λ and 1 - λ."""
        if self.ready is not None:
            self.ready()
        if not isinstance(self.lam, Tensor):
            # No 1·ℓ + 0·ℓ': that costs a second loss, is not the plain loss to the last bit, and 0·∞ is NaN.
            if self.lam in (0.0, 1.0):
                return _checked_loss(loss_of("y" if self.lam else "y_partner"))
            return self.lam * _checked_loss(loss_of("y")) + (1 - self.lam) * _checked_loss(loss_of("y_partner"))
        one, other = _checked_loss(loss_of("y")), _checked_loss(loss_of("y_partner"))
        if one.shape[:1] != self.lam.shape:
            raise MixedTargetMisuse(
                f"This target has one λ per example, {len(self.lam)} in all, but the loss has shape {tuple(one.shape)}: a "
                'reduced loss cannot be weighted any more. Use reduction="none" and average afterwards.'
            )
        lam, rest = self._weights(one.dim(), one.dtype, one.device)
        return lam * one + rest * other

    def _weights(self, dim: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """λ and 1 - λ, to be broadcast over the rows of a tensor of ``dim`` dimensions."""
        lam = self.lam
        if not isinstance(lam, Tensor):
            return torch.tensor(lam, dtype=dtype, device=device), torch.tensor(1 - lam, dtype=dtype, device=device)
        lam = lam.to(device).view(-1, *[1] * (dim - 1))
        return lam.to(dtype), (1 - lam).to(dtype)

    # Moves that keep the meaning

    def _like(self, y: Any, y_partner: Any, lam: Lam) -> MixedTarget:
        """A target of the same draw."""
        new = object.__new__(type(self))
        new.y, new.y_partner, new.lam, new.ready = y, y_partner, lam, self.ready
        return new

    to, cpu, cuda = _on_each("to"), _on_each("cpu"), _on_each("cuda")
    long, float = _on_each("long"), _on_each("float")
    contiguous, detach, clone = _on_each("contiguous"), _on_each("detach"), _on_each("clone")
    view, reshape, flatten = _on_shape("view"), _on_shape("reshape"), _on_shape("flatten")
    squeeze, unsqueeze = _on_shape("squeeze"), _on_shape("unsqueeze")

    def _pad(self, *args: Any, **kwargs: Any) -> MixedTarget:
        """As ``F.pad``, with which language models shift their labels."""
        y, partner = (F.pad(half, *args, **kwargs) for half in self._tensors("pad()"))
        if len(y) != len(self):
            raise MixedTargetMisuse("pad() would add rows to the batch into which nothing was mixed.")
        return self._like(y, partner, self.lam)

    def __getitem__(self, index: Any) -> MixedTarget:
        """One entry of a structure (``target["boxes"]``, ``target[0]``), or some rows (slice, mask, indices, tuple)."""
        if not isinstance(self.y, Tensor) and not isinstance(index, _ROWS):
            return self._like(self.y[index], self.y_partner[index], self.lam)
        first = index[0] if isinstance(index, tuple) and index else index
        if isinstance(first, int) or (isinstance(first, Tensor) and not first.dim()):
            raise MixedTargetMisuse(f"[{first}] takes one example out of the batch; use target[{first}:{first} + 1].")
        y, partner = (map_leaves(lambda t: t[index], half) for half in (self.y, self.y_partner))
        return self._like(y, partner, _rows_of_lam(self.lam, leaves_of(self.y)[0], index))

    @property
    def shape(self) -> torch.Size:
        """Shape of y."""
        return self._tensors("shape")[0].shape

    @property
    def ndim(self) -> int:
        """Number of dimensions of y."""
        return self._tensors("ndim")[0].ndim

    @property
    def device(self) -> torch.device:
        """Device of y, of its first tensor for a structure."""
        return leaves_of(self.y)[0].device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of y."""
        return self._tensors("dtype")[0].dtype

    def size(self, *dim: Any) -> Any:
        """As ``Tensor.size``."""
        return self._tensors("size()")[0].size(*dim)

    def dim(self) -> int:
        """As ``Tensor.dim``."""
        return self._tensors("dim()")[0].dim()

    def numel(self) -> int:
        """As ``Tensor.numel``."""
        return self._tensors("numel()")[0].numel()

    def __len__(self) -> int:
        return len(self.y)

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.y, Tensor):
            raise _misuse(self.y, "Iterating over it, or unpacking it like a tuple (y_a, y_b, lam),")
        if isinstance(self.y, Mapping):
            return iter(self.y)
        return (self._like(a, b, self.lam) for a, b in zip(self.y, self.y_partner, strict=True))

    # What is refused, and how it looks

    def _tensors(self, what: str) -> tuple[Tensor, Tensor]:
        """Both halves, if they are tensors."""
        if not isinstance(self.y, Tensor):
            raise _misuse(self.y, what)
        return self.y, self.y_partner

    def __getattr__(self, name: str) -> Any:
        # Only for names that are not found elsewhere. Protocol lookups (copy, pickle, inspect) expect plain errors.
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        y = self.__dict__.get("y")
        if name in getattr(y, "_fields", ()):
            return self[y._fields.index(name)]  # type: ignore[union-attr]
        if isinstance(y, Mapping) and name in ("keys", "values", "items"):
            entries = {key: self[key] for key in y}
            return getattr(entries, name)
        raise _misuse(y, f".{name}")

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What PyTorch calls when one of its functions is given a mixed target."""
        kwargs = dict(kwargs or {})
        if is_loss(func):
            return _mixed_loss(func, args, kwargs)
        if func in _MOVES:
            args = args or (kwargs.pop("input"),)
            return getattr(args[0], _MOVES[func])(*args[1:], **kwargs)
        found: list[MixedTarget] = []
        _swap((args, kwargs), "y", found)
        name = getattr(func, "__name__", str(func))
        raise _misuse(found[0].y if found else None, f"{name}()")

    def __copy__(self) -> MixedTarget:
        return self._like(self.y, self.y_partner, self.lam)

    def __deepcopy__(self, memo: dict[int, Any]) -> MixedTarget:
        # ``ready`` is a tie to the mixer, which is not copied along.
        return self._like(*(copy.deepcopy(part, memo) for part in (self.y, self.y_partner, self.lam)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "ready": None}

    def __repr__(self) -> str:
        lam = f"{len(self.lam)} per example" if isinstance(self.lam, Tensor) else repr(self.lam)
        return f"{type(self).__name__}(y={summary(self.y)}, y_partner={summary(self.y_partner)}, lam={lam})"


def _refusing(name: str) -> Callable[..., Any]:
    def method(self: MixedTarget, *_: Any, **__: Any) -> Any:
        raise _misuse(self.y, f"{name}")

    return method


# Set here and not in the class body: there, __eq__ would take away __hash__.
for _name in (
    "eq ne lt le gt ge add sub mul matmul truediv floordiv mod divmod pow lshift rshift and or xor radd rsub rmul "
    "rmatmul rtruediv rfloordiv rmod rdivmod rpow rlshift rrshift rand ror rxor neg pos abs invert bool int float "
    "complex setitem reversed array"
).split():
    setattr(MixedTarget, f"__{_name}__", _refusing(f"__{_name}__"))

_MOVES: dict[Callable[..., Any], str] = {
    torch.reshape: "reshape",
    torch.flatten: "flatten",
    torch.squeeze: "squeeze",
    torch.unsqueeze: "unsqueeze",
    torch.detach: "detach",
    torch.clone: "clone",
    torch.numel: "numel",
    F.pad: "_pad",
}


def _misuse(y: Any, what: str) -> MixedTargetMisuse:
    entry = (
        "" if y is None or isinstance(y, Tensor) else f"This one holds a {type(y).__name__}: take an entry out first. "
    )
    return MixedTargetMisuse(
        f"{what} does not work on a mixed target, which is two labels per example. {entry}{_INSTEAD}"
    )


def _mixed_loss(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A loss of ``torch.nn.functional`` with mixed targets among its arguments (CTC: targets and their lengths)."""
    if func is F.l1_loss:
        kwargs.setdefault("weight", weight_of_l1_loss())
    found: list[MixedTarget] = []
    _swap((args, kwargs), "y", found)
    first = found[0]
    if not all(_same_draw(first, other) for other in found[1:]):
        raise MixedTargetMisuse(f"{func.__name__}() was given mixed targets of different draws.")
    if isinstance(first.lam, Tensor) and is_reduced(func, args, kwargs):
        raise MixedTargetMisuse(
            f"This target has one λ per example, which the reduced loss of {func.__name__}() cannot be weighted "
            'with. Use reduction="none" and average afterwards.'
        )
    return first._weigh(lambda half: func(*_swap(args, half), **_swap(kwargs, half)))


def _swap(tree: Any, half: str, found: list[MixedTarget] | None = None) -> Any:
    """``tree`` with one half of every mixed target in its place; the targets are appended to ``found``."""

    def swap(leaf: Any) -> Any:
        if not isinstance(leaf, MixedTarget):
            return leaf
        if found is not None:
            found.append(leaf)
        return getattr(leaf, half)

    return map_leaves(swap, tree)


def _same_draw(one: MixedTarget, other: MixedTarget) -> bool:
    a, b = one.lam, other.lam
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a is b or torch.equal(a, b.to(a.device))
    else:
        same = not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b
    return same and one.ready == other.ready


def _rows_of_lam(lam: Lam, y: Tensor, index: Any) -> Lam:
    """λ of the rows of ``y[index]``."""
    if not isinstance(lam, Tensor):
        return lam
    rows = torch.arange(len(lam), device=y.device).view(-1, *[1] * (y.dim() - 1)).expand(y.shape)[index]
    if rows.dim() > 1:
        whole = rows.flatten(1)
        if not whole.shape[1] and len(rows) == len(lam):
            return lam
        rows = whole[:, 0] if whole.shape[1] else whole.new_empty(0)
        if len(rows) != len(whole) or not bool((whole == rows.unsqueeze(1)).all()):
            raise MixedTargetMisuse("The index puts examples of different λ into one row.")
    return lam[rows.to(lam.device)]


def _checked_lam(lam: Lam, rows: int) -> Lam:
    if isinstance(lam, Tensor):
        if not lam.is_floating_point() or lam.dim() != 1:
            raise ValueError(
                "λ must be a float, or a floating tensor of one dimension with a λ for every example, but it is a "
                f"{lam.dtype} tensor of shape {tuple(lam.shape)}."
            )
        if len(lam) != rows:
            raise BatchMismatch(f"There are {len(lam)} values of λ for {rows} targets.")
        # On an accelerator the values are not looked at: that would wait for the device.
        inside = lam.device.type != "cpu" or bool(((lam >= 0) & (lam <= 1)).all())
    else:
        lam = float(lam)
        inside = 0.0 <= lam <= 1.0
    if not inside:
        raise ValueError(f"λ must lie in [0, 1], got {lam}.")
    return lam


def _checked_loss(loss: Any) -> Any:
    if not isinstance(loss, Tensor | float):
        raise MixedTargetMisuse(f"The criterion must return a tensor to be weighted, not {type(loss).__name__}.")
    return loss
