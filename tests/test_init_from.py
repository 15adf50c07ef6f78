"""Fine-tuning: initial weights, exact resume and invalid sources."""

import json
import pathlib
import re
import shlex
import shutil

import jax
import numpy as np
import pytest
from flax import traverse_util
from PIL import Image
from support.compare import assert_same, lines
from support.configs import QUICK, flags, make_digits
from support.paths import DIGITS, PARITY, ROOT

from marjax import config as config_lib
from marjax import sharding, train
from marjax.assembly import assemble
from marjax.checkpoints.manager import Checkpoints
from marjax.cli import main
from marjax.errors import UserError
from marjax.interop.convert import convert
from marjax.models.init import abstract_params
from marjax.training import init_from
from marjax.training import state as state_lib
from marjax.training import train as train_lib
from marjax.workdir import read_workdir

TINY = {
    "model__width": 64,
    "model__encoder_depth": 2,
    "model__decoder_depth": 2,
    "model__num_heads": 4,
    "model__buffer_size": 8,
    "model__denoiser__depth": 2,
    "model__denoiser__width": 64,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run of two steps, whose EMA and raw weights differ."""
    workdir = tmp_path_factory.mktemp("source") / "run"
    train(make_digits(**QUICK, train__steps=2), workdir)
    return workdir


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("source") / "mar_tiny"
    convert(PARITY / "checkpoints" / "mar_tiny.pth", workdir)
    return workdir


def prepare(config, workdir, **init):
    """The config with `init` completed, and the loaded parameters."""
    config = config_lib.resolve(
        config_lib.apply_overrides(config, {f"init.{key}": str(value) for key, value in init.items()})
    )
    return init_from.prepare(config, workdir, sharding.make_mesh(1))


def start(config, taken):
    """The parameters at step 0 by path."""
    config = config_lib.resolve(config)
    assembly = assemble(config, sharding.make_mesh(1))
    state = state_lib.create(assembly.generator, assembly.optimizer, assembly.state, config.seed, taken)
    assert int(state.step) == 0
    assert_same(state.ema, state.params)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(state.params)) and not any(leaf.any() for leaf in moments)
    return flat(state.params)


def flat(params):
    return {path: np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(params, sep="/").items()}


def weights_of(workdir, item):
    config = read_workdir(workdir)
    generator = assemble(config).generator
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        abstract = abstract_params(generator, sharding.make_mesh(1))
        return flat(checkpoints.restore({item: abstract}).items[item])


def fresh_in(text):
    return set(re.findall(r"^randomly initialised: (\S+),", text, re.M))


def test_released_weights(tmp_path, converted, capsys):
    """Three classes instead of ten, 16 tokens of dimension 4 instead of 64 of 16; all else is loaded exactly."""
    config = make_digits(**TINY, data__num_classes=10)
    config.data.num_classes = 3
    filled, taken = prepare(config, tmp_path / "run", path=converted)
    said = capsys.readouterr().err
    found = start(config, taken)
    theirs, random = weights_of(converted, "ema"), start(config, {})
    fresh = fresh_in(said)
    assert fresh == {
        "class_embedding",
        "backbone/z_proj/kernel",
        *(f"backbone/{name}_pos_embed" for name in ("encoder", "decoder", "z")),
        *(f"head/denoiser/{name}" for name in ("input_proj/kernel", "final_linear/kernel", "final_linear/bias")),
    }
    assert "class_embedding, (3, 64), in the source (10, 64)" in said and "kl16" in said
    for path, value in found.items():
        np.testing.assert_array_equal(value, random[path] if path in fresh else theirs[path])
    assert any((random[path] != theirs[path]).any() for path in found.keys() - fresh)
    assert filled.init.weights == "ema" and filled.init.step == 0 and len(filled.init.checksum) == 64
    assert not list(tmp_path.iterdir())


def test_ema_weights_by_default_and_raw_on_request(tmp_path, source):
    config = make_digits(**QUICK)
    filled, ema = prepare(config, tmp_path, path=source)
    _, raw = prepare(config, tmp_path, path=source, weights="raw", step=2)
    assert (filled.init.weights, filled.init.step) == ("ema", 2)
    for found, item in ((ema, "ema"), (raw, "params")):
        theirs = weights_of(source, item)
        assert found.keys() == theirs.keys() and all((value == theirs[path]).all() for path, value in found.items())
    assert any((ema[path] != raw[path]).any() for path in raw)
    prepare(config, tmp_path, path=source, checksum=filled.init.checksum)
    with pytest.raises(UserError, match=r"init\.checksum"):
        prepare(config, tmp_path, path=source, weights="raw", checksum=filled.init.checksum)


def test_another_head_is_initialised_entirely(tmp_path, source, codebook, capsys):
    from support.configs import make_model

    _, taken = prepare(make_model("ar", "categorical", codebook), tmp_path, path=source)
    assert taken.keys() == {path for path in weights_of(source, "ema") if not path.startswith("head/")}
    assert fresh_in(capsys.readouterr().err) == {"head/logits/bias", "head/logits/kernel"}
    with pytest.raises(UserError, match=r"variant=ar"):
        prepare(make_digits(), tmp_path, path=source)


def test_a_denoiser_of_another_size(tmp_path, converted, capsys):
    config = make_digits(**TINY | {"model__denoiser__depth": 1})
    prepare(config, tmp_path, path=converted)
    said = capsys.readouterr().err
    assert "head/denoiser/blocks/fc1/kernel" in fresh_in(said)
    assert "head/denoiser/cond_embed/kernel" not in fresh_in(said)
    assert "--config.model.denoiser.depth=2" in said and "denoiser.width=" not in said


def test_resume_is_exact_without_the_source(tmp_path, source, monkeypatch):
    own = shutil.copytree(source, tmp_path / "source")
    config, begun, given = make_digits(**QUICK, seed=1), [], []
    real = state_lib.create
    monkeypatch.setattr(
        train_lib.state_lib,
        "create",
        lambda *args: begun.append(flat((state := real(*args)).params)) or given.append(args[-1]) or state,
    )
    whole = train(config, tmp_path / "run", init_from=own)
    theirs = weights_of(source, "ema")
    assert all((value == theirs[path]).all() for path, value in begun[0].items())
    assert given == [{}]  # freed
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())["init"]
    assert recorded["path"] == str(own) and recorded["step"] == 2 and recorded["weights"] == "ema"
    killed = shutil.copytree(tmp_path / "run", tmp_path / "killed")
    shutil.rmtree(killed / "checkpoints")  # as if killed before the first
    (killed / "metrics.jsonl").unlink()
    assert_same(train(config, killed), whole)
    assert lines(killed) == lines(tmp_path / "run") and len(begun) == 2

    moved = own.rename(tmp_path / "moved")
    for init in (own, moved):
        parts = shutil.copytree(tmp_path / "run", tmp_path / f"parts of {init.name}")
        shutil.rmtree(parts / "checkpoints" / "4")
        assert_same(train(config, parts, init_from=init), whole)
        assert lines(parts) == lines(tmp_path / "run")
    assert read_workdir(tmp_path / "parts of moved").init.path == str(moved)
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"init\.checksum"):
        train(config, tmp_path / "run", init_from=tmp_path / "killed")  # other weights
    with pytest.raises(UserError, match=r"init\.checksum"):
        train(make_digits(**QUICK, train__steps=2), source, init_from=moved)  # started from random weights
    shutil.rmtree(killed / "checkpoints")
    with pytest.raises(UserError, match=r"init\.path.*source"):
        train(config, killed, init_from=own)
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_invalid_sources(tmp_path, source, converted, capsys):
    (tmp_path / "empty").mkdir()
    no_checkpoint = tmp_path / "no_checkpoint"
    no_checkpoint.mkdir()
    shutil.copy(source / "config.json", no_checkpoint)
    damaged = shutil.copytree(converted, tmp_path / "damaged")
    for path in (damaged / "checkpoints" / "0" / "ema").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-7])
    before = {path.name for path in tmp_path.iterdir()}

    def refused(given, fields, says):
        arguments = ["train", "--config", f"{DIGITS}:debug", "--workdir", str(tmp_path / "run"), *flags(fields)]
        assert main([*arguments, "--init_from", str(given)]) == 2
        said = capsys.readouterr().err.splitlines()
        assert re.search(says, said[-1]) and not any("Traceback" in line for line in said), said
        assert {path.name for path in tmp_path.iterdir()} == before
        return said[-1]

    refused(tmp_path / "gone", QUICK, r"--init_from.*gone")
    refused(tmp_path / "empty", QUICK, r"--init_from.*empty has no config\.json")
    refused(no_checkpoint, QUICK, "no_checkpoint")
    refused(damaged, TINY, "damaged")
    refused(source, QUICK | {"init__step": 7}, "step 7")
    refused(converted, TINY | {"init__weights": "raw"}, r"init\.weights.*only ema")
    refused(converted, TINY | {"init__weights": "best"}, r"init\.weights")
    refused(converted, TINY | {"model__variant": "ar", "sample__num_iter": 16}, "--config.model.variant=mar")
    refused(converted, TINY | {"model__diffusion__num_steps": 100}, r"--config\.model\.diffusion\.num_steps=1000")
    refused(converted, TINY | {"model__num_heads": 2}, r"--config\.model\.num_heads=4$")
    advice = refused(converted, {}, r"model\.width \(64, not 32\)").split("; set ")[1]
    named = dict(each.removeprefix("--config.").split("=") for each in advice.split())
    assert named.keys() == {f"model.{name}" for name in ("width", "encoder_depth", "decoder_depth", "buffer_size")}
    prepare(config_lib.apply_overrides(make_digits(), named), tmp_path / "run", path=converted)  # as advised


def test_training_in_a_converted_work_directory_suggests_a_new_run(converted, capsys):
    before = (converted / "config.json").read_bytes()
    with pytest.raises(UserError, match="init_from="):
        train(make_digits(), converted)
    assert main(["train", "--config", f"{DIGITS}:debug", "--config.train.lr=1e-5", "--workdir", str(converted)]) == 2
    command = shlex.split(capsys.readouterr().err.split(": ")[-1])
    assert command == [
        "marjax",
        "train",
        "--config",
        f"{DIGITS}:debug",
        "--config.train.lr=1e-5",
        "--init_from",
        str(converted),
        "--workdir",
        f"{converted}_finetuned",
    ]
    assert (converted / "config.json").read_bytes() == before


@pytest.mark.slow
def test_the_commands_of_the_docs(tmp_path, monkeypatch, capsys):
    """Runs the small commands of docs/finetuning.md; the others have equal arguments."""
    text = (ROOT / "docs" / "finetuning.md").read_text()
    blocks = [
        [shlex.split(line)[1:] for line in block.replace("\\\n", " ").splitlines()]
        for block in re.findall(r"```bash\n(.*?)```", text, re.S)
    ]
    large, small = blocks
    assert (
        [command[0] for command in large]
        == [command[0] for command in small]
        == ["convert", "prepare", "train", "sample"]
    )
    monkeypatch.chdir(tmp_path)
    pathlib.Path("tests").symlink_to(ROOT / "tests")
    rng = np.random.default_rng(0)
    for label in ("cats", "dogs", "owls"):
        pathlib.Path("pictures", label).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(rng.integers(0, 256, (40, 36, 3), np.uint8)).save(f"pictures/{label}/{i}.png")
    for command in small:
        short = [
            *command,
            *flags(
                {
                    "train__steps": 2,
                    "train__warmup_steps": 1,
                    "log__samples_every": 0,
                    "sample__num_iter": 4,
                    "log__tensorboard": False,
                }
            ),
        ]
        assert main(short if command[0] == "train" else command) == 0, capsys.readouterr().err
    said = capsys.readouterr().err
    assert "class_embedding" in fresh_in(said) and "backbone/encoder_pos_embed" not in fresh_in(said)
    assert pathlib.Path("samples/grid.png").exists() and jax.process_count() == 1
