"""The host's own work in a training step: taking a batch, transferring it, dispatching, recording metrics."""

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from marjax import config as config_lib
from marjax import numerics, sharding
from marjax.assembly import assemble
from marjax.checkpoints.manager import Checkpoints
from marjax.data.pipeline import Batch, aligned_empty
from marjax.metrics import MetricWriter
from marjax.training.clock import Clock
from marjax.training.loop import Intervals, Metrics, Outputs, Run, Task
from marjax.training.state import TrainState
from marjax.training.train import checkpoint_items


@numerics.pinned()
def host_work(config: ml_collections.ConfigDict, steps: int = 300) -> dict[str, Any]:
    """Runs the training loop on a zero state of the config's shapes and shardings, with a step that only counts.

    The measured time is therefore the host's. On CPU it is an upper bound, since the devices are threads of the host.

    Returns:
      A dict with "devices", "mesh", "arrays" (of the state), "steps", and "seconds" and "seconds_p90" per step (median
      and 90th percentile).
    """
    config = config_lib.resolve(config)
    assembly = assemble(config)
    mesh, abstract = assembly.mesh, assembly.state
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    names = ("train/loss", "train/mse", "train/vb", "train/grad_norm", "train/param_norm", "train/lr", "finite")

    def count(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        return state.replace(step=state.step + 1), {name: jnp.ones(()) for name in names}  # type: ignore[attr-defined]

    step = jax.jit(count, donate_argnums=0, out_shardings=(shardings, sharding.replicated(mesh)))
    state = jax.jit(
        lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract), out_shardings=shardings
    )()
    data = config.data
    rows = config.train.batch_size // jax.process_count()
    batch = {
        "image": aligned_empty((rows, data.image_size, data.image_size, data.channels), np.uint8),
        "label": np.zeros((rows,), np.int32),
    }
    batch["image"][...] = 0

    def batches() -> Iterator[Batch]:
        for _ in range(steps):  # StopIteration comes before the run's last step, which would save
            yield batch

    seconds: list[float] = []

    class RecordingClock(Clock):
        def step(self, waited: float, idle: bool, blocked: float) -> float | None:
            host = super().step(waited, idle, blocked)
            if host is not None:
                seconds.append(host)
            return host

    with (
        tempfile.TemporaryDirectory() as folder,
        Checkpoints(pathlib.Path(folder) / "checkpoints") as checkpoints,
        MetricWriter(
            folder, start_step=0, total_steps=steps, tensorboard=False, progress=False, active=False
        ) as writer,
    ):
        every = Intervals(steps + 1, config.log.every, steps + 1, 0)
        draw = lambda state: ("", np.zeros((1, 1, 3), np.uint8))  # noqa: E731
        task = Task(every, config.train.batch_size, step, checkpoint_items, draw, advice="")
        clock = RecordingClock(config.train.batch_size, mesh.size)
        run = Run(task, Outputs(writer, checkpoints), clock, mesh)
        with jax.set_mesh(mesh), contextlib.suppress(StopIteration):
            run.steps(state, batches())
    return {
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "arrays": len(jax.tree.leaves(abstract)),
        "steps": steps,
        "seconds": float(np.median(seconds)),
        "seconds_p90": float(np.percentile(seconds, 90)),
    }
