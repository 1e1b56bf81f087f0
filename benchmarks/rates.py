"""From records of `training.py` to tables: images/s, how many times as fast, and the share of the machine's peak.

Needs no PyTorch: the tables of docs/results are made by the same functions as those in the terminal.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from ratios import Ratio, paired_ratio

OURS, TWIN = "ours", "authors' style"
LEAST = {"cpu": 2.5, "cuda": 5.0}  # times as fast as the twin
COLUMNS = (
    "variant",
    "precision",
    "ms a step",
    "images/s",
    "times as fast",
    "95 % interval",
    "TFLOP/s",
    "of the bf16 peak",
    "of the fp32 peak",
)

Record = Mapping[str, Any]


def images_per_second(record: Record) -> dict[str, float]:
    """By variant: images of a step over the median time of a step."""
    return {name: record["batch"][0] / statistics.median(times) for name, times in record["seconds"].items()}


def speed_up(record: Record) -> Ratio:
    """Times as fast as the twin: its time over ours in the same round."""
    return paired_ratio(record["seconds"][TWIN], record["seconds"][OURS])


def flops_per_second(record: Record) -> dict[str, float]:
    """By variant: operations of the network's forward and backward; the rest of a step counts as time alone."""
    return {name: rate * record["flops_per_image"] for name, rate in images_per_second(record).items()}


def peak_shares(record: Record, name: str) -> dict[str, float]:
    """A variant's operations per second as shares of the matrix peaks; of fp32's only if it computes in fp32."""
    done = flops_per_second(record)[name]
    peaks = record["peaks"]
    return {key: done / peaks[key] for key in peaks if key == "bf16" or record["precisions"][name] == key}


def summary(record: Record) -> dict[str, Any]:
    """What the tables show, as numbers."""
    ratio = speed_up(record)
    return {
        "images_per_second": images_per_second(record),
        "flops_per_second": flops_per_second(record),
        "peak_shares": {name: peak_shares(record, name) for name in record["seconds"]},
        "speed_up": {"median": ratio.median, "quartiles": ratio.quartiles, "interval": ratio.interval},
        "targets": [{"met": met, "text": text} for met, text in targets(record)],
    }


def title(record: Record) -> str:
    size = "x".join(map(str, record["batch"]))
    width = "" if record["width"] == 1 else f", width {record['width']:g}"
    form = ", compiled" if record["compiled"] else ""
    return f"{record['method']}{form}, {record['device']}: {record['network']}{width}, batch {size}"


def conditions(record: Record) -> str:
    """What was compared, in one line."""
    count, peaks = len(record["seconds"][OURS]), record["peaks"]
    mixed = f"S = {', '.join(record['layers'])}, alpha = {record['alpha']:g}; " if record["layers"] else ""
    return (
        f"{mixed}{count} rounds, in each {record['steps']} steps of both in turn; {record['workers']} workers load for "
        f"the twin; {record['images']:,} images ({record['data']}), crops with padding {record['padding']} and flips; "
        f"{record['parameters']:,} parameters, {record['flops_per_image'] / 1e9:.3f} GFLOP an image; peak of matrix "
        f"products {peaks['bf16'] / 1e12:.2f} TFLOP/s in bf16, {peaks['fp32'] / 1e12:.2f} in fp32"
    )


def table(record: Record) -> str:
    """The variants in rows, in Markdown."""
    ratio, rates, done = speed_up(record), images_per_second(record), flops_per_second(record)
    lines = [f"| {' | '.join(COLUMNS)} |", f"| --- | --- {'| ---: ' * (len(COLUMNS) - 2)}|"]
    for name, times in record["seconds"].items():
        shares, q, i = peak_shares(record, name), ratio.quartiles, ratio.interval
        cells = (
            name,
            record["precisions"][name],
            f"{statistics.median(times) * 1e3:.1f}",
            f"{rates[name]:.1f}",
            f"{ratio.median:.2f} [{q[0]:.2f}, {q[1]:.2f}]" if name == OURS else "1",
            f"{i[0]:.2f} to {i[1]:.2f}" if name == OURS and i else "",
            f"{done[name] / 1e12:.3f}",
            *(f"{shares[key]:.1%}" if key in shares else "" for key in ("bf16", "fp32")),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def targets(record: Record) -> list[tuple[bool, str]]:
    """What was aimed at, and whether it was met."""
    found, least = speed_up(record).median, LEAST[record["device"]]
    return [(found >= least, f"{title(record)}: {found:.2f} times as fast as the twin, at least {least:g}")]


def verdicts(record: Record) -> list[str]:
    return [f"{'met' if met else 'MISSED'}: {text}" for met, text in targets(record)]
