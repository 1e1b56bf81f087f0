import gzip
import math
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch

from lab.data.server import md5, serving
from manifold_mixup.lab.data import DATASETS, describe_data, load_data, load_test, mnist, prepare_data
from manifold_mixup.lab.data.base import Places
from manifold_mixup.lab.data.mnist import FASHION_FILES, FASHION_MNIST, MNIST, MNIST_FILES, mnist_like, parse_idx
from manifold_mixup.lab.errors import CorruptedFile, StorageError, TestDataTaken, UsageError

TRAIN, TEST = 40, 20


def idx(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def arrays(seed=0):
    generator = np.random.default_rng(seed)
    return {
        "train-images-idx3-ubyte": generator.integers(0, 256, (TRAIN, 28, 28), dtype=np.uint8),
        "train-labels-idx1-ubyte": np.arange(TRAIN, dtype=np.uint8) % 10,
        "t10k-images-idx3-ubyte": generator.integers(0, 256, (TEST, 28, 28), dtype=np.uint8),
        "t10k-labels-idx1-ubyte": (np.arange(TEST, dtype=np.uint8) * 3) % 10,
    }


def small(contents, base=MNIST_FILES, info=MNIST.info, url=None):
    """A data set like MNIST whose published files are these: (dataset, name to packed bytes)."""
    packed = {f"{name}.gz": gzip.compress(content, 9) for name, content in contents.items()}
    files = tuple(
        replace(
            file,
            md5=md5(packed[file.name]),
            sha256="",
            urls=(url(file.name),) if url else file.urls,
            unpacked_md5=md5(contents[file.name[:-3]]),
            unpacked_size=len(contents[file.name[:-3]]),
        )
        for file in base.files
    )
    dataset = mnist_like(replace(info, sizes=(TRAIN, TEST)), replace(base, files=files))
    return dataset, packed


@pytest.fixture
def contents():
    return {name: idx(array) for name, array in arrays().items()}


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def options(dataset, **chosen):
    return dataset.options.model_validate({"validation_examples": 10, **chosen})


def check_content(dataset, places):
    """Every image is there once, with its label, and the test images in their order."""
    expected = arrays()
    splits = dataset.load(options(dataset), 0, places)
    test = splits.hand_out_test()
    assert torch.equal(test.x, torch.from_numpy(expected["t10k-images-idx3-ubyte"])[:, None])
    assert test.y.tolist() == expected["t10k-labels-idx1-ubyte"].tolist()
    assert (len(splits.train), len(splits.validation)) == (TRAIN - 10, 10)
    published = {image.tobytes(): label for image, label in zip(*list(expected.values())[:2], strict=True)}
    for part in (splits.train, splits.validation):
        assert part.x.dtype == torch.uint8
        assert part.x.shape[1:] == (1, 28, 28)
        assert part.y.dtype == torch.int64
        for image, label in zip(part.x, part.y, strict=True):
            assert published.pop(image.numpy().tobytes()) == label
    assert not published


FOLDERS = {
    "mnist": ["", "mnist", "MNIST", "MNIST/raw"],
    "fashion_mnist": ["", "fashion-mnist", "fashion_mnist", "FashionMNIST/raw"],
}
BASES = {"mnist": (MNIST_FILES, MNIST.info), "fashion_mnist": (FASHION_FILES, FASHION_MNIST.info)}


@pytest.mark.parametrize(("name", "folder"), [(name, folder) for name, fs in FOLDERS.items() for folder in fs])
@pytest.mark.parametrize("form", ["as published", "packed anew", "unpacked", "unpacked under the packed name"])
def test_every_published_layout_is_read(tmp_path, contents, name, folder, form):
    dataset, packed = small(contents, *BASES[name])
    files = {
        "as published": packed,
        "packed anew": {f"{n}.gz": gzip.compress(c, 1, mtime=0) for n, c in contents.items()},
        "unpacked": contents,
        "unpacked under the packed name": {f"{n}.gz": c for n, c in contents.items()},
    }[form]
    places = Places(tmp_path / "data", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    assert not dataset.present(places)
    write(tmp_path / "data" / folder, files)
    before = sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "data").rglob("*"))
    assert dataset.present(places)
    check_content(dataset, places)
    assert sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "data").rglob("*")) == before
    assert not places.cache.exists()


def test_two_sets_with_the_same_names_lie_side_by_side(tmp_path, contents):
    other = {name: idx(array) for name, array in arrays(seed=1).items()}
    write(tmp_path, contents)
    write(tmp_path / "fashion-mnist", other)
    digits, _ = small(contents)
    clothes, _ = small(other, FASHION_FILES, FASHION_MNIST.info)
    places = Places(tmp_path, tmp_path / "cache")
    check_content(digits, places)
    assert not torch.equal(clothes.test(options(clothes), places)[1].x, digits.test(options(digits), places)[1].x)


