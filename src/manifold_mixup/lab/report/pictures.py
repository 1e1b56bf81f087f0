"""The spiral's pictures: reading them back, their colours, and one still figure of them for a README."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from manifold_mixup.lab.errors import CorruptedFile, UsageError
from manifold_mixup.lab.records import Record
from manifold_mixup.lab.report.collect import Experiment, Run, collect, read_arrays
from manifold_mixup.lab.report.templates import render
from manifold_mixup.lab.results import Result
from manifold_mixup.lab.storage import write_atomically

__all__ = [
    "CLASS_COLOURS",
    "SURFACE_COLOURS",
    "Pictures",
    "chosen_runs",
    "read_pictures",
    "surface_png",
    "write_figure",
]

Floats = npt.NDArray[np.floating]

CLASS_COLOURS = ("#b2182b", "#2166ac")  # the paper's red and blue, dark enough to be seen on their own surface
SURFACE_COLOURS = ((0.0, (239, 138, 98)), (0.5, (255, 255, 255)), (1.0, (103, 169, 207)))


@dataclass(frozen=True)
class Pictures:
    """The arrays of one run; see ``spiral_measures`` for their shapes and units."""

    surface: Floats
    extent: Floats
    train_x: Floats
    train_y: npt.NDArray[np.integer]
    train_hidden: Floats
    uniform_hidden: Floats
    uniform_top: Floats


def read_pictures(folder: Path) -> Pictures | None:
    """Read ``pictures.safetensors`` of a run's folder; None if there is no such file.

    Raises:
        CorruptedFile: The file is damaged, or does not hold these pictures.
        StorageError: It cannot be read.
    """
    arrays = read_arrays(folder, "pictures")
    if arrays is None:
        return None
    names = list(Pictures.__dataclass_fields__)
    lacking = [name for name in names if name not in arrays]
    if lacking:
        raise CorruptedFile(f"{folder / 'pictures.safetensors'} lacks {', '.join(lacking)}")
    points, inputs = (arrays["train_y"].size, 2), (arrays["uniform_top"].size, 2)
    shapes = {
        "extent": (4,),
        "train_x": points,
        "train_y": points[:1],
        "train_hidden": points,
        "uniform_hidden": inputs,
        "uniform_top": inputs[:1],
    }
    wrong = ["surface"] if arrays["surface"].ndim != 2 else []
    wrong += [name for name, shape in shapes.items() if arrays[name].shape != shape]
    if wrong:
        raise CorruptedFile(f"{folder / 'pictures.safetensors'} has arrays of another shape: {', '.join(wrong)}")
    return Pictures(**{name: arrays[name] for name in names})


def chosen_runs(experiment: Experiment) -> list[tuple[str, Run]]:
    """Label and run of every method, all of one seed where they have it: the first seed of the first method.

    A method without that seed is shown by its own first one, which the page says.
    """
    seed = experiment.methods[0].record.seed
    return [(m.label, m.runs.get(seed) or next(iter(m.runs.values()))) for m in experiment.methods]


def surface_png(surface: Floats) -> bytes:
    """A probability surface as a PNG with a palette of 256 colours.

    Args:
        surface: Probabilities of class 1, shape ``(height, width)``, rows from bottom to top. NaN is drawn as 0.5.

    Returns:
        The bytes of the file, rows from top to bottom.
    """
    height, width = surface.shape
    levels = np.rint(np.nan_to_num(surface[::-1].astype(np.float64), nan=0.5) * 255).clip(0, 255).astype(np.uint8)
    stops = [stop for stop, _ in SURFACE_COLOURS]
    colours = [colour for _, colour in SURFACE_COLOURS]
    ramp = np.linspace(0, 1, 256)
    palette = np.stack([np.interp(ramp, stops, [colour[c] for colour in colours]) for c in range(3)], axis=1)
    rows = np.concatenate([np.zeros((height, 1), np.uint8), levels], axis=1)  # each row starts with filter 0, none
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    chunks = (
        (b"IHDR", header),
        (b"PLTE", np.rint(palette).astype(np.uint8).tobytes()),
        (b"IDAT", zlib.compress(rows.tobytes(), 9)),
        (b"IEND", b""),
    )
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


@dataclass(frozen=True)
class _Panel:
    """One column of the figure, in the figure's own units."""

    lines: list[str]
    image: str
    inputs: list[tuple[float, float, str]]
    uniform: list[tuple[float, float]]
    hidden: list[tuple[float, float, str]]


