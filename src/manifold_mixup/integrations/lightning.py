"""Manifold Mixup in the Lightning Trainer: a callback, and a LightningModule that stays as it is.

The batch is mixed where ``training_step`` gets it, after every transfer and transform and inside the wrappers of
distributed strategies. Validation, testing and prediction, the sanity check and what other callbacks see are untouched.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

import torch
from torch import nn

from manifold_mixup.errors import AlreadyAttached, BatchMismatch, DiscoveryFailed, LayerNotReached, UnsupportedModel
from manifold_mixup.mixup import ManifoldMixup
from manifold_mixup.pairing import Pairing
from manifold_mixup.structure import tensors
from manifold_mixup.target import MixedTarget
from manifold_mixup.validation import Layers, validate

__all__ = ["ManifoldMixupCallback"]

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")  # the same library under two names


def _callback_class() -> Any:
    """The Callback of the package that is in use; a Trainer of the other one takes it as well."""
    for package in sorted(_PACKAGES, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(package).Callback
        except ModuleNotFoundError as error:
            if error.name not in (package, package.partition(".")[0]):
                raise
    raise ModuleNotFoundError("ManifoldMixupCallback needs Lightning: pip install 'manifold-mixup[lightning]'")


if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    Callback = _callback_class()


class Options(TypedDict, total=False):
    """The other arguments of :class:`~manifold_mixup.ManifoldMixup`, which has their defaults."""

    per: Literal["batch", "example"]
    pairing: Pairing
    probability: float
    seed: int | None
    check: bool


class ManifoldMixupCallback(Callback):
    """Trains an unchanged LightningModule with Manifold Mixup.

    ::

        trainer = Trainer(callbacks=[ManifoldMixupCallback(alpha=2.0)])

    In ``training_step`` the target becomes a :class:`~manifold_mixup.MixedTarget` (every loss of
    ``torch.nn.functional`` takes it), and the network mixes inside its forward. One draw per batch: an optimizer that
    evaluates its closure several times sees one loss. While it trains, ``callback.mixup`` is the ManifoldMixup at work
    (``callback.mixup.last`` its draw); after the fit, also one that raised, nothing is left attached.

    The state of the draws is part of Lightning's checkpoints, for every rank its own: a resumed run draws what the
    uninterrupted one would have drawn.

    Args:
        alpha: λ ~ Beta(α, α).
        layers: the eligible set S; names are those of the network's ``named_modules()``.
        model: the network, as a name in the LightningModule's ``named_modules()``; "" is the LightningModule itself.
            By default the LightningModule itself where it defines ``forward`` (training_step calls ``self(x)`` or
            ``self.forward(x)``), else its only child that has parameters.
        target: where the target is in a batch: an index of a tuple or list, or a key of a mapping. Only a pair may
            leave it out, which is (x, y) then.
        inputs: where the inputs are that the network is called with: one index or key, or a sequence of them (keys
            become keyword arguments). By default all tensors but the target. The first batch is looked at with them.
        soft_targets: the number of classes, for losses that want mixed one-hot labels of shape (n, classes) and know no
            MixedTarget; None hands out the MixedTarget.
        **options: ``per``, ``pairing``, ``probability``, ``seed`` and ``check`` of
            :class:`~manifold_mixup.ManifoldMixup`.

    Raises:
        ValueError, TypeError: at once, for arguments that ManifoldMixup refuses.
        ValueError: when training starts, if there is no network to be found or ``model`` names none.
        UnsupportedModel: when training starts, if ``training_step`` takes a ``dataloader_iter``.
        BatchMismatch: in the first step, if the batch has no target where it is said to be.
        AlreadyAttached: the network has another mixer.

    Source: Verma et al., Manifold Mixup, ICML 2019, section 2.
    """

    def __init__(
        self,
        alpha: float = 2.0,
        layers: Layers = "auto",
        *,
        model: str | None = None,
        target: Hashable | None = None,
        inputs: Hashable | Sequence[Hashable] | None = None,
        soft_targets: int | None = None,
        **options: Unpack[Options],
    ) -> None:
        bound = inspect.signature(ManifoldMixup).bind(None, alpha, layers, **options)
        bound.apply_defaults()
        validate(**{name: value for name, value in bound.arguments.items() if name != "model"})
        self._make = functools.partial(ManifoldMixup, alpha=alpha, layers=layers, **options)
        self.model, self.target, self.inputs, self.soft_targets = model, target, inputs, soft_targets
        self.mixup: ManifoldMixup | None = None
        self._replaced: list[_Replaced] = []
        self._pause = contextlib.ExitStack()
        self._batch: tuple[Any, Any, Callable[[], object]] | None = None  # as it came, mixed, the check of its target
        self._states: dict[int, dict[str, Any]] = {}  # by rank; when training ended, or from a checkpoint
        self._loaded = False
        self._rank = 0

    # ---------------------------------------------------------------- when Lightning calls

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach: the network is built, wrapped and loaded, and the sanity check is over."""
        self._detach()
        _refuse_iterator(pl_module)
        network = self._network(pl_module)
        if network is pl_module:
            self._make(pl_module).remove()  # raises where another mixer is attached to the LightningModule itself
            network = _OwnForward(pl_module)
            self._replace(pl_module, "forward", network)
        self.mixup = self._make(network)
        # A checkpoint is gone on from, and so is an earlier fit that goes on; another training begins at the seed.
        self._rank = trainer.global_rank
        if (self._loaded or trainer.global_step) and self._rank in self._states:
            self.mixup.load_state_dict(self._states[self._rank])
        self._loaded = False
        self._replace(pl_module, "training_step", self._training_step)
        self._pause.enter_context(self.mixup.paused())

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The next ``training_step`` draws."""
        self._batch = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detach."""
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Detach: where the fit raises, Lightning calls neither ``on_train_end`` nor ``teardown``."""
        self._detach()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Detach."""
        self._detach()

    # ---------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """``ranks``: the mixer's state by rank; of this rank alone until Lightning saves a checkpoint."""
        ranks = self._states if self.mixup is None else {self._rank: self.mixup.state_dict()}
        return {"ranks": ranks} if ranks else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from ``state_dict()`` when training starts."""
        self._states, self._loaded = dict(state_dict["ranks"]), True

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Collect the states of all ranks, which draw differently; Lightning calls this on each of them."""
        own = self.state_dict()
        if own and trainer.world_size > 1:
            states: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, own["ranks"])
            checkpoint["callbacks"][self.state_key] = {"ranks": {k: v for ranks in states for k, v in ranks.items()}}

    # ---------------------------------------------------------------- how it is done

    def _replace(self, pl_module: LightningModule, name: str, call: Callable[..., Any]) -> None:
        self._replaced.append(_Replaced(pl_module, name, call))

    def _detach(self) -> None:
        while self._replaced:
            self._replaced.pop().restore()
        self._pause.close()
        self._batch = None
        if self.mixup is not None:
            self._states = {self._rank: self.mixup.state_dict()}
            self.mixup.remove()
            self.mixup = None

    def _training_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        assert self.mixup is not None
        replaced = self._replaced[-1]
        try:
            if self._batch is None or self._batch[0] is not batch:
                self._batch = (batch, *self._mix(self.mixup, batch))
            _, mixed, ready = self._batch
            # Paused but for this: under DDP Lightning calls the LightningModule around training_step, and other
            # callbacks may run the network in training mode.
            self._pause.close()
            output = replaced.original(mixed, *args, **kwargs)
            ready()
        except LayerNotReached as error:
            error.add_note(self._what_is_mixed(replaced.owner))
            raise
        except DiscoveryFailed as error:
            error.add_note(
                "ManifoldMixupCallback looked at the network with what the batch holds beside its target. If the "
                "network takes something else, say what: ManifoldMixupCallback(..., inputs=..., target=..., model=...)."
            )
            raise
        finally:
            self._pause.enter_context(self.mixup.paused())
        return output

    def _mix(self, mixup: ManifoldMixup, batch: Any) -> tuple[Any, Callable[[], object]]:
        """The batch with its target mixed, and what to ask after the step."""
        place, inputs = self._places(batch)
        if isinstance(batch[place], MixedTarget):
            raise AlreadyAttached("The target is mixed already; one ManifoldMixupCallback per Trainer is enough.")
        x: Any = {key: batch[key] for key in inputs}
        if len(inputs) == 1:
            (x,) = x.values()
        elif not isinstance(batch, Mapping):
            x = tuple(x.values())
        x, y = mixup(x, batch[place])
        rows = dict(zip(inputs, [x] if len(inputs) == 1 else x.values() if isinstance(x, dict) else x, strict=True))
        if self.soft_targets is None:
            return _with(batch, {**rows, place: y}), _nothing
        # A tensor cannot ask whether the features were mixed as it was, so that is asked after the step.
        soft = MixedTarget(y.y, y.y_partner, y.lam).soft(self.soft_targets)
        return _with(batch, {**rows, place: soft}), y.ready or _nothing

    def _places(self, batch: Any) -> tuple[Any, list[Any]]:
        """Where the target and the inputs are: indices or keys."""
        if not isinstance(batch, (Mapping, tuple, list)):
            raise BatchMismatch(
                f"The batch is a {type(batch).__name__}. ManifoldMixupCallback takes pairs (x, y), tuples, lists and "
                "mappings; for others use ManifoldMixup in training_step."
            )
        places = list(batch) if isinstance(batch, Mapping) else list(range(len(batch)))
        target = 1 if self.target is None and places == [0, 1] else self.target
        inputs = self.inputs
        if inputs is None:
            inputs = [p for p in places if p != target and next(tensors(batch[p]), None) is not None]
        wanted: list[Any] = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
        if target not in places or not wanted or any(p not in places for p in wanted):
            raise BatchMismatch(
                f"The batch is a {type(batch).__name__} of {', '.join(map(repr, places))}; its target cannot be "
                f"{target!r} with inputs {wanted}. Say where they are: "
                "ManifoldMixupCallback(..., target=..., inputs=...)."
            )
        return target, wanted

    def _network(self, pl_module: LightningModule) -> nn.Module:
        """The network inside the LightningModule; ValueError where it is not clear which that is."""
        if self.model is not None:
            named: dict[str, nn.Module] = dict(pl_module.named_modules(remove_duplicate=False))
            if self.model in named:
                return named[self.model]
            problem = f"has no module named {self.model!r}"
        elif _defines_forward(pl_module):
            return pl_module
        elif len(learning := _learning(pl_module)) == 1:
            return pl_module.get_submodule(learning[0])
        else:
            problem = "defines no forward and has not one child with parameters, so its network cannot be told"
        raise ValueError(f"{type(pl_module).__name__} {problem}. {_name_it(pl_module)}")

    def _what_is_mixed(self, pl_module: nn.Module) -> str:
        own = any(replaced.name == "forward" for replaced in self._replaced)
        what = "self(x), the LightningModule's own forward" if own else f"self.{self.model or _learning(pl_module)[0]}"
        return f"ManifoldMixupCallback mixes {what}. If training_step calls something else: {_name_it(pl_module)}"


