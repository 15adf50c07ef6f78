"""What there is to prepare: the pictures of a folder of class folders, or of the ImageNet tars, in a fixed order.

Nothing is decoded here. A picture inside a tar, or inside a tar of a tar, is found by its offset, since tars are not
compressed: workers then read any picture without unpacking.
"""

import collections
import dataclasses
import hashlib
import os
import re
import tarfile
import unicodedata
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

from tqdm import tqdm

from marjax.data.pictures import SUFFIXES
from marjax.errors import UserError
from marjax.ranges import check_arguments

IMAGENET = "imagenet2012"
TRAIN_TAR, VALIDATION_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
_NUM_IMAGENET = {"train": 1_281_167, "validation": 50_000}

# Folders that hold a split rather than a class, and what TFDS calls the split.
_SPLITS = {"train": "train", "val": "validation", "validation": "validation", "valid": "validation", "test": "test"}
_JUNK = ("thumbs.db", "desktop.ini", "__macosx")


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


def list_folder(images: str, val_share: float = 0.0) -> Listing:
    """The pictures below `images`: class folders, or train/ and val/ (and test/) with class folders, or one class.

    Folders inside a class folder belong to the class. Classes are sorted by name; those without a picture are left out
    with a warning. What is hidden, or not named as a picture, is ignored and counted. Links are followed.

    Args:
      images: the folder.
      val_share: the share of every class that becomes the split "validation", chosen by a hash of the name.

    Raises:
      UserError: no such folder, no picture in it, a layout that may mean two things, or an impossible class name.
    """
    check_arguments(val_share=val_share)
    if not os.path.isdir(images):
        raise UserError(f"{images} is no folder: give a folder of class folders with pictures, on this machine")
    tree = _Tree()
    root = os.path.realpath(images)
    only = os.path.basename(root) or "pictures"  # the class of a folder without class folders
    folders, loose = tree.read(root, "", (root,))
    found = {name: tree.below(os.path.join(root, name), name, (root,)) for name in folders}
    filled = [name for name in folders if found[name]]
    if not filled and not loose:
        ignored = f" ({_counts(tree.ignored)} are none)" if tree.ignored else ""
        raise UserError(f"{images} holds no picture{ignored}: give a folder of class folders with JPEG or PNG files")
    if filled and loose:
        raise UserError(f"{images} holds pictures ({loose[0].name}) beside folders of pictures ({filled[0]}): move "
                        f"them into class folders, or give one of the folders")
    # Which folders are classes: (split, folder's name or "", pictures).
    groups: list[tuple[str, str, list[Item]]] = [("train", "", loose)]
    empty = [name for name in folders if not found[name]]
    if filled:
        nested = {name: [item for item in found[name] if item.name.count("/") > 1] for name in filled}
        splits = [name for name in filled if name in _SPLITS]
        if "train" not in splits or (set(filled) - set(splits) and not nested["train"]):
            groups = [("train", name, found[name]) for name in filled]
        elif set(filled) - set(splits):
            other = sorted(set(filled) - set(splits))[0]
            raise UserError(f"{images} holds train/ with folders inside, and {other}/: if train is a split, leave only "
                            f"train, val and test there; if it is a class, give it another name")
        else:
            groups = []
            for name in splits:
                groups += _groups_of_split(images, name, found[name], nested[name])
                empty += [f"{name}/{child}" for child in tree.empty_children(os.path.join(root, name), name)]
    names = sorted({name or only for split, name, _ in groups if split == "train"})
    _check_classes(names, tree.warnings)
    tree.warnings += [f"{name}/ holds no picture: not a class" for name in empty]
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
    """All pictures in and below a folder, in the order of their names, without a label. Raises UserError."""
    root = os.path.realpath(folder)
    return _Tree().below(root, os.path.basename(root), ())


