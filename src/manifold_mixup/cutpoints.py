"""Where a network may be mixed: cut points, found by following the data flow, and the eligible set S.

A module call is a cut point when every path from the inputs to the outputs goes through what it returns: take those
tensors away and no path is left. Then, and only then, mixing them mixes all that the rest of the network sees.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manifold_mixup.dataflow import record, shapes_by_call
from manifold_mixup.errors import (
    BatchMismatch,
    DataFlowLost,
    DiscoveryFailed,
    LayerNotFound,
    LayerNotReached,
    NotACutPoint,
)
from manifold_mixup.graph import Call, Graph, Leaf
from manifold_mixup.masks import (
    MaskPlan,
    Place,
    Rule,
    features,
    find_masks,
    judge,
    mask_plans,
    padding_values,
    probed,
    tested,
)
from manifold_mixup.structure import Path, at, batch_size, map_tensors

__all__ = ["CutPoint", "Discovery", "choose_layers", "cut_points", "discover", "resolve_name"]

INPUT = "input"


@dataclass(frozen=True)
class CutPoint:
    """A place where mixing is exact.

    Attributes:
        name: the module's name in ``model.named_modules()``; ``name#2`` is its second call; "input" is the input.
        shape: of one example's hidden state, without the batch; a tuple of shapes where several tensors form the cut.
        features: numbers per example, over all tensors of the cut.
        compute: share of the forward's FLOPs spent up to and with this call, in [0, 1].
        own_compute: share of the forward's FLOPs spent inside this call.
        stage_end: whether it closes a run of cut points of one shape (the paper's "resblock").
        masks: whether masks reach past it, so that mixing here unites those of the two examples.
    """

    name: str
    shape: tuple[Any, ...]
    features: int
    compute: float
    own_compute: float
    stage_end: bool = False
    masks: bool = False


@dataclass(frozen=True)
class Discovery:
    """What one look at a model tells."""

    cut_points: list[CutPoint]
    outputs: list[tuple[int, ...]]  # shapes of the model's outputs, without the batch where they have it
    heads: int  # how many of them have it
    mixable: dict[str, tuple[bool, ...]]  # for each call: which of the tensors it returns are floating and per example
    plans: dict[str, MaskPlan]  # for every cut point: what happens to masks
    rules: dict[Place, Rule]
    masked: frozenset[Path]  # the inputs that are masks
    _graph: Graph
    _unmasked: dict[str, str]  # why masks forbid a cut

    def explain(self, name: str) -> NotACutPoint | LayerNotReached:
        """Why ``name`` is no cut point: the error to raise."""
        graph = self._graph
        if name == INPUT:
            kinds = {
                label
                for leaf, label in zip(graph.source_leaves, graph.sources.values(), strict=True)
                if not leaf.floating and leaf.node not in graph.masks
            }
            return NotACutPoint(name, f"{_list(kinds)} holds integers, which cannot be interpolated.", None)
        call = next((c for c in graph.calls if c.key == name), None)
        if call is None:
            base = name.partition("#")[0]
            calls = sum(c.key.partition("#")[0] == base for c in graph.calls)
            times = "never called" if not calls else f"called {calls} time{'s' if calls > 1 else ''} only"
            return LayerNotReached(
                f"The module {base!r} is {times} in a forward of the model, so {name!r} cannot be mixed."
            )
        block = [leaf.node for leaf in features(graph, call) if leaf.node is not None]
        if not block:
            return NotACutPoint(name, "what it returns does not depend on the input, or does not reach the output.")
        if not graph.separates(block):
            start, end = graph.bypass(block)
            source, target = _origin(graph, start), _place(graph, end)
            return NotACutPoint(
                name, f"{source} reaches {target} without passing through it.", graph.where[start] or None
            )
        if call.packed:
            return NotACutPoint(
                name,
                "it returns a PackedSequence, whose rows are time steps of all examples and not examples. Mix before "
                "the packing (the embedding), or after it: what a module of its own computes from the last hidden "
                "state or from pad_packed_sequence.",
            )
        if name in self._unmasked:
            return NotACutPoint(name, self._unmasked[name], None)
        return NotACutPoint(
            name,
            f"it returns a tensor that does not hold one row per example in dimension 0, or holds integers "
            f"(shapes {', '.join(str(leaf.shape) for leaf in call.leaves)} for a batch of {_ROWS}).",
        )


_ROWS = 2  # the recorded forward; a second one with one row more shows which dimensions are the batch


def _origin(graph: Graph, node: int) -> str:
    if node in graph.sources:
        label = graph.sources[node]
        return "the input" if label == INPUT else f"the input {label!r}"
    where = graph.where[node]
    return f"what {where!r} computes" if where else f"what the model itself computes ({_operation(graph, node)})"


def _place(graph: Graph, node: int) -> str:
    if node == len(graph.parents) - 1:
        return "the output"
    where = graph.where[node]
    return f"{where!r} ({_operation(graph, node)})" if where else f"the model's own forward ({_operation(graph, node)})"


def _operation(graph: Graph, node: int) -> str:
    return graph.what[node].partition(".")[0]


def _list(names: set[str]) -> str:
    return " and ".join(repr(n) for n in sorted(names)) or "the input"


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode, no grad; afterwards modes, buffers and every random state are what they were."""
    modes = [(m, m.training) for m in model.modules()]
    buffers = [
        (m, name, b, b.detach().clone(), b._version)
        for m in model.modules()
        for name, b in m._buffers.items()
        if b is not None
    ]
    devices = {t.device for t in [*model.parameters(), *model.buffers()]}
    accelerators = [d for d in devices if d.type not in ("cpu", "meta")]
    python_state = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # the real forward says it again
        stack.enter_context(
            torch.random.fork_rng(accelerators, device_type=accelerators[0].type if accelerators else "cuda")
        )
        if "torch._dynamo" in sys.modules:  # importing it takes a second, and nothing is compiled before it is
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for module, name, buffer, content, version in buffers:
                module._buffers[name] = buffer
                if buffer._version != version:
                    buffer.copy_(content)
            random.setstate(python_state)
            if numpy is not None:
                numpy.random.set_state(numpy_state)


def _rows(value: Any, size: int, rows: int) -> Any:
    """The first ``rows`` examples of a batch, the first one repeated where there are too few."""
    index = torch.arange(rows).sub_(max(rows - size, 0)).clamp_(min=0)

    def take(tensor: Tensor) -> Tensor:
        if tensor.dim() and tensor.shape[0] == size:
            return tensor.detach()[index.to(tensor.device)]  # keeps the memory format, as index_select does not
        return tensor

    return map_tensors(take, value)


def discover(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Discovery:
    """Follow the data flow of ``model(*args, **kwargs)`` on two rows of the batch, and its shapes on three.

    Raises:
        BatchMismatch: no input has a first dimension, or the batch is empty.
        DiscoveryFailed: the model's forward raised.
        DataFlowLost: no path leads from the inputs to the outputs.
    """
    size = batch_size([args, kwargs])
    if not size:
        raise BatchMismatch(
            "Cut points are found on a batch, but the inputs hold " + ("no rows." if size == 0 else "no tensor.")
        )
    masks = find_masks(model, args, kwargs, size)
    pads = padding_values(model)
    with _undisturbed(model):
        try:
            two = probed((_rows(args, size, _ROWS), _rows(kwargs, size, _ROWS)), masks)
            graph = record(model, two[0], two[1], _ROWS, [at(two, path) for path in masks], pads)
            plans = mask_plans(graph, masks)
            ids = list(tested(graph))
            three = probed((_rows(args, size, _ROWS + 1), _rows(kwargs, size, _ROWS + 1)), masks, ids)
            watch = {place for plan in plans.values() if isinstance(plan, MaskPlan) for place in plan.places}
            grown = shapes_by_call(model, three[0], three[1], watch)
        except Exception as error:
            raise DiscoveryFailed(
                f"The forward that looks for the cut points, on {_ROWS} and on {_ROWS + 1} rows of the batch, raised "
                f"{type(error).__name__}: {str(error).rstrip('.')}. Call mixup(x, y) with x as the model takes it "
                "(device, dtype, preprocessing); x may be a tuple of positional or a dict of keyword arguments. Or "
                "name S yourself: layers=[...], check=False."
            ) from error
    if not any(leaf.node is not None and graph.between[leaf.node] for leaf in graph.outputs):
        lost = next((graph.where[n] for n in graph.parents[-1] if graph.what[n].endswith("()")), None)
        where = repr(lost) if lost else "the model's own forward"
        place = f" It leaves PyTorch in {where}." if lost is not None else ""
        raise DataFlowLost(
            f"No path of tensors leads from the inputs to the outputs of {type(model).__name__}, so no cut point can "
            f"be proven.{place} If you know where it may be mixed, name S yourself: layers=[...], check=False."
        )
    rules, reasons = judge(graph, plans, grown.arguments)
    # "input" is k = 0, also where a module has that name: such a module cannot be in S.
    mixable = {c.key: _per_example(graph, c, grown.by_call.get(c.key, [])) for c in graph.calls if c.key != INPUT}
    heads = [leaf.shape[:1] == (_ROWS,) for leaf in graph.outputs]
    outputs = [leaf.shape[1:] if head else leaf.shape for leaf, head in zip(graph.outputs, heads, strict=True)]
    sound = {key: plan for key, plan in plans.items() if isinstance(plan, MaskPlan) and key not in reasons}
    return Discovery(
        _cut_points(graph, mixable, sound), outputs, sum(heads), mixable, sound, rules, frozenset(masks), graph, reasons
    )


def _per_example(graph: Graph, call: Call, grown: list[tuple[int, ...]]) -> tuple[bool, ...]:
    """Which tensors are floating and have the batch as dimension 0: it grows with the batch and no other does."""
    if len(grown) != len(call.leaves):
        return (False,) * len(call.leaves)
    return tuple(
        leaf.floating
        and leaf.node not in graph.masks
        and leaf.shape[:1] == (_ROWS,)
        and shape == (_ROWS + 1, *leaf.shape[1:])
        for leaf, shape in zip(call.leaves, grown, strict=True)
    )


def _point(name: str, leaves: Sequence[Leaf], compute: float, own: float) -> CutPoint:
    shapes = tuple(leaf.shape[1:] for leaf in leaves)
    features = sum(torch.Size(s).numel() for s in shapes)
    return CutPoint(name, shapes[0] if len(shapes) == 1 else shapes, features, compute, own)


def _cut_points(graph: Graph, mixable: dict[str, tuple[bool, ...]], plans: dict[str, MaskPlan]) -> list[CutPoint]:
    found = []
    sources = [leaf for leaf in graph.source_leaves if leaf.node not in graph.masks]
    if sources and all(leaf.floating for leaf in sources):
        point = _point(INPUT, sources, 0.0, 0.0)
        found.append(dataclasses.replace(point, masks=INPUT in plans))
    total = graph.cost or 1.0
    for call in graph.calls:
        leaves = features(graph, call)
        known = dict(zip(map(id, call.leaves), mixable.get(call.key, ()), strict=False))
        if call.key in plans and all(known.get(id(leaf)) for leaf in leaves):
            own = (call.cost_after - call.cost_before) / total
            point = _point(call.key, leaves, call.cost_after / total, own)
            found.append(dataclasses.replace(point, masks=bool(plans[call.key].unite)))
    ends = {stage_end.name for stage_end in _stage_ends(found)}
    return [dataclasses.replace(p, stage_end=p.name in ends) for p in found]


def _candidates(points: Sequence[CutPoint]) -> list[CutPoint]:
    """Cut points that do work of their own (no norms, activations, stems) and leave some work to do."""
    return [p for p in points if p.own_compute >= 0.01 and p.compute < 0.95]


def _stage_ends(points: Sequence[CutPoint]) -> list[CutPoint]:
    """The module with the most compute of its own in every run of candidates of one shape; the last of equals."""
    runs: list[list[CutPoint]] = []
    for point in _candidates(points):
        if runs and runs[-1][-1].shape == point.shape:
            runs[-1].append(point)
        else:
            runs.append([point])
    return [max(reversed(run), key=lambda p: round(p.own_compute, 6)) for run in runs]


def auto_layers(points: Sequence[CutPoint]) -> list[str]:
    """S = {input} and two inner cut points, as the paper's choice generalises: the ends of the first two stages.

    A stage end counts with a tenth of the compute of its own, before three quarters of the whole, and a tenth after
    the one before. What is missing (networks of one stage) is filled with the candidates nearest to a quarter and to a
    half. The input is left out where it cannot be mixed; if nothing is left then, the last cut point before the
    head is taken.
    """
    chosen: list[CutPoint] = []
    for end in _stage_ends(points):
        apart = not chosen or end.compute - chosen[-1].compute >= 0.1
        if len(chosen) < 2 and end.own_compute >= 0.1 and end.compute < 0.75 and apart:
            chosen.append(end)
    for target in (0.25, 0.5):
        free = [p for p in _candidates(points) if all(abs(p.compute - c.compute) >= 0.1 for c in chosen)]
        if len(chosen) < 2 and free:
            # Of a container and its last child, which are equally far, take the container.
            chosen.append(min(reversed(free), key=lambda p: round(abs(p.compute - target), 6)))
    if not chosen and not any(p.name == INPUT for p in points):
        chosen = [p for p in points if p.compute < 0.95][-1:]  # an embedding, say: better than nothing
    order = {p.name: i for i, p in enumerate(points)}
    names = sorted((p.name for p in chosen), key=order.__getitem__)
    return [INPUT, *names] if any(p.name == INPUT for p in points) else names


def resolve_name(model: nn.Module, name: str) -> tuple[str, int]:
    """The module's name as ``model.named_modules()`` has it, and which of its calls is meant (from 1 on).

    Raises:
        LayerNotFound: no module has this name.
    """
    base, _, number = name.partition("#")
    if not base or (number and not number.isdigit()) or number == "0":
        raise LayerNotFound(name, dict(model.named_modules()))
    try:
        module = model.get_submodule(base)
    except AttributeError:
        raise LayerNotFound(name, dict(model.named_modules())) from None
    canonical = next(n for n, m in model.named_modules() if m is module)
    return canonical, int(number or 1)


def choose_layers(
    model: nn.Module, layers: str | Sequence[str] | Callable[[list[CutPoint]], Sequence[str]], discovery: Discovery
) -> list[str]:
    """The eligible set S, in the order given (or of the forward, for "auto").

    Raises:
        LayerNotFound, NotACutPoint, LayerNotReached: for a name that cannot be in S.
        NotACutPoint: "auto" found nothing to mix.
    """
    if isinstance(layers, str):
        chosen = auto_layers(discovery.cut_points)
        if not chosen:
            others = [p.name for p in discovery.cut_points]
            raise NotACutPoint("auto", _no_choice(discovery, others))
        return chosen
    names = layers(list(discovery.cut_points)) if callable(layers) else layers
    points = {p.name for p in discovery.cut_points}
    chosen = []
    for name in names:
        if name != INPUT:
            base, number = resolve_name(model, name)
            name = base if number == 1 else f"{base}#{number}"
        if name not in points:
            raise discovery.explain(name)
        chosen.append(name)
    return list(dict.fromkeys(chosen))


def _no_choice(discovery: Discovery, names: list[str]) -> str:
    if not names:
        return "neither the input nor any module of this model is one."
    why = discovery.explain(INPUT)
    input_too = f" The input cannot be mixed: {why.reason}" if isinstance(why, NotACutPoint) else ""
    return f"the only cut points are {_list(set(names))}, behind which there is nothing left to learn.{input_too} To mix there all the same, name them: layers=[{names[-1]!r}]."


def cut_points(model: nn.Module, /, *inputs: Any, **kwargs: Any) -> list[CutPoint]:
    """List the places where ``model`` may be mixed, in the order of its forward.

    Runs ``model(*inputs, **kwargs)`` on two and on three rows of the batch, in eval mode, without grad; buffers, modes
    and random states are left as they were. Auxiliary inputs with a row per example (attention masks) count as inputs:
    where one bypasses a module, that module is no cut point.

    Args:
        model: any module; wrappers (DDP, ``torch.compile``) are looked through by :class:`ManifoldMixup`, not here.
        *inputs: a batch as the model takes it, rows in dimension 0.
        **kwargs: the same by name.

    Returns:
        One :class:`CutPoint` for every module call that is one, "input" first where it can be mixed.

    Raises:
        BatchMismatch, DiscoveryFailed, DataFlowLost: see :func:`discover`.
    """
    return discover(model, inputs, kwargs).cut_points
