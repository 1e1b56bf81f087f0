import errno
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from lab.data.own_images import Count, pixels, png, write
from manifold_mixup.lab.data import DATASETS, describe_data, folder, load_data, load_test, pools, prepare_data
from manifold_mixup.lab.data.base import Places
from manifold_mixup.lab.errors import CorruptedFile, StorageError, TestDataTaken, UsageError
from manifold_mixup.lab.recipe import Overrides, parse_data, without_recipe

SIZES = {"ant": 20, "bee": 30, "cat": 50}  # images of each class
LABEL = {name: label for label, name in enumerate(SIZES)}


@pytest.fixture
def places(tmp_path):
    return Places(cache=tmp_path / "cache")


def fill(root, sizes, start=0):
    """Class folders; no two images are alike. Name to number of each."""
    number, numbers = start, {}
    for name, size in sizes.items():
        for i in range(size):
            write(root / name / f"{i:03}.png", png(number))
            numbers[f"{name}/{i:03}.png"] = number
            number += 1
    return numbers


@pytest.fixture
def photos(tmp_path):
    fill(tmp_path / "photos", SIZES)
    return tmp_path / "photos"


@pytest.fixture
def divided(tmp_path):
    root = tmp_path / "photos"
    fill(root / "train", {"ant": 20, "bee": 30})
    fill(root / "test", {"ant": 4, "bee": 6}, 1000)
    return root


def load(path, places, seed=0, **options):
    return load_data("folder", {"path": str(path), **options}, seed, places)


def known(first=0, count=100):
    """Bytes of an image to its number."""
    return {pixels(i).transpose(2, 0, 1).tobytes(): i for i in range(first, first + count)}


def numbers(examples, by_bytes):
    return [by_bytes[image.numpy().tobytes()] for image in examples.x]


def truth(sizes):
    return np.repeat(np.arange(len(sizes)), list(sizes.values()))


# --- class folders alone


def test_every_image_is_in_one_split_with_the_label_of_its_folder(photos, places):
    splits = load(photos, places)
    parts = [splits.train, splits.validation, splits.hand_out_test()]
    found = [numbers(part, known()) for part in parts]
    assert sorted(n for which in found for n in which) == list(range(100))
    for part, which in zip(parts, found, strict=True):
        assert part.x.dtype == torch.uint8
        assert part.y.tolist() == truth(SIZES)[which].tolist()
    assert list(map(len, parts)) == [72, 8, 20]
    assert splits.info.classes == ("ant", "bee", "cat")
    assert splits.info.shape == (3, 8, 8)
    assert splits.info.sizes == (80, 20)
    with pytest.raises(TestDataTaken):
        splits.hand_out_test()


def test_the_test_images_are_a_share_of_each_class_and_the_same_for_every_seed(photos, places):
    tests = [load(photos, places, seed).hand_out_test() for seed in range(4)]
    assert all(torch.equal(tests[0].x, one.x) for one in tests)
    assert tests[0].y.bincount().tolist() == [4, 6, 10]
    few = load(photos, places, train_examples=10, validation_examples=0, validation_share=0.5).hand_out_test()
    assert torch.equal(few.x, tests[0].x)
    more = load(photos, places, test_share=0.5).hand_out_test()
    assert more.y.bincount().tolist() == [10, 15, 25]


def test_the_validation_images_are_a_share_of_each_class_drawn_by_the_seed(photos, places):
    first, again, other = (load(photos, places, seed) for seed in (0, 0, 1))
    assert torch.equal(first.validation.x, again.validation.x)
    assert torch.equal(first.train.x, again.train.x)
    assert not torch.equal(first.validation.x, other.validation.x)
    assert (first.validation.y.bincount(minlength=3) - torch.tensor([1.6, 2.4, 4])).abs().max() < 1
    assert len(load(photos, places, validation_share=0.25).validation) == 20
    assert len(load(photos, places, validation_examples=3).validation) == 3
    assert len(load(photos, places, validation_examples=0).validation) == 0


def test_fewer_training_images_are_class_balanced(photos, places):
    assert load(photos, places, train_examples=30).train.y.bincount().tolist() == [10, 10, 10]
    with pytest.raises(UsageError, match="are more than the 80"):
        load(photos, places, train_examples=75)


