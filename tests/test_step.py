"""The train step: accumulation, randomness, donation, learning and non-finite values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.configs import make_digits

from marjax import config as config_lib
from marjax import sharding
from marjax.assembly import assemble
from marjax.models.init import init_unboxed
from marjax.training import state as state_lib
from marjax.training import step as step_lib


def setup(config):
    config = config_lib.resolve(config)
    mesh = sharding.make_mesh(1)
    assembly = assemble(config, mesh)
    state = state_lib.create(assembly.generator, assembly.optimizer, assembly.state, config.seed)
    return state, step_lib.make_train_step(assembly), assembly.generator


def batch(n=16, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": jnp.asarray(rng.integers(0, 256, (n, 8, 8, 1)), jnp.uint8),
        "label": jnp.asarray(rng.integers(0, 10, n), jnp.int32),
    }


def test_accumulation_does_not_change_results():
    _, _, generator = setup(make_digits())
    params = jax.jit(lambda key: init_unboxed(generator, key))(jax.random.key(0))
    tokens, labels = jax.random.normal(jax.random.key(1), (16, 16, 4)), jnp.arange(16) % 10
    rand = generator.draw_loss_randomness(jax.random.key(2), 16)
    means, grads = {}, {}
    for parts in (1, 4):
        means[parts], grads[parts] = jax.jit(step_lib.loss_and_grads, static_argnums=(0, 6))(
            generator, params, tokens, labels, rand, jax.random.key(3), parts
        )
    # Microbatches have different numbers of unknown tokens, so a mean of means would differ.
    assert len(set(np.asarray(rand.num_known))) > 1
    for name in means[1]:
        np.testing.assert_allclose(means[4][name], means[1][name], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), grads[4], grads[1])


def test_step_depends_on_seed_and_step_alone():
    def losses(seed):
        state, step, _ = setup(make_digits(seed=seed))
        out = []
        for _ in range(2):
            state, metrics = step(state, batch(), {})
            out.append(float(metrics["train/loss"]))
        return out

    first = losses(0)
    assert first == losses(0) and first != losses(1) and first[0] != first[1]


def test_state_is_donated_and_learns():
    state, step, _ = setup(make_digits(train__steps=60, train__lr=3e-3))
    leaf = state.params["class_embedding"]
    values = []
    for _ in range(60):
        state, metrics = step(state, batch(), {})
        values.append(float(metrics["train/mse"]))
        assert float(metrics["finite"]) == 1.0
    assert leaf.is_deleted()
    assert np.mean(values[-10:]) < 0.8 * np.mean(values[:5])
    assert float(metrics["train/param_norm"]) > 0 and float(metrics["train/grad_norm"]) > 0


@pytest.mark.parametrize("where", ["params", "lr"])
def test_non_finite_values_are_detected(where):
    state, step, _ = setup(make_digits(**({"train__lr": 1e38} if where == "lr" else {}), train__warmup_steps=0))
    if where == "params":
        state = state.replace(params=jax.tree.map(lambda x: x * jnp.nan, state.params))
    for _ in range(3):
        state, metrics = step(state, batch(), {})
    assert float(metrics["finite"]) == 0.0
