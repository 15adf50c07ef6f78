"""Prepares a folder of pictures, or the ImageNet tars, as a data set in the layout of TFDS, without TensorFlow.

OUT/NAME/VERSION holds shards of ArrayRecord, dataset_info.json, features.json, label.labels.txt, and prepared.json,
which records what the data set was made from. Until it is complete, the folder is named VERSION.preparing, which no
reader takes for a data set. Order and shards depend on names only, through the hash that TFDS shuffles by: neither
workers nor interruptions change a byte.
"""

import contextlib
import dataclasses
import glob
import importlib.metadata
import importlib.util
import io
import itertools
import json
import os
import re
import shlex
import shutil
import statistics
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from hashlib import md5
from typing import Any

from PIL import Image

from marjax.data.prepare.imagenet import IMAGENET
from marjax.data.prepare.items import Item, Listing
from marjax.data.prepare.listing import list_folder, list_imagenet
from marjax.data.prepare.pictures import DOUBTS, read_bytes
from marjax.data.prepare.shards import Record, Shard, features_of
from marjax.data.worker_processes import available_cores, write_shards
from marjax.errors import TrainingError, UserError, listed, shortened
from marjax.files import write_text
from marjax.json_file import read_json
from marjax.lock import locked_folder
from marjax.paths import takes_paths
from marjax.ranges import check_arguments

