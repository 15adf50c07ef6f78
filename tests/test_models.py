"""Networks: dependence on inputs, padding, precision, rematerialisation and parameter counts."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import make_generator, perturbed_params

from marjax import config as config_lib
from marjax.assembly import model_config
from marjax.models import generator as generator_lib
from marjax.models.generator import Classes
from marjax.models.init import init_unboxed

L, D = 16, 4


@pytest.fixture(scope="module")
def case():
    generator = make_generator()
    params = perturbed_params(generator)
    tokens = jax.random.normal(jax.random.key(2), (3, L, D))
    rand = generator.draw_loss_randomness(jax.random.key(3), 3)
    return generator, params, tokens, jnp.array([0, 1, 4]), rand._replace(num_known=jnp.array([0, 2, 4]))


def z_of(case, tokens=None, slots=6, **changes):
    generator, params, given, labels, rand = case
    rand = rand._replace(**changes)
    return generator.apply(
        {"params": params},
        given if tokens is None else tokens,
        Classes(labels, rand.drop_label),
        rand.order,
        rand.num_known,
        slots=slots,
        method="backbone_output",
    )


def test_z_depends_on_known_tokens_only(case):
    _, _, tokens, _, rand = case
    known = jnp.argsort(rand.order, axis=1) < rand.num_known[:, None]
    z = z_of(case)
    np.testing.assert_array_equal(z, z_of(case, jnp.where(known[..., None], tokens, 99.0)))
    changed = z_of(case, jnp.where(known[..., None], tokens + 1.0, tokens))
    assert jnp.abs(changed[1:] - z[1:]).min(axis=-1).max() > 1e-4
    np.testing.assert_array_equal(changed[0], z[0])  # no known tokens


def test_z_does_not_depend_on_slots_or_order_of_known_tokens(case):
    z = z_of(case)
    np.testing.assert_allclose(z, z_of(case, slots=L), atol=2e-5)
    order = case[4].order
    swapped = order.at[2, 0].set(order[2, 3]).at[2, 3].set(order[2, 0])
    np.testing.assert_allclose(z, z_of(case, order=swapped), atol=2e-5)
    outside = order.at[2, 0].set(order[2, 5]).at[2, 5].set(order[2, 0])
    assert jnp.abs(z_of(case, order=outside)[2] - z[2]).max() > 1e-3


def test_class_and_null_class(case):
    generator, params, tokens, labels, rand = case
    z = z_of(case, drop_label=jnp.zeros(3, bool))
    null = z_of(case, drop_label=jnp.ones(3, bool))
    assert jnp.abs(z - null).max() > 1e-3
    other = (generator, params, tokens, (labels + 1) % 5, rand)
    assert jnp.abs(z_of(other, drop_label=jnp.zeros(3, bool)) - z).max() > 1e-3
    np.testing.assert_array_equal(z_of(other, drop_label=jnp.ones(3, bool)), null)


def test_loss_covers_only_unknown_tokens(case):
    generator, params, tokens, labels, rand = case
    terms = generator.apply({"params": params}, tokens, labels, rand, deterministic=True)
    weight = terms["loss"][1]
    assert weight.shape == (3, 4, L)
    np.testing.assert_array_equal(weight[:, 0].sum(-1), L - rand.num_known)


def loss_and_grads(generator, case, key=None):
    _, params, tokens, labels, rand = case

    def loss(params):
        rngs = {} if key is None else {"dropout": key}
        value, weight = generator.apply({"params": params}, tokens, labels, rand, key is None, rngs=rngs)["loss"]
        return (value * weight).sum() / weight.sum()

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_saves_less_and_changes_no_result(case, remat):
    key = jax.random.key(7)
    expected = loss_and_grads(case[0], case, key)
    other = make_generator(**{"remat": remat, "denoiser.remat": remat})
    got = loss_and_grads(other, case, key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5), expected, got)
    _, params, tokens, labels, rand = case

    def kept(generator):
        def loss(params):
            value, weight = generator.apply({"params": params}, tokens, labels, rand, True)["loss"]
            return (value * weight).sum()

        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(loss, p)[1], params)))

    assert kept(other) < kept(case[0])


def test_dropout_depends_on_its_key(case):
    first, again = (loss_and_grads(case[0], case, jax.random.key(1))[0] for _ in range(2))
    assert first == again != loss_and_grads(case[0], case, jax.random.key(2))[0]
    assert first != loss_and_grads(case[0], case)[0]


def test_bfloat16_is_close_and_its_matmuls_are_bfloat16(case):
    generator = make_generator(dtype="bfloat16")
    (expected, grads), (loss, grads16) = loss_and_grads(case[0], case), loss_and_grads(generator, case)
    assert 0 < abs(loss - expected) < 0.03 * expected
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(grads16))
    norm = sum((g**2).sum() for g in jax.tree.leaves(grads)) ** 0.5
    assert sum(((a - b) ** 2).sum() for a, b in zip(*map(jax.tree.leaves, (grads, grads16)), strict=True)) ** 0.5 < (
        0.1 * norm
    )
    _, params, tokens, labels, rand = case
    jaxpr = jax.make_jaxpr(lambda p: generator.apply({"params": p}, tokens, labels, rand, True))(params)
    products = list(matmuls(jaxpr.jaxpr))
    assert len(products) >= 15
    assert all(var.aval.dtype == jnp.bfloat16 for eqn in products for var in eqn.invars)
    # Only the attention scores of encoder and decoder have float32 outputs.
    assert sum(eqn.outvars[0].aval.dtype == jnp.float32 for eqn in products) == 2


def matmuls(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from matmuls(inner)


def test_compile_size_does_not_grow_with_depth(case):
    def lines(depth):
        generator = make_generator(encoder_depth=depth, decoder_depth=depth, **{"denoiser.depth": depth})
        _, _, tokens, labels, rand = case
        params = jax.eval_shape(lambda: init_unboxed(generator, jax.random.key(0)))
        return len(
            jax.jit(jax.grad(lambda p: generator.apply({"params": p}, tokens, labels, rand, True)["loss"][0].sum()))
            .lower(params)
            .as_text()
            .splitlines()
        )

    assert abs(lines(9) - lines(3)) < 0.01 * lines(3)


@pytest.mark.parametrize("size, millions", [("mar_base", 208), ("mar_large", 479), ("mar_huge", 943)])
def test_parameter_counts_of_the_paper(size, millions):
    config = config_lib.base()
    config_lib.set_model_size(config.model, size)
    generator = generator_lib.build(model_config(config.model), num_tokens=256, token_dim=16, num_classes=1000)
    params = jax.eval_shape(lambda: init_unboxed(generator, jax.random.key(0)))
    # The paper rounds up: 207.9, 478.3 and 942.4 million.
    assert math.ceil(sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6) == millions
