import itertools
import json
from typing import get_args

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.sparse import coo_matrix, csr_matrix

from lab.published_data import publish
from manifold_mixup.lab.data import DATASETS, load_data
from manifold_mixup.lab.data.graphs import RandomSplit, draw_split, feature_tensor, undirected
from manifold_mixup.lab.data.matrices import CsrMatrix
from manifold_mixup.lab.errors import UsageError

CLASSES = ("few", "some", "many")
LABELS = np.repeat([0, 1, 2, -1], [10, 30, 60, 20])[np.random.default_rng(1).permutation(120)]
GRAPHS = [name for name, entry in DATASETS.items() if entry.info.nodes]

RANDOM = {"split": "random", "labels_per_class": 2, "validation_examples": 8, "test_examples": 10}
BY_CLASS = {"labels_per_class": 2, "validation_per_class": 3}
SMALL = {"cora": RANDOM, "citeseer": RANDOM, "pubmed": RANDOM, "coauthor_cs": BY_CLASS, "amazon_photo": BY_CLASS}
OTHER = {"labels_per_class": 3, "validation_examples": 9, "validation_per_class": 2, "test_examples": 11}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        yield publish(tmp_path_factory.mktemp("published"), patch)


def parts(sizes, seed=0, labels=LABELS):
    return dict(zip(("train", "validation", "test"), draw_split(labels, CLASSES, sizes, seed), strict=True))


def same(one, two):
    return one.tolist() == two.tolist()


# --- edges


@pytest.mark.parametrize("seed", range(5))
def test_edges_are_those_of_the_symmetric_matrix(seed):
    pairs = np.random.default_rng(seed).integers(0, 15, (2, 60))
    matrix = coo_matrix((np.ones(60), tuple(pairs)), (15, 15)).tocsr()
    both = (matrix + matrix.T).tolil()
    both.setdiag(0)
    rows, columns = both.tocsr().nonzero()
    order = np.lexsort((columns, rows))
    assert undirected(pairs, 15).tolist() == [rows[order].tolist(), columns[order].tolist()]


@pytest.mark.parametrize("pairs", [np.empty((2, 0), np.int64), np.array([[3, 3], [3, 3]])])
def test_no_edge_and_loops_alone_leave_none(pairs):
    edges = undirected(pairs, 4)
    assert (edges.shape, edges.dtype) == ((2, 0), np.int64)


def test_a_large_graph_does_not_overflow():
    last = 3_000_000
    assert undirected(np.array([[last], [1]]), last + 1).tolist() == [[1, last], [last, 1]]


# --- features


def scaled(dense, scale):
    """Row by row."""
    result = []
    for row in dense.astype(np.float64):
        if scale == "binary":
            row = (row > 0) * 1.0
        result.append(row if scale == "raw" or row.sum() == 0 else row / row.sum())
    return np.array(result).astype(np.float32)


def ours(matrix):
    return CsrMatrix(matrix.shape, matrix.data, matrix.indices, matrix.indptr)


@pytest.mark.parametrize("scale", ["row-normalised", "binary", "raw"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32])
def test_features_are_scaled_by_row(scale, dtype):
    generator = np.random.default_rng(0)
    dense = (generator.integers(1, 9, (30, 7)) * (generator.random((30, 7)) < 0.3)).astype(dtype)
    dense[[4, 29]] = 0  # nodes without features
    tensor = feature_tensor(ours(csr_matrix(dense)), scale)
    assert (tensor.dtype, tensor.is_coalesced(), tensor.layout) == (torch.float32, True, torch.sparse_coo)
    assert np.array_equal(tensor.to_dense().numpy(), scaled(dense, scale))
    if scale != "raw":
        sums = tensor.to_dense().sum(dim=1)
        assert torch.allclose(sums, (torch.from_numpy(dense).sum(dim=1) > 0).float(), atol=1e-6)


