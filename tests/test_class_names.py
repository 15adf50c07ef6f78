"""Names of classes: from the data set to the work directory, and from the command line to the samples."""

import json

import jax
import numpy as np
import pytest
from PIL import Image
from support.configs import QUICK, make_digits

from marjax import class_names, sample, train
from marjax.cli import main
from marjax.commands.arguments import parse_labels
from marjax.config import base, data_config
from marjax.data import source, sources
from marjax.data.latent_cache.read import Manifest
from marjax.data.python_source import Part, python_source
from marjax.errors import UserError

NAMES = ("flower", "Temple", "cat, tabby", "7", None, "FLOWER", "Ж", "t-shirt", "0-3", "x")


@pytest.mark.parametrize(
    "text, classes",
    [
        ("Temple", [1]),
        ("temple", [1]),
        ("flower", [0]),
        ("FLOWER", [5]),
        (" x , 2", [9, 2]),
        ("7", [7]),
        ("'7'", [3]),
        ('"x",0', [9, 0]),
        ("cat, tabby", [2]),
        ("x,cat, tabby,ж", [9, 2, 6]),
        ("t-shirt,1-3", [7, 1, 2, 3]),
        ("0-3", [8]),
        ("none,1", [-1, 1]),
        ("[1, 2]", [1, 2]),
        ("4", [4]),
    ],
)
def test_labels_by_name(text, classes):
    assert parse_labels(text, NAMES, 10) == classes


def test_a_number_that_no_class_has_may_be_a_name():
    assert parse_labels("1999", ("1998", "1999"), 2) == [1]
    assert parse_labels("12", ("1998", "1999"), 2) == [12]  # refused with the range, by sampling


@pytest.mark.parametrize(
    "text, says",
    [("tempel", "'Temple'"), ("Flower", "'flower'|'FLOWER'"), ("zzzzzzz", "'zzzzzzz'"), ("x,", "''"), ("3-1", "3-1")],
)
def test_unknown_names(text, says):
    with pytest.raises(UserError, match=says) as error:
        parse_labels(text, NAMES, 10)
    assert "\n" not in str(error.value)


def test_names_that_cannot_be_used_are_left_out():
    assert class_names.usable(["a", "b", "b", "c\n", "", "x" * 500, 7]) == ("a", None, None, None, None, None, "7")
    assert class_names.usable(["0", "1"]) == class_names.usable(None) == class_names.usable([]) == ()


def test_a_source_names_its_classes(monkeypatch):
    data = data_config(base())
    assert sources.open_source(data).class_names == tuple("0123456789")
    assert source.class_names_of(sources.open_source(data)) == ()  # no more than the numbers

    class Own:
        num_classes = 2

    assert source.class_names_of(Own()) == ()
    Own.class_names = ["cat", "dog", "more than there are"]
    assert source.class_names_of(Own()) == ("cat", "dog")


def test_data_from_python_name_their_classes():
    class Pictures:
        classes = ("cat", "dog")

        def __len__(self):
            return 4

        def __getitem__(self, index):
            return np.zeros((8, 8, 3), np.uint8), index % 2

    whole = python_source(Pictures())
    assert source.class_names_of(whole) == source.class_names_of(Part(whole, slice(1, 3))) == ("cat", "dog")
    Pictures.classes = range(2)
    assert source.class_names_of(python_source(Pictures())) == ()


@pytest.mark.parametrize(
    "content",
    [
        {"names": ["a", "a"]},
        {"names": ["a\nb"]},
        {"names": ["x" * 201]},
        {"names": [1]},
        {"names": {}},
        {},
        [],
        {"names": list("abcdefghijk")},
        {"names": ["\x1b[2J"]},
        {"names": [""]},
    ],
)
def test_a_foreign_file_is_checked(tmp_path, content):
    (tmp_path / class_names.FILE).write_text(json.dumps(content))
    with pytest.raises(UserError, match=class_names.FILE) as error:
        class_names.read(tmp_path, 10)
    assert str(error.value).isprintable()


