import io
import os
import pickle
import warnings
import zipfile
from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest
import torch
from scipy.sparse import coo_matrix, csr_matrix

from lab.data.server import serving
from manifold_mixup.lab.data import DATASETS, gnn_benchmark, load_data, load_test
from manifold_mixup.lab.data.base import Places
from manifold_mixup.lab.errors import CorruptedFile, StorageError, UsageError

NODES, FEATURES, CLASSES = 60, 8, 3
BASES = {
    "coauthor_cs": (gnn_benchmark.COAUTHOR_CS_FILES, gnn_benchmark.COAUTHOR_CS),
    "amazon_photo": (gnn_benchmark.AMAZON_PHOTO_FILES, gnn_benchmark.AMAZON_PHOTO),
}
NAMES = {name: (files.published.files[0].name, files.copy.files[0].name) for name, (files, _) in BASES.items()}
SIZES = {"labels_per_class": 4, "validation_per_class": 3}


def made():
    """Edges with loops, in one direction or both; features with zeros among them and in no order; labels."""
    generator = np.random.default_rng(0)
    first, second = generator.integers(0, NODES - 1, (2, 150))  # the last node has no edge
    first[:3] = second[:3]
    adjacency = coo_matrix((np.ones(150, np.float32), (first, second)), (NODES, NODES)).tocsr()
    adjacency.data[:] = 1
    dense = generator.integers(1, 4, (NODES, FEATURES)) * (generator.random((NODES, FEATURES)) < 0.4)
    features = csr_matrix(dense.astype(np.float32))
    features.data[5] = 0
    start, end = features.indptr[7:9]
    features.indices[start:end] = features.indices[start:end][::-1].copy()
    features.data[start:end] = features.data[start:end][::-1].copy()
    return adjacency, features, np.arange(NODES) % CLASSES


def arrays(adjacency, features, labels):
    """The arrays of a published file, by name: among them some that would run what they name."""
    parts = {}
    for name, matrix in (("adj", adjacency), ("attr", features)):
        parts |= {f"{name}_{key}": getattr(matrix, key) for key in ("data", "indices", "indptr")}
        parts[f"{name}_shape"] = np.array(matrix.shape)
    return parts | {"labels": labels, "class_names": np.array(["a", "b", "c"], dtype=object)}


def npz(parts):
    content = io.BytesIO()
    np.savez(content, **parts)
    return content.getvalue()


def published(adjacency, features, labels):
    return npz(arrays(adjacency, features, labels))


def boxed(value):
    box = np.empty((), dtype=object)
    box[()] = value
    return box


def copied(adjacency, features, labels):
    parts = {"adj_matrix": boxed(adjacency), "node_attr": boxed(features), "node_label": labels.astype(np.int32)}
    return npz(parts | {"metadata": boxed({"class_names": np.array(["a", "b", "c"])})})


def small(content, name="coauthor_cs", *, copy=b"", url=None):
    """The registry entry of such files: the published one and its copy."""
    files, dataset = BASES[name]
    sets = []
    for base, data in ((files.published, content), (files.copy, copy)):
        (file,) = base.files
        urls = (url(file.name),) if url else file.urls
        sets.append(replace(base, files=(replace(file, sha256=sha256(data).hexdigest(), urls=urls),)))
    facts = replace(dataset.info, nodes=NODES, shape=(FEATURES,), classes=tuple("abc"))
    return gnn_benchmark.benchmark(facts, gnn_benchmark.BenchmarkFiles(*sets))


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def options(dataset, **chosen):
    return dataset.options.model_validate(SIZES | chosen)


def check_content(dataset, places):
    adjacency, features, labels = made()
    splits = dataset.load(options(dataset, features="raw"), 0, places)
    graph = splits.graph
    assert np.array_equal(graph.features.to_dense().numpy(), features.toarray())
    assert graph.features.values().min() > 0  # no zero is stored
    both = ((adjacency + adjacency.T) > 0).toarray()
    np.fill_diagonal(both, False)
    assert graph.edges.T.tolist() == np.argwhere(both).tolist()
    parts = (splits.train, splits.validation, splits.hand_out_test())
    assert [len(part) for part in parts] == [12, 9, 39]
    assert sorted(torch.cat([part.x for part in parts]).tolist()) == list(range(NODES))
    for part in parts:
        assert (part.x.dtype, part.y.dtype) == (torch.int64, torch.int64)
        assert part.y.tolist() == labels[part.x].tolist()
    assert parts[0].y.bincount().tolist() == [4] * 3
    assert parts[1].y.bincount().tolist() == [3] * 3
    return splits


