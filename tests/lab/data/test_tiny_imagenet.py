import io
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from lab.data.own_images import Count, encoded, pixels, write
from lab.data.server import md5, serving, zipped
from manifold_mixup.lab.data import DATASETS, describe_data
from manifold_mixup.lab.data.base import Places
from manifold_mixup.lab.data.tiny_imagenet import ARCHIVE, DATASET, tiny_imagenet
from manifold_mixup.lab.errors import CorruptedFile, StorageError, UsageError

WNIDS = ("n01443537", "n01629819", "n02124075")
TRAIN, TEST = 8, 4  # images of each class
TOP = "tiny-imagenet-200"


def jpeg(number):
    """A photograph of 64x64 pixels; every fifth is grey."""
    image = Image.fromarray(pixels(number, 64, 64))
    return encoded(image.convert("L") if number % 5 == 0 else image, "JPEG")


def by_hand(number):
    return np.array(Image.open(io.BytesIO(jpeg(number))).convert("RGB")).transpose(2, 0, 1)


def layout():
    """The archive's files, in the published layout: (name to bytes, train numbers in order, test numbers in order)."""
    files = {"wnids.txt": "\n".join(reversed(WNIDS)).encode(), "words.txt": b"n01443537\tgoldfish\n"}
    number, train, test, lines = 0, [], [], []
    for wnid in WNIDS:
        files[f"train/{wnid}/{wnid}_boxes.txt"] = b"x\t0\t0\t10\t10\n"
        for i in range(TRAIN):
            files[f"train/{wnid}/images/{wnid}_{i}.JPEG"] = jpeg(number)
            train.append(number)
            number += 1
    for i in range(TEST * len(WNIDS)):
        files[f"val/images/val_{i}.JPEG"] = jpeg(number)
        lines.append(f"val_{i}.JPEG\t{WNIDS[i % 3]}\t0\t32\t44\t62\n")
        test.append(number)
        number += 1
    files["val/val_annotations.txt"] = "".join(lines).encode()
    files["test/images/test_0.JPEG"] = jpeg(number)
    return files, train, test


FILES, TRAIN_NUMBERS, TEST_NUMBERS = layout()
PACKED = zipped({f"{TOP}/{name}": content for name, content in FILES.items()})
INFO = replace(DATASET.info, classes=WNIDS, sizes=(TRAIN * 3, TEST * 3))


def small(*urls):
    return tiny_imagenet(INFO, replace(ARCHIVE, md5=md5(PACKED), urls=urls))


def options(dataset, **chosen):
    return dataset.options.model_validate({"validation_examples": 6, **chosen})


@pytest.fixture
def data_dir(tmp_path):
    for name, content in FILES.items():
        write(tmp_path / "data" / TOP / name, content)
    return tmp_path / "data"


def check(dataset, places):
    """Every image is there once with its label, the test images in the order of their annotations."""
    splits = dataset.load(options(dataset), 0, places)
    test = splits.hand_out_test()
    assert np.array_equal(test.x.numpy(), np.stack([by_hand(n) for n in TEST_NUMBERS]))
    assert test.y.tolist() == [i % 3 for i in range(TEST * 3)]
    assert (len(splits.train), len(splits.validation)) == (18, 6)
    assert splits.validation.y.bincount().tolist() == [2, 2, 2]
    known = {by_hand(n).tobytes(): n for n in TRAIN_NUMBERS}
    for part in (splits.train, splits.validation):
        assert part.x.dtype == torch.uint8
        for image, label in zip(part.x, part.y, strict=True):
            assert known.pop(image.numpy().tobytes()) // TRAIN == label
    assert not known


def test_an_unpacked_copy_is_read_and_left_alone(data_dir, tmp_path):
    before = sorted((p, p.stat().st_mtime_ns) for p in data_dir.rglob("*"))
    check(small(), Places(data_dir, tmp_path / "cache"))
    check(small(), Places(data_dir / TOP, tmp_path / "other"))
    assert sorted((p, p.stat().st_mtime_ns) for p in data_dir.rglob("*")) == before
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["decoded"]


