"""The KL and VQ networks: the reference's numbers, latents and their randomness, chunks of rows, PyTorch names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from parity.seeded_weights import seeded_array
from support.compare import parity, relative_error
from support.configs import TINY_AUTOENCODER, make_autoencoder
from support.processes import run_program

from marjax import config as config_lib
from marjax import sharding
from marjax.errors import UserError
from marjax.tokenizers import autoencoder, open_tokenizer, token_shape
from marjax.tokenizers import kl as kl_lib
from marjax.tokenizers.autoencoder_names import from_state_dict, layout, to_state_dict
from marjax.tokenizers.kl import KL
from marjax.tokenizers.nearest_code import nearest
from marjax.tokenizers.spec import AUTOENCODERS, Spec
from marjax.tokenizers.vq import VQ

KL_SPEC = Spec(in_channels=1, embed_dim=4, **TINY_AUTOENCODER)
VQ_SPEC = Spec(in_channels=1, embed_dim=4, num_codes=16, **TINY_AUTOENCODER)


def seeded(spec):
    """A state dict of the reference's names with seeded weights."""
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), autoencoder.abstract_params(spec))
    return {name: seeded_array(name, array.shape) for name, array in to_state_dict(spec, zeros).items()}


def last(array):
    """Channels last."""
    return jnp.asarray(array).transpose(0, 2, 3, 1)


def reference(name):
    """The parity file's arrays, the network read off the names, and its parameters."""
    arrays, theirs = parity(name)
    attention = tuple(theirs["attn_resolutions"])
    spec = Spec(
        3,
        theirs["ch"],
        tuple(theirs["ch_mult"]),
        theirs["num_res_blocks"],
        theirs.get("z_channels", theirs["embed_dim"]),
        theirs["embed_dim"],
        attention,
        attention if "n_embed" in theirs else (),
        theirs["resolution"],
        theirs.get("n_embed", 0),
    )
    found, params = from_state_dict(seeded(spec))
    assert found == spec
    return arrays, spec, params


def test_kl_agrees_with_the_reference():
    arrays, spec, params = reference("kl_vae")
    preset = AUTOENCODERS["kl16"]
    assert spec.differences(preset.preset) == ["width 32 instead of 128"]
    tokenizer = KL(spec, params, scale=preset.scale)
    moments = jax.jit(tokenizer.moments)(params, last(arrays["in/images"]))
    assert relative_error(moments, last(arrays["out/moments"])) < 1e-4
    latents = kl_lib.sample_with(moments, last(arrays["in/noise"]))
    # The file has them scaled.
    assert relative_error(latents * tokenizer.scale, last(arrays["out/latents"])) < 1e-4
    decoded = jax.jit(tokenizer.decode)(params, last(arrays["out/latents"]))
    assert relative_error(decoded, last(arrays["out/decoded"])) < 1e-4


def test_vq_agrees_with_the_reference():
    arrays, spec, params = reference("vq_vae")
    assert spec.differences(AUTOENCODERS["vq16"].preset) == [
        "width 32 instead of 128",
        "num_codes 512 instead of 16384",
    ]
    codes, before = VQ(spec, params, discrete=True), VQ(spec, params, discrete=False, scale=0.5)
    image, key = last(arrays["in/images"]), jax.random.key(0)
    pre_quant = last(arrays["out/pre_quant"])
    raw = jax.jit(before.encode)(params, image, key)
    assert relative_error(raw, 0.5 * pre_quant) < 1e-4
    index = nearest(raw / 0.5, params["codebook"])
    np.testing.assert_array_equal(index.reshape(2, -1), arrays["out/codes"])
    latent = params["codebook"][index]
    for tokenizer, given in ((codes, latent), (before, 0.5 * pre_quant)):
        assert relative_error(jax.jit(tokenizer.decode)(params, given), last(arrays["out/decoded"])) < 1e-4
    assert relative_error(latent, pre_quant) > 1e-2


@pytest.mark.parametrize(
    "name, tokens, values, parameters, encoder",
    [
        ("kl16", 256, 16, 66_456_019, 28_265_760),
        ("kl8", 1024, 4, 83_653_863, 34_163_592),
        ("vq16", 256, 8, 69_593_371, 28_155_144),
        ("vq16_continuous", 256, 8, 69_593_371, 28_155_144),
    ],
)
def test_presets(name, tokens, values, parameters, encoder):
    shape = token_shape(name, image_size=256, channels=3, patch_size=1)
    assert (shape.num_tokens, shape.token_dim) == (tokens, values)
    assert shape.num_codes == (16384 if name == "vq16" else 0)
    flat = traverse_util.flatten_dict(autoencoder.abstract_params(AUTOENCODERS[name].preset), sep="/")
    counts = {path: int(np.prod(leaf.shape)) for path, leaf in flat.items()}
    assert sum(counts.values()) == parameters
    assert sum(count for path, count in counts.items() if path.startswith("encoder/")) == encoder


