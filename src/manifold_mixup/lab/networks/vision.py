"""Networks of timm and torchvision."""

from __future__ import annotations

import inspect

from manifold_mixup.lab.networks.base import Network, Request, refuse_weights, require, unknown
from manifold_mixup.lab.networks.inputs import Input, examples

__all__ = ["build_timm", "build_torchvision"]


def build_timm(request: Request) -> Network:
    """``timm.create_model(name, pretrained=False, **options)``, for images of the size that it was made for.

    Raises:
        LabError: timm is missing, has no such network, or an option asks for weights.
    """
    timm = require("timm", "vision")
    if not timm.is_model(request.name):
        raise unknown("timm network", request.name, timm.list_models(), "timm.list_models()")
    refuse_weights(request, ("pretrained", "checkpoint_path"))
    model = timm.create_model(request.name, pretrained=False, **request.options)
    sizes = {key: value for key, value in request.options.items() if key in ("img_size", "in_chans")}
    channels, *size = timm.data.resolve_data_config(sizes, model=model)["input_size"]
    return Network(model, *examples(request.inputs, Input((sizes.get("in_chans", channels), *size))))


def build_torchvision(request: Request) -> Network:
    """``torchvision.models.get_model(name, weights=None, **options)``, for images or clips of the size of its weights.

    Raises:
        LabError: torchvision is missing, has no such network, or an option asks for weights.
    """
    models = require("torchvision", "vision").models
    if request.name not in (known := models.list_models()):
        raise unknown("torchvision network", request.name, known, "torchvision.models.list_models()")
    # Those of detection and segmentation load their backbone's weights unless told otherwise.
    parameters = inspect.signature(models.get_model_builder(request.name)).parameters
    weights = [parameter for parameter in parameters if parameter.startswith("weights")]
    refuse_weights(request, weights)
    model = models.get_model(request.name, **dict.fromkeys(weights), **request.options)
    crop = getattr(models.get_model_weights(request.name).DEFAULT.transforms(), "crop_size", [224])
    frames = (16,) if request.name in models.list_models(module=models.video) else ()
    return Network(model, *examples(request.inputs, Input((3, *frames, crop[0], crop[-1]))))
