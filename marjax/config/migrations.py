"""The format of a work directory's config.json, and how older formats are migrated to it.

To rename or remove a field, or to add one whose default changes what happened before, raise FORMAT and add a function
to `_MIGRATIONS`. To add any other field, raise FORMAT and list it in `_ADDED`: older configs get its default.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

from marjax.config.overrides import flatten
from marjax.config.schema import RENAMED, fields
from marjax.errors import UserError
from marjax.ranges import shown

FORMAT = 3  # format 0 has no such key
KEY = "format"  # beside the sections

# By format: fields and whole sections that were added after its first config.
_ADDED = {
    0: (
        "data.cache",
        "eval",
        "mesh.replicate_below",
        "model.mask_ratio_per",
        "sample.choice_temperature",
        "sample.confidence_order",
        "tokenizer.autoencoder",
        "tokenizer.checksum",
        "tokenizer.num_codes",
        "tokenizer.path",
        "tokenizer.posterior",
        "tokenizer.train",
    ),
    1: ("data.fingerprint", "init", "log.mlflow", "log.wandb", "model.extra"),
    2: (),
}


def stamp(config: Mapping[str, Any]) -> dict[str, Any]:
    """The content of config.json for a config as nested dicts."""
    return {KEY: FORMAT, **config}


def migrate(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Migrates the content of config.json to the current format; returns nested dicts.

    Args:
      content: of the file.
      where: the file, for errors.

    Raises:
      UserError: an invalid format, or one that is newer than this version of marjax.
    """
    migrated = copy.deepcopy(dict(content))
    version = migrated.pop(KEY, 0)
    if not isinstance(version, int) or isinstance(version, bool) or version < 0:
        raise UserError(f"{where}: {KEY} is {shown(version)}, expected an integer from 0 to {FORMAT}; restore the file")
    if version > FORMAT:
        raise UserError(
            f"{where} has format {version}, but this version of marjax reads formats up to {FORMAT}: "
            f"install the version that wrote it, or a newer one"
        )
    defaults = flatten(fields())
    for older in range(version, FORMAT):
        _MIGRATIONS[older](migrated)
        for key, value in defaults.items():
            if any(key == added or key.startswith(f"{added}.") for added in _ADDED[older]):
                _add(migrated, key, value)
    return migrated


def _from_0(content: dict[str, Any]) -> None:
    model, tokenizer = content.get("model"), content.get("tokenizer")
    ratio = model.get("mask_ratio") if isinstance(model, dict) else None
    if isinstance(model, dict) and isinstance(ratio, dict) and "per" in ratio:
        model["mask_ratio_per"] = ratio.pop("per")
    if isinstance(tokenizer, dict) and tokenizer.get("name") == "pixels":
        tokenizer.setdefault("checksum", "")


def _from_2(content: dict[str, Any]) -> None:
    for old, new in RENAMED.items():
        *parents, leaf = old.split(".")
        section: Any = content
        for name in parents:
            section = section.get(name) if isinstance(section, dict) else None
        if isinstance(section, dict) and leaf in section:
            _add(content, new, section.pop(leaf))


_MIGRATIONS: dict[int, Callable[[dict[str, Any]], None]] = {0: _from_0, 1: lambda content: None, 2: _from_2}


def _add(content: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    section: Any = content
    for name in parents:
        section = section.setdefault(name, {})
        if not isinstance(section, dict):
            return  # `conform` reports the wrong type
    section.setdefault(leaf, value)
