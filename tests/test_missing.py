"""Errors for missing files name the command that makes them, which works as printed."""

import json
import shlex

import pytest
from support.configs import make_digits
from support.paths import DIGITS, ROOT

from marjax import cli
from marjax.class_names import FILE
from marjax.commands.arguments import load_config, split_list
from marjax.config import resolve
from marjax.workdir import claim_workdir, read_workdir

MNIST = str(ROOT / "configs" / "mnist.py")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with work directories "my runs/one" and "my runs/two" without checkpoints."""
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        claim_workdir(f"my runs/{name}", resolve(make_digits(eval__statistics="r.npz", eval__extractor_path="c.npz")))
    return tmp_path


def commands_of(capsys, arguments):
    """The commands in the one line that a user error prints, each parsed as the command line would."""
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    found = []
    for text in error.split("run ", 1)[1].split(", then ")[0].split(", or ")[0].strip().split(" && "):
        program, *given = shlex.split(text)
        assert program == "marjax"
        found.append((given[0], *cli.parse(given)))
    return found, error


def test_an_evaluation_without_its_files(folder, capsys):
    (made, stats), error = commands_of(capsys, ["evaluate", "--workdir", "my runs/one"])
    assert made[0] == "train-classifier" and made[1].out == "c.npz" and "c.npz does not exist" in error
    assert stats[0] == "stats" and stats[1].out == "r.npz" and "r.npz does not exist" in error
    for path in (made[1].config, stats[1].dataset):
        assert load_config(path, {"seed": "3"}).data == read_workdir("my runs/one").data
    (folder / "c.npz").touch()
    [stats], error = commands_of(capsys, ["evaluate", "--workdir", "my runs/one"])
    assert stats[0] == "stats" and "c.npz" not in error
    (folder / "r.npz").touch()
    assert cli.main(["evaluate", "--workdir", "my runs/one", "--extractor", "inception"]) == 2  # has its own advice
    assert "stats" not in capsys.readouterr().err


def test_an_evaluation_with_given_files(folder, capsys):
    [made, stats], _ = commands_of(
        capsys, ["evaluate", "--workdir", "my runs/one", "--extractor_path", "a b.npz", "--statistics", "s.npz"]
    )
    assert (made[1].out, stats[1].out, stats[1].extractor_path) == ("a b.npz", "s.npz", "a b.npz")
    content = json.loads((folder / "my runs" / "one" / "config.json").read_text())
    content["eval"] |= {"extractor_path": "", "statistics": ""}
    (folder / "my runs" / "one" / "config.json").write_text(json.dumps(content))
    [made, stats], error = commands_of(capsys, ["evaluate", "--workdir", "my runs/one"])
    assert made[1].out == stats[1].extractor_path == "my runs/one_classifier.npz"
    assert shlex.quote(f"--extractor_path={made[1].out}") in error
    assert shlex.quote(f"--statistics={stats[1].out}") in error


@pytest.mark.parametrize(
    "config, more",
    [(f"{MNIST}:head=categorical,debug", []), (f"{MNIST}:tokenizer=kl,debug", ["--config.tokenizer.train.steps=2"])],
)
def test_training_without_its_tokenizer(folder, capsys, config, more):
    [[name, given, overrides]], error = commands_of(capsys, ["train", "--config", config, "--workdir", "w", *more])
    assert name == "train-tokenizer" and given.config == config and len(overrides) == len(more)
    assert "does not exist" in error and not (folder / "w").exists()


def test_training_without_the_files_of_its_evaluation(folder, capsys):
    found, _ = commands_of(capsys, ["train", "--config", f"{DIGITS}:debug", "--workdir", "w", "--config.eval.every=5"])
    assert [name for name, _, _ in found] == ["train-classifier", "stats"]
    assert all(overrides == {"eval.every": "5"} for _, _, overrides in found)


def test_sampling_before_the_first_checkpoint(folder, capsys):
    assert cli.main(["sample", "--workdir", "my runs/one", "--out", "o"]) == 2
    command = capsys.readouterr().err.partition("resume training: ")[2]
    given = cli.parse(shlex.split(command)[1:])[0]
    assert given.workdir == "my runs/one" and load_config(given.config, {}) == read_workdir("my runs/one")
    assert not (folder / "o").exists()


@pytest.mark.parametrize(
    "given, meant",
    [
        ("my runs/oen", "my runs/one"),
        ("my runs", "my runs/one, my runs/two"),
        ("my runs/two/checkpoints", "my runs/two"),
        ("my runs/two/config.json", "my runs/two"),
        ("my runs/two/checkpoints/450/ema", "my runs/two"),
    ],
)
@pytest.mark.parametrize("command", ["sample --out o", "evaluate", "export --out w.safetensors", "plot --out p"])
def test_a_path_near_a_work_directory(folder, capsys, command, given, meant):
    (folder / "my runs" / "two" / "checkpoints" / "450" / "ema").mkdir(parents=True)
    assert cli.main([*command.split(), "--workdir", given]) == 2
    error = capsys.readouterr().err
    assert error.endswith(f", such as {meant}\n") and error.count("\n") == 1
    assert not (folder / "o").exists() and not list(folder.rglob(FILE))


def test_lists():
    for text in ("1,2.9", "1, 2.9", "[1, 2.9]", " (1 ,2.9) ", "'1',\"2.9\""):
        assert split_list(text) == ["1", "2.9"]
