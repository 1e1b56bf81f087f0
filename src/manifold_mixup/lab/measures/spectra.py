"""Singular values of hidden states, class by class: how flat a class lies (Verma et al. 2019, sections 3.2 and G).

The matrix of a class holds one hidden state per row. Its singular values are taken as it is (un-centred, the form whose
first value dwarfs the others, as in the paper's figures) and after its mean row was subtracted (centred: the spread
within the class alone). Four numbers of each spectrum are averaged over the classes; the same numbers for all classes
in one matrix are the control of the paper's Figure 12.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from manifold_mixup.lab.errors import UsageError
from manifold_mixup.lab.measures.base import Measure, Metric, Subject
from manifold_mixup.lab.measures.hidden import StateOptions, labelled_states

__all__ = ["MEASURES", "SpectraOptions", "effective_rank", "singular_values", "spectra"]

NUMBERS = {
    "largest": Metric("largest singular value", "", 2, "the largest singular value of the hidden states"),
    "rest": Metric("other singular values", "", 2, "sum of all singular values of the hidden states but the largest"),
    "effective_rank": Metric(
        "effective rank", "", 2, "exponential of the entropy of the singular values: how many directions are used"
    ),
    "rank": Metric("numerical rank", "", 1, "singular values above what rounding of the hidden states leaves"),
}
MATRICES = {
    "": "by class",
    "centred_": "by class, centred",
    "all_": "all classes",
    "all_centred_": "all classes, centred",
}


class SpectraOptions(StateOptions):
    """The paper says neither which split nor how many examples; singular values grow with the number of examples."""

    layer: str | None = Field(
        default=None, description="a module's name, 'input', 'features' or 'logits'; unset takes the first hidden layer"
    )


def singular_values(states: Tensor, *, centred: bool = False) -> Tensor:
    """Singular values of a matrix of hidden states, largest first.

    Args:
        states: ``(n, features)``, at least one row.
        centred: Whether the mean row is subtracted first.

    Returns:
        ``(min(n, features),)`` in float64; all NaN if a state is not finite.
    """
    if not states.isfinite().all():
        return torch.full((min(states.shape),), math.nan, dtype=torch.float64)
    matrix = states.double()
    if centred:
        matrix = matrix - matrix.mean(dim=0)
    values: Tensor = torch.linalg.svdvals(matrix)
    return values


def effective_rank(values: Tensor) -> float:
    """How many directions a spectrum uses (Roy and Vetterli 2007, "The effective rank", definition 1).

    The exponential of the entropy of the singular values divided by their sum: 1 if one direction has it all, r for r
    equal ones.

    Args:
        values: Singular values, ``(m,)``.

    Returns:
        From 1 to m; 0 for a matrix of zeros, NaN if a value is.
    """
    total = values.sum()
    return 0.0 if total == 0 else float(torch.special.entr(values / total).sum().exp())


def spectra(states: Tensor, y: Tensor) -> dict[str, float]:
    """The numbers of the spectra of labelled hidden states.

    Args:
        states: ``(n, features)``, at least one row.
        y: Classes, ``(n,)``.

    Returns:
        ``largest``, ``rest``, ``effective_rank`` and ``rank`` under the prefixes ``svd_``, ``svd_centred_``,
        ``svd_all_`` and ``svd_all_centred_``. ``svd_classes`` is how many classes the averages of ``svd_`` are over;
        those of ``svd_centred_`` leave out classes of one example, which have no spread, and are over
        ``svd_centred_classes``. An average over no class, or one that a state which is not finite enters, is NaN.
        ``rank`` counts values above max(n, features) times float32's (the states' own) precision times the largest
        un-centred value, numpy's rule; a spectrum with none above is one of zeros, of effective rank 0.
    """
    plain, centred = [], []
    for label in sorted(set(y.tolist())):
        rows = states[y == label]
        pair = _numbers(rows)
        plain.append(pair[0])
        centred += [pair[1]] if len(rows) > 1 else []
    every, every_centred = _numbers(states)
    found = {
        **_named("svd_", _mean(plain)),
        **_named("svd_centred_", _mean(centred)),
        **_named("svd_all_", every),
        **_named("svd_all_centred_", every_centred),
    }
    return {**found, "svd_classes": float(len(plain)), "svd_centred_classes": float(len(centred))}


def _numbers(states: Tensor) -> tuple[Tensor, Tensor]:
    """The four numbers of the un-centred and of the centred spectrum, ``(4,)`` each."""
    plain, centred = singular_values(states), singular_values(states, centred=True)
    # Centring leaves rounding errors of the size that the states had before it.
    least = float(plain[0]) * max(states.shape) * torch.finfo(states.dtype).eps
    return _summary(plain, least), _summary(centred, least)


def _summary(values: Tensor, least: float) -> Tensor:
    if values.isnan().any():
        return torch.full((len(NUMBERS),), math.nan, dtype=torch.float64)
    rank = float((values > least).sum())
    used = effective_rank(values) if rank else 0.0
    return torch.tensor([float(values[0]), float(values[1:].sum()), used, rank], dtype=torch.float64)


def _mean(rows: list[Tensor]) -> Tensor:
    return torch.stack(rows).mean(dim=0) if rows else torch.full((len(NUMBERS),), math.nan, dtype=torch.float64)


def _named(prefix: str, values: Tensor) -> dict[str, float]:
    return {f"{prefix}{name}": value for name, value in zip(NUMBERS, values.tolist(), strict=True)}


def compute(subject: Subject, options: SpectraOptions) -> dict[str, float]:
    """The spectra of one layer.

    Raises:
        UsageError: No layer is named and the network's hidden layers are not known.
    """
    if options.layer is None and not subject.hidden:
        raise UsageError("the network's hidden layers are not known: name one, such as spectra:layer=features")
    return spectra(*labelled_states(subject, options.layer or subject.hidden[0], options))


MEASURES: tuple[Measure, ...] = (
    Measure(
        name="spectra",
        title="singular values of hidden states, per class and over all classes",
        source="Verma et al. 2019, section 3.2 and appendix G",
        options=SpectraOptions,
        compute=compute,
        metrics={
            **{
                f"svd_{prefix}{name}": Metric(f"{metric.title}, {matrix}", metric.unit, metric.digits, metric.meaning)
                for prefix, matrix in MATRICES.items()
                for name, metric in NUMBERS.items()
            },
            "svd_classes": Metric("classes", "", 0, "classes that the averages over classes are over"),
            "svd_centred_classes": Metric("classes, centred", "", 0, "classes of two or more examples"),
        },
    ),
)
