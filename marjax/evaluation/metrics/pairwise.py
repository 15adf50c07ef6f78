"""Rows in blocks, in memory or on disk, looked up by number. Legend: N rows, F features."""

from collections.abc import Sequence

import numpy as np

Blocks = Sequence[np.ndarray]  # each (n, F), of one type; indexing may load a block from disk


class Rows:
    """The rows of all blocks, numbered consecutively; holds at most one block at a time.

    Attributes:
      num_features: F.
    """

    def __init__(self, blocks: Blocks) -> None:
        """Loads every block once. Raises ValueError: no rows, or blocks of different types or widths."""
        shapes, types = [], set()
        for block in blocks:
            shapes.append(block.shape)
            types.add(block.dtype)
        widths = {shape[1:] for shape in shapes}
        if len(widths) != 1 or len(next(iter(widths))) != 1 or len(types) != 1 or types.pop().kind != "f":
            raise ValueError(
                f"blocks have the shapes {sorted(set(shapes))}: expected floats (n, F), all of one F and type"
            )
        self._blocks = blocks
        self._ends = np.cumsum([shape[0] for shape in shapes])
        (self.num_features,) = widths.pop()
        self._held: tuple[int, np.ndarray] = -1, np.empty(0)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """Returns the rows (n, F) with these numbers (n,), in their order; loads a block at most once."""
        owners = np.searchsorted(self._ends, numbers, side="right")
        taken = None
        for owner in np.unique(owners):
            if owner != self._held[0]:
                self._held = owner, self._blocks[owner]
            block = self._held[1]
            if taken is None:
                taken = np.empty((len(numbers), self.num_features), block.dtype)
            chosen = owners == owner
            taken[chosen] = block[numbers[chosen] - (self._ends[owner] - len(block))]
        return np.empty((0, self.num_features)) if taken is None else taken
