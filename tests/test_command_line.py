"""Mistakes in a command line: each gets one line, which names the intended flag or value."""

import argparse
import inspect
import os
import shlex
import subprocess
import sys

import pytest
from support.paths import DIGITS, ROOT

from marjax import cli, commands
from marjax.command_line import Parser
from marjax.errors import UserError

IMAGENET = str(ROOT / "configs" / "imagenet256.py")


def failure(capsys, line):
    """Runs a command line with a user error; returns its one line on stderr."""
    arguments = shlex.split(line.format(digits=DIGITS, imagenet=IMAGENET))
    assert cli.main(arguments) == 2
    out, error = capsys.readouterr()
    program = f"marjax {arguments[0]}" if arguments[0] in commands.NAMES else "marjax"
    assert error.startswith(f"{program}: error: ") and error.count("\n") == 1 and not out
    return error


@pytest.mark.parametrize("arguments", [[], ["help"], ["--help"]])
def test_marjax_alone_prints_its_help(capsys, arguments):
    assert cli.main(arguments) == 0
    out, error = capsys.readouterr()
    assert not error and all(f"\n    {name}" in out for name in commands.NAMES)


@pytest.mark.parametrize(
    "line, meant",
    [
        ("trian", "'train'"),
        ("Train --config x", "'train'"),
        ("train_tokenizer", "'train-tokenizer'"),
        ("cache", "'cache-latents'"),
        ("evalute", "'evaluate'"),
        ("smaple --workdir x", "'sample'"),
        ("--workdir x train", "marjax train --workdir"),
        ("—help", "'--help'"),
        ("qqq", "marjax --help"),
    ],
)
def test_unknown_commands(capsys, line, meant):
    assert meant in failure(capsys, line)


@pytest.mark.parametrize(
    "flag, meant",
    [
        ("-workdir x", "--workdir;"),
        ("--work_dir x", "--workdir;"),
        ("—workdir x", "--workdir;"),
        ("––Workdir=x", "--workdir;"),
        ("--num-itr 3", "--num_iter;"),
        ("--temprature 1", "--temperature;"),
        ("--label 3", "--labels;"),
        ("--config digits", "--config"),
        ("--config.sample.cfg=3", "--cfg=3"),
        ("cfg=3", "--cfg;"),
        ("--qqqqq", "marjax sample --help"),
    ],
)
def test_unknown_flags_of_sample(capsys, flag, meant):
    assert meant in failure(capsys, f"sample --workdir w --out o {flag}")


@pytest.mark.parametrize(
    "flag, meant",
    [
        ("--steps 100", "--config.train.steps=100\n"),
        ("--steps=1e3", "--config.train.steps=1e3\n"),
        ("--batch-size 8", "--config.train.batch_size=8\n"),
        ("--lr 1e-3", "--config.train.lr=1e-3\n"),
        ("--train.lr=1", "--config.train.lr=1\n"),
        ("--num_iter 3", "--config.sample.num_iter=3\n"),
        ("train.lr=1e-3", "--config.train.lr=1e-3\n"),
        ("lr=1e-3", "--config.train.lr=1e-3\n"),
        ("config.train.lr=1e-3", "--config.train.lr=1e-3\n"),
        ("–config.train.lr 1e-3", "--config.train.lr=1e-3\n"),
        ("-config.train.lr=1", "--config.train.lr=1\n"),
        ("--image_sise 4", "--config.data.image_size=4\n"),
        ("--config train.steps=5", "--config.train.steps=5 "),
        ("--config.train.stpes=5", "'train.steps'"),
        ("--config.train.steps", "--config.train.steps=..."),
        ("--wrokdir w", "--workdir;"),
        ("--qqqqq", "--config.key=value"),
    ],
)
def test_unknown_flags_of_train(capsys, flag, meant):
    assert meant in failure(capsys, f"train --config {{digits}}:debug --workdir w {flag}")


def test_fields_of_the_section_of_a_command(capsys):
    assert "--config.tokenizer.train.steps=3\n" in failure(capsys, "train-tokenizer --config {digits} --steps 3")


@pytest.mark.parametrize(
    "line, meant",
    [
        ("train", "--config and --workdir"),
        ("train --config x", "--workdir missing"),
        ("sweep --root r", "FILE.py"),
        ("benchmark", "marjax benchmark train"),
        ("sample --workdir", "--workdir needs a value"),
        ("sample --workdir --out x", "--workdir needs a value"),
        ("sample --workdir w --out o --weights EMA", "'ema'"),
        ("sweep a.py --root r --engine_args --partition=x", "--engine_args=--partition=x\n"),
        ("train {digits} --workdir w", "write --config /"),
        ("sample runs/x --out o", "write --workdir runs/x"),
        ("sweep a.py b.py --root r", "'b.py'"),
        ("sample --workdir w --out o --weights emaa", "'ema'"),
        ("benchmark tran --config x", "'train'"),
        ("sample --workdir w --out o --num_iter 1.5", "--num_iter='1.5'"),
        ("prepare --images x --out o --val_share ten", "--val_share='ten'"),
    ],
)
def test_missing_unexpected_and_wrong_values(capsys, line, meant):
    assert meant in failure(capsys, line)


