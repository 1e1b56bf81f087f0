"""What a training costs: the time of a step and the peak memory. Measurements of a machine, not results."""

from __future__ import annotations

import statistics
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch

__all__ = ["Meter"]

KEPT = 200  # steps, the last ones, that the time of a step is taken from
MIB = 2**20


class Meter:
    """Measures from its making on; one per training.

    Args:
        device: What is trained on.
        proc: Where Linux tells about this process.
    """

    def __init__(self, device: torch.device, proc: Path = Path("/proc/self")) -> None:
        self._device, self._proc = device, proc
        self._begun = 0.0
        self._seconds: deque[float] = deque(maxlen=KEPT)
        if device.type == "cuda":
            torch.cuda.init()  # type: ignore[no-untyped-call]  # without it there are no statistics to reset
            torch.cuda.reset_peak_memory_stats(device)
        self._reset = device.type == "cuda" or _reset_peak(proc)

    def begin(self) -> None:
        """One step or several follow, the device has nothing left to do."""
        self._begun = time.perf_counter()

    def end(self, steps: int) -> None:
        """So many steps are over, on the device too; each counts with their mean time."""
        self._seconds.extend([(time.perf_counter() - self._begun) / steps] * steps)

    def facts(self) -> dict[str, Any]:
        """What the record says.

        Returns:
            ``step_seconds``: median wall time of the last steps, in seconds, without validation and checkpoints; None
            if there were none. On a GPU, which lags behind, what one step takes is the mean over the steps between two
            moments at which it is waited for.
            ``peak_memory_mib``: the most memory since the meter was made, in MiB; None where the system does not tell.
            ``peak_memory_of``: ``"device"``, what PyTorch held on the GPU, or ``"process"``, all that the process had
            in memory, which includes the interpreter, the data, and what earlier runs in it have left.
        """
        if self._device.type == "cuda":
            peak: float | None = torch.cuda.max_memory_allocated(self._device) / MIB
        else:
            peak = _read_peak(self._proc) if self._reset else None
        return {
            "step_seconds": float(f"{statistics.median(self._seconds):.4g}") if self._seconds else None,
            "peak_memory_mib": None if peak is None else round(peak, 1),
            "peak_memory_of": "device" if self._device.type == "cuda" else "process",
        }


def _reset_peak(proc: Path) -> bool:
    """Let the peak of the process's memory begin anew; whether that was possible."""
    try:
        (proc / "clear_refs").write_text("5", encoding="ascii")
    except OSError:  # not Linux, or not allowed
        return False
    return True


def _read_peak(proc: Path) -> float | None:
    """The peak of the process's resident memory in MiB, or None."""
    try:
        lines = (proc / "status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))  # in kB, which are KiB
    except (OSError, StopIteration, ValueError, IndexError):
        return None
