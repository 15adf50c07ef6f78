"""One understanding of paths, wherever they come in."""

import argparse
import os
import pathlib
import re
import shutil
import urllib.parse

import pytest
from etils import epath
from support.configs import make_digits
from support.paths import DIGITS

import marjax
from marjax import cli
from marjax import config as config_lib
from marjax.checkpoints.manager import Checkpoints
from marjax.config.files import METAVAR
from marjax.config.schema import PATHS
from marjax.data.prepare.prepare import prepare
from marjax.errors import UserError
from marjax.evaluation.evaluate import Request, evaluate
from marjax.evaluation.networks.classifier import classifier_of
from marjax.evaluation.networks.open_extractor import open_extractor
from marjax.evaluation.statistics import make_statistics, read_statistics
from marjax.generation.sample import open_sampler
from marjax.interop.convert import convert
from marjax.interop.convert_tokenizer import convert_tokenizer
from marjax.interop.export import export
from marjax.paths import normalised, optional
from marjax.plots import plot
from marjax.sweep import sweep
from marjax.tokenizer_training.codebook import train_codebook
from marjax.tokenizer_training.reconstruction import check
from marjax.training.latent_cache import cache_latents
from marjax.workdir import read_workdir


@pytest.mark.parametrize(
    "given, expected",
    [
        ("a/b", "a/b"),
        ("./a", "./a"),
        ("../a", "../a"),
        ("a/", "a"),
        ("a///", "a"),
        ("/", "/"),
        ("//", "/"),
        (".", "."),
        ("~", "/home/me"),
        ("~/a b", "/home/me/a b"),
        ("~/ä/图/", "/home/me/ä/图"),
        ("~root/a", "/root/a"),
        ("a~b/~", "a~b/~"),
        ("./~/a", "./~/a"),
        (pathlib.Path("~/a"), "/home/me/a"),
        (pathlib.Path("a b"), "a b"),
        ("name:with/colon", "name:with/colon"),
        ("C:/a", "C:/a"),
        ("gs/b", "gs/b"),
        ("gsx:/b", "gsx:/b"),
        (" a", " a"),
        ("gs://b", "gs://b"),
        ("gs://b/x y/ä/", "gs://b/x y/ä"),
        (epath.Path("gs://b/x"), "gs://b/x"),
        ("file:///a/b", "/a/b"),
        ("file:///a%20b/%C3%A4", "/a b/ä"),
        ("file://localhost/a/", "/a"),
        ("file:/a", "/a"),
        ("FILE:///a", "/a"),
    ],
)
def test_what_a_path_means(monkeypatch, given, expected):
    monkeypatch.setenv("HOME", "/home/me")
    assert normalised(given) == expected == normalised(normalised(given))
    assert optional(given) == expected


@pytest.mark.parametrize(
    "given, says",
    [
        (pathlib.Path("gs://b/x"), "gs:/b/x is a mangled address.*gs://b/x"),
        ("gs:/b/x", "give gs://b/x"),
        ("gs:b/x", "give gs://b/x"),
        ("GS:/b", "give gs://b"),
        (os.path.abspath("gs://b/x"), "give gs://b/x"),
        (pathlib.Path("gs://b/x").absolute(), "give gs://b/x"),
        ("runs/gs:/b/x", "give gs://b/x"),
        ("gs:///b/x", r"gs:///b/x .*gs://b/x"),
        ("gs://", "bucket"),
        ("gs:", "bucket"),
        ("gcs://b/x", "give gs://b/x"),
        ("Gs://b/x", "give gs://b/x"),
        ("s3://", "s3://"),
        ("s3://b/x", "s3://"),
        ("s3:/b/x", "s3://"),
        ("https://example.com/x.pth", "https://"),
        ("weird+x://b", r"weird\+x://"),
        ("file://other/a", "file:///PATH"),
        ("file:a", "file:///PATH"),
        ("file://", "file:///PATH"),
        ("~nobody_of_this_name/a", "nobody_of_this_name"),
        ("", "empty"),
        ("a\0b", "null"),
        ("x" * 256, "xxx"),
        ("ä" * 128, "äää"),
        ("a/" * 2048 + "b", "a/a/a"),
        ("\ud800", "ud800"),
        (b"a", "os.PathLike"),
        (3, "os.PathLike"),
        (None, "os.PathLike"),
        (["a"], "os.PathLike"),
    ],
)
def test_what_is_no_path(given, says):
    with pytest.raises(UserError, match=f"thing .*{says}") as raised:
        normalised(given, "thing")
    assert "\n" not in str(raised.value)