FOLDERS = [("coauthor_cs", folder) for folder in ("", "graphs", "CS/raw", "Coauthor/CS/raw", "gnn-benchmark/data/npz")]
FOLDERS += [("amazon_photo", folder) for folder in ("", "Photo/raw", "Amazon/Photo/raw")]


@pytest.mark.parametrize(("name", "folder"), FOLDERS)
def test_the_published_file_is_read(tmp_path, name, folder):
    content = published(*made())
    dataset, places = small(content, name), Places(tmp_path / "data", tmp_path / "cache")
    write(tmp_path / "data" / folder / NAMES[name][0], content)
    before = sorted((tmp_path / "data").rglob("*"))
    assert dataset.present(places)
    check_content(dataset, places)
    assert not places.cache.exists()
    assert sorted((tmp_path / "data").rglob("*")) == before


@pytest.mark.parametrize(("name", "folder"), [("coauthor_cs", "graphs"), ("amazon_photo", "GraphData/datasets")])
def test_the_copy_with_pickled_matrices_is_read_to_the_same_graph(tmp_path, name, folder):
    content, copy = published(*made()), copied(*made())
    dataset = small(content, name, copy=copy)
    places = Places(tmp_path / "data", tmp_path / "cache")
    write(tmp_path / "data" / folder / NAMES[name][1], copy)
    write(tmp_path / "other" / NAMES[name][0], content)
    assert dataset.present(places)
    one, two = check_content(dataset, places), check_content(dataset, Places(tmp_path / "other"))
    assert torch.equal(one.graph.edges, two.graph.edges)
    assert torch.equal(one.graph.features.values(), two.graph.features.values())
    assert torch.equal(one.train.x, two.train.x)
    assert not places.cache.exists()


