"""Whether a training run fits into memory: found while its step is compiled, before anything is written."""

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
    """A global batch of these examples as shapes, sharded along its first axis."""
    rows = sharding.batch_sharding(mesh)
    return {
        examples.kind: jax.ShapeDtypeStruct((batch_size, *examples.shape), examples.dtype, sharding=rows),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=rows),
    }


def compile_step(
    step: Any, abstract: PyTree, *others: PyTree, params: PyTree, batch: memory.Batch, weights: PyTree = ()
) -> jax.stages.Compiled:
    """The compiled train step, once it and the state are known to fit; every process calls this.

    Args:
      step: jitted, (state, *others) -> (state, metrics).
      abstract: the state, as ShapeDtypeStructs with shardings.
      *others: the other arguments, as arrays or ShapeDtypeStructs.
      params: the part of the state that has a gradient.
      batch: what memory grows with.
      weights: arrays on the devices that the state is made from, and that are freed once it is.

    Raises:
      UserError: it does not fit, on any of the processes.
    """
    batch = batch._replace(fixed=memory.held_by(params))
    state = memory.Need(memory.held_by(abstract), memory.held_by(params))
    # No more than the gradients, which are not there yet while the state is made.
    freed = min(memory.held_by(weights), memory.held_by(params))
    # The state alone first: compiling the step of a model that is far too large takes minutes.
    refuse(
        memory.problem(
            "the training state with its gradients", state, memory.available() + freed, batch._replace(size=1)
        )
    )
    with jax.set_mesh(sharding_mesh(abstract)):
        compiled: jax.stages.Compiled
        compiled, problem = memory.compile_checked(
            step, abstract, *others, what="the train step", batch=batch, freed=freed
        )
    refuse(problem)
    return compiled


def refuse(problem: str) -> None:
    """Raises UserError, on all processes, if there is a problem on any."""
    if problem := distributed.agree(problem):
        raise UserError(problem)


def sharding_mesh(abstract: PyTree) -> Mesh:
    """The mesh of an abstract state."""
    mesh: Mesh = jax.tree.leaves(abstract)[0].sharding.mesh
    return mesh


def training_batch(config: ConfigDict, mesh: Mesh) -> memory.Batch:
    """What a train step's memory grows with, of a resolved config."""
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
