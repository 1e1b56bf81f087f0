"""The hooks that put united masks in the place of the two examples' own, from the layer of the mixing on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from manifold_mixup.errors import BatchMismatch, NotACutPoint
from manifold_mixup.interpolation import Plan
from manifold_mixup.masks import MaskPlan, Place, Rule, kept, unite
from manifold_mixup.structure import Path, at, paths, replace_at

if TYPE_CHECKING:
    from manifold_mixup.hooks import Drawn, Live

__all__ = ["Masks", "refuse_new_masks"]


class Masks:
    """What is known about the masks of one model, and those of the forward that runs.

    ``plans``: for every layer of S that masks reach past, what has to happen. ``own``: united masks, what each of
    them stands for, and the layers whose rows are united in it. ``held``: the masks that tell which positions of a
    hidden state are padding.
    """

    def __init__(self, plans: Mapping[str, MaskPlan], rules: Mapping[Place, Rule]) -> None:
        self.plans = dict(plans)
        self.rules = dict(rules)
        self.root = self.places().get("", {}).get("", [])  # of the model itself
        self.own: list[tuple[Tensor, Tensor, tuple[str, ...]]] = []
        self.held: dict[Place, Tensor] = {}

    def places(self) -> dict[str, dict[str, list[Path]]]:
        """For every module: the paths to look at, for each of its calls."""
        found: dict[str, dict[str, list[Path]]] = {}
        for place in sorted({p for plan in self.plans.values() for p in plan.places}, key=repr):
            key, path = place
            found.setdefault(key.partition("#")[0], {}).setdefault(key, []).append(path)
        return found

    def begin(self) -> None:
        """A forward begins."""
        self.own = []
        self.held = {}

    def holds(self, tensor: Tensor) -> bool:
        """Whether this is a mask that was put in the place of another, and no features."""
        return any(united is tensor for united, _, _ in self.own)

    def enter(self, live: Live, drawn: Drawn, key: str, paths: list[Path], arguments: Any) -> Any:
        """The (args, kwargs) of a module call with the masks that it has to see."""
        for path in paths:
            given = at(arguments, path)
            if not isinstance(given, Tensor) or not given.dim():
                continue  # no padding in this batch: no mask was made
            place = (key, path)
            own, before = next(((mine, keys) for united, mine, keys in self.own if united is given), (given, ()))
            self.held[place] = own
            layers = tuple(k for k in live.layers_now(drawn) if k in self.plans and self._unites(k, place, before))
            if layers == before or own.shape[0] != drawn.size:
                continue
            new = self._united(live, drawn, layers, own, self.rules[place]) if layers else own
            if layers:
                self.own.append((new, own, layers))
            arguments = replace_at(arguments, path, new)
        return arguments

    def _unites(self, layer: str, place: Place, before: tuple[str, ...]) -> bool:
        """Whether a row that is mixed at ``layer`` sees the union here; ``before``: the layers whose rows came so."""
        plan = self.plans[layer]
        return place in plan.unite or (layer in before and place not in plan.restore)

    def _united(self, live: Live, drawn: Drawn, layers: tuple[str, ...], own: Tensor, how: Rule) -> Tensor:
        """The union for the rows that are mixed at one of ``layers``, the own mask for all others."""
        traced = torch.compiler.is_compiling()
        weights = [live.lam[k] if traced else drawn.plans[k].own for k in layers]
        lam = weights[0]
        for weight in weights[1:]:  # every row has one layer, and weight 1 at all others
            assert isinstance(lam, Tensor)
            assert isinstance(weight, Tensor)
            lam = torch.minimum(lam, weight)
        if isinstance(lam, Tensor):
            lam = lam.to(own.device)
        mine, other = _pair(live, None if traced else drawn.plans[layers[0]], own)
        both = unite(mine, other, lam, how)
        if how.nested:
            _check_nested(both, mine, other)
        return both

    def mix(
        self, live: Live, plan: Plan | None, key: str, number: int, hidden: Tensor, mix: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Mix a hidden state whose padded positions count as zero, in the rows of which both parts count.

        What is padding in both parts is left as it is in the first: zeros there would have no variance, and what
        normalises them would blow up their gradient.

        Args:
            live: the state of the mixer.
            plan: of the draw; None while it is compiled.
            key: the cut.
            number: which of the mixed tensors of the cut this is.
            hidden: shape (n, ...).
            mix: what mixes it.
        """
        keeps = self.plans[key].keep if key in self.plans else ()
        found = keeps[number] if number < len(keeps) else None
        mask = None if found is None else self.held.get(found[0])
        weight: Any = live.lam[key] if plan is None else plan.own
        if found is None or mask is None or mask.shape[0] != hidden.shape[0]:
            return mix(hidden)
        if not isinstance(weight, Tensor) and weight == 0.0:
            return mix(hidden)  # only the partners count, and they are not mixed with anything
        place, dim = found
        keep = kept(mask.to(hidden.device), self.rules[place], hidden.shape[dim])
        if keep.shape[1] != hidden.shape[dim]:
            return mix(hidden)
        mine, other = _pair(live, plan, keep)
        neither = ~(mine | other)
        if isinstance(weight, Tensor):
            alone = ((weight == 1.0) | (weight == 0.0)).to(keep.device)
            alone = alone.view(-1, 1) if alone.dim() else alone
            keep, neither = keep | alone, neither & ~alone
        shape = [1] * hidden.dim()
        shape[0], shape[dim] = keep.shape
        mixed = mix(hidden.masked_fill(~keep.view(shape), 0.0))
        shape[0] = neither.shape[0]
        return torch.where(neither.view(shape), hidden[: neither.shape[0]], mixed)


def _pair(live: Live, plan: Plan | None, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of weight λ, and those of their partners; without a plan as torch.compile traces it."""
    if plan is not None:
        return plan.partner.own(rows), plan.partner.of(rows)
    if live.kind == "fold":
        mine, other = rows.chunk(2)
        return mine, other
    assert live.index is not None
    return rows, rows.index_select(0, live.index)


def _check_nested(both: Tensor, own: Tensor, other: Tensor) -> None:
    """The model counts positions, and the count of a union is known only if it is one of the two."""
    one = ((both == own).flatten(1).all(1) | (both == other).flatten(1).all(1)).all()
    message = (
        "The model counts positions by its mask, and two masks of which neither holds the other (padding on different "
        "sides, or in the middle) have a union that it would count differently. Pad all examples on one "
        "side, or leave the layers that the mask reaches past out of S."
    )
    if torch.compiler.is_compiling():
        torch._assert_async(one, message)
    elif not bool(one):
        raise BatchMismatch(message)


def refuse_new_masks(live: Live, arguments: Any) -> None:
    """A mask, or lengths, not there when the cut points were found, would not be united."""
    if live.given is None:
        return
    for path, tensor in paths(arguments):
        if path in live.given or not tensor.dim() or tensor.shape[0] != live.drawn.size:
            continue
        name = next((step for step in reversed(path) if isinstance(step, str)), "")
        called = "mask" in name.lower() or (tensor.dim() == 1 and "length" in name.lower())
        if called or (not name and not tensor.is_floating_point()):
            what = repr(name) if name else f"an argument at position {path[1]}"
            raise NotACutPoint(
                live.active,
                f"the model is given {what}, which it was not given when the cut points were found, so whether it "
                "reaches past this layer is not known. Pass x to mixup(x, y) as the model is called, as a dict of "
                "all its inputs; or call mixup.discover(**x).",
            )
