"""CutMix (Yun et al. 2019, arXiv 1905.04899): a box of every image is pasted in from another one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from manifold_mixup.lab.methods.base import BatchTransform, Method
from manifold_mixup.lab.methods.generators import send
from manifold_mixup.lab.methods.images import image_size
from manifold_mixup.lab.methods.mixing_log import MixingLog
from manifold_mixup.lab.options import Options
from manifold_mixup.pairing import draw_lam
from manifold_mixup.target import MixedTarget

__all__ = ["CutMix", "CutMixOptions", "boxes", "paste"]


class CutMixOptions(Options):
    """The published settings for CIFAR; on ImageNet every batch is mixed, ``probability = 1``."""

    alpha: float = Field(
        default=1.0, ge=0, description="the share kept of an image follows Beta(alpha, alpha); 0 switches mixing off"
    )
    probability: float = Field(default=0.5, ge=0, le=1, description="share of the batches that are mixed")
    per: Literal["batch", "example"] = Field(
        default="batch", description="one box for the whole batch or one for every image"
    )


class CutMix(Method[CutMixOptions]):
    """Replace a box of every image by the same box of a partner's image, and mix the labels by its true area."""

    name = "cutmix"
    title = "CutMix: boxes pasted from other images"
    source = "Yun et al. 2019, arXiv 1905.04899"
    Options = CutMixOptions

    _generator: torch.Generator | None = None
    _log: MixingLog | None = None

    def attach(self, model: nn.Module, hidden: Sequence[str], seed: int) -> BatchTransform:
        """Boxes are pasted before the network reads the batch."""
        if self.options.alpha == 0 or self.options.probability == 0:
            return super().attach(model, hidden, seed)
        self._generator = torch.Generator().manual_seed(seed)
        self._log = MixingLog("batches" if self.options.per == "batch" else "examples")
        self._log.know(["input"])
        return self._transform

    def _transform(self, x: Tensor, y: Tensor) -> tuple[Tensor, Any]:
        options, generator, log = self.options, self._generator, self._log
        assert generator is not None
        assert log is not None
        height, width = image_size(self.name, x)
        draws = 1 if options.per == "batch" else len(x)
        # always the same number of draws: whether one batch is mixed does not shift the next one's
        mixes = float(torch.rand((), dtype=torch.float64, generator=generator)) < options.probability
        partner = torch.randperm(len(x), generator=generator)
        lam = draw_lam(options.alpha, generator, draws)
        rows = torch.randint(height, (draws,), generator=generator)
        columns = torch.randint(width, (draws,), generator=generator)
        if not mixes:
            log.unmixed += draws
            return x, y
        log.note_rows(["input"] * draws, lam)  # as drawn: the share that boxes leave is a little larger at the edges
        box, lam = boxes(lam, rows, columns, (height, width))
        partner = send(partner, x.device)
        weights = float(lam) if options.per == "batch" else send(lam.float(), y.device)
        return paste(x, partner, box), MixedTarget(y, y[partner.to(y.device)], weights)

    def state_dict(self) -> dict[str, Any]:
        """The generator's state, and what was drawn so far."""
        if self._generator is None or self._log is None:
            return {}
        return {"generator": self._generator.get_state(), "mixing": self._log.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        if self._generator is not None and self._log is not None:
            self._generator.set_state(state["generator"])
            self._log.load_state_dict(state.get("mixing"))

    def facts(self) -> dict[str, Any]:
        """How many batches were mixed and with which λ, the share of an image that was drawn to be kept."""
        return {} if self._log is None else {"mixing": self._log.facts(self.options.alpha)}


def boxes(lam: Tensor, rows: Tensor, columns: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Boxes whose sides are sqrt(1 - λ) of the image's, in whole pixels, as far as they lie inside the image.

    A box has ``floor(height * sqrt(1 - λ))`` rows, of which the centre is number ``floor(height * sqrt(1 - λ)) // 2``;
    columns likewise. (The authors' code makes boxes with an odd number of rows or columns one smaller.)

    Args:
        lam: The share drawn, in [0, 1], ``(m,)``, float64 on the CPU.
        rows: Row of each centre, whole numbers, ``(m,)``.
        columns: Column of each centre.
        size: Height and width of the images.

    Returns:
        Top, bottom, left and right, ``(4, m)``, int64; bottom and right are the first row and column after the box.
        And the share of the image that is kept, 1 minus the true area of the box, ``(m,)``, float64.
    """
    edges = []
    for length, centre in zip(size, (rows, columns), strict=True):
        side = (length * (1.0 - lam).sqrt()).floor().long()
        start = centre - side // 2
        edges += [start.clamp(0, length), (start + side).clamp(0, length)]
    top, bottom, left, right = edges
    area = (bottom - top) * (right - left)
    return torch.stack(edges), 1.0 - area.double() / (size[0] * size[1])


def paste(x: Tensor, partner: Tensor, box: Tensor) -> Tensor:
    """Images with a box from their partners' images.

    Args:
        x: Images, ``(n, channels, height, width)``; they stay as they are.
        partner: Row of each image's partner, ``(n,)``, on the device of ``x``.
        box: Top, bottom, left and right on the CPU, ``(4, 1)`` for one box or ``(4, n)`` for one for each image.

    Returns:
        The shape, dtype and memory format of ``x``.
    """
    if box.shape[1] == 1:
        top, bottom, left, right = box[:, 0].tolist()
        mixed = x.clone()
        mixed[:, :, top:bottom, left:right] = x[:, :, top:bottom, left:right][partner]
        return mixed
    top, bottom, left, right = send(box, x.device)[:, :, None]
    ys, xs = (torch.arange(length, device=x.device) for length in x.shape[2:])
    inside = ((ys >= top) & (ys < bottom))[:, :, None] & ((xs >= left) & (xs < right))[:, None, :]
    return torch.where(inside[:, None], x[partner], x)
