"""What the report draws of a classifier against definitions in plain Python, and against the numbers of the record."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix

from lab.measures.subjects import PIXELS, Given, convolutional, images, left_alone, subject
from lab.small import DIGITS, one_run
from manifold_mixup.lab import storage
from manifold_mixup.lab.measures import calibration
from manifold_mixup.lab.measures.classification import calibration_error, reliability
from manifold_mixup.lab.measures.details import CLASSES, confusion, details, mistakes, thumbnails
from manifold_mixup.lab.options import NoOptions
from manifold_mixup.lab.records import RunFolder
from manifold_mixup.lab.run import execute

IMAGE = "mistakes_image"


def drawn(n=300, classes=5, seed=0, scale=3.0):
    """Logits that are float32 numbers, as a network's are, and labels that agree with some of them."""
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(n, classes)) * scale).astype(np.float32)
    y = np.where(rng.random(n) < 0.5, logits.argmax(axis=1), rng.integers(classes, size=n))
    return torch.from_numpy(logits).double(), torch.from_numpy(y)


def by_hand(logits, y, bins=15):
    """The table of a reliability diagram, example by example."""
    table = [[0, 0.0, 0] for _ in range(bins)]
    for row, label in zip(logits.tolist(), y.tolist(), strict=True):
        exps = [math.exp(value - max(row)) for value in row]
        top = max(exps) / sum(exps)
        row_of_table = table[min(int(top * bins), bins - 1)]
        row_of_table[0] += 1
        row_of_table[1] += top
        row_of_table[2] += row.index(max(row)) == label
    return table


def error_of(table):
    """The calibration error, from a table."""
    used = table[table[:, 0] > 0]
    gaps = (used[:, 2] / used[:, 0] - used[:, 1] / used[:, 0]).abs()
    return float((gaps * used[:, 0]).sum() / used[:, 0].sum())


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("classes", [2, 7])
def test_the_reliability_table_is_the_definition_and_its_weighted_gap_the_calibration_error(seed, classes):
    logits, y = drawn(classes=classes, seed=seed, scale=10 ** (seed / 4 - 1))
    table, expected = reliability(logits, y), torch.tensor(by_hand(logits, y), dtype=torch.float64)
    torch.testing.assert_close(table, expected, rtol=0, atol=1e-9)
    assert error_of(table) == pytest.approx(error_of(expected), abs=1e-9)
    # torchmetrics adds up 300 numbers in single precision
    assert error_of(table) == pytest.approx(calibration_error(logits, y), abs=2e-6)


@pytest.mark.parametrize("edge", range(2, 15))
def test_examples_at_an_edge_are_in_the_bin_in_which_the_calibration_error_has_them(edge):
    """An example at the edge, right, and a sure neighbour, wrong: whether they share a bin changes the error."""
    at = torch.linspace(0, 1, 16)[edge]
    around = [torch.nextafter(at, torch.tensor(0.0)), at, torch.nextafter(at, torch.tensor(1.0))]
    shared = []
    for top in [float(value) for value in around]:
        for inner in ((edge - 0.5) / 15, (edge + 0.5) / 15):
            rows = torch.tensor([[p, *[(1 - p) / 15] * 15] for p in (top, inner)], dtype=torch.float64)
            y = torch.tensor([0, 1])
            table = reliability(rows.log(), y)
            shared.append(int((table[:, 0] > 0).sum()) == 1)
            assert error_of(table) == pytest.approx(calibration_error(rows.log(), y), abs=1e-6)
    assert shared == [True, False, False, True, False, True]  # below the edge, at it, above it


@pytest.mark.parametrize("sure", [1.0, 1 - 1e-9])
def test_a_confidence_of_one_is_in_the_last_bin(sure):
    probabilities = torch.tensor([[0.95, 0.05]] * 10 + [[sure, 1 - sure]] * 10, dtype=torch.float64)
    table = reliability(probabilities.log(), torch.tensor([0] * 10 + [1] * 10))
    assert table[-1].tolist() == pytest.approx([20, 19.5, 10], abs=1e-7)
    assert not table[:-1].any()