def list_imagenet(paths: Sequence[str], progress: bool = True) -> Listing:
    """The pictures of ILSVRC2012_img_train.tar and, if given, ILSVRC2012_img_val.tar, labelled as TFDS labels them.

    Args:
      paths: the tars, or a folder that holds them under these names.
      progress: whether to show a bar on a terminal.

    Raises:
      UserError: a file that is missing, cut short or none of the two.
    """
    from tensorflow_datasets import core

    folder = os.path.join("datasets", IMAGENET)  # the lists are part of the package, in every version of it so far
    classes = core.tfds_path(os.path.join(folder, "labels.txt")).read_text().split()
    labels = {name: index for index, name in enumerate(classes)}
    validation = core.tfds_path(os.path.join(folder, "validation_labels.txt")).read_text().split()
    tars: list[str] = []
    for path in paths:
        if os.path.isdir(path):
            inside = [os.path.join(path, name) for name in (TRAIN_TAR, VALIDATION_TAR)]
            tars += [tar for tar in inside if os.path.isfile(tar)]
        else:
            tars.append(path)
    if not tars:
        raise UserError(f"{', '.join(paths) or 'no path'}: expected {TRAIN_TAR} (and {VALIDATION_TAR}), or a folder "
                        f"with them; they are at https://image-net.org/download-images, after registration")
    made: dict[str, list[Item]] = {}
    for tar in tars:
        if not os.path.isfile(tar):
            raise UserError(f"{tar} does not exist: give {TRAIN_TAR} or {VALIDATION_TAR}, on this machine")
        try:
            split, items = _read_tar(tar, labels, validation, progress)
        except (tarfile.TarError, OSError, EOFError) as error:
            raise UserError(f"{tar} cannot be read as an uncompressed tar ({error}): download it again") from None
        if split in made:
            raise UserError(f"{tar} is a second tar of split {split}: give each of the two once")
        made[split] = sorted(items)
    warnings = [f"split {split} has {len(items):,} pictures, ImageNet has {_NUM_IMAGENET[split]:,}"
                for split, items in made.items() if len(items) != _NUM_IMAGENET[split]]
    return Listing("imagenet", "ILSVRC 2012, as TFDS orders and labels it.", classes, dict(sorted(made.items())),
                   collections.Counter(), warnings)


class _Tree:
    """Reads folders, and remembers what it left out."""

    def __init__(self) -> None:
        self.ignored: collections.Counter[str] = collections.Counter()
        self.warnings: list[str] = []

    def read(self, path: str, prefix: str, above: tuple[str, ...]) -> tuple[list[str], list[Item]]:
        """The folders and the pictures right in `path`, sorted; `prefix` begins the pictures' names."""
        folders, items = [], []
        try:
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"folder {path} cannot be read ({error.strerror}): make it readable, or move it") from None
        for entry in entries:
            suffix = os.path.splitext(entry.name)[1].lower()
            if entry.name.startswith(".") or entry.name.lower() in _JUNK:
                self.ignored["hidden or the system's"] += 1
            elif entry.is_dir():
                if os.path.realpath(entry.path) in above:
                    self.warnings.append(f"{prefix}{entry.name} is a link to a folder around it: left out")
                else:
                    folders.append(entry.name)
            elif suffix in SUFFIXES and (entry.is_file() or not os.path.exists(entry.path)):
                # A link to nothing is a picture that cannot be read, and is found to be so later; one to a device or
                # pipe is none.
                size = entry.stat().st_size if os.path.exists(entry.path) else 0
                items.append(Item(prefix + entry.name, -1, entry.path, 0, size))
            else:
                self.ignored[suffix or "no suffix"] += 1
        return folders, items

    def below(self, path: str, name: str, above: tuple[str, ...]) -> list[Item]:
        """All pictures in and below a folder, in order of their names."""
        above = (*above, os.path.realpath(path))
        folders, items = self.read(path, f"{name}/", above)
        for folder in folders:
            items += self.below(os.path.join(path, folder), f"{name}/{folder}", above)
        return sorted(items)

    @staticmethod
    def empty_children(path: str, name: str) -> list[str]:
        """The names of folders right in `path` without any picture below."""
        quiet = _Tree()
        folders, _ = quiet.read(path, "", (path,))
        return [folder for folder in folders if not quiet.below(os.path.join(path, folder), name, (path,))]


