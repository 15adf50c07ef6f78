"""The reference's checkpoints as work directories, and back: weights to the bit, samples to the recorded numbers."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.compare import parity, relative_error
from support.configs import make_digits
from support.paths import PARITY, ROOT
from support.pytorch_files import Call, Global, storage, tensor, write_zip

from marjax import config as config_lib
from marjax import sample, sharding, train
from marjax.assembly import assemble
from marjax.checkpoints.manager import Checkpoints
from marjax.cli import main
from marjax.errors import UserError
from marjax.generation.plan import cfg_scales, generation_plan, group_stages
from marjax.generation.sample import open_sampler
from marjax.generation.sampler import SampleRandomness, generate
from marjax.heads.diffusion import SampleNoise
from marjax.heads.gaussian_diffusion import cosine_schedule
from marjax.interop import reference, weights_file
from marjax.interop.convert import convert
from marjax.interop.convert_tokenizer import convert_tokenizer, read_autoencoder
from marjax.interop.export import export
from marjax.models.init import abstract_params
from marjax.tokenizers import autoencoder_file, open_tokenizer
from marjax.workdir import claim_workdir, read_workdir

FILES = PARITY / "checkpoints"
OFFICIAL, BARE, OLD, VAE = (
    FILES / name for name in ("mar_tiny.pth", "mar_tiny.safetensors", "mar_tiny_legacy.pth", "kl_small.ckpt")
)
FLOAT32 = {"model.dtype": "float32", "sample.max_stages": 2}
HEADS = FLOAT32 | {"model.num_heads": 4}
SCALE = {"tokenizer.autoencoder.scale": 0.2325}


@pytest.fixture(scope="module")
def ema(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("convert") / "ema"
    assert convert(OFFICIAL, workdir, overrides=FLOAT32).weights == "ema"
    return workdir


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("convert") / "raw"
    done = convert(OFFICIAL, workdir, weights="raw", overrides=FLOAT32)
    assert done.weights == "raw" and done.is_new
    return workdir


def restored(workdir, weights="ema"):
    """The network and the parameters that `marjax sample` would use; its autoencoder nobody has here."""
    config = read_workdir(workdir)
    generator = assemble(config).generator
    item = {"ema": "ema", "raw": "params"}[weights]
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.trees() == checkpoints.trees(0) == [item]
        return generator, checkpoints.restore({item: abstract_params(generator, sharding.make_mesh(1))}).items[item]


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def tensors(path):
    """What a file of weights holds, read into memory."""
    content = weights_file.read(path).content
    return {name: np.asarray(each) for name, each in content.items()}


def equal(a, b):
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes() and a[name].shape == b[name].shape
        for name in a
    )


# --- The reference's own numbers -------------------------------------------------------------------------------------


def test_a_whole_generation(ema, raw):
    arrays, theirs = parity("mar_sample_cfg_linear")

    def draw(generator, params):
        plan = generation_plan(64, theirs["num_iter"])
        scales = cfg_scales(plan, theirs["cfg"], theirs["cfg_schedule"])
        stages = group_stages(plan, 2, lambda known, new: known + new)
        noise = SampleNoise(
            jnp.asarray(arrays["in/init_noise"]), jnp.moveaxis(jnp.asarray(arrays["in/step_noise"]), 0, 2)
        )
        rand = SampleRandomness(jnp.asarray(arrays["in/orders"][:, ::-1]), noise)
        return generate(
            generator,
            params,
            jnp.asarray(arrays["in/labels"]),
            rand,
            jnp.asarray(scales, jnp.float32),
            jnp.float32(theirs["temperature"]),
            stages=stages,
            num_sampling_steps=theirs["num_sampling_steps"],
        )

    assert relative_error(draw(*restored(ema)), arrays["out/tokens"]) < 1e-4
    assert relative_error(draw(*restored(raw, "raw")), arrays["out/tokens"]) > 1e-2


def test_the_arguments_become_the_config(ema, raw):
    config = read_workdir(ema)
    assert config == read_workdir(raw)
    assert config.model.to_dict() == config_lib.conform(config_lib.base()).model.to_dict() | dict(
        dtype="float32",
        width=64,
        encoder_depth=2,
        decoder_depth=2,
        num_heads=4,
        buffer_size=8,
        mlp_ratio=4.0,
        denoiser=dict(depth=2, width=64, remat="none"),
    )
    assert config.tokenizer.name == "kl16" and config.tokenizer.patch_size == 1 and config.tokenizer.path == ""
    assert (config.data.image_size, config.data.num_classes, config.data.channels) == (128, 10, 3)
    assert config.sample.num_sampling_steps == "10" and config.train.ema_decay == 0.9999


def test_the_autoencoder(tmp_path):
    numbers = np.load(FILES / "kl_small.npz")
    made, is_new = convert_tokenizer(VAE, tmp_path / "kl.safetensors")
    assert is_new and made.name == "kl" and (made.spec.stride, made.spec.embed_dim, made.scale) == (2, 4, None)
    config = config_lib.base()
    config.tokenizer.update(name="kl", path=str(tmp_path / "kl.safetensors"))
    fields = made.spec.to_json()
    fields.pop("num_codes")
    config.tokenizer.autoencoder.update(fields | {"scale": 0.5})
    tokenizer = open_tokenizer(config_lib.tokenizer_config(config))
    moments = tokenizer.moments(tokenizer.params, jnp.asarray(numbers["in/images"]).transpose(0, 2, 3, 1))
    assert relative_error(moments.transpose(0, 3, 1, 2), numbers["out/moments"]) < 1e-4
    decoded = tokenizer.decode(tokenizer.params, moments[..., :4] * 0.5)
    assert relative_error(decoded.transpose(0, 3, 1, 2), numbers["out/decoded_mean"]) < 1e-4
    # Once more, into the same file and another; and of our own file.
    before = (tmp_path / "kl.safetensors").read_bytes()
    assert not convert_tokenizer(VAE, tmp_path / "kl.safetensors")[1]
    assert convert_tokenizer(tmp_path / "kl.safetensors", tmp_path / "again.safetensors")[1]
    assert (tmp_path / "kl.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes() == before


# --- Which weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", [BARE, OLD])
def test_files_with_one_set_of_weights(raw, tmp_path, caplog, file):
    done = convert(file, tmp_path / "a", overrides=HEADS)
    assert done.weights == "raw" and "score far worse" in caplog.text and str(file) in caplog.text
    expected = restored(raw, "raw")[1]
    jax.tree.map(np.testing.assert_array_equal, restored(tmp_path / "a", "raw")[1], expected)
    caplog.clear()
    assert convert(file, tmp_path / "b", weights="ema", overrides=HEADS).weights == "ema"
    assert not caplog.records
    jax.tree.map(np.testing.assert_array_equal, restored(tmp_path / "b")[1], expected)


def test_wrapped_weights_and_buffers_to_the_bit(ema, tmp_path):
    """Through the command line: names of torch.compile and FSDP, and integer tables that no parameter has."""
    content = weights_file.read(OFFICIAL).content["model_ema"]
    arrays = {
        name.replace("blocks.", "blocks._orig_mod.").replace("attn.", "attn._fsdp_wrapped_module."): np.asarray(each)
        for name, each in content.items()
    }
    arrays |= {"encoder_blocks.0.attn.index": np.arange(4), "n_averaged": np.array(7)}
    schedule = cosine_schedule(1000)  # of another one, the tables are refused
    arrays |= {
        f"diffloss.train_diffusion.{key}": getattr(schedule, key)
        for key in ("betas", "alphas_cumprod", "posterior_log_variance_clipped", "posterior_mean_coef1")
    }
    save_file({f"module.{name}": array for name, array in arrays.items()}, tmp_path / "x.safetensors")
    argv = [
        "convert",
        "--checkpoint",
        str(tmp_path / "x.safetensors"),
        "--out",
        str(tmp_path / "run"),
        "--weights",
        "ema",
        "--config.model.num_heads=4",
        "--config.model.dtype=float32",
    ]
    assert main(argv) == 0
    jax.tree.map(np.testing.assert_array_equal, restored(tmp_path / "run")[1], restored(ema)[1])


def test_only_the_weights_asked_for_are_read(tmp_path, monkeypatch):
    reads = []
    real = weights_file.pytorch._Region.read
    monkeypatch.setattr(
        weights_file.pytorch._Region, "read", lambda self, *span: reads.append(self.size) or real(self, *span)
    )
    convert(OFFICIAL, tmp_path / "run", overrides=FLOAT32)
    assert len(reads) == 92 + 2 and sum(reads) < 1.3e6 < OFFICIAL.stat().st_size / 1.8


def test_training_cannot_go_on_and_says_so(raw, ema):
    for workdir, item in ((raw, "params"), (ema, "ema")):
        config = read_workdir(workdir)
        generator = assemble(config).generator
        abstract = abstract_params(generator, sharding.make_mesh(1))
        trees = {"params": abstract, "ema": abstract, "optimizer": {"step": abstract["null_embedding"]}}
        with (
            Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints,
            pytest.raises(UserError, match=f"has only {item}, not .*--init_from"),
        ):
            checkpoints.restore(trees)


# --- Work directories ------------------------------------------------------------------------------------------------


def test_a_second_time_and_other_contents(ema, tmp_path):
    run = shutil.copytree(ema, tmp_path / "run")
    before = files(run)
    again = convert(OFFICIAL, run, overrides=FLOAT32)
    assert not again.is_new and again.num_params == sum(each.size for each in tensors(BARE).values())
    for given, text in (
        ({"weights": "raw"}, "other checkpoints"),
        ({"overrides": {}}, "another config .model.dtype"),
        ({"tokenizer": VAE, "overrides": FLOAT32 | SCALE}, "was trained on latents of 16 channels"),
    ):
        with pytest.raises(UserError, match=text):
            convert(OFFICIAL, run, **{"overrides": FLOAT32} | given)
    with pytest.raises(UserError, match="other weights"):
        convert(
            change(tmp_path, "fake_latent", lambda x: x + 1),
            run,
            weights="ema",
            overrides=arguments() | HEADS | {"data.num_classes": 10},
        )
    assert files(run) == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "x").write_text("y")
    (tmp_path / "empty").mkdir()
    for wrong, text in (
        (tmp_path / "notes", "has files but no config.json"),
        (tmp_path / "notes" / "x", "is a file"),
        ("gs://bucket/run", "is not local"),
    ):
        with pytest.raises(UserError, match=text):
            convert(OFFICIAL, wrong, overrides=FLOAT32)
    assert convert(OFFICIAL, tmp_path / "empty", overrides=FLOAT32).is_new
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "notes", "run", "x.safetensors"]


def arguments():
    """Overrides that say what the official file's arguments say and no shapes tell."""
    config = config_lib.flatten(config_lib.base())
    return {"sample.num_sampling_steps": "10", "model.diffusion_batch_mul": config["model.diffusion_batch_mul"]}


