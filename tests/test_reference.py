"""Parity with numbers from the reference, to float32 tolerance."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity.seeded_weights import seeded_array
from support.compare import parity, relative_error

from marjax import config as config_lib
from marjax import orders
from marjax.assembly import model_config
from marjax.generation.plan import cfg_scales, generation_plan, group_stages
from marjax.generation.sampler import SampleRandomness, generate
from marjax.heads import gaussian_diffusion
from marjax.heads.diffusion import SampleNoise
from marjax.heads.gaussian_diffusion import LossNoise
from marjax.interop import names
from marjax.models import generator as generator_lib
from marjax.models.generator import Classes, LossRandomness
from marjax.models.init import init_params
from marjax.tokenizers import TokenShape
from marjax.training import state as state_lib
from marjax.training.ema import ema_decay
from marjax.training.optimizer import make_optimizer
from marjax.training.step import loss_and_grads, update


def build(theirs):
    """The marjax network of a reference config, its token shape and its abstract parameters."""
    config = config_lib.base()
    config.model.update(
        width=theirs["encoder_embed_dim"],
        encoder_depth=theirs["encoder_depth"],
        decoder_depth=theirs["decoder_depth"],
        num_heads=theirs["encoder_num_heads"],
        dtype="float32",
        buffer_size=theirs["buffer_size"],
        attn_dropout=theirs["attn_dropout"],
        proj_dropout=theirs["proj_dropout"],
    )
    config.model.denoiser.update(depth=theirs["diffloss_d"], width=theirs["diffloss_w"])
    shape = TokenShape.of_images(
        theirs["img_size"], theirs["vae_stride"], theirs["vae_embed_dim"], theirs["patch_size"]
    )
    generator = generator_lib.build(
        model_config(config.model),
        num_tokens=shape.num_tokens,
        token_dim=shape.token_dim,
        num_classes=theirs["class_num"],
    )
    abstract = jax.eval_shape(lambda: nn.unbox(init_params(generator, jax.random.key(0))))
    return config, generator, shape, abstract


def seeded(abstract):
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract)
    return names.to_marjax(
        {name: seeded_array(name, array.shape) for name, array in names.to_pytorch(zeros).items()}, abstract
    )


def order_of(mask):
    """An order with the known positions (`mask` 0) first, and their number."""
    return jnp.asarray(np.argsort(mask, axis=1, kind="stable")), jnp.asarray((mask == 0).sum(1), jnp.int32)


def latents(array):
    return jnp.asarray(array).transpose(0, 2, 3, 1)


@pytest.fixture(scope="module")
def forward():
    arrays, theirs = parity("mar_forward")
    _, generator, shape, abstract = build(theirs)
    return arrays, generator, shape, seeded(abstract)


def test_tokens(forward):
    arrays, _, shape, _ = forward
    np.testing.assert_array_equal(shape.patchify(latents(arrays["in/latents"])), arrays["out/tokens"])
    np.testing.assert_array_equal(shape.unpatchify(arrays["out/tokens"]), latents(arrays["in/latents"]))


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_tokens_are_ordered_channel_row_column(patch):
    shape = TokenShape.of_images(8, 1, 3, patch)
    latent = jnp.arange(2 * 8 * 8 * 3.0).reshape(2, 8, 8, 3)
    tokens = shape.patchify(latent)
    assert tokens.shape == (2, (8 // patch) ** 2, 3 * patch**2)
    corner = latent[1, :patch, patch : 2 * patch] if patch < 8 else latent[1]
    np.testing.assert_array_equal(tokens[1, 1], corner.transpose(2, 0, 1).reshape(-1))
    np.testing.assert_array_equal(shape.unpatchify(tokens), latent)


@pytest.mark.parametrize("spare", [0, 5])
def test_encoder_and_z(forward, spare):
    arrays, generator, _, params = forward
    order, known = order_of(arrays["in/mask"])
    tokens, slots = jnp.asarray(arrays["out/tokens"]), int(known[0]) + spare
    labels, drop = jnp.asarray(arrays["in/labels"]), jnp.zeros(3, bool)
    bound = generator.bind({"params": params})
    encoded = bound.backbone.encode(
        tokens, order, known, params["class_embedding"][labels], slots=slots, deterministic=True
    )
    assert relative_error(encoded[:, : 8 + int(known[0])], arrays["out/encoder"]) < 1e-4
    for name, dropped in (("out/z", drop), ("out/z_uncond", ~drop)):
        z = bound.backbone_output(tokens, Classes(labels, dropped), order, known, slots=slots)
        assert relative_error(z, arrays[name]) < 1e-4
    assert relative_error(arrays["out/z"], arrays["out/z_uncond"]) > 1e-2


def test_denoiser(forward):
    arrays, generator, _, params = forward
    bound = generator.bind({"params": params})
    t, noise = jnp.asarray(arrays["in/t"]), jnp.asarray(arrays["in/noise"])
    noised = gaussian_diffusion.add_noise(
        gaussian_diffusion.respace(1000, 1000), jnp.asarray(arrays["out/tokens"]), LossNoise(t, noise)
    )
    out = bound.head.denoiser(noised, t, jnp.asarray(arrays["out/z"]))
    assert relative_error(out, arrays["out/denoiser"]) < 1e-4


def rounding_of_vb(arrays):
    """The float32 error bound of each token's variational term, in bits, and whether its bins are resolved.

    At t = 0 the term is the log of a difference of two distribution functions. Where both are 1 to the last place,
    the difference is nothing, which is clamped to 1e-12, or one step of float32: it depends on the last bit of tanh,
    which compilers and processors round differently, in the reference as here. So both are compared in float64.
    """
    with jax.enable_x64(True):
        given = {
            name: jnp.asarray(arrays[name].astype(np.float64)) for name in ("out/tokens", "in/noise", "out/denoiser")
        }
        t, schedule = jnp.asarray(arrays["in/t"]), gaussian_diffusion.respace(1000, 1000)
        noised = gaussian_diffusion.add_noise(schedule, given["out/tokens"], LossNoise(t, given["in/noise"]))
        mean, log_variance = gaussian_diffusion.predicted_gaussian(
            schedule, noised, t, *jnp.split(given["out/denoiser"], 2, -1)
        )
        likelihood = gaussian_diffusion.discretised_log_likelihood(given["out/tokens"], mean, 0.5 * log_variance)
        assert likelihood.dtype == jnp.float64
    below = np.asarray(likelihood) < np.log(2.0**-20)
    unresolved = (below & (arrays["in/t"] == 0)[..., None]).sum(-1)
    return unresolved * np.log(2.0**-20 / 1e-12) / below.shape[-1] / np.log(2.0), unresolved == 0


def test_loss(forward):
    arrays, generator, _, params = forward
    order, known = order_of(arrays["in/mask"])
    noise = LossNoise(jnp.asarray(arrays["in/t"]).swapaxes(0, 1), jnp.asarray(arrays["in/noise"]).swapaxes(0, 1))
    rand = LossRandomness(order, known, jnp.zeros(3, bool), noise)
    terms = generator.apply(
        {"params": params},
        jnp.asarray(arrays["out/tokens"]),
        jnp.asarray(arrays["in/labels"]),
        rand,
        deterministic=True,
    )
    rounding, resolved = rounding_of_vb(arrays)
    assert 0 < (~resolved).sum() < 10
    for name, theirs in (("mse", "out/mse"), ("vb", "out/vb"), ("loss", "out/loss_per_token")):
        ours = np.asarray(terms[name][0].swapaxes(0, 1))
        assert relative_error(ours[resolved], arrays[theirs][resolved]) < 1e-5
        assert (np.abs(ours - arrays[theirs]) < rounding + 1e-5 * arrays[theirs])[~resolved].all()
    value, weight = terms["loss"]
    assert relative_error((value * weight).sum() / weight.sum(), arrays["out/loss"]) < 1e-4
    quarters = [terms[f"loss_t_quarter{i}"][1] for i in range(1, 5)]
    np.testing.assert_array_equal(sum(quarters), weight)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_three_optimizer_steps(accumulate):
    arrays, theirs = parity("mar_train_steps")
    config, generator, shape, abstract = build(theirs)
    config.train.update(
        lr=theirs["lr"],
        schedule="constant",
        warmup_steps=0,
        steps=3,
        clip=theirs["grad_clip"],
        weight_decay=theirs["weight_decay"],
        ema_decay=theirs["ema_rate"],
    )
    assert theirs["betas"] == [config.train.b1, config.train.b2]
    optimizer = make_optimizer(config.train)
    params = jax.tree.map(jnp.asarray, seeded(abstract))
    state = state_lib.TrainState(
        step=jnp.zeros((), jnp.int32), params=params, ema=params, opt_state=optimizer.init(params)
    )

    @jax.jit
    def step(state, tokens, labels, rand):
        means, grads = loss_and_grads(generator, state.params, tokens, labels, rand, jax.random.key(0), accumulate)
        decay = ema_decay(config.train.ema_decay, config.train.ema_warmup, state.step)
        return update(state, grads, optimizer, decay), means["loss"], grads

    for i in range(3):
        get = {name: arrays[f"in/{i}/{name}"] for name in ("latents", "labels", "mask", "drop_label", "t", "noise")}
        order, known = order_of(get["mask"])
        noise = LossNoise(jnp.asarray(get["t"]).swapaxes(0, 1), jnp.asarray(get["noise"]).swapaxes(0, 1))
        rand = LossRandomness(order, known, jnp.asarray(get["drop_label"]), noise)
        state, loss, grads = step(state, shape.patchify(latents(get["latents"])), jnp.asarray(get["labels"]), rand)
        assert relative_error(loss, arrays[f"out/{i}/loss"]) < 1e-4
        norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads)))
        assert relative_error(norm, arrays[f"out/{i}/grad_norm"]) < 1e-3
    for ours, kind in ((state.params, "params"), (state.ema, "ema")):
        for name, value in names.to_pytorch(ours).items():
            assert relative_error(value, arrays[f"out/{kind}/{name}"]) < 1e-3, name


@pytest.mark.parametrize("name", ["mar_sample_nocfg", "mar_sample_cfg_linear"])
@pytest.mark.parametrize("max_stages", [1, 3])
def test_whole_generations(name, max_stages):
    arrays, theirs = parity(name)
    weights, _ = parity("mar_sample_cfg_linear")
    _, generator, shape, abstract = build(theirs)
    params = names.to_marjax(
        {key.removeprefix("params/"): weights[key] for key in weights.files if key.startswith("params/")}, abstract
    )
    # Orders of the reference are generated last to first.
    order = jnp.asarray(arrays["in/orders"][:, ::-1])
    noise = SampleNoise(jnp.asarray(arrays["in/init_noise"]), jnp.moveaxis(jnp.asarray(arrays["in/step_noise"]), 0, 2))
    plan = generation_plan(shape.num_tokens, theirs["num_iter"])
    step_of_token = np.searchsorted(plan, np.asarray(orders.ranks(order)), side="right") - 1
    np.testing.assert_array_equal(step_of_token, arrays["out/step_of_token"])
    scales = cfg_scales(plan, theirs["cfg"], theirs["cfg_schedule"])
    np.testing.assert_allclose(scales, arrays["out/cfg_per_step"], rtol=1e-12)

    stages = group_stages(
        plan,
        max_stages,
        lambda known, new: generator.backbone.padded_step_flops(known) + new * generator.head.sample_flops(10),
    )
    assert len(stages) == max_stages
    tokens = generate(
        generator,
        params,
        jnp.asarray(arrays["in/labels"]),
        SampleRandomness(order, noise),
        jnp.asarray(scales, jnp.float32) if theirs["cfg"] != 1.0 else None,
        jnp.float32(theirs["temperature"]),
        stages=stages,
        num_sampling_steps=theirs["num_sampling_steps"],
    )
    assert relative_error(tokens, arrays["out/tokens"]) < 1e-4
    assert relative_error(shape.unpatchify(tokens), latents(arrays["out/latents"])) < 1e-4


def test_names_round_trip_and_reject_mismatches(forward):
    _, _, _, params = forward
    state_dict = names.to_pytorch(params)
    arrays, _ = parity("mar_sample_cfg_linear")
    shapes = {key.removeprefix("params/"): arrays[key].shape for key in arrays.files if key.startswith("params/")}
    assert {name: array.shape for name, array in state_dict.items()} == shapes
    again = names.to_marjax(state_dict, params)
    jax.tree.map(np.testing.assert_array_equal, again, params)

    first, second = itertools.islice(state_dict, 2)
    broken = dict(state_dict, extra=np.zeros(3))
    broken[first] = broken[first].T[:1]
    del broken[second]
    with pytest.raises(ValueError) as error:
        names.to_marjax(broken, params)
    assert all(name in str(error.value) for name in ("extra is not used", f"{second} is missing", f"{first} has shape"))
