import errno
import gc
import socket
import sys
import warnings

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import utils as hub_utils

from lab.data.own_images import Count, pixels, png, write
from manifold_mixup.lab.data import describe_data, hub, load_data, load_test, prepare_data
from manifold_mixup.lab.data.base import Places
from manifold_mixup.lab.errors import CorruptedFile, LabError, MissingExtra, StorageError, UsageError

COUNT = 60


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("this test has no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def closed():
    """Close the files that ``datasets`` leaves open when reading them fails, which is no concern of these tests."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
def places(tmp_path):
    return Places(cache=tmp_path / "cache")


def load(name, places, seed=0, **options):
    return load_data("hf", {"name": str(name), **options}, seed, places)


def images(count=COUNT, start=0, label=lambda i: i % 3, **columns):
    """Columns of images as ``datasets`` writes them, without its own metadata."""
    return {
        "image": [{"bytes": png(start + i), "path": None} for i in range(count)],
        "label": [label(i) for i in range(count)],
        **columns,
    }


def parquet(path, columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def saved(path, names=("ant", "bee", "cat"), **parts):
    """What ``save_to_disk`` leaves: one split for each part, or none for one called rows."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    made = {part: datasets.Dataset.from_dict(columns, features=features) for part, columns in parts.items()}
    with hub._quiet(datasets):
        (made["rows"] if "rows" in made else datasets.DatasetDict(made)).save_to_disk(str(path))
    return path


def csv(path, text):
    return write(path, text.encode())


def known(first=0, count=COUNT):
    return {pixels(i).transpose(2, 0, 1).tobytes(): i for i in range(first, first + count)}


def numbers(examples, by_bytes):
    return [by_bytes[image.numpy().tobytes()] for image in examples.x]


# --- images


@pytest.mark.parametrize("kind", ["parquet", "parquet folder", "bytes", "saved", "saved in splits", "arrow"])
def test_images_of_a_local_copy_are_read_without_network(tmp_path, places, kind):
    if kind == "parquet":
        path = parquet(tmp_path / "a.parquet", images())
    elif kind == "parquet folder":
        parquet(tmp_path / "a" / "data" / "part-0.parquet", images(30))
        path = parquet(tmp_path / "a" / "data" / "part-1.parquet", images(30, 30)).parent.parent
    elif kind == "bytes":
        columns = images()
        path = parquet(tmp_path / "a.parquet", {**columns, "image": [value["bytes"] for value in columns["image"]]})
    elif kind == "saved":
        path = saved(tmp_path / "a", rows=images())
    elif kind == "saved in splits":
        path = saved(tmp_path / "a", train=images())
    else:
        path = next(saved(tmp_path / "a", rows=images()).glob("*.arrow"))
    splits = load(path, places)
    parts = [splits.train, splits.validation, splits.hand_out_test()]
    assert list(map(len, parts)) == [43, 5, 12]
    found = [numbers(part, known()) for part in parts]
    assert sorted(n for which in found for n in which) == list(range(COUNT))
    for part, which in zip(parts, found, strict=True):
        assert part.y.tolist() == [i % 3 for i in which]
    names = ("ant", "bee", "cat") if "saved" in kind or kind == "arrow" else ("0", "1", "2")
    assert splits.info.classes == names
    assert splits.info.shape == (3, 8, 8)
    assert parts[2].y.bincount().tolist() == [4, 4, 4]


def test_images_stored_as_files_are_read(tmp_path, places):
    for i in range(COUNT):
        write(tmp_path / "a" / str(i % 3) / f"{i}.png", png(i))
    splits = load(tmp_path / "a", places)
    test = splits.hand_out_test()
    assert [i % 3 for i in numbers(test, known())] == test.y.tolist()
    assert (len(splits.train), len(test)) == (43, 12)


def test_the_test_images_are_the_same_for_every_seed_and_the_cache_is_shared(tmp_path, places, monkeypatch):
    path = parquet(tmp_path / "a.parquet", images())
    count = Count(monkeypatch)
    runs = [load(path, places, seed) for seed in range(3)]
    assert count.take() == COUNT
    tests = [run.hand_out_test() for run in runs]
    assert all(torch.equal(tests[0].x, one.x) for one in tests)
    assert not torch.equal(runs[0].validation.x, runs[1].validation.x)
    assert runs[0].info.pixels == runs[1].info.pixels
    assert len({run.info.fingerprint for run in runs}) == 1


def test_a_changed_file_is_read_anew(tmp_path, places):
    path = parquet(tmp_path / "a.parquet", images())
    before = load(path, places)
    parquet(path, images(start=100))
    after = load(path, places)
    assert [100 + n for n in numbers(before.train, known())] == numbers(after.train, known(100))
    assert before.info.fingerprint != after.info.fingerprint


def test_the_same_content_in_another_format_has_the_same_fingerprint(tmp_path, places):
    one = load(parquet(tmp_path / "a.parquet", images()), places)
    other = load(parquet(tmp_path / "b" / "b.parquet", images()).parent, Places(cache=tmp_path / "other"))
    assert one.info.fingerprint == other.info.fingerprint
    third = load(parquet(tmp_path / "c.parquet", images(label=lambda i: (i + 1) % 3)), places)
    assert third.info.fingerprint != one.info.fingerprint


def test_size_and_channels_are_as_asked(tmp_path, places):
    path = parquet(tmp_path / "a.parquet", images())
    splits = load(path, places, size=4, channels=1)
    assert splits.train.x.shape == (43, 1, 4, 4)
    assert splits.info.pixels.crop_padding == 0
    assert load(path, places, crop_padding=2, flip=False).info.pixels.crop_padding == 2


def test_broken_images_are_named_by_their_row(tmp_path, places):
    columns = images()
    columns["image"][7] = {"bytes": b"x", "path": None}
    columns["image"][9] = None
    path = parquet(tmp_path / "a.parquet", columns)
    with pytest.raises(CorruptedFile, match=r"train: 2 of 60 images cannot be decoded, .*: row 7 \(.*row 9 \(it has 0"):
        load(path, places)
    splits = load(path, places, max_broken=0.1)
    assert splits.info.sizes == (46, 12)
    assert "broken images left out (2): row 7" in splits.info.source


def test_an_image_file_that_is_gone_is_an_error(tmp_path, places):
    columns = images()
    columns["image"][7] = {"bytes": None, "path": str(tmp_path / "gone.png")}
    with pytest.raises(StorageError, match=r"cannot read .*gone.png"):
        load(parquet(tmp_path / "a.parquet", columns), places)


# --- splits


def test_splits_are_found_by_their_names(tmp_path, places):
    path = saved(tmp_path / "a", train=images(), validation=images(6, 100), test=images(9, 200))
    splits = load(path, places, seed=3)
    assert numbers(splits.validation, known(100)) == list(range(100, 106))
    assert numbers(splits.hand_out_test(), known(200)) == list(range(200, 209))
    assert (len(splits.train), splits.info.sizes) == (60, (60, 9))


def test_files_are_splits_by_their_names(tmp_path, places):
    parquet(tmp_path / "a" / "train-00000-of-00001.parquet", images())
    parquet(tmp_path / "a" / "test-00000-of-00001.parquet", images(9, 200))
    assert load(tmp_path / "a", places).info.sizes == (60, 9)


def test_without_a_test_split_the_validation_split_is_the_test(tmp_path, places):
    path = saved(tmp_path / "a", train=images(), validation=images(6, 100))
    splits = load(path, places)
    assert numbers(splits.hand_out_test(), known(100)) == list(range(100, 106))
    assert (len(splits.train), len(splits.validation)) == (54, 6)


def test_splits_can_be_chosen(tmp_path, places):
    path = saved(tmp_path / "a", train=images(), extra=images(6, 100), test=images(9, 200))
    splits = load(path, places, train_split="test", test_split="extra", validation_examples=0)
    assert numbers(splits.hand_out_test(), known(100)) == list(range(100, 106))
    assert sorted(numbers(splits.train, known(200))) == list(range(200, 209))
    splits = load(path, places, validation_split="test")
    assert numbers(splits.validation, known(200)) == list(range(200, 209))
    assert splits.info.sizes == (48, 12)


def test_wrong_splits_are_refused(tmp_path, places):
    path = saved(tmp_path / "a", train=images(), test=images(9, 200))
    with pytest.raises(UsageError, match="test_split: there is no split 'tset': did you mean 'test'"):
        load(path, places, test_split="tset")
    with pytest.raises(UsageError, match="one split is taken for two: 'train', 'test', 'test'"):
        load(path, places, test_split="test", validation_split="test")
    other = saved(tmp_path / "b", one=images(), two=images())
    with pytest.raises(UsageError, match="has no split 'train': set train_split; there is 'one', 'two'"):
        load(other, places)
    only_test = saved(tmp_path / "c", test=images())
    with pytest.raises(UsageError, match="has no split 'train'"):
        load(only_test, places)
    assert len(load(only_test, places, train_split="test").train) == 43


# --- measuring a finished network


def test_the_test_split_is_measured_or_all_rows_of_a_single_one(tmp_path, places):
    both = saved(tmp_path / "a", train=images(), test=images(9, 200))
    info, examples = load_test("hf", {"name": str(both)}, places)
    assert numbers(examples, known(200)) == list(range(200, 209))
    assert info.classes == ("ant", "bee", "cat")
    _, examples = load_test("hf", {"name": str(parquet(tmp_path / "b.parquet", images()))}, places)
    assert numbers(examples, known()) == list(range(COUNT))
    _, examples = load_test("hf", {"name": str(saved(tmp_path / "c", test=images(9)))}, places)
    assert numbers(examples, known()) == list(range(9))
    with pytest.raises(UsageError, match="has no split 'test': set test_split; there is 'one', 'two'"):
        load_test("hf", {"name": str(saved(tmp_path / "d", one=images(), two=images()))}, places)


def test_rows_to_measure_may_lack_classes(tmp_path, places):
    info, examples = load_test("hf", {"name": str(parquet(tmp_path / "b.parquet", images(label=lambda i: 2)))}, places)
    assert info.classes == ("0", "1", "2")
    assert set(examples.y.tolist()) == {2}


# --- numbers

TABLE = "id,x,y,label\n" + "".join(f"r{i},{i},{i * i / 10},{'ab'[i % 2]}\n" for i in range(40))


def test_a_csv_of_numbers_is_standardised_with_its_training_rows(tmp_path, places):
    path = csv(tmp_path / "a.csv", TABLE)
    splits = load(path, places, feature_columns=["x", "y"], label_column="label")
    raw = load(path, places, feature_columns=["x", "y"], label_column="label", standardise=False)
    parts, stored = ([one.train, one.validation, one.hand_out_test()] for one in (splits, raw))
    assert list(map(len, parts)) == [29, 3, 8]
    x = torch.cat([part.x for part in stored])
    assert sorted(x[:, 0].tolist()) == list(range(40))
    assert torch.allclose(x[:, 1], x[:, 0].square() / 10)
    pool = torch.cat([part.x for part in stored[:2]]).double()
    for part, values in zip(parts, stored, strict=True):
        by_hand = (values.x.double() - pool.mean(dim=0)) / pool.std(dim=0, correction=0)
        assert (part.x - by_hand).abs().max() < 1e-5
        assert part.x.dtype == torch.float32
        assert part.y.tolist() == (values.x[:, 0] % 2).long().tolist()
    info = splits.info
    assert (info.shape, info.classes, info.features, info.pixels) == ((2,), ("a", "b"), ("x", "y"), None)
    assert info.fingerprint == raw.info.fingerprint


def test_the_label_and_the_numbers_of_a_csv_are_found(tmp_path, places):
    path = csv(tmp_path / "a.csv", "x,kind,n\n" + "".join(f"{i},{'ab'[i % 2]},{-i}\n" for i in range(40)))
    info = describe_data("hf", {"name": str(path)}, places)
    assert (info.shape, info.features, info.classes) == ((2,), ("x", "n"), ("a", "b"))
    path = csv(tmp_path / "b.tsv", "x\ttarget\tn\n" + "".join(f"{i}\t{i % 3}\t{-i}\n" for i in range(40)))
    info = describe_data("hf", {"name": str(path)}, places)
    assert (info.features, info.classes) == (("x", "n"), ("0", "1", "2"))


def test_a_column_that_is_always_the_same_becomes_zero(tmp_path, places):
    path = csv(tmp_path / "a.csv", "x,c,label\n" + "".join(f"{i},0.1,{i % 2}\n" for i in range(40)))
    assert load(path, places).train.x[:, 1].abs().max() == 0


def test_a_folder_of_csv_files_is_measured_in_the_units_of_its_training_rows(tmp_path, places):
    rows = [f"{i},{i % 2}\n" for i in range(40)]
    csv(tmp_path / "a" / "train.csv", "x,label\n" + "".join(rows))
    csv(tmp_path / "a" / "test.csv", "x,label\n" + "".join(rows[:4]))
    _, examples = load_test("hf", {"name": str(tmp_path / "a")}, places)
    by_hand = (torch.arange(4.0) - 19.5) / torch.arange(40.0).std(correction=0)
    assert torch.allclose(examples.x[:, 0], by_hand, atol=1e-6)
    assert torch.equal(load(tmp_path / "a", places).hand_out_test().x, examples.x)
    alone = csv(tmp_path / "b.csv", "x,label\n" + "".join(rows))
    with pytest.raises(UsageError, match="has no training rows to standardise by"):
        load_test("hf", {"name": str(alone)}, places)
    _, raw = load_test("hf", {"name": str(alone), "standardise": False}, places)
    assert raw.x[:, 0].tolist() == list(range(40))


@pytest.mark.parametrize("value", ["", "nan", "inf", "1e300"])
def test_a_number_that_is_missing_or_not_finite_is_an_error_that_names_it(tmp_path, places, value):
    path = csv(tmp_path / "a.csv", f"x,y,label\n1,2,a\n3,4,b\n5,{value},a\n")
    with pytest.raises(UsageError, match=r"train, row 2: 'y' is (missing|nan|inf|1e\+300): fill in a finite number"):
        load(path, places)


# --- labels


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        ([0, 1, -1, 1], "row 2: -1 is no class; labels that are numbers go from 0 to C-1"),
        ([1, 2, 1, 2], "row 0: the label is 1, but none is 0; labels that are numbers go from 0"),
        ([0, 1, 5, 1], "row 2: the label is 5, but none is 2"),
        ([0, 1, 10**9, 1], "labels go up to 1000000000, which is no number of classes"),
        ([0, 0, 0, 0], "all labels are 0: there is one class alone"),
        ([0, None, 0, 1], "row 1: the label is missing"),
        (["a", None, "b", "a"], "row 1: the label is missing"),
        (["a", "a", "a", "a"], "all labels are a: there is one class alone"),
        ([0.5, 1.0, 2.0, 1.0], "labels should be whole numbers or text, not 0.5"),
        ([[0], [1], [0], [1]], "labels should be whole numbers or text, not .0."),
    ],
)
def test_wrong_labels_are_an_error_that_names_the_row(tmp_path, places, labels, text):
    columns = {"image": images(4)["image"], "label": labels}
    with pytest.raises(UsageError, match=text):
        load(parquet(tmp_path / "a.parquet", columns), places, label_column="label")


