"""Where the time of a run goes: steps, waiting for data, checkpoints, evaluation, and what restarts have cost."""

import contextlib
import time
from collections.abc import Callable, Iterator

import numpy as np


class Clock:
    """Times of the steps since the last line of metrics, and of the productive ones since the run was first started.

    A step lasts from the end of the one before to its own end, as the host sees them, which is a step behind the
    devices at most two; what `pause` covers is left out. The first step after a start compiles and is not counted.
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
        images: of a step.
        devices: of all processes.
        flops_share: FLOPs of an image over a device's FLOP/s, for `perf/mfu`; 0 to leave that out.
        productive: seconds of the steps done before this start, those done again left out.
        first_start: when the run was first started, in seconds since 1970; now, by default.
        now: the clock.
        """
        self.images, self.devices, self.flops_share, self.now = images, devices, flops_share, now
        self.productive = productive
        self.first_start = time.time() if first_start is None else first_start
        self._last: float | None = None  # end of the last step; None before the first
        self._paused: dict[str, float] = {}
        self._seconds: list[float] = []
        self._idle, self._host = 0.0, []  # type: float, list[float]

    def step(self, waited: float, idle: bool, blocked: float) -> float | None:
        """Ends a step; the seconds that the host worked itself, or None for the first.

        Args:
          waited: seconds that the batch was waited for.
          idle: whether the devices had nothing to do in that time.
          blocked: seconds that the host waited for the devices.
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
        """Something that is no step, such as "checkpoint": told as `perf/checkpoint_seconds`."""
        begun = self.now()
        try:
            yield
        finally:
            seconds = self.now() - begun
            self._paused[name] = self._paused.get(name, 0.0) + seconds
            if self._last is not None:
                self._last += seconds

    def goodput(self) -> float:
        """The share of the time since the run was first started that went into steps it still has."""
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
