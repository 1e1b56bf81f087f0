"""What is attached to a model: one hook on the model itself and one on every module of S, attached once.

The hooks read a small state object and change nothing else, so that `torch.compile` traces them into one graph: the
layer drawn is compared as a string (one graph for every layer of S), λ and the partners are tensors.

A forward inside a backward is activation checkpointing at work. It has to mix as the forward that it repeats did, and
other draws may have come between: every forward leaves a note on its output's autograd node, which backward reads
before it reaches anything that is recomputed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from manifold_mixup.errors import (
    PACKED,
    BatchMismatch,
    LayerNotReached,
    NotACutPoint,
    RecomputeAmbiguous,
    UnsupportedModel,
)
from manifold_mixup.interpolation import Plan, apply_plan, apply_traced
from manifold_mixup.mask_hooks import Masks, refuse_new_masks
from manifold_mixup.structure import Path, map_tensors, packed, tensors

__all__ = ["EVERY", "INPUT", "Drawn", "Live", "MaskHook", "SiteHook", "attach", "detach"]

INPUT = "input"
EVERY = "*"


@dataclass(eq=False)
class Drawn:
    """One draw: what is mixed where. Without plans, nothing is."""

    size: int = 0
    plans: dict[str, Plan] = field(default_factory=dict)
    completed: bool = False


UNMIXED = Drawn(completed=True)


@dataclass(eq=False)
class Live:
    """The state that all hooks of one mixer share."""

    armed: bool = False  # a draw is in force
    paused: bool = False
    on: bool = False  # inside a training forward that mixes
    active: str = ""  # the call to mix: a key of S, "" for none, EVERY for all of S (each pair has a layer of its own)
    expected: int = 0  # how many sites have to act in a forward
    fired: int = 0
    completed: bool = False
    drawn: Drawn = UNMIXED
    rows_out: int = 0
    mixable: dict[str, tuple[bool, ...]] | None = None  # None: not discovered, mix what has the batch size
    heads: int | None = None  # how many tensors with a row per example the model returns in eval mode
    sites: list[SiteHook] = field(default_factory=list)
    given: frozenset[Path] | None = None  # the inputs that discovery saw; None: there was none
    masks: Masks | None = None  # of a model whose layers of S masks reach past
    mask_sites: list[MaskHook] = field(default_factory=list)
    # For torch.compile: the same draw as tensors on the batch's device.
    kind: str = ""
    index: Tensor | None = None
    inverse: Tensor | None = None
    lam: Mapping[str, Tensor] = field(default_factory=dict)
    # For activation checkpointing.
    recomputing: Drawn | None = None
    blind: list[Drawn] = field(default_factory=list)  # of training forwards without grad, which leave no note

    def layers_now(self, drawn: Drawn) -> tuple[str, ...]:
        """The layers at which rows are mixed: of this draw, or of the one in force if that is being compiled."""
        if not torch.compiler.is_compiling():
            return tuple(drawn.plans)
        return tuple(self.lam) if self.active == EVERY else (self.active,)


def _in_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class _Inert:
    """What a copy of a hook is: a teacher or an average of the model never mixes."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None


class _Hook:
    """A hook whose copies, deep or pickled, do nothing."""

    def __init__(self, live: Live) -> None:
        self.live = live

    def __deepcopy__(self, memo: Any) -> _Inert:
        return _Inert()

    def __reduce__(self) -> tuple[type[_Inert], tuple[()]]:
        return _Inert, ()

    def mix(self, drawn: Drawn, key: str, value: Any) -> Any:
        """Mix every tensor of ``value`` that the cut point ``key`` is made of."""
        live = self.live
        if not torch.compiler.is_compiling() and key not in drawn.plans:
            return value
        flags = live.mixable.get(key) if live.mixable is not None else None
        place, mixed = -1, 0
        if packed(value):
            raise NotACutPoint(key, PACKED)

        def visit(tensor: Tensor) -> Tensor:
            nonlocal place, mixed
            place += 1
            if flags is None:
                wanted = tensor.is_floating_point() and tensor.dim() > 0 and tensor.shape[0] == drawn.size
                wanted = wanted and not (live.masks is not None and live.masks.holds(tensor))
            else:
                wanted = place < len(flags) and flags[place]
            if not wanted:
                return tensor
            if tensor.dim() == 0 or tensor.shape[0] != drawn.size:
                raise BatchMismatch(_mismatch(key, tensor, drawn.size))
            mixed += 1
            if live.masks is None:
                return self._mix_one(drawn, key, tensor)
            plan = None if torch.compiler.is_compiling() else drawn.plans[key]
            return live.masks.mix(live, plan, key, mixed - 1, tensor, lambda t: self._mix_one(drawn, key, t))

        result = map_tensors(visit, value)
        if flags is not None and place + 1 != len(flags):
            raise NotACutPoint(
                key,
                f"it returned {place + 1} tensors in training and {len(flags)} in the eval mode of discovery.",
            )
        if not mixed:
            shapes = [tuple(t.shape) for t in tensors(value)]
            raise BatchMismatch(
                f"{'The input holds' if key == INPUT else f'The layer {key!r} returned'} no floating tensor with the "
                f"batch's {drawn.size} rows in dimension 0 (shapes {shapes}), so it cannot be mixed. {_OTHER_DATA}"
            )
        return result

    def _mix_one(self, drawn: Drawn, key: str, tensor: Tensor) -> Tensor:
        live = self.live
        if not torch.compiler.is_compiling():
            return apply_plan(tensor, drawn.plans[key])
        assert live.index is not None
        return apply_traced(tensor, live.kind, live.index, live.inverse, live.lam[key])


