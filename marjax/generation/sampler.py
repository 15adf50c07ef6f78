"""Generation: the plan's steps as one jitted program, and images by (weights, settings, seed, index).

Shapes: B batch, L tokens, D token dimension, n autoregressive steps.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from marjax import flops, orders, sharding
from marjax.generation.images import to_uint8
from marjax.models.generator import Generator
from marjax.tokenizers import Tokenizer, TokenShape

UNCONDITIONAL = -1  # the label that asks for no class


class SampleRandomness(NamedTuple):
    """Everything random about a batch of samples: `order` int32 (B, L); `head`, by position, leading axes (B, L)."""

    order: jax.Array
    head: Any


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to sample, as in `config.sample`. Only `stages` and the chain's length shape the program."""

    stages: tuple[orders.Stage, ...]
    guidance: tuple[float, ...] | None  # the scale of every step; None: no guidance, no second branch
    num_sampling_steps: str
    temperature: float

    @classmethod
    def of(cls, config: ml_collections.ConfigDict, tokens: TokenShape) -> "Settings":
        """The settings of a resolved config, its steps grouped so that the padded FLOPs are least."""
        model, sample = config.model, config.sample
        plan = orders.generation_plan(tokens.num_tokens, sample.num_iter)
        once, each = flops.denoiser_flops(model, tokens.token_dim)
        token = once + each * flops.sampling_steps(model, sample)

        def cost(known_slots: int, new_slots: int) -> float:
            return flops.backbone_flops(model, tokens.num_tokens, tokens.token_dim, known_slots) + token * new_slots

        scales = orders.guidance_scales(plan, sample.cfg, sample.cfg_schedule)
        return cls(orders.group_stages(plan, sample.max_stages, cost),
                   None if sample.cfg == 1.0 else tuple(map(float, scales)),
                   sample.num_sampling_steps, sample.temperature)


def draw_randomness(generator: Generator, seed: jax.Array, index_B: jax.Array,
                    num_sampling_steps: str) -> SampleRandomness:
    """The randomness of the samples with these indices: each a function of (seed, index) alone.

    The head's noise is drawn by position, all of it ahead: 1.6 MB an image for 256 tokens of 16 and 100 steps.
    """

    def one(index: jax.Array) -> SampleRandomness:
        key_order, key_head = jax.random.split(jax.random.fold_in(jax.random.key(seed), index))
        return SampleRandomness(orders.draw_orders(key_order, 1, generator.num_tokens)[0],
                                generator.head.draw_sample_noise(key_head, generator.num_tokens, num_sampling_steps))

    return jax.vmap(one)(index_B)


def generate(generator: Generator, params: Any, labels_B: jax.Array, rand: SampleRandomness, guidance_n: jax.Array,
             temperature: jax.Array, *, stages: Sequence[orders.Stage], guided: bool,
             num_sampling_steps: str) -> jax.Array:
    """Tokens in raster order, float32 (B, L, D), by running the plan: a scan a stage.

    Args:
      generator: the network.
      params: its parameters.
      labels_B: int32, a class or UNCONDITIONAL.
      rand: from `draw_randomness`.
      guidance_n: float32 (n,), the scale of every step; not used unless `guided`.
      temperature: scalar.
      stages: the grouped plan, static.
      guided: whether there is an unconditional branch, static.
      num_sampling_steps: length of the head's chain, static.
    """
    batch = labels_B.shape[0]
    drop_B = labels_B < 0
    tokens = jnp.zeros((batch, generator.num_tokens, generator.token_dim), jnp.float32)
    for stage in stages:

        def step(tokens: jax.Array, inputs: Any, stage: orders.Stage = stage) -> tuple[jax.Array, None]:
            start, num_predicted, scale = inputs
            new: Any = generator.apply(
                {"params": params}, tokens, jnp.maximum(labels_B, 0), drop_B, rand.order, start, num_predicted,
                rand.head, scale if guided else None, known_slots=stage.known_slots, new_slots=stage.new_slots,
                num_sampling_steps=num_sampling_steps, temperature=temperature,
                method="generate_step")
            return new, None

        last = stage.first_step + len(stage.start)
        inputs = (jnp.asarray(stage.start), jnp.asarray(stage.num_predicted), guidance_n[stage.first_step:last])
        tokens, _ = jax.lax.scan(step, tokens, inputs)
    return tokens


class Sampler:
    """Makes images from parameters; compiles once for a batch size and the static part of its settings."""

    def __init__(self, generator: Generator, tokenizer: Tokenizer, tokens: TokenShape, settings: Settings,
                 mesh: Mesh) -> None:
        self.settings, self.mesh, self.tokenizer = settings, mesh, tokenizer

        def program(params: Any, tokenizer_params: Any, labels_B: jax.Array, seed: jax.Array, index_B: jax.Array,
                    guidance_n: jax.Array, temperature: jax.Array) -> jax.Array:
            with sharding.logical_rules(mesh):
                rand = draw_randomness(generator, seed, index_B, settings.num_sampling_steps)
                rand = jax.lax.with_sharding_constraint(
                    rand, jax.tree.map(lambda _: sharding.batch_sharding(mesh), rand))
                tokens_BxLxD = generate(
                    generator, params, labels_B, rand, guidance_n, temperature, stages=settings.stages,
                    guided=settings.guidance is not None, num_sampling_steps=settings.num_sampling_steps)
            return tokenizer.decode(tokenizer_params, tokens.unpatchify(tokens_BxLxD))

        self.program = jax.jit(program, out_shardings=sharding.batch_sharding(mesh))

    def arguments(self, params: Any, labels_B: np.ndarray, seed: int, index_B: np.ndarray) -> tuple[Any, ...]:
        """What `program` takes for these samples; their number must divide over the mesh."""
        steps = sum(len(stage.start) for stage in self.settings.stages)
        scales = np.asarray(self.settings.guidance or np.ones(steps), np.float32)
        rows = sharding.put_batch((np.asarray(labels_B, np.int32), np.asarray(index_B, np.uint32)), self.mesh)
        return (params, self.tokenizer.params, rows[0], np.uint32(seed), rows[1], scales,
                np.float32(self.settings.temperature))

    def __call__(self, params: Any, labels: np.ndarray, seed: int, first_index: int = 0, *,
                 batch_size: int) -> np.ndarray:
        """Images uint8 (N, H, W, C) of N labels, the i-th with index first_index + i.

        Every batch is filled up to `batch_size`, rounded up to what divides over the mesh, so that one program serves.
        """
        shards = sharding.batch_shards(self.mesh)
        batch_size = -(-batch_size // shards) * shards
        done = []
        for at in range(0, len(labels), batch_size):
            rows = np.asarray(labels[at:at + batch_size])
            padded = np.pad(rows, (0, batch_size - len(rows)), mode="edge")
            index = first_index + at + np.arange(batch_size)
            image = self.program(*self.arguments(params, padded, seed, index))
            if jax.process_count() > 1:
                image = multihost_utils.process_allgather(image, tiled=True)
            done.append(to_uint8(np.asarray(image))[:len(rows)])
        return np.concatenate(done)
