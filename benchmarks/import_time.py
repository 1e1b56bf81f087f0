"""What `import manifold_mixup` costs beside `import torch`, which it needs anyway.

    python benchmarks/import_time.py [--processes 11] [--limit 50]

Medians over fresh processes; the two kinds take turns, so that a busy machine slows both. Importing torch takes a
second or more, and on a busy machine two medians of it differ by more than we cost. So the difference is not taken
between processes: each one of the second kind also says what it needed once torch was there. Exits with 1 where the
median of that is above the limit.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

PLAIN = "import torch; torch_there = now()"
OURS = "import torch; torch_there = now(); import manifold_mixup"


def milliseconds(statements: str) -> tuple[float, float]:
    """Of all the statements, and of what comes after torch."""
    script = (
        f"from time import perf_counter as now; start = now(); {statements}; end = now(); "
        "print(1000 * (end - start), 1000 * (end - torch_there))"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    total, after = map(float, done.stdout.split())
    return total, after


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=11, help="fresh processes of each kind (default: 11)")
    parser.add_argument("--limit", type=float, default=50.0, help="milliseconds allowed (default: 50)")
    options = parser.parse_args()
    milliseconds(OURS)  # unmeasured: the files come into the cache, the byte code is written
    rounds = [(milliseconds(PLAIN), milliseconds(OURS)) for _ in range(options.processes)]
    plain = statistics.median(torch_alone[0] for torch_alone, _ in rounds)
    ours = statistics.median(both[0] for _, both in rounds)
    after = [both[1] for _, both in rounds]
    difference = statistics.median(after)
    print(f"medians of {options.processes} fresh processes each")
    print(f"import torch                        {plain:8.1f} ms")
    print(f"import torch; import manifold_mixup {ours:8.1f} ms")
    print(f"difference, in the same process     {difference:8.1f} ms   ({min(after):.1f} to {max(after):.1f})")
    print(f"limit                               {options.limit:8.1f} ms")
    return int(difference > options.limit)


if __name__ == "__main__":
    sys.exit(main())
