"""The configs that come with marjax are found by name, from any folder, and a user's own file wins."""

import json
import os
import sys

import pytest
from support.paths import ROOT

from marjax import cli
from marjax import config as config_lib
from marjax.config.files import shipped_names
from marjax.errors import UserError
from marjax.sweep.points import SweepRun
from marjax.workdir import claim_workdir

OWN = "from marjax import config\ndef get_config(arg):\n    c = config.base()\n    c.train.steps = 77\n    return c\n"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty current folder, without a clone above it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "form",
    [
        "digits",
        "digits:debug",
        "mnist:variant=ar,head=categorical",
        "imagenet256:model=mar_large",
        "folder:size=32,debug",
    ],
)
def test_a_name_is_the_file_of_the_clone(elsewhere, form):
    name, _, arg = form.partition(":")
    assert config_lib.load(form) == config_lib.load(f"{ROOT / 'configs' / name}.py:{arg}")
    assert config_lib.load(f"configs/{name}.py:{arg}") == config_lib.load(form)


def test_every_shipped_config_has_its_name():
    assert shipped_names() == sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


def test_a_file_of_the_users_wins_and_a_folder_does_not(elsewhere, capsys):
    (elsewhere / "configs").mkdir()
    (elsewhere / "configs" / "digits.py").write_text(OWN)
    (elsewhere / "digits").mkdir()
    assert config_lib.load("configs/digits.py").train.steps == 77
    assert config_lib.load("configs/digits.py:a:b,c").train.steps == 77
    assert not capsys.readouterr().err
    assert config_lib.load("digits").train.steps != 77
    (elsewhere / "mnist:variant=x.py").write_text(OWN)
    assert config_lib.load("mnist:variant=x.py").train.steps == 77


def test_the_documented_path_outside_a_clone_says_what_is_used(elsewhere, capsys):
    assert config_lib.load("configs/digits.py:debug").model.width == 32
    [line] = capsys.readouterr().err.splitlines()
    assert "configs/digits.py" in line and "'digits'" in line


@pytest.mark.parametrize(
    "given, says",
    [
        ("digts", "closest is 'digits'"),
        ("imagenet:debug", "closest is 'imagenet256'"),
        ("digits.py", "closest is 'digits'"),
        ("configs/mnits.py", "closest is 'mnist'"),
        ("nothing", "digits, folder, imagenet256, mnist"),
        ("a/b", "'a/b'"),
        ("mnist:variant=none", "variant"),
        ("", "empty"),
    ],
)
def test_what_is_not_there(elsewhere, given, says):
    with pytest.raises(UserError) as caught:
        config_lib.load(given)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_nothing_is_imported_from_the_current_folder(elsewhere, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("digits.py", "ml_collections_.py"):
        (elsewhere / name).write_text("raise SystemExit('imported')")
    before = set(sys.modules)
    assert config_lib.load("digits").data.source == "digits"
    assert not {name for name in set(sys.modules) - before if name in ("digits", "configs")}


def test_points_of_a_sweep_name_configs_too(elsewhere):
    (elsewhere / "points.py").write_text(
        "from marjax.sweep import Point, Sweep\ndef get_sweep():\n    return Sweep([Point('a', 'digits:debug')])\n"
    )
    sweep_run = SweepRun.open("points.py", "root")
    assert sweep_run.configs["a"].train.steps == 20
    (elsewhere / "points.py").write_text("CONFIG = 'digits:debug'\ndef get_sweep():\n    yield {'train.steps': 7}\n")
    assert [config.train.steps for config in SweepRun.open("points.py", "root").configs.values()] == [7]


def test_the_sweep_of_table_1_needs_no_clone(elsewhere):
    sweep_run = SweepRun.open(ROOT / "launch" / "table1_small.py", "root")
    assert {config.data.source for config in sweep_run.configs.values()} == {"mnist"}


@pytest.mark.parametrize("command", ["train", "compile", "stats", "tokenizer", "benchmark", "cache-latents"])
def test_help_lists_the_names(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0 and ", ".join(shipped_names()) in capsys.readouterr().out


def test_a_work_directory_does_not_depend_on_how_its_config_was_named(elsewhere):
    resolved = config_lib.resolve(config_lib.load("digits:debug"))
    claim_workdir(elsewhere / "run", resolved)
    kept = json.loads((elsewhere / "run" / "config.json").read_text())
    assert "site-packages" not in json.dumps(kept) and str(ROOT) not in json.dumps(kept)
    assert os.listdir(elsewhere) == ["run"]