def test_what_is_missing_is_downloaded_once_into_the_cache(tmp_path, contents, capfd):
    with serving({}) as server:
        dataset, packed = small(contents, url=server.url)
        server.files = packed
        places, seen = Places(cache=tmp_path / "cache"), []
        assert not dataset.present(places)
        dataset.prepare(options(dataset), places, lambda *told: seen.append(told))
        assert [name for name, _ in server.requests] == list(packed)
        assert {what for what, _, _ in seen} == set(packed)
        assert dataset.present(places)
        check_content(dataset, places)
        dataset.prepare(options(dataset), places, lambda *told: seen.append(told))
        assert len(server.requests) == 4
    assert {p.name for p in (tmp_path / "cache" / "mnist").iterdir()} == {*packed, ".lock"}
    assert capfd.readouterr() == ("", "")


def test_loading_brings_what_is_missing_silently(tmp_path, contents, capfd):
    with serving({}) as server:
        dataset, server.files = small(contents, url=server.url)
        write(tmp_path / "cache" / "mnist", {n: c for n, c in contents.items() if "labels" in n})  # unpacked
        check_content(dataset, Places(cache=tmp_path / "cache"))
        assert [name for name, _ in server.requests] == [n for n in server.files if "images" in n]
    assert capfd.readouterr() == ("", "")


def test_an_incomplete_folder_is_refused_with_what_it_lacks(tmp_path, contents):
    dataset, _ = small(contents)
    del contents["t10k-images-idx3-ubyte"], contents["train-labels-idx1-ubyte"]
    write(tmp_path / "mnist", contents)
    places = Places(tmp_path, tmp_path / "cache")
    assert not dataset.present(places)
    with pytest.raises(StorageError) as caught:
        dataset.load(options(dataset), 0, places)
    lacking = "train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz"
    url = "https://ossci-datasets.s3.amazonaws.com/mnist/t10k-images-idx3-ubyte.gz"
    for part in (str(tmp_path / "mnist"), lacking, url, "--data-dir"):
        assert part in str(caught.value)


def test_without_files_and_network_the_error_says_what_and_where(tmp_path, contents):
    (tmp_path / "data").mkdir()
    with serving({}) as server:
        dataset, _ = small(contents, url=server.url)
        with pytest.raises(StorageError) as caught:
            dataset.load(options(dataset), 0, Places(tmp_path / "data", tmp_path / "cache"))
        url = server.url("train-images-idx3-ubyte.gz")
    for part in (url, "404", f"{tmp_path}/data/MNIST/raw", f"{tmp_path}/cache/mnist", "--data-dir"):
        assert part in str(caught.value)


def test_a_data_folder_that_does_not_exist_is_no_reason_to_download(tmp_path, contents):
    dataset, _ = small(contents)
    places = Places(tmp_path / "typo", tmp_path / "cache")
    assert not dataset.present(places)
    with pytest.raises(UsageError, match="typo does not exist"):
        dataset.load(options(dataset), 0, places)


def test_a_file_that_is_not_the_published_one_is_refused(tmp_path, contents):
    dataset, packed = small(contents)
    other = bytearray(contents["train-images-idx3-ubyte"])
    other[1000] ^= 1
    write(tmp_path, {**packed, "train-images-idx3-ubyte.gz": gzip.compress(bytes(other))})
    with pytest.raises(CorruptedFile) as caught:
        dataset.load(options(dataset), 0, Places(tmp_path))
    for part in ("train-images", md5(bytes(other)), md5(contents["train-images-idx3-ubyte"]), "--data-dir"):
        assert part in str(caught.value)


def test_a_truncated_gzip_file_is_refused(tmp_path, contents):
    dataset, packed = small(contents)
    write(tmp_path, {**packed, "t10k-images-idx3-ubyte.gz": packed["t10k-images-idx3-ubyte.gz"][:-100]})
    with pytest.raises(CorruptedFile, match="t10k-images-idx3-ubyte.gz is damaged or cut off"):
        dataset.load(options(dataset), 0, Places(tmp_path))


