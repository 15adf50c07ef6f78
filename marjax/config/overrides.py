"""Single fields of a config: set by dotted key, parsed to the field's type."""

import copy
import difflib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from marjax.errors import UserError


def apply_overrides(config: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
    """A copy with single fields set; strings are parsed to the field's type.

    Raises:
      UserError: an unknown field (naming the closest), a section, or a value of the wrong type.
    """
    config = copy.deepcopy(config)  # keeps the types of fields that are None
    fields = flatten(config)
    for key, value in overrides.items():
        if key not in fields:
            sections = {name.rsplit(".", 1)[0] for name in fields if "." in name}
            if key in sections:
                raise UserError(f"config.{key} is a section: set one of its fields, such as "
                                f"{next(name for name in fields if name.startswith(key + '.'))}")
            raise UserError(f"unknown config key {key!r}{closest(key, fields)}")
        *parents, leaf = key.split(".")
        section = config
        for name in parents:
            section = section[name]
        kind = section.get_type(leaf)
        value = parse_value(key, value, kind) if isinstance(value, str) else value
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if kind is tuple and isinstance(value, list):  # as JSON has them
            value = tuple(value)
        try:
            section[leaf] = value
        except TypeError:
            raise UserError(f"config.{key} is {value!r}: expected {kind.__name__}") from None
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


def closest(name: str, names: Any) -> str:
    names = list(names)
    by_depth = sorted(names, key=lambda known: -known.count("."))
    leaves = {known.rsplit(".", 1)[-1]: known for known in by_depth}  # of equal ones, the one that lies highest
    match = difflib.get_close_matches(name, names, 1, 0.5)
    match = match or [leaves[m] for m in difflib.get_close_matches(name.rsplit(".", 1)[-1], leaves, 1, 0.6)]
    return f"; the closest is {match[0]!r}" if match else ""


def parse_value(key: str, text: str, kind: type) -> Any:
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if kind is tuple:  # of whole numbers: "1,2,4"
            return tuple(int(part) for part in text.split(",")) if text else ()
        return kind(text)
    except (ValueError, KeyError):
        if kind is tuple:
            raise UserError(f"{key}={text!r}: expected whole numbers with commas, such as 1,2,4") from None
        raise UserError(f"{key}={text!r}: expected {kind.__name__}") from None