def test_mean_and_deviation_are_those_of_all_training_images_whatever_the_seed(photos, places):
    splits = [load(photos, places, seed) for seed in (0, 1)]
    few = load(photos, places, train_examples=5)
    assert splits[0].info.pixels == splits[1].info.pixels == few.info.pixels
    pool = torch.cat([splits[0].train.x, splits[0].validation.x]).double() / 255
    found = splits[0].info.pixels
    assert np.allclose(found.mean, pool.mean(dim=(0, 2, 3)), atol=1e-12)
    assert np.allclose(found.sd, pool.std(dim=(0, 2, 3), correction=0), atol=1e-12)
    normal = found.normalise(pool)
    assert normal.mean(dim=(0, 2, 3)).abs().max() < 1e-12
    assert (normal.std(dim=(0, 2, 3), correction=0) - 1).abs().max() < 1e-12


def test_moments_are_exact_however_many_images_are_added_up_at_a_time(monkeypatch):
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (50, 3, 4, 4), dtype=np.uint8))
    whole = pools.moments(images)
    monkeypatch.setattr(pools, "CHUNK", 7 * 48)
    assert pools.moments(images) == whole
    assert pools.moments(images.flip(0)) == whole


def test_a_colour_that_is_the_same_everywhere_can_be_normalised():
    images = torch.full((3, 1, 2, 2), 51, dtype=torch.uint8)
    assert pools.moments(images) == ((0.2,), (1.0,))


def test_training_crops_out_of_an_eighth_and_flips_unless_told_otherwise(photos, places):
    found = load(photos, places).info.pixels
    assert (found.crop_padding, found.flip) == (1, True)
    assert load(photos, places, size=32).info.pixels.crop_padding == 4
    found = load(photos, places, crop_padding=3, flip=False).info.pixels
    assert (found.crop_padding, found.flip) == (3, False)


def test_grey_images_are_read_as_one_channel_if_asked(photos, places):
    splits = load(photos, places, channels=1)
    assert splits.info.shape == (1, 8, 8)
    assert splits.train.x.shape == (72, 1, 8, 8)
    assert len(splits.info.pixels.mean) == 1


def test_images_may_lie_in_folders_inside_the_folder_of_the_class(tmp_path, places):
    for i, name in enumerate(("a/x.png", "a/2020/x.png", "a/2020/01/x.png", "b/y.png", "b/z.JPG")):
        write(tmp_path / "p" / name, png(i))
    write(tmp_path / "p" / "a" / "notes.txt", b"no image")
    write(tmp_path / "p" / "preview.png", png(9))
    info, examples = load_test("folder", {"path": str(tmp_path / "p")}, places)
    assert info.classes == ("a", "b")
    assert examples.y.tolist() == [0, 0, 0, 1, 1]
    assert numbers(examples, known()) == [2, 1, 0, 3, 4]  # sorted by path


def test_the_folder_of_a_class_may_be_a_link(tmp_path, places, photos):
    chosen = tmp_path / "chosen"
    chosen.mkdir()
    for name in ("ant", "cat"):
        (chosen / name).symlink_to(photos / name)
    assert load(chosen, places).info.classes == ("ant", "cat")


# --- folders for training and test


def test_train_and_test_folders_are_the_splits(divided, places):
    splits = load(divided, places)
    test = splits.hand_out_test()
    assert numbers(test, known(1000)) == list(range(1000, 1010))
    assert test.y.tolist() == [0] * 4 + [1] * 6
    assert (len(splits.train), len(splits.validation)) == (45, 5)
    assert sorted(numbers(splits.train, known()) + numbers(splits.validation, known())) == list(range(50))
    assert splits.info.sizes == (50, 10)


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Val"])
def test_a_validation_folder_is_the_validation_split(divided, places, name):
    fill(divided / name, {"ant": 3, "bee": 2}, 2000)
    splits = load(divided, places, seed=3)
    assert numbers(splits.validation, known(2000)) == list(range(2000, 2005))
    assert len(splits.train) == 50
    assert len(load(divided, places, train_examples=8).train) == 8
    with pytest.raises(UsageError, match="validation_examples has nothing to say"):
        load(divided, places, validation_examples=2)


