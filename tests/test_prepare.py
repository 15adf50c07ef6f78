"""From files to a data set that marjax and plain TFDS read, whatever interrupts the way."""

import collections
import contextlib
import errno
import io
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from support.paths import ROOT
from support.pictures import as_file, decoded, exif

import marjax
from marjax import cli, lock
from marjax import config as config_lib
from marjax.data.prepare.pictures import storable
from marjax.data.prepare.prepare import SIZES, prepare
from marjax.data.sources import open_source
from marjax.errors import UserError
from marjax.workdir import read_workdir

FOLDER = ROOT / "configs" / "folder.py"
CLASSES = ["Cats", "cats", "dogs and wolves", "été"]  # sorted as strings


def picture(seed, mode="RGB"):
    side = 5 + seed % 37
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, 41 - side // 2, 3), dtype=np.uint8))
    return image.quantize(16) if mode == "P" else image.convert(mode)


KINDS = [
    lambda i: ("jpg", as_file(picture(i), "JPEG")),
    lambda i: ("png", as_file(picture(i), "PNG")),
    lambda i: ("JPEG", as_file(picture(i, "L"), "JPEG")),
    lambda i: ("png", as_file(picture(i, "LA"), "PNG")),
    lambda i: ("png", as_file(picture(i, "P"), "PNG")),
    lambda i: ("png", as_file(picture(i, "P"), "PNG", transparency=2)),
    lambda i: ("png", as_file(picture(i, "RGBA"), "PNG")),
    lambda i: ("jpg", as_file(picture(i, "CMYK"), "JPEG")),
    lambda i: ("jpg", as_file(picture(i), "JPEG", exif=exif(1 + i // 13 % 8))),
    lambda i: ("png", as_file(np.arange(60 + i, dtype=np.uint16)[None] * 200, "PNG")),
    lambda i: ("png", as_file(picture(i, "1"), "PNG")),
    lambda i: ("bmp", as_file(picture(i), "BMP")),
    lambda i: ("tif", as_file(picture(i), "TIFF")),
    lambda i: ("gif", as_file(picture(i, "P"), "GIF")),
    lambda i: ("webp", as_file(picture(i), "WEBP", lossless=True)),
]


def fill(root, count, kinds=KINDS, classes=CLASSES):
    """`count` pictures of all kinds in turn, in class folders."""
    for i in range(count):
        suffix, data = kinds[i % len(kinds)](i)
        path = root / classes[i % len(classes)] / f"{i:03d} ñ.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def few(root, count=12):
    """A few small PNG files of two classes."""
    return fill(root, count, KINDS[1:2], ["a", "b"])


def contents(folder):
    files = [path for path in sorted(pathlib.Path(folder).rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def examples(name, data_dir, split="train"):
    """{file name: (bytes, label)} as plain TFDS reads them."""
    source = tfds.data_source(name, data_dir=str(data_dir), split=split, decoders={"image": tfds.decode.SkipDecoding()})
    read = {each["file_name"].decode(): (each["image"], int(each["label"])) for each in source}
    assert len(read) == len(source)
    return read


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """The folder of 200 pictures with one cut short, and what was prepared from it."""
    root = tmp_path_factory.mktemp("mixed")
    pictures = fill(root / "Mixed Pictures", 200)
    whole = (pictures / "cats" / "001 ñ.png").read_bytes()
    (pictures / "cats" / "001 ñ.png").write_bytes(whole[: len(whole) // 2])
    (pictures / "cats" / "Thumbs.db").write_bytes(b"of the system")
    (pictures / "notes.txt").write_text("of the user")
    (pictures / ".hidden").mkdir()
    (pictures / "nothing").mkdir()
    with pytest.raises(UserError) as caught:
        prepare(pictures, out=root / "data", workers=1)
    assert "cats/001 ñ.png cannot be read (OSError" in str(caught.value) and "max_bad is 0" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="marjax prepare. has not finished 'mixed_pictures'"):
        open_source(_data("mixed_pictures", root / "data"))
    return pictures, prepare(pictures, out=root / "data", workers=1, max_bad=1, progress=False)


def _data(name, data_dir, **fields):
    config = config_lib.load(f"{FOLDER}:name={name},debug")
    config.data.update(data_dir=str(data_dir), **fields)
    return config_lib.data_config(config)


def test_two_hundred_pictures_of_all_kinds(mixed):
    pictures, made = mixed
    assert made.name == "mixed_pictures" and made.classes == CLASSES and made.num_examples == {"train": 199}
    [(name, why)] = made.unreadable
    assert name == "cats/001 ñ.png" and "OSError" in why
    assert made.ignored == {"hidden or the system's": 2, ".txt": 1}
    assert any("'Cats', 'cats' differ only in case" in text for text in made.warnings)
    assert any("nothing/ holds no picture" in text for text in made.warnings)
    assert made.kinds["CMYK"] == 13 and made.kinds["palette, transparency"] == 13 and sum(made.kinds.values()) == 199
    directory = pathlib.Path(made.directory)
    assert sorted(os.listdir(directory)) == [
        "dataset_info.json",
        "features.json",
        "label.labels.txt",
        "mixed_pictures-train.array_record-00000-of-00001",
        "prepared.json",
        "unreadable.txt",
    ]
    assert (directory / "unreadable.txt").read_text().startswith("cats/001 ñ.png\tOSError")
    assert (directory / "label.labels.txt").read_text().splitlines() == CLASSES

    stored = examples("mixed_pictures", made.data_dir)
    originals = {str(path.relative_to(pictures)): path.read_bytes() for path in pictures.rglob("* ñ.*")}
    assert stored.keys() == originals.keys() - {"cats/001 ñ.png"}
    for name, (data, label) in stored.items():
        assert label == CLASSES.index(name.split("/")[0])
        assert data == storable(originals[name])[0]
    passed = sum(originals[name] == data for name, (data, _) in stored.items())
    assert passed == made.kinds["JPEG"] + made.kinds["PNG"] and 40 < passed < 60

    # Decoded by plain TFDS and by marjax: the same pixels, in the same order.
    plain = tfds.builder_from_directory(made.directory).as_data_source("train")
    ours = open_source(_data("mixed_pictures", made.data_dir))
    assert len(plain) == len(ours) == 199 and ours.num_classes == 4 and list(ours.class_names) == made.classes
    for index in range(0, 199, 3):
        mine = ours[index]["image"]
        np.testing.assert_array_equal(plain[index]["image"], np.repeat(mine, 3 // mine.shape[2], axis=2))
        assert plain[index]["label"] == ours[index]["label"]
    assert all(f"{label} {name}" in made.summary() for label, name in enumerate(made.classes))
    assert "folder:name=mixed_pictures," in made.summary() and "13 CMYK" in made.summary()


def sized(root, side, count=4):
    """Class folders of a few pictures of `side` pixels on the shorter side; one of them has one picture."""
    for i in range(count):
        path = root / ("a" if i else "b") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((side, side + 9, 3), 40 * i, np.uint8)).save(path)
    return root


@pytest.mark.parametrize("folder", ["plain", 'my data\'s "é" $HOME', "~", "a,b:c=d", "-x", "写真", "2026"])
def test_the_printed_command_trains(tmp_path, monkeypatch, capsys, folder):
    """As a shell reads it, from another folder; fewer pictures than a batch has are enough."""
    monkeypatch.setattr("marjax.data.prepare.prepare.has_accelerator", lambda: False)
    sized(tmp_path / folder, 70)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["prepare", f"--images={tmp_path / folder}", f"--out={tmp_path / folder}.sets", "--workers=1"]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if "marjax train" in line]
    shell = subprocess.run(
        ["sh", "-c", "marjax() { printf '%s\\0' \"$@\"; }; " + line[line.index("marjax train") :]],
        capture_output=True,
        check=True,
    )
    arguments = shell.stdout.decode().rstrip("\0").split("\0")
    assert arguments[0] == "train" and not shell.stderr
    config = config_lib.load(arguments[arguments.index("--config") + 1])
    assert config.data.image_size == 32 and config.model.dtype == "float32"
    _, given = cli.parse(arguments)
    assert given == {"data.data_dir": str(tmp_path / f"{folder}.sets")}
    resolved = config_lib.resolve(config_lib.apply_overrides(config, given))
    assert resolved.data.num_classes == 2 and resolved.train.batch_size > 4
    if folder == "plain":
        quick = {
            "train.batch_size": 8,
            "train.steps": 1,
            "model.width": 32,
            "model.encoder_depth": 1,
            "model.decoder_depth": 1,
            "model.denoiser.depth": 1,
            "model.denoiser.width": 32,
            "log.samples_every": 0,
            "log.tensorboard": False,
        }
        assert cli.main([*arguments, *(f"--config.{key}={value}" for key, value in quick.items())]) == 0
        assert (tmp_path / arguments[arguments.index("--workdir") + 1] / "checkpoints" / "1").is_dir()


def test_the_suggested_size_and_model_suit_pictures_and_machine(tmp_path, monkeypatch):
    for side, size in ((9, 32), (63, 32), (64, 64), (300, 64)):
        made = prepare(sized(tmp_path / f"of{side}", side), out=tmp_path / "data", workers=1)
        monkeypatch.setattr("marjax.data.prepare.prepare.has_accelerator", lambda: False)
        assert "size=32,model=tiny" in made.train_command()
        monkeypatch.setattr("marjax.data.prepare.prepare.has_accelerator", lambda: True)
        assert f"size={size},model=small" in made.train_command()
    for model in ("tiny", "small"):
        for size in SIZES[model]:
            config_lib.load(f"{FOLDER}:name=a,size={size},model={model}")


@pytest.mark.slow
def test_training_on_them(mixed, tmp_path):
    config = config_lib.apply_overrides(
        config_lib.load(f"{FOLDER}:name=mixed_pictures,size=16,debug"),
        {
            "data.data_dir": mixed[1].data_dir,
            "train.steps": 2,
            "train.warmup_steps": 1,
            "log.every": 1,
            "log.samples_every": 0,
            "log.tensorboard": False,
            "log.progress": False,
        },
    )
    state = marjax.train(config, tmp_path / "run")
    assert int(state.step) == 2 and all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))
    kept = read_workdir(tmp_path / "run")
    assert kept.data.num_classes == 4
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines if "train/loss" in line} == {1, 2}


def test_numbers_of_the_data_set_are_found(mixed):
    fields = {"data.data_dir": mixed[1].data_dir, "train.steps": None, "train.epochs": 3.0}
    config = config_lib.resolve(
        config_lib.apply_overrides(config_lib.load(f"{FOLDER}:name=mixed_pictures,debug"), fields)
    )
    assert (config.data.num_classes, config.data.num_examples, config.train.steps) == (4, 199, 3 * (199 // 16))
    real = {"data.data_dir": mixed[1].data_dir}
    for arg, tokens in (
        ("", 64),
        (",size=64,model=small", 256),
        (",size=16", 64),
        (",size=256,model=mar_base,tokenizer=kl16,variant=ar", 256),
    ):
        full = config_lib.load(f"{FOLDER}:name=mixed_pictures{arg}")
        full = config_lib.resolve(config_lib.apply_overrides(full, real))
        assert full.data.num_classes == 4 and config_lib.tokens_of(full).num_tokens == tokens
    with pytest.raises(UserError, match="has 4 classes, more than data.num_classes=3"):
        open_source(_data("mixed_pictures", mixed[1].data_dir, num_classes=3))
    with pytest.raises(UserError, match="'name' is missing"):
        config_lib.load(str(FOLDER))
    with pytest.raises(UserError, match="size=40"):
        config_lib.load(f"{FOLDER}:size=40,name=x")
    with pytest.raises(UserError, match="tfds:no_such"):
        config_lib.resolve(config_lib.load(f"{FOLDER}:name=no_such"))


def test_a_second_run_does_nothing_and_another_input_is_refused(mixed, tmp_path, capsys):
    pictures, made = mixed
    before = contents(made.data_dir)
    assert cli.main(["prepare", "--images", str(pictures), "--out", made.data_dir, "--max_bad", "1"]) == 0
    assert "nothing done" in capsys.readouterr().out
    other = few(tmp_path / "other")
    assert cli.main(["prepare", "--images", str(other), "--out", made.data_dir, "--name", "mixed_pictures"]) == 2
    error = capsys.readouterr().err
    assert "settings: classes (was 4, now 2), pictures (was {'train': 200}" in error
    assert contents(made.data_dir) == before


def test_files_that_are_lost_are_missed(tmp_path, monkeypatch):
    few(tmp_path / "own")
    made = prepare(tmp_path / "own", out=tmp_path / "data", num_shards=2, workers=1)
    folder = tmp_path / "data" / "own" / "1.0.0"
    (shard,) = folder.glob("*-00001-of-00002")
    shard.unlink()
    with pytest.raises(UserError, match="lacks 1 of its files, such as own-train.*--overwrite"):
        prepare(tmp_path / "own", out=tmp_path / "data", num_shards=2, workers=1)
    again = prepare(tmp_path / "own", out=tmp_path / "data", num_shards=2, workers=1, overwrite=True)
    assert shard.exists() and again.num_examples == made.num_examples
    (folder / "prepared.json").write_text("[1]")
    with pytest.raises(UserError, match=r"prepared\.json: the content is an array"):
        prepare(tmp_path / "own", out=tmp_path / "data", num_shards=2, workers=1)


def test_records_that_are_none_are_written_again(tmp_path):
    from marjax.data.prepare.shards import Shard, read_record

    for text in ("", "[]", "null", '{"unreadable": 3}', '{"unreadable": [], "odd": 1}'):
        (tmp_path / "record.json").write_text(text)
        assert read_record(Shard("x", str(tmp_path / "record.json"), [], True, 0)) is None


def test_a_full_disk_is_told_in_one_line(tmp_path, capsys, monkeypatch):
    few(tmp_path / "own")

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("marjax.files.os.fsync", full)
    arguments = ["--images", str(tmp_path / "own"), "--out", str(tmp_path / "data"), "--workers", "1"]
    assert cli.main(["prepare", *arguments]) == 1
    assert "plan.json cannot be written (No space left on device)" in capsys.readouterr().err


def test_overwrite_replaces(tmp_path):
    few(tmp_path / "one")
    prepare(tmp_path / "one", out=tmp_path / "data", name="own", workers=1)
    few(tmp_path / "two", 5)
    made = prepare(tmp_path / "two", out=tmp_path / "data", name="own", workers=1, overwrite=True)
    assert len(examples("own", tmp_path / "data")) == 5 == made.num_examples["train"]
    assert os.listdir(tmp_path / "data" / "own") == ["1.0.0"]
    # A picture of the same size with other contents is not noticed; one of another size is.
    with open(tmp_path / "two" / "a" / "000 ñ.png", "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="names, classes or sizes of pictures differ"):
        prepare(tmp_path / "two", out=tmp_path / "data", name="own", workers=1)


def test_the_number_of_workers_changes_nothing(tmp_path):
    fill(tmp_path / "own", 45)
    broken = tmp_path / "own" / "cats" / "zero.jpg"
    broken.write_bytes(b"")
    made = [
        prepare(tmp_path / "own", out=tmp_path / f"{n}", workers=n, num_shards=5, max_bad=1, val_share=0.2)
        for n in (1, 2)
    ]
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert made[0].num_examples == {"train": 37, "validation": 8}
    train, validation = examples("own", tmp_path / "2"), examples("own", tmp_path / "2", "validation")
    assert not train.keys() & validation.keys() and len(train | validation) == 45
    counts = collections.Counter(label for _, label in validation.values())
    assert set(counts) == {0, 1, 2, 3}
    # Five shards of each split, and pictures shuffled over them.
    for split in tfds.builder("own", data_dir=str(tmp_path / "2")).info.splits.values():
        assert split.num_shards == 5 and min(split.shard_lengths) >= 1
    assert list(train) != sorted(train)
    # Too many are found by processes too, and end them.
    (tmp_path / "own" / "cats" / "one.jpg").write_bytes(b"no")
    with pytest.raises(UserError, match=r"max_bad is 0"):
        prepare(tmp_path / "own", out=tmp_path / "3", workers=2, num_shards=5)
    assert os.listdir(tmp_path / "3" / "own") == ["1.0.0.preparing"]


SLOWLY = """
import sys, time
from marjax.data.prepare import prepare, shards
quick = shards.storable
def slowly(*arguments):
    time.sleep(0.03)
    return quick(*arguments)
shards.storable = slowly
if __name__ == "__main__":
    prepare.prepare(sys.argv[1], out=sys.argv[2], workers=int(sys.argv[3]), num_shards=12, progress=False)
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_resume_after_kill(tmp_path, workers):
    few(tmp_path / "own", 120)
    (tmp_path / "slowly.py").write_text(SLOWLY)
    prepare(tmp_path / "own", out=tmp_path / "whole", workers=1, num_shards=12)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "slowly.py"), tmp_path / "own", tmp_path / "data", str(workers)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    folder = tmp_path / "data" / "own" / "1.0.0.preparing"
    deadline = time.monotonic() + 60
    while len(list((folder / "records").glob("*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    children = [int(n) for n in pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    while (
        any(
            os.path.exists(f"/proc/{child}") and "Z" not in pathlib.Path(f"/proc/{child}/stat").read_text()
            for child in children
        )
        and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    records = list((folder / "records").glob("*.json"))
    assert 3 <= len(records) < 12 and not (folder / "dataset_info.json").exists()
    assert list(folder.glob("*.partial*")), "killed in the midst of a shard"
    kept = {record.stem: (folder / record.stem).stat().st_mtime_ns for record in records}
    with pytest.raises(UserError, match="settings: shards"):
        prepare(tmp_path / "own", out=tmp_path / "data", workers=1, num_shards=6)
    prepare(tmp_path / "own", out=tmp_path / "data", workers=1, num_shards=12)
    final = tmp_path / "data" / "own" / "1.0.0"
    assert {name: (final / name).stat().st_mtime_ns for name in kept} == kept  # not written again
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


def test_two_at_once_are_kept_apart(tmp_path, monkeypatch):
    few(tmp_path / "own")
    monkeypatch.setattr(lock, "_PATIENCE", 0.0)
    folder = tmp_path / "data" / "own"
    with (
        lock.locked_folder(folder, "marjax prepare", "1.0.0.lock"),
        pytest.raises(UserError, match=f"being written by marjax prepare on host .* process {os.getpid()}"),
    ):
        prepare(tmp_path / "own", out=tmp_path / "data", workers=1)
    prepare(tmp_path / "own", out=tmp_path / "data", workers=1)
    assert [path.name for path in folder.iterdir()] == ["1.0.0"]


def test_unreadable_pictures_up_to_a_limit(tmp_path, capsys):
    few(tmp_path / "own", 30)
    for name in ("empty.png", "text.jpg", "phone.heic"):
        (tmp_path / "own" / "a" / name).write_bytes(b"" if name == "empty.png" else b"no picture")
    os.symlink(tmp_path / "gone.png", tmp_path / "own" / "b" / "link.png")

    def run(max_bad):
        return prepare(tmp_path / "own", out=tmp_path / "data", workers=1, num_shards=8, max_bad=max_bad)

    for max_bad in (0, 3):
        with pytest.raises(UserError, match=f"max_bad is {max_bad}.*--max_bad"):
            run(max_bad)
    assert len((tmp_path / "data/own/1.0.0.preparing/unreadable.txt").read_text().splitlines()) == 4
    made = run(4)  # goes on
    assert [name for name, _ in made.unreadable] == ["a/empty.png", "a/phone.heic", "a/text.jpg", "b/link.png"]
    assert dict(made.unreadable)["b/link.png"] == "the file cannot be read: No such file or directory"
    assert "unreadable: a/empty.png: the file is empty" in capsys.readouterr().err
    assert len(examples("own", tmp_path / "data")) == 30
    shutil.rmtree(tmp_path / "data")
    assert run(9).unreadable == made.unreadable


def layout(root, *names):
    data = as_file(picture(1), "PNG")
    for name in names:
        path = root / name
        if name.endswith("/"):
            path.mkdir(parents=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return root


@pytest.mark.parametrize(
    "names, classes, counts",
    [
        (["a/1.png", "b/x/2.png", "b/3.png"], ["a", "b"], {"train": 3}),
        (["train/b/1.png", "train/a/1.png", "val/a/2.png"], ["a", "b"], {"train": 2, "validation": 1}),
        (["train/a/1.png", "test/a/1.png", "validation/a/x/2.PNG"], ["a"], {"train": 1, "validation": 1, "test": 1}),
        (["1.png", "2.png"], ["own"], {"train": 2}),
        (["train/1.png", "val/2.png"], ["own"], {"train": 1, "validation": 1}),
        (["train/1.png", "car/2.png"], ["car", "train"], {"train": 2}),  # a class of trains
    ],
)
def test_layouts(tmp_path, names, classes, counts):
    layout(tmp_path / "own", *names)
    made = prepare(tmp_path / "own", out=tmp_path / "data", workers=1)
    assert made.classes == classes and made.num_examples == counts
    read = {name: label for split in counts for name, (_, label) in examples("own", tmp_path / "data", split).items()}
    assert read.keys() == set(names)
    if len(classes) > 1:
        assert all(classes[label] in name for name, label in read.items())


def test_links(tmp_path):
    layout(tmp_path / "far", "2.png")
    layout(tmp_path / "own", "a/1.png")
    os.symlink(tmp_path / "far", tmp_path / "own" / "b")
    os.symlink(tmp_path / "own", tmp_path / "own" / "a" / "around")
    os.mkfifo(tmp_path / "pipe.png")  # which whoever opens waits for ever
    os.symlink(tmp_path / "pipe.png", tmp_path / "own" / "a" / "3.png")
    made = prepare(tmp_path / "own", out=tmp_path / "data", workers=1)
    assert examples("own", tmp_path / "data").keys() == {"a/1.png", "b/2.png"}
    assert any("a/around is a link" in text for text in made.warnings)


@pytest.mark.parametrize(
    "names, options, says",
    [
        (["readme.txt"], {}, r"no picture \(1 .txt"),
        (["a/1.png", "2.png"], {}, r"pictures \(2.png\) beside folders of pictures \(a\)"),
        (["train/a/1.png", "cars/1.png"], {}, "if train is a split, leave only train, val and test"),
        (["train/a/1.png", "val/b/1.png"], {}, "class 'b' has pictures in validation but none in train"),
        (["train/a/1.png", "train/1.png", "val/a/1.png"], {}, r"train/ holds pictures \(train/1.png\) beside class"),
        (["a /1.png"], {}, "class folder 'a ': rename it"),
        (["a/1.png"], {"name": "My Set"}, "name 'My Set'"),
        (["a/1.png"], {"name": "mnist"}, "name 'mnist'"),
        (["a/1.png"], {"val_share": 1.0}, "val_share is 1.0"),
        (["a/1.png"], {"val_share": 0.1}, "leaves no picture for validation"),
        (["train/a/1.png", "val/a/1.png"], {"val_share": 0.5}, "has a folder for validation already"),
        (["a/1.png"], {"num_shards": 0}, "num_shards is 0"),
        (["a/1.png"], {"max_bad": -1}, "max_bad is -1"),
        (["a/1.png"], {"out": "gs://bucket/data"}, "gs://bucket/data is not on this machine"),
        (["a/1.png"], {"imagenet": ["x.tar"]}, "give either a folder of pictures or the ImageNet tars"),
        (["a/1.png"], {"inside": True}, "own/data.*--out"),
    ],
)
def test_refusals(tmp_path, names, options, says):
    layout(tmp_path / "own", *names)
    out = tmp_path / ("own/data" if options.pop("inside", False) else "data")
    with pytest.raises(UserError, match=says) as caught:
        prepare(tmp_path / "own", **{"out": out, "workers": 1} | options)
    assert "\n" not in str(caught.value)
    assert not out.exists()


def test_more_refusals(tmp_path, capsys):
    for arguments, says in [
        ([], "give either --images DIR or --imagenet TAR"),
        (["--images", str(tmp_path / "no")], f"{tmp_path}/no "),
        (["--imagenet", str(tmp_path / "no.tar")], "no.tar does not exist"),
        (["--imagenet", str(tmp_path)], "https://image-net.org"),
        (["--imagenet", str(tmp_path), "--name", "x"], "leave out name"),
    ]:
        assert cli.main(["prepare", "--out", str(tmp_path / "data"), *arguments]) == 2
        assert says in capsys.readouterr().err
    made = layout(tmp_path / "own", "a/1.png")
    (tmp_path / "data" / "own" / "1.0.0").mkdir(parents=True)
    (tmp_path / "data" / "own" / "1.0.0" / "dataset_info.json").write_text("{}")
    with pytest.raises(UserError, match=r"own/1\.0\.0 .*--name"):
        prepare(made, out=tmp_path / "data")


def test_doubtful_pictures_are_named(tmp_path, capsys):
    few(tmp_path / "own")
    Image.fromarray(np.arange(4000, dtype=np.uint16).reshape(40, 100)).save(tmp_path / "own" / "a" / "deep.png")
    Image.new("RGBA", (5, 4)).save(tmp_path / "own" / "b" / "clear.png")
    arguments = ["prepare", "--images", str(tmp_path / "own"), "--out", str(tmp_path / "data"), "--workers", "1"]
    for _ in range(2):  # also of what was prepared before
        assert cli.main(arguments) == 0
        told = capsys.readouterr()
        assert "--bits 16" in told.err and "a/deep.png" in told.err
        assert "fully transparent" in told.err and "b/clear.png" in told.err
        assert "1 12 of 16 bits by its values" in told.out
    assert cli.main([*arguments, "--bits", "16"]) == 2
    assert "bits (was None, now 16)" in capsys.readouterr().err
    assert cli.main([*arguments, "--overwrite", "--bits", "16"]) == 0
    told = capsys.readouterr()
    assert "deep.png" not in told.err and "1 16-bit" in told.out
    for bits in (7, 17):
        with pytest.raises(UserError, match=f"bits is {bits}"):
            prepare(tmp_path / "own", out=tmp_path / "data", bits=bits)


def test_pictures_that_are_too_large_are_unreadable(tmp_path):
    few(tmp_path / "own")
    (tmp_path / "own" / "a" / "sparse.png").write_bytes(b"")
    os.truncate(tmp_path / "own" / "a" / "sparse.png", 8 << 30)
    (tmp_path / "own" / "a" / "bomb.png").write_bytes(as_file(Image.new("1", (13_000, 13_000)), "PNG"))
    made = prepare(tmp_path / "own", out=tmp_path / "data", workers=1, max_bad=2, num_shards=1)
    assert {name: "8,589,934,592 bytes" in why or "too many pixels" in why for name, why in made.unreadable} == {
        "a/bomb.png": True,
        "a/sparse.png": True,
    }


JSONS = [
    "",
    "[]",
    "3",
    "null",
    '{"plan": 3}',
    '{"plan": {"name": 3}}',
    '{"plan": []}',
    "[" * 100_000,
    "\xff",
    "{",
    '{"num_examples": {"train": -1}}',
    '{"kinds": []}',
]


@pytest.mark.parametrize("text", JSONS)
def test_own_files_of_any_shape(tmp_path, text):
    few(tmp_path / "own")
    folder = tmp_path / "data" / "own" / "1.0.0"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "prepared.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"prepared\.json|1\.0\.0 .*--out") as caught:
        prepare(tmp_path / "own", out=tmp_path / "data", workers=1)
    assert "\n" not in str(caught.value)
    preparing = tmp_path / "other" / "own" / "1.0.0.preparing"
    preparing.mkdir(parents=True)
    (preparing / "plan.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"plan\.json|1\.0\.0\.preparing .*--overwrite") as caught:
        prepare(tmp_path / "own", out=tmp_path / "other", workers=1)
    assert "\n" not in str(caught.value)


def test_folders_that_cannot_be_used_are_told_in_one_line(tmp_path, capsys, monkeypatch):
    few(tmp_path / "own")
    arguments = ["prepare", "--images", str(tmp_path / "own"), "--workers", "1", "--out"]
    (tmp_path / "file").write_text("")
    assert cli.main([*arguments, str(tmp_path / "file" / "data")]) == 2
    assert "cannot be created (Not a directory)" in capsys.readouterr().err

    def read_only(path, *arguments, **more):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    for name in ("rename", "remove", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(f"marjax.data.prepare.prepare.os.{name}", read_only)
            assert cli.main([*arguments, str(tmp_path / name)]) == 1
        error = capsys.readouterr().err
        assert "Read-only file system" in error and "Traceback" not in error and error.count("error") == 1
    assert cli.main([*arguments, str(tmp_path / "data")]) == 0
    monkeypatch.setattr("marjax.data.prepare.prepare.os.remove", read_only)
    assert cli.main([*arguments, str(tmp_path / "data")]) == 0  # all is there, and nothing to write


@contextlib.contextmanager
def few_files(free):
    """This process may open so many files more."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(number) for number in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 5, before[1]))
    opened = []
    try:
        with contextlib.suppress(OSError):
            while True:
                opened.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(free):
            os.close(opened.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for number in opened:
            os.close(number)


def test_few_file_descriptors_are_told_in_one_line(tmp_path, capsys):
    few(tmp_path / "own")
    arguments = ["prepare", "--images", str(tmp_path / "own"), "--num_shards", "4", "--workers", "1", "--out"]
    assert cli.main([*arguments, str(tmp_path / "first")]) == 0  # now all is imported
    capsys.readouterr()
    for free in range(4):
        with few_files(free):
            code = cli.main([*arguments, str(tmp_path / str(free))])
        error = capsys.readouterr().err
        assert code in (0, 1, 2) and "Traceback" not in error and error.count("marjax prepare: ") <= 1
        assert code == 0 or "oo many open files" in error
    assert code == 0, "a few are enough"
    source = open_source(_data("own", tmp_path / "first"))
    with few_files(0), pytest.raises(UserError, match="Too many open files.*ulimit -n"):
        source[0]


SYNSETS = {"n01440764": 0, "n02123045": 281, "n15075141": 999}


def tar_of(files):
    """The bytes of a tar."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return made.getvalue()


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """A folder with tars as they are downloaded, of a few pictures; and the pictures by name."""
    folder = tmp_path_factory.mktemp("imagenet")
    turned = exif(6)
    train = {
        synset: {f"{synset}_{i}.JPEG": as_file(picture(i + label), "JPEG", exif=turned) for i in range(5)}
        for synset, label in SYNSETS.items()
    }
    train["n02123045"]["n02123045_9.JPEG"] = as_file(picture(3, "CMYK"), "JPEG")
    train["n02123045"]["n02123045_8.JPEG"] = as_file(picture(3), "PNG")
    val = {f"ILSVRC2012_val_{i:08d}.JPEG": as_file(picture(i), "JPEG") for i in (3, 1, 50_000)}
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar_of({f"{s}.tar": tar_of(files) for s, files in train.items()}))
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar_of(val))
    return folder, {name: data for files in train.values() for name, data in files.items()}, val


def test_imagenet(imagenet, tmp_path):
    folder, train, val = imagenet
    made = prepare(imagenet=[folder], out=tmp_path, workers=1, num_shards=2)
    assert made.num_examples == {"train": 17, "validation": 3} and len(made.classes) == 1000
    assert made.kinds == {"CMYK": 1, "JPEG": 18, "PNG": 1}
    assert "ImageNet has 1,281,167" in made.warnings[0] and "--config imagenet256:model=" in made.summary()
    stored = examples("imagenet2012", tmp_path)
    for name, data in train.items():
        assert stored[name][1] == SYNSETS[name.split("_")[0]]
        # As they are, orientation and all: the reference ignores it.
        assert stored[name][0] == data or name == "n02123045_9.JPEG"
    np.testing.assert_array_equal(
        decoded(stored["n02123045_9.JPEG"][0]),
        np.asarray(Image.open(io.BytesIO(train["n02123045_9.JPEG"])).convert("RGB")),
    )
    labels = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt").read_text().split()
    read = examples("imagenet2012", tmp_path, "validation")
    assert {name: made.classes[label] for name, (_, label) in read.items()} == {
        name: labels[int(name[15:23]) - 1] for name in val
    }
    # What configs/imagenet256.py opens.
    config = config_lib.load(str(ROOT / "configs" / "imagenet256.py"))
    config.data.data_dir = str(tmp_path)
    ours = open_source(config_lib.data_config(config))
    assert len(ours) == 17 and {ours[i]["label"] for i in range(17)} == set(SYNSETS.values())
    assert tfds.builder("imagenet2012", data_dir=str(tmp_path)).is_prepared()

    # The same pictures in the order in which TFDS itself stores them.
    class Written(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(),
                        "file_name": tfds.features.Text(),
                        "label": tfds.features.ClassLabel(num_classes=1),
                    }
                ),
            )

        def _split_generators(self, manager):
            return {
                "train": (
                    (name, {"image": io.BytesIO(data), "file_name": name, "label": 0}) for name, data in train.items()
                )
            }

        def _generate_examples(self):
            raise NotImplementedError

    Written.name = "theirs"
    Written(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    assert list(examples("theirs", tmp_path)) == list(stored) != sorted(stored)


def test_tars_that_are_not_imagenet(imagenet, tmp_path):
    folder, train, val = imagenet
    whole = (folder / "ILSVRC2012_img_train.tar").read_bytes()
    cases = {
        "is a second tar of split train": ["ILSVRC2012_img_train.tar"] * 2,
        "holds ILSVRC2012_test_00000001.JPEG, expected class tars": tar_of({"ILSVRC2012_test_00000001.JPEG": b"x"}),
        "holds n99999999.tar, expected class tars": tar_of({"n99999999.tar": tar_of(train)}),
        "training and validation pictures": tar_of({"n01440764.tar": tar_of(train)} | val),
        "cannot be read as an uncompressed tar": whole[: len(whole) // 2],
        "cannot be read as an uncompressed tar ": b"no tar" * 1000,
        "holds no picture": tar_of({}),
    }
    for says, given in cases.items():
        if isinstance(given, bytes):
            (tmp_path / "x.tar").write_bytes(given)
        paths = [tmp_path / "x.tar"] if isinstance(given, bytes) else [folder / name for name in given]
        with pytest.raises(UserError, match=says.strip()) as caught:
            prepare(imagenet=paths, out=tmp_path / "data")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "data").exists()
