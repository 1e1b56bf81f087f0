import os
import pickle
import shutil
import warnings
from collections import defaultdict
from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from lab.data.python2 import dumps
from lab.data.server import serving
from manifold_mixup.lab.data import DATASETS, load_data, load_test, planetoid
from manifold_mixup.lab.data.base import Places
from manifold_mixup.lab.errors import CorruptedFile, StorageError

CLASSES, FEATURES, LABELS, VALIDATION = 3, 11, 2, 9
BASES = {
    "cora": (planetoid.CORA_FILES, planetoid.CORA.info),
    "citeseer": (planetoid.CITESEER_FILES, planetoid.CITESEER.info),
    "pubmed": (planetoid.PUBMED_FILES, planetoid.PUBMED.info),
}
PARTS = ("x", "y", "tx", "ty", "allx", "ally", "graph", "test.index")


def words(generator, rows):
    """Counts of words; a few nodes have none."""
    dense = generator.integers(0, 4, (rows, FEATURES)) * (generator.random((rows, FEATURES)) < 0.4)
    return csr_matrix(dense.astype(np.float32))


def made(known=40, test=12, left_out=(), symmetric=False):
    """The content of the eight files, by part: ``known`` nodes, then test nodes in random order with gaps between them.

    The edges have loops, repeats and, unless ``symmetric``, one direction only.
    """
    generator = np.random.default_rng(0)
    nodes = known + test + len(left_out)
    classes = np.arange(nodes) % CLASSES
    one_hot = np.eye(CLASSES, dtype=np.int32)[classes]
    index = generator.permutation([node for node in range(known, nodes - 1) if node not in left_out] + [nodes - 1])
    everything = words(generator, nodes)
    graph = defaultdict(list)
    for node in range(nodes):
        graph[node] = []
    for first, second in generator.integers(0, nodes - 1, (2 * nodes, 2)).tolist():  # the last node has no edge
        graph[first].append(second)
        if symmetric:
            graph[second].append(first)
    graph[0] += [0, 1, 1]
    graph[1] += [0] * symmetric
    first = CLASSES * LABELS
    return {
        "x": everything[:first],
        "y": one_hot[:first],
        "tx": everything[index],
        "ty": one_hot[index],
        "allx": everything[:known],
        "ally": one_hot[:known],
        "graph": graph,
        "test.index": index,
    }


def written(content, name="cora"):
    """The files' bytes, by published name."""
    return {
        f"ind.{name}.{part}": b"".join(b"%d\n" % node for node in value) if part == "test.index" else dumps(value)
        for part, value in content.items()
    }


def published(contents, name="cora", url=None):
    """The files, with the checksums of these contents."""
    base, _ = BASES[name]
    sums = {file: sha256(content).hexdigest() for file, content in contents.items()}
    files = (replace(f, sha256=sums[f.name], urls=(url(f.name),) if url else f.urls) for f in base.files)
    return replace(base, files=tuple(files))


def small(contents, name="cora", url=None, validation=VALIDATION):
    """The registry entry of such files."""
    info = BASES[name][1]
    nodes = max(map(int, contents[f"ind.{name}.test.index"].split()), default=0) + 1
    facts = replace(info, nodes=nodes, shape=(FEATURES,), classes=tuple("abc"), sizes=(CLASSES * LABELS, 12))
    return planetoid.planetoid(facts, published(contents, name, url), validation)


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        (folder / file).write_bytes(content)


def options(dataset, **chosen):
    return dataset.options.model_validate(chosen)


def expected_edges(graph, nodes):
    """Both directions of each edge in order, by going through all pairs."""
    pairs = {(first, second) for first, near in graph.items() for second in near if first != second}
    pairs |= {(second, first) for first, second in pairs}
    return [pair for first in range(nodes) for second in range(nodes) if (pair := (first, second)) in pairs]


