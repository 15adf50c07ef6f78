"""A run's work directory: made by the config that is in it, and held to that in later starts."""

import contextlib
import difflib
import json
import os
import pathlib
import re
import shlex
import sys
import time
from collections.abc import Iterator
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from marjax import class_names, storage
from marjax.config import conform, flatten, resolve
from marjax.config.migrations import migrate, stamp
from marjax.errors import UserError, listed, shortened
from marjax.files import write_bytes
from marjax.json_file import read_json
from marjax.paths import takes_paths

# What a second start in the same work directory may change: it does not alter what is trained.
FREE_FIELDS = (
    "mesh.",
    "log.",
    "checkpoint.",
    "sample.",
    "eval.",
    "data.workers",
    "data.data_dir",
    "data.cache",
    "model.remat",
    "model.denoiser.remat",
    "tokenizer.path",
    "tokenizer.train.",
    "init.path",
)  # of a tokenizer and of weights the checksum counts

_CLOCK_SKEW = 86400.0  # seconds that the clocks of two machines may differ by

# What counts in a second start of marjax train-tokenizer, and what of it does not.
_TOKENIZER_FIELDS = ("seed", "data.", "tokenizer.")
_TOKENIZER_FREE = (
    "data.workers",
    "data.data_dir",
    "data.cache",
    "tokenizer.path",
    "tokenizer.checksum",
    "tokenizer.posterior",
    "tokenizer.patch_size",
    "tokenizer.name",
    "tokenizer.autoencoder.scale",
    "tokenizer.train.remat",
    "tokenizer.train.log_every",
    "tokenizer.train.checkpoint_every",
    "tokenizer.train.pictures_every",
    "tokenizer.train.lpips.vgg",
    "tokenizer.train.lpips.linear",
)

# What this program itself may have in a work directory before its config, such as locks.
_OWN = re.compile(r"config\.json\.partial.*|.*\.(lock|lease)")

# What may lie in a new work directory: hidden files, those of operating systems and file servers, logs of shells and
# schedulers, and the scripts and config files of a run.
_BYSTANDER = re.compile(
    _OWN.pattern + r"|\..*|thumbs\.db|desktop\.ini|lost\+found|@eaDir|#recycle|\$RECYCLE\.BIN|System Volume Information"
    r"|.*\.(log|out|err|pid)(\.\d+)?|.*\.[eo]\d+|(.*(log|stdout|stderr|output|console).*|out|err|train|run)\.txt"
    r"|logs?|stdout|stderr|output|wandb|core(\.\d+)?|.*~|.*\.(sh|sbatch|slurm|pbs|job|py)|__pycache__",
    re.IGNORECASE,
)


@takes_paths("workdir")
def claim_workdir(
    workdir: str | os.PathLike[str], config: ConfigDict, *, tokenizer: bool = False, names: class_names.Names = ()
) -> None:
    """What `check_workdir` and then `write_config` do. Raises UserError."""
    check_workdir(workdir, config, tokenizer=tokenizer)
    write_config(workdir, config, names)


@takes_paths("workdir")
def check_workdir(workdir: str | os.PathLike[str], config: ConfigDict, *, tokenizer: bool = False) -> None:
    """Makes the folder of a new work directory, or checks the one that is there.

    Logs, hidden files and other bystanders in a new one are reported and left alone. Fields in FREE_FIELDS may change
    between starts, and so may the number of steps, upwards, under a constant learning rate. With `tokenizer`, the
    directory is that of a tokenizer's training, for which only the data and the tokenizer count.

    Raises:
      UserError: a folder that is not a work directory, a contradicting config, or one that cannot be written.
    """
    storage.check(workdir)
    path = epath.Path(workdir)
    with _writing(workdir):
        path.mkdir(parents=True, exist_ok=True)
        if not (path / "config.json").exists():
            _look_at_bystanders(path)
        else:
            _refuse_contradiction(workdir, read_workdir(workdir), config, tokenizer)


@takes_paths("workdir")
def write_config(workdir: str | os.PathLike[str], config: ConfigDict, names: class_names.Names = ()) -> None:
    """Writes `config.json`, and the names of classes if they are known. Raises UserError: they cannot be written."""
    text = json.dumps(stamp(config.to_dict()), indent=2) + "\n"
    with _writing(workdir):
        write_bytes(epath.Path(workdir) / "config.json", text.encode())  # a crash leaves the old file or the new one
        class_names.write(epath.Path(workdir), names)


@contextlib.contextmanager
def _writing(workdir: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"work directory {workdir} cannot be written ({error.strerror or error}): give a folder that can"
        ) from None


def refuse_weights_alone(workdir: str | os.PathLike[str], command: str) -> None:
    """Raises a UserError with the command that is to be run instead, if no checkpoint has an optimizer's state."""
    folder = epath.Path(workdir) / "checkpoints"
    try:
        steps = [path for path in storage.children(folder) if path.name.isdecimal()] if folder.is_dir() else []
        if not steps or any((path / "optimizer").exists() for path in steps):
            return
    except OSError:
        return  # which `claim_workdir` reports
    raise UserError(
        f"work directory {workdir} has converted weights and no optimizer state to resume from: start a "
        f"new run from them: {command}"
    )