WRONG = {
    "a label too large": ("train-labels-idx1-ubyte", lambda a: np.where(np.arange(TRAIN) == 7, 10, a).astype("u1")),
    "too few labels": ("t10k-labels-idx1-ubyte", lambda a: a[:-1]),
    "too few images": ("train-images-idx3-ubyte", lambda a: a[:-1]),
    "images of another size": ("t10k-images-idx3-ubyte", lambda a: a[:, :27]),
    "images in a row": ("t10k-images-idx3-ubyte", lambda a: a.reshape(TEST, -1)),
    "labels in a square": ("t10k-labels-idx1-ubyte", lambda a: a.reshape(4, 5)),
}


@pytest.mark.parametrize("what", WRONG)
def test_arrays_that_cannot_be_the_published_ones_are_refused(tmp_path, what):
    name, change = WRONG[what]
    changed = arrays()
    changed[name] = change(changed[name])
    dataset, packed = small({name: idx(array) for name, array in changed.items()})  # whose checksums are right
    write(tmp_path, packed)
    with pytest.raises(CorruptedFile, match="images are|labels are|labels go from 0 to 10"):
        dataset.load(options(dataset), 0, Places(tmp_path))


@pytest.mark.parametrize("shape", [(3,), (0,), (2, 3), (2, 3, 4), (0, 28, 28)])
def test_idx_files_are_read_as_they_are_written(tmp_path, shape):
    array = np.arange(math.prod(shape), dtype=np.uint8).reshape(shape)
    assert np.array_equal(parse_idx(idx(array), tmp_path), array)


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b"",
        lambda b: b[:3],
        lambda b: b[:10],
        lambda b: b[:-1],
        lambda b: b + b"\0",
        lambda b: b"\1" + b[1:],
        lambda b: b[:2] + b"\x0d" + b[3:],  # the type code of floats
        lambda b: b[:3] + b"\0" + b[4:],  # no dimensions
        lambda b: b[:3] + b"\xff" + b[4:],
        lambda b: b[:4] + b"\xff\xff\xff\xff" + b[8:],
    ],
)
def test_a_damaged_idx_file_is_refused(tmp_path, damage):
    content = idx(np.zeros((2, 3, 4), np.uint8))
    with pytest.raises(CorruptedFile, match="train-images"):
        parse_idx(damage(content), tmp_path / "train-images")


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_the_registry_reads_the_same_files(tmp_path, contents, monkeypatch, name):
    dataset, packed = small(contents, *BASES[name])
    monkeypatch.setitem(DATASETS, name, dataset)
    write(tmp_path, packed)
    places = Places(tmp_path, tmp_path / "cache")
    prepare_data(name, {}, places, lambda *told: pytest.fail("nothing is to be brought"))
    splits = load_data(name, {"validation_examples": 10, "train_examples": 20, "flip": True}, 3, places)
    assert splits.train.y.bincount().tolist() == [2] * 10
    assert splits.validation.y.bincount().tolist() == [1] * 10
    assert splits.info.pixels.flip
    info, test = load_test(name, {}, places)
    assert torch.equal(test.x, splits.hand_out_test().x)
    assert info == describe_data(name, {}, places)
    with pytest.raises(TestDataTaken):
        splits.hand_out_test()


def test_the_defaults_set_5000_images_aside_and_vary_nothing():
    for dataset in (MNIST, FASHION_MNIST):
        chosen = dataset.options()
        assert (chosen.validation_examples, chosen.crop_padding, chosen.flip) == (5000, 0, False)
        assert dataset.describe(chosen, Places()).pixels == dataset.info.pixels


def test_the_normalisation_is_that_of_the_training_pixels():
    """Sums over all 60,000 * 784 training pixels of the published files, of 0 to 255."""
    for pixels, total, squares in (
        (MNIST.info.pixels, 1_567_298_545, 342_590_800_147),
        (FASHION_MNIST.info.pixels, 3_431_114_169, 631_470_052_347),
    ):
        n = 60_000 * 784
        mean = total / n / 255
        sd = math.sqrt(squares / n / 255**2 - mean**2)
        assert pixels.mean[0] == pytest.approx(mean, abs=5e-5)
        assert pixels.sd[0] == pytest.approx(sd, abs=5e-5)


def test_the_published_files_are_stated_in_full():
    for files in (MNIST_FILES, FASHION_FILES):
        assert {file.name for file in files.files} == {name for names in mnist.NAMES.values() for name in names}
        for file in files.files:
            assert len(file.md5) == len(file.unpacked_md5) == 32
            assert len(file.urls) == 3
            assert all(url.endswith(f"/{file.name}") for url in file.urls)
    sizes = [file.unpacked_size for file in MNIST_FILES.files]
    assert sizes == [file.unpacked_size for file in FASHION_FILES.files] == [47_040_016, 60_008, 7_840_016, 10_008]