def check_content(dataset, places, content, **chosen):
    splits = dataset.load(options(dataset, features="raw", **chosen), 0, places)
    test, graph, nodes = splits.hand_out_test(), splits.graph, splits.info.nodes
    dense = np.zeros((nodes, FEATURES), np.float32)
    known = content["allx"].shape[0]
    dense[:known] = content["allx"].toarray()
    for node, row in zip(content["test.index"], content["tx"].toarray(), strict=True):
        dense[node] = row
    assert np.array_equal(graph.features.to_dense().numpy(), dense)
    assert (graph.features.dtype, graph.features.is_coalesced()) == (torch.float32, True)
    assert list(map(tuple, graph.edges.T.tolist())) == expected_edges(content["graph"], nodes)
    assert splits.train.x.tolist() == list(range(CLASSES * LABELS))
    assert splits.validation.x.tolist() == list(range(CLASSES * LABELS, CLASSES * LABELS + VALIDATION))
    assert test.x.tolist() == content["test.index"].tolist()
    for part in (splits.train, splits.validation, test):
        assert (part.x.dtype, part.y.dtype) == (torch.int64, torch.int64)
        assert torch.equal(part.y, part.x % CLASSES)
    return splits


@pytest.mark.parametrize("folder", ["", "planetoid", "planetoid/data", "Cora/raw", "Planetoid/Cora/raw"])
def test_the_published_files_are_read(tmp_path, folder):
    content = made()
    files = written(content)
    dataset, places = small(files), Places(tmp_path / "data", tmp_path / "cache")
    write(tmp_path / "data" / folder, files)
    before = sorted((tmp_path / "data").rglob("*"))
    assert dataset.present(places)
    check_content(dataset, places, content)
    assert not places.cache.exists()
    assert sorted((tmp_path / "data").rglob("*")) == before


def test_three_sets_lie_beside_each_other(tmp_path):
    contents = {name: made(known) for name, known in (("cora", 40), ("citeseer", 30), ("pubmed", 50))}
    for name, content in contents.items():
        write(tmp_path, written(content, name))
    for name, content in contents.items():
        check_content(small(written(content, name), name), Places(tmp_path), content)


def test_test_nodes_that_the_files_leave_out_have_neither_features_nor_a_label_but_their_edges(tmp_path):
    left_out = (43, 47, 48)
    content = made(left_out=left_out)
    files = written(content, "citeseer")
    write(tmp_path, files)
    dataset = small(files, "citeseer")
    splits = check_content(dataset, Places(tmp_path), content)
    assert splits.info.nodes == splits.graph.nodes == 55
    assert splits.graph.features.to_dense()[list(left_out)].abs().sum() == 0
    assert set(left_out) <= set(splits.graph.edges.flatten().tolist())
    sizes = {"labels_per_class": 1, "validation_examples": 1, "test_examples": 40}
    splits = dataset.load(options(dataset, split="random", **sizes), 0, Places(tmp_path))
    drawn = torch.cat([splits.train.x, splits.validation.x, splits.hand_out_test().x]).tolist()
    assert len(set(drawn)) == 44  # of the 52 with a label
    assert not set(drawn) & set(left_out)


@pytest.mark.parametrize(("name", "left_out"), [("cora", ()), ("citeseer", (543, 550))])
def test_torch_geometric_reads_the_same(tmp_path, name, left_out):
    content = made(known=540, left_out=left_out, symmetric=True)
    files = written(content, name)
    write(tmp_path, files)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it scripts some of its classes, and the pickles name old modules
        read = pytest.importorskip("torch_geometric.io.planetoid").read_planetoid_data
        theirs = read(str(tmp_path), name)
    splits = small(files, name, validation=500).load(planetoid.PlanetoidOptions(features="raw"), 0, Places(tmp_path))
    assert torch.equal(splits.graph.features.to_dense(), theirs.x)
    order = (theirs.edge_index[0] * theirs.num_nodes + theirs.edge_index[1]).argsort()
    assert torch.equal(splits.graph.edges, theirs.edge_index[:, order])
    parts = (splits.train, theirs.train_mask), (splits.validation, theirs.val_mask)
    for part, mask in (*parts, (splits.hand_out_test(), theirs.test_mask)):
        assert torch.equal(part.x.sort().values, mask.nonzero().flatten())
        assert torch.equal(part.y, theirs.y[part.x])


