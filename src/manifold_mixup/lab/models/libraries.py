"""Networks of timm and torchvision as networks of recipes: ``timm:resnet18``, ``torchvision:vit_b_16``.

Weights are drawn anew from torch's global generator, which a run seeds, and never downloaded. The number of classes,
the channels and, where a network has to know it, the size of the images come from the data.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import lru_cache, partial
from typing import Any

import torch
from pydantic import ConfigDict, Field, JsonValue
from torch import Tensor, nn

from manifold_mixup.lab.errors import UnknownName, UsageError
from manifold_mixup.lab.models.base import ModelEntry
from manifold_mixup.lab.models.blocks import image_shape
from manifold_mixup.lab.options import Options

__all__ = ["MODELS", "LibraryOptions"]

WEIGHTS = "a run draws its weights from its seed and never downloads any"
DATA = "the data set says it"
TASK = "a network here returns one logit for each class"
REFUSED = {
    "timm": {
        **dict.fromkeys(("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path"), WEIGHTS),
        **dict.fromkeys(("num_classes", "in_chans", "img_size"), DATA),
        "features_only": TASK,
    },
    "torchvision": {
        **dict.fromkeys(("weights", "weights_backbone", "pretrained", "pretrained_backbone"), WEIGHTS),
        **dict.fromkeys(("num_classes", "image_size", "input_size"), DATA),
    },
}


class LibraryOptions(Options):
    """Which network, and any keyword argument of the library's own constructor."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, JsonValue]

    network: str = Field(
        default="", description="name of the network in the library; every further option is a keyword argument of it"
    )

    def keywords(self) -> dict[str, Any]:
        """The keyword arguments of the library's constructor."""
        return dict(self.__pydantic_extra__)


def build_timm(options: LibraryOptions, shape: tuple[int, ...], classes: int) -> nn.Module:
    """``timm.create_model`` without weights, for images of this shape.

    Networks whose positions or windows are made for one size of images are given the size.

    Raises:
        MissingExtra: timm is not installed.
        UnknownName: It has no such network.
        UsageError: An option is refused or wrong, or the network cannot read such images.
    """
    timm = _library("timm", options)
    label = f"timm:{options.network}"
    channels, height, width = image_shape(label, shape)
    keywords: dict[str, Any] = {"num_classes": classes, "in_chans": channels}
    facts = timm.get_pretrained_cfg(options.network)
    if facts is not None and facts.fixed_input_size:
        keywords["img_size"] = (height, width)
    model = _construct(label, partial(timm.create_model, options.network), keywords | options.keywords())
    _check(label, model, shape, classes)
    return model


def hidden_timm(options: LibraryOptions) -> list[str]:
    """The modules that timm itself takes features from, or else the parts that the network is made of.

    Raises:
        As :func:`build_timm`.
    """
    _library("timm", options)
    return list(_hidden("timm", options.network, json.dumps(options.keywords())))


def build_torchvision(options: LibraryOptions, shape: tuple[int, ...], classes: int) -> nn.Module:
    """``torchvision.models.get_model`` without weights, for images of this shape.

    torchvision's networks read three channels. For grey images the first convolution's kernels are added up over
    their channels, which is the network that sees the grey image in all three.

    Raises:
        MissingExtra: torchvision is not installed.
        UnknownName: It has no such network for classification.
        UsageError: An option is refused or wrong, or the network cannot read such images.
    """
    models = _library("torchvision", options).models
    label = f"torchvision:{options.network}"
    channels, height, width = image_shape(label, shape)
    if channels not in (1, 3):
        raise UsageError(f"model {label!r} reads images of 1 or 3 channels, not {channels}; timm's read any number")
    keywords: dict[str, Any] = {"num_classes": classes}
    if options.network.startswith("vit_"):
        keywords["image_size"] = height
    elif options.network.startswith("maxvit_"):
        keywords["input_size"] = (height, width)
    model = _construct(label, partial(models.get_model, options.network), keywords | options.keywords())
    if getattr(model, "aux_logits", False):
        raise UsageError(f"model {label!r} returns further logits in training: add the option aux_logits=false")
    if channels == 1:
        _read_grey(model)
    _check(label, model, shape, classes)
    return model


def hidden_torchvision(options: LibraryOptions) -> list[str]:
    """The parts that the network is made of.

    Raises:
        As :func:`build_torchvision`.
    """
    _library("torchvision", options)
    return list(_hidden("torchvision", options.network, json.dumps(options.keywords())))


