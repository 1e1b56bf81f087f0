import math

import pytest
import torch
from pydantic import ValidationError

from manifold_mixup.lab import streams
from manifold_mixup.lab.data import DATASETS, get_dataset, load_data
from manifold_mixup.lab.data.spiral import draw_spiral
from manifold_mixup.lab.errors import TestDataTaken, UnknownName

WITHOUT_FILES = [name for name, entry in DATASETS.items() if entry.prepare is None and entry.positional is None]


def test_some_sets_need_no_files():
    assert {"spiral", "digits"} <= set(WITHOUT_FILES)


def rows(x):
    return {tuple(row) for row in x.flatten(1).tolist()}


@pytest.mark.parametrize("name", WITHOUT_FILES)
def test_splits_fit_the_stated_facts(name):
    splits = load_data(name, {}, seed=0)
    test = splits.hand_out_test()
    for part in (splits.train, splits.validation, test):
        assert part.x.shape == (len(part), *splits.info.shape)
        assert part.x.dtype == torch.float32
        assert part.y.dtype == torch.int64
        assert set(part.y.tolist()) == set(range(len(splits.info.classes)))


@pytest.mark.parametrize("name", WITHOUT_FILES)
def test_a_seed_gives_the_same_splits_and_another_seed_others(name):
    first, again, other = (load_data(name, {}, seed) for seed in (0, 0, 1))
    assert torch.equal(first.train.x, again.train.x)
    assert not torch.equal(first.train.x, other.train.x)
    tests = [splits.hand_out_test().x for splits in (first, again, other)]
    assert torch.equal(tests[0], tests[1])
    assert not torch.equal(tests[0], tests[2])


@pytest.mark.parametrize("name", WITHOUT_FILES)
def test_the_test_split_is_handed_out_once(name):
    splits = load_data(name, {}, seed=0)
    assert len(splits.hand_out_test()) > 0
    with pytest.raises(TestDataTaken, match="already handed out"):
        splits.hand_out_test()


@pytest.mark.parametrize("name", WITHOUT_FILES)
def test_no_test_example_is_reachable_from_the_open_splits(name):
    splits = load_data(name, {}, seed=0)
    open_rows = rows(splits.train.x) | rows(splits.validation.x)
    test = splits.hand_out_test()
    assert not rows(test.x) & open_rows
    assert not rows(splits.train.x) & rows(splits.validation.x)


def test_the_spiral_is_the_papers():
    examples = draw_spiral(20_000, 780.0, streams.generator(0, "x"))
    radius = examples.x.norm(dim=1)
    first = examples.x[:20_000]
    assert torch.allclose(first[:, 0], radius[:20_000] * radius[:20_000].cos(), atol=1e-4)
    assert torch.allclose(first[:, 1], -radius[:20_000] * radius[:20_000].sin(), atol=1e-4)
    limit = math.radians(780)
    assert radius.max() <= limit
    # θ² is uniform on [0, limit²]: mean 1/2, variance 1/12; the standard error of the mean of 20,000 is 0.002
    share = (radius[:20_000].double() / limit).square()
    assert abs(share.mean().item() - 0.5) < 0.01
    assert abs(share.var().item() - 1 / 12) < 0.005


def test_the_second_arm_is_the_first_turned_by_half_a_turn():
    examples = draw_spiral(500, 780.0, streams.generator(0, "x"))
    second = -examples.x[500:]
    radius = second.norm(dim=1)
    assert torch.allclose(second[:, 0], radius * radius.cos(), atol=1e-4)
    assert examples.y.tolist() == [0] * 500 + [1] * 500


def test_spiral_sizes_are_options():
    splits = load_data("spiral", {"points_per_class": 7, "validation_points": 8, "test_points": 10, "degrees": 90.0}, 0)
    assert (len(splits.train), len(splits.validation), len(splits.hand_out_test())) == (14, 8, 10)
    assert splits.train.x.norm(dim=1).max() <= math.pi / 2 + 1e-5


def test_digits_sizes_and_scale():
    splits = load_data("digits", {}, 0)
    assert (len(splits.train), len(splits.validation), len(splits.hand_out_test())) == (1000, 200, 597)
    assert splits.train.x.min() == 0
    assert splits.train.x.max() == 1


def test_which_data_are_images_and_which_of_them_are_read_as_they_are():
    assert {name for name, entry in DATASETS.items() if entry.info.unit_range} == {"digits"}
    assert load_data("digits", {}, 0).info.images
    assert not load_data("spiral", {}, 0).info.images
    for name, entry in DATASETS.items():
        if entry.info.pixels is not None:
            assert (entry.info.images, entry.info.unit_range) == (True, False), name


@pytest.mark.parametrize("seed", range(5))
def test_every_split_of_the_digits_has_the_shares_of_the_whole(seed):
    splits = load_data("digits", {}, seed)
    parts = [splits.train, splits.validation, splits.hand_out_test()]
    counts = [part.y.bincount(minlength=10) for part in parts]
    whole = sum(counts)
    assert whole.sum() == 1797
    for part, count in zip(parts, counts, strict=True):
        assert (count - whole * len(part) / 1797).abs().max() < 2


@pytest.mark.parametrize("size", [10, 33, 500, 999])
def test_fewer_digits_are_class_balanced_and_leave_the_test_alone(size):
    few, all_of_them = load_data("digits", {"train_examples": size}, 0), load_data("digits", {}, 0)
    counts = few.train.y.bincount(minlength=10)
    assert counts.sum() == size
    if size <= 900:
        assert counts.max() - counts.min() <= 1
    assert rows(few.train.x) <= rows(all_of_them.train.x)
    assert torch.equal(few.hand_out_test().x, all_of_them.hand_out_test().x)


def test_unknown_data_set_names_the_nearest():
    with pytest.raises(UnknownName, match="unknown data set 'digts': did you mean 'digits'"):
        get_dataset("digts")


def test_unknown_option_is_refused():
    with pytest.raises(ValidationError):
        load_data("spiral", {"points": 3}, 0)
