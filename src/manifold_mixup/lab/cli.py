"""The command ``manifold-mixup``: parses, calls, prints.

Heavy modules are imported inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manifold_mixup.lab.flags import (
    AcceleratorOption,
    AlsoMeasureOption,
    AlsoMeasuresOption,
    ByOrderOption,
    CheckpointOption,
    DataDirOption,
    DataOption,
    DevicesOption,
    EpochsOption,
    ExecutorOption,
    FigureOption,
    ForeignDataOption,
    GpusPerRunOption,
    JobsOption,
    JsonOption,
    LoggerOption,
    MeasureOption,
    MeasuresOption,
    MethodOption,
    MethodsOption,
    ModelOption,
    NameOption,
    NodesOption,
    OneMethodOption,
    QuietOption,
    RayAddressOption,
    RecipeOption,
    RestOfRecipeOption,
    RunArgument,
    RunsOption,
    SeedOption,
    SeedsOption,
    SetOption,
    StepsOption,
    TaskOption,
    ThreadsOption,
    TrainExamplesOption,
    WeightsOption,
    WidthOption,
    all_of,
)
from manifold_mixup.lab.invocation import (
    ExperimentPage,
    choose_comparison,
    choose_experiment,
    command_line,
    make_settings,
    run_all,
)
from manifold_mixup.lab.listings import datasets, layers, measures, methods, print_json
from manifold_mixup.lab.report_command import board, report
from manifold_mixup.lab.reproduce_command import reproduce

if TYPE_CHECKING:
    from manifold_mixup.lab.experiment import Outcome, Settings

__all__ = ["app", "main"]

app = typer.Typer(
    name="manifold-mixup",
    help="Manifold Mixup, compared honestly: every number stands next to its spread over seeds.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"manifold-mixup {version('manifold-mixup')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the stack trace of an error.")] = False,
) -> None:
    pass


@app.command()
def demo(
    runs: RunsOption = Path("runs"),
    seeds: SeedsOption = "3",
    jobs: JobsOption = 0,
    logger: LoggerOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    checkpoint_every: CheckpointOption = 15.0,
) -> None:
    """Compare no mixup, input mixup and Manifold Mixup on the spiral and on handwritten digits, in a few minutes.

    Ctrl-C stops it; the same command goes on from there.

    Example: [bold]manifold-mixup demo[/bold]
    """
    from manifold_mixup.lab.recipe import Overrides, load_recipe

    keep = ("none", "input_mixup", "manifold_mixup")
    configs = [load_recipe(name, Overrides(seeds=seeds, keep=keep)) for name in ("spiral", "digits")]
    page = ExperimentPage(configs, runs, runs / "demo.html", "Manifold Mixup: the demo")
    _compare(page, make_settings(runs, jobs, checkpoint_every, logger=logger), quiet, as_json)


@app.command()
def compare(
    recipe: RecipeOption = None,
    task: TaskOption = None,
    data: DataOption = None,
    data_dir: DataDirOption = None,
    train_examples: TrainExamplesOption = None,
    model: ModelOption = None,
    width: WidthOption = None,
    methods: MethodsOption = None,
    method: MethodOption = None,
    seeds: SeedsOption = None,
    epochs: EpochsOption = None,
    steps: StepsOption = None,
    settings: SetOption = None,
    measures: AlsoMeasuresOption = None,
    measure: AlsoMeasureOption = None,
    runs: RunsOption = Path("runs"),
    name: NameOption = None,
    figure: FigureOption = None,
    jobs: JobsOption = 0,
    threads: ThreadsOption = None,
    executor: ExecutorOption = "local",
    ray_address: RayAddressOption = None,
    gpus_per_run: GpusPerRunOption = None,
    accelerator: AcceleratorOption = "auto",
    devices: DevicesOption = 1,
    nodes: NodesOption = 1,
    logger: LoggerOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    checkpoint_every: CheckpointOption = 15.0,
) -> None:
    """Train several methods at several seeds, and compare them with the first one.

    What to train is a recipe, or what --data, --model and --methods say. A run can be stopped at any moment, killed
    even; the same command goes on from there and ends with the same numbers.

    Example: [bold]manifold-mixup compare --recipe digits --seeds 5[/bold]

    Example: [bold]manifold-mixup compare --data cifar10 --train-examples 10000 --model preact_resnet18 --width 0.25
    --methods none,input_mixup,manifold_mixup --seeds 3 --epochs 40[/bold]

    Example: [bold]manifold-mixup compare --data folder:photos,size=64 --model timm:resnet18 -m none
    -m 'manifold_mixup:alpha=2,layers=layer1+layer2,label=hidden only'[/bold]

    Example: [bold]manifold-mixup compare --task semi_supervised --data mnist --train-examples 100 -m none -m ict[/bold]

    Example: [bold]manifold-mixup compare --data cora --methods none,graphmix --seeds 20[/bold]
    """
    from manifold_mixup.lab.recipe import Overrides

    changes = Overrides(data=data, model=model, seeds=seeds, steps=steps, epochs=epochs, settings=settings or ())
    changes = dataclasses.replace(changes, task=task, train_examples=train_examples, width=width, threads=threads)
    changes = dataclasses.replace(changes, methods=all_of(methods, method), measures=all_of(measures, measure))
    config = choose_comparison(recipe, changes, data_dir, name)
    where, ray = (accelerator, devices, nodes), (executor, ray_address, gpus_per_run)
    how = make_settings(runs, jobs, checkpoint_every, data_dir, where, ray, logger)
    page = ExperimentPage([config], runs, runs / config.name / "report.html", f"Manifold Mixup: {config.name}")
    _compare(page, how, quiet, as_json, figure)


def _compare(page: ExperimentPage, how: Settings, quiet: bool, as_json: bool, figure: Path | None = None) -> None:
    """Carry out the experiments of a page, and print how their methods compare."""
    outcome = run_all(page.configs, how, quiet, page)
    if how.devices.first:
        _print_comparison(outcome, page, as_json, figure)


@app.command()
def train(
    task: TaskOption = None,
    data: DataOption = None,
    data_dir: DataDirOption = None,
    train_examples: TrainExamplesOption = None,
    model: ModelOption = None,
    width: WidthOption = None,
    method: OneMethodOption = "manifold_mixup",
    seed: SeedOption = 0,
    recipe: RestOfRecipeOption = None,
    epochs: EpochsOption = None,
    steps: StepsOption = None,
    settings: SetOption = None,
    runs: RunsOption = Path("runs"),
    threads: ThreadsOption = None,
    accelerator: AcceleratorOption = "auto",
    devices: DevicesOption = 1,
    nodes: NodesOption = 1,
    logger: LoggerOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    checkpoint_every: CheckpointOption = 15.0,
) -> None:
    """Train one network once, and measure it.

    Without a recipe the data are the digits, and the network is a PreActResNet18 for images and an MLP for anything
    else, unless said otherwise.

    Example: [bold]manifold-mixup train --data digits --model mlp:width=128 --method manifold_mixup:alpha=2 --seed
        7[/bold]

    Example: [bold]manifold-mixup train --data cifar10 --model wrn_28_10 --threads 0[/bold]

    Example: [bold]torchrun --nproc-per-node 4 --no-python manifold-mixup train --data cifar100 --devices 4[/bold]
    """
    from manifold_mixup.lab import display
    from manifold_mixup.lab.recipe import Overrides

    changes = Overrides(data=data, model=model, methods=[method], seeds=f"{seed},", settings=settings or ())
    changes = dataclasses.replace(changes, steps=steps, epochs=epochs, width=width, threads=threads)
    changes = dataclasses.replace(changes, task=task, train_examples=train_examples)
    config = choose_experiment(recipe, changes, data_dir, "train")
    how = make_settings(runs, 1, checkpoint_every, data_dir, (accelerator, devices, nodes), logger=logger)
    outcome = run_all([config], how, quiet)
    if not how.devices.first:
        return
    for record in outcome.records:
        if as_json:
            print_json(record.summary())
        else:
            display.console().print(display.single(record))
            typer.echo(f"run: {record.folder}")
    _raise_failures(outcome)


@app.command()
def evaluate(
    run: RunArgument,
    measures: MeasuresOption = None,
    measure: MeasureOption = None,
    data: ForeignDataOption = None,
    data_dir: DataDirOption = None,
    weights: WeightsOption = None,
    classes_by_order: ByOrderOption = False,
    threads: ThreadsOption = 0,
    accelerator: AcceleratorOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure trained networks, finished or not, on their own test data or on yours.

    The numbers are added to evaluations.jsonl in the folder of the run. See [bold]manifold-mixup measures[/bold].

    Example: [bold]manifold-mixup evaluate runs/train/manifold_mixup/seed-0 --measures fgsm,deformations[/bold]

    Example: [bold]manifold-mixup evaluate runs/train --data folder:photos_of_others --weights best
    -m knn:layer=features[/bold]
    """
    import os

    import torch

    from manifold_mixup.lab import display
    from manifold_mixup.lab.config import Component
    from manifold_mixup.lab.data import Places
    from manifold_mixup.lab.devices import Devices
    from manifold_mixup.lab.errors import UsageError
    from manifold_mixup.lab.evaluation import evaluate_run, find_runs, parse_measures
    from manifold_mixup.lab.recipe import parse_component, parse_data

    if weights not in (None, "last", "best", "checkpoint"):
        raise UsageError(f"--weights {weights!r} should be last, best or checkpoint")
    listed = all_of(measures, measure)
    requests = parse_measures([parse_component(text, "--measure") for text in listed])
    foreign = None if data is None else Component.model_validate(parse_data(data))
    torch.set_num_threads(threads or os.cpu_count() or 1)
    found = []
    for folder in find_runs(run):
        with display.working(f"measuring {folder}", quiet=quiet):
            found.append(
                evaluate_run(
                    folder,
                    requests,
                    weights=weights,  # type: ignore[arg-type]
                    data=foreign,
                    by_order=classes_by_order,
                    places=Places(data_dir),
                    devices=Devices(accelerator),
                    command=command_line(),
                )
            )
    if as_json:
        for evaluation in found:
            print_json(evaluation.summary())
    else:
        display.print_measured(found)


