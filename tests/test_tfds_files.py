"""Data sets of others: nothing that their files name is imported, and what they claim is compared with their files."""

import json
import os
import pathlib
import shutil
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from support.paths import ROOT
from support.tfds_files import as_file, data_config, picture, write_tfds

from marjax import cli
from marjax.data import tfds_files
from marjax.data.sources import open_source
from marjax.errors import UserError

OWN = "tensorflow_datasets.core.features."
EVIL = "evil_features.Evil"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sound")
    features = {
        "image": tfds.features.Image(),
        "label": tfds.features.ClassLabel(num_classes=5),
        "more": {
            "boxes": tfds.features.Sequence({"box": tfds.features.BBoxFeature()}),
            "text": tfds.features.Text(),
            "number": tfds.features.Scalar(np.int64),
        },
    }
    more = {"boxes": [], "text": "x", "number": 3}
    examples = [{"image": as_file(picture(i)), "label": i, "more": more} for i in range(5)]
    write_tfds(directory, "plain", examples, features)
    return directory


@pytest.fixture
def folder(sound, tmp_path, monkeypatch):
    """The folder of a version, beside a module that leaves a file when it is imported."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "evil_features.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path / "path")
    shutil.copytree(sound, tmp_path / "data")
    return tmp_path / "data" / "plain" / "1.0.0"


def opened(folder, source="plain", **changes):
    return open_source(
        data_config(
            source=f"tfds:{source}", data_dir=str(folder.parent.parent), channels=3, num_classes=None, **changes
        )
    )


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def image_of(features):
    return features["featuresDict"]["features"]["image"]


def more_of(features):
    return features["featuresDict"]["features"]["more"]["featuresDict"]["features"]


FEATURES = {
    "a class of its own": lambda f: image_of(f).update(pythonClassName=EVIL),
    "in snake case": lambda f: (image_of(f).pop("pythonClassName"), image_of(f).update(python_class_name=EVIL)),
    "the whole": lambda f: f.update(pythonClassName=EVIL),
    "in a dictionary": lambda f: more_of(f)["text"].update(pythonClassName=EVIL),
    "in a sequence": lambda f: more_of(f)["boxes"]["sequence"]["feature"].update(pythonClassName=EVIL),
    "in text": lambda f: f["featuresDict"]["features"].update(
        more={
            "pythonClassName": OWN + "features_dict.FeaturesDict",
            "jsonFeature": {"json": json.dumps({"x": {"type": EVIL, "content": {}}})},
        }
    ),
    "of an old TFDS": lambda f: (
        f.clear(),
        f.update(type=OWN + "features_dict.FeaturesDict", content={"image": {"type": EVIL, "content": {}}}),
    ),
    "a module of TFDS": lambda f: image_of(f).update(pythonClassName="tensorflow_datasets.scripts.cli.main.X"),
    "which starts programs": lambda f: image_of(f).update(pythonClassName=OWN + "video_feature.Video"),
    "compressed": lambda f: more_of(f)["number"]["tensor"].update(encoding="zlib"),
    "an unknown dtype": lambda f: image_of(f)["image"].update(dtype="float99"),
    "no class": lambda f: image_of(f).pop("pythonClassName"),
    "a list": lambda f: image_of(f).update(pythonClassName=[EVIL]),
    "another content": lambda f: image_of(f).pop("image"),
}


@pytest.mark.parametrize("how", FEATURES)
def test_only_own_features_are_accepted(folder, how):
    assert len(opened(folder)) == 5
    edit(folder / "features.json", FEATURES[how])
    with pytest.raises(UserError, match=r"features\.json") as caught:
        opened(folder)
    assert "\n" not in str(caught.value) and "evil_features" not in sys.modules
    assert not (folder.parents[2] / "ran").exists()


def split_of(**fields):
    return lambda info: info["splits"][0].update(fields)


INFO = {
    "features": lambda i: i.update(features={"pythonClassName": EVIL, "text": {}}),
    "TFDS would import": lambda i: i.update(
        features={
            "pythonClassName": OWN + "features_dict.FeaturesDict",
            "featuresDict": {"features": {"x": {"pythonClassName": EVIL, "text": {}}}},
        }
    ),
    "name": lambda i: i.update(name="../other/plain"),
    "name is '/": lambda i: i.update(name="/etc/plain"),
    "split name": split_of(name="../train"),
    "split name '/": split_of(name="/train"),
    "filepathTemplate": split_of(filepathTemplate="../{SPLIT}-{SHARD_INDEX}"),
    "filepathTemplate '/": split_of(filepathTemplate="/etc/passwd"),
    "filepathTemplate '{SPLIT:": split_of(filepathTemplate="{SPLIT:>9999999999}"),
    "filepathTemplate '{SPLIT.": split_of(filepathTemplate="{SPLIT.__class__}"),
    "filepathTemplate 'x": split_of(filepathTemplate="x" * 5000),
    "fileFormat": lambda i: i.update(fileFormat="../array_record"),
    "hold 1000000000000 examples": split_of(shardLengths=["1000000000000"]),
    "hold -5 examples": split_of(shardLengths=["-5"]),
    "hold 6 examples": split_of(shardLengths=["6"]),
    "is missing": split_of(shardLengths=["1"] * 9),
    "dataset_info.json": lambda i: i.update(splits={"x": 1}),
    "is not what TFDS writes": lambda i: i.update(version=[1]),
}


@pytest.mark.parametrize("says", INFO)
def test_what_a_data_set_says_of_itself_stays_in_its_folder(folder, says):
    edit(folder / "dataset_info.json", INFO[says])
    if says == "hold 6 examples":  # where it is not evident from the size
        shard = folder / "plain-train.array_record-00000-of-00001"
        os.truncate(shard, 6 * tfds_files._FEW_BYTES - 1)
    with pytest.raises(UserError, match=says.split(" '")[0]) as caught:
        opened(folder)
    assert "\n" not in str(caught.value) and ("dataset_info.json" in str(caught.value) or says == "is missing")
    assert "evil_features" not in sys.modules and not (folder.parents[2] / "ran").exists()


def test_modules_of_a_data_set_are_not_imported(folder):
    named = dict(moduleName="evil_features", location={"urls": ["evil_features"]})
    edit(folder / "dataset_info.json", lambda i: i.update(named))
    for place in (folder, folder.parent, folder.parents[1]):
        for name in ("plain.py", "plain_dataset_builder.py", "dataset_builder.py", "__init__.py"):
            (place / name).write_text(f"open({str(folder.parents[2] / 'ran')!r}, 'w')")
    assert len(opened(folder)) == 5
    assert "evil_features" not in sys.modules and not (folder.parents[2] / "ran").exists()


@pytest.mark.parametrize(
    "name", ["features.json", "dataset_info.json", "label.labels.txt", "plain-train.array_record-00000-of-00001"]
)
def test_pipes_and_devices_are_not_waited_for(folder, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match=name):
        opened(folder)
    (folder / name).unlink()
    os.symlink("/dev/zero", folder / name)
    with pytest.raises(UserError, match=name):
        opened(folder)


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 100_000, '{"a": 1, "a": 2}', "{", "\ud800", '{"x": 1e999}'])
def test_metadata_of_any_shape(folder, text):
    for name in ("features.json", "dataset_info.json"):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(UserError, match=name) as caught:
            opened(folder)
        assert "\n" not in str(caught.value)
        (folder / name).write_bytes(before)
    assert len(opened(folder)) == 5


@pytest.mark.parametrize(
    "source",
    [
        "kaggle:plain",
        "huggingface:mnist",
        "../plain",
        "plain/..",
        "plain/.",
        "plain:..",
        "plain/1/a=b",
        "plain:1.0",
        "pläin",
        "plain\n",
        "",
        "/plain",
    ],
)
def test_names_that_lead_elsewhere(folder, source):
    with pytest.raises(UserError, match="data.source"):
        opened(folder, source)


def test_versions_and_configs_are_found(folder):
    data = folder.parent.parent
    shutil.copytree(folder, data / "plain" / "1.10.0")
    edit(data / "plain" / "1.10.0" / "dataset_info.json", lambda i: i.update(version="1.10.0"))
    shutil.copytree(data / "plain" / "1.0.0", data / "other" / "small" / "1.0.0")
    for name, config, version, found in [
        ("plain", None, None, "plain/1.10.0"),
        ("plain", None, "1.0.0", "plain/1.0.0"),
        ("plain", None, "1.*.*", "plain/1.10.0"),
        ("plain", None, "2.*.*", None),
        ("other", None, None, None),
        ("other", "small", None, "other/small/1.0.0"),
        ("none", None, None, None),
    ]:
        expected = None if found is None else str(data / found)
        assert tfds_files.find(str(data), name, config, version) == expected
    (data / "other" / ".config").mkdir()
    metadata = data / "other" / ".config" / "metadata.json"
    metadata.write_text('{"default_config_name": "small"}')
    assert pathlib.Path(tfds_files.find(str(data), "other", None, None)) == data / "other" / "small" / "1.0.0"
    metadata.write_text('{"default_config_name": "../plain"}')
    assert tfds_files.find(str(data), "other", None, None) is None
    assert len(opened(folder, "plain:1.0.*")) == 5


def test_a_data_set_that_tfds_knows_is_checked_too(folder):
    version = str(tfds.builder_cls("mnist").VERSION)
    mnist = folder.parent.parent / "mnist" / version
    shutil.copytree(folder, mnist)
    edit(mnist / "features.json", FEATURES["a class of its own"])
    for source in ("mnist", f"mnist:{version}", "Mnist", "mnist:*.*.*"):
        with pytest.raises(UserError, match="evil_features"):
            opened(folder, source)
    assert "evil_features" not in sys.modules


def test_numbers_of_classes_are_bounded(folder):
    edit(
        folder / "features.json",
        lambda f: f["featuresDict"]["features"]["label"]["classLabel"].update(numClasses="1000000000000"),
    )
    (folder / "label.labels.txt").unlink(missing_ok=True)
    with pytest.raises(UserError, match="1000000000000 classes"):
        opened(folder)


@pytest.mark.parametrize(
    "command",
    [
        "train --workdir {out}",
        "train-tokenizer --workdir {out}",
        "stats --out {out}.npz",
        "cache-latents --out {out}",
        "train-classifier --out {out}.npz",
    ],
)
def test_every_command_that_opens_data_checks_it(folder, command, capsys):
    edit(folder / "features.json", FEATURES["a class of its own"])
    out = folder.parents[2] / "out"
    name, *more = command.format(out=out).split()
    assert (
        cli.main(
            [
                name,
                "--config",
                f"{ROOT / 'configs' / 'folder.py'}:name=plain,debug",
                *more,
                f"--config.data.data_dir={folder.parent.parent}",
            ]
        )
        == 2
    )
    told = capsys.readouterr().err
    assert "features.json" in told and told.count("\n") == 1
    assert not (folder.parents[2] / "ran").exists() and not list(folder.parents[2].glob("out*"))
