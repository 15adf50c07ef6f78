"""Lists the folders and pictures below a folder, each real folder once, however many links lead to it.

Nothing here is recursive, so folders may be nested as deeply as the file system allows.
"""

import collections
import dataclasses
import errno
import os
import stat

from marjax.data.prepare.items import Item
from marjax.data.prepare.pictures import SUFFIXES
from marjax.errors import UserError, shortened

# Files and folders of operating systems, file servers and programs, in lower case.
_SYSTEM_NAMES = (
    "thumbs.db|ehthumbs.db|ehthumbs_vista.db|desktop.ini|icon\r|__macosx|network trash folder|temporary items|"
    "lost+found|$recycle.bin|recycler|recycled|system volume information|found.000|@eadir|@tmp|@recycle|"
    "@recently-snapshot|@sharebin|@quarantine|#recycle|#snapshot|__pycache__|ipynb_checkpoints"
)
_SYSTEM = frozenset(_SYSTEM_NAMES.split("|"))


@dataclasses.dataclass
class Folder:
    """A folder and its content.

    Attributes:
      name: its name; "" for the root.
      prefix: its path below the root with a "/" at the end; "" for the root.
      path: on this machine.
      items: its pictures, sorted, without those of subfolders.
      folders: its subfolders, sorted by name.
      num_pictures: in it and below.
    """

    name: str
    prefix: str
    path: str
    items: list[Item] = dataclasses.field(default_factory=list)
    folders: list["Folder"] = dataclasses.field(default_factory=list)
    num_pictures: int = 0

    @property
    def filled(self) -> list["Folder"]:
        """The subfolders with pictures in or below them."""
        return [folder for folder in self.folders if folder.num_pictures]

    @property
    def empty(self) -> list["Folder"]:
        """The subfolders without any picture."""
        return [folder for folder in self.folders if not folder.num_pictures]

    def below(self) -> list[Item]:
        """All pictures in it and below, sorted by name."""
        found, waiting = list[Item](), [self]
        while waiting:
            folder = waiting.pop()
            found += folder.items
            waiting += folder.folders
        return sorted(found)


_Found = tuple[Folder | None, Folder]  # the parent, and the folder


@dataclasses.dataclass(frozen=True)
class Tree:
    """All folders and pictures below a folder.

    Attributes:
      top: the folder.
      ignored: number of ignored files and folders, by suffix or kind.
      warnings: links that were not followed.
    """

    top: Folder
    ignored: collections.Counter[str]
    warnings: list[str]


def read_tree(root: str, prefix: str = "") -> Tree:
    """Reads a folder and all below it.

    Links are followed last, in order of their names, unless their folder was read before. Hidden files, files of the
    operating system, and files without a picture's suffix are ignored and counted.

    Args:
      root: the folder.
      prefix: of the name of every picture.

    Raises:
      UserError: a folder cannot be read.
    """
    root = os.path.realpath(root)
    tree = Tree(Folder("", prefix, root), collections.Counter(), [])
    done, seen = list[_Found](), set[tuple[int, int]]()
    folders, links = collections.deque[_Found]([(None, tree.top)]), collections.deque[_Found]()
    while folders or links:
        parent, folder = (folders or links).popleft()
        name = folder.prefix[:-1]
        if parent is not None and os.path.islink(folder.path):
            target = os.path.realpath(folder.path)
            if _holds(target, os.path.realpath(parent.path)) or _holds(target, root):
                tree.warnings.append(f"{name} is a link to a folder that contains it: left out")
                continue
        identity = _identity(folder.path)
        if identity in seen:
            tree.warnings.append(f"{name} is a second link to the same folder: left out")
            continue
        seen.add(identity)
        done.append((parent, folder))
        for child, is_link in _read(folder, tree.ignored):
            (links if is_link else folders).append((folder, child))
    for parent, folder in reversed(done):  # a folder comes after its parent
        folder.folders.sort(key=lambda child: child.name)
        folder.num_pictures += len(folder.items)
        if parent is not None:
            parent.folders.append(folder)
            parent.num_pictures += folder.num_pictures
    return tree


def _read(folder: Folder, ignored: collections.Counter[str]) -> list[tuple[Folder, bool]]:
    """Fills in a folder's pictures; returns its subfolders, each with whether it is a link."""
    found: list[tuple[Folder, bool]] = []
    try:
        with os.scandir(folder.path) as scanned:
            entries = sorted(scanned, key=lambda entry: entry.name)
    except OSError as error:
        raise _unreadable(folder.path, error) from None
    for entry in entries:
        name = folder.prefix + entry.name
        suffix = os.path.splitext(entry.name)[1].lower()
        if entry.name.startswith(".") or entry.name.lower() in _SYSTEM:
            ignored["hidden or the system's"] += 1
            continue
        try:
            status = os.stat(entry.path)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise _unreadable(entry.path, error) from None
            mode, size = stat.S_IFREG, 0  # a broken link is reported later, as an unreadable picture
        else:
            mode, size = status.st_mode, status.st_size
        if stat.S_ISDIR(mode):
            found.append((Folder(entry.name, name + "/", entry.path), entry.is_symlink()))
        elif not stat.S_ISREG(mode):
            ignored["pipes, sockets and devices"] += 1
        elif suffix in SUFFIXES:
            folder.items.append(Item(name, -1, entry.path, 0, size))
        else:
            ignored[suffix or "no suffix"] += 1
    return found


def _identity(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise _unreadable(path, error) from None
    return status.st_dev, status.st_ino


def _holds(outer: str, inner: str) -> bool:
    return inner == outer or inner.startswith(outer.rstrip(os.sep) + os.sep)


def _unreadable(path: str, error: OSError) -> UserError:
    return UserError(f"folder {shortened(path, 200)} cannot be read ({error.strerror}); make it readable, or move it")
