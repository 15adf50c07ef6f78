"""Random access to single examples, ready for the model: what batches are made of."""

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from marjax.class_names import Names
from marjax.data.preprocess import Preprocess
from marjax.data.source import ArraySource, Pixels, Source, class_names_of


class Examples(Protocol):
    """Random access to examples of one shape; picklable, since each worker process holds a copy.

    Attributes:
      kind: the name of their array in a batch.
      shape: of one example.
      dtype: of the array.
      in_memory: whether reading an example takes hardly any time.
      class_names: by label; () if unknown.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    in_memory: bool
    class_names: Names

    def __len__(self) -> int:
        """How many there are, at least 1."""

    def read(self, index: int, rng: np.random.Generator) -> tuple[npt.NDArray[Any], int]:
        """Example `index` of `range(len(self))`, augmented by `rng`, and its label.

        Raises UserError, naming the example: it is unusable.
        """


class Images:
    """The images of a source, cropped and optionally flipped: uint8 (S, S, C)."""

    kind = "image"
    dtype: np.dtype[Any] = np.dtype(np.uint8)

    def __init__(self, source: Source, preprocess: Preprocess) -> None:
        self.shape: tuple[int, ...] = (preprocess.image_size, preprocess.image_size, preprocess.channels)
        self.in_memory = isinstance(source, ArraySource)
        self.class_names = class_names_of(source)
        self._source, self._preprocess = source, preprocess

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int, rng: np.random.Generator) -> tuple[Pixels, int]:
        """See `Examples`."""
        element = self._preprocess(self._source[index], rng)
        return element["image"], element["label"]
