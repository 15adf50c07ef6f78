"""A trace of some steps of a run, for TensorBoard's profiler or xprof."""

import importlib.util
import os
import pathlib
import tempfile

import jax
from etils import epath

from marjax.errors import UserError
from marjax.ranges import check_arguments


class Profile:
    """Traces the steps from `first` to `last`, on process 0, into `<workdir>/profile`."""

    def __init__(self, first: int, last: int, workdir: str | epath.Path, total_steps: int) -> None:
        """Raises UserError: the run does not go through all of these steps."""
        for step in (first, last):
            check_arguments(step=step)
        if not 0 < first <= last <= total_steps:
            raise UserError(f"steps {first}:{last} cannot be traced: the run goes from step 1 to {total_steps}")
        if jax.default_backend() == "cpu" and "JAX_PLATFORMS" not in os.environ and importlib.util.find_spec("libtpu"):
            raise UserError(
                "libtpu is installed, whose profiler ends a process that has no TPU: set JAX_PLATFORMS=cpu "
                "to trace steps on the CPU"
            )
        self.first, self.last, self.active = first, last, jax.process_index() == 0
        self.folder = epath.Path(workdir) / "profile"
        self._local: tempfile.TemporaryDirectory[str] | None = None

    def before(self, step: int, earlier: object) -> None:
        """Begins, if this is the first step, once the `earlier` ones are through."""
        if self.active and step == self.first:
            jax.block_until_ready(earlier)
            # Traces are written by XLA, which knows local files only.
            self._local = tempfile.TemporaryDirectory()
            jax.profiler.start_trace(self._local.name)

    def after(self, step: int, result: object) -> None:
        """Ends, if this was the last step, and copies the trace to its place."""
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
