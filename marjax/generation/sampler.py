"""The sampler: runs the generation plan as one jitted program; images depend on (weights, settings, seed, index).

Shapes: B batch, L tokens, D token dimension, n autoregressive steps.
"""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from marjax import memory, numerics, progress, sharding
from marjax.assembly import Assembly
from marjax.generation.plan import Stage, cfg_scales, generation_plan, group_stages
from marjax.images import to_uint8
from marjax.models.generator import Classes, GenerationState, Generator, PlanStep
from marjax.perf import flops
from marjax.trees import PyTree

UNCONDITIONAL = -1  # label of the null class


class SampleRandomness(NamedTuple):
    """The randomness of a batch of samples: `order` int32 (B, L); `head`, by position, leading axes (B, L)."""

    order: jax.Array
    head: PyTree


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sampling settings of `config.sample`; `shape` lists those that are static in the program."""

    stages: tuple[Stage, ...]
    cfg: tuple[float, ...] | None  # scale per step; None: no unconditional branch
    num_sampling_steps: str
    temperature: float
    choice: tuple[float, ...] | None = None  # choice temperature per step; None: given order

    @classmethod
    def from_config(cls, sample: ml_collections.ConfigDict, generator: Generator) -> "Settings":
        """Settings from a resolved `config.sample`, with steps grouped into stages of least padded FLOPs."""
        num_tokens = generator.num_tokens
        plan = generation_plan(num_tokens, sample.num_iter)
        token = flops.counted(generator.head, "sample_flops", sample.num_sampling_steps)

        def cost(known_slots: int, new_slots: int) -> float:
            return flops.counted(generator.backbone, "padded_step_flops", known_slots) + token * new_slots

        scales = cfg_scales(plan, sample.cfg, sample.cfg_schedule)
        annealed = sample.choice_temperature * (1.0 - np.arange(1, len(plan)) / (len(plan) - 1))
        return cls(
            group_stages(plan, sample.max_stages, cost, all_unknown=sample.confidence_order),
            None if sample.cfg == 1.0 else tuple(map(float, scales)),
            sample.num_sampling_steps,
            sample.temperature,
            tuple(map(float, annealed)) if sample.confidence_order else None,
        )

    def shape(self) -> tuple[Any, ...]:
        """The static settings; cfg scales and temperatures are arguments of the program."""
        return self.stages, self.num_sampling_steps, self.cfg is None, self.choice is None


def draw_randomness(
    generator: Generator, seed: jax.Array, index_B: jax.Array, num_sampling_steps: str
) -> SampleRandomness:
    """Draws the randomness of the samples with these indices, each from (seed, index) alone.

    The head's noise is drawn up front by position: 1.6 MB per image for 256 tokens of dimension 16 and 100 steps.
    """

    def one(index: jax.Array) -> SampleRandomness:
        key_order, key_head = jax.random.split(jax.random.fold_in(numerics.key(seed), index))
        return SampleRandomness(
            generator.draw_orders(key_order, 1)[0],
            generator.head.draw_sample_noise(key_head, generator.num_tokens, num_sampling_steps),
        )

    return jax.vmap(one)(index_B)


def generate(
    generator: Generator,
    params: PyTree,
    labels_B: jax.Array,
    rand: SampleRandomness,
    cfg_n: jax.Array | None,
    temperature: jax.Array,
    choice_n: jax.Array | None = None,
    *,
    stages: Sequence[Stage],
    num_sampling_steps: str,
) -> jax.Array:
    """Generates tokens in raster order, float32 (B, L, D), with one scan per stage.

    Args:
      generator: the network.
      params: its parameters.
      labels_B: int32, a class or UNCONDITIONAL.
      rand: from `draw_randomness`.
      cfg_n: float32, cfg scale per step; None for no unconditional branch.
      temperature: scalar.
      choice_n: float32, choice temperature per step; None to follow `rand.order`.
      stages: the plan's stages, static.
      num_sampling_steps: length of the head's chain, static.
    """
    classes = Classes(jnp.maximum(labels_B, 0), labels_B < 0)
    state = generator.init_generation(rand.order, use_cfg=cfg_n is not None)
    for stage in stages:

        def run_step(state: GenerationState, step: PlanStep, stage: Stage = stage) -> tuple[GenerationState, None]:
            new: Any = generator.apply(
                {"params": params},
                state,
                classes,
                step,
                rand.head,
                known_slots=stage.known_slots,
                new_slots=stage.new_slots,
                num_sampling_steps=num_sampling_steps,
                temperature=temperature,
                method="generate_step",
            )
            return new, None

        steps = slice(stage.first_step, stage.first_step + len(stage.start))
        rows = PlanStep(
            jnp.asarray(stage.start),
            jnp.asarray(stage.num_predicted),
            *(None if each is None else each[steps] for each in (cfg_n, choice_n)),
        )
        state, _ = jax.lax.scan(run_step, state, rows)
    return state.tokens


def sampling_batch(size: int, mesh: Mesh) -> memory.Batch:
    """The batch size that determines the sampler's memory."""
    return memory.Batch("--batch_size (config.sample.batch_size)", size, sharding.batch_shards(mesh))


