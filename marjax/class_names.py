"""Class names of a data set, stored in the work directory so that sampling does not open the data."""

import collections
import json
import numbers
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from marjax.errors import UserError, closest, listed, shortened
from marjax.files import write_bytes
from marjax.json_file import read_json
from marjax.ranges import shown
from marjax.values import unquoted

FILE = "classes.json"  # in a work directory
NO_CLASS = -1
MAX_LENGTH = 200  # characters of a name

Names = tuple[str | None, ...]  # by class number; None for a class without a usable name


def usable(names: Sequence[object] | None) -> Names:
    """The names of a data set, without those that are too long, not printable or not unique.

    Returns:
      One entry per class; () if no class has a name other than its number.
    """
    given = [name if name is None else str(name) for name in names or ()]
    counts = collections.Counter(given)
    found = tuple(name if is_name(name) and counts[name] == 1 else None for name in given)
    return found if any(name not in (None, str(index)) for index, name in enumerate(found)) else ()


def is_name(text: object) -> bool:
    """Whether a value is a valid class name: one line of printable text."""
    return isinstance(text, str) and 0 < len(text) <= MAX_LENGTH and text.isprintable() and not text.isspace()


def write(folder: str | os.PathLike[str], names: Names) -> None:
    """Writes FILE into a folder, if there are names. Raises UserError: it cannot be written."""
    if names:
        text = json.dumps({"names": names}, indent=1, ensure_ascii=False) + "\n"
        write_bytes(epath.Path(folder) / FILE, text.encode())


def read(folder: str | os.PathLike[str], num_classes: int) -> Names:
    """The names in a folder, of at most `num_classes` classes; () if it has no FILE.

    Raises:
      UserError: a file that is damaged, has more names than classes, or invalid or duplicate names.
    """
    path, advice = epath.Path(folder) / FILE, "fix it, or delete it and give classes by their numbers"
    names = read_json(path, {"names": [(str, None)]}, advice=advice, missing={"names": []}, max_bytes=1 << 28)["names"]
    if len(names) > num_classes:
        raise UserError(f"{path} has {len(names)} names for {num_classes} classes; {advice}")
    seen = set()
    for name in names:
        if name is not None and (not is_name(name) or name in seen):
            raise UserError(f"{path}: {shortened(repr(name))} is not a class name, or not unique; {advice}")
        seen.add(name)
    return tuple(names) if any(names) else ()


def class_of(text: str, names: Names, num_classes: int | None = None) -> int:
    """The class that a text means: a number, a name, or -1 for "none".

    An unquoted number is the class of that number, if it exists, even if another class has that name. Names may be
    quoted and in any case.

    Raises:
      UserError: there is no such class; names the closest.
    """
    text = text.strip()
    name = unquoted(text)
    if name == text and is_number(text) and (num_classes is None or int(text) < num_classes or text not in names):
        return int(text)
    if name in names:
        return names.index(name)
    same = [index for index, each in enumerate(names) if each is not None and each.casefold() == name.casefold()]
    if len(same) == 1:
        return same[0]
    if name.lower() == "none":
        return NO_CLASS
    known = [each for each in names if each is not None]
    if not known:
        raise UserError(
            f"labels {shown(text)}: give classes such as 0-9 or 1,5,7, or 'none'; class names are unknown: "
            f'put them into {FILE} of the work directory, {{"names": ["cat"]}}'
        )
    raise UserError(f"labels: no class {shown(name)}{closest(name, known)}; give numbers or some of {listed(known)}")


def is_number(text: str) -> bool:
    """Whether a text is the number of a class."""
    return text.isdecimal() and len(text) <= 7  # more could not be listed


def classes_of(labels: Any, folder: str | os.PathLike[str], num_classes: int) -> Any:
    """Labels given in Python, with names replaced by numbers; a single label becomes a list.

    Raises:
      UserError: an unknown name, or an error of `read`.
    """
    if isinstance(labels, str | numbers.Number) or getattr(labels, "ndim", None) == 0:
        labels = [labels]
    if isinstance(labels, np.ndarray) and labels.dtype.kind in "OU":
        labels = labels.tolist()
    if isinstance(labels, list | tuple) and any(isinstance(each, str) for each in labels):
        names = read(folder, num_classes)
        return [class_of(each, names, num_classes) if isinstance(each, str) else each for each in labels]
    return labels


def label(index: int, names: Names) -> str:
    """A class in a picture: its name, or else its number; "no class" for -1."""
    if index < 0:
        return "no class"
    return (names[index] if index < len(names) else None) or str(index)


def legend(classes: Sequence[int], names: Names) -> str:
    """The names of the classes, such as "0 flower; 1 temple"; "" if there are only numbers."""
    shown = list(dict.fromkeys(classes))
    if all(label(each, names) in (str(each), "no class") for each in shown):
        return ""
    return listed([f"{each} {label(each, names)}" if each >= 0 else "no class" for each in shown], between="; ")
