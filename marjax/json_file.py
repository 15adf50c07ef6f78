r"""Reads JSON files and checks their size, encoding and shape.

A shape is plain Python:

    int, float, bool, str, dict, list   a value of that type; a bool is not an int; a float may be written as an integer
    None                                null
    object                              anything
    range(1, 100)                       an integer in that range
    {"ema", "raw"}                      one of these values
    re.compile(r"\w+")                  a string that fully matches
    {"name": shape, "note?": shape}     an object with these members; note may be missing; other members are ignored
    {str: shape}                        an object whose members, except those named beside str, all have that shape
    [shape]                             an array of such values
    (shape, shape)                      a value of either shape
"""

import json
import math
import os
import re
from collections import Counter
from typing import Any

from marjax.errors import UserError, shortened
from marjax.files import read_whole

MAX_BYTES = 16 << 20
_MAX_DEPTH = 100  # of nesting; recursive code fails at a few hundred
_MAX_INT = 1 << 64
REQUIRED = object()
_NAMES: dict[Any, str] = {
    int: "an integer",
    float: "a finite number",
    bool: "true or false",
    str: "a string",
    dict: "an object",
    list: "an array",
    None: "null",
}


def read_json(
    path: str | os.PathLike[str],
    shape: Any = object,
    *,
    advice: str,
    missing: Any = REQUIRED,
    allow_nan: bool = False,
    max_bytes: int = MAX_BYTES,
) -> Any:
    """Reads a JSON file, local or gs://, and checks it.

    Args:
      path: path of the file, UTF-8 with or without a byte order mark.
      shape: expected shape, see the module.
      advice: how to fix an invalid file; the end of every error.
      missing: returned if the file does not exist; by default that is an error.
      allow_nan: accept NaN and Infinity.
      max_bytes: refuse a longer file before parsing it.

    Returns:
      What `json.loads` returns. Integers have at most 64 bits, numbers are finite unless `allow_nan`, and the members
      of an object are unique.

    Raises:
      UserError: the file is missing, unreadable or not JSON, or a value, which is named, has another shape.
      StorageError: gs:// does not answer.
    """
    where = os.fspath(path)
    try:
        data = read_whole(path, max_bytes, advice=advice)
    except (FileNotFoundError, NotADirectoryError):
        if missing is not REQUIRED:
            return missing
        raise UserError(f"{where} does not exist; {advice}") from None
    return parse_json(data, shape, where=where, advice=advice, allow_nan=allow_nan)


def parse_json(text: str | bytes, shape: Any = object, *, where: str, advice: str, allow_nan: bool = False) -> Any:
    """Parses and checks JSON in memory; arguments and errors as in `read_json`.

    Args:
      text: the JSON; bytes are UTF-8.
      where: its source, such as a path or "line 3 of PATH"; the start of every error.
    """

    def constant(name: str) -> float:
        if not allow_nan:
            raise ValueError(f"{name} is not a JSON number")
        return float(name)

    def number(digits: str) -> float:
        value = float(digits)
        if math.isinf(value) and not allow_nan:
            raise ValueError(f"the number {digits[:20]} is too large")
        return value

    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text.removeprefix("\ufeff")
        content = json.loads(
            text, parse_int=_integer, parse_float=number, parse_constant=constant, object_pairs_hook=_object
        )
        _check_all(content)
    except RecursionError:
        raise UserError(f"{where} is nested deeper than {_MAX_DEPTH} levels; {advice}") from None
    except MemoryError:
        raise UserError(f"{where} needs more memory than is available; {advice}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 (byte {error.start}); {advice}") from None
    except UnicodeEncodeError:
        raise UserError(f"{where} has an unpaired surrogate; {advice}") from None
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}); {advice}") from None
    check_json(content, shape, where=where, advice=advice)
    return content


def check_json(content: Any, shape: Any, *, where: str, advice: str) -> None:
    """Checks parsed JSON against a shape. Raises UserError that names the first value with another shape."""
    found = _misfit(content, shape, "")
    if found is not None:
        name, value, expected = found
        raise UserError(f"{where}: {name.removeprefix('.') or 'the content'} is {value}, expected {expected}; {advice}")


def _misfit(value: Any, shape: Any, name: str) -> tuple[str, str, str] | None:
    """The name of the first value with another shape, the value, and what is expected; None if everything matches."""
    if isinstance(shape, tuple):
        misfits = [_misfit(value, each, name) for each in shape]
        if None in misfits:
            return None
        inner = [misfit for misfit in misfits if misfit is not None and misfit[0] != name]
        return inner[0] if inner else (name, _shown(value), " or ".join(_expected(each) for each in shape))
    if isinstance(shape, dict) and isinstance(value, dict):
        named = [(key, key.removesuffix("?"), each) for key, each in shape.items() if key is not str]
        known = {key for _, key, _ in named}
        others = [(key, key, shape[str]) for key in value if key not in known] if str in shape else []
        for written, key, each in (*named, *others):
            inside = f"{name}.{shortened(key)}"
            if key not in value:
                if written == key:
                    return inside, "missing", _expected(each)
            elif (found := _misfit(value[key], each, inside)) is not None:
                return found
        return None
    if isinstance(shape, list) and isinstance(value, list):
        for index, item in enumerate(value):
            if (found := _misfit(item, shape[0], f"{name}[{index}]")) is not None:
                return found
        return None
    return None if _fits(value, shape) else (name, _shown(value), _expected(shape))


def _fits(value: Any, shape: Any) -> bool:
    if shape is object:
        return True
    if shape is None:
        return value is None
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if isinstance(shape, range):
        return is_int and value in shape
    if isinstance(shape, set | frozenset):
        return any(type(value) is type(each) and value == each for each in shape)
    if isinstance(shape, re.Pattern):
        return isinstance(value, str) and shape.fullmatch(value) is not None
    if shape is int:
        return is_int and -(1 << 63) <= value < 1 << 63
    if shape is float:
        return is_int or isinstance(value, float)
    return isinstance(shape, type) and isinstance(value, shape)


def _expected(shape: Any) -> str:
    if isinstance(shape, range):
        return f"an integer from {shape.start} to {shape.stop - 1}"
    if isinstance(shape, set | frozenset):
        return " or ".join(sorted(json.dumps(each) for each in shape))
    if isinstance(shape, re.Pattern):
        return f"a string like {shape.pattern}"
    if isinstance(shape, dict | list):
        return _NAMES[type(shape)]
    if isinstance(shape, tuple):
        return " or ".join(_expected(each) for each in shape)
    return _NAMES.get(shape, "a value")


def _shown(value: Any) -> str:
    """An untrusted value as an error shows it: short, on one line."""
    if isinstance(value, dict | list):
        return _NAMES[type(value)]
    return shortened(json.dumps(value))


def _integer(digits: str) -> int:
    if len(digits) > 21 or abs(int(digits)) >= _MAX_INT:
        raise ValueError(f"the integer {digits[:20]}... has more than 64 bits")
    return int(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        duplicate = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"duplicate member {shortened(duplicate)!r}")
    return members


def _check_all(content: Any) -> None:
    """Raises RecursionError for deep nesting, and UnicodeEncodeError for text that could not be written back."""
    level = [content]
    for _ in range(_MAX_DEPTH):
        for value in level:
            if isinstance(value, str):
                value.encode("utf-8", "surrogateescape")
        level = [
            each
            for value in level
            if isinstance(value, dict | list)
            for each in ((*value, *value.values()) if isinstance(value, dict) else value)
        ]
        if not level:
            return
    raise RecursionError
