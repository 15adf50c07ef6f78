"""Ranges of numbers, and how a value that is outside of one is reported."""

from typing import Any

from marjax.errors import shortened


def shown(value: Any) -> str:
    """A value of any kind and size, as an error shows it: on one line, and short."""
    try:
        return shortened(repr(value))
    except ValueError:  # Python does not print integers of more than 4300 digits
        return f"{type(value).__name__} of thousands of digits"
