"""The command ``manifold-mixup``: parses, calls, prints.

Heavy modules are imported inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from manifold_mixup.lab.config import ExperimentConfig
    from manifold_mixup.lab.experiment import Outcome

__all__ = ["app", "main"]

app = typer.Typer(
    name="manifold-mixup",
    help="Manifold Mixup, compared honestly: every number stands next to its spread over seeds.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)

METHOD_HELP = (
    "A method as [bold]name:key=value,...[/bold]; layer names are joined by +, label=... names it. "
    "Repeat for several; they replace the recipe's. See [bold]manifold-mixup methods[/bold]."
)

NETWORK_HELP = (
    "timm:NAME, torchvision:NAME, hf:CLASS of transformers, FILE.py:FACTORY (a function that returns the module, or "
    "the module and its inputs), or one of the lab's own such as mlp. Options follow as :key=value,..."
)

RunsOption = Annotated[Path, typer.Option("--runs", help="Folder of the runs; finished ones are not repeated.")]
SeedsOption = Annotated[str | None, typer.Option("--seeds", help="5 is seeds 0 to 4; 3,4 and 100-104 are these.")]
StepsOption = Annotated[int | None, typer.Option("--steps", help="Optimiser updates.")]
MethodOption = Annotated[list[str] | None, typer.Option("--method", "-m", help=METHOD_HELP)]
DataOption = Annotated[str | None, typer.Option("--data", help="A data set as name or name:key=value,...")]
ModelOption = Annotated[str | None, typer.Option("--model", help="A network as name or name:key=value,...")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Any other key, such as train.lr=0.01. Repeatable.")]
JobsOption = Annotated[int, typer.Option("--jobs", "-j", min=0, help="Processes; 0 takes one for every core.")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object per line on stdout, and nothing else there.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
CheckpointOption = Annotated[
    float,
    typer.Option("--checkpoint-every", min=0.0, help="Longest time between two checkpoints of a run, in seconds."),
]


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
    outcome = _carry_out(configs, runs, jobs, quiet, checkpoint_every)
    _print_comparison(outcome, configs, runs / "demo.html", "Manifold Mixup: the demo", as_json)


@app.command()
def compare(
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="Name of a recipe, or the path of a TOML file.")],
    runs: RunsOption = Path("runs"),
    seeds: SeedsOption = None,
    steps: StepsOption = None,
    method: MethodOption = None,
    data: DataOption = None,
    model: ModelOption = None,
    settings: SetOption = None,
    figure: Annotated[
        Path | None,
        typer.Option("--figure", help="Also write the pictures of the first seed as one SVG, if there are any."),
    ] = None,
    jobs: JobsOption = 0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    checkpoint_every: CheckpointOption = 15.0,
) -> None:
    """Train every method of a recipe at every seed, and compare them with the first one.

    Example: [bold]manifold-mixup compare --recipe digits --seeds 5[/bold]

    Example: [bold]manifold-mixup compare -r digits --seeds 3,4 --runs elsewhere -m none
    -m 'manifold_mixup:alpha=2,layers=hidden.1+hidden.2,label=hidden only'[/bold]
    """
    from manifold_mixup.lab.recipe import Overrides, load_recipe

    overrides = Overrides(data, model, method or (), seeds, steps, settings or ())
    config = load_recipe(recipe, overrides)
    outcome = _carry_out([config], runs, jobs, quiet, checkpoint_every)
    if figure is not None:
        from manifold_mixup.lab.report import write_figure

        write_figure(outcome.records, figure)
    _print_comparison(outcome, [config], runs / config.name / "report.html", f"Manifold Mixup: {config.name}", as_json)


@app.command()
def train(
    data: DataOption = None,
    model: ModelOption = None,
    method: Annotated[str, typer.Option("--method", "-m", help=METHOD_HELP.partition(" Repeat")[0])] = "manifold_mixup",
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Of the split, the weights, the batches and the method.")
    ] = 0,
    recipe: Annotated[str | None, typer.Option("--recipe", "-r", help="Take everything else from this recipe.")] = None,
    runs: RunsOption = Path("runs"),
    steps: StepsOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    checkpoint_every: CheckpointOption = 15.0,
) -> None:
    """Train one network once, and measure it.

    Without a recipe the network is an MLP and the data are the digits, unless said otherwise.

    Example: [bold]manifold-mixup train --data digits --model mlp:width=128 --method manifold_mixup:alpha=2 --seed
        7[/bold]
    """
    from manifold_mixup.lab import display
    from manifold_mixup.lab.recipe import Overrides, load_recipe, without_recipe

    overrides = Overrides(data, model, [method], f"{seed},", steps, settings or ())
    if recipe is None:
        config = without_recipe("train", {"data": {"name": "digits"}, "model": {"name": "mlp"}}, overrides)
    else:
        config = load_recipe(recipe, overrides)
    outcome = _carry_out([config], runs, 1, quiet, checkpoint_every)
    for record in outcome.records:
        if as_json:
            _print_json(record.summary())
        else:
            display.console().print(display.single(record))
            typer.echo(f"run: {record.folder}")
    _raise_failures(outcome)


@app.command()
def methods(as_json: JsonOption = False) -> None:
    """List the methods that can be compared, with their options.

    Example: [bold]manifold-mixup methods[/bold]
    """
    from manifold_mixup.lab import display
    from manifold_mixup.lab.methods import METHODS

    if as_json:
        for m in METHODS.values():
            _print_json(
                {"name": m.name, "title": m.title, "source": m.source, "options": m.Options.model_json_schema()}
            )
    else:
        rows = [(m.name, m.title, display.options_text(m.Options), m.source) for m in METHODS.values()]
        display.console().print(display.listing("methods", ("name", "what it does", "options", "source"), rows))


@app.command()
def datasets(as_json: JsonOption = False) -> None:
    """List the data sets, with their options, source and terms.

    Example: [bold]manifold-mixup datasets[/bold]
    """
    from manifold_mixup.lab import display
    from manifold_mixup.lab.data import DATASETS

    if as_json:
        for d in DATASETS.values():
            _print_json({**vars(d.info), "options": d.options.model_json_schema()})
    else:
        rows = [
            (d.info.name, d.info.title, display.options_text(d.options), f"{d.info.source}; {d.info.terms}")
            for d in DATASETS.values()
        ]
        display.console().print(
            display.listing("data sets", ("name", "what it is", "options", "source and terms"), rows)
        )


@app.command()
def layers(
    network: Annotated[str, typer.Argument(metavar="NETWORK", help=NETWORK_HELP, show_default=False)],
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            help="Shape of one example, without the batch: 3,224,224; 128:int for integers, NAME=128 for an input by "
            "keyword. Repeat for several. Default: what the network was made for.",
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float, int or bool, for inputs that do not say it.")
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option("--layer", "-l", help="A layer of S, instead of those that layers='auto' takes. Repeat for more."),
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", help="A saved config.json, for hf:CLASS.")] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Also every other module call, and why it cannot be mixed.")
    ] = False,
    meta: Annotated[
        bool,
        typer.Option("--meta", help="Compute nothing and take no memory: for networks too large for this machine."),
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show where a network may be mixed, and which layers S would hold.

    Weights are drawn at random: none are downloaded, ever, for the answer does not depend on them.

    Example: [bold]manifold-mixup layers timm:resnet50[/bold]

    Example: [bold]manifold-mixup layers timm:resnet50:num_classes=10 --input 3,64,64 -l input -l layer2[/bold]

    Example: [bold]manifold-mixup layers hf:BertForSequenceClassification:num_hidden_layers=4 --input 64[/bold]

    Example: [bold]manifold-mixup layers path/to/net.py:make_net --input 3,32,32 --all[/bold]
    """
    from manifold_mixup.lab import display
    from manifold_mixup.lab.networks import build_network, survey

    with display.working(f"building {network}", quiet=quiet):
        built = build_network(network, inputs or (), dtype, config, meta=meta)
    with display.working(f"following the data through {network}", quiet=quiet):
        found = survey(built, layer or ())
    if as_json:
        for entry in found.entries(everything):
            _print_json(entry)
        return
    out = display.console()
    out.print(display.cut_point_table(f"{network}: where it may be mixed", found.points, found.layers))
    if everything:
        rows = [(refusal.name, refusal.reason) for refusal in found.refusals]
        out.print(display.listing("where it may not", ("layer", "why"), rows))
    typer.echo(f"examples: {built.described()}")
    typer.echo(f"layers={json.dumps(found.layers)}" + ("" if layer else ", which is what layers='auto' takes"))
    for note in found.notes:
        typer.echo(note)


