"""Trains three steps on meshes of several sizes; prints losses and the bytes that devices send, as JSON.

Its arguments are the fields of the config and a list of [mesh axis, its size, batch size], both JSON.
"""

import json
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from marjax import config as config_lib
from marjax import sharding
from marjax.assembly import assemble
from marjax.compile import hlo
from marjax.training import state as state_lib
from marjax.training.step import make_train_step


def num_bytes(leaves: Any) -> int:
    return sum(leaf.size * 4 for leaf in jax.tree.leaves(leaves))


def run(fields: Mapping[str, Any], axis: str, n: int, batch_size: int) -> dict[str, Any]:
    """Losses, bytes sent by a device in one step, and the bytes of sharded and of replicated parameters."""
    config = config_lib.resolve(
        config_lib.apply_overrides(config_lib.base(), {**fields, "train.batch_size": batch_size})
    )
    mesh = sharding.make_mesh(*((n, 1, 1) if axis == "data" else (1, n, 1)), devices=jax.devices()[:n])
    assembly = assemble(config, mesh)
    abstract, tokenizer = assembly.state, assembly.tokenizer
    images = np.random.default_rng(0).integers(0, 256, (batch_size, 8, 8, 1), np.uint8)
    batch = sharding.put_batch({"image": images, "label": np.arange(batch_size, dtype=np.int32) % 10}, mesh)
    losses = []
    with jax.set_mesh(mesh):
        step = make_train_step(assembly).lower(abstract, batch, tokenizer.params).compile()
        state = state_lib.create(assembly.generator, assembly.optimizer, abstract, 0)
        for _ in range(3):
            state, metrics = step(state, batch, tokenizer.params)
            losses.append(float(metrics["train/loss"]))
    sharded = num_bytes([leaf for leaf in jax.tree.leaves(abstract.params) if not leaf.sharding.is_fully_replicated])
    table = config.model.diffusion.num_steps * config.model.denoiser.width * 4
    return {
        "axis": axis,
        "n": n,
        "batch_size": batch_size,
        "sharded": sharded,
        "replicated": num_bytes(abstract.params) - sharded,
        "losses": losses,
        "table": table - num_bytes(abstract.params["head"]["denoiser"]["time_embed"]),
        "sent": hlo.read(step.as_text() or "", n).collective_bytes(),
    }


if __name__ == "__main__":
    given, runs = json.loads(sys.argv[1]), json.loads(sys.argv[2])
    print(json.dumps([run(given, *each) for each in runs]))