def test_a_label_out_of_range_in_the_test_split_is_an_error_that_names_the_row(tmp_path, places):
    parquet(tmp_path / "a" / "train.parquet", images())
    parquet(tmp_path / "a" / "test.parquet", images(9, label=lambda i: 3 if i == 5 else 0))
    with pytest.raises(UsageError, match=r"test, 'label', row 5: 3 is a number of no class: there is 0 to 2"):
        load(tmp_path / "a", places)
    parquet(tmp_path / "b" / "train.parquet", images(label=lambda i: "ab"[i % 2]))
    parquet(tmp_path / "b" / "test.parquet", images(9, label=lambda i: "abc"[i % 3]))
    with pytest.raises(UsageError, match=r"test, 'label', row 2: c is a name of no class: there is 'a', 'b'"):
        load(tmp_path / "b", places)


def test_labels_that_are_not_published_are_refused(tmp_path, places):
    columns = images(9)
    columns["label"] = [-1] * 9
    path = saved(tmp_path / "a", train=images(), test=columns)
    with pytest.raises(UsageError, match=r"row 0: -1 is .*; -1 stands for a label that is not published"):
        load(path, places)


@pytest.mark.parametrize(
    ("labels", "classes", "found"),
    [
        (["b", "a", "c", "a"], ("a", "b", "c"), [1, 0, 2, 0]),
        (["10", "9", "10", "9"], ("10", "9"), [0, 1, 0, 1]),
        ([True, False, True, True], ("0", "1"), [1, 0, 1, 1]),
        ([1.0, 0.0, 2.0, 0.0], ("0", "1", "2"), [1, 0, 2, 0]),
    ],
)
def test_labels_become_indices_of_the_sorted_classes(tmp_path, places, labels, classes, found):
    path = parquet(tmp_path / "a.parquet", {"image": images(4)["image"], "label": labels})
    info, examples = load_test("hf", {"name": str(path), "label_column": "label"}, places)
    assert (info.classes, examples.y.tolist()) == (classes, found)