def test_kl8_makes_the_papers_tokens_of_patches_of_two():
    shape = token_shape("kl8", image_size=256, channels=3, patch_size=2)
    assert (shape.num_tokens, shape.token_dim) == (256, 16)


@pytest.fixture(scope="module")
def digits():
    """Images, float32 (6, 8, 8, 1)."""
    return jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (6, 8, 8, 1)), jnp.float32)


@pytest.fixture(scope="module")
def kl(autoencoders):
    return open_tokenizer(config_lib.tokenizer_config(make_autoencoder("kl", autoencoders / "kl.safetensors")))


@pytest.fixture(scope="module")
def vq(autoencoders):
    return open_tokenizer(config_lib.tokenizer_config(make_autoencoder("vq", autoencoders / "vq.safetensors")))


def test_rows_draw_their_own_noise(kl, digits):
    encode, key = jax.jit(kl.encode), jax.random.key(3)
    latent = encode(kl.params, digits, key)
    assert latent.shape == (6, 4, 4, 4) and latent.dtype == jnp.float32
    # The first rows do not know how many follow.
    np.testing.assert_allclose(encode(kl.params, digits[:2], key), latent[:2], atol=1e-5)
    assert (encode(kl.params, digits, jax.random.key(4)) != latent).all(axis=(1, 2, 3)).any()
    moments = kl.moments(kl.params, digits)
    np.testing.assert_allclose(kl.latents(kl.params, moments, key), latent, atol=1e-5)
    noise = kl_lib.draw_noise(key, 6, (4, 4, 4))
    assert len(np.unique(noise)) == noise.size
    np.testing.assert_array_equal(noise[:2], kl_lib.draw_noise(key, 2, (4, 4, 4)))
    mean, logvar = kl_lib.split(moments)
    np.testing.assert_array_equal(kl_lib.mean(moments), mean)
    np.testing.assert_allclose(latent, 0.5 * (mean + np.exp(logvar / 2) * noise), atol=1e-5)
    np.testing.assert_allclose(
        jax.jit(kl.decode)(kl.params, latent),
        kl.network.apply({"params": kl.params}, latent / 0.5, method="decode"),
        atol=1e-4,
    )


def test_log_variances_are_clipped():
    moments = jnp.asarray([[[[7.0, 7.0, 7.0, -100.0, 100.0, 1.0]]]])
    np.testing.assert_array_equal(kl_lib.split(moments)[1], [[[[-30.0, 20.0, 1.0]]]])
    drawn = kl_lib.sample_with(moments, jnp.ones((1, 1, 1, 3)))
    np.testing.assert_allclose(drawn[0, 0, 0], 7.0 + np.exp([-15.0, 10.0, 0.5]), rtol=1e-6)


def test_vq_tokens_are_rows_of_the_codebook(vq, digits, autoencoders):
    latent = jax.jit(vq.encode)(vq.params, digits, jax.random.key(0))
    codebook = np.asarray(vq.codebook(vq.params))
    assert codebook.shape == (16, 4) and latent.shape == (6, 4, 4, 4)
    index = np.asarray(jax.jit(vq.codes)(vq.params, digits))
    np.testing.assert_array_equal(latent, codebook[index])
    assert len(np.unique(index)) > 1
    scaled = make_autoencoder("vq_continuous", autoencoders / "vq.safetensors", tokenizer__autoencoder__scale=2.0)
    before = open_tokenizer(config_lib.tokenizer_config(scaled))
    assert before.codebook(before.params) is None and before.checksum == vq.checksum
    raw = jax.jit(before.encode)(before.params, digits, jax.random.key(0))
    np.testing.assert_array_equal(nearest(raw / 2.0, codebook), index)
    assert (raw / 2.0 != latent).all()
    images = jax.jit(vq.decode)(vq.params, latent)
    np.testing.assert_allclose(jax.jit(before.decode)(before.params, raw), images, atol=1e-5)
    assert images.shape == digits.shape and images.dtype == jnp.float32


