"""Encodes and decodes image files."""

import io
from typing import Any

import numpy as np
from PIL import Image


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[0x0112] = orientation
    return made


def as_file(image: Image.Image | np.ndarray, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        assert image.format in ("JPEG", "MPO", "PNG") and image.mode in ("L", "RGB")
        return np.asarray(image)
