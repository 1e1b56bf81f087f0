"""One small network of every family of timm: can it be mixed, is that exact, and what does finding S cost?

    python docs/results/families.py                  # measure all; goes on where it was interrupted (make models)
    python docs/results/families.py --only resnet    # measure some again
    python docs/results/families.py --page           # families.jsonl -> families.md, nothing measured

One record per family goes to families.jsonl beside this file, and the table made of them to families.md. What is
measured, and on which networks, is in tests/integration/families.py. Needs timm (the extra `vision`).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECORDS, PAGE = HERE / "families.jsonl", HERE / "families.md"
TESTS = HERE.parents[1] / "tests"
MOST, TYPICAL = 4.0, 2.0  # forwards of a batch that discovery may take: for any family, and in the middle
Record = dict[str, Any]


def read(path: Path) -> dict[str, Record]:
    """The records of a file by family; none where there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {record["family"]: record for record in map(json.loads, lines)}


def write(records: Iterable[Record]) -> None:
    """The records and their page, families in alphabetical order."""
    records = sorted(records, key=lambda r: r["family"])
    RECORDS.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    PAGE.write_text(page(records), encoding="utf-8")


def ratio(record: Record) -> float:
    """Discovery in forwards."""
    return float(record["discovery_s"] / record["forward_s"])


def problems(records: list[Record]) -> list[str]:
    """What must not be: failures, and discovery that takes too long."""
    found = [f"{r['family']}: {r['failure']}" for r in records if r["failure"]]
    timed = [r for r in records if "discovery_s" in r]
    found += [
        f"{r['family']}: discovery takes {ratio(r):.1f} forwards, more than {MOST:g}" for r in timed if ratio(r) > MOST
    ]
    middle = statistics.median(map(ratio, timed)) if timed else 0.0
    return found if middle <= TYPICAL else [*found, f"half of all families take more than {middle:.1f} forwards"]


# ---------------------------------------------------------------- the page


def page(records: list[Record]) -> str:
    """The whole of families.md."""
    good = [r for r in records if not r["failure"]]
    ratios = [ratio(r) for r in good]
    forced = [f for r in good for f in r["forced"]]
    listed = [f["error"] for f in forced if f["listed"]]
    verdicts = _verdicts(forced)
    alone = [r["family"] for r in good if r["layers"] == ["input"]]
    versions = " and ".join(sorted({f"PyTorch {r['versions']['torch']}, timm {r['versions']['timm']}" for r in good}))
    return f"""# Networks: one of every family of timm

Written by `make models` (docs/results/families.py) from families.jsonl; {versions}, one thread.

Of every module of `timm.models` that registers networks, {len(records)} in all, the smallest network (timm's own test
models left out) is built with ten classes and random parameters, on small images where it takes them, and S is left to
the library (`layers="auto"`).

* **S**: the layers found beside the input. {_alone(alone)}
* **error**: with λ = 0 mixing at a layer of S must give the network's output for the partners. The number is the
  largest relative difference over S, in float64, with every parameter drawn at random so that no branch is silent; at
  most {max(r["exact_error"] for r in good):.0e} over all families.
* **forced**: up to six calls that discovery listed as cut points, and up to six that it did not, are mixed by a plain
  hook. Of the {len(listed)} listed, every one gave the output for the partners (error at most {max(listed):.0e}).
  Of the {verdicts.total()} others, {verdicts["cut"] or "none"} did: {verdicts["bypassed"]} gave something else, so that
  something goes past them, and {verdicts["unused"] or "none"} left the output as it was.
* **discovery**: the time that finding S takes, in forwards of a batch of 32 (evaluation, no gradient):
  {min(ratios):.1f} to {max(ratios):.1f}, median {statistics.median(ratios):.1f}. It is spent once per training.

{table(records)}
"""


def _alone(families: list[str]) -> str:
    if not families:
        return "Every family has some."
    return f"There is none in {', '.join(families)}, for the reason given; input mixup remains."


