"""Lists the pictures of a folder of class folders, in a fixed order. Nothing is decoded here.

The names that published data sets use decide which folders are splits and which are classes.
"""

import collections
import hashlib
import os
import re
import shlex
import unicodedata
from collections.abc import Iterator

from marjax.data.prepare.imagenet import list_imagenet as list_imagenet
from marjax.data.prepare.items import Item, Listing
from marjax.data.prepare.tree import Folder, Tree, read_tree
from marjax.errors import UserError
from marjax.ranges import check_arguments

# Names of split folders, in lower case, with "_" between words.
_SPLIT = re.compile(
    r"(?:(?:seg|images?|imgs?|data|dataset)_)?"
    r"(?:(?P<train>train|training)|(?P<validation>val|valid|validate|validation|dev|devel|development|eval|evaluation)"
    r"|(?P<test>test|testing)|(?P<unlabelled>pred|predict|prediction|unlabell?ed))"
    r"_?(?:sets?|splits?|data|images?|imgs?|pictures?|photos?|dir|folder)?_?\d{0,4}"
)
# Splits of two domains, as in CycleGAN's data sets (trainA, testB): taken for classes, with a warning.
_DOMAIN = re.compile(r"(train|val|test)[\W_]?[ab]")
# Names of a folder that holds the class folders, as in CUB-200.
_CONTAINERS = frozenset({"images", "image", "imgs", "img", "jpegimages", "pictures", "photos", "data", "dataset"})
_Group = tuple[str, str, list[Item]]  # split; class, or "" for pictures in no class folder; pictures


def list_folder(images: str, val_share: float = 0.0) -> Listing:
    """The pictures below `images`: class folders, or train/ and val/ (and test/) with class folders, or one class.

    Split folders may have any of the common names, in any case. Folders inside a class folder belong to the class.
    Classes are sorted by name; those without a picture are left out with a warning. See `read_tree` for what is
    ignored, and for links.

    Args:
      images: the folder.
      val_share: the share of every class that becomes the split "validation", chosen by a hash of the name.

    Raises:
      UserError: no such folder, no picture in it, an ambiguous layout, or an invalid class name.
    """
    check_arguments(val_share=val_share)
    if not os.path.isdir(images):
        raise UserError(f"{images} is not a folder: give a local folder of class folders with pictures")
    tree = read_tree(images)
    top = _classes_in(tree.top, tree.warnings)
    only = os.path.basename(tree.top.path) or "pictures"  # the class of a folder without class folders
    filled = top.filled
    if not filled and not top.items:
        ignored = f" ({_counts(tree.ignored)} are not pictures)" if tree.ignored else ""
        raise UserError(f"{images} holds no picture{ignored}: give a folder of class folders with JPEG or PNG files")
    if filled and top.items:
        raise UserError(
            f"{images} holds pictures ({top.items[0].name}) beside folders of pictures ({filled[0].name}): "
            f"move them into class folders, or give one of the folders"
        )
    groups: list[_Group] = [("train", "", top.items)]
    if filled:
        splits = _splits_of(images, filled)
        if splits:
            groups = [
                group for split, folder in splits.items() for group in _groups_of_split(images, split, folder, tree)
            ]
        else:
            groups = [("train", folder.name, folder.below()) for folder in filled]
            _warn_of_classes(filled, tree.warnings)
    names = sorted({name or only for split, name, _ in groups if split == "train"})
    groups = list(_without_unlabelled(groups, names, only, tree))
    _check_classes(names, tree.warnings)
    tree.warnings.extend(f"{folder.prefix} holds no picture: not a class" for folder in top.empty)
    made: dict[str, list[Item]] = {}
    for split, name, items in groups:
        if (name or only) not in names:
            raise UserError(f"{images}: class {name!r} has pictures in {split} but none in train: add some, or move it")
        label = names.index(name or only)
        made.setdefault(split, []).extend(item._replace(label=label) for item in items)
    if val_share:
        if "validation" in made:
            raise UserError(f"{images} has a folder for validation already: leave out val_share")
        made = _divide(made, val_share)
    return Listing("images", f"Pictures of {len(names)} classes.", names, made, tree.ignored, tree.warnings)


def list_pictures(folder: str) -> list[Item]:
    """All pictures in and below a folder, sorted by name, without labels. Raises UserError."""
    return read_tree(folder, os.path.basename(os.path.realpath(folder)) + "/").top.below()


def _split_of(folder: Folder) -> str | None:
    """The split that a folder's name means: "train", "validation", "test" or "unlabelled"; None for a class."""
    match = _SPLIT.fullmatch(re.sub(r"[\W_]+", "_", folder.name.lower()).strip("_"))
    return match.lastgroup if match else None


def _classes_in(top: Folder, warnings: list[str]) -> Folder:
    """The folder of class folders or of splits: the given one, or one inside it."""
    found = folder = top
    while not folder.items and len(folder.filled) == 1 and not _split_of(folder.filled[0]):
        (folder,) = folder.filled
        is_container = folder.name.lower() in _CONTAINERS and not folder.items and len(folder.filled) > 1
        if is_container or "train" in map(_split_of, folder.filled):
            found = folder
    if found is not top:
        splits = "train" in map(_split_of, found.filled)
        warnings.append(f"{'splits' if splits else 'classes'} are the folders in {found.prefix}")
    return found


