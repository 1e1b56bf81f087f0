"""Small image files of a user, and a count of what is decoded."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from manifold_mixup.lab.data import decode


def pixels(seed: int, height: int = 8, width: int = 8) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(seed: int, height: int = 8, width: int = 8) -> bytes:
    return encoded(Image.fromarray(pixels(seed, height, width)))


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


class Count:
    """How many images were decoded since it was made or asked last."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._seen = 0
        original = decode.decode_image

        def counting(content: bytes, size: int, channels: int) -> Any:
            self._seen += 1
            return original(content, size, channels)

        monkeypatch.setattr(decode, "decode_image", counting)

    def take(self) -> int:
        seen, self._seen = self._seen, 0
        return seen
