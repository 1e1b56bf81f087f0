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
    """A registered network; without ``--input`` for what it was made for, or else the first data set that it can read.

    Data sets whose shape only the data themselves can say, such as folders of images, are passed over.

    Raises:
        UsageError: Wrong options, or examples that the network cannot read.
    """
    try:
        options = get_model(request.name).options.model_validate(request.options).model_dump()
    except ValidationError as error:
        raise UsageError(f"{request.text!r}: {'; '.join(explain(error, get_model(request.name).options))}") from error
    made_for = get_model(request.name).example
    if request.inputs or made_for:
        shape = request.inputs[0].shape if request.inputs else made_for
        assert shape is not None
        return Network(build_model(request.name, options, shape, 10), *examples(request.inputs, Input(shape)))
    refused: UsageError | None = None
    for info in (dataset.info for dataset in DATASETS.values()):
        if not info.shape or not info.classes:
            continue
        try:
            model = build_model(request.name, options, info.shape, len(info.classes))
        except UsageError as error:
            refused = error
        else:
            return Network(model, *examples((), Input(info.shape)))
    raise UsageError(f"{refused}; give the shape of one example with --input")
