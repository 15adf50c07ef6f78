"""Sets of real images: an array in an npz file, pictures in a folder, the data of a config.

Legend: N images of H x W pixels and C channels, B in a batch.
"""

import concurrent.futures
import math
import os
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from marjax.data.config import DataConfig
from marjax.data.examples import Images
from marjax.data.folder import pictures, read_picture
from marjax.data.pipeline import Batches
from marjax.data.preprocess import Preprocess, center_crop, to_channels
from marjax.data.sources import open_source
from marjax.errors import UserError
from marjax.evaluation.across_processes import ALONE, Processes
from marjax.npz_file import NpzFile
from marjax.paths import takes_paths

Batch = tuple[np.ndarray, np.ndarray]  # indices int (B,), images uint8 (B, H, W, C)


class ImageSet(Protocol):
    """Images of one size.

    Attributes:
      source: where the images come from, for people.
    """

    source: str

    def __len__(self) -> int:
        """N, at least 1."""

    def batches(self, batch_size: int, processes: Processes = ALONE) -> Iterator[Batch]:
        """Yields a process's share of the images, each once, at most `batch_size` at a time. Raises UserError."""


class NpzImages:
    """The array uint8 (N, H, W, C) in a member of an npz file, read sequentially.

    Attributes:
      source: the file's path.
      shape: (N, H, W, C).
    """

    @takes_paths("path")
    def __init__(self, path: str | os.PathLike[str], key: str = "arr_0") -> None:
        """Reads the header. Raises UserError: no such file or array, or another shape or type."""
        self.source, self._key = os.fspath(path), key
        self._advice = f"give an npz file with images, uint8 (N, H, W, 1 or 3), as {key}"
        with NpzFile(path, advice=self._advice) as file:
            header = file.header(key, ("u", 4))
        self.shape = header.shape
        if header.dtype != np.uint8 or self.shape[3] not in (1, 3) or header.fortran or 0 in self.shape:
            order = " in Fortran order" * header.fortran
            raise UserError(f"{self.source}: {key} is {header.dtype} {self.shape}{order}; {self._advice}")

    def __len__(self) -> int:
        return int(self.shape[0])

    def batches(self, batch_size: int, processes: Processes = ALONE) -> Iterator[Batch]:
        """See `ImageSet`."""
        image_bytes = math.prod(self.shape[1:])
        with (
            NpzFile(self.source, advice=self._advice) as archive,
            archive.stream(self._key, ("u", 4)) as (file, header),
        ):
            if header.shape != self.shape:
                raise UserError(f"{self.source} changed while it was being read; start again")
            for batch in processes.share(-(-len(self) // batch_size)):
                indices_B = np.arange(batch * batch_size, min(len(self), (batch + 1) * batch_size))
                file.seek(header.start + int(indices_B[0]) * image_bytes)  # forward only, as streams can
                data = file.read(len(indices_B) * image_bytes)
                if len(data) < len(indices_B) * image_bytes:
                    raise EOFError(f"{self._key} ends early")
                yield indices_B, np.frombuffer(data, np.uint8).reshape(-1, *self.shape[1:])


class FolderImages:
    """The pictures in a folder, at any depth, in the order of their paths.

    Attributes:
      source: the folder.
    """

    @takes_paths("folder")
    def __init__(self, folder: str | os.PathLike[str], image_size: int | None = None, channels: int = 3) -> None:
        """Lists the pictures.

        Args:
          folder: the folder.
          image_size: the side of the square cropped from each picture as in training; None keeps their size.
          channels: 1 or 3, to which colours are converted.

        Raises:
          UserError: no pictures, or an invalid size.
        """
        self.source = os.fspath(folder)
        self._paths = pictures(folder)
        self._channels = channels
        self._crop = None if image_size is None else Preprocess(image_size, channels, flip=False).image_size

    def __len__(self) -> int:
        return len(self._paths)

    def batches(self, batch_size: int, processes: Processes = ALONE) -> Iterator[Batch]:
        """See `ImageSet`."""
        shape = self._picture(self._paths[0]).shape
        with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for batch in processes.share(-(-len(self) // batch_size)):
                indices_B = np.arange(batch * batch_size, min(len(self), (batch + 1) * batch_size))
                paths = [self._paths[index] for index in indices_B]
                images = list(pool.map(self._picture, paths))
                for path, image in zip(paths, images, strict=True):
                    if image.shape != shape:
                        raise UserError(
                            f"picture {path} has {image.shape[0]} x {image.shape[1]} pixels, the first of the "
                            f"folder {shape[0]} x {shape[1]}; set image_size to crop all to one size"
                        )
                yield indices_B, np.stack(images)

    def _picture(self, path: str) -> np.ndarray:
        image = read_picture(path)
        # Like `Preprocess`, drops channels before the crop and repeats them after it.
        image = to_channels(image, min(self._channels, image.shape[2]))
        return to_channels(image if self._crop is None else center_crop(image, self._crop), self._channels)


class ConfigImages:
    """The images of a `config.data`, in its order, cropped as in training, without flips.

    Attributes:
      source: the data set and its split.
    """

    def __init__(self, data: DataConfig) -> None:
        """Opens the source. Raises UserError: see `open_source` and `Preprocess`."""
        self.source = f"{data.source} {data.split}"
        self._data = data
        self._examples = Images(open_source(data), Preprocess(data.image_size, data.channels, flip=False))

    def __len__(self) -> int:
        return len(self._examples)

    def batches(self, batch_size: int, processes: Processes = ALONE) -> Iterator[Batch]:
        """See `ImageSet`."""
        opened = Batches(
            self._data,
            batch_size * processes.count,
            0,
            train=False,
            examples=self._examples,
            rows=processes.index * batch_size + np.arange(batch_size),
        )
        with opened as batches:
            for step, batch in enumerate(batches):
                first = (step * processes.count + processes.index) * batch_size
                indices_B = np.arange(first, min(len(self), first + batch_size))
                if len(indices_B):  # the last batch is padded, on some processes entirely
                    yield indices_B, batch["image"][: len(indices_B)]
