"""Finds the files of a prepared TFDS data set, and checks them before TFDS reads them.

TFDS imports the module of every class that `features.json` or `dataset_info.json` names, and reads any file that their
names and templates lead to. Here nothing is imported: a data set is refused unless its features are TFDS's own and its
shards are files of the folder, large enough for their number of examples.
"""

import os
import re
from collections.abc import Iterator
from typing import Any

from marjax.data.records import num_records, remedy
from marjax.errors import UserError, first_line, shortened
from marjax.json_file import MAX_BYTES, read_json

INFO, FEATURES = "dataset_info.json", "features.json"
FORMAT = "array_record"  # the only one that is read

_OWN = "tensorflow_datasets.core.features."
_NAMES = (
    "features_dict.FeaturesDict sequence_feature.Sequence image_feature.Image class_label_feature.ClassLabel "
    "text_feature.Text scalar.Scalar tensor_feature.Tensor feature.Tensor bounding_boxes.BBoxFeature"
)
CLASSES = frozenset(_OWN + name for name in _NAMES.split())
_NAME = re.compile(r"(?P<name>[a-zA-Z]\w*)(/(?P<config>\w[\w.+-]*))?(:(?P<version>(\d+|\*)(\.(\d+|\*)){2}))?", re.ASCII)
_PART = re.compile(r"\w[\w.+-]{0,99}", re.ASCII)  # of a file's name
_TEMPLATE = re.compile(r"(\w|[.+-]|\{(DATASET|SPLIT|FILEFORMAT|SHARD_INDEX|NUM_SHARDS|SHARD_X_OF_Y)\})+", re.ASCII)
_DTYPE = re.compile(r"bool|string|u?int(8|16|32|64)|float(16|32|64)")
_VERSION = re.compile(r"\d+\.\d+\.\d+", re.ASCII)
_AGAIN = "prepare the data set again"
_FEW_BYTES = 64  # an example with an image and a label is rarely smaller


def parse_name(source: str) -> tuple[str, str | None, str | None]:
    """NAME, CONFIG and VERSION of `tfds:NAME[/CONFIG][:VERSION]`. Raises UserError: it is malformed."""
    match = _NAME.fullmatch(source.removeprefix("tfds:"))
    if not match:
        raise UserError(
            f"data.source={source!r} is malformed, expected 'tfds:NAME[/CONFIG][:VERSION]' with a version "
            f"such as 1.0.0 or 1.*.*"
        )
    return match["name"], match["config"], match["version"]


def find(root: str, name: str, config: str | None, version: str | None) -> str | None:
    """The folder of the newest version of a data set that is prepared below `root`, None if there is none.

    Args:
      root: the folder for data sets.
      name, config: of the data set; the config defaults to that of the data set's metadata, if any.
      version: such as "1.0.0" or "1.*.*"; None for any.

    Raises:
      UserError: the metadata cannot be read.
    """
    folder = os.path.join(root, name)
    default = os.path.join(folder, ".config", "metadata.json")
    if config is None and os.path.exists(default):
        given = read_json(default, {"default_config_name?": object}, advice=_AGAIN).get("default_config_name")
        config = given if isinstance(given, str) and _PART.fullmatch(given) else None
    place = os.path.join(folder, config or "")
    try:
        versions = [entry for entry in os.listdir(place) if _VERSION.fullmatch(entry)]
    except OSError:
        return None
    if version is not None:
        pattern = version.replace(".", r"\.").replace("*", r"\d+")
        versions = [entry for entry in versions if re.fullmatch(pattern, entry)]
    for entry in sorted(versions, key=lambda entry: [int(part) for part in entry.split(".")], reverse=True):
        if any(os.path.lexists(os.path.join(place, entry, file)) for file in (INFO, FEATURES)):
            return os.path.join(place, entry)
    return None


def check(folder: str) -> None:
    """Checks the files that TFDS reads in the folder of a data set's version.

    Raises:
      UserError: a class that is not TFDS's own, a name that leads out of the folder, a file that is not a regular file,
        more examples than a shard can hold, or metadata that cannot be read.
    """
    from tensorflow_datasets.core.proto import dataset_info_pb2, feature_pb2

    for entry in _entries(folder):
        if entry.name.endswith((".json", ".txt")) and not entry.is_dir():
            _check_plain(entry.path, MAX_BYTES)
    path = os.path.join(folder, FEATURES)
    if os.path.lexists(path):
        _check_features(path, _proto(path, feature_pb2.Feature()))
    path = os.path.join(folder, INFO)
    info = _proto(path, dataset_info_pb2.DatasetInfo())
    if info.HasField("features"):
        _check_features(path, info.features)
    for field, name in (("name", info.name), ("fileFormat", info.file_format)):
        if not _PART.fullmatch(name) and (name or field == "name"):
            raise UserError(f"{path}: {field} is {name[:80]!r}, expected letters, digits and _; {_AGAIN}")
    for split in info.splits:
        _check_split(folder, path, info, split)


