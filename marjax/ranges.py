"""Ranges of numbers, and the ranges of arguments that commands and functions share.

The ranges of config fields are in `config/schema.py`.
"""

import dataclasses
import math
import numbers
import operator
from typing import Any

from marjax.errors import UserError, shortened

MAX_INT = 2**31 - 1  # largest step, an int32 on the devices
MAX_FLOAT = 3e38  # fits float32
MIN_FLOAT = 1e-30  # nonzero in float32, also after some arithmetic
BELOW_ONE = 1.0 - 2.0**-24  # the largest float32 below 1


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included, and never NaN; integers only if `whole`."""

    low: float
    high: float
    whole: bool = False

    def check(self, name: str, value: Any) -> None:
        """Raises UserError, which calls the value `name`, if it is not a number in this range."""
        if self.whole:
            if not _is_int(value):
                raise UserError(f"{name} is {shown(value)}, expected int")
        elif isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise UserError(f"{name} is {shown(value)}, expected float")
        if not self.low <= value <= self.high:
            raise UserError(f"{name} is {shown(value)}, expected {self._expected(value)}")

    def _expected(self, value: Any) -> str:
        if value > self.high == BELOW_ONE:
            return "less than 1"
        if value > self.high:
            return f"at most {self.high:,}".replace(",", "_") if self.whole else f"at most {self.high:g}"
        if self.low == MIN_FLOAT:
            return "a positive number"
        return f"at least {self.low:g}" + (f" and at most {self.high:g}" if math.isnan(value) else "")


def integer(low: int, high: int = MAX_INT) -> Range:
    """The integers from `low` to `high`."""
    return Range(low, high, whole=True)


COUNT = integer(1)
COUNT_OR_NONE = integer(0)  # 0 turns something off
BATCH = integer(1, 2**24)
SEED = integer(0, 2**32 - 1)
IMAGE_SIZE = integer(1, 16_384)
SHARE = Range(0.0, 1.0)
SHARE_BELOW_ONE = Range(0.0, BELOW_ONE)
SHARE_BETWEEN = Range(MIN_FLOAT, BELOW_ONE)
POSITIVE = Range(MIN_FLOAT, MAX_FLOAT)

# Arguments of functions and commands, by name.
ARGUMENTS = {
    "batch_size": BATCH,
    "bits": integer(8, 16),
    "first_index": COUNT_OR_NONE,
    "held_out": SHARE_BETWEEN,
    "image_size": IMAGE_SIZE,
    "jobs": integer(1, 100_000),
    "keep_features": COUNT_OR_NONE,
    "max_bad": COUNT_OR_NONE,
    "num_images": COUNT,
    "num_per_label": integer(1, 10**6),
    "num_shards": integer(1, 99_999),
    "recompute": COUNT_OR_NONE,
    "repeats": COUNT_OR_NONE,
    "seed": SEED,
    "shard_examples": COUNT,
    "step": COUNT_OR_NONE,
    "steps": COUNT,
    "val_share": SHARE_BELOW_ONE,
    "workers": integer(1, 1024),
}


def _is_int(value: Any) -> bool:
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool)


def check_arguments(**values: Any) -> None:
    """Checks arguments against ARGUMENTS by name, except those that are None. Raises UserError."""
    for name, value in values.items():
        if value is not None:
            ARGUMENTS[name].check(name, value)


def shown(value: Any) -> str:
    """A value of any type as an error shows it: short, on one line."""
    try:
        return shortened(repr(value))
    except ValueError:  # Python does not print integers of more than 4300 digits
        return f"{type(value).__name__} of thousands of digits"
