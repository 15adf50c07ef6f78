"""Writes TFDS data sets, and the images in them."""

import io
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from marjax import config as config_lib
from marjax.config.resolve import frozen
from marjax.data.config import DataConfig


def data_config(**changes: Any) -> DataConfig:
    return frozen(config_lib.base().data, DataConfig, **{"num_classes": 10} | changes)


def write_tfds(
    directory: pathlib.Path, name: str, examples: list[dict[str, Any]], features: dict[str, Any] | None = None
) -> None:
    """Prepares a TFDS data set of array_record files; images are given as the bytes of an image file."""
    features = features or {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=5)}

    class Written(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg, misc]
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, manager: Any) -> dict[str, Any]:
            return {"train": self._generate_examples(), "validation": self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
            for key, example in enumerate(examples):
                image = {"image": io.BytesIO(example["image"])} if "image" in example else {}
                yield key, example | image

    Written.name = name
    Written(data_dir=str(directory), file_format="array_record").download_and_prepare()


def picture(seed: int, mode: str = "RGB", side: int = 12) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side + 3, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    return image.quantize(16) if mode == "P" else image.convert(mode)


def as_file(image: Image.Image, kind: str = "png") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()