@pytest.mark.parametrize("scale", ["row-normalised", "binary", "raw"])
def test_values_in_any_order_several_of_one_place_and_stored_zeros(scale):
    data = np.array([1.0, 2.0, 4.0, 0.0, 3.0, 0.0])
    matrix = CsrMatrix((3, 4), data, np.array([3, 0, 3, 2, 1, 1]), np.array([0, 4, 4, 6]))
    tensor = feature_tensor(matrix, scale)
    dense = np.array([[2, 0, 0, 5], [0, 0, 0, 0], [0, 3, 0, 0]])
    assert np.array_equal(tensor.to_dense().numpy(), scaled(dense, scale))
    assert tensor.indices().tolist() == [[0, 0, 2], [0, 3, 1]]


def test_small_weights_are_not_lost():
    """A row whose sum is below 1 still sums to 1 afterwards."""
    matrix = csr_matrix(np.array([[0.001, 0.003], [0.0, 1e-30]], np.float32))
    assert torch.allclose(
        feature_tensor(ours(matrix), "row-normalised").to_dense(), torch.tensor([[0.25, 0.75], [0.0, 1.0]])
    )


# --- random splits


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("validation", [{"validation_examples": 6}, {"validation_per_class": 2}])
@pytest.mark.parametrize("test", [None, 25])
def test_the_parts_have_their_sizes_and_no_node_in_common(seed, validation, test):
    drawn = parts(RandomSplit(3, **validation, test_examples=test), seed)
    assert np.bincount(LABELS[drawn["train"]]).tolist() == [3, 3, 3]
    assert len(drawn["validation"]) == 6
    if "validation_per_class" in validation:
        assert np.bincount(LABELS[drawn["validation"]]).tolist() == [2, 2, 2]
    assert len(drawn["test"]) == (test or 100 - 9 - 6)
    everything = np.concatenate(list(drawn.values()))
    assert len(np.unique(everything)) == len(everything)
    assert (LABELS[everything] >= 0).all()


def test_a_seed_gives_the_same_parts_and_another_seed_others():
    sizes = RandomSplit(3, validation_per_class=4, test_examples=25)
    one, again, other = (parts(sizes, seed) for seed in (0, 0, 1))
    for part in one:
        assert same(one[part], again[part])
        assert not same(one[part], other[part])


def test_how_many_labels_there_are_changes_neither_validation_nor_test():
    few, more = (parts(RandomSplit(n, validation_examples=10, test_examples=25)) for n in (1, 4))
    assert same(few["validation"], more["validation"])
    assert same(few["test"], more["test"])
    assert set(few["train"].tolist()) < set(more["train"].tolist())


def test_how_many_are_validated_on_does_not_change_the_test():
    few, more = (parts(RandomSplit(2, validation_examples=n, test_examples=25)) for n in (0, 20))
    assert same(few["test"], more["test"])
    assert not len(few["validation"])


def test_every_node_with_a_label_comes_up_as_often_as_any_other():
    """Each is a test node in a quarter of the draws: 400 draws, so within 5 standard errors of 0.022."""
    counts = np.zeros(120)
    for seed in range(400):
        counts[parts(RandomSplit(1, validation_examples=0, test_examples=25), seed)["test"]] += 1
    assert counts[LABELS < 0].sum() == 0
    assert np.abs(counts[LABELS >= 0] / 400 - 0.25).max() < 0.11


