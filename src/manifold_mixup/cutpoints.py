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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manifold_mixup.dataflow import Shapes, record, shapes_by_call
from manifold_mixup.eligible import INPUT, CutPoint, stage_ends
from manifold_mixup.errors import (
    PACKED,
    BatchMismatch,
    DataFlowLost,
    DiscoveryFailed,
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
from manifold_mixup.structure import Path, at, batch_size, map_tensors, paths

__all__ = ["CutPoint", "Discovery", "cut_points", "discover"]


@dataclass(frozen=True)
class Discovery:
    """What one look at a model tells."""

    cut_points: list[CutPoint]
    outputs: list[tuple[int, ...]]  # shapes of the model's outputs, without the batch where they have it
    heads: int  # how many of them have it
    mixable: dict[str, tuple[bool, ...]]  # for calls that may be mixed: which tensors are floating and per example
    plans: dict[str, MaskPlan]  # for every cut point: what happens to masks
    rules: dict[Place, Rule]
    given: frozenset[Path]  # the inputs with a row per example
    _graph: Graph
    _unmasked: dict[str, str]  # why masks forbid a cut

    def middle(self) -> list[str]:
        """The module call in the middle of the compute that does most of it, the model itself apart; or none."""
        half = self._graph.cost / 2
        around = [c for c in self._graph.calls if c.key and c.cost_before <= half < c.cost_after]
        return [max(around, key=lambda c: c.cost_after - c.cost_before).key] if around else []

    def explain(self, name: str) -> NotACutPoint | LayerNotReached:
        """Why ``name`` is no cut point: the error to raise."""
        graph = self._graph
        if name == INPUT:
            kinds = {
                label
                for leaf, label in zip(graph.source_leaves, graph.sources.values(), strict=True)
                if not leaf.floating and leaf.node not in graph.masks
            }
            return NotACutPoint(
                name,
                f"{_list(kinds)} {'holds' if len(kinds) == 1 else 'hold'} integers, which cannot be interpolated.",
                None,
            )
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
                PACKED,
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
    while graph.what[node].startswith("detach") and not graph.where[node] and graph.parents[node]:
        node = graph.parents[node][0]  # our own alias of what the model was given
    if node in graph.sources:
        label = graph.sources[node]
        return "the input" if label == INPUT else f"the input {label!r}"
    where = graph.where[node]
    return f"what {where!r} computes" if where else f"what the model itself computes ({_operation(graph, node)})"


def _place(graph: Graph, node: int) -> str:
    while graph.what[node].startswith("detach"):  # our own alias of what a module returned or was given
        after = next((end for start, end in graph.edges() if start == node), None)
        if after is None:
            break
        node = after
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
    modules = list(model.modules())
    modes = [(m, m.training) for m in modules]
    held = [(m, name, b) for m in modules for name, b in m._buffers.items() if b is not None]
    buffers = [(m, name, b, b.detach().clone(), b._version) for m, name, b in held]
    parameters = [p for m in modules for p in m._parameters.values() if p is not None]
    devices = {t.device for t in [*parameters, *(b for _, _, b in held)]}
    accelerators = [d for d in devices if d.type not in ("cpu", "meta")]
    python_state = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None
    fast = torch.backends.mha.get_fastpath_enabled()  # fused layers and nested tensors, which training never takes
    with contextlib.ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)
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


@dataclass
class _Look:
    """What two forwards of a model showed: one recorded, one on a row more."""

    rows: int
    graph: Graph
    plans: dict[str, MaskPlan | str]
    grown: Shapes | None  # None: a graph network, whose rows cannot be cut out

    def per_example(self, call: Call) -> tuple[bool, ...]:
        """Which tensors are floating and have the batch as dimension 0: it grows with the batch and no other does."""
        same = [leaf.shape for leaf in call.leaves]
        grown = same if self.grown is None else self.grown.by_call.get(call.key, [])
        if len(grown) != len(call.leaves):
            return (False,) * len(call.leaves)
        more = 0 if self.grown is None else 1
        return tuple(
            leaf.floating
            and leaf.node not in self.graph.masks
            and leaf.shape[:1] == (self.rows,)
            and shape == (self.rows + more, *leaf.shape[1:])
            for leaf, shape in zip(call.leaves, grown, strict=True)
        )

    def check_outputs(self, model: nn.Module) -> None:
        """Refuse a model in whose outputs no dimension is the batch: what was taken for examples are none."""
        if self.grown is None:
            return
        sizes = [(leaf.shape, shape) for leaf, shape in zip(self.graph.outputs, self.grown.by_call[""], strict=True)]
        if any(one for one, _ in sizes) and all(one == more for one, more in sizes):
            raise BatchMismatch(
                f"No dimension of what {type(model).__name__} returns (shapes {[one for one, _ in sizes]}) follows the "
                "number of rows of its inputs, so these are no examples. The batch has to be dimension 0: "
                "batch_first=True in recurrent layers, or a wrapper that transposes."
            )


