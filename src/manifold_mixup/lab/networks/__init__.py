"""Networks by name, with random weights and two examples to try them on: ``build_network("timm:resnet50")``.

A name reads ``timm:NAME``, ``torchvision:NAME``, ``hf:CLASS`` (Hugging Face transformers), ``FILE.py:FACTORY``, or is
one of the lab's own. Options follow as in recipes: ``timm:resnet50:num_classes=10``. No weights are ever downloaded:
they are drawn at random, and where a network may be mixed does not depend on them.
"""

from __future__ import annotations

import contextlib
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path

import torch

from manifold_mixup.errors import ManifoldMixupError
from manifold_mixup.lab.errors import UsageError
from manifold_mixup.lab.models import MODELS
from manifold_mixup.lab.networks import files, huggingface, own, vision
from manifold_mixup.lab.networks.base import Network, Request
from manifold_mixup.lab.networks.inputs import parse_input
from manifold_mixup.lab.networks.survey import Refusal, Survey, survey
from manifold_mixup.lab.recipe import parse_component
from manifold_mixup.validation import unwrap

__all__ = ["Network", "Refusal", "Survey", "build_network", "survey"]

Builder = Callable[[Request], Network]

SOURCES: dict[str, Builder] = {
    "timm": vision.build_timm,
    "torchvision": vision.build_torchvision,
    "hf": huggingface.build,
}
# the others are libraries', as above, or read a graph, of which there is none here
OWN = [name for name, entry in MODELS.items() if entry.positional is None and not entry.graph]
LARGEST = 1_000_000_000  # parameters: 4 GB


def build_network(
    text: str, inputs: Sequence[str] = (), dtype: str | None = None, config: Path | None = None, *, meta: bool = False
) -> Network:
    """Build a network and two examples for it; torch's global random state is left as it was.

    Args:
        text: The name, as above.
        inputs: ``3,224,224`` for each positional input (the shape of one example), ``NAME=128`` for one by keyword,
            ``128:int`` with the kind of its numbers. Without any: what the source says that the network reads.
        dtype: The kind of the numbers where an input does not say it: "float", "int" or "bool".
        config: A saved configuration, for ``hf:CLASS``.
        meta: Build weights and examples on PyTorch's meta device, where they take no memory.

    Raises:
        LabError: The name, an option or an input cannot be understood, a package is missing, or building it failed.
        UnsupportedModel: It cannot be mixed whatever it computes.
    """
    build, name, options = _source(text)
    if config is not None and build is not huggingface.build:
        raise UsageError(f"--config is for hf:CLASS, not for {text!r}")
    request = Request(text, name, options, tuple(parse_input(given, dtype) for given in inputs), config)
    with _aside(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if meta:
            network = _build_on_meta(build, request)
        else:
            if build is not files.build:
                _refuse_large(build, request)
            network = _build(build, request)
    return Network(unwrap(network.model), network.args, network.kwargs)


def _source(text: str) -> tuple[Builder, str, dict[str, object]]:
    """Who builds it, the name to look up there, and its options."""
    if file := re.match(r"(.+?\.py)(?::|$)(.*)", text):
        if not file[2]:
            raise UsageError(f"NETWORK {text!r} should name what makes the network: {text.rstrip(':')}:FACTORY")
        part = parse_component(file[2], "NETWORK")
        return files.build, f"{file[1]}:{part['name']}", part["options"]
    source, _, rest = text.partition(":")
    if source in SOURCES and rest:
        part = parse_component(rest, "NETWORK")
        return SOURCES[source], part["name"], part["options"]
    if source in OWN:
        part = parse_component(text, "NETWORK")
        return own.build, part["name"], part["options"]
    forms = "timm:NAME, torchvision:NAME, hf:CLASS, FILE.py:FACTORY or the name of one of the lab's own"
    near = get_close_matches(source, [*SOURCES, *OWN], n=1, cutoff=0.7)
    hint = f"did you mean {near[0]!r}?" if near else f"a network of timm, for example, is timm:{text.split(':')[-1]}"
    raise UsageError(f"unknown network {text!r}: it should read {forms} ({', '.join(OWN)}); {hint}")


@contextlib.contextmanager
def _aside() -> Iterator[None]:
    """What others print goes to stderr, since stdout is for the result; their warnings go nowhere."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        yield


def _build(build: Builder, request: Request) -> Network:
    try:
        return build(request)
    except ManifoldMixupError:
        raise
    except Exception as error:
        raise UsageError(f"{request.text!r} cannot be built: {type(error).__name__}: {error}") from error


def _build_on_meta(build: Builder, request: Request) -> Network:
    with torch.device("meta"):
        return _build(build, request)


def _refuse_large(build: Builder, request: Request) -> None:
    """Count the parameters before memory is taken for them.

    Raises:
        UsageError: They are too many.
    """
    try:
        network = _build_on_meta(build, request)
    except ManifoldMixupError:
        return  # the real attempt says what is wrong, if anything is
    count = sum(parameter.numel() for parameter in network.model.parameters())
    if count > LARGEST:
        raise UsageError(
            f"{request.text!r} has {count / 1e9:.1f} billion parameters: make it smaller by its options, or add "
            "--meta, which takes no memory for them (but cannot follow masks, whose values it would need)"
        )
