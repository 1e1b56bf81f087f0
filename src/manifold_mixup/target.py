"""MixedTarget: what a loss sees instead of y when the features were mixed.

Targets are mixed as features are, Mix_λ(y, y') (Verma et al., ICML 2019, section 2). Labels cannot be added up, so the
loss is: λ·ℓ(output, y) + (1 - λ)·ℓ(output, y'). For a loss that is linear in its target, such as cross-entropy, that
is the loss of the mixed one-hot labels; for any other it is the definition. This module knows nothing of networks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from manifold_mixup.errors import BatchMismatch, MixedTargetMisuse
from manifold_mixup.losses import LOSSES, log_probabilities, weight_of_l1_loss
from manifold_mixup.structure import map_tensors, tensors
from manifold_mixup.target_checks import (
    Lam,
    check_classes,
    check_pair,
    checked_lam,
    checked_loss,
    index_of_rows,
    is_index,
    one_row_each,
    rows_of_lam,
    same_draw,
    summary,
)

__all__ = ["MixedTarget"]

_INSTEAD = (
    "Call target.loss(criterion, output) for a loss, target.accuracy(logits) for the accuracy, "
    "target.soft(num_classes) for the mixed one-hot labels as a tensor. target.y are the unmixed labels, "
    "target.y_partner those of the partners, target.lam is the weight of the first."
)
_ROWS = (slice, list, tuple, Tensor, type(None), type(...))  # indices of rows; any other one names an entry


def _on_each(name: str) -> Callable[..., MixedTarget]:
    """A method that acts on every tensor of both halves and leaves the rows what they are."""

    def method(self: MixedTarget, *args: Any, **kwargs: Any) -> MixedTarget:
        y, partner = (map_tensors(lambda t: getattr(t, name)(*args, **kwargs), h) for h in (self.y, self.y_partner))
        lam = self.lam.to(next(tensors(y)).device) if isinstance(self.lam, Tensor) else self.lam
        return self._like(y, partner, lam)

    return _named(method, name, "λ follows to the device and keeps its dtype.")


def _on_shape(name: str) -> Callable[..., MixedTarget]:
    """A method that keeps the elements and their row-major order."""

    def method(self: MixedTarget, *args: Any, **kwargs: Any) -> MixedTarget:
        y, partner = self._tensors(f"{name}()")
        new, lam = getattr(y, name)(*args, **kwargs), self.lam
        if isinstance(lam, Tensor) and new.shape[:1] != lam.shape:
            if not new.dim() or not len(lam) or len(new) % len(lam):
                raise MixedTargetMisuse(f"{name}() to {tuple(new.shape)} puts examples of different λ into one row.")
            lam = lam.repeat_interleave(len(new) // len(lam))
        return self._like(new, getattr(partner, name)(*args, **kwargs), lam)

    return _named(method, name, "λ of an example is repeated where its row is split, as when (n, t) becomes (n·t,).")


def _named(method: Callable[..., MixedTarget], name: str, note: str) -> Callable[..., MixedTarget]:
    method.__name__, method.__qualname__ = name, f"MixedTarget.{name}"
    method.__doc__ = f"As ``Tensor.{name}``, on both halves. {note}"
    return method


class MixedTarget:
    """Two targets for every example: λ of ``y`` and 1 - λ of ``y_partner``.

    Every loss of ``torch.nn.functional``, and so every loss module built on one, takes it in place of y. A criterion of
    your own that does more with an unreduced loss than average it (focal loss) belongs into :meth:`loss`: λ has to
    weigh its results, not what they are made of. Moves that keep the meaning (``to``, ``view``, ``long``, rows by
    index, ...) act on both halves; whatever else would treat it as a tensor raises :class:`MixedTargetMisuse`.

    Args:
        y: the targets, a tensor of shape (n, ...), or a tuple, list, mapping or dataclass of such tensors.
        y_partner: the partners' targets, of the same structure and shapes.
        lam: λ in [0, 1], a float for the batch or a floating tensor of shape (n,) with one λ per example.
        ready: called before every loss, accuracy and :meth:`soft`; raises if the target may not be used yet. Targets
            made from this one call it too; pickling drops it.

    Raises:
        BatchMismatch: the tensors, or ``lam``, differ in their first dimension, or the two targets in their shapes.
        ValueError: λ is no number in [0, 1].
        TypeError: a target is or holds something else than tensors, or the two targets differ in structure.
    """

    def __init__(self, y: Any, y_partner: Any, lam: Lam, *, ready: Callable[[], object] | None = None) -> None:
        self.y, self.y_partner = y, y_partner
        self.lam: Lam = checked_lam(lam, check_pair(y, y_partner))
        self.ready = ready

    # ---------------------------------------------------------------- what it is for

    @property
    def mixed(self) -> bool:
        """False when λ is 1 for every example, so that this is plain y."""
        return bool((self.lam != 1).any()) if isinstance(self.lam, Tensor) else self.lam != 1.0

    def loss(self, criterion: Callable[[Any, Any], Any], output: Any) -> Any:
        """λ·criterion(output, y) + (1 - λ)·criterion(output, y_partner), whatever the criterion.

        A half of weight zero is not evaluated: with λ = 1 the result is criterion(output, y), bit for bit.

        Args:
            criterion: any loss, called with ``output`` and one of the two targets.
            output: what the network returned.

        Returns:
            What the criterion returns; with one λ per example its unreduced loss of shape (n, ...), weighted.

        Raises:
            MixedTargetMisuse: λ differs per example and the criterion reduces; or it does not return a tensor.
        """
        return self._weigh(lambda half: criterion(output, getattr(self, half)))

    def soft(self, num_classes: int | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
        """The mixed targets as one tensor, λ·y + (1 - λ)·y_partner, where class indices become one-hot.

        Args:
            num_classes: C; needed for class indices, not read where y is floating or boolean.
            dtype: of the result; by default that of a floating y, else the default dtype.

        Returns:
            Shape (n, C) for class indices of shape (n,), and (n, C, d1, ...) for (n, d1, ...), as ``F.cross_entropy``
            takes them; the shape of y where y is floating or boolean.

        Raises:
            ValueError: a class index lies outside [0, C), or ``num_classes`` is missing.
            MixedTargetMisuse: y is a structure.
        """
        y, partner = self._tensors("soft()")
        self._ask_ready()
        dtype = dtype or (y.dtype if y.is_floating_point() else torch.get_default_dtype())
        if not is_index(y):
            lam, rest = self._weights(y.dim(), dtype, y.device)
            return lam * y.to(dtype) + rest * partner.to(dtype)
        if num_classes is None:
            raise ValueError("Class indices need the number of classes to become one-hot: target.soft(num_classes).")
        for labels in (y, partner):
            check_classes(labels, num_classes)
        lam, rest = self._weights(y.dim() + 1, dtype, y.device)
        y, partner = y.long().unsqueeze(1), partner.long().unsqueeze(1)
        soft = torch.zeros(len(y), num_classes, *y.shape[2:], dtype=dtype, device=y.device)
        return soft.scatter_add_(1, y, lam.expand(y.shape)).scatter_add_(1, partner, rest.expand(y.shape))

    def accuracy(self, logits: Tensor, *, ignore_index: int = -100) -> Tensor:
        """The share of hits of argmax, where a hit on y counts λ and a hit on the partner's label 1 - λ.

        Args:
            logits: scores of shape (n, C) for labels of shape (n,), or (n, C, d1, ...) for (n, d1, ...).
            ignore_index: labels of this value are left out, as in ``F.cross_entropy``.

        Returns:
            A float32 tensor of shape ().

        Raises:
            BatchMismatch: logits and labels differ in shape.
            MixedTargetMisuse: y is no tensor of class indices.
        """
        y, partner = self._tensors("accuracy()")
        self._ask_ready()
        if not is_index(y):
            raise MixedTargetMisuse(f"accuracy() counts hits on class indices, but the labels are {y.dtype}.")
        if logits.dim() < 2 or logits.shape[:1] + logits.shape[2:] != y.shape:
            raise BatchMismatch(
                f"Labels of shape (n, ...) need logits of shape (n, C, ...), but the shapes are {tuple(y.shape)} and "
                f"{tuple(logits.shape)}."
            )
        lam, rest = self._weights(y.dim(), torch.float32, y.device)
        guess, valid, valid_partner = logits.argmax(1), y != ignore_index, partner != ignore_index
        hits = lam * (valid & (guess == y)) + rest * (valid_partner & (guess == partner))
        return hits.sum() / (lam * valid + rest * valid_partner).sum()

    def _weigh(self, loss_of: Callable[[str], Any]) -> Any:
        """``loss_of("y")`` and ``loss_of("y_partner")``, weighted by λ and 1 - λ."""
        self._ask_ready()
        lam = self.lam
        if not isinstance(lam, Tensor):
            # No 1·ℓ + 0·ℓ': it costs a second loss, may differ from ℓ in the last bit, and 0·∞ is not 0.
            if lam in (0.0, 1.0):
                return checked_loss(loss_of("y" if lam else "y_partner"))
            return lam * checked_loss(loss_of("y")) + (1 - lam) * checked_loss(loss_of("y_partner"))
        one, other = checked_loss(loss_of("y")), checked_loss(loss_of("y_partner"))
        if not isinstance(one, Tensor) or one.shape[:1] != lam.shape:
            raise MixedTargetMisuse(
                f"This target has one λ for each of {len(lam)} examples, but the loss has shape "
                f'{tuple(getattr(one, "shape", ()))}. Use reduction="none" in the criterion, and average afterwards.'
            )
        own, rest = self._weights(one.dim(), one.dtype, one.device)
        return own * one + rest * other

    def _weights(self, dim: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """λ and 1 - λ, of a shape to be broadcast over the rows of a tensor of ``dim`` dimensions."""
        lam = self.lam
        if not isinstance(lam, Tensor):
            # Not tensor(lam), of which the compiler makes a constant, and compiles anew for every λ.
            one = torch.ones((), dtype=dtype, device=device)
            return lam * one, (1 - lam) * one
        lam = lam.to(device).view(-1, *[1] * (dim - 1))
        return lam.to(dtype), (1 - lam).to(dtype)

    def _ask_ready(self) -> None:
        if self.ready is not None:
            self.ready()

    # ---------------------------------------------------------------- moves that keep the meaning

    to, cpu, cuda = _on_each("to"), _on_each("cpu"), _on_each("cuda")
    long, float = _on_each("long"), _on_each("float")
    contiguous, detach, clone = _on_each("contiguous"), _on_each("detach"), _on_each("clone")
    clamp = _on_each("clamp")  # heads for question answering move positions outside of the text to an ignored one
    view, reshape, flatten = _on_shape("view"), _on_shape("reshape"), _on_shape("flatten")
    squeeze, unsqueeze = _on_shape("squeeze"), _on_shape("unsqueeze")

    def _pad(self, *args: Any, **kwargs: Any) -> MixedTarget:
        """As ``F.pad``, with which language models shift their labels."""
        y, partner = (F.pad(half, *args, **kwargs) for half in self._tensors("pad()"))
        if len(y) != len(self):
            raise MixedTargetMisuse("pad() would add rows to the batch that nothing was mixed into.")
        return self._like(y, partner, self.lam)

    def __getitem__(self, index: Any) -> Any:
        """An entry of a structure (``target["boxes"]``, ``target[0]``), or rows (slice, mask, indices, tuple index)."""
        if not isinstance(self.y, Tensor) and not isinstance(index, _ROWS):
            return self._entry(self.y[index], self.y_partner[index])
        rows = index_of_rows(index, next(tensors(self.y)).dim())
        if isinstance(rows, Integral) or (isinstance(rows, Tensor) and not rows.dim()):
            raise MixedTargetMisuse(f"[{index}] takes one example out of the batch; use a slice, target[i:i + 1].")
        y, partner = (map_tensors(lambda t: t[index], half) for half in (self.y, self.y_partner))
        return self._like(y, partner, rows_of_lam(self.lam, next(tensors(self.y)), index))

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
        """Device of y; of its first tensor where it is a structure."""
        return next(tensors(self.y)).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of y."""
        return self._tensors("dtype")[0].dtype

    def size(self, *dim: Any) -> Any:
        """As ``Tensor.size``, of y."""
        return self._tensors("size()")[0].size(*dim)

    def dim(self) -> int:
        """As ``Tensor.dim``, of y."""
        return self._tensors("dim()")[0].dim()

    def numel(self) -> int:
        """As ``Tensor.numel``, of y."""
        return self._tensors("numel()")[0].numel()

    def __len__(self) -> int:
        return len(self.y)

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.y, Mapping):
            return iter(self.y)
        if isinstance(self.y, (tuple, list)):
            return (self[i] for i in range(len(self.y)))
        raise _misuse(self.y, "Iterating, or unpacking it like a tuple (y_a, y_b, lam),")

    def __contains__(self, key: Any) -> bool:
        if not isinstance(self.y, Mapping):
            raise _misuse(self.y, "`in`")
        return key in self.y

    def _like(self, y: Any, y_partner: Any, lam: Lam) -> MixedTarget:
        """A target of the same draw."""
        new = object.__new__(type(self))
        new.y, new.y_partner, new.lam, new.ready = y, y_partner, lam, self.ready
        return new

    def _entry(self, one: Any, other: Any) -> Any:
        return one if next(tensors(one), None) is None else self._like(one, other, self.lam)

    def _tensors(self, what: str) -> tuple[Tensor, Tensor]:
        """Both halves, if they are tensors."""
        if not isinstance(self.y, Tensor):
            raise _misuse(self.y, what)
        return self.y, self.y_partner

    # ---------------------------------------------------------------- what Python and PyTorch ask for

    def __getattr__(self, name: str) -> Any:
        # For names found nowhere else. Protocols (copy, pickle, inspect) expect a plain error.
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        y = self.__dict__.get("y")
        if name in getattr(y, "_fields", ()) or name in getattr(y, "__dataclass_fields__", ()):
            return self._entry(getattr(y, name), getattr(self.y_partner, name))
        if isinstance(y, Mapping) and name in ("keys", "values", "items"):
            return getattr({key: self[key] for key in y}, name)
        raise _misuse(y, f".{name}")

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """What PyTorch calls when one of its functions is given a mixed target."""
        kwargs = dict(kwargs or {})
        if function in LOSSES:
            return _mixed_loss(function, args, kwargs)
        move = _MOVES.get(function)
        target = args[0] if args else kwargs.pop("input", None)
        if move and isinstance(target, MixedTarget):
            return getattr(target, move)(*args[1:], **kwargs)
        raise _misuse(None, f"{getattr(function, '__name__', function)}()")

    def __copy__(self) -> MixedTarget:
        return self._like(self.y, self.y_partner, self.lam)

    def __deepcopy__(self, memo: dict[int, Any]) -> MixedTarget:
        # All but ``ready``: it asks the mixer that drew, of which a copy knows nothing.
        return self._like(*(copy.deepcopy(part, memo) for part in (self.y, self.y_partner, self.lam)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "ready": None}

    def __repr__(self) -> str:
        lam = f"<{len(self.lam)} of them>" if isinstance(self.lam, Tensor) else repr(self.lam)
        return f"{type(self).__name__}(y={summary(self.y)}, y_partner={summary(self.y_partner)}, lam={lam})"


def _refusing(name: str) -> Callable[..., Any]:
    def method(self: MixedTarget, *_: Any, **__: Any) -> Any:
        raise _misuse(self.y, name)

    return method


# Set from outside: an __eq__ in the class body would take __hash__ away. Without __array__ NumPy would make an array
# of one object.
_BINARY = "add sub mul matmul truediv floordiv mod divmod pow lshift rshift and or xor"
_OTHER = "eq ne lt le gt ge neg pos abs invert bool int float complex setitem delitem reversed array"
for _name in f"{_BINARY} r{_BINARY.replace(' ', ' r')} {_OTHER}".split():
    setattr(MixedTarget, f"__{_name}__", _refusing(f"__{_name}__()"))

_MOVES: dict[Any, str] = {F.pad: "_pad"}
for _name in ("reshape", "flatten", "squeeze", "unsqueeze", "detach", "clone", "numel"):
    _MOVES[getattr(torch, _name)] = _name


def _misuse(y: Any, what: str) -> MixedTargetMisuse:
    entry = "" if y is None or isinstance(y, Tensor) else f"Its targets are a {type(y).__name__}: take one out first. "
    return MixedTargetMisuse(f"{what} cannot work on a MixedTarget: every example has two labels. {entry}{_INSTEAD}")


def _mixed_loss(loss: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A loss of ``torch.nn.functional`` with mixed targets among its arguments (CTC: targets and their lengths)."""
    if loss is F.l1_loss and (weight := weight_of_l1_loss()) is not None:
        kwargs["weight"] = weight
    first, *others = (value for value in (*args, *kwargs.values()) if isinstance(value, MixedTarget))
    for target in (first, *others):
        target._tensors(f"{loss.__name__}()")
    if not all(same_draw(first, other) for other in others):
        raise MixedTargetMisuse(f"{loss.__name__}() was given mixed targets of different draws.")
    if loss in (F.cross_entropy, F.nll_loss):
        one_row_each(args[0] if args else kwargs.get("input"), first.y)
    mixes = isinstance(first.lam, Tensor) or 0.0 < first.lam < 1.0
    if loss is F.cross_entropy and mixes and is_index(first.y):
        shared = log_probabilities(args, kwargs)
        if shared is not None:
            options = {k: kwargs[k] for k in ("weight", "ignore_index", "reduction") if k in kwargs}
            return first._weigh(lambda half: F.nll_loss(shared, getattr(first, half), **options))

    def loss_of(half: str) -> Any:
        def plain(value: Any) -> Any:
            return getattr(value, half) if isinstance(value, MixedTarget) else value

        return loss(*map(plain, args), **{name: plain(value) for name, value in kwargs.items()})

    return first._weigh(loss_of)