def test_torch_geometric_reads_the_same(tmp_path):
    adjacency, features, labels = made()
    features.sort_indices()
    content = published(adjacency, features, labels)
    path = tmp_path / NAMES["coauthor_cs"][0]
    write(path, content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it scripts some of its classes, which torch has deprecated
        theirs = pytest.importorskip("torch_geometric.io.npz").read_npz(str(path))
    dataset = small(content)
    graph = dataset.load(options(dataset, features="binary"), 0, Places(tmp_path)).graph
    assert torch.equal(graph.features.to_dense() > 0, theirs.x > 0)
    order = (theirs.edge_index[0] * NODES + theirs.edge_index[1]).argsort()
    assert torch.equal(graph.edges, theirs.edge_index[:, order])
    assert theirs.y.tolist() == labels.tolist()


def test_the_file_is_downloaded_once(tmp_path):
    content, name = published(*made()), NAMES["coauthor_cs"][0]
    with serving({name: content}) as server:
        dataset, places, seen = small(content, url=server.url), Places(cache=tmp_path), []
        assert not dataset.present(places)
        dataset.prepare(options(dataset), places, lambda *told: seen.append(told))
        assert {what for what, _, _ in seen} == {name}
        assert dataset.present(places)
        check_content(dataset, places)
        assert len(server.requests) == 1


def test_where_it_cannot_be_fetched_the_copy_is_named(tmp_path):
    content = published(*made())
    with serving({}) as server:
        dataset = small(content, url=server.url)
        with pytest.raises(StorageError, match=r"404.*coauthor_cs.npz of https://github.com/EdisonLeeeee/GraphData"):
            dataset.load(options(dataset), 0, Places(cache=tmp_path))


def test_a_data_folder_that_is_not_there_is_named(tmp_path):
    dataset = small(published(*made()))
    with pytest.raises(UsageError, match="no_such does not exist"):
        dataset.load(options(dataset), 0, Places(tmp_path / "no_such", tmp_path))


@pytest.mark.parametrize("which", [0, 1])
def test_a_changed_file_is_refused_before_it_is_read(tmp_path, which):
    content, copy = published(*made()), copied(*made())
    dataset, name = small(content, copy=copy), NAMES["coauthor_cs"][which]
    write(tmp_path / name, (content, copy)[which] + b"#")
    with pytest.raises(CorruptedFile, match=f"{name} is not the published file: its sha256"):
        dataset.load(options(dataset), 0, Places(tmp_path))


def check_refused(tmp_path, which, content, message):
    """With the right checksum."""
    dataset = small(content, copy=content)
    write(tmp_path / NAMES["coauthor_cs"][which], content)
    with pytest.raises(CorruptedFile, match=message):
        dataset.load(options(dataset), 0, Places(tmp_path))


@pytest.mark.parametrize(("which", "make"), [(0, published), (1, copied)])
def test_a_file_that_is_cut_off_is_refused(tmp_path, which, make):
    content = make(*made())
    for end in (0, 1, 40, len(content) // 2, len(content) - 1):
        check_refused(tmp_path, which, content[:end], "is no npz file of a graph")


def test_a_file_whose_members_are_cut_off_is_refused(tmp_path):
    whole = published(*made())
    content = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(content, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, data[:-7] if name == "attr_data.npy" else data)
    check_refused(tmp_path, 0, content.getvalue(), "is no npz file of a graph")


WRONG = {
    "no labels": (lambda p: {k: v for k, v in p.items() if k != "labels"}, "labels"),
    "no edges' places": (lambda p: {k: v for k, v in p.items() if k != "adj_indices"}, "adj_indices"),
    "objects for numbers": (lambda p: p | {"attr_data": p["attr_data"].astype(object)}, "allow_pickle=False"),
    "objects for labels": (lambda p: p | {"labels": p["labels"].astype(object)}, "allow_pickle=False"),
    "a label beyond the classes": (lambda p: p | {"labels": p["labels"] + 1}, "labels go from 1 to 3, .* 3 classes"),
    "a label below -1": (lambda p: p | {"labels": p["labels"] - 2}, "labels go from -2 to 0"),
    "labels that are no whole numbers": (lambda p: p | {"labels": p["labels"] * 1.0}, "labels are float64"),
    "labels in a column": (lambda p: p | {"labels": p["labels"][:, None]}, r"shape \(60, 1\), not a number"),
    "too few labels": (lambda p: p | {"labels": p["labels"][1:]}, "labels for 59 nodes, not for 60"),
    "edges of other nodes": (lambda p: p | {"adj_indices": p["adj_indices"] + 5}, "outside its columns"),
    "edges in a matrix that is no square": (lambda p: p | {"adj_shape": np.array([60, 61])}, r"of shape \(60, 61\)"),
    "edges of fewer nodes": (lambda p: p | {"adj_shape": np.array([59, 59])}, "rows .* do not fit"),
    "a shape of three": (lambda p: p | {"adj_shape": np.array([60, 60, 1])}, "no npz file of a graph"),
    "another number of features": (lambda p: p | {"attr_shape": np.array([60, 9])}, r"shape \(60, 9\), not \(60, 8\)"),
    "a feature that is not finite": (lambda p: p | {"attr_data": p["attr_data"] * np.inf}, "not finite"),
    "a feature below 0": (lambda p: p | {"attr_data": -p["attr_data"]}, "a feature is below 0"),
}


@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply")
@pytest.mark.parametrize("what", WRONG)
def test_content_that_cannot_be_the_published_one_is_refused(tmp_path, what):
    change, message = WRONG[what]
    check_refused(tmp_path, 0, npz(change(arrays(*made()))), message)


class Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("member", ["adj_matrix", "node_attr"])
def test_a_copy_that_runs_a_command_is_refused_and_nothing_runs(tmp_path, member):
    trace = tmp_path / "ran"
    adjacency, features, labels = made()
    parts = {"adj_matrix": boxed(adjacency), "node_attr": boxed(features), "node_label": labels}
    content = npz(parts | {member: boxed(Calls(os.system, f"touch {trace}"))})
    check_refused(tmp_path, 1, content, r"asks for (posix|nt)\.system")
    assert not trace.exists()
    pickle.loads(pickle.dumps(Calls(os.system, f"touch {trace}")))
    assert trace.exists()  # so the attack was a real one


@pytest.mark.parametrize("member", ["class_names", "node_names"])
def test_what_is_not_needed_is_not_opened(tmp_path, member):
    trace = tmp_path / "ran"
    content = npz(arrays(*made()) | {member: boxed(Calls(os.system, f"touch {trace}"))})
    write(tmp_path / NAMES["coauthor_cs"][0], content)
    check_content(small(content), Places(tmp_path))
    assert not trace.exists()


@pytest.mark.parametrize(
    "inside", [np.ones((NODES, NODES)), "text", {"a": 1}, [1], None, np.array([None, 1], dtype=object)]
)
def test_a_copy_that_holds_something_else_than_a_matrix_is_refused(tmp_path, inside):
    _, features, labels = made()
    content = npz({"adj_matrix": boxed(inside), "node_attr": boxed(features), "node_label": labels})
    check_refused(tmp_path, 1, content, r"coauthor_cs.npz is no(t a pickle that is read here| npz file of a graph)")


def test_nodes_without_a_label_are_in_no_split(tmp_path):
    adjacency, features, labels = made()
    labels[[3, 4, 50]] = -1
    content = published(adjacency, features, labels)
    write(tmp_path / NAMES["coauthor_cs"][0], content)
    dataset = small(content)
    splits = dataset.load(options(dataset), 0, Places(tmp_path))
    drawn = torch.cat([splits.train.x, splits.validation.x, splits.hand_out_test().x]).tolist()
    assert sorted(drawn) == [node for node in range(NODES) if node not in (3, 4, 50)]
    assert splits.graph.nodes == NODES


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"labels_per_class": 18}, "labels_per_class is 18, but class 'a' has 20 nodes .*, of which 3 are drawn"),
        ({"validation_per_class": 21}, "validation_per_class is 21, but class 'a' has 20 nodes with a label$"),
        ({"test_examples": 61}, "test_examples 61 are more than the 60 nodes with a label"),
        ({"labels_per_class": 17}, "labels_per_class 17 .* take all 60 nodes with a label: none is left to test on"),
    ],
)
def test_a_split_that_cannot_be_is_refused(tmp_path, chosen, message):
    content = published(*made())
    write(tmp_path / NAMES["coauthor_cs"][0], content)
    dataset = small(content)
    with pytest.raises(UsageError, match=message):
        dataset.load(options(dataset, **chosen), 0, Places(tmp_path))


