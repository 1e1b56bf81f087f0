"""One small network of every family of timm, and what is measured on it.

The checks share nothing with the library but its public face: calls of modules are found with plain hooks, and what
they return is walked through with ``torch.utils._pytree``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import random
import statistics
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from family_table import FAMILIES
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from manifold_mixup import CutPoint, ManifoldMixup, cut_points
from manifold_mixup.errors import LayerNotReached, NotACutPoint

CLASSES = 10
ROWS = 5
PARTNER = torch.tensor([2, 4, 3, 0, 1])  # nobody keeps its place
EXACT = 1e-8  # relative; float64
TRIED = 6  # calls of a network that are listed as cut points, and as many that are not
TIMED_ROWS, ROUNDS = 32, 3


class Call(NamedTuple):
    """One call of a module: the module's name, and the how-manieth call of it in a forward."""

    name: str
    number: int

    @property
    def key(self) -> str:
        """As the library writes it."""
        return self.name if self.number == 1 else f"{self.name}#{self.number}"


@dataclass(frozen=True)
class Forced:
    """A call that was mixed by a plain hook, and what came of it."""

    key: str
    listed: bool  # by discovery
    verdict: str  # "cut" (the output is that of the partners), "unused" (the output is the same) or "bypassed"
    error: float  # distance of the output from that of the partners

    @property
    def wrong(self) -> bool:
        """Whether discovery says something else."""
        return self.listed != (self.verdict == "cut")


def build(family: str) -> tuple[nn.Module, Tensor]:
    """The network of a family with timm's own initialisation, in eval mode, and a batch for the clock."""
    import timm

    network = FAMILIES[family]
    torch.manual_seed(0)
    model = timm.create_model(network.model, num_classes=CLASSES, **network.options).eval()
    return model, torch.randn(TIMED_ROWS, 3, network.size, network.size)


# ---------------------------------------------------------------- a network in which every branch speaks


