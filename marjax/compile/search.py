"""The largest batch a chip that fits, by remat policy: few compiles, since memory grows evenly with the batch."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from marjax.host_memory import gib

POLICIES = ("none", "dots", "full")  # of backbone and denoiser alike


@dataclasses.dataclass(frozen=True)
class Found:
    """Attributes:
    policy: of `config.model.remat` and `config.model.denoiser.remat`.
    batch: images a device, a power of two; 0: not even one fits.
    needed: bytes of HBM at that batch; of one image where none fits.
    usable: bytes there are.
    more: bytes needed at twice the batch; NaN where that was not tried.
    result: what `compile_at` gave for that batch besides, or None.
    error: why there is no answer, "" where there is one.
    """

    policy: str
    batch: int
    needed: float
    usable: float
    more: float
    result: Any = None
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        """All but `result`; what is not known is null."""
        numbers = {"hbm_bytes": self.needed, "usable": self.usable, "hbm_bytes_of_twice_as_many": self.more}
        if self.error:
            return {"remat": self.policy, "error": self.error}
        return {
            "remat": self.policy,
            "images_a_device": self.batch,
            **{name: None if math.isnan(value) else value for name, value in numbers.items()},
        }


@dataclasses.dataclass(frozen=True)
class Trial:
    """One compile: bytes needed, bytes usable, whether the compiler found that it fits, and anything to keep."""

    needed: float
    usable: float
    fits: bool
    result: Any = None


def largest_batch(policy: str, compile_at: Callable[[int], Trial], start: int, fixed: float, most: int = 1024) -> Found:
    """The largest power of two that fits, where twice as many do not.

    Args:
      policy: only noted.
      compile_at: compiles for so many images a device.
      start: where to begin, images a device.
      fixed: bytes that do not depend on the batch, as far as they are known; the first guess rests on them.
      most: where to stop.
    """
    trials: dict[int, Trial] = {}

    def at(batch: int) -> Trial:
        if batch not in trials:
            trials[batch] = compile_at(batch)
        return trials[batch]

    batch = _power(start)
    first = at(batch)
    slope = max(first.needed - fixed, 1.0) / batch
    batch = min(most, max(1, _power(int((first.usable - fixed) / slope))))
    while at(batch).fits and batch < most and at(2 * batch).fits:
        batch *= 2
    while batch and not at(batch).fits:
        batch //= 2
    if not batch:
        return Found(policy, 0, at(1).needed, first.usable, math.nan)
    more = at(2 * batch).needed if batch < most else math.nan
    return Found(policy, batch, at(batch).needed, at(batch).usable, more, at(batch).result)


def table(found: Sequence[Found]) -> str:
    """A line a policy, for people."""
    lines = ["remat  images a device  needs        twice as many need  there are"]
    for each in found:
        if each.error:
            lines.append(f"{each.policy:5}  {each.error}")
            continue
        needed = gib(each.needed) if each.batch else f"one needs {gib(each.needed)}"
        more = gib(each.more) or ("-" if each.batch else "")
        lines.append(f"{each.policy:5}  {each.batch or 'none':>15}  {needed:11}  {more:>18}  {gib(each.usable):>9}")
    return "\n".join(lines)


def _power(number: int) -> int:
    """The largest power of two that is not above it; 1 for less."""
    return 1 << (max(1, number).bit_length() - 1)