def test_without_a_test_folder_the_test_images_come_from_the_training_folder(divided, places):
    shutil.rmtree(divided / "test")
    splits = load(divided, places)
    assert splits.hand_out_test().y.bincount().tolist() == [4, 6]


def test_folders_may_have_capital_letters_and_longer_names(divided, places):
    (divided / "train").rename(divided / "Training")
    (divided / "test").rename(divided / "Testing")
    (divided / "__MACOSX").mkdir()
    assert load(divided, places).info.sizes == (50, 10)


def test_a_class_may_be_called_train(tmp_path, places):
    fill(tmp_path / "p", {"bus": 5, "train": 5, "tram": 5})
    assert load(tmp_path / "p", places).info.classes == ("bus", "train", "tram")


# --- the same content


def test_a_copy_has_the_same_fingerprint(photos, places, tmp_path):
    shutil.copytree(photos, tmp_path / "copy")
    first, copy = load(photos, places), load(tmp_path / "copy", Places(cache=tmp_path / "other"), seed=5)
    assert len(first.info.fingerprint) == 32
    assert first.info.fingerprint == copy.info.fingerprint


@pytest.mark.parametrize("change", ["pixel", "label", "order", "class name", "fewer", "size"])
def test_other_content_has_another_fingerprint(photos, places, change):
    before = load(photos, places).info.fingerprint
    options = {}
    if change == "pixel":
        image = pixels(3)
        image[0, 0, 0] ^= 1
        Image.fromarray(image).save(photos / "ant" / "003.png")
    elif change == "label":
        (photos / "ant" / "019.png").rename(photos / "bee" / "!.png")
    elif change == "order":
        (photos / "ant" / "000.png").rename(photos / "ant" / "zzz.png")
    elif change == "class name":
        (photos / "cat" / "000.png").parent.rename(photos / "cow")
    elif change == "fewer":
        (photos / "cat" / "049.png").unlink()
    else:
        options["size"] = 4
    assert load(photos, places, **options).info.fingerprint != before


# --- describing and measuring


def test_describing_decodes_nothing(photos, places, monkeypatch):
    count = Count(monkeypatch)
    info = describe_data("folder", {"path": str(photos)}, places)
    assert (info.shape, info.classes) == ((3, 8, 8), ("ant", "bee", "cat"))
    assert count.take() == 0
    assert not places.cache.exists()


def test_what_is_described_is_what_is_loaded(photos, places):
    described = describe_data("folder", {"path": str(photos), "size": 5, "channels": 1}, places)
    loaded = load(photos, places, size=5, channels=1).info
    for name in ("name", "title", "shape", "classes", "features", "source", "terms"):
        assert getattr(described, name) == getattr(loaded, name), name
    assert (described.pixels.crop_padding, described.pixels.flip) == (loaded.pixels.crop_padding, loaded.pixels.flip)


def test_all_images_of_class_folders_are_measured_in_their_order(photos, places):
    info, examples = load_test("folder", {"path": str(photos)}, places)
    assert numbers(examples, known()) == list(range(100))
    assert examples.y.tolist() == truth(SIZES).tolist()
    assert info.classes == ("ant", "bee", "cat")


def test_of_divided_images_the_test_folder_is_measured(divided, places):
    _, examples = load_test("folder", {"path": str(divided)}, places)
    assert numbers(examples, known(1000)) == list(range(1000, 1010))
    shutil.rmtree(divided / "test")
    with pytest.raises(UsageError, match=r"holds 'train', but no 'test': name the folder .* such as .*train"):
        load_test("folder", {"path": str(divided)}, places)


def test_one_class_can_be_measured_but_not_learned(tmp_path, places):
    fill(tmp_path / "p", {"ant": 5})
    info, examples = load_test("folder", {"path": str(tmp_path / "p")}, places)
    assert (info.classes, len(examples)) == (("ant",), 5)
    with pytest.raises(UsageError, match="holds one class alone, 'ant'"):
        load(tmp_path / "p", places)