REFUSED = {
    "labels_per_class is 11, but class 'few' has 10 nodes with a label$": RandomSplit(11),
    "labels_per_class is 8, but class 'few' .* of which 4 are drawn for other parts": RandomSplit(
        8, validation_per_class=4
    ),
    "validation_per_class is 31, but class 'few' has 10": RandomSplit(1, validation_per_class=31),
    "validation_examples 60 and test_examples 50 are more than the 100 nodes": RandomSplit(
        1, validation_examples=60, test_examples=50
    ),
    "test_examples 101 are more than the 100 nodes with a label": RandomSplit(1, test_examples=101),
    "validation_examples 120 are more than the 100 nodes with a label": RandomSplit(1, validation_examples=120),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_split_that_cannot_be_is_refused_with_the_numbers(message):
    with pytest.raises(UsageError, match=message):
        parts(REFUSED[message])


def test_a_class_without_labelled_nodes_is_named():
    with pytest.raises(UsageError, match="labels_per_class is 1, but class 'some' has 0 nodes with a label"):
        parts(RandomSplit(1), labels=np.where(LABELS == 1, -1, LABELS))


def test_a_split_that_leaves_nothing_to_test_on_is_refused():
    labels = np.repeat([0, 1, 2], 5)
    assert len(parts(RandomSplit(4), labels=labels)["test"]) == 3
    with pytest.raises(UsageError, match="labels_per_class 2 .* take all 15 nodes with a label: none is left to test"):
        parts(RandomSplit(2, validation_per_class=3), labels=labels)


# --- options


def test_the_graphs_are_those_we_know_of():
    assert list(SMALL) == GRAPHS


def seen(splits):
    """All that a run is given, as text."""
    tensors = [getattr(part, axis) for part in (splits.train, splits.validation) for axis in "xy"]
    tensors += [splits.hand_out_test().x, splits.graph.edges, splits.graph.features.to_dense()]
    return json.dumps([tensor.tolist() for tensor in tensors])


@pytest.mark.parametrize(
    ("name", "key"), [(name, key) for name in SMALL for key in DATASETS[name].options.model_fields]
)
def test_every_option_has_an_effect(places, name, key):
    plain = seen(load_data(name, SMALL[name], 0, places))
    assert seen(load_data(name, SMALL[name], 0, places)) == plain
    if key == "split":
        assert seen(load_data(name, {"split": "standard"}, 0, places)) != plain
    elif key == "features":
        field = DATASETS[name].options.model_fields[key]
        scales = get_args(field.annotation)
        results = {seen(load_data(name, SMALL[name] | {key: scale}, 0, places)) for scale in scales}
        assert len(results) == len(scales) == 3
        assert plain == seen(load_data(name, SMALL[name] | {key: "row-normalised"}, 0, places))
    else:
        assert seen(load_data(name, SMALL[name] | {key: OTHER[key]}, 0, places)) != plain


PLANETOID = [name for name in SMALL if "split" in DATASETS[name].options.model_fields]
SIZES = ("labels_per_class", "validation_examples", "test_examples")


@pytest.mark.parametrize(("name", "key"), list(itertools.product(PLANETOID, SIZES)))
def test_a_size_is_refused_where_the_split_is_the_published_one(places, name, key):
    for chosen in ({}, {"split": "standard"}):
        with pytest.raises(ValidationError, match=f"{key}: read by split 'random' only"):
            load_data(name, {**chosen, key: 20}, 0, places)


def test_all_sizes_that_are_not_read_are_named_at_once(places):
    with pytest.raises(ValidationError, match="labels_per_class and test_examples: read by split 'random' only"):
        load_data("cora", {"labels_per_class": 5, "test_examples": 10}, 0, places)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(
    "wrong", [{"features": "log"}, {"labels_per_class": 0}, {"test_examples": 0}, {"labels": 3}, {"split": "public"}]
)
def test_what_no_option_can_be_is_refused(places, name, wrong):
    with pytest.raises(ValidationError):
        load_data(name, SMALL[name] | wrong, 0, places)


@pytest.mark.parametrize("name", SMALL)
def test_a_run_gets_nodes_of_one_graph(places, name):
    splits = load_data(name, SMALL[name], 0, places)
    info, graph = splits.info, splits.graph
    assert graph.features.shape == (info.nodes, *info.shape)
    assert graph.nodes == info.nodes
    assert splits.unlabelled is None
    assert not info.images
    for part in (splits.train, splits.validation, splits.hand_out_test()):
        assert part.x.ndim == part.y.ndim == 1
        assert (part.x.dtype, part.y.dtype) == (torch.int64, torch.int64)
        assert part.x.max() < info.nodes
