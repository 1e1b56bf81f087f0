"""Manifold Mixup with the gradient blocked just after the mixing (Verma et al. 2019, arXiv 1806.05236, section 5.1)."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from manifold_mixup.lab.errors import UsageError
from manifold_mixup.lab.methods.base import BatchTransform, Criterion
from manifold_mixup.lab.methods.generators import send
from manifold_mixup.lab.methods.manifold_mixup import ManifoldMixupMethod, ManifoldMixupOptions
from manifold_mixup.mixup import Draw
from manifold_mixup.structure import map_tensors

__all__ = ["BlockedGradient"]

INPUT = "input"


class BlockedGradient(ManifoldMixupMethod):
    """Manifold Mixup, but the loss of a mixed batch trains the layers behind the mixing alone.

    The forward is that of Manifold Mixup with the same options and seed, number by number. In the backward the mixed
    hidden state counts as a constant, so that the layers before it learn nothing from this batch. A batch mixed at
    the input trains all layers, as in input mixup, and so does a batch that is not mixed. With ``per="example"``
    every pair is blocked at the layer where it is mixed: the rows of the others pass their gradients there. (Batch
    norm before that layer joins the rows of a batch, so the loss of one pair may reach another pair's features.)

    Parameters that a batch does not train have no gradient (``None``) and not a gradient of zero: the optimiser skips
    them in that step, with their momentum and their weight decay. With S = {0, 1, 2} the first layers are therefore
    changed in about a third of the steps. Which of the two the authors did is not known.
    """

    name = "blocked_gradient"
    title = "Manifold Mixup with the gradient blocked at the mixing"
    source = "Verma et al. 2019, arXiv 1806.05236, section 5.1"

    def __init__(self, options: ManifoldMixupOptions) -> None:
        super().__init__(options)
        self._handles: list[RemovableHandle] = []
        self._cuts: dict[str, _Cut] = {}  # by the name of the module
        self._state = _State()

    def attach(self, model: nn.Module, hidden: Sequence[str], seed: int) -> BatchTransform:
        """Attach the mixer; the hooks that block are put behind the mixer's own, so that they act after it.

        Raises:
            UsageError: Several processes train.
        """
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            raise UsageError(
                "method 'blocked_gradient' leaves parameters without a gradient, and each process other ones, which "
                "several processes cannot average: use one"
            )
        mix = super().attach(model, hidden, seed)
        self._handles.append(model.register_forward_pre_hook(_Begin(self._state)))
        self._handles.append(model.register_forward_hook(_End(self._state), always_call=True))
        self._handles.append(register_optimizer_step_pre_hook(_Rest(model)))

        def transform(x: Tensor, y: Any) -> tuple[Tensor, Any]:
            x, target = mix(x, y)
            assert self._mixup is not None
            if not self._cuts:
                self._hook_layers(model)
            last = self._mixup.last
            # in eval mode nothing was drawn, and the last draw is of another batch
            self._state.rows = _blocked(last, x.device) if model.training and last is not None else {}
            return x, target

        return transform

    def _hook_layers(self, model: nn.Module) -> None:
        """Hook the layers of S, which are known once the first batch was drawn."""
        for name in self.mixed_names():
            if name != INPUT:
                cut = self._cuts[name] = _Cut(self._state, name)
                self._handles.append(model.get_submodule(name).register_forward_hook(cut))
        self._state.cuts = list(self._cuts.values())

    def loss(self, criterion: Criterion, output: Any, target: Any) -> Tensor:
        """The loss, which has to depend on a parameter still.

        Raises:
            UsageError: There is nothing to train behind the layer that was mixed.
        """
        loss = super().loss(criterion, output, target)
        if torch.is_grad_enabled() and self._state.rows and not loss.requires_grad:
            layers = ", ".join(repr(layer) for layer in self._state.rows)
            raise UsageError(
                f"options.layers: no parameter is trained behind {layers}, so a batch mixed and blocked there has no "
                "gradient at all; leave it out"
            )
        return loss

    def detach(self) -> None:
        """Take all hooks off the network and the optimisers."""
        while self._handles:
            self._handles.pop().remove()
        self._cuts.clear()
        self._state.rows, self._state.cuts = {}, []
        super().detach()


def _blocked(draw: Draw, device: torch.device) -> dict[str, Tensor | None]:
    """Where the gradient stops: the calls of modules, with the rows ``(n,)``, or None for all of them."""
    if not isinstance(draw.layer, list):
        return {} if draw.layer in (None, INPUT) else {draw.layer: None}
    rows: dict[str, Tensor | None] = {}
    for layer in dict.fromkeys(draw.layer):
        if layer is not None and layer != INPUT:
            here = torch.tensor([other == layer for other in draw.layer])
            rows[layer] = None if bool(here.all()) else send(here, device)
    return rows


class _State:
    """What the hooks of one method share."""

    def __init__(self) -> None:
        self.rows: dict[str, Tensor | None] = {}  # of the batch in force
        self.cuts: list[_Cut] = []
        self.on = False  # inside a training forward of the model


class _Hook:
    """A hook whose copies, deep or pickled, do nothing: the mixer does not mix in a copied network either."""

    def __init__(self, state: _State) -> None:
        self.state = state

    def __deepcopy__(self, memo: Any) -> _Inert:
        return _Inert()

    def __reduce__(self) -> tuple[type[_Inert], tuple[()]]:
        return _Inert, ()


class _Inert:
    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None


class _Begin(_Hook):
    """Pre-hook on the model: a forward begins."""

    def __call__(self, model: nn.Module, args: Any) -> None:
        self.state.on = model.training
        for cut in self.state.cuts:
            cut.calls = 0


class _End(_Hook):
    """Hook on the model: the forward is over, or has failed."""

    def __call__(self, model: nn.Module, args: Any, output: Any) -> None:
        self.state.on = False


class _Cut(_Hook):
    """Hook on one module of S: block what this call returned, if this is the call that was mixed."""

    def __init__(self, state: _State, name: str) -> None:
        super().__init__(state)
        self.name = name
        self.calls = 0

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not self.state.on:
            return None
        self.calls += 1
        call = self.name if self.calls == 1 else f"{self.name}#{self.calls}"
        if call not in self.state.rows:
            return None
        rows = self.state.rows[call]
        return map_tensors(lambda tensor: _constant(tensor, rows), output)


class _Rest:
    """Before a step of SGD: parameters that were never trained begin with a momentum of zero.

    Torch's fused kernel wants a momentum for all parameters with a gradient or for none of them, but here some have
    their first gradient later than others. A first momentum of m * 0 + g is the g that torch would begin with.
    """

    def __init__(self, model: nn.Module) -> None:
        self.own = {id(p): weakref.ref(p) for p in model.parameters()}  # torch calls the hook for every optimiser

    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not isinstance(optimizer, torch.optim.SGD):
            return
        for group in optimizer.param_groups:
            for p in group["params"] if group["momentum"] else ():
                if p.grad is not None and self._is_own(p) and "momentum_buffer" not in optimizer.state[p]:
                    optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)

    def _is_own(self, parameter: Tensor) -> bool:
        known = self.own.get(id(parameter))
        return known is not None and known() is parameter


def _constant(tensor: Tensor, rows: Tensor | None) -> Tensor:
    """The same numbers, of which some rows pass no gradient; what has no row for each example is left as it is."""
    if not tensor.requires_grad:
        return tensor  # masks are known to the mixer by their identity
    if rows is None:
        return tensor.detach()
    if tensor.dim() == 0 or len(tensor) != len(rows):
        return tensor
    return torch.where(rows.view(-1, *[1] * (tensor.dim() - 1)), tensor.detach(), tensor)
