"""The config's fields by name and type: listing them, overriding single fields, and checking a whole config."""

import functools
import numbers
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from marjax.config.schema import NONE_IS_OFF, PATHS, RENAMED, fields
from marjax.errors import UserError, closest
from marjax.ranges import shown
from marjax.values import is_none, parse_value, unquoted

_MAX_TEXT = 4095  # characters, as in a path
_EXPECTED = {bool: "bool", int: "int", float: "float", str: "str", tuple: "a tuple of int"}


class Field(NamedTuple):
    """A field's type, and whether it may be None."""

    kind: type
    optional: bool


@functools.cache
def known_fields() -> Mapping[str, Field]:
    """Every field of `base()` by its dotted key."""
    config = fields()
    found = {}
    for key, default in flatten(config).items():
        *parents, leaf = key.split(".")
        section = functools.reduce(lambda section, name: section[name], parents, config)
        found[key] = Field(section.get_type(leaf), default is None or key in NONE_IS_OFF)
    return found


@functools.cache
def sections() -> Mapping[str, set[str]]:
    """The names in every section of `base()` by its dotted key; "" is the config itself."""
    found: dict[str, set[str]] = {"": set()}
    for key in known_fields():
        names = key.split(".")
        for depth, name in enumerate(names):
            found.setdefault(".".join(names[:depth]), set()).add(name)
    return found


def conform(config: Mapping[str, Any] | ConfigDict) -> ConfigDict:
    """A locked copy with exactly the fields of `base()`, each of its type; integers become floats where needed.

    Args:
      config: one that started from `base()`, or nested dicts with the same fields.

    Raises:
      UserError: an unknown field (names the closest), a missing field, or a value of the wrong type.
    """
    copy = fields()
    _fill(copy, config, "")
    return copy


def apply_overrides(config: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
    """A copy with single fields set.

    Strings are parsed to the field's type (see `parse_value`); "none" and "null" mean None for an optional field.

    Raises:
      UserError: an unknown field (names the closest), a section, or a value of the wrong type, also in `config`.
    """
    config = conform(config)
    known = known_fields()
    if not isinstance(overrides, Mapping):
        raise UserError(f"the fields to set are {shown(overrides)}; give a dict such as {{'train.lr': 1e-3}}")
    for given, value in overrides.items():
        key = RENAMED.get(given, given)
        if key not in known:
            if key in sections():
                raise UserError(
                    f"config.{key} is a section; set one of its fields, such as "
                    f"{next(name for name in known if name.startswith(f'{key}.'))}"
                )
            raise UserError(f"unknown config key {shown(key)}{closest(str(key), known)}")
        kind, optional = known[key]
        if optional and is_none(value):
            value = None
        elif isinstance(value, str) and kind is not str:
            value = parse_value(key, value, kind)
        elif isinstance(value, str) and key not in PATHS:
            value = unquoted(value.strip())
        *parents, leaf = key.split(".")
        section = functools.reduce(lambda section, name: section[name], parents, config)
        section[leaf] = _typed(key, value, known[key])
    return config


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one dict with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def unknown_key(key: str) -> UserError:
    """The error about an unknown field or section."""
    if key in RENAMED:
        return UserError(f"unknown config key {shown(key)}; it was renamed to {RENAMED[key]!r}")
    return UserError(f"unknown config key {shown(key)}{closest(key, [*sections(), *known_fields()])}")


def _fill(section: ConfigDict, given: Any, prefix: str) -> None:
    where = f"config.{prefix}".rstrip(".") if prefix else "config"
    if not isinstance(given, Mapping | ConfigDict):
        raise UserError(f"{where} is {shown(given)}, expected a section with its fields")
    for key in given:
        if key not in section and f"{prefix}{key}" not in RENAMED:
            raise unknown_key(f"{prefix}{key}")
    for key in section:
        if key not in given:
            raise UserError(f"config.{prefix}{key} is missing; start from marjax.config.base() and set single fields")
        if isinstance(section[key], ConfigDict):
            _fill(section[key], given[key], f"{prefix}{key}.")
        else:
            section[key] = _typed(f"{prefix}{key}", given[key], known_fields()[f"{prefix}{key}"])


def _typed(key: str, value: Any, field: Field) -> Any:
    """The value as the field's type. Raises UserError."""
    kind, is_number = field.kind, not isinstance(value, bool)
    if value is None and field.optional:
        return None
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and isinstance(value, numbers.Integral) and is_number:
        return int(value)
    if kind is float and isinstance(value, numbers.Real) and is_number:
        try:
            return float(value)
        except OverflowError:
            raise UserError(f"config.{key} is {shown(value)}; give a number that a float can hold") from None
    if kind is str and isinstance(value, str | os.PathLike):
        text = os.fspath(value)
        if isinstance(text, str) and _is_text(text):
            if len(text) > _MAX_TEXT:
                raise UserError(f"config.{key} has {len(text)} characters; use at most {_MAX_TEXT}")
            return text
    if (
        kind is tuple
        and isinstance(value, tuple | list)
        and all(  # JSON has lists
            isinstance(each, numbers.Integral) and not isinstance(each, bool) for each in value
        )
    ):
        return tuple(int(each) for each in value)
    raise UserError(f"config.{key} is {shown(value)}, expected {_EXPECTED[kind]}")


def _is_text(text: str) -> bool:
    """Whether system calls accept the text as part of a path."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return "\0" not in text
