"""Training of autoencoders: the step by hand, exact resume, the file, user errors."""

import json
import pathlib
import re
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.configs import make_autoencoder
from support.paths import ROOT
from support.processes import Run

from marjax import config as config_lib
from marjax import distributed
from marjax.checkpoints.manager import Checkpoints
from marjax.cli import main
from marjax.errors import TrainingError, UserError
from marjax.tokenizer_training.autoencoder import train_autoencoder
from marjax.tokenizer_training.autoencoder_step import Trainer
from marjax.tokenizer_training.discriminator import adaptive_weight
from marjax.tokenizer_training.reconstruction import check
from marjax.tokenizers import autoencoder_file, open_tokenizer
from marjax.tokenizers.spec import spec_of
from marjax.workdir import read_workdir

SMALL = {
    "batch_size": 16,
    "steps": 4,
    "lr": 1e-3,
    "warmup_steps": 2,
    "log_every": 1,
    "checkpoint_every": 2,
    "pictures_every": 4,
    "scale_images": 64,
}
DISC = {"disc__weight": 0.5, "disc__start": 1, "disc__width": 32, "disc__layers": 1}


def make(name="kl", **train):
    """A config of 256 digits and a tiny network of this kind."""
    given = {f"tokenizer__train__{key}": value for key, value in (SMALL | train).items()}
    return make_autoencoder(name, "unused.safetensors", data__split="train[:256]", data__num_examples=256, **given)


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def trees(workdir, step=4):
    """Everything in a checkpoint."""
    config = read_workdir(workdir)
    trainer = Trainer.from_config(config, spec_of(config_lib.tokenizer_config(config), 1))
    state = jax.eval_shape(trainer.init, jax.random.key(0))
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        items = checkpoints.restore(
            {"params": state.params, "ema": state.ema, "optimizer": {"step": state.step, **state.rest}}, step
        ).items
    return jax.device_get(items)