def _groups_of_split(images: str, name: str, items: list[Item], nested: list[Item]) -> Iterator[
        tuple[str, str, list[Item]]]:
    if nested and len(nested) < len(items):
        direct = sorted(set(items) - set(nested))[0].name
        raise UserError(f"{images}: {name}/ holds pictures ({direct}) beside class folders: move them into one")
    if not nested:
        yield _SPLITS[name], "", items
        return
    classes: dict[str, list[Item]] = {}
    for item in items:
        classes.setdefault(item.name.split("/")[1], []).append(item)
    for child, its in classes.items():
        yield _SPLITS[name], child, its


def _check_classes(names: list[str], warnings: list[str]) -> None:
    """TFDS keeps the names as lines of a file, and strips them."""
    for name in names:
        if name != name.strip() or len(name.splitlines()) != 1 or name.encode("utf-8", "replace") != os.fsencode(name):
            raise UserError(f"class folder {name!r}: rename it, without space around it, line breaks or bytes that are "
                            f"not UTF-8")
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
    parts = {"train": [item for item in made["train"] if item.name not in chosen],
             "validation": [item for item in made["train"] if item.name in chosen]}
    for split, items in parts.items():
        if not items:
            raise UserError(f"val_share is {share}, which leaves no picture for {split}: give another share, or none")
    return parts | {split: items for split, items in made.items() if split != "train"}


def _read_tar(tar: str, labels: dict[str, int], validation: list[str], progress: bool) -> tuple[str, list[Item]]:
    """A tar's split and pictures: of class tars inside, or pictures whose labels TFDS knows by their number."""
    items: list[Item] = []
    splits: set[str] = set()
    with open(tar, "rb") as file, tqdm(desc=f"listing {os.path.basename(tar)}", unit=" pictures",
                                       disable=None if progress else True) as bar:
        for member in _members(file, 0, os.path.getsize(tar)):
            base = os.path.basename(member.name)
            numbered = re.fullmatch(r"ILSVRC2012_val_(\d{8})\.JPEG", base)
            if base.endswith(".tar") and base[:-4] in labels:
                splits.add("train")
                inside = _members(file, member.offset_data, member.offset_data + member.size)
                items += [Item(os.path.basename(image.name), labels[base[:-4]], tar, image.offset_data, image.size)
                          for image in inside]
            elif numbered and 1 <= int(numbered[1]) <= len(validation):
                splits.add("validation")
                label = labels[validation[int(numbered[1]) - 1]]
                items.append(Item(base, label, tar, member.offset_data, member.size))
            else:
                raise UserError(f"{tar} holds {member.name}, expected class tars such as n01440764.tar or pictures "
                                f"such as ILSVRC2012_val_00000001.JPEG: give {TRAIN_TAR} or {VALIDATION_TAR} as they "
                                f"are downloaded (the test pictures have no labels)")
            bar.update(len(items) - bar.n)
    if len(splits) != 1:
        raise UserError(f"{tar} holds {'training and validation pictures' if splits else 'no picture'}: give "
                        f"{TRAIN_TAR} or {VALIDATION_TAR} as they are downloaded")
    if len({item.name for item in items}) < len(items):
        raise UserError(f"{tar} holds pictures of the same name: give it as it is downloaded")
    return splits.pop(), items


def _members(file: BinaryIO, start: int, end: int) -> Iterator[tarfile.TarInfo]:
    """The files of the tar that begins at `start` of an open file, their offsets counted in that file."""
    file.seek(start)
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            if member.offset_data + member.size > end:
                raise EOFError(f"{member.name} goes beyond the end")
            if member.isfile():
                yield member  # whoever takes it may move the file: tarfile seeks before it reads


def _counts(counts: collections.Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
