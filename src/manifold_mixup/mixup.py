"""ManifoldMixup: draw a layer, λ and partners for every batch, and mix exactly once in every training forward."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from manifold_mixup.cutpoints import Discovery, discover
from manifold_mixup.eligible import canonical, choose_layers, too_few_features
from manifold_mixup.errors import AlreadyAttached, LayerNotReached, MixerRemoved
from manifold_mixup.hooks import EVERY, INPUT, Drawn, Live, MaskHook, SiteHook, attach, detach
from manifold_mixup.interpolation import Plan
from manifold_mixup.look import is_graph_network
from manifold_mixup.mask_hooks import Masks
from manifold_mixup.pairing import Pairing, Partner, draw_lam, draw_partner, float64_on
from manifold_mixup.structure import arguments, map_tensors, opened, tensors
from manifold_mixup.target import MixedTarget
from manifold_mixup.validation import Layers, joins_rows, mismatch, sizes, unwrap, validate

__all__ = ["Draw", "ManifoldMixup"]


class Draw(NamedTuple):
    """What was drawn for a batch.

    ``layer``: the name of the layer, None where the batch is not mixed; with per="example" one of them per row.
    ``lam``: λ; with per="example" float64 on the CPU, shape (n,).
    ``partner``: row numbers, int64 on the CPU, shape (n,); None where the batch is not mixed.
    """

    layer: str | list[str | None] | None
    lam: float | Tensor
    partner: Tensor | None


class ManifoldMixup:
    """Manifold Mixup on any module, exact or an error.

    ::

        mixup = ManifoldMixup(model, alpha=2.0)
        for x, y in loader:
            x, y = mixup(x, y)
            loss = F.cross_entropy(model(x), y)

    The draw made by ``mixup(x, y)`` stays in force for all training forwards of the model until the next one (several
    forwards for one batch, as in SAM, mix alike). Evaluation, deep copies of the model and ``paused()`` never mix.

    Args:
        model: the network; DDP, FSDP and ``torch.compile`` wrappers are looked through.
        alpha: λ ~ Beta(α, α); 0 means no mixing.
        layers: the eligible set S: "auto" (the input and two inner cut points, found on the first batch), names as in
            ``model.named_modules()`` ("input" is the input, ``name#2`` a module's second call), or a callable that
            picks names from the list of :class:`CutPoint`. ``["input"]`` is input mixup, ``[]`` is no mixup.
        per: "batch": one layer and one λ per batch, as in the paper. "example": every pair of a random perfect
            matching draws its own.
        pairing: "random", "halves", "two-batches" (the batch is [x; x'], half of its rows come out), or a callable
            ``(y, generator) -> partner indices``.
        probability: share of the batches that are mixed.
        seed: of the mixer's own generator; None takes one from the operating system. Nothing global is read or
            advanced. In a process group the rank is mixed into the seed, so that ranks draw differently.
        check: prove that S consists of cut points. False takes your word for it, where the data flow cannot be
            followed; that every forward mixes exactly once is still enforced.

    Raises:
        ValueError, TypeError: an argument is out of range.
        UnsupportedModel: DataParallel, ScriptModule, per-example-gradient wrappers.
        AlreadyAttached: the model, or a part of it, has a mixer already.
        LayerNotFound: S names a module that does not exist.

    Source: Verma, Lamb, Beckham, Najafi, Mitliagkas, Lopez-Paz, Courville and Bengio, Manifold Mixup, ICML 2019,
    section 2.
    """

    def __init__(
        self,
        model: nn.Module,
        alpha: float = 2.0,
        layers: Layers = "auto",
        *,
        per: Literal["batch", "example"] = "batch",
        pairing: Pairing = "random",
        probability: float = 1.0,
        seed: int | None = None,
        check: bool = True,
    ) -> None:
        validate(alpha, layers, per, pairing, probability, seed, check)
        self.alpha, self.per, self.pairing, self.probability = float(alpha), per, pairing, float(probability)
        self.seed, self.check = seed, check
        self._request: Layers = layers if isinstance(layers, str) or callable(layers) else list(layers)
        self._root = unwrap(model)
        _refuse_second(self._root)
        for name in () if isinstance(self._request, str) or callable(self._request) else self._request:
            if name != INPUT:
                canonical(self._root, name)
        self._layers: list[str] | None = None
        self._regroups = is_graph_network(self._root)  # there may be one target for every graph, and rows of nodes
        self._generator: torch.Generator | None = None
        self._live = Live()
        self._handles = attach(self._root, self._live)
        # Hooks hold the state and not the mixer: one that nobody holds any more takes its hooks along.
        self._detach = weakref.finalize(self, detach, self._handles, self._live)
        self._detach.atexit = False
        self._removed = False
        self._warned = False
        self._last: Draw | None = None
        self._outputs: list[tuple[int, ...]] = []
        self._features: dict[str, int] = {}
        _ATTACHED.add(self)
        if isinstance(self._request, list) and (not check or not self._request):
            self._attach(list(self._request), None)

    # ---------------------------------------------------------------- what the user sees

    @property
    def layers(self) -> list[str] | None:
        """The eligible set S; None until it is discovered, on the first batch."""
        return None if self._layers is None else list(self._layers)

    @property
    def last(self) -> Draw | None:
        """The last draw; None before the first."""
        return self._last

    def __repr__(self) -> str:
        layers = self._request if not callable(self._request) else getattr(self._request, "__name__", "...")
        pairing = self.pairing if not callable(self.pairing) else getattr(self.pairing, "__name__", "...")
        return (
            f"ManifoldMixup({type(self._root).__name__}, alpha={self.alpha}, layers={layers!r}, per={self.per!r}, "
            f"pairing={pairing!r}, probability={self.probability}, seed={self.seed}, check={self.check})"
        )

    def __call__(self, x: Any, y: Any) -> tuple[Any, MixedTarget]:
        """Draw for one batch.

        Args:
            x: what the model takes: a tensor, a tuple of positional or a mapping of keyword arguments, n rows each; or
                n graphs of PyTorch Geometric. It comes back as it is (the first half of it where two batches are not
                mixed after all); the input, too, is mixed inside the model's forward, so that it cannot be forgotten.
            y: the targets, n rows: a tensor, or a tuple, list or mapping of tensors.

        Returns:
            ``x`` and a :class:`MixedTarget`. While the model is in eval mode the target is not mixed.

        Raises:
            BatchMismatch: x and y have different numbers of rows, or two batches an odd one.
            NotACutPoint, LayerNotReached, LayerNotFound, DataFlowLost, DiscoveryFailed: S cannot be what was asked for.
            PairingError: a pairing callable returned something else than a pairing.
            MixerRemoved: after ``remove()``.
        """
        self._refuse_if_removed()
        self._retire()
        size = self._size(x, y)
        if not self._root.training:
            return x, MixedTarget(y, y, 1.0)
        if self._layers is None:
            self._find(*arguments(x), size)
        self._warn_of_theorem(y)
        draw, partner, drawn = self._draw(size, y)
        self._last = draw
        if not drawn.plans:
            half = slice(0, partner.rows_out)
            take = (lambda t: t[half]) if partner.kind == "fold" else (lambda t: t)
            y = map_tensors(take, y)
            return map_tensors(take, x), MixedTarget(y, y, 1.0)
        self._arm(draw, partner, drawn, next(tensors(opened(x))).device)
        lam = draw.lam if isinstance(draw.lam, float) else float64_on(draw.lam, next(tensors(y)).device)
        mixed = MixedTarget(map_tensors(partner.own, y), map_tensors(partner.of, y), lam, ready=self._ready(drawn))
        return x, mixed

    def discover(self, *args: Any, **kwargs: Any) -> list[str]:
        """Find S now, on a batch as the model takes it, instead of on the first ``mixup(x, y)``.

        Needed where the model takes more than x (a second tower, a mask that is not part of x).

        Returns:
            S. Raises what ``mixup(x, y)`` raises on the first batch.
        """
        self._refuse_if_removed()
        return self._find(args, kwargs)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Training forwards inside this block do not mix: other data, statistics of batch norm, pseudo-labels."""
        before, self._live.paused = self._live.paused, True
        try:
            yield
        finally:
            self._live.paused = before

    def remove(self) -> None:
        """Detach from the model and leave no trace on it. Calling it again does nothing."""
        detach(self._handles, self._live)
        self._removed = True
        _ATTACHED.discard(self)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to draw what the uninterrupted one would have drawn.

        ``generator``: uint8 tensor; ``layers``: S, or None before the first batch.
        """
        return {"generator": self._own_generator().get_state(), "layers": self.layers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()`` of a mixer with the same arguments on the same architecture.

        Raises:
            ValueError: keys are missing or unknown, or S is another one here.
        """
        if set(state) != {"generator", "layers"}:
            raise ValueError(f"Expected the keys 'generator' and 'layers', but got {sorted(map(str, state))}.")
        layers = state["layers"]
        named = self._named() if self._layers is None else self._layers
        if layers is not None and named is not None and list(layers) != named:
            raise ValueError(f"The saved mixer had S = {list(layers)}, this one has {named}.")
        self._own_generator().set_state(state["generator"].to("cpu", torch.uint8))
        if layers is not None and self._layers is None:
            self._request = list(layers)

    def __deepcopy__(self, memo: Any) -> ManifoldMixup:
        """A copy is not attached to anything: a copied model has its teacher's role and never mixes."""
        copy = object.__new__(type(self))
        copy.__dict__.update({k: v for k, v in self.__dict__.items() if k not in ("_handles", "_live", "_detach")})
        copy._handles, copy._live, copy._removed = [], Live(), True
        return copy

    # ---------------------------------------------------------------- how it is done

    def _find(self, args: tuple[Any, ...], kwargs: dict[str, Any], labels: int | None = None) -> list[str]:
        found = discover(self._root, args, kwargs, labels)
        self._attach(choose_layers(self._root, self._request, found), found)
        return self.layers or []

    def _size(self, x: Any, y: Any) -> int:
        """How many rows are mixed: those of the targets, also where x has those of the nodes of their graphs."""
        size, labels = sizes(x, y)
        if size != labels and not self._regroups and self._layers is None and self.check:
            self._regroups = joins_rows(self._root, x, labels)
        if size != labels and (not self._regroups or self.pairing == "two-batches"):  # x has no halves to speak of
            raise mismatch(size, tuple(next(tensors(y)).shape), halves=self._regroups)
        return labels

    def _named(self) -> list[str] | None:
        """S as far as the arguments say it, in the names that it will have."""
        if isinstance(self._request, str) or callable(self._request):
            return None
        return list(dict.fromkeys(n if n == INPUT else canonical(self._root, n) for n in self._request))

    def _refuse_if_removed(self) -> None:
        if self._removed:
            raise MixerRemoved("This mixer is not attached to a model (it was removed, or is a copy). Make a new one.")

    def _own_generator(self) -> torch.Generator:
        """Seeded at the first use: by then the process knows its rank."""
        if self._generator is None:
            self._generator = torch.Generator()
            if self.seed is None:
                self._generator.seed()
            else:
                distributed = torch.distributed
                known = distributed.is_available() and distributed.is_initialized()
                rank = distributed.get_rank() if known else 0
                self._generator.manual_seed((self.seed + 0x9E3779B97F4A7C15 * rank) % 2**63)
        return self._generator

    def _attach(self, layers: list[str], found: Discovery | None) -> None:
        """Hook every module of S, once."""
        for handle in self._handles[_ROOT_HOOKS:]:
            handle.remove()
        del self._handles[_ROOT_HOOKS:]
        keys: dict[str, set[str]] = {}
        for i, name in enumerate(layers):
            if name != INPUT:
                layers[i] = canonical(self._root, name)
                keys.setdefault(layers[i].partition("#")[0], set()).add(layers[i])
        live = self._live
        live.sites = [SiteHook(live, base, frozenset(names), self._root) for base, names in keys.items()]
        self._handles += [self._root.get_submodule(s.name).register_forward_hook(s) for s in live.sites]
        self._attach_masks(layers, found)
        live.mixable = found.mixable if found else None
        live.heads = found.heads if found else None
        live.given = found.given if found else None
        self._outputs = found.outputs if found else []
        self._features = {p.name: p.features for p in found.cut_points} if found else {}
        self._layers = layers

    def _attach_masks(self, layers: list[str], found: Discovery | None) -> None:
        """Hook every module that has to be given other masks where a layer of S is mixed."""
        live = self._live
        plans = {k: found.plans[k] for k in layers if k in found.plans and found.plans[k].places} if found else {}
        live.masks = Masks(plans, found.rules) if plans and found else None
        calls = live.masks.places() if live.masks else {}
        live.mask_sites = [MaskHook(live, name, paths, self._root) for name, paths in calls.items() if name]
        self._handles += [
            self._root.get_submodule(s.name).register_forward_pre_hook(s, with_kwargs=True) for s in live.mask_sites
        ]

    def _draw(self, size: int, y: Any) -> tuple[Draw, Partner, Drawn]:
        generator, layers = self._own_generator(), self._layers or []
        # Always the same number of draws, whatever comes of them: what one batch did does not shift the next one's.
        mixes = float(torch.rand((), dtype=torch.float64, generator=generator)) < self.probability
        partner = draw_partner(self.pairing, size, generator, y, matching=self.per == "example")
        if self.per == "example":
            return self._draw_pairs(partner, mixes)
        position = float(torch.rand((), dtype=torch.float64, generator=generator))
        lam = float(draw_lam(self.alpha, generator))
        if not (layers and mixes and lam != 1.0):
            return Draw(None, 1.0, None), partner, Drawn(size)
        layer = layers[int(position * len(layers))]
        return Draw(layer, lam, partner.indices), partner, Drawn(size, {layer: Plan.mix(partner, lam)})

    def _draw_pairs(self, partner: Partner, mixes: bool) -> tuple[Draw, Partner, Drawn]:
        """Every pair of the matching draws a layer and a λ of its own; who is left alone stays unmixed."""
        generator, layers, size = self._own_generator(), self._layers or [], partner.size
        position = torch.rand(size, dtype=torch.float64, generator=generator)
        lam = draw_lam(self.alpha, generator, size)
        own = torch.arange(size)
        first = torch.minimum(own, partner.indices)  # both of a pair read the draw of its first member
        position, lam = position[first], lam[first]
        lam = torch.where(partner.indices == own, 1.0, lam)
        if not (layers and mixes and bool((lam != 1.0).any())):
            return Draw(None, 1.0, None), partner, Drawn(size)
        choice = (position * len(layers)).long()
        weights = {name: torch.where(choice == k, lam, 1.0) for k, name in enumerate(layers)}
        plans = {name: Plan.mix(partner, w) for name, w in weights.items() if bool((w != 1.0).any())}
        names = [layers[k] if w != 1.0 else None for k, w in zip(choice.tolist(), lam.tolist(), strict=True)]
        return Draw(names, lam, partner.indices), partner, Drawn(size, plans)

    def _retire(self) -> None:
        """The draw in force ends; its target still knows whether a forward mixed it."""
        live = self._live
        live.drawn.completed = live.drawn.completed or live.completed
        live.armed = live.on = live.completed = False
        live.recomputing = None

    def _arm(self, draw: Draw, partner: Partner, drawn: Drawn, device: torch.device) -> None:
        live, layers = self._live, self._layers or []
        live.drawn = drawn
        live.active = draw.layer if isinstance(draw.layer, str) else EVERY
        live.expected = 1 if live.active != EVERY else len(layers)
        live.kind, live.rows_out = partner.kind, partner.rows_out
        live.index = partner.on(device)
        inverse = partner.turned.on(device) if partner.kind in ("shift", "permutation") else None
        # The compiler takes no tensor twice: a matching is its own inverse.
        live.inverse = inverse.clone() if inverse is live.index else inverse
        if live.active == EVERY:
            # A tensor of its own for every layer: the compiler guards on which of them are the same.
            rows = partner.rows_out
            weights = {k: drawn.plans[k].own if k in drawn.plans else torch.ones(rows).double() for k in layers}
            live.lam = {k: float64_on(w, device) for k, w in weights.items() if isinstance(w, Tensor)}
        else:
            lam = float64_on(torch.tensor(draw.lam, dtype=torch.float64), device)
            live.lam = dict.fromkeys(layers, lam)
        live.armed = True

    def _ready(self, drawn: Drawn) -> Callable[[], None]:
        live = self._live

        def ready() -> None:
            # A model may compute its loss itself: then the forward has not ended, but what was drawn has been mixed.
            mixed = live.completed or (live.on and live.fired == live.expected)
            if not (drawn.completed or (live.drawn is drawn and mixed)):
                raise LayerNotReached(
                    "The loss sees mixed labels, but no training forward of the model has mixed its features since "
                    "mixup(x, y). Call the model (not its submodules) in training mode on this batch before the loss. "
                    "A compiled model that ran before the mixer was made, or another of its class that did, has to be "
                    "compiled anew: torch._dynamo.reset()."
                )

        return ready

    def _warn_of_theorem(self, y: Any) -> None:
        if self._warned or not self._features:
            return
        self._warned = True
        labels = isinstance(y, Tensor) and y.dim() == 1 and not y.is_floating_point()
        classes = next((s[0] for s in self._outputs if s), 0) if labels else 0
        for name in self._layers or []:
            if name != INPUT and self._features[name] < classes - 1:
                warnings.warn(too_few_features(name, self._features[name], classes), stacklevel=3)


_ROOT_HOOKS = 3  # handles of the hooks on the model itself come first
_ATTACHED: weakref.WeakSet[ManifoldMixup] = weakref.WeakSet()


def _refuse_second(root: nn.Module) -> None:
    parts = set(root.modules())
    for other in list(_ATTACHED):
        if other._root in parts or root in set(other._root.modules()):
            raise AlreadyAttached(
                f"{type(other._root).__name__} has a mixer already: {other!r}. Two would mix twice. "
                "Call its remove() first."
            )
