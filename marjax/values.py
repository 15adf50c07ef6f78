"""Values as users write them in flags, labels and config arguments."""

import decimal
import re
from typing import Any

from marjax.errors import UserError
from marjax.ranges import shown

_BOOLS = {
    word: truth
    for truth, words in ((True, ("true", "yes", "on", "1")), (False, ("false", "no", "off", "0")))
    for word in words
}


def parse_value(key: str, text: str, kind: type) -> Any:
    """Parses a value of type `kind`; surrounding blanks are ignored.

    An int may be written as 1e3 or 1_000; a bool as true, yes, on or 1, or their opposites, in any case; a tuple of
    ints as 1,2,4, with or without brackets; a str with or without quotes.

    Args:
      key: what the value is for, for errors.
      text: the value.
      kind: bool, int, float, str or tuple.

    Raises:
      UserError: the text is not of that type.
    """
    text = text.strip()
    try:
        if kind is bool:
            return _BOOLS[text.lower()]
        if kind is tuple:
            inner = text[1:-1] if text[:1] + text[-1:] in ("()", "[]") else text
            parts = inner.strip().removesuffix(",")
            return tuple(_integer(part) for part in parts.split(",")) if parts else ()
        if kind is str:
            return unquoted(text)
        return _integer(text) if kind is int else kind(text)
    except (ValueError, KeyError):
        expected = {
            bool: "bool (true or false)",
            int: "int, such as 1000 or 1e3",
            float: "float, such as 0.5 or 1e-3",
            tuple: "integers separated by commas, such as 1,2,4",
        }[kind]
        raise UserError(f"{key}={shown(text)}: expected {expected}") from None


def is_none(text: Any) -> bool:
    """Whether the text means None."""
    return isinstance(text, str) and text.strip().lower() in ("none", "null")


def unquoted(text: str) -> str:
    """The text without a surrounding pair of quotes, straight or curly."""
    return text[1:-1] if len(text) > 1 and text[0] + text[-1] in ("''", '""', "‘’", "“”") else text


def _integer(text: str) -> int:
    """Raises ValueError: the text is not an integer."""
    text = text.strip()
    if "e" not in text.lower():
        return int(text)
    if re.fullmatch(r"[+-]?\d[\d_]*(\.\d+)?[eE]\+?\d\d?", text) and (value := decimal.Decimal(text)) == int(value):
        return int(value)
    raise ValueError
