"""Nearest neighbours against scikit-learn and against a plain loop."""

import math

import pytest
import torch
from pydantic import ValidationError
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from lab.measures.subjects import PIXELS, Given, convolutional, images, left_alone, subject
from manifold_mixup.lab.errors import UsageError
from manifold_mixup.lab.measures import neighbours
from manifold_mixup.lab.measures.neighbours import NeighboursOptions, compute, knn_errors, knn_labels
from manifold_mixup.lab.measures.registry import MEASURES


def by_hand(references, labels, query, k, distance="euclidean"):
    """Python's stable sort keeps the earlier of equally near ones first; min takes the smallest of equal classes."""

    def far(row):
        if distance == "euclidean":
            return sum((a - b) ** 2 for a, b in zip(row, query, strict=True))
        length = math.hypot(*row) * math.hypot(*query)
        return 1 - (sum(a * b for a, b in zip(row, query, strict=True)) / length if length else 0)

    near = sorted(range(len(references)), key=lambda i: far(references[i]))[:k]
    votes = [labels[i] for i in near]
    return min(set(votes), key=lambda c: (-votes.count(c), c))


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("cells", [1, 700, 2**23])
def test_agrees_with_scikit_learn_whatever_fits_in_memory(distance, cells, monkeypatch):
    monkeypatch.setattr(neighbours, "CELLS", cells)
    references, queries = torch.randn(90, 6) + 1, torch.randn(41, 6) + 1
    labels = torch.randint(5, (90,))
    found = knn_labels(references, labels, queries, [1, 4, 20], distance)
    assert list(found) == [1, 4, 20]
    for k, guess in found.items():
        classifier = KNeighborsClassifier(k, metric=distance, algorithm="brute")
        classifier.fit(references.double().numpy(), labels.numpy())
        assert guess.tolist() == classifier.predict(queries.double().numpy()).tolist()


def test_distances_are_never_all_in_memory(monkeypatch):
    monkeypatch.setattr(neighbours, "CELLS", 1000)
    nearest, sizes = neighbours._nearest, []
    monkeypatch.setattr(neighbours, "_nearest", lambda d, *rest: sizes.append(tuple(d.shape)) or nearest(d, *rest))
    knn_labels(torch.randn(300, 2), torch.zeros(300, dtype=torch.long), torch.randn(10, 2), [3])
    assert sizes == [(3, 300), (3, 300), (3, 300), (1, 300)]


@pytest.mark.parametrize("k", [1, 2, 3, 7, 30])
def test_ties_go_to_the_earlier_reference_and_then_to_the_smaller_class(k):
    # Whole numbers on a small grid: most distances are tied, and arithmetic is exact.
    g = torch.Generator().manual_seed(k)
    references, queries = (torch.randint(-1, 2, (n, 2), generator=g).float() for n in (30, 25))
    labels = torch.randint(4, (30,), generator=g)
    expected = [by_hand(references.tolist(), labels.tolist(), query, k) for query in queries.tolist()]
    assert knn_labels(references, labels, queries, [k])[k].tolist() == expected
    several = knn_labels(references, labels, queries, [1, k, 25])
    assert several[k].tolist() == expected


def test_constant_states_take_the_first_references():
    states = torch.full((10, 3), 0.1)
    found = knn_labels(states, torch.tensor([2, 2, 1, 1, 1, 1, 1, 1, 1, 1]), states[:4], [1, 3, 10])
    assert {k: set(guess.tolist()) for k, guess in found.items()} == {1: {2}, 3: {2}, 10: {1}}


def test_neighbours_of_collapsed_states_are_told_apart_far_from_the_origin():
    # Squared lengths of 3e6, whose last digit is 5e-10, and squared distances of 3e-12.
    steps = torch.arange(8, dtype=torch.float64)
    references = 1000 + steps[:, None] * 2.0**-20 * torch.ones(8, 3, dtype=torch.float64)
    assert len(references.unique(dim=0)) == 8
    found = knn_labels(references, torch.arange(8), references, [1])[1]
    assert found.tolist() == list(range(8))


def test_a_state_of_zeros_is_at_a_right_angle_to_everything():
    references = torch.tensor([[0.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [3.0, 4.0]])
    labels = torch.arange(4)
    queries = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, -1.0], [-2.0, 1.0]])
    for k in (1, 2):
        expected = [by_hand(references.tolist(), labels.tolist(), q, k, "cosine") for q in queries.tolist()]
        assert knn_labels(references, labels, queries, [k], "cosine")[k].tolist() == expected


def test_cosine_ignores_lengths_and_euclidean_does_not():
    references, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
    query = torch.tensor([[20.0, 10.0]])
    for lengths, nearest in (([20.0, 10.0], 0), ([100.0, 10.0], 1)):
        scaled = references * torch.tensor(lengths)[:, None]
        assert knn_labels(scaled, labels, query, [1])[1].item() == nearest
        assert knn_labels(scaled, labels, query, [1], "cosine")[1].item() == 0


def test_where_there_are_fewer_references_all_of_them_vote():
    references, labels = torch.randn(5, 2), torch.tensor([1, 0, 2, 2, 1])
    found = knn_labels(references, labels, torch.randn(6, 2), [1, 5, 20])
    assert found[5].tolist() == found[20].tolist() == [1] * 6