# --- columns


def test_columns_that_cannot_be_told_apart_are_listed(tmp_path, places):
    two = parquet(tmp_path / "two.parquet", images(4, coarse=[0, 1, 0, 1], thumbnail=images(4)["image"]))
    with pytest.raises(
        UsageError, match=r"several columns hold images: set image_column; there is 'image' \(image\), "
    ):
        load(two, places)
    info = describe_data("hf", {"name": str(two), "image_column": "thumbnail"}, places)
    assert info.classes == ("0", "1", "2")  # a column of the name label comes first
    columns = images(4, one=[0, 1, 0, 1], two=[0, 1, 1, 0])
    del columns["label"]
    path = parquet(tmp_path / "labels.parquet", columns)
    with pytest.raises(
        UsageError, match=r"set label_column; there is 'image' \(image\), 'one' \(int64\), 'two' \(int64\)"
    ):
        load(path, places)
    assert describe_data("hf", {"name": str(path), "label_column": "two"}, places).classes == ("0", "1")
    path = csv(tmp_path / "a.csv", "x,y1,y2\n1,2,3\n")
    with pytest.raises(UsageError, match="not clear which column is the label"):
        load(path, places)


def test_wrong_columns_are_refused(tmp_path, places):
    path = parquet(tmp_path / "a.parquet", images(4, note=["a", "b", "c", "d"], x=[1.0, 2.0, 3.0, 4.0]))
    for options, text in (
        ({"label_column": "lable"}, "label_column: there is no column 'lable': did you mean 'label'"),
        ({"image_column": "note"}, "image_column: 'note' holds no images"),
        ({"feature_columns": ["note"]}, "column 'note' holds no numbers"),
        ({"feature_columns": ["x"], "image_column": "image"}, "set image_column or feature_columns"),
        ({"feature_columns": ["x", "label"], "label_column": "label"}, "'label' is the label and what it is told from"),
        ({"feature_columns": ["x"], "size": 8}, "holds no images, so size has nothing to say"),
    ):
        with pytest.raises(UsageError, match=text):
            load(path, places, **options)


