"""Pictures to prepare, and lists of them, as the readers of folders and tars return them."""

import collections
import dataclasses
import hashlib
import os
from typing import NamedTuple


class Item(NamedTuple):
    """A picture: `size` bytes of the file `path` from `offset` on; `name` is unique and known to the user."""

    name: str
    label: int
    path: str
    offset: int
    size: int


@dataclasses.dataclass(frozen=True)
class Listing:
    """The content of a data set.

    Attributes:
      kind: "images" or "imagenet".
      title: a sentence for the data set's description.
      classes: class names by label.
      splits: the pictures by split.
      ignored: number of files that are not pictures, by suffix.
      warnings: about anything unusual that does not stop the preparation.
    """

    kind: str
    title: str
    classes: list[str]
    splits: dict[str, list[Item]]
    ignored: collections.Counter[str]
    warnings: list[str]

    def digest(self) -> str:
        """A checksum of everything that the data set depends on, except the contents of the pictures."""
        made = hashlib.sha256()
        for name in self.classes:
            made.update(os.fsencode(name) + b"\n")
        for split, items in self.splits.items():
            for item in items:
                made.update(os.fsencode(f"{split}\0{item.name}\0{item.label}\0{item.size}\n"))
        return made.hexdigest()