@pytest.mark.parametrize("which", ["references", "queries"])
def test_a_state_that_is_no_number_makes_the_error_unknown(which):
    states = {"references": torch.randn(6, 2), "queries": torch.randn(4, 2)}
    states[which][1, 1] = math.nan
    y = torch.zeros(6, dtype=torch.long)
    found = knn_errors(states["references"], y, states["queries"], y[:4], [1, 3])
    assert list(found) == [1, 3]
    assert all(math.isnan(error) for error in found.values())


def blobs(n, seed):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (n,), generator=g)
    return torch.randn(n, 2, generator=g) + 1.2 * torch.stack([y == 1, y == 2], dim=1), y


def test_k_is_chosen_on_the_validation_split_and_judged_on_the_test_split():
    parts = {name: blobs(n, i) for i, (name, n) in enumerate({"train": 60, "validation": 50, "test": 45}.items())}
    found = compute(subject(Given(), **parts), NeighboursOptions(layer="state"))

    def error(split, k):
        return 100 * (1 - KNeighborsClassifier(k).fit(*parts["train"]).score(*parts[split]))

    for k in (1, 5, 20):
        assert found[f"knn_error_{k}"] == pytest.approx(error("test", k))
    validation = {k: error("validation", k) for k in (1, 5, 20)}
    assert len(set(validation.values())) > 1
    best = min(validation, key=validation.get)
    assert found["knn_k"] == best
    assert found["knn_error"] == found[f"knn_error_{best}"]
    assert set(found) == {"knn_error_1", "knn_error_5", "knn_error_20", "knn_error", "knn_k"}
    assert all(MEASURES["knn"].describe(name) for name in found)
    assert MEASURES["knn"].describe("knn_error_5").title == "k-NN error, k = 5"


def test_of_equally_good_k_the_smallest_is_chosen_and_without_validation_none():
    x, y = torch.tensor([[0.0], [0.1], [5.0], [5.1]]), torch.tensor([0, 0, 1, 1])
    options = NeighboursOptions(layer="state", k=[2, 1])
    task = subject(nn.Sequential(), train=(x, y), validation=(x, y), test=(x, y))
    task.model.add_module("state", nn.Identity())
    assert compute(task, options) == {"knn_error_1": 0, "knn_error_2": 0, "knn_error": 0, "knn_k": 1}
    for parts in ({}, {"validation": (x[:0], y[:0])}):
        task = subject(Given(), train=(x, y), test=(x, y), **parts)
        assert compute(task, options) == {"knn_error_1": 0, "knn_error_2": 0}


def test_unknown_validation_errors_choose_nothing():
    x, y = torch.tensor([[0.0], [5.0]]), torch.tensor([0, 1])
    task = subject(Given(), train=(x, y), test=(x, y), validation=(x * math.nan, y))
    found = compute(task, NeighboursOptions(layer="state", k=[1]))
    assert found["knn_error_1"] == 0
    assert math.isnan(found["knn_error"])
    assert math.isnan(found["knn_k"])


def test_features_are_the_default_and_the_network_is_left_alone():
    (x, y), (test_x, test_y) = images(40, seed=1), images(21, seed=2)
    model = convolutional()
    task = subject(model, pixels=PIXELS, train=(x, y), test=(test_x, test_y))
    with torch.no_grad():
        train, test = (model[:6](PIXELS.normalise(images)) for images in (x, test_x))
    expected = 100 * (1 - KNeighborsClassifier(5).fit(train.double(), y).score(test.double(), test_y))
    model.train()
    with left_alone(model):
        found = compute(task, NeighboursOptions(k=5))
    assert found == {"knn_error_5": pytest.approx(expected)}


def test_references_are_drawn_from_the_seed():
    x, y = torch.arange(50.0)[:, None], torch.arange(50)
    tasks = [subject(Given(), train=(x, y), test=(x, y), seed=seed) for seed in (0, 0, 1)]
    guesses = [compute(task, NeighboursOptions(layer="state", k=[1], references=10)) for task in tasks]
    assert guesses[0] == guesses[1] == {"knn_error_1": 80.0}
    ordered = compute(subject(Given(), train=(x, y), test=(x[:5], y[:5])), NeighboursOptions(layer="state", k=[1]))
    assert ordered == {"knn_error_1": 0.0}


def test_without_training_examples_there_is_nothing_to_look_among():
    with pytest.raises(UsageError, match="no train examples"):
        compute(subject(Given(), test=(torch.zeros(2, 1), [0, 1])), NeighboursOptions(layer="state"))
    assert MEASURES["knn"].needs == ("train",)


@pytest.mark.parametrize(
    ("given", "read"), [("1+5+20", [1, 5, 20]), (7, [7]), ("3", [3]), ([5, 1, 5], [1, 5]), ((2,), [2])]
)
def test_k_is_one_number_or_several(given, read):
    assert NeighboursOptions(k=given).k == read


@pytest.mark.parametrize("given", [0, [], "", "1+x", "0+1", [1.0], True, -3, None])
def test_other_k_are_refused(given):
    with pytest.raises(ValidationError, match="whole numbers above 0"):
        NeighboursOptions(k=given)