class Sampler:
    """Samples images from parameters; compiles once per batch size and static settings."""

    def __init__(self, assembly: Assembly) -> None:
        """Uses the settings of the assembly's `config.sample`; `with_settings` changes them."""
        self.generator, self.mesh = assembly.generator, assembly.mesh
        self.tokenizer, self.tokens = assembly.tokenizer, assembly.tokens
        self.settings = Settings.from_config(assembly.config.sample, self.generator)
        self.tokenizer_params = sharding.put_replicated(self.tokenizer.params, self.mesh)
        self.program = self._make_program()
        self.checked = self._checked()

    def with_settings(self, sample: ml_collections.ConfigDict) -> "Sampler":
        """A sampler with a resolved `config.sample`, sharing this one's program if `Settings.shape` is equal."""
        other = copy.copy(self)
        other.settings = Settings.from_config(sample, self.generator)
        if other.settings.shape() != self.settings.shape():
            other.program = other._make_program()
            other.checked = other._checked()
        return other

    def _checked(self) -> memory.Checked:
        """The program, compiled and checked to fit for every batch size before it runs."""
        return memory.Checked(
            self.program, "the sampler", lambda *arguments: sampling_batch(len(arguments[2]), self.mesh)
        )

    def _make_program(self) -> Any:
        settings, mesh, tokenizer = self.settings, self.mesh, self.tokenizer
        generator = self.generator.with_batch_shards(sharding.batch_shards(mesh))

        def program(
            params: PyTree,
            tokenizer_params: PyTree,
            labels_B: jax.Array,
            seed: jax.Array,
            index_B: jax.Array,
            cfg_n: jax.Array | None,
            temperature: jax.Array,
            choice_n: jax.Array | None,
        ) -> jax.Array:
            with sharding.logical_rules(mesh):
                rand = draw_randomness(generator, seed, index_B, settings.num_sampling_steps)
                rand = jax.lax.with_sharding_constraint(
                    rand, jax.tree.map(lambda _: sharding.batch_sharding(mesh), rand)
                )
                tokens_BxLxD = generate(
                    generator.with_codebook(tokenizer.codebook(tokenizer_params)),
                    params,
                    labels_B,
                    rand,
                    cfg_n,
                    temperature,
                    choice_n,
                    stages=settings.stages,
                    num_sampling_steps=settings.num_sampling_steps,
                )
            return tokenizer.decode(tokenizer_params, self.tokens.unpatchify(tokens_BxLxD))

        return jax.jit(program, out_shardings=sharding.batch_sharding(mesh))

    def arguments(self, params: PyTree, labels_B: np.ndarray, seed: int, index_B: np.ndarray) -> tuple[Any, ...]:
        """Arguments of `program` for these samples; the batch size must be divisible by `batch_shards` of the mesh."""
        rows = np.asarray(labels_B, np.int32), np.asarray(index_B, np.uint32)
        labels, index = sharding.shard_batch(rows, self.mesh)
        return self._arguments(params, labels, index, seed)

    def described_arguments(self, params: PyTree, batch_size: int) -> tuple[Any, ...]:
        """`arguments` with ShapeDtypeStructs, to compile `program` without devices or weights.

        The tokenizer's parameters must be ShapeDtypeStructs too (see `sharding.put_replicated`).
        """
        rows = sharding.batch_sharding(self.mesh)
        labels, index = (jax.ShapeDtypeStruct((batch_size,), dtype, sharding=rows) for dtype in (jnp.int32, jnp.uint32))
        return self._arguments(params, labels, index, 0)

    def _arguments(self, params: PyTree, labels: Any, index: Any, seed: int) -> tuple[Any, ...]:
        scales, choice = (
            None if each is None else np.asarray(each, np.float32) for each in (self.settings.cfg, self.settings.choice)
        )
        temperature = np.float32(self.settings.temperature)
        return params, self.tokenizer_params, labels, np.uint32(seed), index, scales, temperature, choice

    @numerics.pinned()
    def dispatch(self, params: PyTree, labels_B: np.ndarray, seed: int, index_B: np.ndarray) -> jax.Array:
        """Dispatches one batch: images float32 (B, H, W, C) in [-1, 1], not clipped, sharded over the mesh."""
        with jax.set_mesh(self.mesh):
            images: jax.Array = self.checked(*self.arguments(params, labels_B, seed, index_B))
        return images

    def fitting(self, batch_size: int) -> int:
        """Rounds `batch_size` up to a multiple of the number of batch shards."""
        shards = sharding.batch_shards(self.mesh)
        return -(-batch_size // shards) * shards

    def __call__(
        self, params: PyTree, labels: np.ndarray, seed: int, first_index: int = 0, *, batch_size: int
    ) -> np.ndarray:
        """Samples one image per label, uint8 (B, H, W, C), the i-th with index first_index + i.

        Every batch is padded to `fitting(batch_size)`, so that one program serves all.
        """
        batch_size = self.fitting(batch_size)
        done = []
        with progress.bar("sampling", len(labels), "images") as bar:
            for at in range(0, len(labels), batch_size):
                rows = np.asarray(labels[at : at + batch_size])
                padded = np.pad(rows, (0, batch_size - len(rows)), mode="edge")
                image = self.dispatch(params, padded, seed, first_index + at + np.arange(batch_size))
                if jax.process_count() > 1:
                    image = multihost_utils.process_allgather(image, tiled=True)
                done.append(to_uint8(np.asarray(image))[: len(rows)])
                bar.update(len(rows))
        return np.concatenate(done)
