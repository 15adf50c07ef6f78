"""Reads a latent cache: its manifest and its examples.

A latent cache is a folder with `manifest.json` and ArrayRecord files. Record i * F + f is example i in the source's
order, unflipped (f = 0) or flipped (f = 1), where F is 2 in a cache with flips, else 1. A record is the label, int32,
and the moments (see `marjax.tokenizers.protocol.Cacheable`) in row-major order, both little-endian.

Legend: N examples, h x w latents.
"""

import dataclasses
import itertools
import json
import math
import os
import re
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from marjax.class_names import Names, usable
from marjax.data.config import DataConfig
from marjax.data.preprocess import CROP, draw_flip
from marjax.data.records import num_records, reached_limit, remedy
from marjax.errors import UserError, shortened
from marjax.json_file import REQUIRED, parse_json, read_json
from marjax.paths import takes_paths
from marjax.storage import on_this_machine

MANIFEST = "manifest.json"
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "int32": np.dtype(np.int32)}
_LABEL_BYTES = 4
_MAX_SHARDS = 100_000


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of a latent cache, and which images and tokenizer it is made from.

    Attributes:
      checksum: of the tokenizer's weights.
      source, split: of the images: `config.data.source` and `config.data.split`.
      fingerprint: of the images (`marjax.data.sources.fingerprint`).
      image_size, channels: of the images, after the crop.
      crop: how they were cropped (`marjax.data.preprocess.CROP`).
      num_examples: N.
      num_classes: labels are in [0, num_classes).
      flips: whether every image is stored flipped too.
      shape: of the moments of one image.
      dtype: of the stored moments, a key of DTYPES.
      compute_dtype: of the tokenizer's convolutions.
      shard_examples: examples per file; the last may hold fewer.
      format: of the records.
      class_names: by label; () if unknown. They are ignored when caches are compared.
    """

    checksum: str
    source: str
    split: str
    fingerprint: str
    image_size: int
    channels: int
    crop: str
    num_examples: int
    num_classes: int
    flips: bool
    shape: tuple[int, ...]
    dtype: str
    compute_dtype: str
    shard_examples: int
    format: int = 1
    class_names: Names = dataclasses.field(default=(), compare=False)

    @property
    def num_shards(self) -> int:
        return -(-self.num_examples // self.shard_examples)

    @property
    def record_bytes(self) -> int:
        return _LABEL_BYTES + math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def shard_file(self, shard: int) -> str:
        return f"latents.array_record-{shard:05d}-of-{self.num_shards:05d}"

    def examples_of(self, shard: int) -> range:
        start = shard * self.shard_examples
        return range(start, min(start + self.shard_examples, self.num_examples))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def read(cls, path: str | os.PathLike[str], *, missing: Any = REQUIRED) -> Any:
        """The manifest in a file, or `missing`, if given, without the file. Raises UserError."""
        found = read_json(path, _SHAPE, advice=_AGAIN, missing=missing)
        return found if found is missing else cls._of(found, os.fspath(path))

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """The inverse of `to_json`. Raises UserError: not a manifest."""
        return cls._of(parse_json(text, _SHAPE, where=MANIFEST, advice=_AGAIN), MANIFEST)

    @classmethod
    def _of(cls, found: dict[str, Any], where: str) -> "Manifest":
        given = {field.name: found[field.name] for field in dataclasses.fields(cls) if field.compare}
        names = usable(found.get("class_names"))[: found["num_classes"]]
        made = cls(**given | {"shape": tuple(found["shape"]), "class_names": names})
        if not 1 <= len(made.shape) <= 8 or made.record_bytes >= 1 << 31:
            raise UserError(
                f"{where}: shape is {shortened(str(made.shape))}, expected that of an image's latents; {_AGAIN}"
            )
        if made.num_shards > _MAX_SHARDS:
            raise UserError(
                f"{where}: num_examples {made.num_examples} and shard_examples {made.shard_examples} make "
                f"{made.num_shards} files, expected at most {_MAX_SHARDS}; {_AGAIN}"
            )
        return made

    def differences(self, other: "Manifest") -> list[str]:
        """The differences from another cache, one line each."""
        pairs = (
            (field.name, getattr(self, field.name), getattr(other, field.name))
            for field in dataclasses.fields(self)
            if field.compare
        )
        return [f"{name} {mine!r} instead of {others!r}" for name, mine, others in pairs if mine != others]


_AGAIN = "make the cache again with marjax cache-latents --overwrite"
_TEXT = re.compile(r"[^\x00-\x1f\x7f]*")
_SHAPE = {  # the format first: a later one may have other fields
    "format": {1},
    "checksum": _TEXT,
    "source": _TEXT,
    "split": _TEXT,
    "fingerprint": _TEXT,
    "crop": _TEXT,
    "image_size": range(1, 1 << 31),
    "channels": range(1, 1 << 31),
    "num_examples": range(1, 1 << 48),
    "num_classes": range(1, 1 << 31),
    "flips": bool,
    "shape": [range(1, 1 << 31)],
    "dtype": set(DTYPES),
    "compute_dtype": _TEXT,
    "shard_examples": range(1, 1 << 48),
    "class_names?": [(str, None)],
}


@takes_paths("folder")
def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """The manifest of a finished cache. Raises UserError: it is missing or cannot be read."""
    on_this_machine(folder, "config.data.cache")
    path = os.path.join(folder, MANIFEST)
    found: Manifest | None = Manifest.read(path, missing=None)
    if found is not None:
        return found
    if os.path.exists(os.path.join(os.path.dirname(path), f"plan-{MANIFEST}")):
        raise UserError(f"the latent cache {folder} is not finished: start marjax cache-latents again to resume it")
    raise UserError(
        f"{folder} is not a latent cache (it has no {MANIFEST}): make one with marjax cache-latents --out "
        f"{folder}, or leave config.data.cache empty"
    )


def check_fits(
    manifest: Manifest,
    data: DataConfig,
    *,
    checksum: str,
    shape: tuple[int, ...],
    dtype: npt.DTypeLike,
    fingerprint: str | None = None,
) -> None:
    """Checks that training from the cache equals training on the images of `data` with this tokenizer.

    Args:
      manifest: of the cache `data.cache`.
      data: of a resolved config.
      checksum: of the tokenizer's weights.
      shape: of one image's moments.
      dtype: of the moments, before they are stored.
      fingerprint: of the images, or None if they are not available.

    Raises:
      UserError: a difference, naming all of them.
    """
    wanted = {
        "checksum": checksum,
        "source": data.source,
        "split": data.split,
        "image_size": data.image_size,
        "channels": data.channels,
        "crop": CROP,
        "shape": tuple(shape),
    }
    if fingerprint is not None:
        wanted["fingerprint"] = fingerprint
    odd = [
        f"{name} {getattr(manifest, name)!r} instead of {value!r}"
        for name, value in wanted.items()
        if getattr(manifest, name) != value
    ]
    if np.issubdtype(np.dtype(dtype), np.integer) != (manifest.dtype == "int32"):
        odd.append(f"dtype {manifest.dtype} instead of {np.dtype(dtype)}")
    if data.flip and not manifest.flips:
        odd.append("no flipped images, but config.data.flip is set")
    if data.num_classes is not None and manifest.num_classes > data.num_classes:
        odd.append(f"num_classes {manifest.num_classes} instead of {data.num_classes}")
    if data.num_examples is not None and manifest.num_examples != data.num_examples:
        odd.append(f"num_examples {manifest.num_examples} instead of {data.num_examples}")
    if odd:
        raise UserError(
            f"the latent cache {data.cache} does not fit the config: it has {'; '.join(odd)}: give another "
            f"config.data.cache, make one with marjax cache-latents, or leave it empty to encode while training"
        )


class Latents:
    """The examples of a latent cache (see `examples.Examples`): moments, half of them of flipped images with `flip`.

    Flips are drawn as for images, so that training from a cache equals training on its images.
    """

    kind = "moments"
    in_memory = False

    def __init__(self, folder: str | os.PathLike[str], manifest: Manifest, flip: bool) -> None:
        """Opens every file once.

        Raises:
          UserError: a file is missing, damaged or of the wrong length; the cache has no flips.
        """
        if flip and not manifest.flips:
            raise UserError(
                f"the latent cache {folder} has no flipped images: set config.data.flip=False, or make it "
                f"again with config.data.flip=True"
            )
        self.shape, self.dtype = manifest.shape, DTYPES[manifest.dtype]
        self.class_names = manifest.class_names
        self._manifest, self._flip, self._folder = manifest, flip, os.fspath(folder)
        self._records = _open(self._folder, manifest)

    def __len__(self) -> int:
        return self._manifest.num_examples

    def read(self, index: int, rng: np.random.Generator) -> tuple[npt.NDArray[Any], int]:
        """Moments of example `index`, read-only, and its label. Raises UserError where they cannot be read."""
        mirrored = self._flip and draw_flip(rng)
        try:
            record = self._records[index * (1 + self._manifest.flips) + mirrored]
            return unpack(record, self._manifest)
        except Exception as error:  # the original may not be picklable
            again = remedy(error, "make it again with marjax cache-latents --overwrite")
            raise UserError(
                f"the latent cache {self._folder}: example {index} cannot be read ({type(error).__name__}: "
                f"{(str(error).splitlines() or [''])[0]}): {again}"
            ) from error


def _open(folder: str, manifest: Manifest) -> Any:
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    again = "start marjax cache-latents again, which writes the missing files"
    there = set(os.listdir(folder))
    if missing := [name for name in map(manifest.shard_file, range(manifest.num_shards)) if name not in there]:
        raise UserError(
            f"the latent cache {folder} lacks {len(missing)} of {manifest.num_shards} files, such as "
            f"{missing[0]}: {again}"
        )
    paths = [os.path.join(folder, manifest.shard_file(shard)) for shard in range(manifest.num_shards)]
    each = 1 + manifest.flips
    expected = [each * len(manifest.examples_of(shard)) for shard in range(manifest.num_shards)]
    for path, count in zip(paths, expected, strict=True):  # before opening or allocating anything
        if not os.path.isfile(path):
            raise UserError(f"{path} is not a regular file: remove it, then {again}")
        if os.path.getsize(path) < count * manifest.record_bytes:
            raise UserError(f"{path} {_differs(path, count)}: remove it, then {again}")
    try:
        records = ArrayRecordDataSource(paths)
        problem = "cannot be read"
    except Exception as error:
        records, problem = None, (str(error).splitlines() or [""])[0]
        if reached_limit(error):
            raise UserError(f"the latent cache {folder} cannot be read ({problem}): {remedy(error, again)}") from None
    if records is None or len(records) != sum(expected):
        differing = ((path, _differs(path, count)) for path, count in zip(paths, expected, strict=True))
        path, problem = next((pair for pair in differing if pair[1]), (folder, problem))
        raise UserError(f"{path} {problem}: remove it, then {again}")
    return records


def _differs(path: str, expected: int) -> str:
    """What is wrong with a file that should have `expected` records; "" if nothing is."""
    count = num_records(path)
    if count is None:
        return "is damaged"
    return f"has {count} records instead of {expected}" if count != expected else ""


def pack(moments: npt.NDArray[Any], label: int) -> bytes:
    """The record of one example."""
    return np.int32(label).astype("<i4").tobytes() + np.ascontiguousarray(moments).tobytes()


def unpack(record: bytes, manifest: Manifest) -> tuple[npt.NDArray[Any], int]:
    """The inverse of `pack`. Raises ValueError: a wrong size or label."""
    if len(record) != manifest.record_bytes:
        raise ValueError(f"a record has {len(record)} bytes, expected {manifest.record_bytes}")
    label = int.from_bytes(record[:_LABEL_BYTES], "little", signed=True)
    if not 0 <= label < manifest.num_classes:
        raise ValueError(f"a record has the label {label}, expected at most {manifest.num_classes - 1}")
    return np.frombuffer(record, DTYPES[manifest.dtype], offset=_LABEL_BYTES).reshape(manifest.shape), label


def runs(shards: list[int]) -> list[range]:
    """Groups consecutive shards: [range(0, 2), range(4, 5)] for [0, 1, 4]."""
    grouped = itertools.groupby(enumerate(shards), lambda pair: pair[1] - pair[0])
    return [range(found[0][1], found[-1][1] + 1) for found in (list(group) for _, group in grouped)]
