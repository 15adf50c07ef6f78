"""Data from Python: what is taken, what is refused in one line, and that a resumed run is given the same."""

import json
import threading

import numpy as np
import pytest
from PIL import Image
from support.configs import QUICK, make_digits

import marjax
from marjax import config as config_lib
from marjax.data.examples import Images
from marjax.data.pipeline import Batches
from marjax.data.preprocess import Preprocess
from marjax.data.python_source import fingerprint_of, python_source
from marjax.errors import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (30, 9, 8, 3), dtype=np.uint8)
LABELS = np.arange(30) % 4


class Torchlike:
    """As torchvision's data sets are: pairs of a Pillow image and an int, and names of classes."""

    classes = ("a", "b", "c", "d", "e")

    def __len__(self):
        return len(LABELS)

    def __getitem__(self, index):
        return Image.fromarray(IMAGES[index]), int(LABELS[index])


class Dicts(Torchlike):
    num_classes = 4

    def __getitem__(self, index):
        return {"image": IMAGES[index], "label": LABELS[index]}


class Augmented(Dicts):
    reads = 0

    def __getitem__(self, index):
        Augmented.reads += 1
        return {"image": IMAGES[index] ^ np.uint8(Augmented.reads % 251), "label": LABELS[index]}


@pytest.mark.parametrize(
    "data, num_classes",
    [
        ((IMAGES, LABELS), 4),
        ((list(IMAGES), LABELS.tolist()), 4),
        ({"image": IMAGES, "label": LABELS}, 4),
        (Torchlike(), 5),
        (Dicts(), 4),
        (list(zip(IMAGES, LABELS, strict=True)), 4),
    ],
)
def test_forms_of_the_same_data(data, num_classes):
    source = python_source(data)
    assert (len(source), source.num_classes) == (30, num_classes)
    assert all(np.array_equal(source[i]["image"], IMAGES[i]) and source[i]["label"] == LABELS[i] for i in range(30))
    assert fingerprint_of(source) == fingerprint_of(python_source((IMAGES, LABELS)))
    assert fingerprint_of(source) != fingerprint_of(python_source((IMAGES, LABELS[::-1])))


def test_sizes_and_grey_images():
    ragged = [IMAGES[0], IMAGES[1][:5], IMAGES[2][..., 0]]
    source = python_source((ragged, [0, 1, 2]))
    assert [source[i]["image"].shape for i in range(3)] == [(9, 8, 3), (5, 8, 3), (9, 8, 1)]
    assert python_source((IMAGES[..., 0], LABELS))[3]["image"].shape == (9, 8, 1)


def test_images_that_differ_at_every_reading_are_known_by_their_labels():
    assert fingerprint_of(python_source(Augmented())) == fingerprint_of(python_source(Augmented()))
    assert fingerprint_of(python_source(Augmented())) != fingerprint_of(python_source(Dicts()))


@pytest.mark.parametrize(
    "data, told",
    [
        ((IMAGES / 255.0, LABELS), "float64.*astype"),
        ((IMAGES.astype(int), LABELS), "int64"),
        ((IMAGES.transpose(0, 3, 1, 2), LABELS), "transpose"),
        ((IMAGES, LABELS[:7]), "30 images and 7 labels"),
        ((IMAGES, LABELS - 1), "label -1 of example 0"),
        ((IMAGES, LABELS / 2), "labels.*float64"),
        ((IMAGES, np.eye(30)), "labels.*float64"),
        (IMAGES, "without labels"),
        ((IMAGES[:0], LABELS[:0]), "empty"),
        ([], "empty"),
        ([1, 2], "data.0. is a int"),
        ("images", "a str"),
        (iter([1]), "__len__"),
        (([IMAGES[0], IMAGES[1] / 2], [0, 1]), "image 1"),
        ((3, [1]), "images"),
        ({"image": IMAGES}, "a dict"),
        ((IMAGES, [[0], [1, 2]]), "labels"),
    ],
)
def test_data_that_cannot_be_used(data, told):
    with pytest.raises(UserError, match=told) as caught:
        python_source(data)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "items, told",
    [
        ([IMAGES[0]], "data.0. is"),
        ([(IMAGES[0], 7)], "label of data.0. is 7"),
        ([(IMAGES[0], "cat")], "'cat'"),
        ([(IMAGES[0], 1), (None, 1)], "image of data.1. is None"),
    ],
)
def test_items_that_cannot_be_used(items, told):
    with pytest.raises(UserError, match=told):
        python_source(items, num_classes=4)


def own(**overrides):
    return make_digits(**QUICK | dict(data__num_classes=None, data__source="digits", train__steps=1) | overrides)


def test_a_run_on_data_from_python(tmp_path):
    config = own()
    marjax.train(config, tmp_path, data=(IMAGES, LABELS))
    written = json.loads((tmp_path / "config.json").read_text())["data"]
    assert (written["source"], written["num_classes"], written["num_examples"]) == ("python", 4, 30)
    config = config_lib.apply_overrides(config, {"train.steps": 2})
    assert int(marjax.train(config, tmp_path, data=Dicts()).step) == 2  # the same, in another form
    with pytest.raises(UserError, match="data.fingerprint"):
        marjax.train(config, tmp_path, data=(IMAGES[::-1], LABELS))
    with pytest.raises(UserError, match="'python'"):  # from the command line
        marjax.train(config_lib.apply_overrides(config, {"data.source": "python", "data.num_classes": 4}), tmp_path)
    with pytest.raises(UserError, match="config.data.cache"):
        marjax.train(own(data__cache="latents"), tmp_path, data=(IMAGES, LABELS))


def test_more_classes_than_the_config_has(tmp_path):
    with pytest.raises(UserError, match="config.data.num_classes"):
        marjax.train(own(data__num_classes=2), tmp_path / "run", data=(IMAGES, LABELS))
    assert not (tmp_path / "run").exists()


def test_slices_of_registered_data():
    marjax.register("source", "slices_of_registered", (IMAGES, LABELS))
    data = config_lib.data_config(own(data__source="slices_of_registered", data__split="train[10:12]"))
    batches = Batches(data, 2, seed=0, train=False)
    with batches:
        assert batches.num_examples == 2 and next(batches)["label"].tolist() == [2, 3]


def test_data_that_worker_processes_cannot_be_given():
    class Locked(Dicts):
        def __init__(self):
            self.lock = threading.Lock()

    data = config_lib.data_config(own(data__workers=1))
    examples = Images(python_source(Locked()), Preprocess(8, 1, False))
    with Batches(data, 2, seed=0, examples=examples) as batches, pytest.raises(UserError, match="data.workers"):
        next(batches)
