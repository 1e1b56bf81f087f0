import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.io import savemat

from lab.data.server import md5, serving
from manifold_mixup.lab.data import DATASETS, load_data, load_test, svhn
from manifold_mixup.lab.data.base import Places
from manifold_mixup.lab.errors import CorruptedFile, StorageError

SIZES = (40, 20)
TRAIN, TEST = "train_32x32.mat", "test_32x32.mat"


def arrays():
    """Images and labels as in the MATLAB files: the images along the last axis, the digit 0 as label 10."""
    generator = np.random.default_rng(0)
    return {
        name: {
            "X": generator.integers(0, 256, (32, 32, 3, size), dtype=np.uint8),
            "y": ((np.arange(size) * step) % 10 + 1).astype(np.uint8)[:, None],
        }
        for name, size, step in ((TRAIN, SIZES[0], 1), (TEST, SIZES[1], 3))
    }


def mat(variables):
    content = io.BytesIO()
    savemat(content, variables, do_compression=True)
    return content.getvalue()


def small(contents, url=None):
    files = tuple(
        replace(file, md5=md5(contents[file.name]), sha256="", urls=(url(file.name),) if url else file.urls)
        for file in svhn.FILES.files
    )
    return svhn.svhn(replace(svhn.DATASET.info, sizes=SIZES), replace(svhn.FILES, files=files))


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        (folder / file).write_bytes(content)


def options(dataset, **chosen):
    return dataset.options.model_validate({"validation_examples": 10, **chosen})


def check_content(dataset, places):
    expected = arrays()
    splits = dataset.load(options(dataset), 0, places)
    test = splits.hand_out_test()
    assert test.y.tolist() == [label % 10 for label in expected[TEST]["y"][:, 0].tolist()]
    assert 0 in test.y
    for i, channel, row, column in ((0, 0, 0, 0), (3, 1, 5, 7), (19, 2, 31, 30)):
        assert test.x[i, channel, row, column] == expected[TEST]["X"][row, column, channel, i]
    published = {expected[TRAIN]["X"][:, :, 0, i].tobytes(): int(expected[TRAIN]["y"][i, 0]) % 10 for i in range(40)}
    for part in (splits.train, splits.validation):
        assert (part.x.dtype, part.y.dtype, part.x.shape[1:]) == (torch.uint8, torch.int64, (3, 32, 32))
        for image, label in zip(part.x, part.y, strict=True):
            assert published.pop(image[0].numpy().tobytes()) == label
    assert not published


@pytest.mark.parametrize("folder", ["", "svhn", "SVHN"])
def test_the_published_files_are_read(tmp_path, folder):
    contents = {name: mat(variables) for name, variables in arrays().items()}
    dataset = small(contents)
    write(tmp_path / "data" / folder, contents)
    places = Places(tmp_path / "data", tmp_path / "cache")
    assert dataset.present(places)
    check_content(dataset, places)
    assert not places.cache.exists()


def test_the_files_are_downloaded_once(tmp_path):
    contents = {name: mat(variables) for name, variables in arrays().items()}
    with serving(contents) as server:
        dataset, places, seen = small(contents, server.url), Places(cache=tmp_path), []
        assert not dataset.present(places)
        dataset.prepare(options(dataset), places, lambda *told: seen.append(told))
        assert {what for what, _, _ in seen} == {TRAIN, TEST}
        assert dataset.present(places)
        check_content(dataset, places)
        assert len(server.requests) == 2


def test_a_missing_file_is_named_with_its_address(tmp_path):
    contents = {name: mat(variables) for name, variables in arrays().items()}
    dataset = small(contents)
    write(tmp_path, {TRAIN: contents[TRAIN]})
    with pytest.raises(StorageError, match=f"lacks {TEST}.*http://ufldl.stanford.edu/housenumbers/{TEST}.*--data-dir"):
        dataset.load(options(dataset), 0, Places(tmp_path, tmp_path / "cache"))


def test_a_changed_file_is_refused_before_it_is_read(tmp_path):
    contents = {name: mat(variables) for name, variables in arrays().items()}
    dataset = small(contents)
    write(tmp_path, contents | {TRAIN: contents[TRAIN][:-1] + b"#"})
    with pytest.raises(CorruptedFile, match=f"{TRAIN} is not the published file.*not {md5(contents[TRAIN])}"):
        dataset.load(options(dataset), 0, Places(tmp_path))


WRONG = {
    "a label 0": (lambda a: a | {"y": np.where(a["y"] == 10, 0, a["y"])}, "holds the label 0"),
    "a label 11": (lambda a: a | {"y": np.where(a["y"] == 9, 11, a["y"])}, "labels go from 0 to 11"),
    "labels that are no whole numbers": (lambda a: a | {"y": a["y"] * 1.0}, "y of shape"),
    "too few labels": (lambda a: a | {"y": a["y"][1:]}, "labels are"),
    "labels in a row": (lambda a: a | {"y": a["y"].T}, "labels are"),
    "too few images": (lambda a: a | {"X": a["X"][..., 1:]}, "images are"),
    "images first": (lambda a: a | {"X": a["X"].transpose(3, 0, 1, 2)}, "images are"),
    "images of another type": (lambda a: a | {"X": a["X"].astype(np.int16)}, "images are int16"),
    "no colours": (lambda a: a | {"X": a["X"][:, :, 0]}, "X of shape"),
    "no labels": (lambda a: {"X": a["X"]}, "no MATLAB file with X and y"),
}


@pytest.mark.parametrize("what", WRONG)
def test_content_that_cannot_be_the_published_one_is_refused(tmp_path, what):
    change, message = WRONG[what]
    variables = arrays()
    contents = {TRAIN: mat(change(variables[TRAIN])), TEST: mat(variables[TEST])}  # with the right checksums
    dataset = small(contents)
    write(tmp_path, contents)
    with pytest.raises(CorruptedFile, match=f"{TRAIN}.*{message}"):
        dataset.load(options(dataset), 0, Places(tmp_path))


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:100], lambda b: b[:-50], lambda b: b"text" * 99])
def test_what_is_no_whole_matlab_file_is_refused(tmp_path, damage):
    variables = arrays()
    contents = {TRAIN: damage(mat(variables[TRAIN])), TEST: mat(variables[TEST])}
    dataset = small(contents)
    write(tmp_path, contents)
    with pytest.raises(CorruptedFile, match=f"{TRAIN} is no MATLAB file"):
        dataset.load(options(dataset), 0, Places(tmp_path))


def test_the_registry_reads_the_same_files(tmp_path, monkeypatch):
    contents = {name: mat(variables) for name, variables in arrays().items()}
    monkeypatch.setitem(DATASETS, "svhn", small(contents))
    write(tmp_path, contents)
    splits = load_data("svhn", {"validation_examples": 10, "train_examples": 20}, 1, Places(tmp_path))
    assert splits.train.y.bincount().tolist() == [2] * 10
    info, test = load_test("svhn", {}, Places(tmp_path))
    assert torch.equal(test.x, splits.hand_out_test().x)
    assert info.pixels == splits.info.pixels


def test_the_defaults_crop_but_do_not_mirror():
    chosen = svhn.DATASET.options()
    assert (chosen.validation_examples, chosen.crop_padding, chosen.flip) == (5000, 4, False)
    pixels = svhn.DATASET.describe(chosen, Places()).pixels
    assert pixels == svhn.DATASET.info.pixels
    assert (pixels.mean, pixels.sd) == ((0.5,) * 3, (0.5,) * 3)
    assert all(len(file.md5) == 32 and len(file.sha256) == 64 for file in svhn.FILES.files)