def _check_features(path: str, feature: Any) -> None:
    """Raises UserError: the class of a feature, or of one inside it, is not in CLASSES."""
    if feature.python_class_name != _OWN + "features_dict.FeaturesDict":
        _check_class(path, feature.python_class_name)
        raise UserError(f"{path} does not describe examples with named features; {_AGAIN}")
    for inner in _features(feature):
        _check_class(path, inner.python_class_name)
        name = inner.python_class_name.rsplit(".")[-1]
        content = inner.WhichOneof("content")
        if content in (None, "json_feature"):
            raise UserError(f"{path}: the description of a {name} is not one of TFDS's features; {_AGAIN}")
        if content in ("tensor", "image") and not _DTYPE.fullmatch(dtype := getattr(inner, content).dtype):
            raise UserError(f"{path}: a {name} has the dtype {dtype[:80]!r}, which is not a NumPy dtype; {_AGAIN}")
        if inner.tensor.encoding == "zlib":  # a few bytes may decompress to any number
            raise UserError(f"{path}: a {name} is compressed, expected uncompressed tensors; {_AGAIN}")


def _features(feature: Any) -> Iterator[Any]:
    yield feature
    for inner in feature.features_dict.features.values():
        yield from _features(inner)
    if feature.sequence.HasField("feature"):
        yield from _features(feature.sequence.feature)


def _check_class(path: str, name: str) -> None:
    if name not in CLASSES:
        raise UserError(
            f"{path}: TFDS would import and run the feature class {name[:200]!r}, expected one of its own "
            f"(Image, ClassLabel, Text, scalars and tensors); prepare the data set with these"
        )


def _check_split(folder: str, path: str, info: Any, split: Any) -> None:
    if not _PART.fullmatch(split.name):
        raise UserError(f"{path}: the split name {split.name[:80]!r} cannot be part of a file's name; {_AGAIN}")
    template = split.filepath_template or "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    if not _TEMPLATE.fullmatch(template) or template.startswith(".") or len(template) > 200:
        raise UserError(
            f"{path}: filepathTemplate {template[:80]!r} of split {split.name} does not name files of this "
            f"folder; {_AGAIN}"
        )
    if FORMAT not in (info.file_format, *info.alternative_file_formats):
        return  # its shards are not read
    count = len(split.shard_lengths)
    for index, length in enumerate(split.shard_lengths):
        name = template.format(
            DATASET=info.name,
            SPLIT=split.name,
            FILEFORMAT=FORMAT,
            SHARD_INDEX=f"{index:05d}",
            NUM_SHARDS=f"{count:05d}",
            SHARD_X_OF_Y=f"{index:05d}-of-{count:05d}",
        )
        shard = os.path.join(folder, name)
        if length:
            size = _check_plain(shard)
            try:
                differs = length < 0 or (length * _FEW_BYTES > size and length != num_records(shard))
            except OSError as error:
                raise UserError(f"{error}; {remedy(error, _AGAIN)}") from None
            if differs:
                raise UserError(f"{path}: {name} should hold {length} examples, but its {size} bytes do not; {_AGAIN}")


def _check_plain(path: str, most: int | None = None) -> int:
    """The size of a file. Raises UserError: it is missing, a pipe or a device, or has more than `most` bytes."""
    if not os.path.isfile(path):
        problem = "is not a regular file" if os.path.lexists(path) else "is missing"
        raise UserError(f"{path} {problem}; {_AGAIN}")
    size = os.path.getsize(path)
    if most is not None and size > most:
        raise UserError(f"{path} has {size} bytes, expected at most {most}; {_AGAIN}")
    return size


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}): make it readable") from None


def _proto(path: str, message: Any) -> Any:
    """The content of a file as a protocol buffer, parsed as in TFDS."""
    from google.protobuf import json_format

    content = read_json(path, dict, advice=_AGAIN)
    try:
        return json_format.ParseDict(content, message)
    except Exception as error:  # of several kinds, RecursionError among them
        raise UserError(f"{path} is not what TFDS writes ({shortened(first_line(error), 200)}); {_AGAIN}") from None