def _carry_out(
    configs: Sequence[ExperimentConfig], runs: Path, jobs: int, quiet: bool, checkpoint_every: float
) -> Outcome:
    from manifold_mixup.lab import display
    from manifold_mixup.lab.experiment import Settings, run_experiments

    command = shlex.join(["manifold-mixup", *sys.argv[1:]])
    planned = sum(len(config.methods) * len(config.seeds) for config in configs)
    with display.Bars(planned, quiet=quiet) as bars:
        return run_experiments(configs, Settings(runs, jobs, command, checkpoint_every), bars)


def _print_comparison(
    outcome: Outcome, configs: Sequence[ExperimentConfig], page: Path, title: str, as_json: bool
) -> None:
    from manifold_mixup.lab import display
    from manifold_mixup.lab.report import write_report

    if outcome.records:
        description = " ".join(f"{config.description}." for config in configs if config.description)
        written = write_report(outcome.records, page, title, outcome.failures, description)
        if as_json:
            for record in outcome.records:
                _print_json(record.summary())
        else:
            out = display.console()
            for config in configs:
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


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False, allow_nan=False))


def main(arguments: Sequence[str] | None = None) -> None:
    """The console entry point: every error is one line on stderr and an exit code, never a stack trace.

    Exit codes: 0 done, 1 some runs failed, 2 wrong input or a full disk, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # before the parsing, so that its own errors can be debugged too; only in front of the command, as typer reads it
    debug = "--debug" in arguments[: next((i for i, a in enumerate(arguments) if not a.startswith("-")), 0)]
    with contextlib.nullcontext() if debug else _one_line_errors():
        code = app(arguments, standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)


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
    sys.exit(code)
