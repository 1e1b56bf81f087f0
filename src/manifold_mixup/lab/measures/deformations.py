r"""Accuracy on test images that are rotated, sheared or scaled (Verma et al. 2019, section 5.2, Tables 4 and 9).

A deformation is a 2x2 matrix on (row, column), about the centre of the image. It leads from a pixel of the result to
the place in the original that this pixel shows.

``rotation_A_accuracy``
    ``[[cos a, -sin a], [sin a, cos a]]``, the angle a of every image uniform from -A to A degrees.
``shear_S_accuracy``
    ``[[1, -sin s], [0, cos s]]``, the angle s of every image uniform from -S to S degrees.
``zoom_Z_accuracy``
    ``[[z, 0], [0, z]]``, the same for all images: a centred box of Z % of the image's side fills the result. Below 100
    it zooms in; above, the image shrinks and is padded.

What the paper leaves open, and what is done here:

* The shear is the form of the authors' early code. It is no plain shear, for it also stretches columns by 1 / cos s,
  and mirrors them beyond 90 degrees. The tables' odd angles are 0.5, 1, 2, 2.5 and 3 radians, rounded to 0.1 degrees.
* The paper says that zooming out pads with black. Here every deformation does, by pixels of value 0 before the images
  are normalised. In the one surviving use of the authors' code the value was 0 after normalisation, the mean colour;
  and the centre was size / 2 + 0.5, counted from the middle of the first pixel, one pixel too far down and right. The
  true centre is (size - 1) / 2. The option ``legacy`` does both as they did.
* The interpolation is not stated. The default is that of the code: every pixel of the result is the nearest pixel of
  the original; at equal distance, the lower or right one. With ``bilinear`` pixels are not rounded to whole numbers.
* What lies outside is not stated. A place beyond the middles of the outermost pixels is padding, in both
  interpolations, as in ``scipy.ndimage.affine_transform`` with ``mode="constant"``, which the code called.
* How often each image is deformed is not stated. Here once. The draws of an image depend on its place in the test
  split and on the option ``seed``, not on the run's seed: all networks are shown the same images. One draw serves all
  ranges of a kind, in proportion to their width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from manifold_mixup.lab import streams
from manifold_mixup.lab.measures.base import Measure, Metric, Subject
from manifold_mixup.lab.measures.classification import accuracy
from manifold_mixup.lab.measures.settings import NUMBER, FirstOptions, Numbers, first_of_test, written

__all__ = ["MEASURES", "DeformationsOptions", "deform", "rotation", "shear", "zoom"]

TOLERANCE = 1e-6  # of a pixel: rounding errors must decide neither what is outside nor which of two pixels is nearest

Interpolation = Literal["nearest", "bilinear"]


class DeformationsOptions(FirstOptions):
    """Which deformations; the defaults are the 17 of Table 9."""

    rotation: Numbers = Field(default=[20, 40, 60, 80], description="largest angles in degrees, joined by +, or none")
    shear: Numbers = Field(
        default=[28.6, 57.3, 114.6, 143.2, 171.9], description="largest angles in degrees, joined by +, or none"
    )
    zoom: Numbers = Field(
        default=[20, 40, 60, 80, 120, 140, 160, 180],
        description="sides of the box that fills the result, in % of the image's, joined by +, or none",
    )
    interpolation: Interpolation = Field(default="nearest", description="nearest or bilinear")
    legacy: bool = Field(
        default=False, description="pad with the mean colour and about size / 2 + 0.5, as the authors' code did"
    )
    seed: int = Field(default=0, ge=0, description="of the draws, the same for all networks")


def rotation(degrees: Tensor) -> Tensor:
    """Matrices of rotations, ``(n, 2, 2)``, from angles ``(n,)``."""
    angle = degrees.deg2rad()
    return _matrices(angle.cos(), -angle.sin(), angle.sin(), angle.cos())


def shear(degrees: Tensor) -> Tensor:
    """Matrices of the authors' shears, ``(n, 2, 2)``, from angles ``(n,)``."""
    angle = degrees.deg2rad()
    return _matrices(torch.ones_like(angle), -angle.sin(), torch.zeros_like(angle), angle.cos())


def zoom(percent: Tensor) -> Tensor:
    """Matrices that scale, ``(n, 2, 2)``, from sides of the box in percent, ``(n,)``."""
    nothing = torch.zeros_like(percent)
    return _matrices(percent / 100, nothing, nothing, percent / 100)


