"""The train step, as `marjax benchmark train` measures it."""

from collections.abc import Callable

import jax
import numpy as np

from marjax import sharding
from marjax.assembly import Assembly
from marjax.benchmarks.prepared import Prepared
from marjax.perf import flops
from marjax.training import state as state_lib
from marjax.training.fit import training_batch
from marjax.training.step import make_train_step


def prepare_train(assembly: Assembly) -> Prepared:
    """Prepares the train step with a batch of random images."""
    config, tokens, params = assembly.config, assembly.tokens, assembly.tokenizer.params
    step = make_train_step(assembly)
    rng = np.random.default_rng(0)
    size, side = config.train.batch_size, tokens.height * tokens.patch
    batch = sharding.shard_batch(
        {
            "image": rng.integers(0, 256, (size, side, side, tokens.channels), np.uint8),
            "label": rng.integers(0, config.data.num_classes, size, np.int32),
        },
        assembly.mesh,
    )

    def make_run(compiled: jax.stages.Compiled) -> Callable[[], None]:
        state = state_lib.create(assembly.generator, assembly.optimizer, assembly.state, config.seed)

        def run() -> None:
            nonlocal state
            state, metrics = compiled(state, batch, params)
            jax.block_until_ready((state, metrics))

        return run

    return Prepared(
        "train step",
        lambda: step.lower(assembly.state, batch, params),
        make_run,
        training_batch(config, assembly.mesh),
        flops.train_flops(assembly.generator),
    )