@torch.no_grad()
def randomise(model: nn.Module, x: Tensor) -> nn.Module:
    """Draw parameters and statistics so that nothing is zero, constant or out of scale; float64; root in training.

    Weights of linear and convolutional layers are normal with variance 1 / fan-in. What is constant at the start
    (scales, layer scales, gates, zero-initialised norms) becomes uniform on [0.5, 1.5], biases become normal. The
    statistics of batch norms are those of a batch, which keeps activations in scale.

    The mixer mixes where the root is in training. Its parts are in eval mode: no dropout, no batch statistics.
    """
    generator = torch.Generator().manual_seed(1)
    model.double()
    weights = {
        id(m.weight)
        for m in model.modules()
        if isinstance(getattr(m, "weight", None), nn.Parameter)
        and (isinstance(m, nn.Linear) or type(m).__name__.startswith("Conv"))
    }
    for name, parameter in model.named_parameters():
        if id(parameter) in weights:
            parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
        elif name.endswith("bias"):
            parameter.normal_(0.0, 0.1, generator=generator)
        elif parameter.numel() == 1 or float(parameter.std()) < 1e-3:
            parameter.uniform_(0.5, 1.5, generator=generator)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    model(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()
    model.training = True
    if hasattr(model, "drop_rate"):  # some call F.dropout themselves
        model.drop_rate = 0.0
    return model


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest entry of ``b``."""
    return float((a - b).abs().max() / b.abs().max())


# ---------------------------------------------------------------- what is checked


@contextlib.contextmanager
def all_in_float64() -> Iterator[None]:
    """Some norms compute in float32 whatever they are given: here ``tensor.float()`` leaves float64 as it is."""
    with mock.patch.object(Tensor, "float", lambda t: t.double()):
        yield


def exactness(model: nn.Module, x: Tensor, layers: list[str]) -> float:
    """The largest relative distance, over all layers of S, of the output at λ = 0 from that of the permuted batch.

    Raises:
        AssertionError: the output at λ = 0.3 is one of the two that it lies between, or rows of the output are alike
            to begin with (then nothing would be shown).
    """
    y = torch.zeros(len(x))
    with torch.no_grad():
        plain, permuted = model(x), model(x[PARTNER])
    assert distance(plain, permuted) > 1e-3, "rows of the output are alike, so that exactness shows nothing"
    assert distance(plain[PARTNER], permuted) < EXACT, "the network is random, or mixes rows by itself"
    worst = 0.0
    mixup = ManifoldMixup(model, layers=layers, pairing=lambda y, generator: PARTNER, seed=0)

    def forward(layer: str, lam: float) -> Tensor:
        with mock.patch("manifold_mixup.mixup.draw_lam", return_value=torch.tensor(lam)), torch.no_grad():
            while True:  # the layer is drawn: until it is this one
                inputs, _ = mixup(x, y)
                assert mixup.last is not None
                if mixup.last.layer == layer:
                    return model(inputs)

    try:
        for layer in layers:
            worst = max(worst, distance(forward(layer, 0.0), permuted))
            between = forward(layer, 0.3)
            assert min(distance(between, plain), distance(between, permuted)) > 1e-6, f"λ = 0.3 mixes nothing: {layer}"
    finally:
        mixup.remove()
    return worst


def per_example_calls(model: nn.Module, x: Tensor) -> list[Call]:
    """All calls inside the model that return a floating tensor whose dimension 0 is the batch."""
    found: list[Call] = []
    counts: Counter[str] = Counter()

    def hook(name: str) -> Callable[..., None]:
        def seen(module: nn.Module, args: Any, output: Any) -> None:
            counts[name] += 1
            if any(_has_rows(leaf, len(x)) for leaf in tree_leaves(output)):
                found.append(Call(name, counts[name]))

        return seen

    handles = [m.register_forward_hook(hook(name)) for name, m in model.named_modules() if name]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return found


def swapped(model: nn.Module, x: Tensor, call: Call) -> Tensor:
    """The output where what one call of a module returned is replaced by that of the partners, with a plain hook."""
    count = 0

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        nonlocal count
        count += 1
        if count != call.number:
            return None
        return tree_map(lambda leaf: leaf[PARTNER] if _has_rows(leaf, len(x)) else leaf, output)

    handle = model.get_submodule(call.name).register_forward_hook(hook)
    try:
        with torch.no_grad():
            output = model(x)
    finally:
        handle.remove()
    assert isinstance(output, Tensor)
    return output


def forced(model: nn.Module, x: Tensor, points: list[CutPoint], seed: str) -> list[Forced]:
    """Mix at calls picked at random, some that discovery listed and some that it did not, and say what comes out."""
    listed = {point.name for point in points}
    calls = per_example_calls(model, x)
    dice = random.Random(seed)
    with torch.no_grad():
        plain = model(x)
    found = []
    for kind in (True, False):
        candidates = [call for call in calls if (call.key in listed) == kind]
        for call in dice.sample(candidates, min(TRIED, len(candidates))):
            output = swapped(model, x, call)
            error = distance(output, plain[PARTNER])
            verdict = "cut" if error < EXACT else "unused" if distance(output, plain) < 1e-12 else "bypassed"
            found.append(Forced(call.key, kind, verdict, error))
    return found


def _has_rows(leaf: Any, rows: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.shape[:1] == (rows,)


def times(model: nn.Module, x: Tensor) -> tuple[float, float]:
    """Medians, in seconds of this process, of a plain forward and of discovery, taking turns."""
    plain, discovery = [], []
    for _ in range(ROUNDS + 1):
        start = time.process_time()
        with torch.no_grad():
            model(x)
        middle = time.process_time()
        cut_points(model, x)
        plain.append(middle - start)
        discovery.append(time.process_time() - middle)
    return statistics.median(plain[1:]), statistics.median(discovery[1:])


def why_no_inner_point(model: nn.Module, x: Tensor, points: list[CutPoint]) -> str:
    """What the library says of the largest child that is no cut point, where S holds no inner layer."""
    listed = {point.name for point in points}
    children = [(name, m) for name, m in model.named_modules() if name.count(".") <= 1 and name and name not in listed]
    for name, _ in sorted(children, key=lambda c: -sum(p.numel() for p in c[1].parameters())):
        try:
            ManifoldMixup(model, layers=[name]).discover(x)
        except NotACutPoint as error:
            return str(error).split(" Mixing there")[0]
        except LayerNotReached:  # a list of modules, which nobody calls
            continue
    return "every call inside is a cut point, but none has a hundredth of the compute of its own"


# ---------------------------------------------------------------- all of it


def examine(family: str, *, clock: bool) -> dict[str, Any]:
    """The record of one family. Whatever is wrong with it is in ``failure``, which is None where nothing is."""
    network = FAMILIES[family]
    record: dict[str, Any] = {
        "family": family,
        "network": network.model,
        "options": network.options,
        "input": [3, network.size, network.size],
        "failure": None,
    }
    try:
        _examine(family, record, clock)
    except Exception:
        record["failure"] = traceback.format_exc(limit=-4)
    gc.collect()
    return record


def _examine(family: str, record: dict[str, Any], clock: bool) -> None:
    model, batch = build(family)
    record["parameters"] = sum(p.numel() for p in model.parameters())
    if clock:
        record["forward_s"], record["discovery_s"] = times(model, batch)
    with all_in_float64():
        _check(family, record, randomise(model, batch[:ROWS].double()), batch[:ROWS].double())


def _check(family: str, record: dict[str, Any], model: nn.Module, x: Tensor) -> None:
    mixup = ManifoldMixup(model)
    layers = mixup.discover(x)
    mixup.remove()
    points = cut_points(model, x)
    record |= {"cut_points": len(points), "layers": layers, "reason": None}
    if layers == ["input"]:
        record["reason"] = why_no_inner_point(model, x, points)
    record["exact_error"] = exactness(model, x, layers)
    tried = forced(model, x, points, family)
    record["forced"] = [dataclasses.asdict(f) for f in tried]
    if record["exact_error"] > EXACT:
        record["failure"] = f"mixing at one of {layers} is not exact: {record['exact_error']:.1e}"
    wrong = [f"{f.key} ({'listed' if f.listed else 'not listed'}, {f.verdict})" for f in tried if f.wrong]
    if wrong:
        record["failure"] = f"discovery is wrong about {', '.join(wrong)}"
