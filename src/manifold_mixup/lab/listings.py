"""The commands that list what there is: methods, measures, data sets, and where a network may be mixed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from manifold_mixup.lab.flags import DataDirOption, JsonOption, QuietOption

__all__ = ["datasets", "layers", "measures", "methods", "print_json"]

NETWORK_HELP = (
    "timm:NAME, torchvision:NAME, hf:CLASS of transformers, FILE.py:FACTORY (a function that returns the module, or "
    "the module and its inputs), or one of the lab's own such as mlp. Options follow as :key=value,..."
)


def print_json(value: Any) -> None:
    """One line of JSON on stdout."""
    typer.echo(json.dumps(value, ensure_ascii=False, allow_nan=False))


def methods(as_json: JsonOption = False) -> None:
    """List the methods that can be compared, with their options.

    Example: [bold]manifold-mixup methods[/bold]
    """
    from manifold_mixup.lab import display
    from manifold_mixup.lab.methods import METHODS

    if as_json:
        for m in METHODS.values():
            print_json({"name": m.name, "title": m.title, "source": m.source, "options": m.Options.model_json_schema()})
    else:
        rows = [(m.name, m.title, display.options_text(m.Options), m.source) for m in METHODS.values()]
        display.console().print(display.listing("methods", ("name", "what it does", "options", "source"), rows))


def measures(as_json: JsonOption = False) -> None:
    """List what can be measured on a trained network, with options and sources.

    Example: [bold]manifold-mixup measures[/bold]
    """
    from manifold_mixup.lab import display
    from manifold_mixup.lab.measures.registry import MEASURES

    if as_json:
        for m in MEASURES.values():
            facts = {"name": m.name, "title": m.title, "source": m.source, "needs": m.needs, "always": m.always}
            print_json({**facts, "options": m.options.model_json_schema()})
    else:
        rows = [
            (m.name, f"{m.title}{' (in every record)' * m.always}", display.options_text(m.options), m.source)
            for m in MEASURES.values()
        ]
        display.console().print(display.listing("measures", ("name", "what it is", "options", "source"), rows))


def datasets(data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """List the data sets, with their size, options, source and terms, and whether their files are at hand.

    Example: [bold]manifold-mixup datasets --data-dir path/to/files[/bold]
    """
    from manifold_mixup.lab import display
    from manifold_mixup.lab.data import DATASETS, Places

    there = {n: None if d.present is None else d.present(Places(data_dir)) for n, d in DATASETS.items()}
    if as_json:
        for name, d in DATASETS.items():
            facts = {**dataclasses.asdict(d.info), "present": there[name]}
            print_json({**facts, "options": d.options.model_json_schema()})
    else:
        words = {None: "no files needed", True: "files: at hand", False: "files: not here"}
        rows = [
            (
                name,
                "\n".join([d.info.title, display.size_text(d.info), words[there[name]]]),
                display.options_text(d.options),
                f"{d.info.source}; {d.info.terms}",
            )
            for name, d in DATASETS.items()
        ]
        columns = ("name", "what it is", "options", "source and terms")
        display.console().print(display.listing("data sets", columns, rows))


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
            print_json(entry)
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
