"""One shard of a data set: its pictures are read, checked and written, then recorded, so that a killed run can resume.

A shard depends on its list of pictures only, so any process may write it, at any time, more than once. It is finished
once its record exists: both are written under another name and renamed, the record last.
"""

import contextlib
import functools
import json
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from marjax.data.prepare.items import Item
from marjax.data.prepare.pictures import UnreadableError, doubts, read_bytes, storable
from marjax.data.records import remedy
from marjax.errors import TrainingError, UserError
from marjax.files import atomic, write_text
from marjax.json_file import read_json


class Shard(NamedTuple):
    """A task of a worker: which pictures go into which file.

    Attributes:
      path: of the shard.
      record: of its record.
      items: the pictures, in order.
      upright: see `storable`.
      max_bad: how many pictures may be unreadable.
      bits: see `storable`.
    """

    path: str
    record: str
    items: list[Item]
    upright: bool
    max_bad: int
    bits: int | None = None


class Record(NamedTuple):
    """The result of writing a shard.

    Attributes:
      num_examples: in the shard.
      num_bytes: of the examples.
      kinds: number of pictures per kind (see `storable`).
      unreadable: names of the pictures left out, each with the reason.
      doubtful: pictures that may be stored wrongly, each with the reason (a key of `pictures.DOUBTS`).
      finished: whether the shard exists; False if too many pictures were unreadable, or if the run was stopped.
    """

    num_examples: int = 0
    num_bytes: int = 0
    kinds: dict[str, int] = {}  # noqa: RUF012  (never changed)
    unreadable: list[tuple[str, str]] = []  # noqa: RUF012
    doubtful: list[tuple[str, str]] = []  # noqa: RUF012
    finished: bool = False


def read_record(shard: Shard) -> Record | None:
    """The record of a shard, None if the shard is not finished."""
    shape = {
        "num_examples": range(len(shard.items) + 1),
        "num_bytes": range(1 << 62),
        "kinds": {str: range(1 << 40)},
        "unreadable": [[str]],
        "doubtful": [[str]],
        "finished": bool,
    }
    try:
        given = read_json(shard.record, shape, advice="", max_bytes=1 << 28)
        pairs = {field: [(name, why) for name, why in given[field]] for field in ("unreadable", "doubtful")}
        return Record(**given | pairs)
    except (UserError, ValueError, TypeError):  # the shard is written again
        return None


class _UnfinishedError(Exception):
    """Stopped, or too many pictures are unreadable."""


def write_shard(shard: Shard, tick: Callable[[], Any], stopped: Callable[[], bool]) -> Record:
    """Writes a shard and its record.

    Args:
      shard: what to write.
      tick: called after every picture.
      stopped: called before every picture; True stops.

    Raises:
      TrainingError: the file cannot be written.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    kinds: dict[str, int] = {}
    unreadable: list[tuple[str, str]] = []
    doubtful: list[tuple[str, str]] = []
    num_examples = num_bytes = 0
    try:
        with atomic(shard.path, shared=True, fsync=True) as partial:  # an orphaned process may write it too
            # One example per group, as in TFDS, for random access. Compression would take a third of the time here, and
            # half of the time of reading, without making the file smaller.
            writer = ArrayRecordWriter(os.fspath(partial), "group_size:1,uncompressed")
            with contextlib.closing(writer):
                for item in shard.items:
                    if stopped() or len(unreadable) > shard.max_bad:
                        raise _UnfinishedError
                    try:
                        stored, kind = storable(
                            read_bytes(item.path, item.offset, item.size), shard.upright, shard.bits
                        )
                    except UnreadableError as error:
                        unreadable.append((item.name, str(error)))
                    else:
                        example = _serialized(stored, item)
                        writer.write(example)
                        num_examples, num_bytes = num_examples + 1, num_bytes + len(example)
                        kinds[kind] = kinds.get(kind, 0) + 1
                        doubtful += [(item.name, doubt) for doubt in doubts(kind)]
                    tick()
            if len(unreadable) > shard.max_bad:
                raise _UnfinishedError
        record = Record(num_examples, num_bytes, dict(sorted(kinds.items())), unreadable, doubtful, True)
        write_text(shard.record, json.dumps(record._asdict()))
        return record
    except _UnfinishedError:
        return Record(unreadable=unreadable)
    except (OSError, RuntimeError) as error:
        advice = remedy(error, "free some space, then start the same command again")
        raise TrainingError(f"{shard.path} cannot be written ({error}): {advice}") from None


def _serialized(image: bytes, item: Item) -> bytes:
    """The example's bytes. By default, the order of a map in a protocol buffer is not specified."""
    example = {"image": image, "label": item.label, "file_name": os.fsencode(item.name)}
    return _serializer().get_tf_example(example).SerializeToString(deterministic=True)


@functools.lru_cache(maxsize=1)
def _serializer() -> Any:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import example_serializer

    features = features_of(tfds.features.ClassLabel(num_classes=1))  # class names are not part of an example
    return example_serializer.ExampleSerializer(features.get_serialized_info())


def features_of(label: Any, **image: Any) -> Any:
    """The features of a prepared data set, those of TFDS's ImageNet, as a `tfds.features.FeaturesDict`."""
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(
        {"image": tfds.features.Image(**image), "label": label, "file_name": tfds.features.Text()}
    )