def test_a_class_without_a_node_is_named(tmp_path):
    adjacency, features, labels = made()
    content = published(adjacency, features, np.where(labels == 1, 0, labels))
    write(tmp_path / NAMES["coauthor_cs"][0], content)
    dataset = small(content)
    with pytest.raises(UsageError, match="labels_per_class is 4, but class 'b' has 0 nodes with a label"):
        dataset.load(options(dataset, validation_per_class=0), 0, Places(tmp_path))


def test_the_registry_reads_the_same_file(tmp_path, monkeypatch):
    content = published(*made())
    monkeypatch.setitem(DATASETS, "amazon_photo", small(content, "amazon_photo"))
    write(tmp_path / NAMES["amazon_photo"][0], content)
    splits = load_data("amazon_photo", SIZES, 0, Places(tmp_path))
    info, test = load_test("amazon_photo", SIZES, Places(tmp_path))
    assert torch.equal(test.x, splits.hand_out_test().x)
    assert info == splits.info == DATASETS["amazon_photo"].info


def test_the_published_facts():
    for name, sizes in {"coauthor_cs": (18_333, 6805, 15), "amazon_photo": (7650, 745, 8)}.items():
        files, dataset = BASES[name]
        assert (dataset.info.nodes, *dataset.info.shape, len(dataset.info.classes)) == sizes
        for base in (files.published, files.copy):
            assert [len(file.sha256) for file in base.files] == [64]
        assert all(url.endswith(f"/{NAMES[name][0]}") for url in files.published.files[0].urls)
        assert NAMES[name][1] == f"{name}.npz"
    chosen = gnn_benchmark.BenchmarkOptions().sizes
    assert (chosen.labels_per_class, chosen.validation_per_class, chosen.test_examples) == (20, 30, None)
