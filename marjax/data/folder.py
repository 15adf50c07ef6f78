"""Reads the pictures of a folder that is not prepared as a data set and has no class folders."""

import os

from marjax.data.prepare.listing import list_pictures
from marjax.data.prepare.pictures import UnreadableError, decode, read_bytes, storable
from marjax.data.records import remedy
from marjax.data.source import Pixels
from marjax.errors import UserError
from marjax.paths import takes_paths


@takes_paths("folder")
def pictures(folder: str | os.PathLike[str]) -> list[str]:
    """Paths of all pictures in and below a folder, sorted by name; the same files as for `marjax prepare`.

    Raises:
      UserError: no such folder, or no picture in it.
    """
    root = os.fspath(folder)
    if not os.path.isdir(root):
        raise UserError(f"images {folder} is not a folder: give a local folder of pictures")
    found = [item.path for item in list_pictures(root)]
    if not found:
        raise UserError(f"images {folder} has no pictures: give another folder")
    return found


def read_picture(path: str | os.PathLike[str]) -> Pixels:
    """The pixels of a picture, uint8 (H, W, 1 or 3), as training reads them from a prepared data set.

    Raises:
      UserError: it cannot be read.
    """
    try:
        return decode(storable(read_bytes(path))[0])
    except (OSError, UnreadableError) as error:
        advice = remedy(error, "repair it, or remove it from the folder")
        raise UserError(f"picture {os.fspath(path)} cannot be read ({error}): {advice}") from None
