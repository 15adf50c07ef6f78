"""Every command ends with the next command to type, which runs as printed."""

import pathlib
import shlex

import pytest
from support.paths import DIGITS

from marjax import cli
from marjax.commands.next_step import sample_command, train_command, workdir_of


@pytest.mark.slow
def test_each_printed_command_runs_and_leads_to_the_next(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my configs").mkdir()
    (tmp_path / "my configs" / "it.py").write_text(pathlib.Path(DIGITS).read_text())
    first = [
        "train-classifier",
        "--config",
        "my configs/it.py:debug",
        "--config.data.split=train[:200]",
        "--config.train.steps=2",
        "--config.train.warmup_steps=1",
        "--config.checkpoint.every=2",
        "--config.log.every=1",
        "--config.log.samples_every=2",
        "--config.log.tensorboard=false",
        "--config.eval.extractor_path=the classifier.npz",
        "--config.eval.statistics=real.npz",
    ]
    assert cli.main([*first, "--steps", "2"]) == 0
    seen = []
    while lines := [line for line in capsys.readouterr().err.splitlines() if line.startswith("next: ")]:
        (line,) = lines
        words = shlex.split(line.removeprefix("next: "))
        assert words[0] == "marjax"
        seen.append(words[1])
        assert cli.main(words[1:]) == 0, line
    assert seen == ["stats", "train", "sample", "evaluate", "plot"]
    assert {path.name for path in (tmp_path / "runs" / "it" / "plots").iterdir()} >= {"loss.png", "samples.png"}


@pytest.mark.parametrize(
    "path, name",
    [
        ("configs/digits.py", "digits"),
        ("a b/x.py:size=64,name=a/b.py", "x"),
        ("digits", "digits"),
        ("imagenet256:model=mar_base", "imagenet256"),
    ],
)
def test_a_run_is_named_after_its_config(tmp_path, monkeypatch, path, name):
    monkeypatch.chdir(tmp_path)
    assert workdir_of(path) == f"runs/{name}"
    assert train_command(path, {"train.lr": "1e-3"}) == [
        "train",
        "--config",
        path,
        "--config.train.lr=1e-3",
        "--workdir",
        f"runs/{name}",
    ]
    (tmp_path / "runs" / name).mkdir(parents=True)
    assert train_command(path, {})[-1] == f"runs/{name}_2"


def test_many_classes_are_not_all_sampled():
    assert "--labels" in sample_command("gs://b/x", 1000) and "--labels" not in sample_command("runs/x", 10)


def test_the_config_of_a_work_directory_names_it():
    assert workdir_of("my runs/x/config.json") == "my runs/x" and workdir_of("config.json") == "."
