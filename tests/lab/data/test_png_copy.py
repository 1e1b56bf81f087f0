import errno
import hashlib
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from lab.data.own_images import Count, encoded, png, write
from lab.data.server import serving
from lab.data.test_cifar import BASES, SIZES, made, options, rows
from lab.data.test_cifar import write as write_files
from manifold_mixup.lab.data import DATASETS, cifar, describe_data, load_data, load_test, prepare_data
from manifold_mixup.lab.data.archives import PublishedFile
from manifold_mixup.lab.data.base import Places
from manifold_mixup.lab.data.png_copy import or_png_copy
from manifold_mixup.lab.errors import ConfigMismatch, CorruptedFile, StorageError, UsageError
from manifold_mixup.lab.records import RunFolder

CLASSES = cifar.CIFAR100.info.classes
SOURCE = "https://github.com/cyizhuo/CIFAR-100-dataset"
PARTS = ("train", "test")


def pictures():
    """Part, class, file name and pixels ``(32, 32, 3)`` of a copy of the files that :func:`rows` makes."""
    for part in PARTS:
        data, labels = rows("cifar100", part)
        numbers = np.random.default_rng(7).permutation(len(data))  # names do not come in the published order
        for row, label, number in zip(data, labels, numbers, strict=True):
            yield part, CLASSES[label], f"x_s_{number:06}.png", row.reshape(3, 32, 32).transpose(1, 2, 0)


