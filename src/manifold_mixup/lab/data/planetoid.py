"""Cora, Citeseer and Pubmed: papers that cite each other, in the files and the split of Yang et al. 2016.

Eight files a set (arXiv 1603.08861): ``allx`` and ``ally`` hold features and labels of the first nodes, ``x`` and ``y``
those of the training nodes, which are the first of them, ``tx`` and ``ty`` those of the test nodes, whose numbers are
in ``test.index``; ``graph`` holds the neighbours of each node. The 500 nodes after the training nodes are the
validation split of Kipf and Welling 2017 (arXiv 1609.02907). 15 of Citeseer's nodes are in no file but ``graph``: they
have neighbours, but neither features nor labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from manifold_mixup.lab.data.archives import PublishedFile, read_verified
from manifold_mixup.lab.data.base import DataInfo, Dataset, DataSplits, Places, Report
from manifold_mixup.lab.data.graphs import (
    NO_LABEL,
    GraphOptions,
    PublishedGraph,
    RandomSplit,
    Split,
    draw_split,
    graph_splits,
)
from manifold_mixup.lab.data.matrices import CsrMatrix, read_number_pickle
from manifold_mixup.lab.data.published import FileSet, from_mirrors
from manifold_mixup.lab.errors import CorruptedFile

__all__ = [
    "CITESEER",
    "CITESEER_FILES",
    "CORA",
    "CORA_FILES",
    "PUBMED",
    "PUBMED_FILES",
    "PlanetoidOptions",
    "planetoid",
]

T = TypeVar("T")

LABELS, VALIDATION, TEST = 20, 500, 1000  # of the published split: of each class, and in all
INDEX = "test.index"


class PlanetoidOptions(GraphOptions):
    """Which nodes are trained on, validated on and tested."""

    split: Literal["standard", "random"] = Field(
        default="standard", description="the published nodes, or others, drawn by the run's seed"
    )
    labels_per_class: int | None = Field(
        default=None, ge=1, description=f"for split 'random': training nodes of each class; unset takes {LABELS}"
    )
    validation_examples: int | None = Field(
        default=None, ge=0, description=f"for split 'random': nodes to validate on; unset takes {VALIDATION}"
    )
    test_examples: int | None = Field(
        default=None, ge=1, description=f"for split 'random': nodes to test on; unset takes {TEST:,}"
    )

    @model_validator(mode="after")
    def _no_ignored_key(self) -> PlanetoidOptions:
        sizes = ("labels_per_class", "validation_examples", "test_examples")
        given = [key for key in sizes if getattr(self, key) is not None]
        if self.split == "standard" and given:
            raise ValueError(f"{' and '.join(given)}: read by split 'random' only")
        return self

    @property
    def sizes(self) -> RandomSplit:
        """Of a random split."""
        chosen = {"labels_per_class": LABELS, "validation_examples": VALIDATION, "test_examples": TEST}
        chosen |= {key: value for key in chosen if (value := getattr(self, key)) is not None}
        return RandomSplit(**chosen)


@dataclass(frozen=True)
class _Files:
    """The content of the eight files."""

    x: CsrMatrix
    y: npt.NDArray[Any]
    tx: CsrMatrix
    ty: npt.NDArray[Any]
    allx: CsrMatrix
    ally: npt.NDArray[Any]
    pairs: npt.NDArray[np.int64]
    test: npt.NDArray[np.int64]


def planetoid(info: DataInfo, files: FileSet, validation: int = VALIDATION) -> Dataset:
    """The registry entry of eight files.

    Args:
        info: The set's facts.
        files: The files, ``ind.NAME.x`` to ``ind.NAME.test.index``.
        validation: How many nodes after the training nodes are the validation split.
    """

    def read(places: Places) -> tuple[PublishedGraph, Split]:
        paths = files.bring(places)
        content = _read(files, paths)
        path = next(iter(paths.values())).parent
        graph = _assembled(content, info, path)
        graph.check(info, path)
        first, known = len(content.y), len(content.ally)
        if first + validation > known:
            raise CorruptedFile(
                f"{path}: {known} nodes come before the test nodes, fewer than {first} to train and {validation} to "
                "validate on"
            )
        return graph, (np.arange(first), np.arange(first, first + validation), content.test)

    def load(chosen: PlanetoidOptions, seed: int, places: Places) -> DataSplits:
        graph, split = read(places)
        if chosen.split == "random":
            split = draw_split(graph.labels, info.classes, chosen.sizes, seed)
        return graph_splits(info, graph, split, chosen.features)

    def prepare(chosen: PlanetoidOptions, places: Places, report: Report) -> None:
        files.bring(places, report)

    return Dataset(info=info, options=PlanetoidOptions, load=load, prepare=prepare, present=files.present)


def _read(files: FileSet, paths: Mapping[str, Path]) -> _Files:
    contents = {
        file.name.split(".", 2)[2]: (read_verified(paths[file.name], file), paths[file.name]) for file in files.files
    }

    def pickled(name: str, kind: type[T]) -> T:
        content, path = contents[name]
        value = read_number_pickle(content, path)
        if not isinstance(value, kind):
            raise CorruptedFile(f"{path} holds a {type(value).__name__}, not a {kind.__name__}")
        return value

    neighbours = pickled("graph", dict)
    counts = [len(near) for near in neighbours.values()]
    first = np.repeat(np.fromiter(neighbours, np.int64, len(counts)), counts)
    second = np.fromiter(chain.from_iterable(neighbours.values()), np.int64, sum(counts))
    return _Files(
        x=pickled("x", CsrMatrix),
        y=pickled("y", np.ndarray),
        tx=pickled("tx", CsrMatrix),
        ty=pickled("ty", np.ndarray),
        allx=pickled("allx", CsrMatrix),
        ally=pickled("ally", np.ndarray),
        pairs=np.stack([first, second]),
        test=_index(*contents[INDEX]),
    )


def _index(content: bytes, path: Path) -> npt.NDArray[np.int64]:
    try:
        return np.array([int(line) for line in content.split()], dtype=np.int64)
    except (OverflowError, ValueError) as error:
        raise CorruptedFile(f"{path} should hold a node's number in each line: {error}") from error


def _assembled(files: _Files, info: DataInfo, path: Path) -> PublishedGraph:
    """Put the nodes in their order: those of ``allx``, then the test nodes where ``test.index`` says.

    Raises:
        CorruptedFile: The files do not fit each other, or a node has no or several classes.
    """
    known, test = files.allx.shape[0], files.test
    for what, features, classes in (
        ("x", files.x, files.y),
        ("tx", files.tx, files.ty),
        ("allx", files.allx, files.ally),
    ):
        if classes.shape != (features.shape[0], files.ally.shape[-1]) or features.shape[1] != files.allx.shape[1]:
            raise CorruptedFile(
                f"{path}: {what} has shape {features.shape} and labels of shape {classes.shape}, which do not fit each "
                "other or the other files"
            )
        if not np.isin(classes, (0, 1)).all() or (classes.sum(axis=1) != 1).any():
            raise CorruptedFile(f"{path}: the labels of {what} do not give each node one class")
    if not np.array_equal(files.y, files.ally[: len(files.y)]):
        raise CorruptedFile(f"{path}: the training nodes are not the first of all nodes")
    if len(test) != files.tx.shape[0] or len(np.unique(test)) != len(test):
        raise CorruptedFile(f"{path}: {INDEX} should name as many different nodes as tx has, {files.tx.shape[0]}")
    if not len(test) or test.min() < known or test.max() != info.nodes - 1:
        raise CorruptedFile(f"{path}: {INDEX} should name nodes from {known} to {info.nodes - 1}, the last of all")
    labels = np.full(info.nodes, NO_LABEL, dtype=np.int64)
    labels[:known], labels[test] = files.ally.argmax(axis=1), files.ty.argmax(axis=1)
    return PublishedGraph(_stacked(files, info.nodes), files.pairs, labels)


def _stacked(files: _Files, nodes: int) -> CsrMatrix:
    """The features of all nodes; those beside the test nodes that no file describes have none."""
    row = np.concatenate([files.allx.rows, files.test[files.tx.rows]])
    order = np.argsort(row, kind="stable")
    indices = np.concatenate([files.allx.indices, files.tx.indices])[order]
    ends = np.cumsum(np.bincount(row, minlength=nodes))
    return CsrMatrix(
        (nodes, files.allx.shape[1]),
        np.concatenate([files.allx.data, files.tx.data])[order],
        indices,
        np.concatenate([np.zeros(1, np.int64), ends]),
    )


MIRRORS = (
    "https://github.com/kimiyoung/planetoid/raw/master/data",
    "https://raw.githubusercontent.com/kimiyoung/planetoid/master/data",
    "https://github.com/shchur/gnn-benchmark/raw/master/data/planetoid",
)


def _files(name: str, library: str, sums: Mapping[str, str]) -> FileSet:
    """Eight files, by their sha256; ``library`` is the folder of PyTorch Geometric."""
    named = {f"ind.{name}.{part}": sha256 for part, sha256 in sums.items()}
    return FileSet(
        name=name,
        files=tuple(
            PublishedFile(file, urls=from_mirrors(MIRRORS, file), sha256=sha256) for file, sha256 in named.items()
        ),
        folders=("planetoid", "planetoid/data", "graphs", f"{library}/raw", f"Planetoid/{library}/raw"),
    )


CORA_FILES = _files(
    "cora",
    "Cora",
    {
        "x": "23cfa55d91c6f624233f5eb7b6e3f141f1bd2b2ae39608a63cf5d084bb27baab",
        "y": "94465c14eb53e04ca262198dcbb2521ee8af60fb3f3d546cd6ca24a511b0e7d1",
        "tx": "b9afbaa4a400df991f6f02ef677e1e44da55ffc04801fd02f9e673987829226a",
        "ty": "41f5ac76596a1699cc33f53084a2419e92961c42bb75f36fc38e616d348532ad",
        "allx": "9419ba2f26f5c35243db64aba110e0f35a04851609e0dc5433450676ca6b8543",
        "ally": "2b998f5cc7fedc86e7f97ca2498f47a1ffc1462c29e2d578b23bf3f62b6e7d71",
        "graph": "58f13302f39dde8852dad6fe6d15b89b077b6d7f837626bce671ef80344b383d",
        "test.index": "297ce89af2b51a6a194181c7dbe1796c6a1cf9cd9349a88383b1b1e227867875",
    },
)

CITESEER_FILES = _files(
    "citeseer",
    "CiteSeer",
    {
        "x": "d20de19150741e555de0ed037195630fc194114ebc7fd72ced62810148aa22f6",
        "y": "8ba87e515d8e3ee3cf52f6d2c5b86aa73f11ecad825a808455209ec26cd54924",
        "tx": "539a8906a2da97628d212f2fdd668c109a8b3f0d36574b59e5d3fd5b5303da21",
        "ty": "55e5bd1ba1e733a04598753ad1a8d57957f4b8f89e74519f41f4f4938767e4ce",
        "allx": "2ac30345d95c9ec933a817ee0bdd6a5f077f8c184a20e696910192d534414668",
        "ally": "f704b2d986dde6c2669934de1f3ae5696a6cf9455c0f6b2646a2d135ea0a1c95",
        "graph": "d79a4ef9d3e7169aee8946145f6b7306e35bc79bffad26346cfb94e10e9912a7",
        "test.index": "2af990671580b6b2df5d158d1038f8292e30c9cd821b5453f399659b25b723d4",
    },
)

PUBMED_FILES = _files(
    "pubmed",
    "PubMed",
    {
        "x": "fbe9cb5c47200d1b7769a26e579be3b7130b556831f9d850e77c4c74f2599b33",
        "y": "e6c807633307a07ed659249006536a147c7999c797f11a2560752990181b41b3",
        "tx": "4eb5f5d0f30f26497eb0ac6ac9719d09c67e284f1ed0385c93f3ef27a671da3d",
        "ty": "ee2e0d4819d9fbcc403689c3bf2e49face401b605932f093bc58ab6461130fdd",
        "allx": "508e538e2abdccdd54c4d3e9f49d638b4af7107d85845f66ddea5a5152658b7e",
        "ally": "0c37bbe3b5014ec365e9d393cf4791925e5ed94fb194305d74f064a8d7b50f0e",
        "graph": "5b89f0036ca22909471f1e6558eb42fa06e0c730a577bde5b058b40638f81dc9",
        "test.index": "b101d421688bbaecbd82e8a18f1e282378d6830f3a37666f28ebc47f844341b5",
    },
)


def _info(name: str, title: str, nodes: int, features: tuple[int, str], classes: tuple[str, ...]) -> DataInfo:
    return DataInfo(
        name=name,
        title=title,
        shape=(features[0],),
        classes=classes,
        features=(f"{features[0]:,} words: {features[1]}",),
        source="https://github.com/kimiyoung/planetoid",
        terms="MIT (Yang 2016), data of LINQS; cite Sen et al. 2008 and Yang, Cohen and Salakhutdinov 2016",
        sizes=(LABELS * len(classes), TEST),
        nodes=nodes,
    )


# The files number the classes. The names are those of the same papers in https://github.com/shchur/gnn-benchmark, by
# the sizes of the classes, which all differ. Pubmed's are not certain that way.
CORA = planetoid(
    _info(
        "cora",
        "Cora: 2,708 papers on machine learning and 5,278 citations, one graph",
        2708,
        (1433, "there or not"),
        (
            "Theory",
            "Reinforcement_Learning",
            "Genetic_Algorithms",
            "Neural_Networks",
            "Probabilistic_Methods",
            "Case_Based",
            "Rule_Learning",
        ),
    ),
    CORA_FILES,
)

CITESEER = planetoid(
    _info(
        "citeseer",
        "Citeseer: 3,327 papers on computing and 4,552 citations, one graph; 15 have neither words nor a class",
        3327,
        (3703, "there or not"),
        ("AI", "ML", "IR", "DB", "Agents", "HCI"),
    ),
    CITESEER_FILES,
)

PUBMED = planetoid(
    _info(
        "pubmed",
        "Pubmed: 19,717 papers on diabetes and 44,324 citations, one graph",
        19_717,
        (500, "TF-IDF weights"),
        ("0", "1", "2"),
    ),
    PUBMED_FILES,
)