@pytest.mark.parametrize(
    "line, meant",
    [
        (
            "train --config {imagenet}:model=mar_base, variant=ar --workdir w",
            "imagenet256.py:model=mar_base,variant=ar\n",
        ),
        ("sample --workdir w --out o --labels 1, 2, 3", "--labels 1,2,3\n"),
        ("sample --workdir w --out o --labels=1, 2", "--labels=1,2\n"),
        ("sample --workdir w --labels 1 ,2", "--labels 1,2\n"),
        ("evaluate --workdir w --cfg 1, 2.9 --seed 1", "--cfg 1,2.9\n"),
        ("plot --workdir a, b --out c", "--workdir a b\n"),
        ("train --config {digits} --config.tokenizer.autoencoder.channel_mults=[1, 2]", "channel_mults=[1,2]\n"),
    ],
)
def test_a_blank_beside_a_comma(capsys, line, meant):
    assert meant in failure(capsys, line)


@pytest.mark.parametrize(
    "line, meant",
    [
        ("sample --workdir w --out x.jpg", "FILE.png"),
        ("sample --workdir w --out file", "file_out"),
        ("plot --workdir w --out x.png", "such as x\n"),
        ("prepare --images i --out file", "such as file_out\n"),
        ("evaluate --workdir w --out=x.json", "such as x\n"),
        ("stats --npz n --out folder", "such as folder/NAME.npz\n"),
        ("export --workdir w --out folder", "folder/NAME.safetensors\n"),
        ("train-classifier --config {digits} --out new/", "new/NAME.npz\n"),
    ],
)
def test_a_file_for_a_folder_and_vice_versa(tmp_path, monkeypatch, capsys, line, meant):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    assert meant in failure(capsys, line)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.fixture
def parsed(monkeypatch):
    """The namespace that a command is run with."""

    def parse(line):
        run_with = []
        name = shlex.split(line)[0]
        monkeypatch.setattr(commands.load(name), "run", run_with.append)
        assert cli.main(shlex.split(line)) == 0
        return run_with[0]

    return parse


def test_both_spellings_and_blanks_around_an_equals_sign(parsed):
    for line in ("--num_iter 1e1", "--num-iter=10", "--num-iter = 1_0", "--num_iter= 10", "--num_iter =10"):
        args = parsed(f"sample --workdir w --out o --cfg .5 {line}")
        assert (args.num_iter, args.cfg, args.workdir) == (10, 0.5, "w")
    assert parsed("convert --checkpoint x --out o --weights raw").weights == "raw"
    assert parsed("cache-latents --config x --out o --batch-size 3").batch_size == 3
    assert parsed("plot --workdir a b --out o --format png svg").workdir == ["a", "b"]


@pytest.mark.parametrize(
    "text",
    [
        "--config.train.steps 100",
        "--config.train.steps = 100",
        "--config.train.steps= 100",
        "--config.train.steps =100",
        "--config.train.steps=100",
    ],
)
def test_fields_and_blanks_around_an_equals_sign(parsed, text):
    assert parsed(f"train --config x --workdir w {text} --config.log.every 3").overrides == {
        "train.steps": "100",
        "log.every": "3",
    }
    assert parsed(f"benchmark {text} train --config x").overrides == {"train.steps": "100"}


def test_a_field_may_be_empty_or_negative(parsed):
    assert parsed("train --workdir w --config.mesh.data -1 --config.data.cache= --config x").overrides == {
        "mesh.data": "-1",
        "data.cache": "",
    }


def test_commands_run_without_a_command_line(tmp_path, capsys):
    """As in a notebook, with a Namespace instead of argv."""
    (tmp_path / "points.py").write_text("CONFIG = 'digits:debug'\ndef get_sweep():\n    yield 'a', {}\n")
    args = argparse.Namespace(file=str(tmp_path / "points.py"), root=str(tmp_path), only=None, jobs=None)
    args.engine, args.engine_args, args.table, args.status = "local", "", False, True
    commands.load("sweep").run(args)
    assert capsys.readouterr().out.split() == ["a", "unfinished"]
    args = argparse.Namespace(what="train", config=None, overrides={}, repeats=0, recompute=0)
    with pytest.raises(UserError, match="--config"):
        commands.load("benchmark").run(args)


def test_every_command_is_documented():
    for name in (*commands.NAMES, *commands.HIDDEN):
        command = commands.load(name)
        assert (
            command.run.__doc__
            and command.add_arguments
            and list(inspect.signature(command.run).parameters) == ["args"]
        )
    for name, parser in next(
        action for action in cli._parser()._actions if isinstance(action, argparse._SubParsersAction)
    ).choices.items():
        assert name in commands.HIDDEN or all(action.help for action in parser._actions), name


def test_the_examples_are_right():
    for name in commands.NAMES:
        program, command, *arguments = shlex.split(commands.load(name).EXAMPLE)
        assert (program, command) == ("marjax", name)
        given, overrides = cli.parse([command, *arguments])
        assert isinstance(given, argparse.Namespace) and isinstance(overrides, dict)


def test_no_two_flags_of_a_command_are_spelled_alike():
    subparsers = next(action for action in cli._parser()._actions if isinstance(action, argparse._SubParsersAction))
    for parser in subparsers.choices.values():
        assert isinstance(parser, Parser)
        options = [option for action in parser._actions for option in action.option_strings]
        assert len({option.replace("_", "").replace("-", "") for option in options}) == len(options)


def test_mistakes_do_not_wait_for_jax(tmp_path):
    """Importing JAX takes longer than everything else."""
    lines = [
        "trian",
        "train --steps 3",
        f"train --config {DIGITS} --workdir w --config.train.lr=x",
        "sample --workdir gone --out o",
        "sample --workdir w --num_iter x",
    ]
    code = (
        f"import sys; from marjax.cli import main\n"
        f"for line in {lines!r}: assert main(line.split()) == 2, line\n"
        f"assert main([]) == 0 and 'jax' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
    )