def _mismatch(key: str, tensor: Tensor, size: int) -> str:
    what = "The input" if key == INPUT else f"The hidden state after {key!r}"
    return f"{what} has shape {tuple(tensor.shape)}, but the batch given to mixup(x, y) has {size} rows. {_OTHER_DATA}"


_OTHER_DATA = (
    "Call the model with the batch that mixup(x, y) was given; wrap training forwards of other data in "
    "`with mixup.paused():`."
)


class SiteHook(_Hook):
    """Forward hook on one module of S, for all of its calls."""

    def __init__(self, live: Live, name: str, keys: frozenset[str], root: nn.Module) -> None:
        super().__init__(live)
        self.name = name
        self.keys = keys
        self.calls = 0
        self.root = root

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Mix what this call of the module returned, if this is the call drawn."""
        live = self.live
        if _in_backward():
            return self._recompute(output)
        if not live.on:
            return None
        self.calls += 1
        key = self.name if self.calls == 1 else f"{self.name}#{self.calls}"
        if live.active == key or (live.active == EVERY and key in self.keys):
            live.fired += 1
            return self.mix(live.drawn, key, output)
        return None

    def _recompute(self, output: Any) -> Any:
        drawn = repeated_draw(self.live, self.root)
        key = next((k for k in drawn.plans if k in self.keys), None)
        if key is None:
            return None
        if self.calls > 1:
            raise RecomputeAmbiguous(
                f"{self.name!r} is called {self.calls} times in a forward and activation checkpointing recomputes it: "
                f"which call that is cannot be told, so {key!r} cannot be in S. Leave it out of layers, or do not "
                "checkpoint it."
            )
        return self.mix(drawn, key, output)


class MaskHook(_Hook):
    """Forward pre-hook on one module that is given masks, for all of its calls."""

    def __init__(self, live: Live, name: str, calls: dict[str, list[Path]], root: nn.Module) -> None:
        super().__init__(live)
        self.name = name
        self.paths = calls
        self.calls = 0
        self.root = root

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Give this call the masks that it has to see."""
        live = self.live
        again = _in_backward()
        if not again and not live.on:
            return None
        if not again:
            self.calls += 1
        elif self.calls > 1:
            self._refuse(repeated_draw(live, self.root))
        key = self.name if self.calls <= 1 else f"{self.name}#{self.calls}"
        paths = self.paths.get(key)
        if paths is None or live.masks is None:
            return None
        drawn = repeated_draw(live, self.root) if again else live.drawn
        return live.masks.enter(live, drawn, key, paths, (args, kwargs))

    def _refuse(self, drawn: Drawn) -> None:
        if drawn.plans:
            raise RecomputeAmbiguous(
                f"{self.name!r} is called {self.calls} times in a forward and activation checkpointing recomputes it: "
                "which call that is cannot be told, so nor can the mask it has to see. Do not checkpoint it, or leave "
                "the layers that its mask reaches past out of S."
            )


def repeated_draw(live: Live, root: nn.Module) -> Drawn:
    """The draw of the forward that is being recomputed."""
    if live.recomputing is not None:
        return live.recomputing
    if not root.training:
        return UNMIXED
    current = live.drawn if live.armed else UNMIXED
    if any(drawn is not current for drawn in live.blind):
        raise RecomputeAmbiguous(
            "The whole model is recomputed in backward (reentrant checkpointing) and several draws were made since: "
            "which one to repeat cannot be told. Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False), or "
            "run backward before the next mixup(x, y)."
        )
    return current