def test_numbers_beside_images_can_be_chosen(tmp_path, places):
    path = parquet(tmp_path / "a.parquet", images(4, x=[1.0, 2.0, 3.0, 4.0]))
    info = describe_data("hf", {"name": str(path), "feature_columns": ["x"]}, places)
    assert (info.shape, info.pixels) == ((1,), None)


def test_a_split_that_lacks_a_column_is_an_error(tmp_path, places):
    path = saved(tmp_path / "a", train=images(), test=images(9))
    other = datasets.load_from_disk(str(path))
    other["test"] = other["test"].rename_column("label", "kind")
    with hub._quiet(datasets):
        other.save_to_disk(str(tmp_path / "b"))
    with pytest.raises(UsageError, match="test lacks the column 'label'"):
        load(tmp_path / "b", places)


# --- describing and preparing


def test_describing_decodes_nothing_and_says_what_is_loaded(tmp_path, places, monkeypatch):
    path = parquet(tmp_path / "a.parquet", images())
    count = Count(monkeypatch)
    described = describe_data("hf", {"name": str(path)}, places)
    assert count.take() == 0
    loaded = load(path, places).info
    for name in ("name", "title", "shape", "classes", "features", "source", "terms"):
        assert getattr(described, name) == getattr(loaded, name), name