def _splits_of(images: str, filled: list[Folder]) -> dict[str, Folder]:
    """The split folders by split; {} if all folders are classes."""
    splits = {folder.name: split for folder in filled if (split := _split_of(folder))}
    if len(splits) == len(filled) and "train" not in splits.values():
        raise UserError(
            f"{images} holds {', '.join(f'{name}/' for name in splits)} but no train/; add one, or start "
            f"with --images {shlex.quote(filled[0].path)} to train on it"
        )
    train = [folder for folder in filled if splits.get(folder.name) == "train"]
    others = [folder.name for folder in filled if folder.name not in splits]
    if not train or (others and not any(folder.filled for folder in train)):
        return {}
    if others:
        raise UserError(
            f"{images} holds {train[0].name}/ with folders inside, and {others[0]}/: if train is a split, "
            f"leave only train, val and test there; if it is a class, give it another name"
        )
    found: dict[str, Folder] = {}
    for folder in filled:
        if (first := found.setdefault(splits[folder.name], folder)) is not folder:
            raise UserError(
                f"{images}: {first.name}/ and {folder.name}/ are both split {splits[folder.name]}; move "
                f"one away, or its class folders into the other"
            )
    return found


def _groups_of_split(images: str, split: str, folder: Folder, tree: Tree) -> Iterator[_Group]:
    if split == "unlabelled":
        _leave_out(folder.below(), folder.prefix, tree)
        return
    while (
        not folder.items
        and len(folder.filled) == 1
        and (_split_of(folder.filled[0]) == split or folder.filled[0].name.lower() in _CONTAINERS)
    ):
        (folder,) = folder.filled  # as in seg_train/seg_train/
    if folder.items and folder.filled:
        raise UserError(
            f"{images}: {folder.prefix} holds pictures ({folder.items[0].name}) beside class folders: move "
            f"them into one"
        )
    if folder.items:
        yield split, "", folder.items
    for child in folder.filled:
        yield split, child.name, child.below()
    tree.warnings.extend(f"{child.prefix} holds no picture: not a class" for child in folder.empty)


def _without_unlabelled(groups: list[_Group], classes: list[str], only: str, tree: Tree) -> Iterator[_Group]:
    """Leaves out pictures of other splits without a class folder, if those of train have class folders."""
    for split, name, items in groups:
        if split != "train" and not name and classes != [only]:
            _leave_out(items, os.path.dirname(items[0].name) + "/", tree)
        else:
            yield split, name, items


def _leave_out(items: list[Item], where: str, tree: Tree) -> None:
    tree.ignored["without a class"] += len(items)
    tree.warnings.append(
        f"{where} holds {len(items)} pictures without class folders: left out; move them into class "
        f"folders to keep them"
    )


def _warn_of_classes(folders: list[Folder], warnings: list[str]) -> None:
    """Warns of folders that may not be classes."""
    for folder in folders:
        if len(folders) == 1 and not folder.items and len(folder.filled) > 1:
            warnings.append(
                f"{folder.prefix} is the only class, with {folder.filled[0].prefix} and others inside: if "
                f"these are classes, start with --images {shlex.quote(folder.path)}"
            )
        elif len(folders) > 1 and (_split_of(folder) or folder.name.lower() in _CONTAINERS):
            warnings.append(
                f"{folder.prefix} is taken for a class, as {folders[folders[0] is folder].prefix} is: if "
                f"it holds the classes, start with --images {shlex.quote(folder.path)}"
            )
        elif len(folders) > 1 and _DOMAIN.fullmatch(folder.name.lower()):
            warnings.append(
                f"{folder.prefix} is taken for a class, as {folders[folders[0] is folder].prefix} is: if "
                f"it is a split, start with --images {shlex.quote(folder.path)} to train on that"
            )


def _check_classes(names: list[str], warnings: list[str]) -> None:
    """Raises UserError: a name cannot be a line of a file, as TFDS stores it."""
    for name in names:
        if name != name.strip() or len(name.splitlines()) != 1 or name.encode("utf-8", "replace") != os.fsencode(name):
            raise UserError(
                f"class folder {name!r}: rename it, without space around it, line breaks or bytes that are not UTF-8"
            )
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(unicodedata.normalize("NFC", name).casefold(), []).append(name)
    for same in alike.values():
        if len(same) > 1:
            warnings.append(f"classes {', '.join(map(repr, same))} differ only in case or composition: kept apart")


def _divide(made: dict[str, list[Item]], share: float) -> dict[str, list[Item]]:
    classes: dict[int, list[Item]] = {}
    for item in made["train"]:
        classes.setdefault(item.label, []).append(item)
    chosen: set[str] = set()
    for items in classes.values():
        order = sorted(items, key=lambda item: hashlib.md5(b"val_share" + os.fsencode(item.name)).digest())
        chosen.update(item.name for item in order[: round(len(items) * share)])
    parts = {
        "train": [item for item in made["train"] if item.name not in chosen],
        "validation": [item for item in made["train"] if item.name in chosen],
    }
    for split, items in parts.items():
        if not items:
            raise UserError(f"val_share is {share}, which leaves no picture for {split}: give another share, or 0")
    return parts | {split: items for split, items in made.items() if split != "train"}


def _counts(counts: collections.Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