class BeforeForward(_Hook):
    """Forward pre-hook on the model: start counting, and mix the input if that is the layer drawn."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A forward of the model begins."""
        live = self.live
        if getattr(module, "_is_replica", False):
            raise UnsupportedModel(
                "nn.DataParallel splits the batch after it was paired, so partners land on other devices. "
                "Use torch.nn.parallel.DistributedDataParallel: each process mixes its own batch."
            )
        if _in_backward():
            drawn = repeated_draw(live, module)
            live.blind = [d for d in live.blind if d is not drawn]
            return self._inputs(drawn, INPUT in drawn.plans, args, kwargs)
        if live.on and not torch.compiler.is_compiling():
            raise UnsupportedModel(
                f"{type(module).__name__} is called inside its own forward, so which of the two calls has to mix "
                "cannot be told. (Lightning runs training_step so under DDP: use ManifoldMixupCallback of "
                "manifold_mixup.integrations.lightning.) Attach the mixer to the network inside it."
            )
        live.on = live.armed and not live.paused and module.training
        if not live.on:
            return None
        if not torch.compiler.is_compiling() and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise UnsupportedModel(
                "A CUDA graph captured by hand would repeat the λ, the partners and the labels of this one step "
                'for ever. Use torch.compile(model, mode="reduce-overhead"), whose graphs take them as inputs.'
            )
        for site in live.sites:
            site.calls = 0
        for mask_site in live.mask_sites:
            mask_site.calls = 0
        if not torch.compiler.is_compiling():
            refuse_new_masks(live, (args, kwargs))
        mixes = live.active == INPUT or (live.active == EVERY and INPUT in live.lam)
        live.fired = int(mixes)
        return self._inputs(live.drawn, mixes, args, kwargs)

    def _inputs(self, drawn: Drawn, mixes: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the model is given: the masks that it has to see, and the mixed input if that is the layer drawn."""
        live, arguments = self.live, (args, kwargs)
        if live.masks is not None:
            live.masks.begin()
            arguments = live.masks.enter(live, drawn, "", live.masks.root, arguments)
        if mixes:
            args, kwargs = self.mix(drawn, INPUT, [*arguments])
            return args, kwargs
        return None if live.masks is None else arguments


class AfterForward(_Hook):
    """Forward hook on the model: the layer drawn must have been mixed exactly once."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """A forward of the model ends."""
        live = self.live
        if _in_backward():
            return
        on, live.on = live.on, False
        if on:
            if live.fired != live.expected:
                raise LayerNotReached(_not_reached(live))
            if live.heads is not None and _with_rows(output, live.rows_out) > live.heads:
                raise NotACutPoint(
                    live.active,
                    f"in training the model returns more outputs than the {live.heads} of eval mode, where cut points "
                    "are found; an auxiliary head may read features from before the mixing. If all outputs lie behind "
                    "the layers of S, say so with check=False.",
                )
            live.completed = True
        if not torch.compiler.is_compiling():
            self._leave_note(live.drawn if on else UNMIXED, module.training, output)

    def _leave_note(self, drawn: Drawn, training: bool, output: Any) -> None:
        live = self.live
        if not torch.is_grad_enabled():
            if training and drawn not in live.blind:
                live.blind = [*live.blind[-1:], drawn]  # two are enough to know that there is more than one
            return

        def note(_: Any) -> None:
            live.recomputing = drawn

        for node in {t.grad_fn for t in tensors(output)} - {None}:
            node.register_prehook(note)  # type: ignore[union-attr]


class EndForward(_Hook):
    """Forward hook that is called also where the forward raises: nothing that follows belongs to it."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """The forward is over, one way or the other."""
        if not _in_backward():
            self.live.on = False


def _with_rows(output: Any, rows: int) -> int:
    return sum(t.dim() > 0 and t.shape[0] == rows for t in tensors(output))


def _not_reached(live: Live) -> str:
    if live.active == EVERY:
        return (
            f"Only {live.fired} of the {live.expected} layers of S ran in this training forward, so some pairs were "
            f"not mixed. Leave the layers that do not always run (stochastic depth, early exits) out of S. {_COMPILED}"
        )
    return (
        f"The layer {live.active!r} was drawn but did not run in this training forward, so nothing was mixed. Leave "
        "layers that do not always run (stochastic depth, early exits, frozen branches) out of S: layers=[...]. "
        f"{_COMPILED}"
    )


_COMPILED = (
    "If the model was compiled and run before the mixer was made, it has to be compiled anew: torch._dynamo.reset()."
)


def attach(root: nn.Module, live: Live) -> list[RemovableHandle]:
    """Put the hooks of a mixer on the model itself."""
    return [
        root.register_forward_pre_hook(BeforeForward(live), with_kwargs=True),
        root.register_forward_hook(AfterForward(live)),
        root.register_forward_hook(EndForward(live), always_call=True),
    ]


def detach(handles: list[RemovableHandle], live: Live) -> None:
    """Take all hooks of a mixer off its model."""
    for handle in handles:
        handle.remove()
    handles.clear()
    live.armed = live.on = False
