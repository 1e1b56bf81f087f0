"""What a recipe takes over from another one that it ``extends``."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

__all__ = ["inherit"]

LENGTHS = ("steps", "epochs")  # two ways to say one thing
READ_BY = {  # keys of ``train`` that one value of another key reads, and the others refuse
    "schedule": {"milestones": "step", "gamma": "step", "warmup": "one-cycle"},
    "optimizer": {"momentum": "sgd", "nesterov": "sgd"},
}


def inherit(child: Mapping[str, Any], parent: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a recipe on top of those of its parent.

    Tables are merged key by key; lists and single values of the child take the place of the parent's. Four things do
    not come along: the parent's name, which is that of its own folder of runs; the options of a data set or network
    that the child replaces by another one; the measures, if it is another data set; and what contradicts the child in
    ``train``, which is the other way to say the length, and the settings of another schedule or optimiser.

    Args:
        child: The plain values of the recipe, which may be wrong: that is for the validation to say.
        parent: The plain values of the recipe that it extends. Both are left as they are.
    """
    merged = _merge(child, {key: value for key, value in parent.items() if key != "name"})
    for kind in ("data", "model"):
        if _is_table(child.get(kind), parent.get(kind)) and merged[kind].get("name") != parent[kind].get("name"):
            merged[kind] = copy.deepcopy(dict(child[kind]))
            if kind == "data" and "measures" not in child:
                merged.pop("measures", None)
    if _is_table(child.get("train"), parent.get("train")):
        for key in set(merged["train"]) - set(child["train"]):
            if _contradicts(key, child["train"]):
                del merged["train"][key]
    return merged


def _merge(child: Mapping[str, Any], parent: Mapping[str, Any]) -> dict[str, Any]:
    """The child's keys on top of the parent's, table by table."""
    merged = copy.deepcopy(dict(parent))
    for key, value in child.items():
        both = _is_table(value, parent.get(key))
        merged[key] = _merge(value, parent[key]) if both else copy.deepcopy(value)
    return merged


def _contradicts(key: str, train: Mapping[str, Any]) -> bool:
    """Whether a key of the parent has no place beside what the child says."""
    if key in LENGTHS:
        return any(length in train for length in LENGTHS)
    return any(choice in train and key in keys and train[choice] != keys[key] for choice, keys in READ_BY.items())


def _is_table(*values: Any) -> bool:
    return all(isinstance(value, Mapping) for value in values)
