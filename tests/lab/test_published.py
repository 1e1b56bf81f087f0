"""The published numbers: sources, a few of them read off the papers again, and finding one."""

import pytest

from manifold_mixup.lab.errors import LabError
from manifold_mixup.lab.published import find_published, read_published


def test_every_number_is_unique_and_has_a_source():
    seen = [
        (p.table, p.source, p.dataset, p.network, p.method, p.alpha, str(p.layers), p.epochs, p.metric)
        for p in read_published()
    ]
    assert len(set(seen)) == len(seen) > 250
    assert all(p.source for p in read_published())


@pytest.mark.parametrize(
    ("where", "value", "std"),
    [
        (
            {
                "table": "table1",
                "network": "PreActResNet18",
                "dataset": "CIFAR-100",
                "method": "manifold_mixup",
                "metric": "test_error",
            },
            20.34,
            0.525,
        ),
        ({"table": "table2", "network": "WRN-28-10", "method": "none", "metric": "test_nll"}, 0.143, 0.002),
        ({"table": "table5", "dataset": "CIFAR-100", "layers": [0, 1, 2, 3], "metric": "test_accuracy"}, 80.18, None),
        ({"table": "table6", "method": "input_mixup", "alpha": 1.5}, 96.84, None),
        ({"table": "table9", "method": "none", "metric": "accuracy/zoom-1.8"}, 7.98, None),
        ({"table": "svd_mnist", "method": "manifold_mixup", "metric": "sum_other_singular_values"}, 40.98, None),
        ({"table": "knn", "method": "input_mixup", "metric": "knn_error"}, 5.54, None),
        ({"table": "openmixup", "dataset": "CIFAR-10", "method": "none", "epochs": 200}, 94.87, None),
    ],
)
def test_numbers_read_off_the_papers(where, value, std):
    found = find_published(where)
    assert (found.value, found.std) == (value, std)


def test_none_found_is_none_and_several_are_an_error():
    assert find_published({"table": "table1", "method": "no such method"}) is None
    with pytest.raises(LabError, match="name more keys"):
        find_published({"table": "table1"})


def test_the_ratios_that_the_guide_quotes():
    sums = {
        method: find_published({"table": "svd_mnist", "method": method, "metric": "sum_other_singular_values"}).value
        for method in ("none", "input_mixup", "manifold_mixup")
    }
    assert sums["manifold_mixup"] / sums["none"] == pytest.approx(0.52, abs=0.005)
    assert sums["input_mixup"] / sums["none"] == pytest.approx(0.85, abs=0.005)