def test_codes_are_not_scaled():
    with pytest.raises(ValueError, match="scale is 2.0"):
        VQ(VQ_SPEC, {}, discrete=True, scale=2.0)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_chunks_of_rows_give_what_all_at_once_do(kl, vq, digits, monkeypatch, rows):
    key = jax.random.key(0)
    cases = [
        (kl.moments, (kl.params, digits)),
        (vq.encode, (vq.params, digits, key)),
        (kl.decode, (kl.params, digits.reshape(6, 4, 4, 4))),
    ]
    for function, arguments in cases:
        whole, text = jax.jit(lambda *given, function=function: function(*given)), "stablehlo.while"
        assert text not in whole.lower(*arguments).as_text()
        at_once = whole(*arguments)
        with monkeypatch.context() as patch:
            patch.setattr(autoencoder, "_VALUES_AT_ONCE", rows * 8 * 8 * 32)
            chunked = jax.jit(lambda *given, function=function: function(*given))
            assert text in chunked.lower(*arguments).as_text()
            np.testing.assert_allclose(chunked(*arguments), at_once, atol=1e-5)


def test_how_many_rows_at_once():
    def seen(total, at_once):
        sizes = []

        def function(rows):
            sizes.append(rows.shape[0])
            return 2 * rows

        np.testing.assert_array_equal(sharding.map_rows(function, jnp.arange(total), at_once), 2 * np.arange(total))
        return sizes[-1]

    assert [seen(12, at_once) for at_once in (1, 2, 3, 5, 6, 11, 12, 99)] == [1, 2, 3, 4, 6, 6, 12, 12]
    assert seen(7, 3) == 1  # a prime
    # 16 images of 256 x 256 of KL-16, one of 1024 x 1024.
    assert autoencoder.rows_at_once(AUTOENCODERS["kl16"].preset, 256 * 256) == 16
    assert autoencoder.rows_at_once(AUTOENCODERS["kl16"].preset, 1024 * 1024) == 1
    assert autoencoder.rows_at_once(AUTOENCODERS["kl16"].preset, 4096 * 4096) == 1


def test_devices_keep_their_own_rows(autoencoders):
    """Chunks on a mesh: the same images, drawn with the same noise, and nothing is sent between devices."""
    run_program("support.programs.autoencoder_mesh", autoencoders / "kl.safetensors", devices=8)


def test_bfloat16_is_near(kl, digits):
    low = KL(kl.spec, kl.params, scale=kl.scale, dtype="bfloat16")
    exact, near = (jax.jit(each.moments)(kl.params, digits) for each in (kl, low))
    assert near.dtype == jnp.float32 and 1e-5 < relative_error(near, exact) < 3e-2


@pytest.mark.parametrize("shape", [(1, 8, 8, 3), (1, 8, 7, 1), (1, 7, 8, 1)])
def test_images_that_do_not_fit_are_refused(kl, vq, shape):
    for tokenizer in (kl, vq):
        with pytest.raises(UserError, match="takes 1 and sides that 2 divides"):
            jax.eval_shape(tokenizer.encode, tokenizer.params, jnp.zeros(shape), jax.random.key(0))


def test_other_image_sizes(kl):
    image = jnp.zeros((2, 6, 10, 1))
    latent = jax.eval_shape(kl.encode, kl.params, image, jax.random.key(0))
    assert latent.shape == (2, 3, 5, 4)
    assert jax.eval_shape(kl.decode, kl.params, latent).shape == image.shape


def test_recomputing_blocks_keeps_every_name(kl, digits):
    """Weights of one are weights of the other; only the backward pass differs."""
    for remat in (False, True):
        network = autoencoder.Autoencoder(kl.spec, jnp.float32, remat)
        fresh = jax.eval_shape(lambda network=network: network.init(jax.random.key(0), digits[:1])["params"])
        assert jax.tree.structure(fresh) == jax.tree.structure(kl.params)
        grad = jax.grad(lambda params, network=network: (network.apply({"params": params}, digits[:1]) ** 2).mean())
        # 2 blocks and 1 attention in each middle, 2 and 4 blocks on the levels.
        text = str(jax.make_jaxpr(grad)(kl.params))
        assert sum(text.count(name) for name in ("remat2[", "checkpoint[")) == 12 * remat


def test_a_fresh_network_keeps_the_size_of_what_goes_through(digits):
    params = autoencoder.init_params(VQ_SPEC, jax.random.key(0))
    flat = traverse_util.flatten_dict(params, sep="/")
    assert {path: leaf.shape for path, leaf in flat.items()} == {
        path: leaf.shape
        for path, leaf in traverse_util.flatten_dict(autoencoder.abstract_params(VQ_SPEC), sep="/").items()
    }
    assert all(leaf.dtype == jnp.float32 for leaf in flat.values())
    codes = flat["codebook"]
    assert abs(codes).max() <= 1 / 16 and len(np.unique(codes)) == codes.size
    latent = jax.jit(lambda x: autoencoder.Autoencoder(VQ_SPEC).apply({"params": params}, x, method="encode"))(digits)
    assert 0.3 < float(latent.std()) < 3.0


