"""Rows that are kept in blocks, in memory or on disk, looked up by their number. Legend: N rows, F features."""

from collections.abc import Sequence

import numpy as np

Blocks = Sequence[np.ndarray]  # each (n, F), all of one type; indexing one may load it from disk


class Rows:
    """All rows of the blocks, numbered through; at most one block is held at a time.

    Attributes:
      num_features: F.
    """

    def __init__(self, blocks: Blocks) -> None:
        """Looks at every block once. Raises ValueError: no rows, or blocks that do not fit together."""
        shapes, types = [], set()
        for block in blocks:
            shapes.append(block.shape)
            types.add(block.dtype)
        widths = {shape[1:] for shape in shapes}
        if len(widths) != 1 or len(next(iter(widths))) != 1 or len(types) != 1 or types.pop().kind != "f":
            raise ValueError(f"blocks have the shapes {sorted(set(shapes))}: give floats (n, F), all of one F and type")
        self._blocks = blocks
        self._ends = np.cumsum([shape[0] for shape in shapes])
        (self.num_features,) = widths.pop()
        self._held: tuple[int, np.ndarray] = -1, np.empty(0)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """Rows (n, F), in the blocks' type, of these numbers (n,), in their order; looks at a block at most once."""
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
