"""What `import manifold_mixup` costs beside `import torch`, which it needs anyway.

    python benchmarks/import_time.py [--processes 11] [--limit 50]

Each figure is a median over fresh processes; the two kinds take turns, so that a busy machine slows both. Exits with 1
where the difference is above the limit.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

KINDS = {"import torch": "import torch", "with manifold_mixup": "import torch, manifold_mixup"}


def seconds(statement: str) -> float:
    timed = f"from time import perf_counter as now; start = now(); {statement}; print(now() - start)"
    return float(subprocess.run([sys.executable, "-c", timed], check=True, capture_output=True, text=True).stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=11, help="fresh processes of each kind (default: 11)")
    parser.add_argument("--limit", type=float, default=50.0, help="milliseconds allowed (default: 50)")
    options = parser.parse_args()
    for statement in KINDS.values():  # once unmeasured: the files come into the cache, the byte code is written
        seconds(statement)
    rounds = [{kind: seconds(statement) for kind, statement in KINDS.items()} for _ in range(options.processes)]
    medians = {kind: 1000 * statistics.median(times[kind] for times in rounds) for kind in KINDS}
    plain, ours = medians.values()
    for kind, median in medians.items():
        print(f"{kind:<20} {median:8.1f} ms   median of {options.processes} processes")
    print(f"{'difference':<20} {ours - plain:8.1f} ms   {(ours - plain) / plain:.1%}; limit {options.limit:g} ms")
    return int(ours - plain > options.limit)


if __name__ == "__main__":
    sys.exit(main())
