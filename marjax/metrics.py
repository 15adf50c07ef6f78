"""Where metrics go: JSON lines and TensorBoard in the work directory, a progress bar on a terminal.

Metric names are paths (`train/loss`, `perf/mfu`). Only process 0 writes. TensorBoard files are written by tensorboardX:
no TensorFlow.
"""

import json
import math
import os
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorboardX
import tqdm
from etils import epath

from marjax.errors import UserError
from marjax.generation.images import write_png


class MetricWriter:
    """Writes `metrics.jsonl`, `samples/*.png` and TensorBoard events of one run.

    Args:
      workdir: the work directory, which exists.
      start_step: lines of later steps are dropped, since a resumed run writes them again.
      total_steps: the length of the progress bar.
      tensorboard: whether to write events.
      progress: whether to show a bar if standard error is a terminal.
      active: false on every process but the first; then nothing is written.
    """

    def __init__(self, workdir: str | os.PathLike[str], *, start_step: int, total_steps: int, tensorboard: bool = True,
                 progress: bool = True, active: bool = True) -> None:
        self.active = active
        self._root = epath.Path(workdir)
        self._events: Any = None
        self._bar: Any = None
        self._path = self._root / "metrics.jsonl"
        if not active:
            return
        # Kept in memory, because object stores cannot append: a run of 250,000 steps logs some 2,500 lines.
        self._lines = [line for line in self._read() if line["step"] <= start_step]
        self._flush()
        if tensorboard:
            self._events = tensorboardX.SummaryWriter(os.fspath(self._root / "tensorboard"), purge_step=start_step + 1)
        self._bar = tqdm.tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True,
                              disable=not (progress and sys.stderr.isatty()))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics; values that are not finite (a term without any token) are left out."""
        if not self.active:
            return
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        self._lines.append({"step": step, **finite})
        self._flush()
        if self._events is not None:
            for name, value in finite.items():
                self._events.add_scalar(name, value, step)
            self._events.flush()
        shown = {"loss": finite.get("train/loss"), "img/s/chip": finite.get("perf/images_per_sec_per_chip"),
                 **{name.removeprefix("eval/"): value for name, value in finite.items() if name.startswith("eval/")}}
        text = ", ".join(f"{name} {value:.4g}" for name, value in shown.items() if value is not None)
        if self._bar is not None and not self._bar.disable:
            self._bar.set_postfix_str(text, refresh=False)
        else:
            print(f"step {step}: {text}", file=sys.stderr, flush=True)

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """A picture, uint8 (H, W, 3), as `samples/<name>_<step>.png` and in TensorBoard."""
        if not self.active:
            return
        folder = self._root / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        write_png(folder / f"{name}_{step:08d}.png", picture)
        if self._events is not None:
            self._events.add_image(name, picture, step, dataformats="HWC")

    def has(self, step: int, prefix: str) -> bool:
        """Whether a metric with a name that begins so was written at that step; on every process."""
        lines = self._lines if self.active else self._read()
        return any(line["step"] == step and any(name.startswith(prefix) for name in line) for line in lines)

    def progress(self, step: int) -> None:
        """Moves the bar."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def note(self, text: str) -> None:
        """A line for the person who watches; does not break the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        if self._events is not None:
            self._events.close()
        if self._bar is not None:
            self._bar.close()

    def _read(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        lines = []
        for line in self._path.read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break  # cut short by a crash; what follows would be later still
        return lines

    def _flush(self) -> None:
        text = "".join(json.dumps(line) + "\n" for line in self._lines)
        partial = self._root / "metrics.jsonl.partial"
        try:
            partial.write_text(text)
            partial.replace(self._path)
        except OSError as error:
            raise UserError(f"{self._path} cannot be written ({error.strerror or error}): free space, or resume in a "
                            f"folder that can") from None