def _verdicts(forced: list[Record]) -> Counter[str]:
    """What came of mixing where discovery did not list a cut point."""
    return Counter(f["verdict"] for f in forced if not f["listed"])


HEADS = (
    "family",
    "network",
    "input",
    "parameters (M)",
    "cut points",
    "S beside the input",
    "forward (ms)",
    "discovery (forwards)",
    "error",
    "forced: listed + others",
    "remark",
)


def table(records: list[Record]) -> str:
    """One row per family."""
    lines = ["| " + " | ".join(HEADS) + " |", "| " + " | ".join(["---"] * len(HEADS)) + " |"]
    lines += ["| " + " | ".join(_row(r)) + " |" for r in records]
    return "\n".join(lines)


def _row(r: Record) -> list[str]:
    first = [r["family"], r["network"], "x".join(map(str, r["input"]))]
    if r["failure"]:
        return [*first, *[""] * (len(HEADS) - 4), "**failed:** " + r["failure"].strip().splitlines()[-1]]
    others = _verdicts(r["forced"])
    layers = [f"`{name}`" for name in r["layers"] if name != "input"]
    unused = [f"{others['unused']} of the others unused"] if others["unused"] else []
    remarks = [f"{key}={value}" for key, value in r["options"].items() if key != "img_size"]
    return [
        *first,
        f"{r['parameters'] / 1e6:.1f}",
        str(r["cut_points"]),
        ", ".join(layers) or "none",
        f"{r['forward_s'] * 1e3:.0f}",
        f"{ratio(r):.1f}",
        f"{r['exact_error']:.0e}" if r["exact_error"] else "0",
        f"{len(r['forced']) - others.total()} + {others.total()}",
        "; ".join([*remarks, *unused, *([r["reason"]] if r["reason"] else [])]),
    ]


# ---------------------------------------------------------------- measuring


def measure(families: list[str], progress: Path) -> dict[str, Record]:
    """Append a record per family to ``progress``; families that it holds already are left as they are."""
    sys.path[:0] = [str(TESTS), str(TESTS / "integration")]
    import torch

    from support import define_torchvision_operators

    define_torchvision_operators()
    torch.set_num_threads(1)
    import timm
    from families import examine

    versions = {"torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version()}
    done = read(progress)
    progress.parent.mkdir(parents=True, exist_ok=True)
    for family in families:
        if family in done:
            continue
        start = time.process_time()
        done[family] = record = examine(family, clock=True) | {"versions": versions}
        with progress.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        result = (record["failure"] or f"S = {record['layers']}, discovery {ratio(record):.1f} forwards").strip()
        print(f"{family:28}{time.process_time() - start:6.1f} s  {result}", flush=True)
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="FAMILY", help="measure these again and keep the other records")
    parser.add_argument("--page", action="store_true", help="measure nothing")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where an unfinished run is kept")
    arguments = parser.parse_args()
    records = read(RECORDS)
    if not arguments.page:
        from_table = _table_of_networks()
        unknown = sorted(set(arguments.only or ()) - set(from_table))
        if unknown:
            parser.error(f"no such family: {', '.join(unknown)}; there are {', '.join(from_table)}")
        progress = arguments.runs / ("families-only.jsonl" if arguments.only else "families.jsonl")
        if arguments.only:
            progress.unlink(missing_ok=True)
        found = measure(arguments.only or from_table, progress)
        records = records | found if arguments.only else found
        progress.unlink()
    write(records.values())
    wrong = problems(list(records.values()))
    print("\n".join(wrong) or f"{len(records)} families, nothing wrong")
    return bool(wrong)


def _table_of_networks() -> list[str]:
    sys.path[:0] = [str(TESTS / "integration")]
    from family_table import FAMILIES

    return list(FAMILIES)


if __name__ == "__main__":
    sys.exit(main())
