import errno
import io
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lab.data.python2 import dumps
from lab.data.server import md5, serving, tar_gz
from lab.data.test_archives import files_no_longer_than
from manifold_mixup.lab.data import DATASETS, cifar, describe_data, load_data, load_test, prepare_data
from manifold_mixup.lab.data.archives import PublishedFile
from manifold_mixup.lab.data.base import Places
from manifold_mixup.lab.errors import CorruptedFile, StorageError, UsageError

SIZES = {"cifar10": (50, 20), "cifar100": (200, 100)}
BASES = {
    "cifar10": (cifar.CIFAR10, cifar.CIFAR10_FILES, cifar.CIFAR10_KEYS),
    "cifar100": (cifar.CIFAR100, cifar.CIFAR100_FILES, cifar.CIFAR100_KEYS),
}
BOTH = pytest.mark.parametrize("name", list(BASES))


def rows(name, part):
    """Rows of 3,072 bytes and labels, as in the published files."""
    size = SIZES[name][part == "test"]
    generator = np.random.default_rng(part == "test")
    classes = len(BASES[name][0].info.classes)
    return generator.integers(0, 256, (size, 3072), dtype=np.uint8), [i * 7 % classes for i in range(size)]


def trees(name):
    """What the set's files hold, by file name."""
    dataset, _, keys = BASES[name]
    result = {}
    for part, names in (("train", keys.train), ("test", keys.test)):
        data, labels = rows(name, part)
        size = len(data) // len(names)
        for i, file in enumerate(names):
            cut = slice(i * size, (i + 1) * size)
            tree = {"batch_label": f"{part} {i}", keys.labels: labels[cut], "data": data[cut], "filenames": ["x.png"]}
            result[file] = tree | ({"coarse_labels": [0] * size} if name == "cifar100" else {})
    result[keys.meta] = {"num_vis": 3072, keys.names: list(dataset.info.classes)}
    return result


def small(name, contents, url=None):
    """A data set like CIFAR whose published files are these: (dataset, its archive)."""
    dataset, files, keys = BASES[name]
    archive = tar_gz(
        {f"{files.folder}/readme.html": b"hello", **{f"{files.folder}/{n}": c for n, c in contents.items()}}
    )
    changed = replace(
        files,
        files=tuple(PublishedFile(file.name, md5(contents[file.name])) for file in files.files),
        archive=replace(
            files.archive,
            md5=md5(archive),
            sha256="",
            urls=(url(files.archive.name),) if url else files.archive.urls,
            unpacked_size=10_000_000,
        ),
    )
    return cifar.cifar(replace(dataset.info, sizes=SIZES[name]), changed, keys), archive


def made(name, url=None, **changed):
    """The contents, the data set and its archive; ``changed`` replaces trees by file name."""
    contents = {file: dumps(tree) for file, tree in (trees(name) | changed).items()}
    return contents, *small(name, contents, url)


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        (folder / file).write_bytes(content)


def options(dataset, **chosen):
    return dataset.options.model_validate({"validation_examples": 10, **chosen})


def check_content(name, dataset, places):
    """Every image is there once, with its label, red plane first; the test images in their order."""
    data, labels = rows(name, "test")
    splits = dataset.load(options(dataset), 0, places)
    test = splits.hand_out_test()
    assert test.y.tolist() == labels
    for i in range(0, len(data), 7):
        for channel in range(3):
            for row in range(0, 32, 5):
                start = channel * 1024 + row * 32
                assert test.x[i, channel, row].tolist() == data[i, start : start + 32].tolist()
    published = {row.tobytes(): label for row, label in zip(*rows(name, "train"), strict=True)}
    for part in (splits.train, splits.validation):
        assert (part.x.dtype, part.y.dtype, part.x.shape[1:]) == (torch.uint8, torch.int64, (3, 32, 32))
        for image, label in zip(part.x, part.y, strict=True):
            assert published.pop(image.numpy().tobytes()) == label
    assert not published
    assert (len(splits.train), len(splits.validation)) == (SIZES[name][0] - 10, 10)


