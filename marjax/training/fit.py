"""Checks that a training run fits into device memory when compiling its step, before any file is written."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from marjax import distributed, memory, sharding
from marjax.data.examples import Examples
from marjax.errors import UserError
from marjax.trees import PyTree


def described_batch(examples: Examples, batch_size: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """A global batch as ShapeDtypeStructs, sharded along the first axis."""
    rows = sharding.batch_sharding(mesh)
    return {
        examples.kind: jax.ShapeDtypeStruct((batch_size, *examples.shape), examples.dtype, sharding=rows),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=rows),
    }


def compile_step(
    step: Any, abstract: PyTree, *others: PyTree, params: PyTree, batch: memory.Batch, weights: PyTree = ()
) -> jax.stages.Compiled:
    """Compiles the train step after checking that it and the state fit; called by every process.

    Args:
      step: jitted, (state, *others) -> (state, metrics).
      abstract: the state, as ShapeDtypeStructs with shardings.
      *others: the other arguments, as arrays or ShapeDtypeStructs.
      params: the part of the state that has a gradient.
      batch: the batch size that determines memory.
      weights: arrays on the devices that initialise the state and are then freed.

    Raises:
      UserError: out of memory on any process.
    """
    batch = batch._replace(fixed=memory.held_by(params))
    state = memory.Need(memory.held_by(abstract), memory.held_by(params))
    # At most the size of the gradients, which do not exist yet when the state is created.
    freed = min(memory.held_by(weights), memory.held_by(params))
    # Check the state first: compiling the step of a model that is far too large takes minutes.
    refuse(
        memory.problem(
            "the training state with its gradients", state, memory.available() + freed, batch._replace(size=1)
        )
    )
    mesh: Mesh = jax.tree.leaves(abstract)[0].sharding.mesh
    with jax.set_mesh(mesh):
        compiled: jax.stages.Compiled
        compiled, problem = memory.compile_checked(
            step, abstract, *others, what="the train step", batch=batch, freed=freed
        )
    refuse(problem)
    return compiled


def refuse(problem: str) -> None:
    """Raises UserError on all processes if any has a problem."""
    if problem := distributed.agree(problem):
        raise UserError(problem)


def training_batch(config: ConfigDict, mesh: Mesh) -> memory.Batch:
    """The batch size that determines the memory of a train step, from a resolved config."""
    size, accumulate = config.train.batch_size, config.train.accumulate
    shards = sharding.batch_shards(mesh)

    def others(most: int) -> list[str]:
        advice = []
        parts = [
            parts
            for parts in range(2 * accumulate, size // shards + 1, accumulate)
            if size % (shards * parts) == 0 and size // parts <= most // accumulate
        ]
        if parts:
            advice.append(f"set config.train.accumulate={parts[0]}")
        if config.model.remat != "full" or config.model.denoiser.remat != "full":
            advice.append("set config.model.remat=full and config.model.denoiser.remat=full")
        return advice

    return memory.Batch("config.train.batch_size", size, shards * accumulate, others=others)