def change(tmp_path, name, function):
    """The EMA weights as a safetensors file, with one of them changed; None leaves it out."""
    content = weights_file.read(OFFICIAL).content["model_ema"]
    arrays = {key: np.asarray(each) for key, each in content.items()}
    arrays[name] = function(arrays.get(name))
    save_file({key: array for key, array in arrays.items() if array is not None}, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


@pytest.mark.parametrize(
    "name, function, text",
    [
        ("mask_token", lambda x: None, "mask_token is missing"),
        ("decoder_blocks.1.mlp.fc2.bias", lambda x: None, "decoder_blocks.1.mlp.fc2.bias is missing"),
        ("diffloss.train_diffusion.betas", lambda x: np.zeros(3, np.float32), "betas is not used"),
        ("diffloss.train_diffusion.betas", lambda x: np.linspace(1e-4, 0.02, 1000), "betas is not used"),
        ("decoder_norm.weight", lambda x: x[:5], r"decoder_norm.weight has shape \(5,\)"),
        (
            "z_proj.weight",
            lambda x: None,
            "no MAR model of the reference: z_proj.weight is missing .there are 91 tensors",
        ),
        ("z_proj.weight", lambda x: x[:, :15], "15 values, which are no square of patches"),
        ("decoder_embed.weight", lambda x: x[:32], "decoder is 32 wide and its encoder 64"),
        ("fake_latent", lambda x: x * np.nan, "not a number, in null_embedding"),
        ("fake_latent", lambda x: x.astype(np.int32), r"no floating point numbers: fake_latent \(int32\)"),
        ("encoder.conv_in.weight", lambda x: np.zeros(1, np.float32), "encoder.conv_in.weight is not used"),
        ("encoder_blocks.30000000.x", lambda x: np.zeros(1, np.float32), "layer 30000000 "),
        (f"decoder_blocks.{'9' * 5000}.x", lambda x: np.zeros(1, np.float32), "layer 99999999999999999999"),
    ],
)
def test_every_tensor_is_used_and_every_parameter_filled(tmp_path, name, function, text):
    file = change(tmp_path, name, function)
    with pytest.raises(UserError, match=f"{file} cannot be converted: .*{text}"):
        convert(file, tmp_path / "run", weights="ema", overrides=HEADS)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_half_precision_is_widened(tmp_path):
    import ml_dtypes

    file = change(tmp_path, "fake_latent", lambda x: x.astype(ml_dtypes.bfloat16))
    assert weights_file.read(file).content["fake_latent"].dtype == ml_dtypes.bfloat16
    convert(file, tmp_path / "run", weights="ema", overrides=HEADS)
    expected = tensors(BARE) | tensors(file)
    export(tmp_path / "run", tmp_path / "y.safetensors")
    assert equal(tensors(tmp_path / "y.safetensors"), {k: v.astype(np.float32) for k, v in expected.items()})


@pytest.mark.parametrize(
    "file, given, text",
    [
        (BARE, {}, "number of attention heads .* give --config.model.num_heads=N"),
        (VAE, {}, "is an autoencoder, not a MAR model: give it by --tokenizer"),
        (OFFICIAL, {"weights": "best"}, "weights is 'best'"),
        (OFFICIAL, {"overrides": {"model.widht": 3}}, "unknown config key 'model.widht'; the closest is 'model.width'"),
        (OFFICIAL, {"overrides": {"model.width": 128}}, "do not match"),
        (OFFICIAL, {"tokenizer": BARE}, "encoder.conv_in.weight is missing"),
        (BARE, {"tokenizer": VAE, "overrides": HEADS}, "give --config.tokenizer.autoencoder.scale"),
        (
            BARE,
            {"tokenizer": VAE, "overrides": {**HEADS, "tokenizer.autoencoder.scale": "abc"}},
            "'abc': expected float",
        ),
        (PARITY / "lr_schedule.json", {}, "is a text, not a checkpoint"),
        (PARITY / "none.pth", {}, "does not exist"),
    ],
)
def test_slips(tmp_path, file, given, text):
    with pytest.raises(UserError, match=text):
        convert(file, tmp_path / "run", **given)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_conversion_left_is_cleared_away(tmp_path):
    (tmp_path / "run.partial" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run.partial" / "config.json").write_text("{")
    convert(OFFICIAL, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_layer_number_without_bound_in_an_autoencoder(tmp_path):
    shapes = {
        "encoder.down.0.block.3000000.x": (1,),
        "encoder.conv_in.weight": (32, 3, 3, 3),
        "encoder.down.0.block.0.conv1.weight": (32, 32, 3, 3),
        "post_quant_conv.weight": (4, 4, 1, 1),
    }
    state = {name: np.zeros(shape) for name, shape in shapes.items()}
    save_file({name: array.astype(np.float32) for name, array in state.items()}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="layer 3000000 "):
        read_autoencoder(tmp_path / "x.safetensors")
    for name in ("encoder.down.0.block.999.x", "encoder.down.999.block.0.x"):  # few enough, but they are not there
        arrays = {key: np.zeros(shape, np.float32) for key, shape in [*shapes.items()][1:]} | {name: np.zeros(1)}
        save_file(arrays, tmp_path / "x.safetensors")
        with pytest.raises(UserError, match="autoencoder of 2001 blocks|block.0.conv1.weight is missing"):
            read_autoencoder(tmp_path / "x.safetensors")


def test_what_files_of_others_hold(tmp_path):
    x = tensor(storage("FloatStorage", "0", 2), 0, (2,), (1,))
    for value, text in (
        (dict(model=[x]), "not a checkpoint with 'model_ema' .* it holds no weights"),
        ([x], "holds no weights"),
        (dict(model=dict(x=x)), r"z_proj.weight is missing \(there are 1 tensors, such as x\)"),
        (dict(model_ema=dict(x=x, y=3)), "z_proj.weight is missing"),
        (dict(model_ema={7: x}), "z_proj.weight is missing"),
        (dict(model_ema=dict()), "holds no weights"),
        (dict(model_ema={"x.weight": Call(Global("my", "T"), ()), "y": x}), "x.weight is an object"),
        (dict(model_ema=dict(x=x)), "z_proj.weight is missing"),
    ):
        with pytest.raises(UserError, match=text):
            convert(write_zip(tmp_path / "x.pth", value, [bytes(8)]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- What shapes and arguments tell ----------------------------------------------------------------------------------


def shapes_of(size, tokens=256, classes=1000):
    each = config_lib.MODEL_SIZES[size]
    config = config_lib.base()
    config_lib.set_model_size(config.model, size)
    width = each["width"]
    shapes = {
        "z_proj.weight": (width, 16),
        "diffusion_pos_embed_learned": (1, tokens, width),
        "encoder_pos_embed_learned": (1, tokens + 64, width),
        "class_emb.weight": (classes, width),
        "decoder_embed.weight": (width, width),
        "encoder_blocks.0.mlp.fc1.weight": (4 * width, width),
        f"encoder_blocks.{each['depth'] - 1}.x": (1,),
        f"decoder_blocks.{each['depth'] - 1}.x": (1,),
        f"diffloss.net.res_blocks.{each['denoiser_depth'] - 1}.x": (1,),
        "diffloss.net.input_proj.weight": (each["denoiser_width"], 16),
    }
    return shapes


@pytest.mark.parametrize("size, cfg", [("mar_base", 2.9), ("mar_large", 3.0), ("mar_huge", 3.2)])
def test_the_released_sizes(size, cfg):
    ours = config_lib.resolve(config_lib.load(f"{ROOT / 'configs' / 'imagenet256.py'}:model={size}"))
    ours = config_lib.apply_overrides(ours, {"model.remat": "none", "model.denoiser.remat": "none"})  # pods' business
    config = reference.config_of(shapes_of(size), {}, None, {})
    for section in ("model", "data", "tokenizer"):
        assert config[section] == ours[section]
    assert config.sample == ours.sample and config.sample.cfg == cfg and config.sample.num_iter == 256
    # The arguments of a training run ask for its own evaluation.
    given = dict(
        epochs=400, cfg=1.0, num_iter=64, mask_ratio_min=0.6, batch_size=64, world_size=32, lr_schedule="cosine"
    )
    config = reference.config_of(shapes_of(size), given, None, {"sample.cfg": "4"})
    assert (config.sample.cfg, config.sample.num_iter, config.train.epochs) == (4.0, 256, 400.0)
    assert (config.model.mask_ratio.minimum, config.train.batch_size, config.train.schedule) == (0.6, 2048, "cosine")
    other = reference.config_of(shapes_of(size, tokens=64), given, None, {})
    assert (other.sample.cfg, other.sample.num_iter, other.data.image_size) == (1.0, 64, 128)


@pytest.mark.parametrize(
    "arguments, text",
    [
        ({"mask_ratio_min": "x"}, "argument mask_ratio_min is no float"),
        ({"cfg": float("nan")}, "cfg is no float"),
        ({"seed": 2**100}, "argument seed is no int"),
        ({"epochs": float("inf")}, "argument epochs is no float"),
        ({"num_sampling_steps": "9" * 5000}, "argument num_sampling_steps is no str"),
        ({"vae_stride": [16]}, "vae_stride is no int"),
        ({"img_size": 512}, "images of 512 pixels, but 16 x 16 tokens .* make 256"),
        ({"vae_embed_dim": 0}, "no square"),
        ({"patch_size": 2}, "no square of patches of 2 x 2 latents of 16"),
        ({"vae_stride": 8}, "no autoencoder that has"),
        ({"encoder_num_heads": 12, "decoder_num_heads": 8}, "12 attention heads and its decoder 8"),
    ],
)
def test_arguments_that_contradict(arguments, text):
    with pytest.raises(UserError, match=text):
        reference.config_of(shapes_of("mar_base"), arguments, None, {})


# --- Back ------------------------------------------------------------------------------------------------------------


def test_there_and_back(ema, raw, tmp_path):
    content = weights_file.read(OFFICIAL).content
    for workdir, weights, key in ((ema, "ema", "model_ema"), (raw, "raw", "model")):
        out = tmp_path / f"{weights}.safetensors"
        assert export(workdir, out)["weights"] == weights
        assert equal(tensors(out), {name: np.asarray(each) for name, each in content[key].items()})
        assert equal(load_file(out), tensors(out))  # as the safetensors library reads it
        assert weights_file.read(out).metadata["step"] == "0"
        # What was written says what it is.
        done = convert(out, tmp_path / weights, overrides=FLOAT32)
        assert done.weights == weights and done.config == read_workdir(workdir)
        assert not convert(out, workdir, overrides=FLOAT32).is_new
    with pytest.raises(UserError, match="y.ckpt .*holds no weights"):
        convert_tokenizer(write_zip(tmp_path / "y.ckpt", {"model": {1: 2}}), tmp_path / "y.safetensors")
    with pytest.raises(UserError, match="holds ema weights, not raw"):
        convert(tmp_path / "ema.safetensors", tmp_path / "c", weights="raw", overrides=FLOAT32)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What a training run leaves, without the training: weights of two steps, all of them different."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    config = config_lib.resolve(make_digits(sample__num_sampling_steps="ddim5"))
    claim_workdir(workdir, config)
    generator = assemble(config).generator
    abstract = abstract_params(generator, sharding.make_mesh(1))
    rng = np.random.default_rng(0)

    def draw():
        return jax.tree.map(lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape), jnp.float32), abstract)

    with Checkpoints(workdir / "checkpoints") as checkpoints:
        for step in (2, 4):
            checkpoints.save(step, params=draw(), ema=draw(), optimizer={"step": jnp.ones(1)}, meta={})
    return workdir


def test_a_run_of_ours_there_and_back(trained, tmp_path, capsys):
    out, run = str(tmp_path / "x.safetensors"), str(tmp_path / "run")
    assert main(["export", "--workdir", str(trained), "--out", out, "--step", "2", "--weights", "raw"]) == 0
    assert "raw weights of step 2" in capsys.readouterr().out
    before = (tmp_path / "x.safetensors").read_bytes()
    assert main(["export", "--workdir", str(trained), "--out", out, "--step", "2", "--weights", "raw"]) == 0
    assert "is there already: raw weights of step 2" in capsys.readouterr().out
    assert main(["export", "--workdir", str(trained), "--out", out, "--step", "4", "--weights", "raw"]) == 2
    assert f"{out} is there already, with other contents" in capsys.readouterr().err
    assert (tmp_path / "x.safetensors").read_bytes() == before
    argv = [
        "convert",
        "--checkpoint",
        out,
        "--out",
        run,
        "--config.model.dtype=float32",
        "--config.data.source=digits",
        "--config.log.tensorboard=false",
    ]
    assert main(argv) == 0
    said = capsys.readouterr()
    assert "raw weights" in said.out and f"sample --workdir {run}" in said.err and "warning" not in said.err
    assert main(argv) == 0 and "is there already" in capsys.readouterr().out
    sampler, params, *_ = open_sampler(run)
    raw, ema = (open_sampler(trained, step=2, weights=weights).params for weights in ("raw", None))
    jax.tree.map(np.testing.assert_array_equal, params, raw)
    images = [sampler(each, np.arange(10), 3, batch_size=10) for each in (params, ema)]
    assert (images[0] != images[1]).any()
    argv = ["sample", "--workdir", run, "--out", str(tmp_path / "s"), "--seed", "3"]
    assert main(argv) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "s" / "samples.npz")["images"], images[0])
    assert main(["sample", "--workdir", run, "--out", str(tmp_path / "t"), "--weights", "ema"]) == 2
    assert "has only params, not ema" in capsys.readouterr().err
    export(run, tmp_path / "y.safetensors")
    assert equal(tensors(out), tensors(tmp_path / "y.safetensors"))
    with pytest.raises(UserError, match="no optimizer state.*init_from="):
        train(read_workdir(run), run)


def test_what_cannot_be_exported(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    text = (run / "config.json").read_text()
    out = tmp_path / "x.safetensors"
    cases = (
        (("variant", "ar"), "not for variant ar with head diffusion"),
        (("head", "regression"), "not for variant mar with head regression"),
        (("diffusion", {"num_steps": 500}), "num_steps is 500, but the reference always has 1000"),
    )
    for (key, value), says in cases:
        config = json.loads(text)
        config["model"][key] = value
        if value == "ar":
            config["sample"]["num_iter"] = 16
        (run / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=says):
            export(run, out)
    (run / "config.json").write_text(text)
    for given, says in ((dict(step=7), "step 7"), (dict(weights="best"), "weights is 'best'")):
        with pytest.raises(UserError, match=says):
            export(run, out, **given)
    for wrong, says in (
        (tmp_path / "x.pth", "ends in .safetensors"),
        (tmp_path / "no" / "x.safetensors", "no folder"),
        ("gs://b/x.safetensors", "local file"),
    ):
        with pytest.raises(UserError, match=says):
            export(run, wrong)
    out.write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        export(run, out)
    assert out.read_text() == "mine" and sorted(each.name for each in tmp_path.iterdir()) == ["run", "x.safetensors"]


# --- With its autoencoder --------------------------------------------------------------------------------------------


def test_from_files_to_pictures(tmp_path, capsys):
    """The commands of the README, with the tiny model on the latents of the small autoencoder, moved elsewhere."""
    run, moved = tmp_path / "run", tmp_path / "moved"
    argv = [
        "convert",
        "--checkpoint",
        str(BARE),
        "--tokenizer",
        str(VAE),
        "--out",
        str(run),
        "--weights",
        "raw",
        "--config.model.num_heads=4",
        "--config.tokenizer.autoencoder.scale=0.2325",
        "--config.model.dtype=float32",
    ]
    assert main(argv) == 0
    config = read_workdir(run)
    assert (config.tokenizer.name, config.tokenizer.patch_size, config.data.image_size) == ("kl", 2, 32)
    assert json.loads((run / "config.json").read_text())["tokenizer"]["path"] == "tokenizer.safetensors"
    assert autoencoder_file.read(run / "tokenizer.safetensors").checksum == config.tokenizer.checksum
    assert main(argv) == 0 and "is there already" in capsys.readouterr().out
    run.rename(moved)
    argv = [
        "sample",
        "--workdir",
        str(moved),
        "--out",
        str(tmp_path / "s"),
        "--labels",
        "1,2",
        "--num_iter",
        "4",
        "--num_sampling_steps",
        "5",
    ]
    assert main(argv) == 0
    images = np.load(tmp_path / "s" / "samples.npz")["images"]
    assert images.shape == (2, 32, 32, 3) and len(np.unique(images)) > 20
    # Without one, sampling says what to give.
    assert main(["convert", "--checkpoint", str(OFFICIAL), "--out", str(run)]) == 0
    assert "--tokenizer_path" in capsys.readouterr().out
    assert main(["sample", "--workdir", str(run), "--out", str(tmp_path / "t")]) == 2
    assert "--tokenizer_path" in capsys.readouterr().err
    (moved / "tokenizer.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="tokenizer.safetensors"):
        sample(moved, [1])
    with pytest.raises(UserError, match="with another tokenizer"):
        convert(BARE, moved, tokenizer=VAE, weights="raw", overrides=HEADS | SCALE | {"sample.max_stages": 6})


def test_a_tokenizer_alone(tmp_path, capsys):
    out = tmp_path / "kl.safetensors"
    argv = ["convert", "--tokenizer", str(VAE), "--out", str(out)]
    assert main(argv) == 0 and "stride 2, 4 channels, an unknown scale" in capsys.readouterr().out
    assert main(argv) == 0 and "is there already" in capsys.readouterr().out
    out.write_bytes(b"mine")
    for given, text in (
        (argv, "has other contents"),
        ([*argv[:-1], str(tmp_path / "run")], "ends in .safetensors"),
        (["convert", "--out", str(out)], "give --checkpoint FILE"),
        ([*argv, "--config.seed=1"], "takes only --tokenizer"),
        ([*argv, "--weights", "ema"], "has no EMA weights, only model"),
    ):
        assert main(given) == 2 and text in capsys.readouterr().err
    assert out.read_bytes() == b"mine" and [each.name for each in tmp_path.iterdir()] == ["kl.safetensors"]


def ldm(tmp_path, extra):
    """The small autoencoder as LDM's trainer would have written it, by names of one tensor."""
    x = tensor(storage("FloatStorage", "0", 2), 0, (2,), (1,))
    known = {"epoch": 3, "callbacks": {Global("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"): {}}}
    return write_zip(tmp_path / "ldm.ckpt", known | {"state_dict": dict.fromkeys(extra, x)}, [bytes(8)])


def test_an_ldm_checkpoint(tmp_path, monkeypatch):
    from marjax.interop import convert_tokenizer as module

    content = dict(weights_file.read(VAE).content["model"])
    noise = weights_file.read(ldm(tmp_path, ["loss.logvar", "discriminator.main.0.weight"])).content
    state = noise["state_dict"] | content
    real = weights_file.read(VAE)
    for extra, text in (({}, None), ({"first_stage.x": content["quant_conv.bias"]}, "first_stage.x is not used")):
        file = weights_file.WeightsFile({"state_dict": state | extra}, None)
        monkeypatch.setattr(module.weights_file, "read", lambda path, file=file: file)
        if text:
            with pytest.raises(UserError, match=text):
                convert_tokenizer("ldm.ckpt", tmp_path / "b.safetensors")
        else:
            assert convert_tokenizer("ldm.ckpt", tmp_path / "a.safetensors")[1]
    monkeypatch.setattr(module.weights_file, "read", lambda path: real)
    assert not convert_tokenizer(VAE, tmp_path / "a.safetensors")[1] and not (tmp_path / "b.safetensors").exists()


def test_the_autoencoder_of_a_latent_diffusion_model(tmp_path):
    """With a network beside it, LDM's averages by names without dots, its own scale, and Stable Diffusion XL's."""
    live = {name: np.asarray(each) for name, each in weights_file.read(VAE).content["model"].items()}
    network = {
        "model.diffusion_model.input_blocks.0.0.weight": np.ones(3, np.float32),
        "model_ema.diffusion_modelinput_blocks00weight": np.ones(3, np.float32),
        "model_ema.decay": np.float32(0.9),
        "model_ema.num_updates": np.int32(3),
    }
    inside = network | {f"first_stage_model.{name}": array for name, array in live.items()}
    average = {f"model_ema.{name.replace('.', '')}": array + 1 for name, array in live.items()}
    expected = read_autoencoder(VAE).params
    shifted = jax.tree.map(lambda x: x + 1, expected)
    path = tmp_path / "x.safetensors"

    def check(tensors, params, scale=None, **given):
        save_file({name: np.asarray(array) for name, array in tensors.items()}, path)
        found = read_autoencoder(path, **given)
        jax.tree.map(np.testing.assert_array_equal, found.params, params)
        assert found.scale == scale

    check(inside, expected)
    check(inside | {"scale_factor": np.float32(0.75)}, expected, 0.75)
    check(inside | {"conditioner.embedders.0.x": np.ones(1, np.float32)}, expected, 0.13025)
    check(live | average | {"model_ema.decay": np.float32(0.9), "loss.logvar": np.float32(0.0)}, shifted)
    check(live | average, expected, weights="raw")
    check(live | {"quantize.used": np.arange(3), "colorize": np.ones((3, 9, 1, 1), np.float32)}, expected)
    check(live, expected, weights="raw")
    with pytest.raises(UserError, match="input_blocks.0.0.weight is not used"):
        check(network | live, expected)