def test_a_random_split_depends_on_the_seed_and_the_standard_one_does_not(tmp_path):
    files = written(made())
    write(tmp_path, files)
    dataset = small(files)
    sizes = {"labels_per_class": 4, "validation_examples": 10, "test_examples": 20}
    for chosen, same in (({}, True), ({"split": "random", **sizes}, False)):
        one, two = (dataset.load(options(dataset, **chosen), seed, Places(tmp_path)) for seed in (0, 1))
        for a, b in ((one.train, two.train), (one.validation, two.validation)):
            assert torch.equal(a.x, b.x) == same
        assert torch.equal(one.hand_out_test().x, two.hand_out_test().x) == same
        assert torch.equal(one.graph.edges, two.graph.edges)


def test_the_files_are_downloaded_once(tmp_path):
    content = made()
    files = written(content)
    with serving(files) as server:
        dataset, places, seen = small(files, url=server.url), Places(cache=tmp_path), []
        assert not dataset.present(places)
        dataset.prepare(options(dataset), places, lambda *told: seen.append(told))
        assert {what for what, _, _ in seen} == set(files)
        assert dataset.present(places)
        check_content(dataset, places, content)
        assert len(server.requests) == 8


def test_a_download_that_is_something_else_is_refused(tmp_path):
    files = written(made())
    with serving(files | {"ind.cora.graph": b"something else"}) as server:
        dataset = small(files, url=server.url)
        with pytest.raises(CorruptedFile, match=r"ind.cora.graph could not be downloaded.*--data-dir"):
            dataset.prepare(options(dataset), Places(cache=tmp_path), lambda *told: None)
    assert not (tmp_path / "cora" / "ind.cora.graph").exists()


def test_a_missing_file_is_named_with_its_address(tmp_path):
    files = written(made())
    dataset, _ = small(files), files.pop("ind.cora.tx")
    write(tmp_path, files)
    assert not dataset.present(Places(tmp_path, tmp_path / "cache"))
    address = "https://github.com/kimiyoung/planetoid/raw/master/data/ind.cora.tx"
    with pytest.raises(StorageError, match=f"lacks ind.cora.tx, to be had from {address}.*--data-dir"):
        dataset.load(options(dataset), 0, Places(tmp_path, tmp_path / "cache"))


@pytest.mark.parametrize("part", PARTS)
def test_a_changed_file_is_refused_before_it_is_read(tmp_path, part):
    files = written(made())
    dataset, name = small(files), f"ind.cora.{part}"
    write(tmp_path, files | {name: files[name][:-1] + b"#"})
    with pytest.raises(CorruptedFile, match=f"{name} is not the published file: its sha256 .*--data-dir"):
        dataset.load(options(dataset), 0, Places(tmp_path))


class Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("part", [part for part in PARTS if part != "test.index"])
def test_a_pickle_that_runs_a_command_is_refused_and_nothing_runs(tmp_path, part):
    trace, name = tmp_path / "ran", f"ind.cora.{part}"
    evil = pickle.dumps(Calls(os.system, f"touch {trace}"), 2)
    files = written(made()) | {name: evil}  # with the right checksum
    dataset = small(files)
    write(tmp_path / "data", files)
    with pytest.raises(CorruptedFile, match=rf"{name} is not a pickle.*asks for (posix|nt)\.system"):
        dataset.load(options(dataset), 0, Places(tmp_path / "data"))
    assert not trace.exists()
    pickle.loads(evil)
    assert trace.exists()  # so the attack was a real one