def _look_at_bystanders(folder: epath.Path) -> None:
    """Reports the files in a new work directory that are nobody's work. Raises UserError: there are others."""
    found = sorted(storage.children(folder), key=lambda file: file.name)
    theirs = [file.name for file in found if not _BYSTANDER.fullmatch(file.name) and not _is_new_log(file)]
    if theirs:
        raise UserError(
            f"work directory {folder} has files but no config.json: give an empty or new folder, or move "
            f"away {listed([shortened(name) for name in theirs], 5)}"
        )
    others = [file.name for file in found if not _OWN.fullmatch(file.name)]
    if others:
        print(
            f"work directory {folder}: {len(others)} file{'s' if len(others) > 1 else ''} of others ignored: "
            f"{listed([shortened(name) for name in others], 5)}",
            file=sys.stderr,
        )


def _is_new_log(path: epath.Path) -> bool:
    """Whether a file may be one that `tee` has just opened, whatever it is called."""
    return path.suffix in ("", ".txt") and not storage.is_remote(path) and path.is_file() and not path.stat().length


def _refuse_contradiction(workdir: Any, old: ConfigDict, new: ConfigDict, tokenizer: bool) -> None:
    before, after = flatten(old), flatten(new)
    differing = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    if tokenizer:
        differing = [
            key for key in differing if key.startswith(_TOKENIZER_FIELDS) and not key.startswith(_TOKENIZER_FREE)
        ]
        if new.tokenizer.train.steps >= old.tokenizer.train.steps:
            differing = [key for key in differing if key != "tokenizer.train.steps"]
    else:
        differing = [key for key in differing if not key.startswith(FREE_FIELDS)]
    if not tokenizer and new.train.schedule == "constant" and new.train.steps >= old.train.steps:
        differing = [key for key in differing if key not in ("train.steps", "train.epochs")]
    if None in (before.get("data.fingerprint"), after.get("data.fingerprint")):
        differing = [key for key in differing if key != "data.fingerprint"]
    if "data.fingerprint" in differing:
        raise UserError(
            f"work directory {workdir} was made with other data than these (data.fingerprint was "
            f"{before['data.fingerprint'][:12]}, now {after['data.fingerprint'][:12]}): give the data that "
            f"it was made with, in the same order, or another --workdir"
        )
    if differing:
        listed = ", ".join(f"{key} (was {before.get(key)!r}, now {after.get(key)!r})" for key in differing)
        raise UserError(
            f"work directory {workdir} was made with another config: {listed}. Use another --workdir, or "
            f"the config it was made with"
        )


@takes_paths("workdir")
def read_workdir(workdir: str | os.PathLike[str]) -> ConfigDict:
    """The resolved config of a work directory; a tokenizer that lies in it is found there, wherever that is now.

    Nothing that the config names is opened: the work directory may be a stranger's. One of an older format is migrated.

    Raises:
      UserError: there is none, it is no config, or it has a format that this program cannot read.
    """
    storage.check(workdir)
    path = epath.Path(workdir)
    try:
        if not path.is_dir():
            raise UserError(
                f"work directory {workdir} does not exist: give the --workdir of a training run{suggestion(workdir)}"
            )
        if not (path / "config.json").exists():
            raise UserError(f"{workdir} has no config.json: give the --workdir of a training run{suggestion(workdir)}")
    except OSError as error:
        raise UserError(
            f"work directory {workdir} cannot be read ({error.strerror or error}): give one that can"
        ) from None
    where = f"{workdir}/config.json"
    content = read_json(path / "config.json", {str: object}, advice="restore it, or give another --workdir")
    try:
        config = resolve(conform(migrate(content, where)), open_data=False)
    except UserError as error:
        told = str(error)
        raise UserError(told if told.startswith(where) else f"{where}: {told}") from None
    if _lies_in(path, config.tokenizer.path):
        config.tokenizer.path = os.fspath(path / config.tokenizer.path)
    return config


def no_checkpoints(workdir: str | os.PathLike[str]) -> UserError:
    """The error about a work directory whose run has not saved yet."""
    start = shlex.join(["marjax", "train", "--config", f"{workdir}/config.json", "--workdir", os.fspath(workdir)])
    return UserError(
        f"{workdir} has no checkpoints yet: let the training run reach its first, or start it again: {start}"
    )


def suggestion(workdir: str | os.PathLike[str]) -> str:
    """ ", such as runs/digits" for an error about a path that is no work directory: those around it; "" without any."""
    if storage.is_remote(workdir):
        return ""
    path = pathlib.Path(workdir)
    try:
        if above := [each for each in (*path.parents,)[:3] if (each / "config.json").is_file()]:
            return f", such as {above[0]}"
        if path.is_dir():
            found = sorted(each.parent for each in path.glob("*/config.json"))
        else:
            siblings = {each.parent.name: each.parent for each in path.parent.glob("*/config.json")}
            found = [siblings[name] for name in difflib.get_close_matches(path.name, siblings, 3, 0.5)]
    except OSError:
        return ""
    return f", such as {listed([shortened(os.fspath(each)) for each in found], 5)}" if found else ""


def _lies_in(folder: epath.Path, name: str) -> bool:
    if not name or storage.is_remote(name) or os.path.isabs(name) or ".." in name.split("/"):
        return False
    try:
        return (folder / name).exists()
    except OSError:  # such as a name of thousands of characters
        return False


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
        print(
            f"warning: {path}: unix_seconds is {found['unix_seconds']}, expected a time before now; {advice}",
            file=sys.stderr,
        )
        return now
    return min(now, float(found["unix_seconds"]))


def shared_settings(config: ConfigDict) -> dict[str, Any]:
    """The fields of a resolved config that all processes of a run must share: all but where a host has its data."""
    own = ("data.data_dir", "data.cache", "tokenizer.path", "log.progress")
    return {key: value for key, value in flatten(config).items() if key not in own}