# Attention at both levels of one half each, a change of channels, and different sizes on both sides of the bottleneck.
ODD = Spec(
    3, 32, (1, 2), 1, latent_channels=6, embed_dim=5, encoder_attn_resolutions=(256,), decoder_attn_resolutions=(128,)
)


@pytest.mark.parametrize("spec", [KL_SPEC, VQ_SPEC, ODD])
def test_names_round_trip(spec):
    state_dict = seeded(spec)
    found, params = from_state_dict(state_dict)
    assert found == Spec(**{**spec.to_json(), "resolution": 256})
    shapes = jax.tree.map(lambda leaf: leaf.shape, autoencoder.abstract_params(spec))
    assert jax.tree.map(lambda leaf: leaf.shape, params) == shapes
    again = to_state_dict(spec, params)
    assert again.keys() == state_dict.keys() == layout(spec).keys()
    for name, array in state_dict.items():
        np.testing.assert_array_equal(again[name], array)
    noise = {
        "loss.logvar": np.zeros(()),
        "loss.discriminator.main.0.weight": np.zeros(3),
        "discriminator.x": np.zeros(1),
    }
    jax.tree.map(np.testing.assert_array_equal, from_state_dict(state_dict | noise)[1], params)
    jax.tree.map(np.testing.assert_array_equal, from_state_dict(state_dict, spec)[1], params)


def test_what_does_not_fit_is_listed():
    state_dict = seeded(KL_SPEC)
    del state_dict["decoder.mid.attn_1.q.bias"], state_dict["encoder.norm_out.weight"]
    state_dict["quant_conv.weight"] = state_dict["quant_conv.weight"][..., 0]
    state_dict |= {"model_ema.decay": np.zeros(()), "lossy": np.zeros(1)}
    with pytest.raises(UserError) as caught:
        from_state_dict(state_dict)
    for says in (
        "5 tensors",
        "decoder.mid.attn_1.q.bias is missing",
        "encoder.norm_out.weight is missing",
        "quant_conv.weight has shape (8, 8, 1) instead of (8, 8, 1, 1)",
        "model_ema.decay is not used",
        "lossy is not used",
    ):
        assert says in str(caught.value), says
    with pytest.raises(UserError, match="quantize.embedding.weight is not used"):
        from_state_dict(seeded(VQ_SPEC), KL_SPEC)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda given: {}, "encoder.conv_in.weight is missing .there are 0 tensors, such as none"),
        (lambda given: {"model.x": np.zeros(1)}, "there are 1 tensors, such as model.x"),
        (lambda given: given | {"encoder.conv_in.weight": np.zeros((24, 1, 3, 3))}, "multiples of 24"),
        (lambda given: given | {"encoder.conv_in.weight": np.zeros((16, 1, 3, 3))}, "width is 16"),
        (lambda given: given | {"post_quant_conv.weight": np.zeros(4)}, "post_quant_conv.weight has shape .4,."),
        (lambda given: {k: v for k, v in given.items() if ".block." not in k}, "block.0.conv1.weight is missing"),
    ],
)
def test_other_state_dicts(change, says):
    with pytest.raises(UserError, match=f"not an LDM autoencoder.*{says}"):
        from_state_dict(change(seeded(KL_SPEC)))


@pytest.mark.parametrize(
    "fields, says",
    [
        (dict(width=48), "multiple of 32"),
        (dict(width=0), "width is 0"),
        (dict(channel_mults=()), "channel_mults"),
        (dict(channel_mults=(1, 0)), "channel_mults"),
        (dict(num_codes=-1), "num_codes is -1"),
        (dict(resolution=100), "resolution 100 is not divisible by 16"),
        (dict(encoder_attn_resolutions=(24,)), "has 24, but the levels .* are 256, 128, 64, 32, 16"),
    ],
)
def test_impossible_networks(fields, says):
    with pytest.raises(ValueError, match=says):
        Spec(**fields)


def test_the_nominal_resolution_counts_by_what_it_means():
    one = Spec(channel_mults=(1, 2), encoder_attn_resolutions=(16,), resolution=32)
    two = Spec(channel_mults=(1, 2), encoder_attn_resolutions=(128,))
    assert one.differences(two) == []
    assert one.differences(Spec(channel_mults=(1, 2))) == ["encoder attention at levels [1] instead of []"]
