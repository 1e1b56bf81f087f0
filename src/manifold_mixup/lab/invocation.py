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
    from manifold_mixup.lab.recipe import Overrides

__all__ = ["choose_experiment", "command_line", "make_settings", "run_all"]


def command_line() -> str:
    """The command as it was typed, for the records."""
    return shlex.join(["manifold-mixup", *sys.argv[1:]])


def make_settings(
    runs: Path,
    jobs: int,
    checkpoint_every: float,
    data_dir: Path | None = None,
    devices: tuple[str, int, int] = ("auto", 1, 1),
    ray: tuple[str, str | None, float | None] = ("local", None, None),
) -> Settings:
    """How runs are carried out, as the command line says.

    Args:
        runs: ``--runs``.
        jobs: ``--jobs``.
        checkpoint_every: ``--checkpoint-every``.
        data_dir: ``--data-dir``.
        devices: ``--accelerator``, ``--devices`` and ``--nodes``.
        ray: ``--executor``, ``--ray-address`` and ``--gpus-per-run``.

    Raises:
        UsageError: They do not go together.
    """
    from manifold_mixup.lab.data import Places
    from manifold_mixup.lab.devices import Devices
    from manifold_mixup.lab.errors import UsageError
    from manifold_mixup.lab.experiment import Settings

    executor, ray_address, gpus_per_run = ray
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


def choose_experiment(
    recipe: str | None, changes: Overrides, data_dir: Path | None, name: str | None
) -> ExperimentConfig:
    """The experiment of a recipe, or of the command line alone, which ``name`` then names."""
    from manifold_mixup.lab.data import Places
    from manifold_mixup.lab.recipe import load_recipe, without_recipe

    if recipe is None:
        return without_recipe(changes, name=name, places=Places(data_dir))
    return load_recipe(recipe, changes, Places(data_dir))


def run_all(configs: Sequence[ExperimentConfig], settings: Settings, quiet: bool) -> Outcome:
    """Carry out every run of some experiments, with progress bars."""
    from manifold_mixup.lab import display
    from manifold_mixup.lab.experiment import run_experiments

    planned = sum(len(config.methods) * len(config.seeds) for config in configs)
    with display.Bars(planned, quiet=quiet or not settings.devices.first) as bars:
        return run_experiments(configs, dataclasses.replace(settings, report=bars.prepared), bars)