SIDE = 190.0
UNIFORM_SHOWN = 700
LABEL = 26  # characters that fit above a column


def write_figure(records: Sequence[Record], path: Path, columns: Sequence[str] | None = None) -> Path:
    """Draw the spiral's figure as one SVG file: a column per method, decision surface above, hidden states below.

    It needs no other program and no network: the surfaces are PNG images inside the file.

    Args:
        records: Runs of one experiment that kept pictures.
        path: The SVG file to write.
        columns: Labels to draw, in this order; all methods if None.

    Returns:
        ``path``.

    Raises:
        UsageError: There are no records or pictures, several experiments, or an unknown label.
        CorruptedFile: A picture file is damaged.
        StorageError: The file cannot be written.
    """
    experiments = [
        e
        for e in collect([Result(record, {}, {}) for record in records])
        if any(read_pictures(run.folder) for _, run in chosen_runs(e))
    ]
    if len(experiments) != 1:
        raise UsageError(f"the figure shows one experiment with pictures, not {len(experiments)}")
    chosen = chosen_runs(experiments[0])
    if columns is not None:
        unknown = [label for label in columns if label not in dict(chosen)]
        if unknown:
            raise UsageError(
                f"no runs are labelled {unknown[0]!r}; there are {', '.join(label for label, _ in chosen)}"
            )
        chosen = [(label, dict(chosen)[label]) for label in columns]
    panels = []
    for label, run in chosen:
        pictures = read_pictures(run.folder)
        if pictures is not None:
            panels.append(_panel(label, run, pictures))
    seeds = sorted({run.seed for _, run in chosen})
    path = Path(path)
    write_atomically(path, render("figure.svg", panels=panels, side=SIDE, seeds=seeds, colours=CLASS_COLOURS).encode())
    return path


def _panel(label: str, run: Run, pictures: Pictures) -> _Panel:
    left, right, bottom, top = pictures.extent.tolist()
    colours = [CLASS_COLOURS[int(c)] for c in pictures.train_y]
    states = np.concatenate([pictures.train_hidden, pictures.uniform_hidden[:UNIFORM_SHOWN]]).astype(np.float64)
    finite = states[np.isfinite(states).all(axis=1)]
    low, high = (finite.min(axis=0), finite.max(axis=0)) if len(finite) else (np.zeros(2), np.ones(2))
    room = 0.04 * np.maximum(high - low, 1e-12)
    count = len(pictures.train_hidden)
    placed = _placed(states, low - room, high + room)
    inputs = _placed(pictures.train_x.astype(np.float64), np.array([left, bottom]), np.array([right, top]))
    accuracy = run.metrics.get("test_accuracy")
    return _Panel(
        lines=[
            label if len(label) <= LABEL else label[: LABEL - 1] + "…",
            "" if accuracy is None else f"test accuracy {accuracy:.1f} %",
        ],
        image=base64.b64encode(surface_png(pictures.surface)).decode(),
        inputs=[(x, y, colour) for (x, y), colour in zip(inputs, colours, strict=True)],
        uniform=[(x, y) for x, y in placed[count:] if np.isfinite([x, y]).all()],
        hidden=[(x, y, c) for (x, y), c in zip(placed[:count], colours, strict=True) if np.isfinite([x, y]).all()],
    )


def _placed(points: Floats, low: Floats, high: Floats) -> list[tuple[float, float]]:
    """Points in the figure's units, y downwards as in SVG."""
    unit = (points - low) / (high - low)
    return [(round(SIDE * float(x), 1), round(SIDE * (1 - float(y)), 1)) for x, y in unit]
