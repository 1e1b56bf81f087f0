"""One encoded image becomes pixels, whatever it is stored as.

An image is brought to eight bits and to red, green and blue (or to grey), turned upright as its EXIF orientation says,
and its largest central square is resized to the wanted size with Pillow's bilinear filter, which smooths what it
shrinks. That is the usual "resize the shorter side, then crop the centre", in one step.

What is transparent becomes white. Of 16 bits the upper eight are kept. Colour profiles are not applied. Of an animation
the first picture counts.
"""

from __future__ import annotations

import io
import os
import stat
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from manifold_mixup.lab.errors import MissingExtra, StorageError

if TYPE_CHECKING:
    from PIL.Image import Image, Transpose

__all__ = ["FORMATS", "SUFFIXES", "decode_image", "find_images", "image_size", "reason", "require_pillow"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm")
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # no other decoder of Pillow sees the files
MAX_PIXELS = 178_956_970  # where Pillow too takes an image for an attack on memory
ORIENTATION = 0x0112  # EXIF tag


def require_pillow() -> str:
    """The version of Pillow, after all its decoders are loaded.

    Raises:
        MissingExtra: It is not installed.
    """
    try:
        import PIL.Image
    except ImportError as error:
        raise MissingExtra("pillow", "lab") from error
    PIL.Image.init()  # once, before threads ask for decoders
    return PIL.__version__


def find_images(folder: Path) -> list[str]:
    """The images in a folder and the folders inside it, as sorted paths below it with ``/``.

    Images are the files whose suffix is one of :data:`SUFFIXES`, in small or capital letters. Hidden files and folders
    (with a dot in front) are left out. Links to files count as files; links to folders are not followed.

    Raises:
        StorageError: A folder cannot be read.
    """
    names: list[str] = []

    def fail(error: OSError) -> None:
        raise StorageError(Path(error.filename or folder), error, "read") from error

    for place, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = Path(place, name)
            if not name.startswith(".") and path.suffix.lower() in SUFFIXES and _may_be_read(path):
                names.append(path.relative_to(folder).as_posix())
    return sorted(names)


def _may_be_read(path: Path) -> bool:
    """Whether it is a file or a link to nothing, but no pipe or device, which would not end."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return True  # whoever reads it says what is wrong


def decode_image(content: bytes, size: int, channels: int) -> tuple[npt.NDArray[np.uint8], tuple[int, int]]:
    """One image as pixels.

    Args:
        content: The bytes of an image file.
        size: Side of the square to make of it.
        channels: 3 for red, green and blue, 1 for grey (Pillow's weights of ITU-R 601).

    Returns:
        Pixels ``(channels, size, size)``, and the image's own width and height, upright.

    Raises:
        Exception: It is no image; Pillow raises whatever its parsers ran into.
    """
    from PIL.Image import Resampling

    with _open(content) as image:
        image.load()
        turn = _turn(image)
        picture = _colours(image, channels)
    if turn is not None:
        picture = picture.transpose(turn)
    width, height = picture.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    box = (left, top, left + side, top + side)
    square = picture.crop(box) if side == size else picture.resize((size, size), Resampling.BILINEAR, box)
    pixels: npt.NDArray[np.uint8] = np.asarray(square)
    return (pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)), (width, height)


def image_size(content: bytes) -> tuple[int, int]:
    """Width and height of an image as its header tells them, before it is turned upright.

    Raises:
        Exception: It is no image; Pillow raises whatever its parsers ran into.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _open(content).size


def _open(content: bytes) -> Image:
    """An image of which only the header was read."""
    import PIL.Image

    image = PIL.Image.open(io.BytesIO(content), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels are too many")
    return image


def _turn(image: Image) -> Transpose | None:
    """What turns an image upright, or None if it is."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    try:
        return turns.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged notes about an image are no damaged image
        return None


def _colours(image: Image, channels: int) -> Image:
    """Eight bits for each of red, green and blue, or for grey."""
    import PIL.Image

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        image = PIL.Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError("32-bit values, of which none is known to be white")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    return image if channels == 3 else image.convert("L")


def reason(error: Exception) -> str:
    """What is wrong with an image, in one short line."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return f"it is none of {', '.join(FORMATS)}"
    return " ".join(str(error).split())[:120] or type(error).__name__
