"""The causal backbone: which tokens z depends on, and KV cache against recomputation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import make_generator, perturbed_params

from marjax import orders
from marjax.generation.plan import group_stages
from marjax.generation.sampler import draw_randomness, generate
from marjax.models.generator import Classes

L, D, B = 16, 4, 3
LABELS = jnp.array([0, 1, 4])
NO_DROP = jnp.zeros(B, bool)


@pytest.fixture(scope="module")
def cases():
    """Maps variant to jitted z, parameters, tokens and orders."""
    out = {}
    for variant in ("ar", "random_ar"):
        generator = make_generator(variant=variant)
        params = perturbed_params(generator)
        order = generator.draw_orders(jax.random.key(3), B)
        z = jax.jit(functools.partial(generator.apply, method="backbone_output"))
        out[variant] = z, params, jax.random.normal(jax.random.key(2), (B, L, D)), order
    return out


def z_in_order(case, tokens=None, order=None):
    """z in the order of generation: row i predicts the i-th token."""
    backbone_output, params, given, given_order = case
    order = given_order if order is None else order
    z = backbone_output(
        {"params": params},
        given if tokens is None else tokens,
        Classes(LABELS, NO_DROP),
        order,
        jnp.zeros(B, jnp.int32),
    )
    return jnp.take_along_axis(z, order[..., None], axis=1)


def test_orders():
    raster, random = (make_generator(variant=v).draw_orders(jax.random.key(0), B) for v in ("ar", "random_ar"))
    np.testing.assert_array_equal(raster, np.tile(np.arange(L), (B, 1)))
    assert len({tuple(row) for row in random.tolist()}) == B
    np.testing.assert_array_equal(np.sort(random, axis=1), raster)


@pytest.mark.parametrize("variant", ["ar", "random_ar"])
@pytest.mark.parametrize("i", [0, 1, 7, 15])
def test_z_depends_on_earlier_tokens_only(cases, variant, i):
    case = cases[variant]
    _, _, tokens, order = case
    rank = orders.ranks(order)
    z = z_in_order(case)
    later = z_in_order(case, jnp.where((rank >= i)[..., None], tokens + 1.0, tokens))
    np.testing.assert_array_equal(later[:, : i + 1], z[:, : i + 1])
    if i < L - 1:
        assert jnp.abs(later[:, i + 1 :] - z[:, i + 1 :]).max(-1).min() > 1e-4
    for j in range(i):  # z depends on every earlier token
        earlier = z_in_order(case, jnp.where((rank == j)[..., None], tokens + 1.0, tokens))
        assert jnp.abs(earlier[:, i] - z[:, i]).max(-1).min() > 1e-5
        np.testing.assert_array_equal(earlier[:, : j + 1], z[:, : j + 1])


def test_z_does_not_depend_on_the_order_of_later_tokens(cases):
    case = cases["random_ar"]
    order, z, i = case[3], z_in_order(case), 6
    z_shuffled = z_in_order(case, order=jnp.concatenate([order[:, : i + 1], order[:, :i:-1]], axis=1))
    np.testing.assert_array_equal(z_shuffled[:, : i + 1], z[:, : i + 1])
    assert jnp.abs(z_shuffled[:, i + 1 :] - z[:, i + 1 :]).max() > 1e-3


def test_z_depends_on_the_position_to_predict(cases):
    """Equal known tokens in equal order, but another target position."""
    case = cases["random_ar"]
    order, z, i = case[3], z_in_order(case), 6
    swapped = order.at[:, i].set(order[:, i + 1]).at[:, i + 1].set(order[:, i])
    z_swapped = z_in_order(case, order=swapped)
    np.testing.assert_array_equal(z_swapped[:, :i], z[:, :i])
    assert jnp.abs(z_swapped[:, i] - z[:, i]).max(-1).min() > 1e-3


def test_class_and_null_class(cases):
    backbone_output, params, tokens, order = cases["ar"]

    def z(labels, drop):
        return backbone_output({"params": params}, tokens, Classes(labels, drop), order, jnp.zeros(B, jnp.int32))

    assert jnp.abs(z(LABELS, NO_DROP) - z((LABELS + 1) % 5, NO_DROP)).max(-1).min() > 1e-4
    assert jnp.abs(z(LABELS, NO_DROP) - z(LABELS, ~NO_DROP)).max(-1).min() > 1e-4
    np.testing.assert_array_equal(z(LABELS, ~NO_DROP), z((LABELS + 1) % 5, ~NO_DROP))


@pytest.mark.parametrize("variant", ["ar", "random_ar", "mar"])
def test_permuting_order_and_tokens_together_permutes_the_loss(variant):
    """The position tables are permuted too."""
    generator = make_generator(variant=variant)
    params = perturbed_params(generator)
    tokens = jax.random.normal(jax.random.key(2), (B, L, D))
    rand = generator.draw_loss_randomness(jax.random.key(4), B)
    permutation = jax.random.permutation(jax.random.key(5), L)
    place = jnp.argsort(permutation)  # new index of each position

    def permute_table(path, leaf):
        if not str(path[-1].key).endswith("pos_embed"):
            return leaf
        buffer = leaf.shape[0] - L
        return jnp.concatenate([leaf[:buffer], leaf[buffer:][permutation]])

    renamed = jax.tree_util.tree_map_with_path(permute_table, params)
    noise = jax.tree.map(lambda x: x[:, :, permutation], rand.head)

    def loss(params, tokens, rand):
        return generator.apply({"params": params}, tokens, LABELS, rand, True)["loss"]

    value, weight = loss(params, tokens, rand)
    new_value, new_weight = loss(renamed, tokens[:, permutation], rand._replace(order=place[rand.order], head=noise))
    np.testing.assert_allclose(new_value, value[:, :, permutation], rtol=2e-4, atol=1e-5)
    np.testing.assert_array_equal(new_weight, weight[:, :, permutation])
    assert jnp.abs(loss(params, tokens[:, permutation], rand)[0] - value[:, :, permutation]).max() > 1e-2


def test_loss_covers_every_token(cases):
    _, params, tokens, _ = cases["random_ar"]
    generator = make_generator(variant="random_ar")
    rand = generator.draw_loss_randomness(jax.random.key(4), B)
    assert generator.apply({"params": params}, tokens, LABELS, rand, True)["loss"][1].min() == 1.0


@pytest.mark.parametrize(
    "variant, head, use_cfg",
    [
        ("ar", "diffusion", True),
        ("ar", "categorical", False),
        ("random_ar", "diffusion", False),
        ("random_ar", "categorical", True),
    ],
)
def test_kv_cache_equals_recomputation(variant, head, use_cfg):
    generator = make_generator(variant=variant, head=head)
    params = perturbed_params(generator)
    if generator.num_codes:
        generator = generator.with_codebook(jax.random.normal(jax.random.key(9), (generator.num_codes, D)))
    rand = draw_randomness(generator, 0, jnp.arange(B), "ddim4")
    stages = group_stages(range(L + 1), 6, lambda known, new: generator.backbone.padded_step_flops(known))
    assert len(stages) == 1  # one scan
    labels = jnp.array([0, 1, -1])

    def run(generator):
        cfg = jnp.linspace(1.0, 3.0, L) if use_cfg else None
        return jax.jit(
            lambda params: generate(
                generator, params, labels, rand, cfg, jnp.float32(0.7), stages=stages, num_sampling_steps="ddim4"
            )
        )(params)

    cached = run(generator)
    np.testing.assert_allclose(
        cached, run(generator.clone(backbone=generator.backbone.clone(kv_cache=False))), atol=2e-4
    )
    assert jnp.abs(cached).max(-1).min() > 0 and jnp.abs(cached[0] - cached[1]).max() > 0.1
    # Generation agrees with training: sampling from z of the generated sequence reproduces the sequence.
    if use_cfg:
        return
    z = generator.apply(
        {"params": params},
        cached,
        Classes(jnp.maximum(labels, 0), labels < 0),
        rand.order,
        jnp.zeros(B, jnp.int32),
        method="backbone_output",
    )
    again = generator.bind({"params": params}).head.sample(
        z, rand.head, None, num_sampling_steps="ddim4", temperature=0.7
    )
    np.testing.assert_allclose(again, cached, atol=2e-4)


def test_kv_cache_in_bfloat16():
    """Compares z of step-by-step generation with one forward pass."""
    generator = make_generator(variant="random_ar", dtype="bfloat16")
    params = perturbed_params(generator)
    order = generator.draw_orders(jax.random.key(3), B)
    tokens, class_embed = jax.random.normal(jax.random.key(2), (B, L, D)), jnp.ones((B, 32))

    @jax.jit
    def both(params):
        backbone = generator.bind({"params": params}).backbone
        whole = backbone(tokens, order, jnp.zeros(B, jnp.int32), class_embed, deterministic=True)
        cache, steps = backbone.init_cache(B), []
        for i in range(L):
            z, cache = backbone.step(
                cache, tokens, order, jnp.int32(i), order[:, i : i + 1], class_embed, known_slots=L
            )
            steps.append(z)
        return jnp.take_along_axis(whole, order[..., None], axis=1), jnp.concatenate(steps, axis=1)

    whole, steps = both(params)
    assert steps.dtype == jnp.bfloat16
    difference = jnp.abs((whole - steps).astype(jnp.float32))
    assert difference.max() < 0.05 * jnp.abs(whole.astype(jnp.float32)).max()
