"""The error of a k-nearest-neighbours classifier on hidden states (Verma et al. 2019, section 5.1; it gives no k)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PlainValidator
from torch import Tensor

from manifold_mixup.lab import streams
from manifold_mixup.lab.measures.base import Measure, Metric, Subject
from manifold_mixup.lab.measures.hidden import FEATURES, Reduce, hidden_states, split_of
from manifold_mixup.lab.options import Options

__all__ = ["MEASURES", "Distance", "NeighboursOptions", "knn_errors", "knn_labels"]

CELLS = 2**23  # distances in memory at a time, 64 MiB
TINY = 1e-300  # no state but one of zeros is as short

Distance = Literal["euclidean", "cosine"]


def _counts(value: Any) -> list[int]:
    """One count, a list of them, or ``1+5+20``, the form of the command line."""
    if isinstance(value, str):
        value = [int(part) if part.strip().isdecimal() else part for part in value.split("+")]
    counts = list(value) if isinstance(value, (list, tuple)) else [value]
    if not counts or not all(type(count) is int and count > 0 for count in counts):
        raise ValueError("should be one or more whole numbers above 0, such as [1, 5, 20] or 1+5+20")
    return sorted(set(counts))


class NeighboursOptions(Options):
    """How neighbours are found. The references are training examples, without augmentation."""

    k: Annotated[list[int], PlainValidator(_counts)] = Field(
        default=[1, 5, 20], description="numbers of neighbours, as a list or joined by +"
    )
    layer: str = Field(default=FEATURES, description="a module's name, 'input', 'features' or 'logits'")
    reduce: Reduce = Field(
        default="pool", description="states with positions: pool averages over them, flatten takes them all"
    )
    distance: Distance = Field(default="euclidean", description="euclidean or cosine")
    references: int | None = Field(
        default=None, ge=1, description="training examples to look among, drawn; unset takes all"
    )


def knn_labels(
    references: Tensor, labels: Tensor, queries: Tensor, ks: Sequence[int], distance: Distance = "euclidean"
) -> dict[int, Tensor]:
    """The class of most of the k nearest references, for several k at once.

    Of references at equal distance, as float64 tells, the earlier ones are nearer; of classes with equally many
    neighbours the one of the smallest index wins. Where there are fewer than k references, all of them vote. The cosine
    distance of a state of zeros to any other is 1. No more than 64 MiB of distances are held at a time.

    Args:
        references: Hidden states with known classes, ``(n, features)``, finite.
        labels: Their classes, ``(n,)``.
        queries: Hidden states to classify, ``(m, features)``, finite.
        ks: Numbers of neighbours.
        distance: ``"euclidean"``, or ``"cosine"``: 1 minus the cosine of the angle.

    Returns:
        For every k the classes, ``(m,)``.
    """
    points, queries = references.double(), queries.double()
    # What is the same for all references is left out: the query's own length, and what makes cosines distances.
    if distance == "cosine":
        points, queries = F.normalize(points, eps=TINY), F.normalize(queries, eps=TINY)
        lengths = torch.zeros(len(points), dtype=torch.float64)
    else:
        # Distances do not depend on the origin; one among the states leaves the most digits for their differences.
        points, queries = points - points[0], queries - points[0]
        lengths = points.square().sum(dim=1)
    classes = int(labels.max()) + 1
    most = min(max(ks), len(points))
    found: dict[int, list[Tensor]] = {k: [] for k in ks}
    for rows in torch.split(queries, max(1, CELLS // len(points))):
        votes = labels[_nearest(torch.addmm(lengths, rows, points.T, alpha=-2), most, ks)]
        for k, chosen in found.items():
            first = votes[:, :k]
            count = torch.zeros(len(rows), classes, dtype=torch.long)
            chosen.append(count.scatter_add_(1, first, torch.ones_like(first)).argmax(dim=1))
    return {k: torch.cat(chosen) for k, chosen in found.items()}


def _nearest(distances: Tensor, most: int, ks: Sequence[int]) -> Tensor:
    """Indices of the ``most`` smallest of each row; the first k are the k nearest, for every k of ``ks``."""
    total = distances.shape[1]
    values, indices = distances.topk(min(most + 1, total), largest=False)
    tied = torch.zeros(len(distances), dtype=torch.bool)
    for k in ks:
        if k < total:  # which k are nearest is open if the next one is as near
            tied |= values[:, k - 1] == values[:, k]
    indices = indices[:, :most]
    if tied.any():
        indices[tied] = distances[tied].sort(dim=1, stable=True).indices[:, :most]
    return indices


def knn_errors(
    references: Tensor,
    labels: Tensor,
    queries: Tensor,
    y: Tensor,
    ks: Sequence[int],
    distance: Distance = "euclidean",
) -> dict[int, float]:
    """Share of wrong classes among ``queries`` in percent, for every k; NaN if a state is not finite.

    Args:
        references: See :func:`knn_labels`.
        labels: Their classes.
        queries: Hidden states to classify, ``(m, features)``.
        y: Their true classes, ``(m,)``.
        ks: Numbers of neighbours.
        distance: See :func:`knn_labels`.
    """
    if not (references.isfinite().all() and queries.isfinite().all()):
        return dict.fromkeys(ks, math.nan)
    guesses = knn_labels(references, labels, queries, ks, distance)
    return {k: 100 * (guess != y).double().mean().item() for k, guess in guesses.items()}


def compute(subject: Subject, options: NeighboursOptions) -> dict[str, float]:
    """Test errors for every k, and the one of the k with the least validation error (of equal ones the smallest k).

    The latter, ``knn_error`` with its ``knn_k``, is there if there is a validation split.
    """

    def states(x: Tensor) -> Tensor:
        return hidden_states(subject, x, [options.layer], reduce=options.reduce)[options.layer]

    train, test = split_of(subject, "train"), split_of(subject, "test")
    x, labels = train.x, train.y
    if options.references is not None and options.references < len(train):
        drawn = torch.randperm(len(train), generator=streams.generator(subject.seed, "measures/neighbours"))
        rows = drawn[: options.references].sort().values
        x, labels = x[rows], labels[rows]
    references = states(x)
    errors = knn_errors(references, labels, states(test.x), test.y, options.k, options.distance)
    found = {f"knn_error_{k}": error for k, error in errors.items()}
    validation = subject.parts.get("validation")
    if validation is not None and len(validation) > 0:
        scores = knn_errors(references, labels, states(validation.x), validation.y, options.k, options.distance)
        chosen = min(scores, key=lambda k: (scores[k], k))
        unknown = math.isnan(scores[chosen])
        found |= {
            "knn_error": math.nan if unknown else errors[chosen],
            "knn_k": math.nan if unknown else float(chosen),
        }
    return found


MEASURES: tuple[Measure, ...] = (
    Measure(
        name="knn",
        title="error of k nearest neighbours on hidden states",
        source="Verma et al. 2019, section 5.1",
        options=NeighboursOptions,
        compute=compute,
        metrics={
            r"knn_error_(\d+)": Metric(
                r"k-NN error, k = \1",
                "%",
                2,
                "share of test examples whose nearest training examples, by their hidden states, are mostly of a wrong "
                "class",
            ),
            "knn_error": Metric("k-NN error", "%", 2, "the same with the k that has the least validation error"),
            "knn_k": Metric("k chosen", "", 0, "number of neighbours with the least validation error"),
        },
        needs=("train",),
    ),
)
