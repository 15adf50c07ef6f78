"""The hand count of FLOPs against XLA's count of the same network without padding."""

import jax
import jax.numpy as jnp
import pytest

from marjax import config as config_lib
from marjax import orders
from marjax.assembly import model_config
from marjax.generation.plan import generation_plan
from marjax.models import generator as generator_lib
from marjax.models.init import init_unboxed
from marjax.perf import flops


def build(variant="mar", head="diffusion", num_codes=0):
    """One block per stack, since XLA counts a scan's body once; wide, so that matmuls dominate."""
    config = config_lib.base()
    config.model.update(
        variant=variant,
        head=head,
        width=128,
        encoder_depth=1,
        decoder_depth=1,
        num_heads=2,
        buffer_size=4,
        dtype="float32",
    )
    config.model.denoiser.update(depth=1, width=128)
    return generator_lib.build(
        model_config(config.model), num_tokens=16, token_dim=8, num_classes=3, num_codes=num_codes
    )


def count(function, *arguments):
    return jax.jit(function).lower(*arguments).cost_analysis()["flops"]


def abstract(generator):
    return jax.eval_shape(lambda: init_unboxed(generator, jax.random.key(0)))


@pytest.mark.parametrize("variant, known", [("mar", 0), ("mar", 5), ("ar", 0)])
def test_forward_pass_agrees_with_xla(variant, known):
    generator = build(variant)

    def z(params):
        order, no = jnp.arange(16)[None], jnp.zeros(1, jnp.int32)
        return generator.apply(
            {"params": params},
            jnp.ones((1, 16, 8)),
            generator_lib.Classes(no, no > 0),
            order,
            jnp.full(1, known),
            slots=known,
            method="backbone_output",
        )

    backbone = generator.backbone
    ours = backbone.step_flops(known) if variant == "mar" else backbone.train_flops()
    assert ours == pytest.approx(count(z, abstract(generator)), rel=0.1)


def test_cached_step_agrees_with_xla():
    """XLA multiplies the entire KV cache, as does the padded count."""
    generator = build("ar")
    backbone = generator.backbone

    def z(params):
        order = jnp.arange(16)[None]
        return generator.bind({"params": params}).backbone.step(
            backbone.init_cache(1),
            jnp.ones((1, 16, 8)),
            order,
            jnp.int32(3),
            order[:, 3:4],
            jnp.ones((1, 128)),
            known_slots=16,
        )[0]

    assert backbone.padded_step_flops(3) == pytest.approx(count(z, abstract(generator)), rel=0.1)
    # All steps with the cache together take about as much as the full sequence once.
    assert sum(backbone.step_flops(k) for k in range(16)) == pytest.approx(backbone.train_flops(), rel=0.01)


@pytest.mark.parametrize("head, codes", [("diffusion", 0), ("categorical", 64), ("regression", 0)])
def test_heads_agree_with_xla(head, codes):
    generator = build(head=head, num_codes=codes)

    def run(params):
        net, z = generator.bind({"params": params}).head, jnp.ones((64, 128))
        if head == "diffusion":
            return net.denoiser(jnp.ones((64, 8)), jnp.zeros((), jnp.int32), z)
        return net.logits(z) if codes else net.mean(z)

    ours = sum(generator.head.denoiser_flops()) if head == "diffusion" else generator.head.loss_flops()
    assert 64 * ours == pytest.approx(count(run, abstract(generator)), rel=0.1)


def test_totals():
    generator = build()
    backbone, head = generator.backbone, generator.head
    once, each = head.denoiser_flops()
    known = orders.MaskRatio().expected_known(16)
    assert flops.train_flops(generator) == pytest.approx(
        3 * (backbone.step_flops(known) + (16 - known) * (once + 4 * each))
    )
    plan = generation_plan(16, 4)
    expected = sum(backbone.step_flops(k) for k in plan[:-1]) + 16 * (once + 7 * each)
    assert flops.sample_flops(generator, plan, "7", False) == pytest.approx(expected)
    assert flops.sample_flops(generator, plan, "7", True) == pytest.approx(2 * expected)
    seen = sum(16 - k for k in plan[:-1])
    assert flops.sample_flops(generator, plan, "7", False, True) == pytest.approx(
        expected + (seen - 16) * (once + 7 * each)
    )
    causal = build("ar")
    assert flops.train_flops(causal) == pytest.approx(
        3 * (causal.backbone.train_flops() + 16 * causal.head.loss_flops())
    )