for command in (reproduce, report, board, methods, measures, datasets, layers):
    app.command()(command)


def _print_comparison(outcome: Outcome, page: ExperimentPage, as_json: bool, figure: Path | None = None) -> None:
    from manifold_mixup.lab import display
    from manifold_mixup.lab.report import write_figure

    if figure is not None:
        write_figure(outcome.records, figure)
    written = page.write()
    if as_json:
        for record in outcome.records:
            print_json(record.summary())
    else:
        out = display.console()
        for config in page.configs:
            for table in display.comparison([r for r in outcome.records if r.experiment == config.name]):
                out.print(table)
        typer.echo(f"page: {written}")
    _raise_failures(outcome)


def _raise_failures(outcome: Outcome) -> None:
    from manifold_mixup.lab.errors import RunsFailed

    if outcome.failures:
        first = outcome.failures[0]
        total = len(outcome.failures) + len(outcome.records)
        which = f"{first.label}, seed {first.seed}"
        raise RunsFailed(f"{len(outcome.failures)} of {total} runs failed; the first: {which}: {first.error}")
    if outcome.unmeasured:
        first = outcome.unmeasured[0]
        some = f"{len(outcome.unmeasured)} of {len(outcome.records)} runs could not be measured"
        raise RunsFailed(f"{some}; the first: {first.label}, seed {first.seed}: {first.error}")


