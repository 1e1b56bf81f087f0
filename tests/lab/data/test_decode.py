import errno
import io
import json
import os
import resource
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from lab.data.own_images import Count, encoded, pixels, png, write
from manifold_mixup.lab.data import decode as module
from manifold_mixup.lab.data.base import Places
from manifold_mixup.lab.data.decode import check_memory, decode, file_sources
from manifold_mixup.lab.data.image_files import FORMATS, SUFFIXES, decode_image, find_images, image_size
from manifold_mixup.lab.errors import CorruptedFile, MissingExtra, StorageError, UsageError


@pytest.fixture
def places(tmp_path):
    return Places(cache=tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    """Forty images of 8x8 pixels."""
    for i in range(40):
        write(tmp_path / "images" / f"{i:02}.png", png(i))
    return tmp_path / "images"


def sources(folder):
    return file_sources(folder, find_images(folder), "pictures")


def only_cache(places):
    (found,) = (p for p in (places.cache / "decoded").iterdir())
    return found


def expected(count=40):
    return torch.from_numpy(np.stack([pixels(i).transpose(2, 0, 1) for i in range(count)]))


def decoded(image, kind="PNG", size=None, channels=3, **options):
    found, _ = decode_image(encoded(image, kind, **options), size or image.height, channels)
    return found


# --- one image


@pytest.mark.parametrize(("width", "height"), [(96, 64), (64, 96), (64, 64), (16, 32), (20, 10), (8, 4)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_pixels_are_those_of_the_shorter_side_resized_and_the_centre_cropped(width, height, kind):
    content = encoded(Image.fromarray(pixels(0, height, width)), kind)
    found, own = decode_image(content, 16, 3)
    image = Image.open(io.BytesIO(content))
    short = min(width, height)
    resized = image.resize((width * 16 // short, height * 16 // short), Image.Resampling.BILINEAR)
    left, top = (resized.width - 16) // 2, (resized.height - 16) // 2
    by_hand = np.array(resized.crop((left, top, left + 16, top + 16)))
    assert np.array_equal(found, by_hand.transpose(2, 0, 1))
    assert own == (width, height)


def weights(length, start, side, size):
    """One axis of antialiased bilinear resizing: (size, length), a triangle over what a pixel of the result covers."""
    scale = side / size
    centres = start + (np.arange(size) + 0.5) * scale
    distance = np.abs(np.arange(length) + 0.5 - centres[:, None])
    triangle = np.maximum(0, 1 - distance / max(scale, 1))
    return triangle / triangle.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("width", "height"), [(50, 37), (37, 51), (17, 16), (5, 3), (1, 1), (200, 33)])
def test_pixels_are_those_of_the_formula_for_bilinear_resizing_with_smoothing(width, height):
    image = pixels(0, height, width)
    found, _ = decode_image(encoded(Image.fromarray(image)), 16, 3)
    side = min(width, height)
    rows = weights(height, (height - side) // 2, side, 16)
    columns = weights(width, (width - side) // 2, side, 16)
    by_formula = np.einsum("yi,xj,ijc->cyx", rows, columns, image.astype(float))
    assert np.abs(found - by_formula).max() <= 1.01  # Pillow rounds twice


def test_an_image_of_the_right_size_keeps_its_pixels():
    assert np.array_equal(decoded(Image.fromarray(pixels(1))), pixels(1).transpose(2, 0, 1))


def test_shrinking_smooths():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    found = decoded(Image.fromarray(stripes), size=8)
    assert 120 <= found.min() <= found.max() <= 135


def test_an_extremely_wide_image_needs_no_memory():
    found = decoded(Image.new("RGB", (60_000, 1), (9, 8, 7)), size=32)
    assert found.shape == (3, 32, 32)
    assert (found.reshape(3, -1).T == (9, 8, 7)).all()


GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


def test_grey_becomes_three_equal_channels_and_stays_what_it_is_as_one():
    image = Image.fromarray(GREY)
    assert np.array_equal(decoded(image), np.stack([GREY] * 3))
    assert np.array_equal(decoded(image, channels=1), GREY[None])


def test_colour_becomes_grey_with_the_weights_of_itu_601():
    found = decoded(Image.fromarray(pixels(2)), channels=1)
    weighted = pixels(2).astype(float) @ (0.299, 0.587, 0.114)
    assert np.abs(found[0] - weighted).max() <= 0.51


def test_a_palette_is_looked_up():
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) % 4).convert("P")
    colours = [(255, 0, 0), (0, 255, 0), (1, 2, 3), (250, 251, 252)]
    image.putpalette([value for colour in colours for value in colour])
    by_hand = np.array(colours, np.uint8)[np.arange(64).reshape(8, 8) % 4]
    assert np.array_equal(decoded(image), by_hand.transpose(2, 0, 1))


def test_black_and_white_is_read():
    bits = pixels(3)[..., 0] > 127
    assert np.array_equal(decoded(Image.fromarray(bits))[0], bits.astype(np.uint8) * 255)


def test_cmyk_is_read():
    image = Image.fromarray(np.concatenate([pixels(4), GREY[..., None]], axis=2), "CMYK")
    found = decoded(image, "TIFF")
    ink = np.concatenate([pixels(4), GREY[..., None]], axis=2).astype(float)
    by_hand = (255 - ink[..., :3]) * (255 - ink[..., 3:]) / 255
    assert np.abs(found - by_hand.transpose(2, 0, 1)).max() <= 1.5


def test_sixteen_bits_keep_their_upper_eight():
    deep = (np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).clip(0, 65535).astype(np.uint16)
    for kind in ("PNG", "TIFF", "PPM"):
        assert np.array_equal(decoded(Image.fromarray(deep), kind), np.stack([deep >> 8] * 3)), kind


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_values_without_a_known_white_are_refused(dtype):
    with pytest.raises(ValueError, match="32-bit"):
        decoded(Image.fromarray(np.ones((4, 4), dtype)), "TIFF")


def test_what_is_transparent_becomes_white():
    colours = np.concatenate([pixels(5), GREY[..., None]], axis=2)
    found = decoded(Image.fromarray(colours, "RGBA"))
    share = GREY[..., None] / 255
    by_hand = pixels(5) * share + 255 * (1 - share)
    assert np.abs(found - by_hand.transpose(2, 0, 1)).max() <= 1
    opaque = np.concatenate([pixels(5), np.full((8, 8, 1), 255, np.uint8)], axis=2)
    assert np.array_equal(decoded(Image.fromarray(opaque, "RGBA")), pixels(5).transpose(2, 0, 1))


def test_the_transparent_colour_of_a_palette_becomes_white():
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) % 2).convert("P")
    image.putpalette([0, 0, 0, 9, 9, 9])
    found = decoded(image, transparency=0)
    assert set(found[:, :, 0].ravel().tolist()) == {255}
    assert set(found[:, :, 1].ravel().tolist()) == {9}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_upright_as_exif_says(orientation):
    image = Image.fromarray(pixels(6, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(image, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    found, _ = decode_image(content, 8, 3)
    assert np.array_equal(found, np.array(upright).transpose(2, 0, 1))
    assert np.array_equal(found, pixels(6).transpose(2, 0, 1)) == (orientation == 1)


def test_width_and_height_are_those_of_the_upright_image():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(Image.fromarray(pixels(6, 10, 20)), exif=exif)
    assert decode_image(content, 4, 3)[1] == (10, 20)
    assert image_size(content) == (20, 10)


def test_damaged_exif_is_no_damaged_image():
    content = encoded(Image.fromarray(pixels(7)), "JPEG", quality=95, exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert decode_image(content, 8, 3)[0].shape == (3, 8, 8)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_read(kind):
    assert decoded(Image.fromarray(pixels(8)), kind).shape == (3, 8, 8)


def test_the_first_picture_of_an_animation_counts():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(content, 8, 3)[0][:, 0, 0].tolist() == [255, 0, 0]


# --- the files of a folder


def test_images_are_found_by_their_suffix_and_nothing_else_is(tmp_path):
    for name in ("b.PNG", "a.jpg", "in/side/c.webp", "notes.txt", ".hidden.png", ".git/d.png", "noend", "x.png.part"):
        write(tmp_path / name, b"x")
    os.mkfifo(tmp_path / "pipe.png")
    assert find_images(tmp_path) == ["a.jpg", "b.PNG", "in/side/c.webp"]
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in SUFFIXES)


def test_links_to_files_are_read_and_links_to_folders_are_not_followed(tmp_path, places):
    elsewhere = write(tmp_path / "elsewhere" / "x.png", png(0))
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "link.png").symlink_to(elsewhere)
    (folder / "away").symlink_to(elsewhere.parent)
    (folder / "round").symlink_to(folder)
    (folder / "nowhere.png").symlink_to(tmp_path / "missing.png")
    found = decode(sources(folder), 8, 3, places)
    assert find_images(folder) == ["link.png", "nowhere.png"]
    assert torch.equal(found.images, expected(1))
    assert found.broken == (("nowhere.png", "it does not exist"),)


# --- many images


def test_images_come_in_order_with_progress(folder, places):
    seen = []
    found = decode(sources(folder), 8, 3, places, lambda *told: seen.append(told))
    assert torch.equal(found.images, expected())
    assert found.kept.tolist() == list(range(40))
    assert found.broken == ()
    assert found.resized is None
    assert seen == [("decode pictures", done, 40) for done in (16, 32, 40)]


def test_the_cache_is_used_without_decoding(folder, places, monkeypatch):
    count = Count(monkeypatch)
    first = decode(sources(folder), 8, 3, places)
    assert count.take() == 40
    again = decode(sources(folder), 8, 3, places, lambda *told: pytest.fail("nothing is decoded"))
    assert count.take() == 0
    assert torch.equal(first.images, again.images)
    assert first.digest == again.digest
    assert sorted(p.name for p in only_cache(places).iterdir()) == [".lock", "images.json", "images.npy"]


def test_the_images_are_mapped_and_changing_them_leaves_the_cache_alone(folder, places):
    found = decode(sources(folder), 8, 3, places)
    found.images.zero_()
    assert torch.equal(decode(sources(folder), 8, 3, places).images, expected())


def test_another_size_or_number_of_channels_has_a_cache_of_its_own(folder, places, monkeypatch):
    count = Count(monkeypatch)
    assert decode(sources(folder), 8, 3, places).images.shape == (40, 3, 8, 8)
    assert decode(sources(folder), 4, 3, places).images.shape == (40, 3, 4, 4)
    assert decode(sources(folder), 8, 1, places).images.shape == (40, 1, 8, 8)
    assert count.take() == 120


@pytest.mark.parametrize("change", ["content", "time", "name", "one more"])
def test_a_change_of_the_files_makes_the_cache_anew(folder, places, monkeypatch, change):
    decode(sources(folder), 8, 3, places)
    count = Count(monkeypatch)
    path = folder / "05.png"
    if change == "content":
        path.write_bytes(png(77))
    elif change == "time":
        path.write_bytes(path.read_bytes())
        os.utime(path, ns=(1, 1))
    elif change == "name":
        path.rename(folder / "055.png")
    else:
        write(folder / "99.png", png(40))
    found = decode(sources(folder), 8, 3, places)
    assert count.take() == 40 + (change == "one more")
    assert np.array_equal(found.images[5].numpy(), pixels(77 if change == "content" else 5).transpose(2, 0, 1))


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"x")


def other_json(path):
    path.write_text("[1]")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("images.npy", cut),
        ("images.npy", flip_a_bit),
        ("images.npy", lambda path: path.write_bytes(b"")),
        ("images.npy", lambda path: path.unlink()),
        ("images.json", cut),
        ("images.json", other_json),
        ("images.json", lambda path: path.unlink()),
    ],
)
def test_a_damaged_cache_is_made_anew(folder, places, monkeypatch, name, damage):
    decode(sources(folder), 8, 3, places)
    count = Count(monkeypatch)
    damage(only_cache(places) / name)
    if damage is cut and name == "images.json":
        (only_cache(places) / name).write_bytes(b'{"count": 40')
    assert torch.equal(decode(sources(folder), 8, 3, places).images, expected())
    assert count.take() == 40


def test_what_a_killed_process_left_is_not_read(folder, places):
    decode(sources(folder), 8, 3, places)
    cache = only_cache(places)
    (cache / "images.npy").rename(cache / ".images.npy.tmp")
    flip_a_bit(cache / ".images.npy.tmp")
    assert torch.equal(decode(sources(folder), 8, 3, places).images, expected())
    assert not (cache / ".images.npy.tmp").exists()


@contextmanager
def files_no_longer_than(size):
    """The kernel refuses to let any file grow further, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_in_the_middle_leaves_nothing_half_written(folder, places):
    for i in range(40, 400):
        write(folder / f"{i}.png", png(i))
    filters = list(warnings.filters)
    with files_no_longer_than(40_000), pytest.raises(StorageError, match=r"cannot write .*images.npy"):
        decode(sources(folder), 8, 3, places)
    assert [p.name for p in only_cache(places).iterdir()] == [".lock"]
    assert warnings.filters == filters
    assert decode(sources(folder), 8, 3, places).images.shape == (400, 3, 8, 8)


@pytest.mark.parametrize("place", ["fsync", "json"])
def test_a_disk_that_is_full_at_the_end_leaves_nothing_half_written(folder, places, monkeypatch, place):
    full = OSError(errno.ENOSPC, "No space left on device")

    def fsync(descriptor):
        raise full

    def write_json(path, value):
        raise StorageError(path, full)

    with monkeypatch.context() as patch:
        if place == "fsync":
            patch.setattr(module.os, "fsync", fsync)
        else:
            patch.setattr(module, "write_json", write_json)
        with pytest.raises(StorageError, match="No space left on device"):
            decode(sources(folder), 8, 3, places)
    assert [p.name for p in only_cache(places).iterdir()] == [".lock"]
    assert torch.equal(decode(sources(folder), 8, 3, places).images, expected())


def test_a_cache_that_cannot_be_made_is_one_error(folder, tmp_path):
    write(tmp_path / "file", b"")
    with pytest.raises(StorageError, match="cannot create the folder"):
        decode(sources(folder), 8, 3, Places(cache=tmp_path / "file"))


def test_several_threads_decode_once_and_read_the_same(folder, places, monkeypatch):
    count = Count(monkeypatch)
    barrier, found = threading.Barrier(4), []

    def work():
        mine = sources(folder)
        barrier.wait()
        found.append(decode(mine, 8, 3, places))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert count.take() == 40
    assert len(found) == 4
    assert all(torch.equal(one.images, expected()) for one in found)


PROCESS = """
import sys
from pathlib import Path
from manifold_mixup.lab.data.base import Places
from manifold_mixup.lab.data.decode import decode, file_sources
from manifold_mixup.lab.data.image_files import find_images
folder, cache = map(Path, sys.argv[1:])
told = []
sources = file_sources(folder, find_images(folder), "")
print(decode(sources, 8, 3, Places(cache=cache), lambda *t: told.append(t)).digest)
print(len(told) > 0)
"""


def test_two_processes_decode_once_and_read_the_same(folder, places):
    command = [sys.executable, "-c", PROCESS, str(folder), str(places.cache)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [process.communicate(timeout=100)[0].split() for process in running]
    digest = decode(sources(folder), 8, 3, places).digest
    assert [answer[0] for answer in answers] == [digest, digest]
    assert sorted(answer[1] for answer in answers) == ["False", "True"]


# --- broken images


def bomb():
    """A PNG of 200 million pixels in a hundred bytes."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 20_000, 10_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"x")) + chunk(b"IEND", b"")


BROKEN = {
    "empty.png": (b"", "it has 0 bytes"),
    "text.jpg": (b"hello, I am text", "none of PNG, JPEG"),
    "cut.png": (png(1, 60, 60)[:3000], "truncated"),
    "cut.jpg": (encoded(Image.fromarray(pixels(1, 60, 60)), "JPEG")[:2000], "truncated"),
    "bomb.png": (bomb(), "decompression bomb"),
    "script.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "none of PNG"),
}


def test_broken_images_are_listed_and_left_out(folder, places):
    for name, (content, _) in BROKEN.items():
        write(folder / name, content)
    found = decode(sources(folder), 8, 3, places)
    assert torch.equal(found.images, expected())
    names = find_images(folder)
    assert [names[i] for i in found.kept] == [f"{i:02}.png" for i in range(40)]
    assert [name for name, _ in found.broken] == sorted(BROKEN)
    for name, why in found.broken:
        assert BROKEN[name][1] in why, name
    listed = json.loads(found.listing.read_text())["broken"]
    assert [(name, why) for _, name, why in listed] == list(found.broken)
    assert decode(sources(folder), 8, 3, places).broken == found.broken


def test_pillows_own_limit_on_pixels_is_a_broken_image_too(tmp_path, places, monkeypatch):
    write(tmp_path / "a.png", png(0))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    found = decode(file_sources(tmp_path, ["a.png"], ""), 8, 3, places)
    assert len(found.images) == 0
    assert "decompression bomb" in found.broken[0][1]


def test_where_pillows_limit_is_lifted_ours_holds(tmp_path, places, monkeypatch):
    write(tmp_path / "a.png", bomb())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    found = decode(file_sources(tmp_path, ["a.png"], ""), 8, 3, places)
    assert found.broken == (("a.png", "20000x10000 pixels are too many"),)


def test_a_warning_of_pillow_is_no_error_and_is_not_shown(tmp_path, places, monkeypatch, recwarn):
    write(tmp_path / "a.png", png(0))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)  # 64 pixels: a warning, not yet an error
    assert len(decode(file_sources(tmp_path, ["a.png"], ""), 8, 3, places).images) == 1
    assert len(recwarn) == 0