@BOTH
@pytest.mark.parametrize("where", ["folder", "the folder itself", "archive"])
def test_every_published_layout_is_read(tmp_path, name, where):
    contents, dataset, archive = made(name)
    _, files, _ = BASES[name]
    places = Places(tmp_path / "data", tmp_path / "cache")
    if where == "archive":
        write(places.data_dir, {files.archive.name: archive})
    else:
        write(places.data_dir / (files.folder if where == "folder" else ""), contents)
    before = sorted(places.data_dir.rglob("*"))
    assert dataset.present(places)
    for _ in range(2):
        check_content(name, dataset, places)
    assert sorted(places.data_dir.rglob("*")) == before
    if where == "archive":
        unpacked = places.cache / name / files.folder
        assert {p.name: p.read_bytes() for p in unpacked.iterdir()} == contents  # and no readme
        assert {p.name for p in unpacked.parent.iterdir()} == {files.folder, ".lock"}
    else:
        assert not places.cache.exists()


@BOTH
def test_the_archive_is_downloaded_and_unpacked_once(tmp_path, name, capfd):
    with serving({}) as server:
        contents, dataset, archive = made(name, server.url)
        file = BASES[name][1].archive.name
        server.files[file] = archive
        places, seen = Places(cache=tmp_path), []
        assert not dataset.present(places)
        dataset.prepare(options(dataset), places, lambda *told: seen.append(told))
        assert dataset.present(places)
        assert list(dict.fromkeys(what for what, _, _ in seen)) == [file, f"check {file}", f"unpack {file}"]
        check_content(name, dataset, places)
        assert [asked for asked, _ in server.requests] == [file]
    assert not list(tmp_path.rglob(file))  # what it held is there
    assert {p.name: p.read_bytes() for p in (tmp_path / name / BASES[name][1].folder).iterdir()} == contents
    assert capfd.readouterr() == ("", "")


def test_loading_brings_what_is_missing_and_repairs_the_cache(tmp_path):
    with serving({}) as server:
        _, dataset, archive = made("cifar10", server.url)
        server.files["cifar-10-python.tar.gz"] = archive
        check_content("cifar10", dataset, Places(cache=tmp_path))
        (tmp_path / "cifar10" / "cifar-10-batches-py" / "data_batch_3").unlink()
        assert not dataset.present(Places(cache=tmp_path))
        check_content("cifar10", dataset, Places(cache=tmp_path))
        assert len(server.requests) == 2


def test_an_interrupted_preparation_goes_on_where_it_stopped(tmp_path):
    with serving({}) as server:
        _, dataset, archive = made("cifar100", server.url)
        server.files["cifar-100-python.tar.gz"] = archive
        server.break_after = len(archive) // 3

        def stop(what, done, total):
            if done > len(archive) // 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            dataset.prepare(options(dataset), Places(cache=tmp_path), stop)
        assert not dataset.present(Places(cache=tmp_path))
        asked = len(server.requests)
        check_content("cifar100", dataset, Places(cache=tmp_path))
        assert server.requests[asked][1] is not None


def test_a_full_disk_leaves_the_archive_for_the_next_try(tmp_path):
    with serving({}) as server:
        _, dataset, archive = made("cifar10", server.url)
        server.files["cifar-10-python.tar.gz"] = archive
        places = Places(cache=tmp_path)

        class Full:
            def __call__(self, what, done, total):
                if what.startswith("check"):  # the download is complete
                    self.limit = files_no_longer_than(1000)
                    self.limit.__enter__()

        full = Full()
        try:
            with pytest.raises(StorageError, match="cannot unpack into .*cifar-10-batches-py"):
                dataset.prepare(options(dataset), places, full)
        finally:
            full.limit.__exit__(None, None, None)
        assert {p.name for p in (tmp_path / "cifar10").iterdir()} == {"cifar-10-python.tar.gz", ".lock"}
        check_content("cifar10", dataset, places)
        assert len(server.requests) == 1


def test_a_wrong_archive_is_refused_before_it_is_unpacked(tmp_path):
    _, dataset, archive = made("cifar10")
    write(tmp_path / "data", {"cifar-10-python.tar.gz": archive + b"more"})
    with pytest.raises(CorruptedFile) as caught:
        dataset.load(options(dataset), 0, Places(tmp_path / "data", tmp_path / "cache"))
    for part in ("cifar-10-python.tar.gz", md5(archive), md5(archive + b"more"), "--data-dir"):
        assert part in str(caught.value)
    assert {p.name for p in (tmp_path / "cache").rglob("*")} == {"cifar10", ".lock"}


