"""Manifold mixup in timm's training loop: a ``Mixup`` with the constructor and the call of ``timm.data.Mixup``.

::

    mixup_fn = Mixup(model, mixup_alpha=0.8, label_smoothing=0.1, num_classes=1000)
    for input, target in loader:
        input, target = mixup_fn(input, target)
        loss = SoftTargetCrossEntropy()(model(input), target)

The targets come out soft, as timm's losses want them; the input comes out as it was, because the layer drawn (the input
or a hidden one) is mixed inside the model's forward. This file needs PyTorch alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from manifold_mixup.errors import LayerNotReached
from manifold_mixup.mixup import ManifoldMixup
from manifold_mixup.pairing import Pairing
from manifold_mixup.target import MixedTarget
from manifold_mixup.validation import Layers

__all__ = ["Mixup", "flip"]

_PER = {"batch": "batch", "pair": "example"}


def flip(y: Tensor, generator: torch.Generator) -> Tensor:
    """Timm's pairing: the last row for the first, and so on; of an odd number the middle row stays alone."""
    return torch.arange(len(y) - 1, -1, -1)


class Mixup:
    """In place of ``timm.data.Mixup``: the same arguments after the model, the same call, hidden states mixed as well.

    With ``layers=["input"]`` the targets and what the network sees are those of ``timm.data.Mixup`` for the same λ. The
    differences: a batch may have an odd number of rows, the input tensor is not written to, the random numbers are
    its own (``seed``) and not NumPy's global ones, and nothing is mixed while the model is in eval mode.

    Args:
        model: the network, or a DDP or ``torch.compile`` wrapper of it.
        mixup_alpha: λ ~ Beta(α, α); 0 means no mixing.
        cutmix_alpha: has to be 0.
        cutmix_minmax: has to be None.
        prob: share of the batches that are mixed (of batches in mode "pair" too, where timm means pairs).
        switch_prob: for CutMix alone, not read.
        mode: "batch": one layer and one λ per batch. "pair": each pair of rows draws its own. "elem" is refused.
        correct_lam: for CutMix alone, not read.
        label_smoothing: ε; the target class gets 1 - ε + ε / C and the others ε / C, before mixing; with
            ``multi_label`` every label moves to (1 - ε)·y + ε / 2.
        num_classes: C.
        multi_label: targets are dense and floating, shape (n, C).
        layers: the eligible set S, as in :class:`~manifold_mixup.ManifoldMixup`.
        pairing: as there; :func:`flip` is timm's.
        seed, check: as there.

    Attributes:
        mixup_enabled: set it to False, as timm's training script does for the last epochs, and batches come out with
            smoothed targets and are not mixed. ``mixup_alpha`` and ``mix_prob`` may be changed, too.
        mixup: the :class:`~manifold_mixup.ManifoldMixup`: ``mixup.layers``, ``mixup.last``, ``mixup.remove()``.

    Raises:
        ValueError: CutMix is asked for, the mode is "elem" or unknown, or a number is out of range.

    Source: Verma et al., Manifold Mixup, ICML 2019, section 2.
    """

    def __init__(
        self,
        model: nn.Module,
        mixup_alpha: float = 1.0,
        cutmix_alpha: float = 0.0,
        cutmix_minmax: Sequence[float] | None = None,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        mode: str = "batch",
        correct_lam: bool = True,
        label_smoothing: float = 0.1,
        num_classes: int = 1000,
        multi_label: bool = False,
        *,
        layers: Layers = "auto",
        pairing: Pairing = flip,
        seed: int | None = None,
        check: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"The first argument is the model, but it is {model!r}: Mixup(model, mixup_alpha=...). Hidden states "
                "are mixed inside the model's forward."
            )
        if cutmix_alpha or cutmix_minmax is not None:
            asked = f"cutmix_alpha={cutmix_alpha!r}" if cutmix_alpha else f"cutmix_minmax={cutmix_minmax!r}"
            raise ValueError(
                f"{asked}: CutMix pastes patches of images and has no form for hidden states. Set cutmix_alpha=0 and "
                "cutmix_minmax=None, or use timm.data.Mixup, which does CutMix on the input."
            )
        if mode not in _PER:
            why = " In mode 'elem' both rows of a pair draw, so a partner may be mixed already when it is used."
            raise ValueError(
                f"mode must be 'batch' or 'pair', but is {mode!r}.{why if mode == 'elem' else ''} "
                "mode='pair' draws a layer and λ for each pair."
            )
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), but is {label_smoothing!r}.")
        self.mixup_alpha, self.mix_prob, self.mode = mixup_alpha, prob, mode
        self.cutmix_alpha, self.cutmix_minmax = cutmix_alpha, cutmix_minmax
        self.switch_prob, self.correct_lam = switch_prob, correct_lam
        self.label_smoothing, self.num_classes, self.multi_label = label_smoothing, num_classes, multi_label
        self.mixup_enabled = True
        self.mixup = ManifoldMixup(
            model,
            mixup_alpha,
            layers,
            per="batch" if mode == "batch" else "example",
            pairing=pairing,
            probability=prob,
            seed=seed,
            check=check,
        )
        self._previous: MixedTarget | None = None

    def __repr__(self) -> str:
        return f"Mixup({self.mixup!r}, label_smoothing={self.label_smoothing}, num_classes={self.num_classes})"

    def __call__(self, x: Any, target: Tensor) -> tuple[Any, Tensor]:
        """Draw for one batch.

        Args:
            x: what the model takes, n rows, on its device.
            target: class indices of shape (n,), or with ``multi_label`` floating labels of shape (n, C).

        Returns:
            ``x``, and the soft targets of shape (n, C), which the next training forward of the model deserves.

        Raises:
            LayerNotReached: the targets of the previous batch were mixed, but no forward mixed its features.
            ValueError: the targets are not what ``num_classes`` and ``multi_label`` say.
        """
        self.check_previous()
        self._check(target)
        # Switched off, it draws all the same: an old draw must not stay in force.
        self.mixup.alpha = float(self.mixup_alpha)
        self.mixup.probability = float(self.mix_prob) if self.mixup_enabled else 0.0
        x, mixed = self.mixup(x, target)
        self._previous = mixed if mixed.mixed else None
        # A soft target is plain numbers and cannot ask whether the forward has mixed, so the next call does.
        soft = MixedTarget(mixed.y, mixed.y_partner, mixed.lam).soft(self.num_classes)
        towards = 0.5 if self.multi_label else 1 / self.num_classes
        return x, soft.mul_(1 - self.label_smoothing).add_(self.label_smoothing * towards)

    def check_previous(self) -> None:
        """Check that the last batch drawn was mixed by a forward; every call does it for the batch before.

        Raises:
            LayerNotReached: it was not, so a loss may have seen mixed targets with unmixed features.
        """
        previous, self._previous = self._previous, None
        if previous is None or previous.ready is None:
            return
        try:
            previous.ready()
        except LayerNotReached as error:
            raise LayerNotReached(
                "The targets of the previous batch were mixed, but no training forward of the model mixed its "
                "features. Call the model (not its submodules) in training mode on every batch that comes out of "
                "mixup_fn(x, target). A model compiled and run before has to be compiled anew: torch._dynamo.reset()."
            ) from error

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to draw what the uninterrupted one would have drawn."""
        return self.mixup.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``. Raises ValueError where it is of another mixer."""
        self.mixup.load_state_dict(state)

    def _check(self, target: Tensor) -> None:
        dense = target.is_floating_point()
        if self.multi_label and not (dense and target.dim() == 2 and target.shape[1] == self.num_classes):
            raise ValueError(
                f"multi_label=True takes floating targets of shape (n, {self.num_classes}), but got {target.dtype} of "
                f"shape {tuple(target.shape)}."
            )
        if not self.multi_label and (dense or target.dim() != 1):
            raise ValueError(
                f"Class indices of shape (n,) are expected, but got {target.dtype} of shape {tuple(target.shape)}. "
                "For dense multi-label targets set multi_label=True."
            )
