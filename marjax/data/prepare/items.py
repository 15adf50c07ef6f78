"""Pictures to prepare, and lists of them: what the readers of folders and tars make."""

import collections
import dataclasses
import hashlib
import os
from typing import NamedTuple


class Item(NamedTuple):
    """A picture: `name` is unique and what the user knows it by; `size` bytes of the file `path`, from `offset` on."""

    name: str
    label: int
    path: str
    offset: int
    size: int


@dataclasses.dataclass(frozen=True)
class Listing:
    """What a data set is made from.

    Attributes:
      kind: "images" or "imagenet".
      title: a sentence for the data set's description.
      classes: their names; a label is an index of this.
      splits: the pictures of each split.
      ignored: how many files that are no pictures were left out, by suffix.
      warnings: what looks odd but does not stop the preparation.
    """

    kind: str
    title: str
    classes: list[str]
    splits: dict[str, list[Item]]
    ignored: collections.Counter[str]
    warnings: list[str]

    def digest(self) -> str:
        """A checksum of everything that the data set depends on, but for the contents of the pictures."""
        made = hashlib.sha256()
        for name in self.classes:
            made.update(os.fsencode(name) + b"\n")
        for split, items in self.splits.items():
            for item in items:
                made.update(os.fsencode(f"{split}\0{item.name}\0{item.label}\0{item.size}\n"))
        return made.hexdigest()
