"""A run's work directory: made by the config that is in it, and held to that in later starts."""

import json
import os
import sys
import time
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from marjax import storage
from marjax.config import apply_overrides, base, flatten, resolve
from marjax.errors import UserError
from marjax.files import write_bytes
from marjax.json_file import read_json

# What a second start in the same work directory may change: it does not alter what is trained.
FREE_FIELDS = ("mesh.", "log.", "checkpoint.", "sample.", "eval.", "data.workers", "data.data_dir", "data.cache",
               "model.remat", "model.denoiser.remat",
               "tokenizer.path", "tokenizer.train.")  # of the tokenizer the checksum counts

_CLOCK_SKEW = 86400.0  # seconds that the clocks of two machines may differ by

# What counts in a second start of marjax train-tokenizer, and what of it does not.
_TOKENIZER_FIELDS = ("seed", "data.", "tokenizer.")
_TOKENIZER_FREE = ("data.workers", "data.data_dir", "data.cache", "tokenizer.path", "tokenizer.checksum",
                   "tokenizer.posterior", "tokenizer.patch_size", "tokenizer.name", "tokenizer.autoencoder.scale",
                   "tokenizer.train.remat", "tokenizer.train.log_every", "tokenizer.train.checkpoint_every",
                   "tokenizer.train.pictures_every", "tokenizer.train.lpips.vgg", "tokenizer.train.lpips.linear")


def claim_workdir(workdir: str | os.PathLike[str], config: ConfigDict, *, tokenizer: bool = False) -> None:
    """Makes the work directory and writes `config.json`, or checks the one that is there.

    Fields in FREE_FIELDS may change between starts, and so may the number of steps, upwards, under a constant
    learning rate. With `tokenizer`, the directory is that of a tokenizer's training, for which only the data and the
    tokenizer count.

    Raises:
      UserError: a folder that is not a work directory, a contradicting config, or one that cannot be written.
    """
    storage.check(workdir)
    path = epath.Path(workdir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not (path / "config.json").exists():
            if any(file.name != "config.json.partial" for file in storage.children(path)):
                raise UserError(f"work directory {workdir} has files but no config.json: give an empty or new folder")
        else:
            _refuse_contradiction(workdir, read_workdir(workdir), config, tokenizer)
        text = json.dumps(json.loads(config.to_json_best_effort()), indent=2) + "\n"
        write_bytes(path / "config.json", text.encode())  # a crash leaves the old file or the new one
    except OSError as error:
        raise UserError(f"work directory {workdir} cannot be written ({error.strerror or error}): "
                        f"give a folder that can") from None


def _refuse_contradiction(workdir: Any, old: ConfigDict, new: ConfigDict, tokenizer: bool) -> None:
    before, after = flatten(old), flatten(new)
    differing = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    if tokenizer:
        differing = [key for key in differing
                     if key.startswith(_TOKENIZER_FIELDS) and not key.startswith(_TOKENIZER_FREE)]
        if new.tokenizer.train.steps >= old.tokenizer.train.steps:
            differing = [key for key in differing if key != "tokenizer.train.steps"]
    else:
        differing = [key for key in differing if not key.startswith(FREE_FIELDS)]
    if not tokenizer and new.train.schedule == "constant" and new.train.steps >= old.train.steps:
        differing = [key for key in differing if key not in ("train.steps", "train.epochs")]
    if differing:
        listed = ", ".join(f"{key} (was {before.get(key)!r}, now {after.get(key)!r})" for key in differing)
        raise UserError(f"work directory {workdir} was made with another config: {listed}. Use another --workdir, or "
                        f"the config it was made with")


def read_workdir(workdir: str | os.PathLike[str]) -> ConfigDict:
    """The resolved config of a work directory; a tokenizer that lies in it is found there, wherever that is now.

    Raises:
      UserError: there is none, or it was not written by this program.
    """
    storage.check(workdir)
    path = epath.Path(workdir)
    if not path.is_dir():
        raise UserError(f"work directory {workdir} does not exist: give the --workdir of a training run")
    if not (path / "config.json").exists():
        raise UserError(f"{workdir} has no config.json: give the --workdir of a training run")
    try:
        content = json.loads((path / "config.json").read_text())
    except ValueError as error:
        raise UserError(f"{workdir}/config.json is not JSON ({error})") from None
    template = base()
    known, given = flatten(template), flatten(content) if isinstance(content, dict) else {}
    if known.keys() != given.keys():
        odd = sorted(known.keys() ^ given.keys())
        raise UserError(f"{workdir}/config.json is not a config of this version: unknown or missing "
                        f"{', '.join(odd[:5])}")
    config = apply_overrides(template, given)
    if config.tokenizer.path and (path / config.tokenizer.path).exists():
        config.tokenizer.path = os.fspath(path / config.tokenizer.path)
    return resolve(config)


def first_start(workdir: str | os.PathLike[str], *, write: bool) -> float:
    """When the run was first started, in seconds since 1970: kept in `started.json`, which the first start writes.

    Without `write` (processes but the first, which do not tell the goodput) the present time; so too where the file is
    there and cannot be read.
    """
    path, now = epath.Path(workdir) / "started.json", time.time()
    if not write:
        return now
    advice = "the goodput is counted from now; delete it"
    try:
        found = read_json(path, {"unix_seconds": float}, advice=advice, missing=None)
    except UserError as error:
        print(f"warning: {error}", file=sys.stderr)
        return now
    if found is None:
        write_bytes(path, (json.dumps({"unix_seconds": now}) + "\n").encode())
        return now
    if not 0 <= found["unix_seconds"] <= now + _CLOCK_SKEW:
        print(f"warning: {path}: unix_seconds is {found['unix_seconds']}, expected a time before now; {advice}",
              file=sys.stderr)
        return now
    return min(now, float(found["unix_seconds"]))


def settings_of_all(config: ConfigDict) -> dict[str, Any]:
    """The fields of a resolved config that all processes of a run must share: all but where a host has its data."""
    own = ("data.data_dir", "data.cache", "tokenizer.path", "log.progress")
    return {key: value for key, value in flatten(config).items() if key not in own}
