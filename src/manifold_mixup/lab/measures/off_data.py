"""How sure a network is away from the data (what the paper's Figures 1 and 2 show on the plane, for any data).

Inputs of several kinds that are no examples of any class are shown to the network, and for each kind two numbers are
taken: the share whose top probability is below a threshold, and the mean top probability. Test examples give the two
numbers to compare with.

``uniform``
    Every pixel uniform from 0 to 255; examples that are no images are uniform in the box that just holds the data, made
    ``box`` times as wide about its middle.
``gaussian``
    Every pixel normal with the mean and standard deviation of its channel, cut to 0 to 255 and rounded; examples that
    are no images have the mean and standard deviation of each number.
``shuffled``
    Test images whose pixels change places, in another way for each image and in the same for its channels.
``midpoints``
    The mean of two test examples of different classes; the second is drawn from all examples of the other classes.

Box, means and standard deviations are those of the training examples, or of the test examples where there are no
training examples.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from manifold_mixup.lab import streams
from manifold_mixup.lab.data.base import Examples
from manifold_mixup.lab.measures.base import Measure, Metric, Subject
from manifold_mixup.lab.measures.hidden import split_of
from manifold_mixup.lab.options import Options

__all__ = ["MEASURES", "OffDataOptions", "gaussian", "midpoints", "shuffled", "uniform"]

CHUNK = 1000  # examples that are converted at a time


class OffDataOptions(Options):
    """How many inputs, and what counts as sure."""

    examples: int = Field(default=1000, ge=1, description="inputs of each kind, or as many as there are test examples")
    threshold: float = Field(default=0.9, gt=0, le=1, description="top probability below which the network is not sure")
    box: float = Field(
        default=1.0, gt=0, description="uniform: width in boxes around the data; images always take all pixel values"
    )


def uniform(like: Tensor, count: int, box: float, generator: torch.Generator) -> Tensor:
    """Inputs without any structure: see the top of this module.

    Args:
        like: Examples, ``(n, *shape)``: uint8 images, or floating point.
        count: How many inputs.
        box: Factor on the width; uint8 images do without.
        generator: Where they come from.

    Returns:
        ``(count, *shape)`` of the same dtype.
    """
    shape = (count, *like.shape[1:])
    if like.dtype == torch.uint8:
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    low, high = like.amin(dim=0), like.amax(dim=0)
    middle, width = (low + high) / 2, (high - low) * box
    inputs: Tensor = middle + (torch.rand(shape, generator=generator, dtype=like.dtype) - 0.5) * width
    return inputs


def gaussian(like: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Inputs with the data's means and standard deviations: of channels if uint8 images, else of single numbers.

    Args:
        like: Examples, ``(n, *shape)``: uint8 images, or floating point.
        count: How many inputs.
        generator: Where they come from.

    Returns:
        ``(count, *shape)`` of the same dtype.
    """
    images = like.dtype == torch.uint8
    dims = (0, *range(2, like.ndim)) if images else (0,)
    numbers = math.prod(like.shape[d] for d in dims)
    chunks = torch.split(like, CHUNK)
    mean = torch.stack([c.double().sum(dim=dims, keepdim=True) for c in chunks]).sum(dim=0) / numbers
    squares = torch.stack([(c.double() - mean).square().sum(dim=dims, keepdim=True) for c in chunks])
    sd = (squares.sum(dim=0) / numbers).sqrt()
    noise: Tensor = torch.randn((count, *like.shape[1:]), generator=generator, dtype=torch.float64) * sd + mean
    return noise.clamp(0, 255).round().to(torch.uint8) if images else noise.to(like.dtype)


def shuffled(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images ``(n, channels, height, width)`` whose pixels change places, each image in its own way."""
    flat = images.flatten(2)
    places = torch.rand(len(flat), 1, flat.shape[2], generator=generator, dtype=torch.float64).argsort(dim=2)
    moved: Tensor = flat.gather(2, places.expand_as(flat)).view_as(images)
    return moved


def midpoints(x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    """Means of every example with one of another class, drawn uniformly from all of those.

    Args:
        x: Examples, ``(n, *shape)``.
        y: Their classes, ``(n,)``.
        generator: Where the partners come from.

    Returns:
        ``(n, *shape)`` in floating point, uint8 images from 0 to 1; no row if all examples are of one class.
    """
    order = y.argsort(stable=True)
    x, y = x[order], y[order]
    sizes = torch.bincount(y)
    others = len(y) - sizes[y]
    if not others.any():
        return x[:0].float()
    # In a circle that is sorted by class, all others are in the stretch that begins where the own class ends.
    step = (torch.rand(len(y), generator=generator, dtype=torch.float64) * others).long()
    partner = (sizes.cumsum(0)[y] + step) % len(y)
    scale = 510.0 if x.dtype == torch.uint8 else 2.0
    dtype = torch.float32 if x.dtype == torch.uint8 else x.dtype
    return (x.to(dtype) + x[partner].to(dtype)) / scale


def confidence(subject: Subject, x: Tensor, threshold: float) -> tuple[float, float]:
    """Share of inputs with a top probability below ``threshold``, and the mean top probability, both in percent.

    NaN if there are no inputs, or if a probability is not a number.
    """
    if len(x) == 0:
        return math.nan, math.nan
    top = subject.predict(x).softmax(dim=1).amax(dim=1)
    if top.isnan().any():
        return math.nan, math.nan
    return 100 * (top < threshold).double().mean().item(), 100 * top.mean().item()


def compute(subject: Subject, options: OffDataOptions) -> dict[str, float]:
    """Both numbers for every kind of input and for test examples."""
    test = split_of(subject, "test")
    train = subject.parts.get("train")
    like = test.x if train is None or len(train) == 0 else train.x

    def stream(kind: str) -> torch.Generator:
        return streams.generator(subject.seed, f"measures/off_data/{kind}")

    rows = torch.randperm(len(test), generator=stream("test"))[: options.examples]
    drawn = Examples(test.x[rows], test.y[rows])
    inputs = {
        "test": drawn.x,
        "uniform": uniform(like, options.examples, options.box, stream("uniform")),
        "gaussian": gaussian(like, options.examples, stream("gaussian")),
        "midpoints": midpoints(drawn.x, drawn.y, stream("midpoints")),
    }
    if drawn.x.ndim == 4:
        inputs["shuffled"] = shuffled(drawn.x, stream("shuffled"))
    found = {}
    for kind, x in inputs.items():
        found[f"off_{kind}_unsure"], found[f"off_{kind}_confidence"] = confidence(subject, x, options.threshold)
    return found


KINDS = {
    "test": "test examples",
    "uniform": "uniform noise",
    "gaussian": "Gaussian noise",
    "midpoints": "midpoints",
    "shuffled": "shuffled pixels",
}

MEASURES: tuple[Measure, ...] = (
    Measure(
        name="off_data",
        title="confidence away from the data: noise, shuffled images, midpoints between classes",
        source="Verma et al. 2019, Figures 1 and 2, carried over to any data",
        options=OffDataOptions,
        compute=compute,
        metrics={
            **{
                f"off_{kind}_unsure": Metric(
                    f"low confidence, {words}", "%", 1, "share of inputs whose top probability is below 0.9, unless set"
                )
                for kind, words in KINDS.items()
            },
            **{
                f"off_{kind}_confidence": Metric(f"confidence, {words}", "%", 1, "mean of the top probability")
                for kind, words in KINDS.items()
            },
        },
    ),
)