def main(arguments: Sequence[str] | None = None) -> None:
    """The console entry point: every error is one line on stderr and an exit code, never a stack trace.

    Exit codes: 0 done, 1 some runs failed, 2 wrong input or a full disk, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # before the parsing, so that its own errors can be debugged too; only in front of the command, as typer reads it
    debug = "--debug" in arguments[: next((i for i, a in enumerate(arguments) if not a.startswith("-")), 0)]
    with contextlib.nullcontext() if debug else _one_line_errors():
        code = app(arguments, standalone_mode=False)
        _leave(code if isinstance(code, int) else 0)


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted; the same command goes on from the last checkpoints", 130)
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has gone; so has the reason to say anything
        sys.exit(1)
    except Exception as error:
        from manifold_mixup.errors import ManifoldMixupError

        if callable(getattr(error, "format_message", None)):  # typer's own usage errors
            _fail(error.format_message(), getattr(error, "exit_code", 2))  # type: ignore[attr-defined]
        if isinstance(error, (ManifoldMixupError, OSError)):
            _fail(str(error), getattr(error, "exit_code", 2))
        _fail(f"{type(error).__name__}: {error} (this is a bug; --debug shows where)", 2)


def _fail(message: str, code: int) -> None:
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    _leave(code)


def _leave(code: int) -> None:
    if "manifold_mixup.lab.devices" in sys.modules:  # else nothing was trained
        from manifold_mixup.lab.devices import leave

        leave(code)
    sys.exit(code)
