"""The lab's own networks, by the names that they have in recipes."""

from __future__ import annotations

from pydantic import ValidationError

from manifold_mixup.lab.data import DATASETS
from manifold_mixup.lab.errors import UsageError
from manifold_mixup.lab.models import build_model, get_model
from manifold_mixup.lab.networks.base import Network, Request
from manifold_mixup.lab.networks.inputs import Input, examples
from manifold_mixup.lab.parsing import explain

__all__ = ["build"]


def build(request: Request) -> Network:
    """A registered network; without ``--input`` for the first of the lab's data sets that it can read.

    Raises:
        UsageError: Wrong options, or examples that the network cannot read.
    """
    try:
        options = get_model(request.name).options.model_validate(request.options).model_dump()
    except ValidationError as error:
        raise UsageError(f"{request.text!r}: {'; '.join(explain(error, get_model(request.name).options))}") from error
    if request.inputs:
        inputs = request.inputs[0]
        return Network(build_model(request.name, options, inputs.shape, 10), *examples(request.inputs))
    refused: UsageError | None = None
    for dataset in DATASETS.values():
        try:
            model = build_model(request.name, options, dataset.info.shape, len(dataset.info.classes))
        except UsageError as error:
            refused = error
        else:
            return Network(model, *examples((), Input(dataset.info.shape)))
    raise UsageError(f"{refused}; give the shape of one example with --input")
