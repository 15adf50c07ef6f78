"""Profiler traces of train steps, for TensorBoard or xprof."""

import importlib.util
import os
import pathlib
import tempfile

import jax
from etils import epath

from marjax.errors import UserError
from marjax.ranges import check_arguments


class Profile:
    """Traces steps `first` to `last` on process 0 into `<workdir>/profile`."""

    def __init__(self, first: int, last: int, workdir: str | epath.Path, total_steps: int) -> None:
        """Raises UserError if the run does not contain all of these steps."""
        for step in (first, last):
            check_arguments(step=step)
        if not 0 < first <= last <= total_steps:
            raise UserError(f"steps {first}:{last} cannot be profiled; use steps from 1 to {total_steps}")
        if jax.default_backend() == "cpu" and "JAX_PLATFORMS" not in os.environ and importlib.util.find_spec("libtpu"):
            raise UserError(
                "the profiler of the installed libtpu ends a process without a TPU; set JAX_PLATFORMS=cpu to trace "
                "steps on CPU"
            )
        self.first, self.last, self.active = first, last, jax.process_index() == 0
        self.folder = epath.Path(workdir) / "profile"
        self._local: tempfile.TemporaryDirectory[str] | None = None

    def before(self, step: int, earlier: object) -> None:
        """Starts the trace before step `first`, when the `earlier` result is ready."""
        if self.active and step == self.first:
            jax.block_until_ready(earlier)
            # XLA writes traces to local files only.
            self._local = tempfile.TemporaryDirectory()
            jax.profiler.start_trace(self._local.name)

    def after(self, step: int, result: object) -> None:
        """Stops the trace after step `last` and copies it to the work directory."""
        if self._local is not None and step == self.last:
            jax.block_until_ready(result)
            jax.profiler.stop_trace()
            local = pathlib.Path(self._local.name)
            for file in (path for path in local.rglob("*") if path.is_file()):
                target = self.folder / file.relative_to(local).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
            self._local.cleanup()
            self._local = None
