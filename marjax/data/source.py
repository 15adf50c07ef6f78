"""The contract of a source, and a source of arrays in memory.

A source is random access: `len(source)` examples, `source[i]` decoded on demand. The pipeline shuffles, crops and
batches. Sources are picklable, since each worker process holds a copy.
"""

import hashlib
import re
from collections.abc import Sequence
from typing import Any, Protocol, TypedDict

import numpy as np
import numpy.typing as npt

from marjax.class_names import Names, usable
from marjax.errors import UserError

Pixels = npt.NDArray[np.uint8]
PYTHON = "python"  # data.source of a run whose data came from Python code
MAX_CLASSES = 1 << 20  # each has a row of the model's embedding


class Element(TypedDict):
    """One example: `image` uint8 (H, W, C) with C of 1, 3 or 4, and its class `label`."""

    image: Pixels
    label: int


class Source(Protocol):
    """A finite, picklable sequence of examples.

    Attributes:
      num_classes: labels lie in [0, num_classes).

    It may also have `class_names`, a sequence of str by label (see `class_names_of`).
    """

    num_classes: int

    def __len__(self) -> int:
        """How many examples there are, at least 1."""

    def __getitem__(self, index: int, /) -> Element:
        """Example `index` of `range(len(self))`. Raises UserError, naming data set and index: it is unusable."""

    def stored(self, index: int) -> bytes:
        """The stored bytes of example `index`, undecoded. Raises UserError as `__getitem__` does."""


def class_names_of(source: Source) -> Names:
    """Class names of a source by label; () if it has none."""
    return usable(getattr(source, "class_names", None))[: source.num_classes]


def fingerprint(source: Source) -> str:
    """A checksum of the number of examples and of the stored bytes of up to 256 of them, evenly spaced.

    It does not depend on where the data are stored, and distinguishes data sets of the same name.
    """
    made = hashlib.sha256(f"{len(source)} examples".encode())
    for index in sampled_indices(source):
        made.update(hashlib.sha256(source.stored(index)).digest())
    return made.hexdigest()


def sampled_indices(source: Source) -> list[int]:
    """Up to 256 evenly spaced examples, for a fingerprint."""
    indices = np.linspace(0, len(source) - 1, min(256, len(source))).astype(np.int64)
    return [int(index) for index in np.unique(indices)]


class ArraySource:
    """Examples held in memory: `images` uint8 (N, H, W, C), `labels` (N,)."""

    def __init__(self, images: Pixels, labels: npt.NDArray[Any], num_classes: int, class_names: Sequence[str] = ()):
        self.num_classes, self.class_names = num_classes, class_names
        self._images = images
        self._labels: list[int] = labels.tolist()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int, /) -> Element:
        return {"image": self._images[index], "label": self._labels[index]}

    def stored(self, index: int) -> bytes:
        """See `Source`."""
        return self._images[index].tobytes() + str(self._labels[index]).encode()


def slice_of(split: str, source: str, size: int) -> slice:
    """The slice of a split in TFDS's notation: counts or percentages, from the start or (negative) the end."""
    match = re.fullmatch(r"(?:train|all)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", split)
    if not match:
        raise UserError(
            f"data.split={split!r} is unknown to {source}; use 'train' or 'all', or a slice such as 'train[:1400]' or "
            "'train[80%:]'"
        )

    def position(text: str | None, default: int) -> int:
        if text is None:
            return default
        offset = round(size * int(text[:-1]) / 100) if text.endswith("%") else int(text)
        if abs(offset) > size:
            raise UserError(f"data.split={split!r} reaches beyond the {size} examples of {source}; shorten the slice")
        return offset + size if offset < 0 else offset

    start, stop = position(match[1], 0), position(match[2], size)
    if start >= stop:
        raise UserError(empty_split(source, split))
    return slice(start, stop)


def empty_split(source: str, split: str) -> str:
    return f"data.split={split!r} of {source!r} is empty; choose a split or a slice with at least one example"
