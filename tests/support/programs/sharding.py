"""Trains two steps and samples on one device and on meshes of eight; prints by how much they differ, as JSON.

Its arguments are the fields of the config and a list of mesh shapes, both JSON.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from marjax import config as config_lib
from marjax import sharding
from marjax.assembly import assemble
from marjax.generation.sampler import Sampler
from marjax.models.init import init_unboxed
from marjax.training import state as state_lib
from marjax.training.step import make_train_step

BATCH = {
    "image": np.random.default_rng(0).integers(0, 256, (32, 8, 8, 1), np.uint8),
    "label": np.arange(32, dtype=np.int32) % 10,
}


def run(
    config: ml_collections.ConfigDict, shape: tuple[int, int, int], devices: Sequence[jax.Device], weights: Any
) -> dict[str, Any]:
    """State, metrics and gradients of two train steps, 12 samples, and how much of it is sharded."""
    config = config_lib.apply_overrides(config, {"mesh.replicate_below": 0})
    mesh = sharding.make_mesh(*shape, devices=devices)
    assembly = assemble(config, mesh)
    abstract, tokenizer = assembly.state, assembly.tokenizer
    with jax.set_mesh(mesh):
        state = state_lib.create(assembly.generator, assembly.optimizer, abstract, 0)
        assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a.sharding == b.sharding, state, abstract)))
        sharded = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.params))
        batch = sharding.put_batch(BATCH, mesh)
        step = make_train_step(assembly).lower(state, batch, tokenizer.params).compile()
        text = step.as_text() or ""
        metrics = []
        for _ in range(2):
            state, measured = step(state, batch, tokenizer.params)
            metrics.append(jax.device_get(measured))
            if len(metrics) == 1:  # without clipping, Adam's first moment is the gradient times 1 - b1
                grads = jax.device_get(state.opt_state[1][0].mu)
        assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a.sharding == b.sharding, state, abstract)))
        # Fixed weights, so that sampling does not depend on training.
        params = jax.device_put(weights, jax.tree.map(lambda leaf: leaf.sharding, abstract.params))
        images = Sampler(assembly)(params, np.arange(12) % 10, 3, batch_size=12)
    return {
        "state": jax.device_get(state),
        "metrics": metrics,
        "images": images,
        "grads": grads,
        "sharded": sharded,
        "collectives": sum(text.count(f"{name}(") for name in ("all-reduce", "all-gather", "reduce-scatter")),
    }


def without_key_bias(params: Any) -> Any:
    """Sets the biases of keys to zero: they shift all scores of a query alike, so their gradient is rounding error."""

    def one(path: Any, leaf: np.ndarray) -> np.ndarray:
        if [part.key for part in path[-2:]] == ["qkv", "bias"]:
            leaf = np.array(leaf)
            leaf[..., 1, :, :] = 0.0
        return leaf

    return jax.tree_util.tree_map_with_path(one, params)


def largest_error(a: Any, b: Any) -> float:
    """The largest relative error of a leaf."""
    flat = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.linalg.norm(np.float64(x) - y) / (np.linalg.norm(np.float64(y)) + 1e-12)) for x, y in flat)


def compare(fields: Mapping[str, Any], meshes: Sequence[Sequence[int]]) -> dict[str, Any]:
    """By mesh shape, the relative errors to one device."""
    config = config_lib.resolve(config_lib.apply_overrides(config_lib.base(), fields))
    generator = assemble(config).generator

    def init(key: jax.Array) -> Any:
        return jax.tree.map(lambda x: x + 0.03, init_unboxed(generator, key))

    weights = jax.device_get(jax.jit(init)(jax.random.key(1)))
    one = run(config, (1, 1, 1), jax.devices()[:1], weights)
    report: dict[str, Any] = {"one": {"sharded": one["sharded"], "collectives": one["collectives"]}}
    for data, fsdp, tensor in meshes:
        shape = data, fsdp, tensor
        many = run(config, shape, jax.devices(), weights)
        report[str(shape)] = {
            "sharded": many["sharded"],
            "collectives": many["collectives"],
            "params": largest_error(without_key_bias(many["state"].params), without_key_bias(one["state"].params)),
            "ema": largest_error(without_key_bias(many["state"].ema), without_key_bias(one["state"].ema)),
            "metrics": largest_error(many["metrics"], one["metrics"]),
            "grads": largest_error(many["grads"], one["grads"]),
            "images": int(np.abs(many["images"].astype(int) - one["images"]).max()),
            "distinct": len({image.tobytes() for image in one["images"]}),
        }
    return report


if __name__ == "__main__":
    assert len(jax.devices()) == 8
    print(json.dumps(compare(json.loads(sys.argv[1]), json.loads(sys.argv[2]))))
