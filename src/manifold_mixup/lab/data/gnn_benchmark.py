"""Graphs of Shchur et al. 2018 (arXiv 1811.05868): who wrote papers with whom, what was bought with what.

One npz file a set. There is no published split: nodes are drawn by class, and all of the graph is used, as in PyTorch
Geometric, not only its largest connected part, as in the paper.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from manifold_mixup.lab.data.archives import PublishedFile, read_verified, silent
from manifold_mixup.lab.data.base import DataInfo, Dataset, DataSplits, Places, Report
from manifold_mixup.lab.data.graphs import GraphOptions, PublishedGraph, RandomSplit, draw_split, graph_splits
from manifold_mixup.lab.data.matrices import CsrMatrix, read_number_pickle
from manifold_mixup.lab.data.published import FileSet, from_mirrors
from manifold_mixup.lab.errors import CorruptedFile

__all__ = [
    "AMAZON_PHOTO",
    "AMAZON_PHOTO_FILES",
    "COAUTHOR_CS",
    "COAUTHOR_CS_FILES",
    "BenchmarkFiles",
    "BenchmarkOptions",
    "benchmark",
]


class BenchmarkOptions(GraphOptions):
    """How many nodes are drawn, by the run's seed."""

    labels_per_class: int = Field(default=20, ge=1, description="training nodes of each class")
    validation_per_class: int = Field(default=30, ge=0, description="nodes of each class to validate on")
    test_examples: int | None = Field(
        default=None, ge=1, description="nodes to test on, drawn before the others; unset takes all that are left"
    )

    @property
    def sizes(self) -> RandomSplit:
        """Of the split."""
        return RandomSplit(
            self.labels_per_class,
            validation_per_class=self.validation_per_class,
            test_examples=self.test_examples,
        )


class BenchmarkFiles:
    """Where a set lies: in the published file, or in a copy that holds the same matrices under other names.

    The copy is Li's (https://github.com/EdisonLeeeee/GraphData): scipy's matrices, pickled inside the npz file.
    """

    def __init__(self, published: FileSet, copy: FileSet) -> None:
        self.published, self.copy = published, copy

    def present(self, places: Places) -> bool:
        """Whether one of the two is at hand; no file is read."""
        return self.published.present(places) or self.copy.present(places)

    def bring(self, places: Places, report: Report = silent) -> tuple[PublishedFile, Path]:
        """The file that is at hand; if there is none, the published one is downloaded.

        Raises:
            As :meth:`FileSet.bring`.
        """
        chosen = self.published
        if not self.published.present(places) and self.copy.present(places):
            chosen = self.copy
        (file,) = chosen.files
        return file, chosen.bring(places, report)[file.name]


def benchmark(info: DataInfo, files: BenchmarkFiles) -> Dataset:
    """The registry entry of an npz file.

    Args:
        info: The set's facts.
        files: Where it lies.
    """

    def load(chosen: BenchmarkOptions, seed: int, places: Places) -> DataSplits:
        file, path = files.bring(places)
        graph = _read(read_verified(path, file), path)
        graph.check(info, path)
        split = draw_split(graph.labels, info.classes, chosen.sizes, seed)
        return graph_splits(info, graph, split, chosen.features)

    def prepare(chosen: BenchmarkOptions, places: Places, report: Report) -> None:
        files.bring(places, report)

    return Dataset(info=info, options=BenchmarkOptions, load=load, prepare=prepare, present=files.present)


def _read(content: bytes, path: Path) -> PublishedGraph:
    """Read an npz file of either kind. What else lies in it, such as the names of the nodes, is not looked at.

    Raises:
        CorruptedFile: It is no npz file, or lacks something.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as packed:
            if "adj_matrix.npy" in packed.namelist():
                adjacency, features = (_pickled(packed, name, path) for name in ("adj_matrix", "node_attr"))
                labels = _array(packed, "node_label")
            else:
                adjacency, features = (_matrix(packed, name) for name in ("adj", "attr"))
                labels = _array(packed, "labels")
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        KeyError,
        NotImplementedError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise CorruptedFile(f"{path} is no npz file of a graph: {error}") from error
    if adjacency.shape[0] != adjacency.shape[1]:
        raise CorruptedFile(f"{path}: the edges of a graph are no matrix of shape {adjacency.shape}")
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise CorruptedFile(
            f"{path}: the labels are {labels.dtype} of shape {labels.shape}, not a number for each node"
        )
    return PublishedGraph(features, adjacency.places[:, adjacency.data != 0], labels.astype(np.int64))


def _array(packed: zipfile.ZipFile, name: str) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = np.lib.format.read_array(io.BytesIO(packed.read(f"{name}.npy")), allow_pickle=False)
    return array


def _matrix(packed: zipfile.ZipFile, name: str) -> CsrMatrix:
    """A matrix that lies in four arrays, as published."""
    rows, columns = map(int, _array(packed, f"{name}_shape"))
    return CsrMatrix((rows, columns), *(_array(packed, f"{name}_{part}") for part in ("data", "indices", "indptr")))


def _pickled(packed: zipfile.ZipFile, name: str, path: Path) -> CsrMatrix:
    """A matrix that lies in an array of one object, as in the copy; the pickle is read as Planetoid's are."""
    member = io.BytesIO(packed.read(f"{name}.npy"))
    np.lib.format.read_magic(member)
    np.lib.format.read_array_header_1_0(member)
    value = read_number_pickle(member.read(), path)
    if not isinstance(value, CsrMatrix):
        raise ValueError(f"{name} holds a {type(value).__name__}, not a sparse matrix")
    return value