@pytest.mark.parametrize("limit", [0.1, 0.13])
def test_more_broken_images_than_allowed_are_refused_by_name(folder, places, limit):
    for name, (content, _) in BROKEN.items():
        write(folder / name, content)
    found = decode(sources(folder), 8, 3, places)
    with pytest.raises(CorruptedFile) as caught:
        found.check_broken("pictures", limit)
    text = str(caught.value)
    assert text.startswith(
        f"pictures: 6 of 46 images cannot be decoded, more than max_broken={limit} allows: bomb.png ("
    )
    assert "and 1 more" in text
    assert str(found.listing) in text
    assert "\n" not in text


def test_as_many_broken_images_as_allowed_are_not_refused(folder, places):
    for name, (content, _) in BROKEN.items():
        write(folder / name, content)
    found = decode(sources(folder), 8, 3, places)
    found.check_broken("pictures", 6 / 46)
    assert found.summary().count(", ") >= 4
    assert found.summary().endswith("and 1 more")


def test_only_broken_images_are_no_images(tmp_path, places):
    write(tmp_path / "a.png", b"")
    for _ in range(2):
        found = decode(file_sources(tmp_path, ["a.png"], ""), 8, 3, places)
        assert found.images.shape == (0, 3, 8, 8)


def test_a_file_that_cannot_be_read_is_an_error_and_not_remembered_as_broken(folder, places, monkeypatch):
    original = module.Path.read_bytes

    def refuse(path):
        if path.name == "21.png":
            raise PermissionError(errno.EACCES, "Permission denied")
        return original(path)

    with monkeypatch.context() as patch:
        patch.setattr(module.Path, "read_bytes", refuse)
        with pytest.raises(StorageError, match=r"cannot read .*21\.png: Permission denied"):
            decode(sources(folder), 8, 3, places)
    assert torch.equal(decode(sources(folder), 8, 3, places).images, expected())