def test_what_is_written_is_read(tmp_path):
    assert class_names.read(tmp_path, 10) == ()
    class_names.write(tmp_path, ())
    assert not list(tmp_path.iterdir())
    class_names.write(tmp_path, NAMES)
    assert class_names.read(tmp_path, 10) == NAMES


def test_a_latent_cache_keeps_them():
    manifest = Manifest(
        "c", "s", "train", "f", 8, 1, "center", 5, 10, True, (2, 3), "bfloat16", "float32", 2, class_names=NAMES
    )
    assert Manifest.from_json(manifest.to_json()).class_names == NAMES
    older = json.loads(manifest.to_json())
    del older["class_names"]
    found = Manifest.from_json(json.dumps(older))
    assert found.class_names == () and found == manifest and not found.differences(manifest)
    older["class_names"] = ["a", "b\n"] + ["x"] * 20
    assert Manifest.from_json(json.dumps(older)).class_names == ("a", *[None] * 9)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps on digits, some of which have names."""
    names = ("flower", "temple", *"23456789")
    workdir = tmp_path_factory.mktemp("names") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_DIGITS", names)
        train(make_digits(train__steps=2, sample__num_sampling_steps="ddim5", **QUICK), workdir)
    assert class_names.read(workdir, 10) == names
    return workdir


def test_a_single_label_and_names_in_python(run):
    for labels in (
        1,
        np.int64(1),
        np.array(1),
        jax.numpy.asarray(1),
        "temple",
        "1",
        [1],
        ["Temple"],
        ("temple",),
        np.array(["temple"]),
        np.array(["temple"], object),
    ):
        assert np.asarray(class_names.classes_of(labels, run, 10)).tolist() == [1]
    assert class_names.classes_of(["temple", 0, "none"], run, 10) == [1, 0, -1]
    image = sample(run, "temple")
    assert image.shape == (1, 8, 8, 1)
    np.testing.assert_array_equal(sample(run, np.int64(1)), image)
    for wrong in ("tempel", ["flower", "tempel"]):
        with pytest.raises(UserError, match="'temple'"):
            sample(run, wrong)


def test_the_command_says_and_stores_which_class_is_which(run, tmp_path, capsys):
    arguments = ["sample", "--workdir", str(run), "--num_per_label", "2"]
    assert main([*arguments, "--labels", "temple,0,9", "--out", str(tmp_path / "out")]) == 0
    assert "1 temple; 0 flower; 9 9" in capsys.readouterr().out
    saved = np.load(tmp_path / "out" / "samples.npz")
    assert saved["labels"].tolist() == [1, 1, 0, 0, 9, 9] and saved["class_names"][saved["labels"][0]] == "temple"
    picture = np.asarray(Image.open(tmp_path / "out" / "grid.png"))
    assert picture.shape[0] > 3 * 34 and picture.shape[1] > 2 * 34  # a caption below, labels at the left
    assert main([*arguments, "--labels", "tempel", "--out", str(tmp_path / "none")]) == 2
    assert "'temple'" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_a_file_takes_the_picture_or_the_samples(run, tmp_path, capsys):
    arguments = ["sample", "--workdir", str(run), "--labels", "0", "--out"]
    assert main([*arguments, str(tmp_path / "a" / "x.png")]) == 0
    assert main([*arguments, str(tmp_path / "a" / "y.npz")]) == 0
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["x.png", "y.npz"]
    assert np.load(tmp_path / "a" / "y.npz")["images"].shape == (1, 8, 8, 1)
    (tmp_path / "folder.png").mkdir()
    assert main([*arguments, str(tmp_path / "folder.png")]) == 0 and (tmp_path / "folder.png" / "grid.png").exists()
    assert main([*arguments, str(tmp_path / "b" / "x.png"), "--cfg", "-1"]) == 2
    assert not (tmp_path / "b").exists()