SIZES = {"tiny": (32,), "small": (64, 32)}  # image sizes to suggest, in pixels; the largest that fits is used
_SHARD_BYTES = 64 << 20  # at least; sizes and numbers of shards are those of TFDS
_MAX_SHARDS = 1024
_RECORDS = "records"
_PREPARED = {
    "num_examples": {str: range(1 << 40)},
    "kinds": {str: range(1 << 40)},
    "unreadable": [[str]],
    "doubtful?": [[str]],
}


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A finished data set.

    Attributes:
      data_dir: what `config.data.data_dir` and TFDS's `data_dir` should be.
      name: `config.data.source` is "tfds:NAME".
      version: of the data set.
      classes: class names by label.
      num_examples: per split.
      kinds: number of pictures per kind (see `marjax.data.prepare.pictures`).
      unreadable: the pictures left out, each with the reason.
      ignored: number of other files, by suffix.
      warnings: about anything unusual.
      side: pixels on the shorter side of the median training picture; 0 if unknown.
      fresh: False if the data set was complete before.
    """

    data_dir: str
    name: str
    version: str
    classes: list[str]
    num_examples: dict[str, int]
    kinds: dict[str, int]
    unreadable: list[tuple[str, str]]
    ignored: dict[str, int]
    warnings: list[str]
    side: int
    fresh: bool

    @property
    def directory(self) -> str:
        """Folder of the data set."""
        return os.path.join(self.data_dir, self.name, self.version)

    def summary(self) -> str:
        """A few lines: what was stored, and how to train on it."""
        kept = [kind for kind in self.kinds if kind in ("JPEG", "PNG")]
        lines = [
            f"{self.directory}: {', '.join(f'{count:,} {split}' for split, count in self.num_examples.items())}; "
            f"{len(self.classes)} classes" + ("" if self.fresh else "; already prepared, nothing done"),
            "labels: "
            + listed([f"{label} {shortened(name)}" for label, name in enumerate(self.classes)], between="; "),
            "stored unchanged: " + (_listed({kind: self.kinds[kind] for kind in kept}) or "none"),
            "stored as PNG: " + (_listed({kind: n for kind, n in self.kinds.items() if kind not in kept}) or "none"),
        ]
        if self.ignored:
            lines.append("not pictures, ignored: " + _listed(self.ignored))
        if self.unreadable:
            lines.append(f"unreadable, left out: {len(self.unreadable)}, see {self.directory}/unreadable.txt")
        return "\n".join([*lines, f"train: {self.train_command()}"])

    def train_command(self) -> str:
        """The command to train with, quoted for a shell; it trains a tiny model on a machine without an accelerator."""
        config = "imagenet256:model=mar_base"
        if self.name != IMAGENET:
            model = "small" if has_accelerator() else "tiny"
            size = next((size for size in SIZES[model] if size <= self.side), SIZES[model][-1])
            config = f"folder:name={self.name},size={size},model={model}"
        data_dir = f"--config.data.data_dir={self.data_dir}"
        return shlex.join(["marjax", "train", "--config", config, data_dir, "--workdir", f"runs/{self.name}"])


def has_accelerator() -> bool:
    """Whether this machine has a GPU or TPU that JAX is installed for; does not initialize JAX."""
    if os.environ.get("JAX_PLATFORMS", "") == "cpu":
        return False
    nvidia = os.path.exists("/dev/nvidiactl") and bool(importlib.metadata.entry_points(group="jax_plugins"))
    tpu = bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")) and bool(importlib.util.find_spec("libtpu"))
    return nvidia or tpu


@takes_paths("images", "imagenet", "out")
def prepare(
    images: str | os.PathLike[str] | None = None,
    imagenet: Sequence[str | os.PathLike[str]] | None = None,
    *,
    out: str | os.PathLike[str],
    name: str | None = None,
    num_shards: int | None = None,
    max_bad: int = 0,
    val_share: float = 0.0,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
    bits: int | None = None,
) -> Prepared:
    """Prepares a data set for marjax and plain `tfds.data_source`; a second call resumes a killed one.

    Every picture is decoded once (see `marjax.data.prepare.pictures`). Examples have the features "image", "label" and
    "file_name". A script must call this below `if __name__ == "__main__":`, or pass `workers=1`.

    Args:
      images: a folder of class folders (see `list_folder`); or else
      imagenet: the ImageNet tars, or a folder with them (see `list_imagenet`).
      out: folder of data sets; this one goes to OUT/NAME/VERSION.
      name: of a data set of pictures: letters, digits and underscores; by default, the folder's name.
      num_shards: files per split, at most one per picture; by default, one per 64 MiB or more.
      max_bad: maximum number of unreadable pictures, which are left out and listed in unreadable.txt.
      val_share: the share of each class that becomes the split "validation".
      workers: processes; by default, one per core that this process may use.
      overwrite: replace a data set that is there.
      progress: show a progress bar.
      bits: how many bits are used of pictures with 16 bits per channel; see `marjax.data.prepare.deep` for None.

    Raises:
      UserError: an argument, a folder or a tar that cannot be used; more than `max_bad` unreadable pictures; another
        data set of this name in `out`; another process that writes it.
      TrainingError: a file cannot be written, or a worker died.
    """
    if bool(images) == bool(imagenet):
        raise UserError("nothing to prepare: give either a folder of pictures or the ImageNet tars")
    given = [os.fspath(path) for path in ([images] if images is not None else imagenet or [])]
    out = os.fspath(out)
    for path in (*given, out):
        if "://" in path:
            raise UserError(f"{path} is not on this machine: use local folders, then copy the result")
    out = os.path.abspath(out)
    check_arguments(num_shards=num_shards, max_bad=max_bad, val_share=val_share, workers=workers, bits=bits)
    if imagenet is not None:
        if name not in (None, IMAGENET) or val_share:
            raise UserError(
                f"ImageNet is prepared as {IMAGENET}, with its own validation pictures: leave out name and val_share"
            )
        name, version = IMAGENET, _imagenet_version()
        listing = list_imagenet(given, progress)
    else:
        name, version = _checked_name(name, given[0]), "1.0.0"
        if os.path.commonpath([os.path.realpath(given[0]), os.path.realpath(out)]) == os.path.realpath(given[0]):
            raise UserError(f"{out} is inside {given[0]}: give an --out outside the folder of pictures")
        listing = list_folder(given[0], val_share)
    final = os.path.join(out, name, version)
    for warning in listing.warnings:
        _log(f"warning: {warning}")

    shards = {split: _cut(_shuffled(split, items), num_shards) for split, items in listing.splits.items()}
    plan = {
        "source": listing.kind,
        "name": name,
        "version": version,
        "classes": len(listing.classes),
        "pictures": {split: len(items) for split, items in listing.splits.items()},
        "shards": {split: len(parts) for split, parts in shards.items()},
        "sha256": listing.digest(),
    }
    if bits is not None:
        plan["bits"] = bits

    def finished() -> Prepared | None:
        if overwrite or not os.path.exists(os.path.join(final, "dataset_info.json")):
            return None
        made = _read_json(os.path.join(final, "prepared.json"), {**_PREPARED, "plan": dict})
        _refuse_other(final, made.get("plan"), plan)
        missing = [
            file
            for split, parts in shards.items()
            for file in _files(name, split, len(parts))
            if not os.path.exists(os.path.join(final, file))
        ]
        if missing:
            raise UserError(
                f"{final} lacks {len(missing)} of its files, such as {missing[0]}: prepare it again with --overwrite"
            )
        _tidy(final)
        return _prepared(out, listing, made, fresh=False)

    if (there := finished()) is not None:
        return there
    folder = final + ".preparing"
    with locked_folder(os.path.dirname(final), "marjax prepare", f"{version}.lock"):
        if (there := finished()) is not None:  # another process has finished it
            return there
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder} cannot be created ({error.strerror}): give an --out that is writable") from None
        try:
            _begin(folder, plan, overwrite)
            tasks: dict[str, list[Shard]] = {}
            for split, parts in shards.items():
                files = _files(name, split, len(parts))
                tasks[split] = [
                    Shard(
                        os.path.join(folder, file),
                        os.path.join(folder, _RECORDS, f"{file}.json"),
                        part,
                        listing.kind == "images",
                        max_bad,
                        bits,
                    )
                    for file, part in zip(files, parts, strict=True)
                ]
            records = write_shards(
                [task for split in tasks.values() for task in split], max_bad, workers or available_cores(), progress
            )
            _check_unreadable(records, max_bad, folder)
            made = _write_metadata(
                folder, plan, listing, {split: [records[task.path] for task in parts] for split, parts in tasks.items()}
            )
            _publish(folder, final)
        except OSError as error:  # a folder that is not writable, too few file descriptors or processes
            raise TrainingError(
                f"{error.filename or folder}: {error.strerror or error}; fix that, then start the same command again"
            ) from None
    return _prepared(out, listing, made, fresh=True)


def _begin(folder: str, plan: dict[str, Any], overwrite: bool) -> None:
    """Removes the files that do not belong to this data set. Raises UserError: they belong to another data set."""
    before = {} if overwrite else _read_json(os.path.join(folder, "plan.json"), {})
    if before:
        _refuse_other(folder, before, plan)
    for file in os.listdir(folder):
        if file == _RECORDS and not before:
            shutil.rmtree(os.path.join(folder, file))
        elif not before or ".partial" in file:
            os.remove(os.path.join(folder, file))
    os.makedirs(os.path.join(folder, _RECORDS), exist_ok=True)
    write_text(os.path.join(folder, "plan.json"), json.dumps(plan, indent=1))


def _checked_name(name: str | None, folder: str) -> str:
    import tensorflow_datasets as tfds

    own = re.sub(r"\W+", "_", os.path.basename(os.path.realpath(folder)).lower(), flags=re.ASCII).strip("_")
    if not re.match("[a-z]", own):
        own = f"pictures_{own}".strip("_")
    chosen = own if name is None else name
    if not re.fullmatch(r"[a-z][a-z0-9_]*", chosen):
        raise UserError(f"name {chosen!r} is not a data set's name: give --name with lower-case letters, digits and _")
    if chosen in tfds.list_builders(with_community_datasets=False):
        raise UserError(f"name {chosen!r} is a data set of TFDS: give another --name")
    return chosen


def _imagenet_version() -> str:
    import tensorflow_datasets as tfds

    return str(tfds.builder_cls(IMAGENET).VERSION)


def _shuffled(split: str, items: list[Item]) -> list[Item]:
    """In TFDS's order for these names, so that a slice of a split has the same pictures."""
    return sorted(items, key=lambda item: md5(split.encode() + os.fsencode(item.name)).digest())


