"""The hand count of FLOPs against XLA's count of the same network without padding."""

import jax
import jax.numpy as jnp
import pytest

from marjax import config as config_lib
from marjax import flops, orders
from marjax.models import generator as generator_lib
from marjax.training import state as state_lib


@pytest.mark.parametrize("known", [0, 5])
def test_forward_pass_agrees_with_xla(known):
    """One block a stack, since XLA counts a scan's body once; wide, so that matmuls outweigh the rest."""
    config = config_lib.base()
    config.model.update(width=128, encoder_depth=1, decoder_depth=1, num_heads=2, buffer_size=4, dtype="float32")
    config.model.denoiser.update(depth=1, width=128)
    generator = generator_lib.build(config.model, num_tokens=16, token_dim=8, num_classes=3)
    params = jax.eval_shape(lambda: state_lib.init_unboxed(generator, jax.random.key(0)))

    def z(params):
        order, no = jnp.arange(16)[None], jnp.zeros(1, jnp.int32)
        return generator.apply({"params": params}, jnp.ones((1, 16, 8)), no, no > 0, order, jnp.full(1, known),
                               slots=known, method="condition")

    def count(function, *arguments):
        return jax.jit(function).lower(*arguments).cost_analysis()["flops"]

    ours = flops.backbone_flops(config.model, 16, 8, known)
    assert ours == pytest.approx(count(z, params), rel=0.1)

    def denoise(params):
        net = generator.bind({"params": params}).head.denoiser
        return net(jnp.ones((64, 8)), jnp.zeros((), jnp.int32), jnp.ones((64, 128)))

    assert 64 * sum(flops.denoiser_flops(config.model, 8)) == pytest.approx(count(denoise, params), rel=0.1)


def test_totals():
    config = config_lib.resolve(config_lib.apply_overrides(config_lib.base(), {
        "train.steps": 1, "train.warmup_steps": 0, "sample.num_iter": 4, "sample.num_sampling_steps": "7",
        "model.width": 48, "data.image_size": 4}))
    model = config.model
    once, each = flops.denoiser_flops(model, 1)
    known = orders.MaskRatio().expected_known(16)
    assert flops.train_flops(model, 16, 1) == pytest.approx(
        3 * (flops.backbone_flops(model, 16, 1, known) + (16 - known) * (once + 4 * each)))
    plan = orders.generation_plan(16, 4)
    expected = sum(flops.backbone_flops(model, 16, 1, k) for k in plan[:-1]) + 16 * (once + 7 * each)
    assert flops.sample_flops(model, config.sample, 16, 1) == pytest.approx(expected)
    config.sample.cfg = 2.0
    assert flops.sample_flops(model, config.sample, 16, 1) == pytest.approx(2 * expected)