MIRRORS = (
    "https://github.com/shchur/gnn-benchmark/raw/master/data/npz",
    "https://raw.githubusercontent.com/shchur/gnn-benchmark/master/data/npz",
)


def _files(name: str, published: PublishedFile, copy: PublishedFile, folders: tuple[str, ...]) -> BenchmarkFiles:
    folders = ("graphs", "gnn-benchmark/data/npz", "GraphData/datasets", *folders)
    otherwise = f"{copy.name} of https://github.com/EdisonLeeeee/GraphData is read in its place"
    return BenchmarkFiles(FileSet(name, (published,), folders, otherwise=otherwise), FileSet(name, (copy,), folders))


COAUTHOR_CS_FILES = _files(
    "coauthor_cs",
    PublishedFile(
        "ms_academic_cs.npz",
        urls=from_mirrors(MIRRORS, "ms_academic_cs.npz"),
        sha256="933c745734e78908c7eb77172a673fee0503f30e26e5a99b36814d88534c42e3",
    ),
    PublishedFile("coauthor_cs.npz", sha256="7b7b51bf270d341f1c4231834c58a526bb04db003fd76a6d2f51ad7d252005ed"),
    ("CS/raw", "Coauthor/CS/raw"),
)

AMAZON_PHOTO_FILES = _files(
    "amazon_photo",
    PublishedFile(
        "amazon_electronics_photo.npz",
        urls=from_mirrors(MIRRORS, "amazon_electronics_photo.npz"),
        sha256="bdb1feb8e6ff42ee44024b04479145029c563fd42fc31bff80af20887ba0439a",
    ),
    PublishedFile("amazon_photo.npz", sha256="bdb98b54cd3125bfa69b23ba0aae84fabcb770c6727175b8f6eb1d64f3be4b2b"),
    ("Photo/raw", "Amazon/Photo/raw"),
)

SOURCE = "https://github.com/shchur/gnn-benchmark"

COAUTHOR_CS = benchmark(
    DataInfo(
        name="coauthor_cs",
        title="Coauthor CS: 18,333 authors in computer science and 81,894 pairs who wrote a paper together, one graph",
        shape=(6805,),
        classes=(
            "bioinformatics",
            "machine_learning",
            "computer_vision",
            "NLP",
            "graphics",
            "networks",
            "security",
            "databases",
            "data_mining",
            "game_theory",
            "HCI",
            "information_theory",
            "medical_informatics",
            "robotics",
            "theoretical_cs",
        ),
        features=("6,805 keywords: in how many of the author's papers",),
        source=SOURCE,
        terms="MIT (Mumme and Shchur 2018); cite Shchur, Mumme, Bojchevski and Günnemann 2018",
        nodes=18_333,
    ),
    COAUTHOR_CS_FILES,
)

AMAZON_PHOTO = benchmark(
    DataInfo(
        name="amazon_photo",
        title="Amazon Photo: 7,650 products and 119,081 pairs that are often bought together, one graph",
        shape=(745,),
        classes=(
            "Film Photography",
            "Digital Cameras",
            "Binoculars & Scopes",
            "Lenses",
            "Tripods & Monopods",
            "Video Surveillance",
            "Lighting & Studio",
            "Flashes",
        ),
        features=("745 words of reviews: there or not",),
        source=SOURCE,
        terms="MIT (Mumme and Shchur 2018); cite Shchur, Mumme, Bojchevski and Günnemann 2018, McAuley et al. 2015",
        nodes=7650,
    ),
    AMAZON_PHOTO_FILES,
)