def test_the_archive_in_the_data_folder_is_unpacked_into_the_cache(tmp_path):
    write(tmp_path / "data" / ARCHIVE.name, PACKED)
    places = Places(tmp_path / "data", tmp_path / "cache")
    assert small().present(places)
    check(small(), places)
    assert (tmp_path / "data" / ARCHIVE.name).exists()
    folder = tmp_path / "cache" / "tiny_imagenet" / TOP
    assert sorted(p.name for p in folder.iterdir()) == ["train", "val", "wnids.txt", "words.txt"]
    assert not list(folder.rglob("*_boxes.txt"))


def test_the_archive_is_downloaded_once_with_progress(tmp_path, monkeypatch):
    places, seen = Places(cache=tmp_path / "cache"), []
    count = Count(monkeypatch)
    with serving({ARCHIVE.name: PACKED}) as server:
        dataset = small(server.url(ARCHIVE.name))
        assert not dataset.present(places)
        dataset.prepare(options(dataset), places, lambda *told: seen.append(told))
        assert count.take() == 36
        dataset.prepare(options(dataset), places, lambda *told: pytest.fail("all is there"))
        check(dataset, places)
        dataset.test(options(dataset), places)
        assert count.take() == 0
        assert len(server.requests) == 1
    assert dataset.present(places)
    assert (ARCHIVE.name, len(PACKED), len(PACKED)) in seen
    folder = tmp_path / "cache" / "tiny_imagenet"
    assert {(f"decode {folder / TOP / 'train'}", 24, 24), (f"decode {folder / TOP / 'val' / 'images'}", 12, 12)} <= set(
        seen
    )
    assert sorted(p.name for p in folder.iterdir()) == [".lock", TOP]


def test_an_archive_that_is_not_the_published_one_is_refused(tmp_path):
    write(tmp_path / "data" / ARCHIVE.name, PACKED[:-1] + b"x")
    with pytest.raises(CorruptedFile, match="is not the published file"):
        small().load(options(small()), 0, Places(tmp_path / "data", tmp_path / "cache"))


def test_what_cannot_be_had_is_one_error(tmp_path):
    with pytest.raises(StorageError, match=r"cannot download .*tiny-imagenet-200 was looked for in"):
        small().load(options(small()), 0, Places(cache=tmp_path / "cache"))
    with pytest.raises(UsageError, match="the data folder .* does not exist"):
        small().load(options(small()), 0, Places(tmp_path / "missing", tmp_path / "cache"))


def test_the_test_images_are_measured_in_the_order_of_their_annotations(data_dir, tmp_path):
    dataset = small()
    info, examples = dataset.test(options(dataset, crop_padding=2), Places(data_dir, tmp_path / "cache"))
    assert np.array_equal(examples.x.numpy(), np.stack([by_hand(n) for n in TEST_NUMBERS]))
    assert info.pixels.crop_padding == 2


def test_grey_photographs_have_three_equal_channels(data_dir, tmp_path):
    _, examples = small().test(options(small()), Places(data_dir, tmp_path / "cache"))
    for image, number in zip(examples.x, TEST_NUMBERS, strict=True):
        assert torch.equal(image[0], image[1]) == (number % 5 == 0)


def test_another_pixel_has_another_fingerprint(data_dir, tmp_path):
    places = Places(data_dir, tmp_path / "cache")
    marks = [small().load(options(small()), seed, places).info.fingerprint for seed in (0, 1)]
    write(data_dir / TOP / f"train/{WNIDS[0]}/images/{WNIDS[0]}_0.JPEG", jpeg(999))
    marks.append(small().load(options(small()), 0, places).info.fingerprint)
    assert marks[0] == marks[1] != marks[2]


