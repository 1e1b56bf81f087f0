"""What is compared, by name: ``make_method("manifold_mixup", {"alpha": 2.0})``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from manifold_mixup.lab.errors import UnknownName
from manifold_mixup.lab.methods.adamixup import AdaMixUp
from manifold_mixup.lab.methods.base import BatchTransform, Method
from manifold_mixup.lab.methods.batch_norm import BatchNorm
from manifold_mixup.lab.methods.blocked_gradient import BlockedGradient
from manifold_mixup.lab.methods.consistency import Consistency
from manifold_mixup.lab.methods.cutmix import CutMix
from manifold_mixup.lab.methods.cutout import Cutout
from manifold_mixup.lab.methods.dropout import Dropout
from manifold_mixup.lab.methods.graphmix import GraphMix
from manifold_mixup.lab.methods.hidden_noise import HiddenNoise
from manifold_mixup.lab.methods.ict import ICT
from manifold_mixup.lab.methods.input_mixup import InputMixup
from manifold_mixup.lab.methods.input_noise import InputNoise
from manifold_mixup.lab.methods.label_smoothing import LabelSmoothing
from manifold_mixup.lab.methods.last_layer_mixup import LastLayerMixup
from manifold_mixup.lab.methods.manifold_mixup import ManifoldMixupMethod
from manifold_mixup.lab.methods.noisy_feature_mixup import NoisyFeatureMixup
from manifold_mixup.lab.methods.none import Plain
from manifold_mixup.lab.methods.weight_decay import WeightDecay

__all__ = ["METHODS", "BatchTransform", "Method", "get_method", "make_method"]

METHODS: dict[str, type[Method[Any]]] = {
    method.name: method
    for method in (
        Plain,
        InputMixup,
        ManifoldMixupMethod,
        BlockedGradient,
        LastLayerMixup,
        NoisyFeatureMixup,
        AdaMixUp,
        CutMix,
        Cutout,
        LabelSmoothing,
        HiddenNoise,
        InputNoise,
        Dropout,
        WeightDecay,
        BatchNorm,
        Consistency,
        ICT,
        GraphMix,
    )
}


def get_method(name: str) -> type[Method[Any]]:
    """The class of a method.

    Raises:
        UnknownName: There is none of this name.
    """
    if name not in METHODS:
        raise UnknownName("method", name, METHODS)
    return METHODS[name]


def make_method(name: str, options: Mapping[str, Any]) -> Method[Any]:
    """A method, ready to be attached to one network.

    Raises:
        UnknownName: There is no such method.
        pydantic.ValidationError: The options are not the method's.
    """
    method = get_method(name)
    return method(method.Options.model_validate(dict(options)))
