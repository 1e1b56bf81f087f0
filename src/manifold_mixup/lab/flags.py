"""The options of the command line and what --help says of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "METHOD_HELP",
    "AcceleratorOption",
    "AlsoMeasureOption",
    "AlsoMeasuresOption",
    "BaselineOption",
    "ByOrderOption",
    "CheckpointOption",
    "DataDirOption",
    "DataOption",
    "DevicesOption",
    "EpochsOption",
    "ExecutorOption",
    "FigureOption",
    "FiguresOption",
    "ForeignDataOption",
    "GpusPerRunOption",
    "HostOption",
    "JobsOption",
    "JsonOption",
    "ListOption",
    "LoggerOption",
    "MarkdownOption",
    "MeasureOption",
    "MeasuresOption",
    "MethodOption",
    "MethodsOption",
    "ModelOption",
    "NameOption",
    "NodesOption",
    "OneMethodOption",
    "OnlyOption",
    "OpenOption",
    "OutputOption",
    "PortOption",
    "QuietOption",
    "RayAddressOption",
    "RecipeOption",
    "RestOfRecipeOption",
    "RunArgument",
    "RunsArgument",
    "RunsOption",
    "ScaleOption",
    "SeedOption",
    "SeedsOption",
    "SetOption",
    "ShowOption",
    "StepsOption",
    "StudyArgument",
    "TaskOption",
    "ThreadsOption",
    "TitleOption",
    "TrainExamplesOption",
    "WatchOption",
    "WeightsOption",
    "WidthOption",
    "all_of",
]


def all_of(joined: str | None, repeated: Sequence[str] | None) -> list[str]:
    """The items of an option that takes several, joined by commas, and of its twin that is repeated."""
    return [*(item for item in (joined or "").split(",") if item.strip()), *(repeated or ())]


METHOD_HELP = (
    "A method as [bold]name:key=value,...[/bold]; layer names are joined by +, label=... names it. "
    "Repeat for several; they replace the recipe's. See [bold]manifold-mixup methods[/bold]."
)

RunsOption = Annotated[Path, typer.Option("--runs", help="Folder of the runs; finished ones are not repeated.")]
SeedsOption = Annotated[str | None, typer.Option("--seeds", help="5 is seeds 0 to 4; 3,4 and 100-104 are these.")]
StepsOption = Annotated[int | None, typer.Option("--steps", help="Optimiser updates.")]
MethodOption = Annotated[list[str] | None, typer.Option("--method", "-m", help=METHOD_HELP)]
TaskOption = Annotated[
    str | None,
    typer.Option(
        "--task",
        help="What is learned, as name or name:key=value,...: classification, semi_supervised (say with "
        "--train-examples how many labels there are) or node_classification, which graphs take by themselves.",
    ),
]
DataOption = Annotated[str | None, typer.Option("--data", help="A data set as name or name:key=value,...")]
ModelOption = Annotated[str | None, typer.Option("--model", help="A network as name or name:key=value,...")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Any other key, such as train.lr=0.01. Repeatable.")]
EpochsOption = Annotated[int | None, typer.Option("--epochs", min=1, help="Passes over the training data.")]
TrainExamplesOption = Annotated[
    int | None, typer.Option("--train-examples", min=1, help="Train on so many examples, drawn balanced by class.")
]
WidthOption = Annotated[
    float | None, typer.Option("--width", help="The network's width: a factor, or units for those that count them.")
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "--threads", min=0, help="CPU threads of one run; 0 is all cores. Their number changes the last bits."
    ),
]
DataDirOption = Annotated[
    Path | None,
    typer.Option(
        "--data-dir", help="A folder that holds published data files; it is only read. Without it they are downloaded."
    ),
]
DevicesOption = Annotated[
    int, typer.Option("--devices", min=1, help="Devices that share every batch, one process each, on every machine.")
]
NodesOption = Annotated[int, typer.Option("--nodes", min=1, help="Machines; start the command on each with torchrun.")]
AcceleratorOption = Annotated[str, typer.Option("--accelerator", help="auto, cpu, cuda or mps.")]
JobsOption = Annotated[int, typer.Option("--jobs", "-j", min=0, help="Processes; 0 takes one for every core.")]
ExecutorOption = Annotated[
    str, typer.Option("--executor", help="local: processes of this machine. ray: a Ray cluster that sees --runs.")
]
RayAddressOption = Annotated[
    str | None,
    typer.Option("--ray-address", help="Of a Ray cluster, such as auto or host:6379; unset starts one here."),
]
GpusPerRunOption = Annotated[
    float | None,
    typer.Option("--gpus-per-run", min=0.0, help="GPUs, or a share of one, that Ray sets aside for each run."),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object per line on stdout, and nothing else there.")
]
LoggerOption = Annotated[
    list[str] | None,
    typer.Option("--logger", help="Write the log of each run also as csv, or for tensorboard. Repeatable."),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
CheckpointOption = Annotated[
    float,
    typer.Option("--checkpoint-every", min=0.0, help="Longest time between two checkpoints of a run, in seconds."),
]

RecipeOption = Annotated[
    str | None, typer.Option("--recipe", "-r", help="Name of a recipe, or the path of a TOML file.")
]
MethodsOption = Annotated[
    str | None, typer.Option("--methods", help="Names of methods, joined by commas; -m takes one with options.")
]
NameOption = Annotated[str | None, typer.Option("--name", help="Of the experiment: its folder under --runs.")]
FigureOption = Annotated[
    Path | None,
    typer.Option("--figure", help="Also write the pictures of the first seed as one SVG, if there are any."),
]
OneMethodOption = Annotated[str, typer.Option("--method", "-m", help=METHOD_HELP.partition(" Repeat")[0])]
SeedOption = Annotated[
    int, typer.Option("--seed", min=0, help="Of the split, the weights, the batches and the method.")
]
RestOfRecipeOption = Annotated[
    str | None, typer.Option("--recipe", "-r", help="Take everything else from this recipe.")
]

RunArgument = Annotated[
    Path, typer.Argument(metavar="RUN", help="Folder of a run, or one that holds several.", show_default=False)
]
MeasuresOption = Annotated[
    str | None, typer.Option("--measures", help="Names of measures, joined by commas; default: those of every record.")
]
MeasureOption = Annotated[
    list[str] | None,
    typer.Option("--measure", "-m", help="A measure as [bold]name:key=value,...[/bold]. Repeat for several."),
]
AlsoMeasuresOption = Annotated[
    str | None,
    typer.Option(
        "--measures",
        help="Names of measures, joined by commas, in place of the recipe's; none measures what is in every record.",
    ),
]
AlsoMeasureOption = Annotated[
    list[str] | None,
    typer.Option("--measure", help="A measure as [bold]name:key=value,...[/bold]. Repeat for several."),
]
ForeignDataOption = Annotated[
    str | None,
    typer.Option("--data", help="Measure on these in place of the run's own test data; classes match by name."),
]
WeightsOption = Annotated[
    str | None,
    typer.Option("--weights", help="last, best (on validation) or checkpoint; default: last, if there are any."),
]
ByOrderOption = Annotated[
    bool, typer.Option("--classes-by-order", help="The n-th class of --data is the n-th of the run.")
]

StudyArgument = Annotated[
    str | None,
    typer.Argument(metavar="NAME", help="A study, such as table1; --list shows them.", show_default=False),
]
ScaleOption = Annotated[
    str,
    typer.Option(
        "--scale",
        help="full: the paper's epochs; short: 200 epochs; both for a GPU. desk: a small twin for two CPU cores.",
    ),
]
OnlyOption = Annotated[
    str | None,
    typer.Option("--only", help="Labels of methods, recipes, or parts of a panel's title, joined by ';'."),
]
ShowOption = Annotated[
    bool,
    typer.Option("--show", help="Run nothing; print what is in --runs, which may be a folder of committed records."),
]
ListOption = Annotated[bool, typer.Option("--list", help="Print all studies, what has run, and what it cost.")]
MarkdownOption = Annotated[bool, typer.Option("--markdown", help="Print the tables in Markdown.")]

RunsArgument = Annotated[
    list[Path],
    typer.Argument(metavar="RUNS", help="Folders of runs, or .jsonl files with records.", show_default=False),
]
OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="The HTML file. Default: report.html in the folder RUNS if that is one, else in the current one.",
        show_default=False,
    ),
]
TitleOption = Annotated[str | None, typer.Option("--title", help="Heading of the page.")]
BaselineOption = Annotated[
    str | None, typer.Option("--baseline", help="Label of the method that the others are compared with.")
]
FiguresOption = Annotated[
    Path | None, typer.Option("--figures", help="Also write every figure into this folder, as SVG and as PNG.")
]
WatchOption = Annotated[bool, typer.Option("--watch", help="Write it again when the runs go on, until Ctrl-C.")]
PortOption = Annotated[
    int | None,
    typer.Option(
        "--port", min=0, max=65535, help="Default: 8000, or the next one that is free. 0 takes any that is free."
    ),
]
HostOption = Annotated[str, typer.Option("--host", help="Address to listen at; 0.0.0.0 is seen by the whole network.")]
OpenOption = Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")]
