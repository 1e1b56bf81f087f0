"""Singular values of hidden states, class by class: how flat a class lies (Verma et al. 2019, sections 3.2 and G).

The matrix of a class holds one hidden state per row. Its singular values are taken as it is (un-centred, the form whose
first value dwarfs the others, as in the paper's figures) and after its mean row was subtracted (centred: the spread
within the class alone). Four numbers of each spectrum are averaged over the classes; the same numbers for all classes
in one matrix are the control of the paper's Figure 12.

An evaluation of a run keeps the spectra themselves as arrays in float64, of each spectrum the first 512 values at most:

* ``classes``: the classes that occur, ``(c,)`` int64, and ``examples``: how many of each, ``(c,)`` int64;
* ``by_class`` and ``by_class_centred``: ``(c, m)``, one spectrum per row, NaN where one is shorter than the longest; a
  class of one example has no centred spectrum, its row is NaN;
* ``all`` and ``all_centred``: ``(m,)``, those of all classes in one matrix;
* ``effective_rank`` and ``effective_rank_centred``: ``(c,)``, of the whole spectrum of each class;
* ``layer``: the name of the layer that was measured, as the bytes of UTF-8.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from manifold_mixup.lab.errors import UsageError
from manifold_mixup.lab.measures.base import Measure, Metric, Subject
from manifold_mixup.lab.measures.hidden import StateOptions, labelled_states

__all__ = [
    "KEPT",
    "MEASURES",
    "SpectraOptions",
    "arrays",
    "effective_rank",
    "singular_values",
    "spectra",
    "spectra_arrays",
]

KEPT = 512  # values of each spectrum that are stored

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
    return _numbers(*_decompose(states, y))


@dataclass(frozen=True)
class _Matrix:
    """The spectra of one matrix, un-centred and centred, and the four numbers of each, ``(4,)``."""

    rows: int
    plain: Tensor
    centred: Tensor
    numbers: Tensor
    centred_numbers: Tensor


def _decompose(states: Tensor, y: Tensor) -> tuple[dict[int, _Matrix], _Matrix]:
    """The spectra of each class that occurs, and those of all classes in one matrix."""
    return {label: _matrix(states[y == label]) for label in sorted(set(y.tolist()))}, _matrix(states)


def _matrix(states: Tensor) -> _Matrix:
    plain, centred = singular_values(states), singular_values(states, centred=True)
    # Centring leaves rounding errors of the size that the states had before it.
    least = float(plain[0]) * max(states.shape) * torch.finfo(states.dtype).eps
    return _Matrix(len(states), plain, centred, _summary(plain, least), _summary(centred, least))


def _numbers(by_class: dict[int, _Matrix], every: _Matrix) -> dict[str, float]:
    centred = [matrix.centred_numbers for matrix in by_class.values() if matrix.rows > 1]
    found = {
        **_named("svd_", _mean([matrix.numbers for matrix in by_class.values()])),
        **_named("svd_centred_", _mean(centred)),
        **_named("svd_all_", every.numbers),
        **_named("svd_all_centred_", every.centred_numbers),
    }
    return {**found, "svd_classes": float(len(by_class)), "svd_centred_classes": float(len(centred))}


def spectra_arrays(states: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The spectra of labelled hidden states, as the top of this module says, but for ``layer``.

    Args:
        states: ``(n, features)``, at least one row.
        y: Classes, ``(n,)``.
    """
    return _arrays(*_decompose(states, y))


def _arrays(by_class: dict[int, _Matrix], every: _Matrix) -> dict[str, Tensor]:
    place = list(NUMBERS).index("effective_rank")
    matrices = list(by_class.values())
    unknown = torch.tensor(math.nan, dtype=torch.float64)
    return {
        "classes": torch.tensor(list(by_class)),
        "examples": torch.tensor([matrix.rows for matrix in matrices]),
        "by_class": _padded([matrix.plain for matrix in matrices]),
        "by_class_centred": _padded([m.centred if m.rows > 1 else m.centred * unknown for m in matrices]),
        "all": every.plain[:KEPT],
        "all_centred": every.centred[:KEPT],
        "effective_rank": torch.stack([m.numbers[place] for m in matrices]),
        "effective_rank_centred": torch.stack([m.centred_numbers[place] if m.rows > 1 else unknown for m in matrices]),
    }


def _padded(rows: list[Tensor]) -> Tensor:
    kept = [row[:KEPT] for row in rows]
    return torch.nn.utils.rnn.pad_sequence(kept, batch_first=True, padding_value=math.nan)


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
    return _numbers(*_of_layer(subject, _layer(subject, options), options))


def arrays(subject: Subject, options: SpectraOptions) -> dict[str, Tensor]:
    """The arrays of the same layer, which cost nothing once its numbers were asked for.

    Raises:
        UsageError: No layer is named and the network's hidden layers are not known.
    """
    layer = _layer(subject, options)
    name = torch.tensor(list(layer.encode()), dtype=torch.uint8)
    return {**_arrays(*_of_layer(subject, layer, options)), "layer": name}


def _layer(subject: Subject, options: SpectraOptions) -> str:
    if options.layer is None and not subject.hidden:
        raise UsageError("the network's hidden layers are not known: name one, such as spectra:layer=features")
    return options.layer or subject.hidden[0]


def _of_layer(subject: Subject, layer: str, options: SpectraOptions) -> tuple[dict[int, _Matrix], _Matrix]:
    name = f"spectra of {layer}: {options.model_dump_json()}"
    return subject.once(name, lambda: _decompose(*labelled_states(subject, layer, options)))


MEASURES: tuple[Measure, ...] = (
    Measure(
        name="spectra",
        title="singular values of hidden states, per class and over all classes",
        source="Verma et al. 2019, section 3.2 and appendix G",
        options=SpectraOptions,
        compute=compute,
        arrays=arrays,
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