class _OwnForward(nn.Module):
    """The LightningModule's own forward as a module, with the same parts under the same names.

    Hooks on the LightningModule itself would not do: a distributed strategy runs the whole of training_step inside a
    call of it, and ``self.forward(x)`` passes them by.
    """

    def __init__(self, pl_module: LightningModule) -> None:
        mode = pl_module.training
        # Past nn.Module.__setattr__: the owner must not become a part.
        self.__dict__.update(_owner=pl_module, _own_forward=pl_module.forward)
        super().__init__()
        self.training = mode
        self.__dict__.update({name: vars(pl_module)[name] for name in ("_modules", "_parameters", "_buffers")})

    @property
    def training(self) -> bool:
        """The LightningModule's mode."""
        return bool(self.__dict__["_owner"].training)

    @training.setter
    def training(self, mode: bool) -> None:
        self.__dict__["_owner"].training = mode

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the LightningModule's."""
        return self.__dict__["_own_forward"](*args, **kwargs)


class _Replaced:
    """A method that is replaced on one object. Copies of the object, deep or pickled, have the original."""

    def __init__(self, owner: nn.Module, name: str, call: Callable[..., Any]) -> None:
        self.original = getattr(owner, name)
        functools.update_wrapper(self, inspect.unwrap(self.original))  # Lightning reads the signature
        self.owner, self.name, self.call = owner, name, call
        self.own = name in vars(owner)
        setattr(owner, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    def restore(self) -> None:
        """Put the method back. Who has replaced this one in the meantime goes on calling the original."""
        self.call = self.original
        if vars(self.owner).get(self.name) is self:
            if self.own:
                setattr(self.owner, self.name, self.original)
            else:
                delattr(self.owner, self.name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.original, memo)

    def __reduce__(self) -> tuple[Callable[[Any], Any], tuple[Any]]:
        return _same, (self.original,)


def _same(value: Any) -> Any:
    return value


def _nothing() -> None:
    return None


def _with(batch: Any, new: dict[Any, Any]) -> Any:
    """The batch with other entries; the original is left as it was."""
    if isinstance(batch, Mapping):
        rebuilt: Any = copy.copy(batch)
        for key, value in new.items():
            rebuilt[key] = value
        return rebuilt
    items = [new.get(i, item) for i, item in enumerate(batch)]
    return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)


def _learning(pl_module: nn.Module) -> list[str]:
    return [name for name, child in pl_module.named_children() if next(child.parameters(), None) is not None]


def _name_it(pl_module: nn.Module) -> str:
    names = ", ".join(map(repr, _learning(pl_module))) or "none"
    return f"Name it, ManifoldMixupCallback(..., model=...); the children with parameters are {names}."


def _defines_forward(pl_module: nn.Module) -> bool:
    owner = next(c for c in type(pl_module).__mro__ if "forward" in vars(c))
    return "forward" in vars(pl_module) or not owner.__module__.startswith(tuple(f"{p}." for p in _PACKAGES))


def _refuse_iterator(pl_module: LightningModule) -> None:
    if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
        raise UnsupportedModel(
            "training_step takes a dataloader_iter and fetches its own batches, which a callback does not see. Take "
            "(batch, batch_idx), or call ManifoldMixup in training_step."
        )