def _cut(items: list[Item], num_shards: int | None) -> list[list[Item]]:
    """The pictures of each shard."""
    if num_shards is None:
        num_shards, size = 1, sum(item.size for item in items)
        while 2 * num_shards <= min(size // _SHARD_BYTES, len(items), _MAX_SHARDS):
            num_shards *= 2
    num_shards = min(num_shards, len(items))
    bounds = [round(len(items) * index / num_shards) for index in range(num_shards + 1)]
    return [items[start:stop] for start, stop in itertools.pairwise(bounds)]


def _files(name: str, split: str, count: int) -> list[str]:
    """The names of a split's shards."""
    return [f"{name}-{split}.array_record-{i:05d}-of-{count:05d}" for i in range(count)]


def _refuse_other(folder: str, before: dict[str, Any] | None, plan: dict[str, Any]) -> None:
    if before is None:
        raise UserError(f"{folder} holds a data set that marjax prepare did not write: give another --out or --name")
    if before != plan:
        changes = [
            f"{shortened(key)} (was {shortened(str(before.get(key)))}, now {plan.get(key)})"
            for key in {**plan, **before}
            if before.get(key) != plan.get(key) and key != "sha256"
        ]
        raise UserError(
            f"{folder} was started with other pictures or settings: "
            f"{', '.join(changes) or 'names, classes or sizes of pictures differ'}; give the same ones, another --out "
            f"or --name, or --overwrite to replace it"
        )


def _check_unreadable(records: dict[str, Record], max_bad: int, folder: str) -> None:
    """Raises UserError: there are too many; unreadable.txt lists those found so far."""
    unreadable = [pair for record in records.values() for pair in record.unreadable]
    if len(unreadable) > max_bad:
        _write_unreadable(folder, unreadable)
        name, why = shortened(unreadable[0][0], 200), unreadable[0][1]
        raise UserError(
            f"{name} cannot be read ({why})"
            + (f", nor can others, {len(unreadable)} so far" if len(unreadable) > 1 else "")
            + f", and max_bad is {max_bad}: resume with a larger --max_bad to leave such pictures out, or repair them "
            f"and start with --overwrite"
        )


def _write_unreadable(folder: str, unreadable: list[tuple[str, str]]) -> None:
    lines = [f"{shortened(name, 4096)}\t{why}\n" for name, why in unreadable]
    write_text(os.path.join(folder, "unreadable.txt"), "".join(lines))


def _write_metadata(
    folder: str, plan: dict[str, Any], listing: Listing, records: dict[str, list[Record]]
) -> dict[str, Any]:
    """Writes all files but the shards, dataset_info.json last; returns the content of prepared.json."""
    import tensorflow_datasets as tfds

    everything = [record for split in records.values() for record in split]
    unreadable = sorted(pair for record in everything for pair in record.unreadable)
    kinds = Counter[str]()
    for record in everything:
        kinds.update(record.kinds)
    counts = {split: sum(record.num_examples for record in parts) for split, parts in records.items()}
    made: dict[str, Any] = {
        "plan": plan,
        "num_examples": counts,
        "kinds": dict(sorted(kinds.items())),
        "unreadable": unreadable,
    }
    if doubtful := sorted(pair for record in everything for pair in record.doubtful):
        made["doubtful"] = doubtful
    if unreadable:
        _write_unreadable(folder, unreadable)
    for split, count in counts.items():
        if not count:
            raise UserError(
                f"no picture of split {split} can be read, see {folder}/unreadable.txt: give other pictures"
            )
    write_text(os.path.join(folder, "prepared.json"), json.dumps(made, indent=1) + "\n")
    is_imagenet = listing.kind == "imagenet"
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        version=plan["version"],
        features=features_of(
            tfds.features.ClassLabel(names=listing.classes), **({"encoding_format": "jpeg"} if is_imagenet else {})
        ),
        split_infos=[
            tfds.core.SplitInfo(
                name=split, shard_lengths=[r.num_examples for r in rs], num_bytes=sum(r.num_bytes for r in rs)
            )
            for split, rs in records.items()
        ],
        supervised_keys=("image", "label"),
        description=listing.title,
        check_data=False,  # that needs TensorFlow
        **({"homepage": "https://image-net.org/"} if is_imagenet else {}),
    )
    return made


