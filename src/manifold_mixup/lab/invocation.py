"""What the commands have in common: how runs are carried out, and the progress they show."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from manifold_mixup.lab.config import ExperimentConfig
    from manifold_mixup.lab.experiment import Outcome, Settings

__all__ = ["command_line", "make_settings", "run_all"]


def command_line() -> str:
    """The command as it was typed, for the records."""
    return shlex.join(["manifold-mixup", *sys.argv[1:]])


def make_settings(
    runs: Path,
    jobs: int,
    checkpoint_every: float,
    data_dir: Path | None = None,
    devices: tuple[str, int, int] = ("auto", 1, 1),
    *,
    executor: str = "local",
    ray_address: str | None = None,
    gpus_per_run: float | None = None,
) -> Settings:
    """How runs are carried out, as the command line says."""
    from manifold_mixup.lab.data import Places
    from manifold_mixup.lab.devices import Devices
    from manifold_mixup.lab.errors import UsageError
    from manifold_mixup.lab.experiment import Settings

    if executor not in ("local", "ray"):
        raise UsageError(f"--executor {executor!r} should be local or ray")
    for option, value in (("--ray-address", ray_address), ("--gpus-per-run", gpus_per_run)):
        if value is not None and executor != "ray":
            raise UsageError(f"{option} is read by --executor ray only")
    return Settings(
        runs,
        jobs,
        command_line(),
        checkpoint_every,
        Places(data_dir),
        Devices(*devices),
        executor=executor,  # type: ignore[arg-type]
        ray_address=ray_address,
        gpus_per_run=gpus_per_run,
    )


def run_all(configs: Sequence[ExperimentConfig], settings: Settings, quiet: bool) -> Outcome:
    """Carry out every run of some experiments, with progress bars."""
    from manifold_mixup.lab import display
    from manifold_mixup.lab.experiment import run_experiments

    planned = sum(len(config.methods) * len(config.seeds) for config in configs)
    with display.Bars(planned, quiet=quiet or not settings.devices.first) as bars:
        return run_experiments(configs, dataclasses.replace(settings, report=bars.prepared), bars)