@pytest.fixture(scope="module", params=["kl", "vq"])
def trained(request, tmp_path_factory):
    """With codes and a discriminator, the state has all its optional parts."""
    folder, name = tmp_path_factory.mktemp("trained"), request.param
    config = make("kl", steps=2) if name == "kl" else make("vq", **DISC)
    return config, folder / f"{name}.safetensors", train_autoencoder(config, folder / f"{name}.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["vq"], indirect=True)
def test_four_steps_are_two_and_two_more(trained, tmp_path):
    config, path, whole = trained
    workdir = path.with_suffix("")
    train_autoencoder(make("vq", steps=2, **DISC), tmp_path / "first.safetensors", workdir=tmp_path / "parts")
    parts = train_autoencoder(config, tmp_path / "parts.safetensors")
    assert parts["checksum"] == whole["checksum"] and parts["scale"] == whole["scale"]
    assert (tmp_path / "first.safetensors").read_bytes() != (tmp_path / "parts.safetensors").read_bytes()
    assert path.read_bytes() == (tmp_path / "parts.safetensors").read_bytes()
    state = trees(workdir)
    jax.tree.map(np.testing.assert_array_equal, state, trees(tmp_path / "parts"))
    lines = rows(tmp_path / "parts")
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and lines[-1]["train/l1"] < lines[0]["train/l1"]
    # The discriminator starts at step 1, the second.
    assert [line["train/disc_weight"] > 0 for line in lines] == [False, True, True, True]
    # The file has the EMA weights, which differ from the raw ones.
    assert (state["ema"]["decoder"]["conv_out"]["kernel"] != state["params"]["decoder"]["conv_out"]["kernel"]).any()
    assert len(list((workdir / "samples").glob("reconstructions_*.png"))) == 1


def test_the_file_is_a_tokenizer_whose_latents_have_unit_variance(trained):
    config, path, report = trained
    name = "kl" if config.tokenizer.name == "kl" else "vq_continuous"
    config = config_lib.apply_overrides(config, {"tokenizer.path": str(path), "tokenizer.name": name})
    config = config_lib.resolve(config)
    tokenizer = open_tokenizer(config_lib.tokenizer_config(config))
    assert tokenizer.checksum == report["checksum"] and tokenizer.scale == report["scale"]
    again = check(config=config, num_images=64, batch_size=32, seed=config.seed)
    assert again["psnr"] == pytest.approx(report["psnr"], abs=1e-3)
    assert again["std"] * tokenizer.scale == pytest.approx(1.0, abs=1e-4)
    if config.tokenizer.name != "kl":
        assert again["codes_used"] == report["codes_used"] <= report["num_codes"] == 16


def test_flips_and_the_order_of_batches_do_not_change_the_scale(trained, tmp_path):
    config, path, report = trained
    with pytest.raises(UserError, match=r"data\.flip"):
        train_autoencoder(config_lib.apply_overrides(config, {"data.flip": True}), path)
    # Settings that do not affect training may change; the run is already finished.
    free = {"tokenizer.train.log_every": 2, "data.workers": 0, "train.batch_size": 8, "model.width": 64}
    again = train_autoencoder(config_lib.apply_overrides(config, free), path)
    assert (again["checksum"], again["scale"]) == (report["checksum"], report["scale"])


def test_a_file_with_other_weights_is_not_replaced(trained, tmp_path):
    config, path, _ = trained
    stored = autoencoder_file.read(path)
    other = tmp_path / "other.safetensors"
    autoencoder_file.write(other, stored.spec, stored.params, 2.0)
    before = other.read_bytes()
    with pytest.raises(UserError, match="another autoencoder"):
        train_autoencoder(config, other, workdir=path.with_suffix(""))
    assert other.read_bytes() == before


def test_the_step_is_the_gradient_of_the_weighted_sum():
    """With a discriminator, against the gradient of the whole loss with the weight of the formula."""
    config = config_lib.resolve(make("kl", **DISC | {"disc__start": 0}))
    trainer = Trainer.from_config(config, spec_of(config_lib.tokenizer_config(config), 1))
    state = jax.jit(trainer.init)(jax.random.key(0))
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), np.uint8)
    image = pixels.astype(np.float32) / 127.5 - 1.0
    key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 0))[0]

    def terms(params):
        (made, term), _ = trainer.forward(params, image, key)
        looks = trainer.discriminator.apply({"params": state.rest["disc"]["params"]}, made)
        return jnp.mean(jnp.abs(made - image)), term, -jnp.mean(looks)

    def last(index):
        return jax.grad(lambda params: terms(params)[index])(state.params)["decoder"]["conv_out"]["kernel"]

    @jax.jit
    def by_hand(params):
        weight = 0.5 * adaptive_weight(last(0), last(2))
        weights = jnp.stack([1.0, 1.0, weight])
        grads = jax.grad(lambda params: jnp.dot(jnp.stack(terms(params)), weights))(params)
        return weight, jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(grads)))

    weight, norm = by_hand(state.params)
    new, metrics = jax.jit(trainer.step)(state, {"image": pixels})
    np.testing.assert_allclose(metrics["train/disc_weight"], weight, rtol=1e-4)
    np.testing.assert_allclose(metrics["train/grad_norm"], norm, rtol=1e-4)
    without, plain = jax.jit(Trainer.from_config(config_lib.resolve(make("kl")), trainer.spec).step)(
        state.replace(rest={"opt_state": state.rest["opt_state"]}), {"image": pixels}
    )
    assert abs(plain["train/grad_norm"] / norm - 1) > 1e-3 and int(without.step) == int(new.step) == 1
    for name, layer in state.rest["disc"]["params"].items():
        if "kernel" in layer:
            assert (new.rest["disc"]["params"][name]["kernel"] != layer["kernel"]).any()


def test_straight_through_gradient_and_restart_of_idle_codes():
    config = config_lib.resolve(make("vq"))
    trainer = Trainer.from_config(config, spec_of(config_lib.tokenizer_config(config), 1))
    state = jax.jit(trainer.init)(jax.random.key(0))
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), np.uint8)
    image = pixels.astype(np.float32) / 127.5 - 1.0

    def made(params):
        return jnp.mean(trainer.forward(params, image, jax.random.key(0))[0][0] ** 2)

    grads = jax.jit(jax.grad(made))(state.params)
    assert (grads["encoder"]["conv_in"]["kernel"] != 0).any()  # straight-through
    assert (grads["codebook"] == 0).all()  # moved by its own term only
    before = np.asarray(trainer.network.apply({"params": state.params}, image, method="encode")).reshape(-1, 4)
    new, _ = jax.jit(trainer.step)(state, {"image": pixels})
    # At step 0 every code is idle and moves to a latent.
    distance = np.abs(np.asarray(new.params["codebook"])[:, None] - before).max(-1).min(1)
    assert distance.max() < 1e-5 and (new.rest["usage"] == 1.0).all()
    assert len(np.unique(np.asarray(new.params["codebook"]), axis=0)) > 8
    # Used codes stay, unused ones move again.
    usage = jnp.where(jnp.arange(16) == 3, 0.0, 1.0)
    codebook = new.params["codebook"].at[3].set(1e3)
    state = new.replace(params={**new.params, "codebook": codebook}, rest={**new.rest, "usage": usage})
    after, _ = jax.jit(trainer.step)(state, {"image": pixels})
    assert abs(after.params["codebook"][3]).max() < 1e2 and after.rest["usage"][3] == 1.0
    kept = np.asarray(after.rest["usage"]) != 1.0
    assert kept.any() and (np.abs(after.params["codebook"] - codebook)[kept] < 0.01).all()