@BOTH
def test_an_incomplete_folder_is_refused_with_what_it_lacks(tmp_path, name):
    contents, dataset, _ = made(name)
    _, files, keys = BASES[name]
    for lost in (keys.train[-1], keys.test[0]):
        del contents[lost]
    write(tmp_path / files.folder, contents)
    assert not dataset.present(Places(tmp_path, tmp_path / "cache"))
    with pytest.raises(StorageError) as caught:
        dataset.load(options(dataset), 0, Places(tmp_path, tmp_path / "cache"))
    for part in (
        str(tmp_path / files.folder),
        f"{keys.train[-1]}, {keys.test[0]}",
        files.archive.urls[0],
        "--data-dir",
    ):
        assert part in str(caught.value)


def test_an_incomplete_folder_beside_the_archive_is_passed_over(tmp_path):
    contents, dataset, archive = made("cifar10")
    del contents["data_batch_1"]
    write(tmp_path / "data" / "cifar-10-batches-py", contents)
    write(tmp_path / "data", {"cifar-10-python.tar.gz": archive})
    check_content("cifar10", dataset, Places(tmp_path / "data", tmp_path / "cache"))


def test_a_data_folder_without_the_set_leaves_it_to_the_cache(tmp_path):
    contents, dataset, _ = made("cifar10")
    write(tmp_path / "data" / "cifar-100-python", {"train": b"", "test": b"", "meta": b""})
    write(tmp_path / "cache" / "cifar10" / "cifar-10-batches-py", contents)
    check_content("cifar10", dataset, Places(tmp_path / "data", tmp_path / "cache"))


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    _, dataset, _ = made("cifar10")

    def forbidden(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", forbidden)
    assert not dataset.present(Places(tmp_path))
    with pytest.raises(StorageError, match="cannot read .*cifar-10-batches-py/data_batch_1: Permission denied"):
        dataset.load(options(dataset), 0, Places(tmp_path))


class Evil:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_a_changed_file_is_refused_before_it_is_unpickled(tmp_path):
    contents, dataset, _ = made("cifar10")
    write(tmp_path, contents | {"data_batch_2": pickle.dumps(Evil(tmp_path / "ran"))})
    with pytest.raises(CorruptedFile) as caught:
        dataset.load(options(dataset), 0, Places(tmp_path))
    for part in ("data_batch_2", md5(contents["data_batch_2"]), "--data-dir"):
        assert part in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_that_runs_something_is_refused_even_with_the_right_checksum(tmp_path):
    contents = {file: dumps(tree) for file, tree in trees("cifar10").items()}
    contents["data_batch_2"] = pickle.dumps({"data": Evil(tmp_path / "ran")}, 2)
    dataset, _ = small("cifar10", contents)
    write(tmp_path, contents)
    with pytest.raises(CorruptedFile, match=r"data_batch_2 .*asks for (posix|nt)\.mkdir"):
        dataset.load(options(dataset), 0, Places(tmp_path))
    assert not (tmp_path / "ran").exists()


WRONG = {
    "a label too large": (lambda t: t | {"labels": [10, *t["labels"][1:]]}, "labels go from 0 to 10"),
    "a label below 0": (lambda t: t | {"labels": [-1, *t["labels"][1:]]}, "labels go from -1 to 9"),
    "a label that is text": (lambda t: t | {"labels": ["cat", *t["labels"][1:]]}, "list of whole numbers"),
    "labels under another key": (lambda t: {"data": t["data"], "fine_labels": t["labels"]}, "list of whole numbers"),
    "too few labels": (lambda t: t | {"labels": t["labels"][1:]}, r"labels are int64 of shape \(49,\)"),
    "too few images": (lambda t: t | {"data": t["data"][1:]}, r"images are uint8 of shape \(49, 3, 32, 32\)"),
    "images of another size": (lambda t: t | {"data": t["data"][:, 1:]}, r"\(n, 3072\), not an array of shape"),
    "flat images": (lambda t: t | {"data": t["data"].ravel()}, r"\(n, 3072\), not an array of shape"),
    "no images": (lambda t: {"labels": t["labels"]}, r"\(n, 3072\), not a NoneType"),
}


@pytest.mark.parametrize("what", WRONG)
def test_content_that_cannot_be_the_published_one_is_refused(tmp_path, what):
    change, message = WRONG[what]
    contents, dataset, _ = made("cifar10", data_batch_1=change(trees("cifar10")["data_batch_1"]))
    write(tmp_path, contents)
    with pytest.raises(CorruptedFile, match=message):
        dataset.load(options(dataset), 0, Places(tmp_path))


def test_other_class_names_are_refused(tmp_path):
    swapped = {"batches.meta": {"label_names": [*cifar.CIFAR10.info.classes[::-1]]}}
    contents, dataset, _ = made("cifar10", **swapped)
    write(tmp_path, contents)
    with pytest.raises(CorruptedFile, match="batches.meta names other classes"):
        dataset.load(options(dataset), 0, Places(tmp_path))


@BOTH
def test_the_registry_reads_the_same_files(tmp_path, monkeypatch, name):
    contents, dataset, _ = made(name)
    monkeypatch.setitem(DATASETS, name, dataset)
    write(tmp_path, contents)
    places = Places(tmp_path, tmp_path / "cache")
    prepare_data(name, {}, places, lambda *told: pytest.fail("nothing is to be brought"))
    splits = load_data(name, {"validation_examples": 0, "flip": False, "crop_padding": 2}, 3, places)
    assert len(splits.validation) == 0
    assert (splits.info.pixels.flip, splits.info.pixels.crop_padding) == (False, 2)
    info, test = load_test(name, {}, places)
    assert torch.equal(test.x, splits.hand_out_test().x)
    assert info == describe_data(name, {}, places) == replace(BASES[name][0].info, sizes=SIZES[name])


def test_evaluating_reads_the_test_file_alone(tmp_path):
    contents, dataset, _ = made("cifar10")
    write(tmp_path, contents | {"data_batch_1": b"damaged"})
    assert len(dataset.test(options(dataset), Places(tmp_path))[1]) == 20


def test_the_defaults_are_those_of_the_papers_code():
    for dataset, mean, sd in (
        (cifar.CIFAR10, (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
        (cifar.CIFAR100, (129.3, 124.1, 112.4), (68.2, 65.4, 70.4)),
    ):
        chosen = dataset.options()
        assert (chosen.validation_examples, chosen.crop_padding, chosen.flip) == (5000, 4, True)
        pixels = dataset.describe(chosen, Places()).pixels
        assert pixels == dataset.info.pixels
        assert [m * 255 for m in pixels.mean] == pytest.approx(mean)
        assert [s * 255 for s in pixels.sd] == pytest.approx(sd)


# --- CIFAR-10.1


def npy(array, **options):
    content = io.BytesIO()
    np.save(content, array, **options)
    return content.getvalue()


def newer():
    images = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    return {"cifar10.1_v6_data.npy": images, "cifar10.1_v6_labels.npy": (np.arange(30) // 3).astype(np.int32)}


def small_newer(contents, url=None):
    files = tuple(
        replace(file, md5=md5(contents[file.name]), urls=(url(file.name),) if url else file.urls)
        for file in cifar.CIFAR10_1_FILES.files
    )
    return cifar.cifar10_1(replace(cifar.CIFAR10_1.info, sizes=(0, 30)), replace(cifar.CIFAR10_1_FILES, files=files))


@pytest.mark.parametrize("folder", ["", "cifar10_1", "CIFAR-10.1/datasets"])
def test_the_newer_test_set_is_read_with_the_channels_first(tmp_path, folder, monkeypatch):
    contents = {file: npy(array) for file, array in newer().items()}
    monkeypatch.setitem(DATASETS, "cifar10_1", small_newer(contents))
    write(tmp_path / folder, contents)
    info, test = load_test("cifar10_1", {}, Places(tmp_path, tmp_path / "cache"))
    images, labels = newer().values()
    assert test.y.dtype == torch.int64
    assert test.y.tolist() == labels.tolist()
    assert test.x.dtype == torch.uint8
    for i, channel, row, column in ((0, 0, 0, 0), (3, 1, 5, 7), (29, 2, 31, 30)):
        assert test.x[i, channel, row, column] == images[i, row, column, channel]
    assert info.classes == cifar.CIFAR10.info.classes
    assert info.pixels == cifar.CIFAR10.info.pixels


def test_the_newer_test_set_is_downloaded(tmp_path):
    contents = {file: npy(array) for file, array in newer().items()}
    with serving(contents) as server:
        dataset = small_newer(contents, server.url)
        places = Places(cache=tmp_path)
        assert not dataset.present(places)
        dataset.prepare(dataset.options(), places, lambda *told: None)
        assert dataset.present(places)
        assert len(dataset.test(dataset.options(), places)[1]) == 30
        assert len(server.requests) == 2


def test_training_on_the_newer_test_set_is_refused_with_what_to_do():
    with pytest.raises(UsageError, match="train on cifar10, .*'manifold-mixup evaluate RUN --data cifar10_1'"):
        load_data("cifar10_1", {}, 0, Places())


def test_an_array_of_objects_is_refused_even_with_the_right_checksum(tmp_path):
    contents = {file: npy(array) for file, array in newer().items()}
    objects = np.array([Evil(tmp_path / "ran")], dtype=object)
    contents["cifar10.1_v6_labels.npy"] = npy(objects, allow_pickle=True)
    dataset = small_newer(contents)
    write(tmp_path, contents)
    with pytest.raises(CorruptedFile, match="labels.npy is no numpy array of numbers"):
        dataset.test(dataset.options(), Places(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("file", list(newer()))
def test_a_changed_array_is_refused(tmp_path, file):
    contents = {name: npy(array) for name, array in newer().items()}
    dataset = small_newer(contents)
    write(tmp_path, contents | {file: contents[file][:-1] + b"#"})
    with pytest.raises(CorruptedFile, match=f"{file} is not the published file.*{md5(contents[file])}"):
        dataset.test(dataset.options(), Places(tmp_path))


NEWER_WRONG = {
    "images of another type": ("data", lambda a: a.astype(np.float32)),
    "channels first": ("data", lambda a: a.transpose(0, 3, 1, 2)),
    "too few images": ("data", lambda a: a[:-1]),
    "no colours": ("data", lambda a: a[..., 0]),
    "a label too large": ("labels", lambda a: a + 1),
    "labels that are no whole numbers": ("labels", lambda a: a.astype(np.float64)),
    "labels in a column": ("labels", lambda a: a[:, None]),
}


@pytest.mark.parametrize("what", NEWER_WRONG)
def test_arrays_that_cannot_be_the_published_ones_are_refused(tmp_path, what):
    which, change = NEWER_WRONG[what]
    arrays = {file: change(array) if which in file else array for file, array in newer().items()}
    contents = {file: npy(array) for file, array in arrays.items()}
    dataset = small_newer(contents)
    write(tmp_path, contents)
    with pytest.raises(CorruptedFile, match="cifar10.1_v6_data.npy: the test (images are|labels are|labels go from)"):
        dataset.test(dataset.options(), Places(tmp_path))


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"not an array", npy(np.arange(30))[:-9]])
def test_what_is_no_array_is_refused(tmp_path, content):
    contents = {file: npy(array) for file, array in newer().items()} | {"cifar10.1_v6_labels.npy": content}
    dataset = small_newer(contents)
    write(tmp_path, contents)
    with pytest.raises(CorruptedFile, match="labels.npy is no numpy array of numbers"):
        dataset.test(dataset.options(), Places(tmp_path))


def test_the_published_files_are_stated_in_full():
    for files in (cifar.CIFAR10_FILES, cifar.CIFAR100_FILES):
        assert files.archive.urls[0] == f"https://www.cs.toronto.edu/~kriz/{files.archive.name}"
        assert (len(files.archive.md5), len(files.archive.sha256)) == (32, 64)
    for _, files, keys in BASES.values():
        assert {file.name for file in files.files} == {*keys.train, *keys.test, keys.meta}
        assert all(len(file.md5) == 32 for file in files.files)
    assert all(len(file.md5) == 32 and len(file.urls) == 2 for file in cifar.CIFAR10_1_FILES.files)