ANNOTATIONS = "val/val_annotations.txt"
FIRST = f"train/{WNIDS[0]}/images/{WNIDS[0]}_0.JPEG"


def annotated(old, new):
    return {ANNOTATIONS: FILES[ANNOTATIONS].decode().replace(old, new).encode()}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"wnids.txt": b"n01443537\nn01629819\n"}, "wnids.txt names other classes than the published ones"),
        ({"wnids.txt": b"\xff\xfe"}, "wnids.txt is no text"),
        ({FIRST: None}, r"n01443537.images holds 7 images, not 8; delete tiny-imagenet-200 and unpack"),
        ({FIRST.replace("_0", "_99"): jpeg(1)}, r"n01443537.images holds 9 images, not 8"),
        (
            {FIRST: b""},
            r"train: images cannot be decoded: n01443537.images.n01443537_0.JPEG \(it has 0 bytes\); delete",
        ),
        ({FIRST: jpeg(1)[:900]}, r"train: images cannot be decoded: .*n01443537_0.JPEG \(.*truncated"),
        ({FIRST: encoded(Image.new("RGB", (64, 63)), "JPEG")}, "n01443537_0.JPEG has 64x63 pixels, not 64x64"),
        (annotated("val_4.JPEG\tn01629819", "val_4.JPEG\tn99999999"), "line 5: 'n99999999' is no class of wnids.txt"),
        (annotated("val_4.JPEG\tn01629819\t0\t32\t44\t62\n", "val_4.JPEG\n"), "line 5: '' is no class"),
        (annotated("val_4.JPEG", "val_3.JPEG"), "line 5: 'val_3.JPEG' has two annotations"),
        (annotated("val_4.JPEG\tn01629819\t0\t32\t44\t62\n", ""), "val.images: val_4.JPEG is not annotated"),
        ({"val/images/val_4.JPEG": None}, "val.images: val_4.JPEG is annotated, but missing"),
        (
            {"val/images/val_4.JPEG": None, **annotated("val_4.JPEG\tn01629819\t0\t32\t44\t62\n", "")},
            "holds 11 images, not 12",
        ),
        ({"val/images/val_4.JPEG": b"x"}, "val.images: images cannot be decoded: val_4.JPEG"),
    ],
)
def test_damage_is_one_error_that_names_it(data_dir, tmp_path, changes, text):
    for name, content in changes.items():
        path = data_dir / TOP / name
        path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(CorruptedFile, match=text) as caught:
        small().load(options(small()), 0, Places(data_dir, tmp_path / "cache"))
    assert "\n" not in str(caught.value)


def test_missing_annotations_are_an_error(data_dir, tmp_path):
    os.unlink(data_dir / TOP / ANNOTATIONS)
    with pytest.raises(StorageError, match=r"cannot read .*val_annotations.txt"):
        small().load(options(small()), 0, Places(data_dir, tmp_path / "cache"))
    shutil.rmtree(data_dir / TOP / "train" / WNIDS[1])
    with pytest.raises(CorruptedFile, match="n01629819.images holds 0 images, not 8"):
        small().load(options(small()), 0, Places(data_dir, tmp_path / "cache"))


def test_the_facts_are_the_published_ones():
    info = describe_data("tiny_imagenet", {}, Places())
    assert len(set(info.classes)) == 200
    assert list(info.classes) == sorted(info.classes)
    assert all(len(wnid) == 9 and wnid[0] == "n" and wnid[1:].isdigit() for wnid in info.classes)
    assert info.shape == (3, 64, 64)
    assert info.sizes == (100_000, 10_000)
    assert (info.pixels.mean, info.pixels.sd) == ((0.5,) * 3, (0.5,) * 3)
    assert (info.pixels.crop_padding, info.pixels.flip) == (4, True)
    assert "validation" in info.title
    assert DATASETS["tiny_imagenet"].options().validation_examples == 10_000
    assert ARCHIVE.md5 == "90528d7ca1a48142e341f4ef8d21d0de"