def test_the_scaled_table_is_that_of_the_measure():
    test, validation = drawn(seed=1, scale=5), drawn(n=100, seed=2, scale=5)
    task = subject(Given(), test=test, validation=validation)
    found, numbers = details(task), calibration.compute(task, NoOptions())
    assert found["temperature"].dtype == torch.float64
    assert found["temperature"].item() == numbers["temperature"] > 1.5
    assert 100 * error_of(found["reliability_scaled"]) == pytest.approx(numbers["test_ece_scaled"], abs=2e-4)
    expected = torch.tensor(by_hand(test[0] / numbers["temperature"], test[1]), dtype=torch.float64)
    torch.testing.assert_close(found["reliability_scaled"], expected, rtol=0, atol=1e-9)


def test_without_a_validation_split_or_a_temperature_nothing_is_scaled():
    test = drawn()
    diverged = (torch.full((4, 5), math.nan), torch.zeros(4))
    for parts in ({}, {"validation": (torch.zeros(0, 5), torch.zeros(0))}, {"validation": diverged}):
        found = details(subject(Given(), test=test, **parts))
        assert found.keys().isdisjoint({"reliability_scaled", "temperature"})
        assert found["reliability"][:, 0].sum() == 300


@pytest.mark.parametrize("classes", [2, 6])
def test_confusions_agree_with_sklearn(classes):
    logits, y = drawn(classes=classes)
    found = details(subject(Given(), test=(logits, y)))
    expected = confusion_matrix(y, logits.argmax(dim=1), labels=range(classes))
    assert found["confusion"].tolist() == expected.tolist()
    assert found["confusion"].dtype == torch.int64
    assert found["confusion_lost"].item() == 0


def test_ties_are_the_first_class_and_a_class_that_never_occurs_has_its_row():
    found = details(subject(Given(), test=(torch.zeros(4, 3), torch.tensor([0, 1, 1, 0]))))
    assert found["confusion"].tolist() == [[2, 0, 0], [2, 0, 0], [0, 0, 0]]
    assert confusion(torch.tensor([-1, -1]), torch.tensor([0, 1]), 2).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize(("classes", "kept"), [(CLASSES, True), (CLASSES + 1, False)])
def test_a_table_of_very_many_classes_is_left_out(classes, kept):
    found = details(subject(Given(), test=(torch.randn(5, classes), torch.arange(5))))
    assert ("confusion" in found) == kept
    assert found["mistakes_index"].tolist()


def test_mistakes_are_the_most_confident_wrong_predictions_in_order():
    logits, y = drawn(n=200, classes=4)
    probabilities = logits.softmax(dim=1)
    wrong = [i for i in range(200) if logits[i].argmax() != y[i]]
    wrong.sort(key=lambda i: (-probabilities[i].max().item(), i))
    found = mistakes(logits, y, torch.zeros(200, 7))
    assert found["mistakes_index"].tolist() == wrong[:12]
    assert found["mistakes_true"].tolist() == y[wrong[:12]].tolist()
    assert found["mistakes_predicted"].tolist() == logits[wrong[:12]].argmax(dim=1).tolist()
    assert found["mistakes_confidence"].tolist() == probabilities[wrong[:12]].amax(dim=1).tolist()
    assert IMAGE not in found


def test_mistakes_of_one_confidence_are_in_the_order_of_the_data():
    logits = torch.tensor([[2.0, 0.0]]).repeat(40, 1).double()
    logits[30] *= 2
    found = mistakes(logits, torch.ones(40, dtype=torch.long), torch.zeros(40, 2))
    assert found["mistakes_index"].tolist() == [30, *range(11)]


def test_without_mistakes_the_arrays_have_no_rows():
    x = torch.rand(3, 1, 8, 8)
    found = mistakes(torch.eye(3).double(), torch.arange(3), x)
    kinds = {name: (value.shape, value.dtype) for name, value in found.items()}
    whole = ((0,), torch.int64)
    assert kinds == {
        "mistakes_index": whole,
        "mistakes_true": whole,
        "mistakes_predicted": whole,
        "mistakes_confidence": ((0,), torch.float64),
        IMAGE: ((0, 1, 8, 8), torch.uint8),
    }
    assert mistakes(torch.eye(3).double(), torch.arange(3), torch.rand(3, 3, 90, 20))[IMAGE].shape == (0, 3, 64, 14)


