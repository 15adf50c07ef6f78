"""Sources from Python data: arrays and labels, or any object with `__len__` and `__getitem__`."""

import hashlib
import operator
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from marjax import registry
from marjax.data.config import DataConfig
from marjax.data.source import (
    MAX_CLASSES,
    PYTHON,
    ArraySource,
    Element,
    Source,
    class_names_of,
    fingerprint,
    sampled_indices,
    slice_of,
)
from marjax.errors import UserError
from marjax.ranges import shown

_FORMS = (
    "give (images, labels), with images uint8 (N, H, W, C) or a list of uint8 (H, W, C), or an object with "
    "__len__ and __getitem__ whose items are (image, label) or {'image': image, 'label': label}"
)


def python_source(data: Any, num_classes: int | None = None, name: str = "data") -> Source:
    """Makes a source of a user's data.

    Args:
      data: (images, labels) or {"image": images, "label": labels}, with images uint8 (N, H, W, C) or (N, H, W) or a
        sequence of uint8 (H, W, C) or (H, W) of any sizes; or an object with `__len__` and `__getitem__(i)` that gives
        (image, label) or {"image": image, "label": label}. An image may be anything that `np.asarray` converts to such
        an array, such as a Pillow image. C is 1, 3 or 4.
      num_classes: labels are in [0, num_classes); by default `data.num_classes`, `len(data.classes)`, or the largest
        label plus one if the labels or the examples are a sequence.
      name: of the data, for errors.

    Raises:
      UserError: anything else, as far as it can be detected without reading every example of an object.
    """
    if isinstance(data, Mapping) and {"image", "label"} <= set(data):
        data = data["image"], data["label"]
    if isinstance(data, tuple) and len(data) == 2:
        return _of_arrays(*data, num_classes, name)
    if isinstance(data, Mapping | str | bytes) or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise UserError(f"{name} is {_kind(data)}; {_FORMS}")
    if isinstance(data, np.ndarray) and data.dtype != object:
        raise UserError(f"{name} is {_kind(data)}, images without labels; give ({name}, labels)")
    if not len(data):
        raise UserError(f"{name} is empty; give at least one example")
    if num_classes is None:
        num_classes = getattr(data, "num_classes", None)
    if num_classes is None and hasattr(data, "classes"):
        num_classes = len(data.classes)
    if num_classes is None and isinstance(data, list | tuple):  # in memory, so that all labels can be read
        most = max(ItemSource(data, MAX_CLASSES, name)[index]["label"] for index in range(len(data)))
        num_classes = most + 1
    if num_classes is None:
        raise UserError(
            f"{name} has an unknown number of classes; set config.data.num_classes, or its attribute num_classes"
        )
    source = ItemSource(data, _checked_num_classes(num_classes, name), name)
    source[0], source[len(source) - 1]  # a mistake usually affects all examples
    return source


def open_registered(thing: Any, data: DataConfig) -> Source:
    """Opens the registered source `data.source`: a data set, or a function of `data` that returns one.

    Raises:
      UserError: see `python_source`; for a data set, also a split other than "train", "all" or a slice of them.
    """
    name = f"data.source={data.source!r}"
    if isinstance(thing, type) or (callable(thing) and not hasattr(thing, "__getitem__")):
        return python_source(thing(data), data.num_classes, name)
    source = python_source(thing, data.num_classes, name)
    chosen = slice_of(data.split, name, len(source))
    return source if chosen == slice(0, len(source)) else Part(source, chosen)


def is_registered(source: str) -> bool:
    """Whether `data.source` is a registered source."""
    return registry.find("source", source.partition(":")[0]) is not None


def data_fields(source: Source) -> dict[str, Any]:
    """The fields of `config.data` that follow from data from Python."""
    return {
        "source": PYTHON,
        "split": "train",
        "num_classes": source.num_classes,
        "num_examples": len(source),
        "fingerprint": fingerprint_of(source),
    }


class Part:
    """A slice of a source."""

    def __init__(self, source: Source, chosen: slice) -> None:
        self.num_classes, self.class_names = source.num_classes, class_names_of(source)
        self._source, self._indices = source, range(len(source))[chosen]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int, /) -> Element:
        return self._source[self._indices[index]]

    def stored(self, index: int) -> bytes:
        """See `Source`."""
        return self._source.stored(self._indices[index])


class ItemSource:
    """The examples of an object, checked when they are read."""

    def __init__(self, items: Any, num_classes: int, name: str) -> None:
        self.num_classes, self.class_names = num_classes, _class_names(items)
        self._items, self._name = items, name

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int, /) -> Element:
        item = self._items[index]
        if isinstance(item, Mapping) and {"image", "label"} <= set(item):
            image, label = item["image"], item["label"]
        elif isinstance(item, tuple | list) and len(item) == 2:
            image, label = item
        else:
            raise UserError(
                f"{self._name}[{index}] is {_kind(item)}, expected (image, label) or {{'image': image, 'label': label}}"
            )
        return {
            "image": _checked_image(image, f"the image of {self._name}[{index}]"),
            "label": _checked_label(label, self.num_classes, f"the label of {self._name}[{index}]"),
        }

    def stored(self, index: int) -> bytes:
        """The example's pixels and label; see `Source`."""
        element = self[index]
        return element["image"].tobytes() + str(element["label"]).encode()