def _matrices(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return torch.stack([a, b, c, d], dim=-1).view(-1, 2, 2)


def deform(
    images: Tensor,
    matrices: Tensor,
    *,
    fill: Tensor | float = 0.0,
    centre: tuple[float, float] | None = None,
    interpolation: Interpolation = "nearest",
) -> Tensor:
    """Deform images, each by its own matrix or all by one.

    Args:
        images: ``(n, channels, height, width)``.
        matrices: ``(n, 2, 2)`` or ``(1, 2, 2)``, from places in the result to places in ``images``, on (row, column).
        fill: Value of what lies outside, one or one per channel.
        centre: What stays where it is, as (row, column) from the middle of the first pixel; the true centre if None.
        interpolation: ``"bilinear"`` needs images in floating point.

    Returns:
        Images of the same shape and dtype.
    """
    height, width = images.shape[2:]
    middle = ((height - 1) / 2, (width - 1) / 2) if centre is None else centre
    matrices = matrices.to(images.device, torch.float64)[:, :, :, None, None]
    row = torch.arange(height, dtype=torch.float64, device=images.device)[:, None] - middle[0]
    column = torch.arange(width, dtype=torch.float64, device=images.device) - middle[1]
    rows = matrices[:, 0, 0] * row + matrices[:, 0, 1] * column + middle[0]
    columns = matrices[:, 1, 0] * row + matrices[:, 1, 1] * column + middle[1]
    inside = (rows >= -TOLERANCE) & (rows <= height - 1 + TOLERANCE)
    inside &= (columns >= -TOLERANCE) & (columns <= width - 1 + TOLERANCE)
    rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    if interpolation == "nearest":
        found = _pixels(images, _nearest(rows), _nearest(columns))
    else:
        found = _bilinear(images, rows, columns)
    colour = torch.as_tensor(fill, dtype=images.dtype, device=images.device).view(-1, 1, 1)
    return torch.where(inside[:, None], found, colour)


def _nearest(places: Tensor) -> Tensor:
    return (places + (0.5 + TOLERANCE)).floor().long()


def _bilinear(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    top, left = rows.floor().long(), columns.floor().long()
    bottom, right = (top + 1).clamp(max=images.shape[2] - 1), (left + 1).clamp(max=images.shape[3] - 1)
    down, along = ((p - p.floor()).to(images.dtype)[:, None] for p in (rows, columns))
    upper = _pixels(images, top, left) * (1 - along) + _pixels(images, top, right) * along
    lower = _pixels(images, bottom, left) * (1 - along) + _pixels(images, bottom, right) * along
    return upper * (1 - down) + lower * down


def _pixels(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The pixels at places ``(n or 1, height, width)`` of every channel."""
    places = (rows * images.shape[3] + columns).flatten(1)[:, None]
    return images.flatten(2).gather(2, places.expand(*images.shape[:2], -1)).view_as(images)


def draws(count: int, seed: int, kind: str) -> Tensor:
    """One number per image, uniform from -1 to 1, float64; the first ones do not depend on ``count``."""
    generator = streams.generator(seed, f"measures/deformations/{kind}")
    return 2 * torch.rand(count, dtype=torch.float64, generator=generator) - 1


def requested(options: DeformationsOptions, count: int) -> Iterator[tuple[str, Tensor]]:
    """Names of deformations and their matrices, ``(count, 2, 2)``, or ``(1, 2, 2)`` if all images have the same."""
    makers: dict[str, tuple[list[float], Callable[[Tensor], Tensor]]] = {
        "rotation": (options.rotation, rotation),
        "shear": (options.shear, shear),
    }
    for kind, (widths, make) in makers.items():
        drawn = draws(count, options.seed, kind)
        yield from ((f"{kind}_{written(width)}", make(width * drawn)) for width in widths)
    for percent in options.zoom:
        yield f"zoom_{written(percent)}", zoom(torch.tensor([percent], dtype=torch.float64))


def compute(subject: Subject, options: DeformationsOptions) -> dict[str, float]:
    """Accuracy under each deformation."""
    test = first_of_test(subject, options)
    pixels = subject.info.pixels
    # the mean colour is what normalises to 0, and that is black for images that are read as they are
    fill = torch.tensor(pixels.mean) if options.legacy and pixels is not None else 0.0
    height, width = test.x.shape[2:]
    centre = (height / 2 + 0.5, width / 2 + 0.5) if options.legacy else None
    whole = options.interpolation == "nearest" and not options.legacy  # uint8 pixels stay whole numbers
    found = {}
    for name, matrices in requested(options, len(test)):
        logits = []
        for start in range(0, len(test), subject.batch_size):
            rows = slice(start, start + subject.batch_size)
            images = test.x[rows].to(subject.device)
            if not whole and images.dtype == torch.uint8:
                images = images.float() / 255
            own = matrices if len(matrices) == 1 else matrices[rows]
            images = deform(images, own, fill=fill, centre=centre, interpolation=options.interpolation)
            logits.append(subject.predict(images))
        found[f"{name}_accuracy"] = accuracy(torch.cat(logits), test.y)
    return found


MEASURES: tuple[Measure, ...] = (
    Measure(
        name="deformations",
        title="accuracy on test images that are rotated, sheared or scaled",
        source="Verma et al. 2019, Tables 4 and 9",
        options=DeformationsOptions,
        compute=compute,
        metrics={
            rf"rotation_{NUMBER}_accuracy": Metric(
                r"accuracy, rotation ±\1°", "%", 2, "share of right predictions on images rotated at random, within ±"
            ),
            rf"shear_{NUMBER}_accuracy": Metric(
                r"accuracy, shear ±\1°", "%", 2, "share of right predictions on images sheared at random, within ±"
            ),
            rf"zoom_{NUMBER}_accuracy": Metric(
                r"accuracy, zoom \1 %",
                "%",
                2,
                "share of right predictions on images of which a centred box of this side is shown; above 100, padded",
            ),
        },
        needs=("images",),
    ),
)