def test_preparing_decodes_so_that_loading_does_not(divided, places, monkeypatch):
    count, seen = Count(monkeypatch), []
    prepare_data("folder", {"path": str(divided)}, places, lambda *told: seen.append(told))
    assert count.take() == 60
    assert {(f"decode {divided / 'test'}", 10, 10), (f"decode {divided / 'train'}", 50, 50)} <= set(seen)
    assert len({what for what, _, _ in seen}) == 2
    load(divided, places)
    load_test("folder", {"path": str(divided)}, places)
    assert count.take() == 0


# --- sizes


def test_images_of_different_sizes_need_a_size(photos, places):
    write(photos / "bee" / "000.png", png(1, 9, 9))
    text = r"different sizes, .* pixels and others have .*: set size"
    with pytest.raises(UsageError, match=text):
        describe_data("folder", {"path": str(photos)}, places)
    with pytest.raises(UsageError, match=text):
        load(photos, places)
    assert load(photos, places, size=8).info.shape == (3, 8, 8)


def test_another_size_is_found_by_decoding_where_headers_of_some_do_not_tell(photos, places, monkeypatch):
    monkeypatch.setattr(pools, "SAMPLE", 2)
    write(photos / "bee" / "001.png", png(1, 9, 9))
    assert describe_data("folder", {"path": str(photos)}, places).shape == (3, 8, 8)
    with pytest.raises(UsageError, match=r"different sizes, bee/001.png has 9x9 pixels and others have 8x8: set size"):
        prepare_data("folder", {"path": str(photos)}, places, lambda *told: None)


def test_oblong_images_need_a_size(tmp_path, places):
    for name in ("a", "b"):
        for i in range(5):
            write(tmp_path / "p" / name / f"{i}.png", png(i, 6, 9))
    with pytest.raises(UsageError, match=r"are no squares, a/0.png has 9x6 pixels: set size"):
        describe_data("folder", {"path": str(tmp_path / "p")}, places)
    assert describe_data("folder", {"path": str(tmp_path / "p"), "size": 4}, places).shape == (3, 4, 4)


def test_images_that_do_not_fit_into_memory_are_refused_before_anything_is_decoded(photos, places, monkeypatch):
    monkeypatch.setattr("manifold_mixup.lab.data.decode.available_memory", lambda: 10**6)
    with pytest.raises(UsageError, match=r"100 images of 64x64 pixels take 0.0 GB, .*: set size to 40 or less"):
        describe_data("folder", {"path": str(photos), "size": 64}, places)


# --- broken images


def test_few_broken_images_are_left_out_and_told(photos, places):
    write(photos / "cat" / "010.png", b"")
    info = load(photos, places, max_broken=0.01).info
    assert info.sizes == (79, 20)
    assert info.source == f"{photos}; broken images left out (1): cat/010.png (it has 0 bytes)"


def test_labels_stay_with_their_images_where_others_are_left_out(photos, places):
    for name in ("ant/000.png", "ant/007.png", "bee/001.png"):
        write(photos / name, b"")
    _, examples = load_test("folder", {"path": str(photos), "size": 8, "max_broken": 0.1}, places)
    found = numbers(examples, known())
    assert found == [i for i in range(100) if i not in (0, 7, 21)]
    assert examples.y.tolist() == truth(SIZES)[found].tolist()


def test_many_broken_images_are_an_error_that_lists_them(photos, places):
    write(photos / "cat" / "010.png", b"")
    write(photos / "bee" / "010.png", png(1)[:60])
    with pytest.raises(CorruptedFile) as caught:
        load(photos, places)
    text = str(caught.value)
    assert text.startswith(
        f"{photos}: 2 of 100 images cannot be decoded, more than max_broken=0.01 allows: bee/010.png ("
    )
    assert "cat/010.png (it has 0 bytes)" in text
    assert load(photos, places, max_broken=0.02).info.sizes == (78, 20)


def test_a_class_of_which_nothing_can_be_decoded_is_an_error(tmp_path, places):
    fill(tmp_path / "p", {"ant": 30, "bee": 1})
    write(tmp_path / "p" / "bee" / "000.png", b"x")
    with pytest.raises(CorruptedFile, match="no image of class 'bee' can be decoded"):
        load(tmp_path / "p", places, max_broken=0.5)