def fingerprint_of(source: Source) -> str:
    """A checksum of the data; of their labels only if reading an image twice gives different pixels (augmentation)."""
    if source.stored(0) == source.stored(0):
        return fingerprint(source)
    made = hashlib.sha256(f"{len(source)} augmented examples".encode())
    for index in sampled_indices(source):
        made.update(f"{source[index]['label']},".encode())
    return made.hexdigest()


def _class_names(items: Any) -> Sequence[str]:
    """Class names of an object: its `class_names`, or its `classes` as in torchvision."""
    for given in (getattr(items, "class_names", None), getattr(items, "classes", None)):
        if isinstance(given, list | tuple) and all(isinstance(each, str) for each in given):
            return given
    return ()


def _of_arrays(images: Any, labels: Any, num_classes: int | None, name: str) -> Source:
    checked = _checked_labels(labels, num_classes, name)
    if num_classes is None:
        num_classes = int(checked.max()) + 1
    num_classes = _checked_num_classes(num_classes, name)
    if num_classes > (last := int(checked.max())) + 1:
        print(
            f"{name} has labels up to {last}, but config.data.num_classes is {num_classes}; None derives it",
            file=sys.stderr,
        )
    if not (hasattr(images, "__len__") and hasattr(images, "__getitem__")) or isinstance(images, str | bytes | Mapping):
        raise UserError(f"the images of {name} are {_kind(images)}; {_FORMS}")
    if len(images) != len(checked):
        raise UserError(f"{name} has {len(images)} images and {len(checked)} labels; give one label per image")
    if isinstance(images, list | tuple) or getattr(getattr(images, "dtype", None), "kind", "") == "O":
        listed = [_checked_image(image, f"image {index} of {name}") for index, image in enumerate(images)]
        return ItemSource(list(zip(listed, checked.tolist(), strict=True)), num_classes, name)
    array = np.asarray(images)
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4:
        raise UserError(f"the images of {name} are {_kind(array)}, expected uint8 (N, H, W, C) or (N, H, W)")
    _checked_image(array[0], f"image 0 of {name}")
    return ArraySource(array, checked, num_classes)


def _checked_labels(labels: Any, num_classes: int | None, name: str) -> np.ndarray:
    try:
        array = np.asarray(labels)
    except (ValueError, TypeError):
        array = np.asarray(None)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        found = _kind(array) if array.ndim else _kind(labels)
        raise UserError(f"the labels of {name} are {found}, expected integers (N,), the number of each image's class")
    if not len(array):
        raise UserError(f"{name} is empty; give at least one example")
    most = MAX_CLASSES if num_classes is None else num_classes
    wrong = np.flatnonzero((array < 0) | (array >= most))
    if len(wrong):
        raise UserError(
            f"label {array[wrong[0]]} of example {wrong[0]} of {name} is out of range, expected 0 to "
            f"{most - 1}" + ("" if num_classes is None else ", or another config.data.num_classes")
        )
    return array.astype(np.int64)


def _checked_num_classes(num_classes: Any, name: str) -> int:
    try:
        number = operator.index(num_classes)
    except TypeError:
        number = 0
    if not 1 <= number <= MAX_CLASSES:
        raise UserError(f"{name} has num_classes {shown(num_classes)}, expected an integer from 1 to {MAX_CLASSES}")
    return number


def _checked_image(image: Any, where: str) -> np.ndarray:
    try:
        array = np.asarray(image)
    except Exception:
        array = np.asarray(None)
    if array.dtype.kind == "f" and array.ndim in (2, 3):
        raise UserError(
            f"{where} is {_kind(array)}, expected uint8 from 0 to 255; for floats in [0, 1], give "
            f"(255 * image).round().astype('uint8')"
        )
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4) and array.shape[0] in (1, 3):
        raise UserError(f"{where} is {_kind(array)}, expected channels last, (H, W, C); give image.transpose(1, 2, 0)")
    if array.ndim == 2:
        array = array[..., None]
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        found = _kind(array) if array.dtype != object else _kind(image)
        raise UserError(f"{where} is {found}, expected uint8 (H, W, C) with C of 1, 3 or 4, or (H, W)")
    return array


def _checked_label(label: Any, num_classes: int, where: str) -> int:
    try:
        number = operator.index(label)  # also NumPy and PyTorch integers
    except TypeError:
        raise UserError(f"{where} is {shown(label)}, expected an integer in [0, {num_classes})") from None
    if not 0 <= number < num_classes:
        raise UserError(f"{where} is {number}, expected an integer in [0, {num_classes}); set config.data.num_classes")
    return number


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape}"
    return "None" if value is None else f"a {type(value).__name__}"