def _look(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], size: int) -> _Look:
    pads = padding_values(model)
    if _is_graph_network(model):
        graph = record(model, args, kwargs, size, (), pads)
        return _Look(size, graph, mask_plans(graph, ()), None)
    masks = find_masks(model, args, kwargs, size)
    two = probed((_rows(args, size, _ROWS), _rows(kwargs, size, _ROWS)), masks)
    graph = record(model, two[0], two[1], _ROWS, [at(two, path) for path in masks], pads)
    plans = mask_plans(graph, masks)
    three = probed((_rows(args, size, _ROWS + 1), _rows(kwargs, size, _ROWS + 1)), masks, list(tested(graph)))
    watch = {place for plan in plans.values() if isinstance(plan, MaskPlan) for place in plan.places}
    return _Look(_ROWS, graph, plans, shapes_by_call(model, three[0], three[1], {"", *plans}, watch))


def _is_graph_network(model: nn.Module) -> bool:
    """Whether the rows are nodes: some of them, taken alone, would leave the edges without ends."""
    return any(kind.__name__ == "MessagePassing" for module in model.modules() for kind in type(module).__mro__)


def discover(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Discovery:
    """Follow the data flow of ``model(*args, **kwargs)`` on two rows of the batch, and its shapes on three.

    A graph network (with layers of PyTorch Geometric), whose rows are nodes, is run on all of them.

    Raises:
        BatchMismatch: no input has a first dimension, the batch is empty, or no output follows its size.
        DiscoveryFailed: the model's forward raised.
        DataFlowLost: no path leads from the inputs to the outputs.
    """
    size = batch_size([args, kwargs])
    if not size:
        raise BatchMismatch(
            "Cut points are found on a batch, but the inputs hold " + ("no rows." if size == 0 else "no tensor.")
        )
    with _undisturbed(model):
        try:
            look = _look(model, args, kwargs, size)
        except Exception as error:
            raise DiscoveryFailed(
                f"The forward that looks for the cut points, on {_ROWS} and on {_ROWS + 1} rows of the batch, raised "
                f"{type(error).__name__}: {str(error).rstrip('.')}. Call mixup(x, y) with x as the model takes it "
                "(device, dtype, preprocessing); x may be a tuple of positional or a dict of keyword arguments. Or "
                "name S yourself: layers=[...], check=False."
            ) from error
    graph = look.graph
    if not any(leaf.node is not None and graph.between[leaf.node] for leaf in graph.outputs):
        lost = next((graph.where[n] for n in graph.parents[-1] if graph.what[n].endswith("()")), None)
        where = repr(lost) if lost else "the model's own forward"
        place = f" It leaves PyTorch in {where}." if lost is not None else ""
        raise DataFlowLost(
            f"No path of tensors leads from the inputs to the outputs of {type(model).__name__}, so no cut point can "
            f"be proven.{place} If you know where it may be mixed, name S yourself: layers=[...], check=False."
        )
    look.check_outputs(model)
    rules, reasons = judge(graph, look.plans, look.grown.arguments if look.grown else {})
    # "input" is k = 0, also where a module has that name: such a module cannot be in S.
    mixable = {c.key: look.per_example(c) for c in graph.calls if c.key != INPUT}
    heads = [leaf.shape[:1] == (look.rows,) for leaf in graph.outputs]
    sound = {key: plan for key, plan in look.plans.items() if isinstance(plan, MaskPlan) and key not in reasons}
    return Discovery(
        cut_points=_cut_points(graph, mixable, sound),
        outputs=[leaf.shape[1:] if head else leaf.shape for leaf, head in zip(graph.outputs, heads, strict=True)],
        heads=sum(heads),
        mixable=mixable,
        plans=sound,
        rules=rules,
        given=frozenset(path for path, tensor in paths((args, kwargs)) if tensor.dim() and tensor.shape[0] == size),
        _graph=graph,
        _unmasked=reasons,
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
    ends = {stage_end.name for stage_end in stage_ends(found)}
    return [dataclasses.replace(p, stage_end=p.name in ends) for p in found]


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
