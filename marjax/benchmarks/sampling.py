"""The sampler, as `marjax benchmark sample` measures it, and its steps without the KV cache."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from marjax import numerics
from marjax.assembly import Assembly
from marjax.benchmarks.prepared import Prepared
from marjax.generation.plan import generation_plan
from marjax.generation.sampler import Sampler, draw_randomness, sampling_batch
from marjax.models.generator import Classes, PlanStep
from marjax.models.init import init_unboxed
from marjax.perf import flops


def prepare_sample(assembly: Assembly) -> Prepared:
    """Prepares the sampler for one batch."""
    config, abstract, sample = assembly.config, assembly.params, assembly.config.sample
    sampler = Sampler(assembly)
    size = sample.batch_size
    inputs = sampler.arguments(abstract, np.arange(size) % config.data.num_classes, config.seed, np.arange(size))

    def make_run(compiled: jax.stages.Compiled) -> Callable[[], None]:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        init = jax.jit(lambda key: init_unboxed(assembly.generator, key), out_shardings=shardings)
        params = init(numerics.key(config.seed))
        return lambda: compiled(params, *inputs[1:]).block_until_ready()

    plan = generation_plan(assembly.tokens.num_tokens, sample.num_iter)
    return Prepared(
        "sampler",
        lambda: sampler.program.lower(*inputs),
        make_run,
        sampling_batch(size, assembly.mesh),
        flops.sample_flops(
            assembly.generator, plan, sample.num_sampling_steps, sample.cfg != 1.0, sample.confidence_order
        ),
        {key: sample[key] for key in ("num_iter", "num_sampling_steps", "cfg")},
    )


def recomputed_steps(assembly: Assembly, count: int) -> list[float]:
    """Times generation steps of a causal backbone without the KV cache, spread over the sequence.

    Returns:
      Seconds of `count` steps, without an additional first one that compiles.
    """
    config, backbone = assembly.config, assembly.generator.backbone
    generator = assembly.generator.clone(backbone=backbone.clone(kv_cache=False))  # type: ignore[attr-defined]
    sample, size = config.sample, config.sample.batch_size
    labels = np.arange(size) % config.data.num_classes
    rand = jax.jit(lambda index: draw_randomness(generator, config.seed, index, sample.num_sampling_steps))(
        np.arange(size)
    )
    params = jax.jit(lambda key: init_unboxed(generator, key))(numerics.key(config.seed))
    if generator.num_codes:
        generator = generator.with_codebook(jnp.zeros((generator.num_codes, generator.token_dim)))

    @jax.jit
    def step(params: Any, state: Any, start: Any, noise: Any) -> Any:
        return generator.apply(
            {"params": params},
            state,
            Classes(labels, labels < 0),
            PlanStep(start, jnp.int32(1), None if sample.cfg == 1.0 else sample.cfg),
            noise,
            known_slots=generator.num_tokens,
            new_slots=1,
            num_sampling_steps=sample.num_sampling_steps,
            temperature=sample.temperature,
            method="generate_step",
        )

    seconds, state = [], generator.init_generation(rand.order, use_cfg=sample.cfg != 1.0)
    for at in np.linspace(0, generator.num_tokens - 1, count + 1).astype(int):
        start = time.perf_counter()
        state = jax.block_until_ready(step(params, state, at, rand.head))
        seconds.append(time.perf_counter() - start)
    return seconds[1:]