def test_too_little_memory_to_decode_is_an_error_and_not_a_broken_image(folder, places, monkeypatch):
    def full(*args):
        raise MemoryError

    monkeypatch.setattr(module, "decode_image", full)
    with pytest.raises(StorageError, match="cannot decode 00.png: there is not enough memory"):
        decode(sources(folder), 8, 3, places)


def test_the_first_image_of_another_size_is_told(folder, places):
    write(folder / "07.png", png(1, 9, 12))
    write(folder / "09.png", png(1, 9, 13))
    assert decode(sources(folder), 8, 3, places).resized == ("07.png", 12, 9)
    assert decode(sources(folder), 8, 3, places).resized == ("07.png", 12, 9)


def test_names_that_are_no_unicode_are_listed(tmp_path, places):
    path = os.fsencode(tmp_path) + b"/\xff.png"
    with open(path, "wb"):
        pass
    found = decode(sources(tmp_path), 8, 3, places)
    assert found.broken == (("\\xff.png", "it has 0 bytes"),)


# --- memory and missing packages


def test_images_that_do_not_fit_into_memory_are_refused_with_a_size_that_does(folder, places, monkeypatch):
    monkeypatch.setattr(module, "available_memory", lambda: 10**9)
    with pytest.raises(UsageError) as caught:
        check_memory(50_000, 224, 3, "pictures")
    assert str(caught.value) == (
        "pictures: 50,000 images of 224x224 pixels take 7.5 GB, but 1.0 GB of memory are free: set size to 56 or less"
    )
    assert 50_000 * 3 * 56**2 * 2 < 10**9
    check_memory(50_000, 56, 3, "pictures")
    monkeypatch.setattr(module, "available_memory", lambda: 40 * 3 * 64 - 1)
    with pytest.raises(UsageError, match="set size to 5 or less"):
        decode(sources(folder), 8, 3, places)
    monkeypatch.setattr(module, "available_memory", lambda: None)
    decode(sources(folder), 8, 3, places)


def test_the_free_memory_of_this_machine_is_known():
    free = module.available_memory()
    assert free is not None
    assert 2**20 < free <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_without_pillow_the_error_names_the_extra(folder, places, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtra, match=r"pillow.*manifold-mixup\[lab\]"):
        decode(sources(folder), 8, 3, places)
