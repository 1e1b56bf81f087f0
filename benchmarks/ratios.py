"""From records to tables: ratios to plain training with their intervals, extra memory, and what was aimed at.

Needs no PyTorch: the tables of docs/results are made by the same functions as those in the terminal.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import quantile_test

PLAIN, CONTROL = "plain", "plain, second copy"
OURS, NAIVE = "ours", "naive"
AIMED_AT = ("preact_resnet18", "vit_tiny")  # whose steps, in eager bf16, are to cost 2 % more at most
DEAREST = 1.02
SMALL = 16_384  # bytes of partner indices, λ and the second loss, which come on top of the one activation
COLUMNS = ("variant", "ms", "time / plain", "95 % interval", "extra peak MB", "extra / activation")

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Ratio:
    """Median of paired ratios, its quartiles, and the 95 % interval of the median (None where rounds are too few)."""

    median: float
    quartiles: tuple[float, float]
    interval: tuple[float, float] | None


def paired_ratio(times: Sequence[float], base: Sequence[float]) -> Ratio:
    """Of two variants' times, round by round. The interval comes from order statistics and assumes no distribution."""
    ratios = [a / b for a, b in zip(times, base, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    found = quantile_test(ratios, q=1.0, p=0.5).confidence_interval(0.95)
    interval = None if math.isnan(found.low) or math.isnan(found.high) else (float(found.low), float(found.high))
    return Ratio(middle, (low, high), interval)


def ratios(record: Record) -> dict[str, Ratio]:
    """Every variant's time over plain training's."""
    base = record["seconds"][PLAIN]
    return {name: paired_ratio(times, base) for name, times in record["seconds"].items()}


def extra_memory(record: Record) -> dict[str, dict[str, tuple[int, float]]]:
    """Peak memory over plain training's: variant -> layer mixed -> bytes, and how many activations of the layer."""
    plain = record["peaks"][PLAIN][""]
    return {
        name: {layer: (peak - plain, (peak - plain) / record["activations"][layer]) for layer, peak in peaks.items()}
        for name, peaks in record["peaks"].items()
        if name != PLAIN
    }


def table(record: Record) -> str:
    """One cell's variants in rows, in Markdown. Memory: the largest over the layers that the variant mixes."""
    memory = extra_memory(record)
    lines = [f"| {' | '.join(COLUMNS)} |", f"| --- {'| ---: ' * (len(COLUMNS) - 1)}|"]
    for name, ratio in ratios(record).items():
        q, i = ratio.quartiles, ratio.interval
        extra = memory.get(name, {}).values()
        cells = (
            name,
            f"{statistics.median(record['seconds'][name]) * 1e3:.1f}",
            f"{ratio.median:.3f} [{q[0]:.3f}, {q[1]:.3f}]",
            f"{i[0]:.3f} to {i[1]:.3f}" if i else "",
            f"{max(size for size, _ in extra) / 1e6:.2f}" if extra else "",
            f"{max(share for _, share in extra):.2f}" if extra else "",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def title(record: Record) -> str:
    size = "x".join(map(str, record["batch"]))
    mixed = f", S = {', '.join(record['layers'])}" if record["layers"] else ""
    count = len(record["seconds"][PLAIN])
    return f"{record['network']}, {record['mode']}: batch {size}{mixed}; {count} rounds"


def machine(record: Record) -> str:
    """Where, with what and when, in one line."""
    m, v = record["machine"], record["versions"]
    gpu = f"{m['gpu']}, " if m["gpu"] else ""
    return (
        f"{gpu}{m['cpu']} ({m['capability']}), {m['cores']} cores, {m['threads']} threads, PyTorch {v['torch']}, "
        f"load at the end {m['load']}, {record['date']}"
    )


def aimed_at(network: str, mode: str) -> bool:
    """Whether the time of a step was aimed at in this cell."""
    return mode == "eager-bf16" and network in AIMED_AT


def targets(record: Record) -> list[tuple[bool, str]]:
    """What was aimed at in this cell, and whether it was met."""
    where = f"{record['benchmark']}, {record['network']}, {record['mode']}, {record['device']}"
    found = []
    if aimed_at(record["network"], record["mode"]):
        ratio = ratios(record)
        ours = ratio[OURS].median
        found.append((ours <= DEAREST, f"{where}: ours / plain {ours:.3f}, at most {DEAREST}"))
        if NAIVE in ratio:
            naive = ratio[NAIVE].median
            found.append((ours < naive, f"{where}: ours / plain {ours:.3f}, below naive's {naive:.3f}"))
    for layer in record["layers"]:
        size, share = extra_memory(record)[OURS][layer]
        met = size <= record["activations"][layer] + SMALL
        found.append((met, f"{where}: extra peak memory {share:.2f} activations of {layer!r}, at most 1"))
    return found


def verdicts(record: Record) -> list[str]:
    return [f"{'met' if met else 'MISSED'}: {text}" for met, text in targets(record)]


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file, one a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