def test_what_may_be_left_out():
    assert optional("") == "" and optional(None) is None
    with pytest.raises(UserError, match="give gs://b"):
        optional("gs:/b")


def test_a_file_called_like_a_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~old_runs").touch()
    assert normalised("~old_runs") == "~old_runs"


def test_every_path_of_the_command_line_is_known():
    parser = cli._parser()
    subparsers = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    actions = [action for sub in subparsers.choices.values() for action in sub._actions]
    shown = {action.dest for action in actions if re.fullmatch(r"(DIR|WORKDIR|TAR|FILE(\.\w+)?)", str(action.metavar))}
    assert shown < cli.PATHS <= {action.dest for action in actions}
    assert {action.dest for action in actions if action.metavar == METAVAR} == {"config", "dataset"}


@pytest.mark.parametrize(
    "command",
    [
        "train --config {digits} --workdir",
        "prepare --out o --images",
        "prepare --out o --imagenet",
        "convert --out o --checkpoint",
        "convert --out o --tokenizer",
        "stats --npz n.npz --out",
        "stats --out o.npz --npz",
        "train-classifier --config {digits} --out",
        "train-tokenizer --config {digits} --out",
        "evaluate --workdir w --out",
        "evaluate --workdir w --statistics",
        "sample --workdir w --out o --tokenizer_path",
        "plot --out o --workdir",
        "tokenizer check --out o --images",
        "tokenizer check --out o --config",
    ],
)
def test_an_empty_path_is_not_one_left_out(tmp_path, monkeypatch, capsys, command):
    """As of a shell's variable that is not set."""
    monkeypatch.chdir(tmp_path)
    *given, last = command.format(digits=DIGITS).split()
    assert cli.main([*given, last, ""]) == 2
    said = capsys.readouterr().err
    assert f"{last.removeprefix('--').replace('config', 'config file')} is empty" in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder with spaces and umlauts; the current folder is another."""
    folder = tmp_path / "my höme"
    folder.mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(tmp_path / "here")
    yield folder
    assert not [path for path in (tmp_path / "here").iterdir() if path.name.startswith(("~", "gs:", "file:"))]


def test_the_fields_of_a_config(home):
    keys = [
        key
        for key, value in config_lib.flatten(config_lib.base()).items()
        if isinstance(value, str)
        and key.rsplit(".", 1)[-1] in ("data_dir", "cache", "path", "vgg", "linear", "extractor_path", "statistics")
    ]
    assert set(keys) == set(PATHS)
    for key in keys:
        resolved = config_lib.resolve(config_lib.apply_overrides(make_digits(), {key: "~/a b/"}))
        assert config_lib.flatten(resolved)[key] == f"{home}/a b"
        with pytest.raises(UserError, match=f"config.{key} gs:/b/x .* gs://b/x"):
            config_lib.resolve(config_lib.apply_overrides(make_digits(), {key: pathlib.Path("gs://b/x")}))


def test_config_files(home, tmp_path):
    folder = home / "a:b"
    folder.mkdir()
    shutil.copy(DIGITS, folder / "own.py")
    for form in ("~/a:b/own.py:debug", f"file://{folder}/own.py:debug".replace(" ", "%20")):
        assert config_lib.load(form).train.steps == 20
    assert config_lib.load(pathlib.Path("~/a:b/own.py")).train.steps == 450
    for path in (3, "", None, pathlib.Path("gs://b/own.py:debug")):
        with pytest.raises(UserError, match="config file "):
            config_lib.load(path)


def test_a_work_directory_at_home(home, capsys, monkeypatch):
    """What writes it and what reads it finds the same one, whatever way it is called."""

    def claimed(*args, **kwargs):
        raise UserError("claimed")

    monkeypatch.setattr("marjax.training.loop.Checkpoints", claimed)  # the next thing that training does
    with pytest.raises(UserError, match="claimed"):
        marjax.train(make_digits(eval__statistics="~/r.npz"), pathlib.Path("~/rün"))
    run = home / "rün"
    for form in ("~/rün", run, f"{run}/", f"file://{urllib.parse.quote(str(run))}", "../my höme/rün"):
        assert read_workdir(form).eval.statistics == f"{home}/r.npz"
    with pytest.raises(UserError, match="rün has no checkpoints yet"):
        marjax.sample(pathlib.Path("~/rün"), [0])
    assert cli.main(["sample", "--workdir", "~/rün/", "--out", "~/out/", "--labels", "0"]) == 2
    assert "rün has no checkpoints yet" in capsys.readouterr().err
    assert os.listdir(run) == ["config.json"] and not os.listdir(".")


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--config", f"{DIGITS}:debug", "--workdir", "ADDRESS"],
        ["train", "--config", "ADDRESS", "--workdir", "run"],
        ["train", "--config", f"{DIGITS}:debug", "--workdir", "run", "--config.data.cache=ADDRESS"],
        ["train-tokenizer", "--config", f"{DIGITS}:debug", "--out", "ADDRESS"],
        ["tokenizer", "check", "--images", "ADDRESS", "--name", "pixels", "--out", "out"],
        ["tokenizer", "check", "--config", f"{DIGITS}:debug", "--out", "out", "--config.tokenizer.path=ADDRESS"],
        ["sample", "--workdir", "ADDRESS", "--out", "out"],
        ["sample", "--workdir", "run", "--out", "ADDRESS"],
        ["convert", "--checkpoint", "ADDRESS", "--out", "out"],
        ["convert", "--tokenizer", "a", "--out", "ADDRESS"],
        ["convert", "--inception", "ADDRESS"],
        ["export", "--workdir", "ADDRESS", "--out", "a.safetensors"],
        ["prepare", "--images", "ADDRESS", "--out", "out"],
        ["prepare", "--imagenet", "a", "ADDRESS", "--out", "out"],
        ["cache-latents", "--config", f"{DIGITS}:debug", "--out", "ADDRESS"],
        ["train-classifier", "--config", f"{DIGITS}:debug", "--out", "ADDRESS"],
        ["stats", "--npz", "ADDRESS", "--out", "out.npz"],
        ["stats", "--images", "ADDRESS", "--out", "out.npz"],
        ["evaluate", "--workdir", "ADDRESS"],
        ["evaluate", "--workdir", "run", "--statistics", "ADDRESS"],
        ["plot", "--workdir", "a", "ADDRESS", "--out", "out"],
        ["sweep", "ADDRESS", "--root", "root"],
        ["sweep", "file.py", "--root", "ADDRESS"],
    ],
)
def test_mangled_addresses_on_the_command_line(home, capsys, arguments):
    assert cli.main([each.replace("ADDRESS", "gs:/b/x") for each in arguments]) == 2
    error = capsys.readouterr().err
    assert "give gs://b/x" in error and error.count("\n") == 1
    assert not os.listdir(".")


@pytest.mark.parametrize(
    "call",
    [
        lambda path: marjax.train(make_digits(), path),
        lambda path: marjax.sample(path, [0]),
        read_workdir,
        lambda path: open_sampler(path),
        lambda path: export(path, "a.safetensors"),
        lambda path: convert(path, "out"),
        lambda path: convert_tokenizer(path, "a.safetensors"),
        lambda path: prepare(path, out="out"),
        lambda path: prepare("a", out=path),
        lambda path: cache_latents(make_digits(), path),
        lambda path: make_statistics("out.npz", npz=path),
        lambda path: classifier_of(config_lib.data_config(make_digits()), path),
        lambda path: evaluate(path),
        lambda path: evaluate("run", Request(statistics=path)),
        lambda path: plot([path], "out"),
        lambda path: sweep("file.py", path),
        lambda path: read_statistics(path),
        lambda path: open_extractor("classifier", path),
        lambda path: check(images=path, name="pixels"),
        lambda path: Checkpoints(path),
        lambda path: train_codebook(make_digits(), path),
    ],
    ids=range(21),
)
def test_mangled_addresses_in_python(home, call):
    for path, says in (
        (pathlib.Path("gs://b/x"), "give gs://b/x"),
        ("~nobody_of_this_name/x", "nobody_of_this_name"),
        (3, "os.PathLike"),
    ):
        with pytest.raises(UserError, match=says):
            call(path)
    assert not os.listdir(".")