def train_together(path):
    distributed.start()
    assert jax.device_count() == 4
    train_autoencoder(make("vq", **DISC), path)
    return distributed.end(0, None)


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["vq"], indirect=True)
def test_two_processes_of_two_devices_train_what_one_trains(trained, tmp_path):
    _, path, _ = trained
    with Run(tmp_path, train_together, tmp_path / "four.safetensors", count=2, devices=2) as run:
        assert run.wait() == [0, 0], run.said()
    assert autoencoder_file.read(tmp_path / "four.safetensors").scale > 0
    # Parameters are not compared: with one channel per norm group, the gradient of the preceding bias is pure rounding,
    # which Adam scales up.
    names = ("train/loss", "train/l1", "train/disc_weight", "train/grad_norm")
    one, four = (
        [[row[name] for name in names] for row in rows(workdir)]
        for workdir in (path.with_suffix(""), tmp_path / "four")
    )
    assert one[0] != one[1]
    np.testing.assert_allclose(four, one, rtol=1e-4)


@pytest.mark.parametrize(
    "config, out, said",
    [
        ({"name": "pixels"}, "a.safetensors", "'pixels'"),
        ({}, "a.npz", r"a\.npz .*\.safetensors"),
        ({"lpips__weight": 1.0}, "a.safetensors", r"config\.tokenizer\.train\.lpips\.vgg"),
        ({"disc__weight": 1.0}, "a.safetensors", "24 .*image_size"),
        ({"disc__weight": 1.0, "disc__layers": 1, "disc__width": 40}, "a.safetensors", "multiple of 32"),
        ({"batch_size": 0}, "a.safetensors", "train.batch_size"),
        ({"lr": -1.0}, "a.safetensors", "train.lr"),
        ({"b2": 1.0}, "a.safetensors", "train.b2"),
        ({"kl_weight": -1.0}, "a.safetensors", "kl_weight"),
    ],
)
def test_refused_before_anything_is_written(tmp_path, config, out, said):
    name = config.pop("name", "kl")
    with pytest.raises(UserError, match=said):
        train_autoencoder(make(name, **config), tmp_path / out)
    assert not list(tmp_path.iterdir())


def test_an_existing_file_is_reported_before_training(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"precious")
    with pytest.raises(UserError, match=r"a\.safetensors"):
        train_autoencoder(make(), tmp_path / "a.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(TrainingError, match=r"config\.tokenizer\.train\.lr"):
        train_autoencoder(make(lr=1e38, warmup_steps=0, clip=1e30), tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.slow
def test_the_two_stages_of_the_docs(tmp_path, monkeypatch, capsys):
    """Every command of docs/own_tokenizer.md that needs no other files, in the debug forms of its configs."""
    text = (ROOT / "docs" / "own_tokenizer.md").read_text()
    block = next(block for block in re.findall(r"```bash\n(.*?)```", text, re.S) if "train-tokenizer" in block)
    lines = block.replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.strip()]
    assert [command[0] for command in commands] == ["train-tokenizer", "tokenizer", "train", "sample"]
    monkeypatch.chdir(tmp_path)
    pathlib.Path("configs").symlink_to(ROOT / "configs")
    for command in commands:
        short = [
            f"{word},debug" if word.startswith("configs/") else word.replace("kl.safe", "kl_debug.safe")
            for word in command
            if not word.startswith("--config.train.")
        ]
        assert main(short) == 0, capsys.readouterr().err
    assert pathlib.Path("runs/mar_kl/out/grid.png").exists()