def _publish(folder: str, final: str) -> None:
    """Renames the folder, which makes it a data set; a data set to be replaced is kept until then."""
    old = final + ".old"
    shutil.rmtree(old, ignore_errors=True)
    if os.path.isdir(final):
        os.rename(final, old)
    os.rename(folder, final)
    shutil.rmtree(old, ignore_errors=True)
    _tidy(final)


def _tidy(final: str) -> None:
    """Removes what only a resumed run needs, once the data set is published: a run killed earlier still resumes."""
    shutil.rmtree(os.path.join(final, _RECORDS), ignore_errors=True)
    with contextlib.suppress(OSError):  # usually there is none; and a data set may be read-only
        os.remove(os.path.join(final, "plan.json"))


def _prepared(out: str, listing: Listing, made: dict[str, Any], fresh: bool) -> Prepared:
    plan = made["plan"]
    warnings = []
    for doubt, advice in DOUBTS.items():
        if names := [pair[0] for pair in made.get("doubtful", []) if pair[-1] == doubt]:
            shown = ", ".join(shortened(name, 200) for name in names[:3]) + ", ..." * (len(names) > 3)
            warnings.append(f"{len(names)} picture{'s are' if len(names) > 1 else ' is'} {advice}: {shown}")
            _log(f"warning: {warnings[-1]}")
    return Prepared(
        out,
        plan["name"],
        plan["version"],
        listing.classes,
        made["num_examples"],
        made["kinds"],
        [(pair[0], pair[-1]) for pair in made["unreadable"]],
        dict(sorted(listing.ignored.items())),
        listing.warnings + warnings,
        _median_side(listing),
        fresh,
    )


def _median_side(listing: Listing) -> int:
    """Median of the shorter sides of up to 100 training pictures, from their headers; 0 if none can be read."""
    if listing.kind == "imagenet":
        return 0
    items = listing.splits["train"]
    sides = []
    for item in items[:: max(1, len(items) // 100)]:
        with contextlib.suppress(Exception), warnings.catch_warnings():  # already reported
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(read_bytes(item.path, item.offset, item.size))) as image:
                sides.append(min(image.size))
    return int(statistics.median(sides)) if sides else 0


def _read_json(path: str, shape: dict[str, Any]) -> dict[str, Any]:
    """The content of a file of marjax prepare; {} if it is missing."""
    given: dict[str, Any] = read_json(
        path, shape, advice="remove its folder, or start with --overwrite", missing={}, max_bytes=1 << 28
    )
    return given


def _listed(counts: dict[str, int]) -> str:
    return "; ".join(f"{count:,} {name}" for name, count in counts.items())


def _log(text: str) -> None:
    print(f"marjax prepare: {text}", file=sys.stderr)