@pytest.mark.parametrize(
    ("x", "shown"),
    [
        (torch.rand(6, 1, 4, 5), True),
        (torch.rand(6, 3, 4, 5, dtype=torch.float64), True),
        (torch.randint(256, (6, 3, 4, 5), dtype=torch.uint8), True),
        (torch.rand(6, 2, 4, 5), False),
        (torch.rand(6, 20), False),
        (torch.rand(6, 1, 4, 5) * 1.5 + 0.1, False),
        (torch.rand(6, 1, 4, 5) - 0.9, False),
        (torch.full((6, 1, 4, 5), math.nan), False),
        (torch.randint(2, (6, 1, 4, 5)), False),
    ],
)
def test_only_images_are_shown_and_as_they_are(x, shown):
    logits, y = torch.eye(6).double() * torch.arange(1, 7)[:, None], (torch.arange(6) + 1) % 6
    found = mistakes(logits, y, x)
    assert (IMAGE in found) == shown
    if shown:
        assert found["mistakes_index"].tolist() == [5, 4, 3, 2, 1, 0]
        expected = x.flip(0) if x.dtype == torch.uint8 else (x.flip(0).double() * 255).round().to(torch.uint8)
        assert torch.equal(found[IMAGE], expected)


def test_large_images_are_averaged_over_areas_and_keep_their_proportions():
    x = torch.randint(256, (2, 3, 128, 64), dtype=torch.uint8)
    small = thumbnails(x)
    assert (small.shape, small.dtype) == ((2, 3, 64, 32), torch.uint8)
    by_blocks = x.double().view(2, 3, 64, 2, 32, 2).mean(dim=(3, 5))
    assert torch.equal(small, by_blocks.round().to(torch.uint8))
    assert thumbnails(torch.ones(1, 1, 1, 300)).shape == (1, 1, 1, 64)
    assert thumbnails(torch.ones(1, 1, 300, 300)).unique().tolist() == [255]


def test_examples_without_probabilities_are_lost_and_counted():
    logits, y = drawn(n=40)
    without = details(subject(Given(), test=(logits[5:], y[5:])))
    logits[0, 0], logits[1:5] = math.inf, math.nan
    found = details(subject(Given(), test=(logits, y)))
    assert found["confusion_lost"].item() == 5
    for name in ("reliability", "confusion", "mistakes_confidence"):
        assert torch.equal(found[name], without[name]), name
    assert torch.equal(found["mistakes_index"], without["mistakes_index"] + 5)


def test_a_network_that_diverged_has_arrays_of_zeros():
    nothing = (torch.full((6, 3), math.nan), torch.arange(6) % 3)
    found = details(subject(Given(), test=nothing, validation=nothing))
    assert found["confusion_lost"].item() == 6
    assert not found["reliability"].any()
    assert not found["confusion"].any()
    assert found["mistakes_index"].shape == (0,)


def test_a_subject_without_test_examples_has_none():
    assert details(subject(Given(), validation=drawn())) == {}
    assert details(subject(Given(), test=(torch.zeros(0, 3), torch.zeros(0)))) == {}


def test_the_network_runs_once_over_each_split_and_is_left_as_it_was():
    model = convolutional().train()
    task = subject(model, pixels=PIXELS, test=images(20), validation=images(15, seed=1))
    seen = []
    handle = model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    model.train()[1].eval()
    task.logits("test"), task.logits("validation")
    assert sum(seen) == 35
    with left_alone(model):
        found = details(task)
    handle.remove()
    assert sum(seen) == 35
    assert torch.equal(found[IMAGE], task.parts["test"].x[found["mistakes_index"]])


def test_a_run_keeps_the_details_of_its_last_weights(tmp_path):
    record = execute(RunFolder(tmp_path, one_run(DIGITS, train__steps=60, train__lr=0.05, train__eval_every=3)))
    assert record.best["test_error"] != record.metrics["test_error"]
    found = storage.read_tensors(record.folder / "details.safetensors")
    assert found["confusion"].sum() == found["reliability"][:, 0].sum() == 597
    right = found["confusion"].diagonal().sum()
    assert right == found["reliability"][:, 2].sum()
    assert 100 - 100 * right.item() / 597 == pytest.approx(record.metrics["test_error"])
    assert 100 * error_of(found["reliability"]) == pytest.approx(record.metrics["test_ece"], abs=2e-4)
    assert 100 * error_of(found["reliability_scaled"]) == pytest.approx(record.metrics["test_ece_scaled"], abs=2e-4)
    assert found["temperature"].item() == record.metrics["temperature"]
    assert found[IMAGE].shape == (12, 1, 8, 8)