def in_order(part):
    """Images ``(n, 3, 32, 32)`` and labels of one part, by class and then by file name."""
    own = [(CLASSES.index(name), file, image) for where, name, file, image in pictures() if where == part]
    own.sort(key=lambda one: one[:2])
    return np.stack([image.transpose(2, 0, 1) for *_, image in own]), [label for label, *_ in own]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The copy, written once."""
    root = tmp_path_factory.mktemp("written")
    for part, name, file, array in pictures():
        write(root / part / name / file, encoded(Image.fromarray(array)))
    return root


@pytest.fixture
def places(tmp_path, written):
    """Where a data folder holds a copy that a test may damage."""
    shutil.copytree(written, tmp_path / "data" / "CIFAR-100-dataset")
    return Places(tmp_path / "data", tmp_path / "cache")


@pytest.fixture
def copy(places):
    return places.data_dir / "CIFAR-100-dataset"


def digest(part):
    return hashlib.sha256(in_order(part)[0].tobytes()).hexdigest()


def entry(url=None, **digests):
    """The contents of small published files, and the data set that is read from them or from the copy."""
    contents, published, archive = made("cifar100", url)
    pinned = replace(cifar.CIFAR100_COPY, digests=tuple((part, digests.get(part) or digest(part)) for part in PARTS))
    files = replace(
        cifar.CIFAR100_FILES,
        files=tuple(PublishedFile(name, hashlib.md5(content).hexdigest()) for name, content in contents.items()),
    )
    return contents, or_png_copy(published, files, pinned), archive


def load(dataset, places, **chosen):
    return dataset.load(options(dataset, **chosen), 0, places)


def all_of(splits):
    """Training and test images as they lie in splits without a validation split."""
    return splits.train, splits.hand_out_test()


def check(dataset, places):
    """The copy is read, every image with its label, by class and file name."""
    facts, test = dataset.test(options(dataset), places)
    images, labels = in_order("test")
    assert np.array_equal(test.x.numpy(), images)
    assert test.y.tolist() == labels == sorted(labels)
    assert (test.x.dtype, test.y.dtype) == (torch.uint8, torch.int64)
    splits = load(dataset, places, validation_examples=0)
    assert splits.info == facts
    train, own_test = all_of(splits)
    images, labels = in_order("train")
    stored = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    assert {image.numpy().tobytes(): int(label) for image, label in zip(train.x, train.y, strict=True)} == stored
    assert len(train) == len(stored) == SIZES["cifar100"][0]
    assert torch.equal(own_test.x, test.x)


def test_the_copy_is_read_in_the_order_of_classes_and_file_names(places, copy):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    _, dataset, _ = entry()
    assert dataset.present(places)
    check(dataset, places)
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before  # nothing is written there


def test_the_copy_holds_what_the_published_files_hold_but_for_the_order(places, tmp_path):
    contents, dataset, _ = entry()
    write_files(tmp_path / "published" / "cifar-100-python", contents)
    mine = load(dataset, places, validation_examples=0)
    theirs = load(dataset, Places(tmp_path / "published", tmp_path / "cache"), validation_examples=0)
    assert (mine.info.classes, mine.info.pixels, mine.info.shape) == (
        theirs.info.classes,
        theirs.info.pixels,
        theirs.info.shape,
    )
    for ours, published in zip(all_of(mine), all_of(theirs), strict=True):
        assert not torch.equal(ours.x, published.x)
        pairs = [
            sorted((x.numpy().tobytes(), int(y)) for x, y in zip(e.x, e.y, strict=True)) for e in (ours, published)
        ]
        assert pairs[0] == pairs[1]


@pytest.mark.parametrize("where", ["data folder", "archive", "cache"])
def test_the_published_files_win(places, where):
    contents, dataset, archive = entry()
    if where == "archive":
        write_files(places.data_dir, {"cifar-100-python.tar.gz": archive})
    else:
        root = places.data_dir if where == "data folder" else places.cache / "cifar100"
        write_files(root / "cifar-100-python", contents)
    splits = load(dataset, places)
    assert splits.hand_out_test().y.tolist() == rows("cifar100", "test")[1]
    assert splits.info.fingerprint == ""
    assert not (places.cache / "decoded").exists()


def test_a_copy_beside_incomplete_published_files_is_read(places):
    contents, dataset, _ = entry()
    del contents["meta"]
    write_files(places.data_dir / "cifar-100-python", contents)
    check(dataset, places)


def test_the_facts_say_that_it_is_the_copy(places):
    _, dataset, _ = entry()
    info = load(dataset, places).info
    assert info.title.endswith(f"(PNG copy: {SOURCE})")
    assert info.fingerprint == f"png:{digest('train')[:16]},{digest('test')[:16]}"
    published = dataset.info
    assert replace(info, title=published.title, fingerprint="") == published


def test_a_run_cannot_go_on_with_the_other_source(tmp_path, places):
    contents, dataset, _ = entry()
    write_files(tmp_path / "published" / "cifar-100-python", contents)
    copied, published = (
        load(dataset, Places(folder, places.cache)).info for folder in (places.data_dir, tmp_path / "published")
    )
    for first, second in ((copied, published), (published, copied)):
        config = SimpleNamespace(experiment=f"{first.fingerprint[:3]}x", label="none", config=SimpleNamespace(seed=0))
        folder = RunFolder(tmp_path / "runs", config)
        folder.path.mkdir(parents=True)
        folder.note_data(first)
        folder.note_data(first)
        with pytest.raises(ConfigMismatch, match="the data 'cifar100' have changed"):
            folder.note_data(second)


def test_the_registry_reads_the_copy(places, monkeypatch):
    _, dataset, _ = entry()
    monkeypatch.setitem(DATASETS, "cifar100", dataset)
    told = []
    prepare_data("cifar100", {}, places, lambda *report: told.append(report))
    assert [report for report in told if report[1] == report[2]] == [
        (f"decode {places.data_dir / 'CIFAR-100-dataset' / part}", size, size)
        for part, size in zip(PARTS, SIZES["cifar100"], strict=True)
    ]
    chosen = {"validation_examples": 20, "train_examples": 50, "flip": False, "crop_padding": 2}
    splits = load_data("cifar100", chosen, 3, places)
    again = load_data("cifar100", chosen, 3, places)
    assert (len(splits.train), len(splits.validation)) == (50, 20)
    assert torch.equal(splits.train.x, again.train.x)
    assert (splits.info.pixels.flip, splits.info.pixels.crop_padding) == (False, 2)
    info, test = load_test("cifar100", chosen, places)
    assert info == splits.info
    assert torch.equal(test.x, splits.hand_out_test().x)
    described = describe_data("cifar100", chosen, places)
    assert (described.shape, described.classes, described.pixels) == (info.shape, info.classes, info.pixels)


# --- what is no copy


def assert_refused(dataset, places, *parts):
    """Loading fails with what is wrong, where and what to do."""
    with pytest.raises(CorruptedFile) as caught:
        load(dataset, places)
    for part in (*parts, f"delete {places.data_dir / 'CIFAR-100-dataset'}", f"git clone {SOURCE}", "--data-dir"):
        assert part in str(caught.value)


def test_a_missing_class_is_refused(places, copy):
    shutil.rmtree(copy / "train" / "maple_tree")
    assert_refused(entry()[1], places, f"{copy / 'train' / 'maple_tree'} should hold 2 PNG images, but holds 0")


def test_a_class_of_another_name_is_refused(places, copy):
    (copy / "test" / "maple_tree").rename(copy / "test" / "maple")
    assert_refused(entry()[1], places, f"{copy / 'test' / 'maple_tree'} should hold 1 PNG images, but holds 0")


def test_a_missing_part_is_refused(places, copy):
    for part in PARTS:
        (copy / part).rename(copy / "away")
        assert_refused(entry()[1], places, str(copy / part / "apple"))
        (copy / "away").rename(copy / part)


@pytest.mark.parametrize("count", [1, 3])
def test_a_missing_image_and_one_too_many_are_refused(places, copy, count):
    folder = copy / "train" / "wolf"
    if count == 1:
        next(folder.glob("*.png")).unlink()
    else:
        write(folder / "more.png", png(0, 32, 32))
    assert_refused(entry()[1], places, f"{folder} should hold 2 PNG images, but holds {count}")


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", png(0, 32, 32)[:-200]])
def test_a_corrupted_image_is_refused_by_name(places, copy, content):
    path = next((copy / "train" / "bear").glob("*.png"))
    path.write_bytes(content)
    assert_refused(entry()[1], places, f"{copy / 'train'}: images cannot be decoded: bear/{path.name} (")


@pytest.mark.parametrize(("height", "width"), [(32, 33), (64, 64), (16, 16)])
def test_an_image_of_another_size_is_refused_by_name(places, copy, height, width):
    path = next((copy / "test" / "bear").glob("*.png"))
    path.write_bytes(png(0, height, width))
    assert_refused(entry()[1], places, f"bear/{path.name} has {width}x{height} pixels, not 32x32")


def brighter(copy):
    path = next((copy / "test" / "bear").glob("*.png"))
    image = np.array(Image.open(path))
    image[3, 4, 1] ^= 1
    path.write_bytes(encoded(Image.fromarray(image)))


def classes_swapped(copy):
    for old, new in (("bear", "x"), ("bee", "bear"), ("x", "bee")):
        (copy / "test" / old).rename(copy / "test" / new)


def other_order(copy):
    """Another order of the same images of one class."""
    first, second = sorted((copy / "train" / "bear").glob("*.png"))
    first.rename(second.with_name("z.png"))


@pytest.mark.parametrize("change", [brighter, classes_swapped, other_order])
def test_other_pixels_labels_or_another_order_are_refused(places, copy, change):
    change(copy)
    part = "train" if change is other_order else "test"
    assert_refused(entry()[1], places, f"{copy / part}: the pixels are not the published ones", f"not {digest(part)}")


def test_a_wrong_checksum_is_refused_for_either_part(places, copy):
    for part in PARTS:
        wrong = "0" * 64
        assert_refused(
            entry(**{part: wrong})[1], places, str(copy / part), f"their sha256 is {digest(part)}, not {wrong}"
        )


def test_a_folder_that_cannot_be_read_is_named(places, copy, monkeypatch):
    def forbidden(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    _, dataset, _ = entry()
    monkeypatch.setattr(Path, "iterdir", forbidden)
    with pytest.raises(StorageError, match=r"cannot read .*train/apple: Permission denied"):
        load(dataset, places)


# --- neither


def test_without_both_the_error_names_both_ways(tmp_path):
    (tmp_path / "data").mkdir()
    with serving({}) as server:
        _, dataset, _ = entry(server.url)
        places = Places(tmp_path / "data", tmp_path / "cache")
        assert not dataset.present(places)
        with pytest.raises(StorageError) as caught:
            load(dataset, places)
        for part in (server.url("cifar-100-python.tar.gz"), f"git clone {SOURCE}", "--data-dir", str(places.data_dir)):
            assert part in str(caught.value)


def test_incomplete_published_files_alone_name_both_ways_and_are_not_downloaded(tmp_path):
    with serving({}) as server:
        contents, dataset, _ = entry(server.url)
        del contents["meta"]
        write_files(tmp_path / "cifar-100-python", contents)
        with pytest.raises(StorageError) as caught:
            load(dataset, Places(tmp_path, tmp_path / "cache"))
        assert server.requests == []
    for part in ("lacks meta", f"git clone {SOURCE}", "--data-dir"):
        assert part in str(caught.value)


def test_a_set_without_a_copy_names_none(tmp_path):
    with serving({}) as server:
        _, dataset, _ = made("cifar10", server.url)
        with pytest.raises(StorageError) as caught:
            load(dataset, Places(None, tmp_path))
    assert "git clone" not in str(caught.value)


def test_without_a_copy_the_archive_is_downloaded(tmp_path):
    (tmp_path / "data").mkdir()
    with serving({}) as server:
        _, dataset, archive = entry(server.url)
        server.files["cifar-100-python.tar.gz"] = archive
        splits = load(dataset, Places(tmp_path / "data", tmp_path / "cache"))
    assert splits.hand_out_test().y.tolist() == rows("cifar100", "test")[1]
    assert splits.info.fingerprint == ""


def test_a_data_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(UsageError, match="the data folder .* does not exist"):
        load(entry()[1], Places(tmp_path / "nowhere", tmp_path / "cache"))


# --- the cache


def caches(places):
    return sorted((places.cache / "decoded").glob("*/images.npy"))


def test_the_images_are_decoded_once(places, monkeypatch):
    count = Count(monkeypatch)
    for expected in (sum(SIZES["cifar100"]), 0):
        check(entry()[1], places)
        assert count.take() == expected


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def half_written(path):
    """What a process leaves that is killed while it writes."""
    content = path.read_bytes()
    path.unlink()
    path.with_name(".images.npy.tmp").write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    "damage", [flip_a_bit, half_written, lambda path: path.write_bytes(path.read_bytes()[:-1]), Path.unlink]
)
def test_a_damaged_or_half_written_cache_is_made_anew(places, monkeypatch, damage):
    check(entry()[1], places)
    count = Count(monkeypatch)
    sizes = {path: path.stat().st_size for path in caches(places)}
    damage(max(sizes, key=sizes.__getitem__))
    check(entry()[1], places)
    assert count.take() == SIZES["cifar100"][0]  # of the damaged part alone
    assert {path: path.stat().st_size for path in caches(places)} == sizes
    assert not list(places.cache.rglob("*.tmp"))


def test_a_copy_that_changes_after_it_was_decoded_is_refused(places, copy):
    _, dataset, _ = entry()
    check(dataset, places)
    brighter(copy)
    assert_refused(dataset, places, "the pixels are not the published ones")


def test_a_cache_of_other_pixels_with_a_checksum_of_their_own_is_refused(places):
    _, dataset, _ = entry()
    check(dataset, places)
    path = caches(places)[0]
    array, listing = np.load(path), path.with_name("images.json")
    old = hashlib.sha256(array.tobytes()).hexdigest()
    array[0, 0, 0, 0] ^= 1
    np.save(path, array)
    assert listing.read_text().count(old) == 1
    listing.write_text(listing.read_text().replace(old, hashlib.sha256(array.tobytes()).hexdigest()))
    assert_refused(dataset, places, "the pixels are not the published ones")


def test_several_at_once_decode_once_and_read_the_same(places, monkeypatch):
    count = Count(monkeypatch)
    _, dataset, _ = entry()
    barrier, found = threading.Barrier(3), []

    def work():
        barrier.wait()
        found.append(load(dataset, places).hand_out_test().x)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert count.take() == sum(SIZES["cifar100"])
    assert len(found) == 3
    assert all(np.array_equal(one.numpy(), in_order("test")[0]) for one in found)


def test_the_copy_is_stated_in_full():
    assert cifar.CIFAR100_COPY.folder == SOURCE.rsplit("/", 1)[1]
    assert cifar.CIFAR100_COPY.source == SOURCE
    assert [(part, len(mark)) for part, mark in cifar.CIFAR100_COPY.digests] == [("train", 64), ("test", 64)]
    assert list(CLASSES) == sorted(CLASSES)
    assert len(set(CLASSES)) == 100
    assert BASES["cifar100"][0].options is cifar.CifarOptions  # a run's hash says nothing of where its data lie