def _library(package: str, options: LibraryOptions) -> Any:
    """Import a library once the network is one of its own and no option is refused."""
    # Here, because the package of networks that the command `layers` looks at imports this one.
    from manifold_mixup.lab.networks.base import require, unknown

    name = options.network
    if not name:
        raise UsageError(f"model {package!r} needs the name of a network: {package}:resnet18, or the option 'network'")
    for option, reason in REFUSED[package].items():
        if option in options.keywords():
            raise UsageError(f"{package}:{name}: leave out the option {option!r}: {reason}")
    library = require(package, "vision")
    if package == "timm":
        known, found = library.list_models(), library.is_model(name)
        listing = "timm.list_models()"
    else:
        known = library.models.list_models(module=library.models)  # of classification alone
        found, listing = name in known, "torchvision.models.list_models(module=torchvision.models)"
    if not found:
        near = get_close_matches(name, known, n=3, cutoff=0.5)
        if near:
            raise UnknownName(f"{package} network", name, near)
        raise unknown(f"{package} network", name, known, listing)
    return library


def _construct(label: str, make: Callable[..., nn.Module], keywords: Mapping[str, Any]) -> nn.Module:
    """Build the network on the default device.

    Raises:
        UsageError: The library refuses the options or the sizes.
    """
    try:
        try:
            return make(**keywords)
        except (NotImplementedError, RuntimeError) as error:
            if "meta" not in str(error) or torch.get_default_device().type != "meta":
                raise
            with torch.device("cpu"):  # torchvision's RegNets, for example, compute their widths with tensors
                return make(**keywords).to("meta")
    except Exception as error:  # a library's own checks raise anything
        raise UsageError(f"model {label!r} cannot be built: {type(error).__name__}: {error}") from error


def _check(label: str, model: nn.Module, shape: tuple[int, ...], classes: int) -> None:
    """Send one empty image through the network, which is the only way to know that it reads images of this size.

    Raises:
        UsageError: It does not, or it returns no logits.
    """
    device = next(model.parameters()).device
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            output = model.eval()(torch.zeros(1, *shape, device=device))
    except Exception as error:
        if device.type == "meta" and isinstance(error, (NotImplementedError, RuntimeError)) and "meta" in str(error):
            return  # a forward that looks at values, of which there are none
        raise UsageError(
            f"model {label!r} cannot read images of shape {shape}: {type(error).__name__}: {error}"
        ) from error
    finally:
        model.train()
    if not isinstance(output, Tensor) or output.shape != (1, classes):
        what = tuple(output.shape[1:]) if isinstance(output, Tensor) else type(output).__name__
        raise UsageError(f"model {label!r} is no classifier: for one image it returns {what}, not {classes} logits")


def _read_grey(model: nn.Module) -> None:
    """Let the first convolution read one channel, in place: three equal channels meet the sum of their kernels."""
    convolution = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    with torch.no_grad():
        convolution.weight = nn.Parameter(convolution.weight.sum(dim=1, keepdim=True))
    convolution.in_channels = 1


@lru_cache(maxsize=64)
def _hidden(package: str, name: str, keywords: str) -> tuple[str, ...]:
    """Names of the hidden layers of a network for the images that it was made for, built without memory."""
    from manifold_mixup.lab.networks.base import require

    library = require(package, "vision")
    make = library.create_model if package == "timm" else library.models.get_model
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = _construct(f"{package}:{name}", partial(make, name), {"num_classes": 2, **json.loads(keywords)})
    modules = {name for name, _ in model.named_modules() if name}
    features: Iterable[Any] = getattr(model, "feature_info", None) or ()
    named = [part["module"] for part in features if part.get("module") in modules]
    return tuple(dict.fromkeys(named)) or tuple(_parts(model))


def _parts(model: nn.Module, prefix: str = "") -> list[str]:
    """Children that have parameters, without the last one, the head; where that leaves one sequence, its children."""
    names = [f"{prefix}{name}" for name, child in model.named_children() if any(True for _ in child.parameters())]
    if not prefix:
        names = names[:-1]
    if len(names) == 1 and isinstance(inner := model.get_submodule(names[0].removeprefix(prefix)), nn.Sequential):
        return _parts(inner, f"{names[0]}.")
    return names


MODELS = (
    ModelEntry(
        name="timm",
        title="a network of timm by name, with fresh weights: timm:resnet18",
        options=LibraryOptions,
        build=build_timm,
        hidden=hidden_timm,
        positional="network",
    ),
    ModelEntry(
        name="torchvision",
        title="a network of torchvision by name, with fresh weights: torchvision:resnet18",
        options=LibraryOptions,
        build=build_torchvision,
        hidden=hidden_torchvision,
        positional="network",
    ),
)
