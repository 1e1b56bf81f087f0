"""How the tests run the benchmarks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"


def run(script: str, tmp_path: Path, *options: str) -> tuple[str, list[dict]]:
    """The script's standard output, and its records."""
    path = tmp_path / "records.jsonl"
    command = [sys.executable, f"benchmarks/{script}", "--quick", "--threads", "1", "--record", str(path), *options]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode in (0, 1), done.stderr  # 1: a target is missed, as it may be at such sizes
    return done.stdout, [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