def test_preparing_tells_its_progress_and_leaves_nothing_to_decode(tmp_path, places, monkeypatch, capfd):
    path = parquet(tmp_path / "a.parquet", images())
    count, seen = Count(monkeypatch), []
    prepare_data("hf", {"name": str(path)}, places, lambda *told: seen.append(told))
    assert seen[:2] == [(f"read {path}", 0, 1), (f"read {path}", 1, 1)]
    assert seen[-1] == (f"decode hf:{path}, train", COUNT, COUNT)
    assert count.take() == COUNT
    load(path, places)
    assert count.take() == 0
    assert capfd.readouterr() == ("", "")
    assert (places.cache / "hf").is_dir()


@pytest.mark.usefixtures("closed")
def test_bars_and_messages_of_datasets_are_as_they_were(tmp_path, places):
    before = datasets.logging.get_verbosity(), hub_utils.logging.get_verbosity()
    assert not datasets.are_progress_bars_disabled()
    load(csv(tmp_path / "a.csv", TABLE), places, label_column="label")
    with pytest.raises(LabError):
        load(csv(tmp_path / "b.csv", ""), places)
    assert not datasets.are_progress_bars_disabled()
    assert not hub_utils.are_progress_bars_disabled()
    assert (datasets.logging.get_verbosity(), hub_utils.logging.get_verbosity()) == before


