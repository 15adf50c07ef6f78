"""Measures the time of a run: steps, waiting for data, checkpoints, evaluation and restarts."""

import contextlib
import time
from collections.abc import Callable, Iterator

import numpy as np


class Clock:
    """Measures step times since the last line of metrics, and productive time since the first start of the run.

    Step time is measured on the host between consecutive step completions, excluding `pause`; the host lags the devices
    by at most two steps. The first step after a start compiles and is not counted.
    """

    def __init__(
        self,
        images: int,
        devices: int,
        flops_share: float = 0.0,
        *,
        productive: float = 0.0,
        first_start: float | None = None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Args:
        images: images per step.
        devices: number of devices of all processes.
        flops_share: FLOPs per image over FLOP/s per device, for `perf/mfu`; 0 omits it.
        productive: seconds of steps before this start, without repeated steps.
        first_start: Unix time of the first start of the run; by default now.
        now: returns the time in seconds.
        """
        self.images, self.devices, self.flops_share, self.now = images, devices, flops_share, now
        self.productive = productive
        self.first_start = time.time() if first_start is None else first_start
        self._last: float | None = None  # end of the last step
        self._paused: dict[str, float] = {}
        self._seconds: list[float] = []
        self._idle, self._host = 0.0, []  # type: float, list[float]

    def step(self, waited: float, idle: bool, blocked: float) -> float | None:
        """Ends a step; returns the seconds of host work, or None for the first step.

        Args:
          waited: seconds of waiting for the batch.
          idle: whether the devices were idle meanwhile.
          blocked: seconds of waiting for the devices.
        """
        now, host = self.now(), None
        if self._last is not None:
            seconds = now - self._last
            host = seconds - waited - blocked
            self.productive += seconds
            self._seconds.append(seconds)
            self._host.append(host)
            self._idle += waited if idle else 0.0
        self._last = now
        return host

    @contextlib.contextmanager
    def pause(self, name: str) -> Iterator[None]:
        """Excludes other work, such as "checkpoint", from step times; reported as `perf/checkpoint_seconds`."""
        start = self.now()
        try:
            yield
        finally:
            seconds = self.now() - start
            self._paused[name] = self._paused.get(name, 0.0) + seconds
            if self._last is not None:
                self._last += seconds

    def goodput(self) -> float:
        """The fraction of time since the first start of the run spent in steps that were not lost."""
        return self.productive / max(time.time() - self.first_start, 1e-9)

    def line(self) -> dict[str, float]:
        """The metrics since the last call."""
        always = {f"perf/{name}_seconds": seconds for name, seconds in self._paused.items()}
        always["perf/goodput"] = self.goodput()
        seconds, host, idle = np.array(self._seconds), np.array(self._host), self._idle
        self._seconds, self._host, self._idle, self._paused = [], [], 0.0, {}
        if not len(seconds):
            return always
        rate = self.images * len(seconds) / max(seconds.sum(), 1e-9) / self.devices
        return {
            "perf/images_per_sec_per_chip": rate,
            **({"perf/mfu": rate * self.flops_share} if self.flops_share else {}),
            **{f"perf/step_seconds_p{percent}": float(np.percentile(seconds, percent)) for percent in (50, 90, 99)},
            "perf/host_seconds_p50": float(np.percentile(host, 50)),
            "data/wait_frac": idle / max(seconds.sum(), 1e-9),
            **always,
        }