def test_nothing_but_broken_images_is_an_error(tmp_path, places):
    for name in ("a", "b"):
        write(tmp_path / "p" / name / "x.png", b"")
    with pytest.raises(UsageError, match="none that was tried can be read: set size"):
        describe_data("folder", {"path": str(tmp_path / "p")}, places)
    for measure in (load, lambda path, places, **options: load_test("folder", {"path": str(path), **options}, places)):
        with pytest.raises(CorruptedFile, match="no image can be decoded"):
            measure(tmp_path / "p", places, size=8, max_broken=1.0)


# --- folders that are not laid out like that


def test_mistakes_in_the_layout_are_one_line_each(tmp_path, places):
    cases = {}

    def case(name, text, *files):
        for file in files:
            write(tmp_path / name / file, png(0) if file.endswith(".png") else b"")
        cases[name] = text

    case("missing", "there is no such folder")
    case("images", "it is no folder")
    write(tmp_path / "images", b"")
    case("flat", "holds images, but no folders of them", "a.png", "b.png")
    case("empty", "holds no folders of images", "a.txt")
    case("one", "one class alone, 'a'", "a/1.png", "a/2.png")
    case("lacking", "holds folders without images: 'b', 'c'; fill or remove them", "a/1.png", "b/x.txt", "c/.hid.png")
    case(
        "others",
        "'c' only in train; 'd' only in test",
        *(f"{x}/1.png" for x in ("train/a", "train/c", "test/a", "test/d")),
    )
    case("half", "'b' only in train", *(f"{x}/1.png" for x in ("train/a", "train/b", "test/a")))
    case(
        "odd",
        "holds 'train' with folders inside, and beside them 'extra'",
        "train/a/1.png",
        "train/b/1.png",
        "extra/1.png",
    )
    case("test only", "holds 'test', but no 'train'", "test/a/1.png", "test/b/1.png")
    case("twice", "holds both 'val' and 'valid'", *(f"{x}/a/1.png" for x in ("train", "val", "valid")))
    case("bare", "holds images, but no folders of them", "train/1.png", "test/1.png")
    case("none", "test_share 0.2 of 2 examples leaves none", "a/1.png", "b/1.png")
    case("line", "cannot be the name of a class", "a\nb/1.png", "c/1.png")
    for name, text in cases.items():
        with pytest.raises(UsageError) as caught:
            load(tmp_path / name, places)
        assert text in str(caught.value), name
        assert "\n" not in str(caught.value)


def test_no_folder_is_not_the_current_one(places, photos, monkeypatch):
    monkeypatch.chdir(photos)
    for read in (describe_data, load_test):
        with pytest.raises(UsageError, match="data 'folder' needs a path: folder:PATH"):
            read("folder", {}, places)
    assert describe_data("folder", {"path": "."}, places).classes == ("ant", "bee", "cat")


def test_a_folder_that_cannot_be_read_is_one_error(photos, places, monkeypatch):
    def refuse(self):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(folder.Path, "iterdir", refuse)
    with pytest.raises(StorageError, match=r"cannot read .*photos: Permission denied"):
        describe_data("folder", {"path": str(photos)}, places)


@pytest.mark.parametrize(
    "options",
    [
        {"size": 0},
        {"channels": 2},
        {"test_share": 1.0},
        {"test_share": 0.0},
        {"max_broken": 1.1},
        {"width": 3},
        {"path": 3},
    ],
)
def test_wrong_options_are_refused(photos, places, options):
    with pytest.raises(ValidationError):
        load_data("folder", {"path": str(photos), **options}, 0, places)


# --- the command line


def test_the_command_line_takes_the_path_as_it_is(photos, places):
    assert parse_data(f"folder:{photos},size=64") == {"name": "folder", "options": {"path": str(photos), "size": 64}}
    config = without_recipe(Overrides(data=f"folder:{photos}"), places=places)
    assert config.model.name == "preact_resnet18"
    assert config.data.options["path"] == str(photos)
    assert DATASETS["folder"].positional == "path"
