"""Finds the offset of each picture in the ImageNet tars, and the label that TFDS gives it.

Tars are not compressed, so workers read a picture inside a tar, or a tar of tars, by its offset, without unpacking.
Only tars as downloaded are accepted: plain files, each within its tar.
"""

import collections
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from marjax import progress as progress_lib
from marjax.data.prepare.items import Item, Listing
from marjax.errors import UserError, shortened

IMAGENET = "imagenet2012"
TRAIN_TAR, VALIDATION_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
_NUM_IMAGENET = {"train": 1_281_167, "validation": 50_000}
_BLOCK = tarfile.BLOCKSIZE
_MAX_EXTENSION = 64 << 10  # bytes of a header about the next member
_MAX_EXTENSIONS = 4  # such headers per member


def list_imagenet(paths: Sequence[str], progress: bool = True) -> Listing:
    """The pictures of ILSVRC2012_img_train.tar and, if given, ILSVRC2012_img_val.tar, labelled as TFDS labels them.

    Args:
      paths: the tars, or a folder that holds them under these names.
      progress: show a progress bar.

    Raises:
      UserError: a file that is missing, truncated or neither of the two.
    """
    from tensorflow_datasets import core

    folder = os.path.join("datasets", IMAGENET)  # these lists are part of the package
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
        raise UserError(
            f"{', '.join(paths) or 'no path'}: expected {TRAIN_TAR} (and {VALIDATION_TAR}), or a folder "
            f"with them; register at https://image-net.org/download-images to download them"
        )
    made: dict[str, list[Item]] = {}
    for tar in tars:
        if not os.path.isfile(tar):
            raise UserError(f"{tar} does not exist: give a local {TRAIN_TAR} or {VALIDATION_TAR}")
        try:
            split, items = _read_tar(tar, labels, validation, progress)
        except (tarfile.TarError, OSError, EOFError) as error:
            raise UserError(f"{tar} cannot be read as an uncompressed tar ({error}): download it again") from None
        if split in made:
            raise UserError(f"{tar} is a second tar of split {split}: give one tar per split")
        made[split] = sorted(items)
    warnings = [
        f"split {split} has {len(items):,} pictures, ImageNet has {_NUM_IMAGENET[split]:,}"
        for split, items in made.items()
        if len(items) != _NUM_IMAGENET[split]
    ]
    return Listing(
        "imagenet",
        "ILSVRC 2012, as TFDS orders and labels it.",
        classes,
        dict(sorted(made.items())),
        collections.Counter(),
        warnings,
    )


def _read_tar(tar: str, labels: dict[str, int], validation: list[str], show: bool) -> tuple[str, list[Item]]:
    """A tar's split and pictures: class tars for train, numbered pictures with TFDS's labels for validation."""
    items: list[Item] = []
    splits: set[str] = set()
    with (
        open(tar, "rb") as file,
        progress_lib.bar(f"listing {os.path.basename(tar)}", None, "pictures", show=show) as bar,
    ):
        for member in _members(file, 0, os.path.getsize(tar)):
            base = os.path.basename(member.name)
            numbered = re.fullmatch(r"ILSVRC2012_val_(\d{8})\.JPEG", base)
            if base.endswith(".tar") and base[:-4] in labels:
                splits.add("train")
                inside = _members(file, member.offset_data, member.offset_data + member.size)
                items += [
                    Item(os.path.basename(image.name), labels[base[:-4]], tar, image.offset_data, image.size)
                    for image in inside
                ]
            elif numbered and 1 <= int(numbered[1]) <= len(validation):
                splits.add("validation")
                label = labels[validation[int(numbered[1]) - 1]]
                items.append(Item(base, label, tar, member.offset_data, member.size))
            else:
                raise UserError(
                    f"{tar} holds {shortened(member.name)}, expected class tars such as n01440764.tar or "
                    f"pictures such as ILSVRC2012_val_00000001.JPEG: give {TRAIN_TAR} or {VALIDATION_TAR} "
                    f"as downloaded (the test pictures have no labels)"
                )
            bar.update(len(items) - bar.n)
    if len(splits) != 1:
        raise UserError(
            f"{tar} holds {'training and validation pictures' if splits else 'no picture'}: give "
            f"{TRAIN_TAR} or {VALIDATION_TAR} as downloaded"
        )
    if len({item.name for item in items}) < len(items):
        raise UserError(f"{tar} holds pictures of the same name: give it as downloaded")
    return splits.pop(), items


def _members(file: BinaryIO, start: int, end: int) -> Iterator[tarfile.TarInfo]:
    """The files of the tar that starts at `start` of an open file, with offsets in that file.

    Raises:
      TarError: not a tar, or one that holds anything but files and folders.
      EOFError: a member ends beyond `end`.
    """
    position, long_name, extensions = start, None, 0
    while position < end:
        file.seek(position)
        try:
            member = tarfile.TarInfo.frombuf(file.read(_BLOCK), "utf-8", "surrogateescape")
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            return
        name = shortened(member.name)
        member.offset_data = position + _BLOCK
        if member.size < 0 or member.offset_data + member.size > end:
            raise EOFError(f"{name} has {member.size} bytes by its header, more than the file")
        position = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
        if member.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME):
            extensions += 1
            if extensions > _MAX_EXTENSIONS or member.size > _MAX_EXTENSION:
                raise tarfile.TarError(f"{name} has headers that ImageNet's tars do not have")
            text = file.read(member.size)
            if member.type == tarfile.GNUTYPE_LONGNAME:
                long_name = os.fsdecode(text.rstrip(b"\0"))
            elif re.search(rb"\d+ (path|size|linkpath|hdrcharset|GNU\.[^=]*)=", text):
                raise tarfile.TarError(f"{name} changes a member's name or size")
            continue
        if long_name is not None:
            member.name = long_name
        long_name, extensions = None, 0
        if member.type in tarfile.REGULAR_TYPES and member.type != tarfile.GNUTYPE_SPARSE:
            yield member  # the caller may seek
        elif member.type != tarfile.DIRTYPE:
            raise tarfile.TarError(f"{name} is a link, device or sparse file")
