"""What the commands have in common: how runs are carried out, and the progress they show."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from manifold_mixup.lab.config import ExperimentConfig
    from manifold_mixup.lab.experiment import Outcome, Settings, Watcher
    from manifold_mixup.lab.measuring import Progress
    from manifold_mixup.lab.recipe import Overrides

__all__ = [
    "ExperimentPage",
    "choose_comparison",
    "choose_experiment",
    "command_line",
    "make_settings",
    "run_all",
    "shown",
]


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
    logger: Sequence[str] | None = None,
) -> Settings:
    """How runs are carried out, as the command line says.

    Args:
        runs: ``--runs``.
        jobs: ``--jobs``.
        checkpoint_every: ``--checkpoint-every``.
        data_dir: ``--data-dir``.
        devices: ``--accelerator``, ``--devices`` and ``--nodes``.
        ray: ``--executor``, ``--ray-address`` and ``--gpus-per-run``.
        logger: ``--logger``.

    Raises:
        UsageError: They do not go together.
        MissingExtra: The package of a logger is not installed.
    """
    from manifold_mixup.lab.data import Places
    from manifold_mixup.lab.devices import Devices
    from manifold_mixup.lab.errors import UsageError
    from manifold_mixup.lab.experiment import Settings
    from manifold_mixup.lab.loggers import parse

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
        loggers=parse(logger or ()),
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


def choose_comparison(
    recipe: str | None, changes: Overrides, data_dir: Path | None, name: str | None
) -> ExperimentConfig:
    """The same for ``compare``, which takes nothing for granted and renames a recipe, too.

    Raises:
        UsageError: Neither a recipe nor data are named.
    """
    if recipe is None and changes.data is None:
        from manifold_mixup.lab.errors import UsageError

        raise UsageError("say what to compare: --recipe NAME, or --data NAME with --model and --methods")
    if recipe is not None and name is not None:
        changes = dataclasses.replace(changes, settings=[*changes.settings, f"name={name}"])
    return choose_experiment(recipe, changes, data_dir, name)


@dataclasses.dataclass(frozen=True)
class ExperimentPage:
    """The page of some experiments, as far as their runs have come.

    Attributes:
        configs: The experiments.
        runs: Folder of all experiments.
        path: The HTML file.
        title: Heading of the page.
    """

    configs: Sequence[ExperimentConfig]
    runs: Path
    path: Path
    title: str

    def write(self) -> Path:
        """Write it as things stand, and return its path.

        Raises:
            StorageError: It cannot be written.
        """
        from manifold_mixup.lab.report.page import write_report
        from manifold_mixup.lab.report.sources import planned_runs

        return write_report(planned_runs(self.configs, self.runs), self.path, self.title)


def run_all(
    configs: Sequence[ExperimentConfig], settings: Settings, quiet: bool, page: ExperimentPage | None = None
) -> Outcome:
    """Carry out every run of some experiments and measure it with what they list, with progress bars.

    Args:
        configs: The experiments.
        settings: How their runs are carried out.
        quiet: Show no bars.
        page: Is written again while the runs go on; the last write is the caller's.
    """
    from manifold_mixup.lab.experiment import run_experiments
    from manifold_mixup.lab.measuring import measure_outcome

    with shown(configs, settings, quiet, page) as (settings, watcher, progress):
        outcome = run_experiments(configs, settings, watcher)
        return measure_outcome(outcome, configs, settings, progress)


@contextlib.contextmanager
def shown(
    configs: Sequence[ExperimentConfig], settings: Settings, quiet: bool, page: ExperimentPage | None = None
) -> Iterator[tuple[Settings, Watcher, Progress]]:
    """Progress bars, and a page that is written again, for as long as runs go on; of several processes, by the first.

    Args:
        configs: The experiments.
        settings: How their runs are carried out.
        quiet: Show no bars.
        page: The page, if there is one.

    Returns:
        The settings, a watcher of the runs, and what is told how far the measuring is.
    """
    from manifold_mixup.lab import display

    planned = sum(len(config.methods) * len(config.seeds) for config in configs)
    bars = display.Bars(planned, quiet=quiet or not settings.devices.first)
    settings = dataclasses.replace(settings, report=bars.prepared)
    if page is None or not settings.devices.first:
        with bars:
            yield settings, bars, bars.prepared
        return
    from manifold_mixup.lab.report.live import Both, LivePage

    with LivePage(page.write) as live, bars:

        def progress(what: str, done: int, total: int) -> None:
            bars.prepared(what, done, total)
            live.progressed()

        yield settings, Both(bars, live), progress