def check_refused(tmp_path, files, message):
    dataset = small(files)
    write(tmp_path, files)
    with pytest.raises(CorruptedFile, match=message):
        dataset.load(options(dataset), 0, Places(tmp_path))
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("part", ["x", "ty", "graph"])
def test_files_that_are_cut_off_are_refused(tmp_path, part):
    files, name = written(made()), f"ind.cora.{part}"
    for end in (0, 1, 30, len(files[name]) // 2, len(files[name]) - 1):
        check_refused(tmp_path / "data", files | {name: files[name][:end]}, f"{name} is not a pickle")


def with_array(matrix, **arrays):
    """A matrix whose arrays do not fit each other, which scipy would not make."""
    copy = matrix.copy()
    for key, value in arrays.items():
        setattr(copy, key, value)
    return copy


def other(value, place, number):
    copy = np.array(value)
    copy[place] = number
    return copy


WRONG = {
    "an end of an edge beyond the nodes": ({"graph": lambda g, c: g | {3: [52]}}, "join nodes 0 to 52, .* are 52"),
    "an end of an edge below 0": ({"graph": lambda g, c: g | {3: [-1]}}, "join nodes -1"),
    "neighbours that are no numbers": ({"graph": lambda g, c: g | {3: ["a"]}}, "graph is not a pickle.*under 3"),
    "a graph that is a list": ({"graph": lambda g, c: [1, 2]}, "graph is not a pickle.*holds a list"),
    "a graph where a matrix should be": ({"x": lambda x, c: c["graph"]}, "x holds a dict, not a CsrMatrix"),
    "a matrix where labels should be": ({"y": lambda y, c: c["x"]}, "y holds a CsrMatrix, not a ndarray"),
    "a node of no class": ({"ally": lambda y, c: other(y, (20, slice(None)), 0)}, "allx do not give each node one"),
    "a node of two classes": ({"ty": lambda y, c: other(y, 0, 1)}, "labels of tx do not give each node one class"),
    "a label that is 2": ({"ty": lambda y, c: 2 * y}, "labels of tx do not give each node one class"),
    "training nodes that are not the first": ({"y": lambda y, c: y[::-1]}, "training nodes are not the first"),
    "fewer labels than nodes": ({"ty": lambda y, c: y[1:]}, "tx has shape .* do not fit"),
    "labels of another number of classes": ({"y": lambda y, c: y[:, :2]}, "x has shape .* do not fit"),
    "labels in a row": ({"ty": lambda y, c: y.argmax(axis=1)}, "tx has shape .* do not fit"),
    "features of another number of words": ({"tx": lambda x, c: x[:, :-1]}, "tx has shape .* do not fit"),
    "fewer test nodes than features": ({"test.index": lambda i, c: i[i != 45]}, "as many different nodes as tx"),
    "a test node twice": ({"test.index": lambda i, c: np.where(i == 45, 46, i)}, "as many different nodes as tx"),
    "a test node among the others": ({"test.index": lambda i, c: np.where(i == 45, 39, i)}, "nodes from 40 to 51"),
    "no test nodes": (
        {"test.index": lambda i, c: [], "tx": lambda x, c: x[:0], "ty": lambda y, c: y[:0]},
        "should name nodes from 40",
    ),
    "too few nodes to validate on": (
        {"allx": lambda x, c: x[:12], "ally": lambda y, c: y[:12]},
        "12 nodes come before the test nodes, fewer than 6 to train and 9 to validate on",
    ),
    "a feature that is not a number": ({"tx": lambda x, c: x * np.float32(np.nan)}, "tx is not a .*not finite"),
    "a feature below 0": ({"tx": lambda x, c: -x}, "a feature is below 0"),
    "a word beyond the columns": ({"tx": lambda x, c: with_array(x, indices=x.indices + 9)}, "outside its columns"),
    "rows that do not fit": ({"tx": lambda x, c: with_array(x, indptr=x.indptr[:-1])}, "rows .* do not fit"),
    "rows that go back": ({"tx": lambda x, c: with_array(x, indptr=x.indptr[::-1])}, "rows .* do not fit"),
    "places that are no whole numbers": ({"tx": lambda x, c: with_array(x, indices=x.data)}, "whole numbers"),
    "a matrix in a matrix": ({"tx": lambda x, c: with_array(x, data=x.toarray())}, "one dimension"),
    "an array of truth": ({"ty": lambda y, c: y.astype(bool)}, "array of type b'b1', not of numbers"),
    "a text": ({"ty": lambda y, c: "text"}, "ty is not a pickle that is read here: it holds a bytes"),
}


@pytest.mark.parametrize("what", WRONG)
def test_content_that_cannot_be_the_published_one_is_refused(tmp_path, what):
    (changes, message), content = WRONG[what], made()
    changed = content | {part: change(content[part], content) for part, change in changes.items()}
    check_refused(tmp_path / "data", written(changed), message)


@pytest.mark.parametrize("text", [b"4x\n", b"4.5\n", b"\xff\n", b"9" * 30])
def test_an_index_that_is_no_list_of_numbers_is_refused(tmp_path, text):
    files, name = written(made()), "ind.cora.test.index"
    changed = files | {name: files[name] + text}
    dataset = planetoid.planetoid(small(files).info, published(changed), VALIDATION)
    write(tmp_path, changed)
    with pytest.raises(CorruptedFile, match=f"{name} should hold a node's number in each line"):
        dataset.load(options(dataset), 0, Places(tmp_path))


def test_another_number_of_words_or_classes_than_published_is_refused(tmp_path):
    files = written(made())
    write(tmp_path, files)
    dataset = small(files)
    for facts, message in (
        ({"shape": (12,)}, r"features have shape \(52, 11\), not \(52, 12\)"),
        ({"classes": ("a", "b")}, "labels go from 0 to 2, but there are 2 classes"),
        ({"nodes": 53}, "should name nodes from 40 to 52, the last of all"),
    ):
        other_facts = planetoid.planetoid(replace(dataset.info, **facts), published(files), VALIDATION)
        with pytest.raises(CorruptedFile, match=message):
            other_facts.load(options(dataset), 0, Places(tmp_path))


@pytest.mark.parametrize(("graph", "edges"), [({}, 0), ({0: [0], 5: [5, 5]}, 0), ({7: [3, 3, 7]}, 2)])
def test_a_graph_may_have_hardly_an_edge(tmp_path, graph, edges):
    files = written(made() | {"graph": defaultdict(list, graph)})
    write(tmp_path, files)
    splits = small(files).load(planetoid.PlanetoidOptions(), 0, Places(tmp_path))
    assert splits.graph.edges.shape == (2, edges)
    assert splits.graph.edges.dtype == torch.int64
    assert splits.graph.nodes == 52


def test_one_class_is_read_and_left_to_the_task(tmp_path):
    content = made()
    content |= {part: np.ones((len(content[part]), 1), np.int32) for part in ("y", "ty", "ally")}
    files = written(content)
    write(tmp_path, files)
    dataset = planetoid.planetoid(replace(small(files).info, classes=("all",)), published(files), VALIDATION)
    assert set(dataset.load(options(dataset), 0, Places(tmp_path)).train.y.tolist()) == {0}


def test_the_registry_reads_the_same_files(tmp_path, monkeypatch):
    files = written(made())
    monkeypatch.setitem(DATASETS, "cora", small(files))
    write(tmp_path, files)
    splits = load_data("cora", {}, 1, Places(tmp_path))
    info, test = load_test("cora", {}, Places(tmp_path))
    assert torch.equal(test.x, splits.hand_out_test().x)
    assert info == splits.info == DATASETS["cora"].info
    assert splits.unlabelled is None


def test_the_published_facts():
    sizes = {"cora": (2708, 1433, 7), "citeseer": (3327, 3703, 6), "pubmed": (19_717, 500, 3)}
    for name, (files, _) in BASES.items():
        info = DATASETS[name].info
        assert (info.nodes, *info.shape, len(info.classes)) == sizes[name]
        assert info.sizes == (20 * len(info.classes), 1000)
        assert [file.name for file in files.files] == [f"ind.{name}.{part}" for part in PARTS]
        assert all(len(file.sha256) == 64 and not file.md5 for file in files.files)
        assert all(url.endswith(f"/{file.name}") for file in files.files for url in file.urls)
    chosen = planetoid.PlanetoidOptions(split="random").sizes
    assert (chosen.labels_per_class, chosen.validation_examples, chosen.test_examples) == (20, 500, 1000)
