"""Encodes and decodes image files."""

import io

import numpy as np
from PIL import Image


def exif(orientation):
    made = Image.Exif()
    made[0x0112] = orientation
    return made


def as_file(image, kind, **options):
    file = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(data):
    with Image.open(io.BytesIO(data)) as image:
        assert image.format in ("JPEG", "MPO", "PNG") and image.mode in ("L", "RGB")
        return np.asarray(image)