# --- what cannot be read


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nobody/nothing-of-this-name", "is no file or folder here, and cannot be had from the Hub: "),
        ("nothing-of-this-name", "is no file or folder here, and cannot be had from the Hub: "),
        ("not/there.csv", "there is no such file or folder"),
        ("/not/there", "there is no such file or folder"),
        ("./there", "there is no such file or folder"),
        ("csv", "is a reader of datasets, no data set"),
        ("", "data 'hf' needs a name or a path: hf:NAME"),
    ],
)
def test_a_name_that_leads_nowhere_is_one_line(places, name, text, capfd, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its retries
    with pytest.raises(UsageError) as caught:
        load(name, places)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_offline_a_name_of_the_hub_is_one_line(places, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="cannot be had from the Hub: Couldn't reach"):
        load("nobody/nothing-of-this-name", places)


@pytest.mark.usefixtures("closed")
def test_damaged_files_are_one_line(tmp_path, places, capfd):
    whole = parquet(tmp_path / "whole.parquet", images())
    paths = [
        write(tmp_path / "text.parquet", b"hello" * 100),
        write(tmp_path / "cut.parquet", whole.read_bytes()[:-20]),
        write(tmp_path / "empty.csv", b""),
        write(tmp_path / "ragged.csv", b"a,b\n1,2\n3,4,5,6\n"),
        write(tmp_path / "bytes.csv", bytes(range(128, 256))),
        write(tmp_path / "text.arrow", b"hello" * 100),
        write(tmp_path / "folder" / "state.json", b"{}").parent,
        write(tmp_path / "nothing" / "x.unknown", b"").parent,
    ]
    for path in paths:
        with pytest.raises(CorruptedFile, match=f"hf:{path} cannot be read: .+") as caught:
            load(path, places)
        assert "\n" not in str(caught.value), path
    assert capfd.readouterr() == ("", "")


def test_other_files_are_refused(tmp_path, places):
    with pytest.raises(UsageError, match="the file should end in .parquet, .arrow, .csv, .tsv"):
        load(write(tmp_path / "a.pkl", b""), places)
    csv(tmp_path / "a" / "a.csv", TABLE)
    parquet(tmp_path / "a" / "a.parquet", images())
    with pytest.raises(UsageError, match="holds files of several kinds, .csv and .parquet: name one of them"):
        load(tmp_path / "a", places)
    with pytest.raises(UsageError, match="a file has no configurations"):
        load(tmp_path / "a" / "a.csv", places, config="x")


def test_a_name_with_brackets_is_a_name(tmp_path, places):
    path = csv(tmp_path / "we[1]ird*" / "a[b].csv", "x,label\n" + "".join(f"{i},{i % 2}\n" for i in range(40)))
    assert load(path, places).info.sizes == (32, 8)


@pytest.mark.usefixtures("closed")
def test_a_full_disk_is_a_storage_error(tmp_path, places, monkeypatch):
    path = csv(tmp_path / "a.csv", "x,label\n1,a\n2,b\n")

    def write_table(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "cache" / "x.arrow"))

    monkeypatch.setattr("datasets.arrow_writer.ArrowWriter.write_table", write_table)
    with pytest.raises(StorageError, match=r"cannot write .*cache/x.arrow: No space left on device"):
        load(path, places)


def test_without_datasets_the_error_names_the_extra(tmp_path, places, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"datasets.*manifold-mixup\[lab\]"):
        load(csv(tmp_path / "a.csv", TABLE), places)
