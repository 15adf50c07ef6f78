"""Work directories: each holds the config of its run, which later starts must match."""

import contextlib
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
from marjax.errors import UserError, close_names, listed, shortened
from marjax.files import write_bytes
from marjax.json_file import read_json
from marjax.paths import takes_paths

# Fields that may change when a run resumes: they do not affect what is trained.
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
)  # the checksums of the tokenizer and of initial weights must not change

_CLOCK_SKEW = 86400.0  # tolerated difference of two machines' clocks, in seconds

# Fields that must not change when marjax train-tokenizer resumes, and exceptions.
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

# marjax's own files in a work directory before its config, such as locks.
_OWN = re.compile(r"config\.json\.partial.*|.*\.(lock|lease)")

# Files allowed in a new work directory: hidden files, files of operating systems and file servers, logs of shells and
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
    """Calls `check_workdir` and `write_config`. Raises UserError."""
    check_workdir(workdir, config, tokenizer=tokenizer)
    write_config(workdir, config, names)


@takes_paths("workdir")
def check_workdir(workdir: str | os.PathLike[str], config: ConfigDict, *, tokenizer: bool = False) -> None:
    """Creates a new work directory, or checks an existing one.

    Logs, hidden files and other bystanders in a new one are reported and ignored. Fields in FREE_FIELDS may change
    between starts, and the number of steps may grow if the learning rate is constant. With `tokenizer`, the directory
    belongs to tokenizer training, for which only the fields of data and tokenizer are compared.

    Raises:
      UserError: the folder is not a work directory, has a contradicting config, or cannot be written.
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
    """Writes `config.json`, and the class names if known. Raises UserError."""
    text = json.dumps(stamp(config.to_dict()), indent=2) + "\n"
    with _writing(workdir):
        write_bytes(epath.Path(workdir) / "config.json", text.encode())
        class_names.write(epath.Path(workdir), names)


@contextlib.contextmanager
def _writing(workdir: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"work directory {workdir} cannot be written ({error.strerror or error}); give a writable folder"
        ) from None


def refuse_weights_alone(workdir: str | os.PathLike[str], command: str) -> None:
    """Raises a UserError that names the command to run instead, if no checkpoint has an optimizer state."""
    folder = epath.Path(workdir) / "checkpoints"
    try:
        steps = [path for path in storage.children(folder) if path.name.isdecimal()] if folder.is_dir() else []
        if not steps or any((path / "optimizer").exists() for path in steps):
            return
    except OSError:
        return  # which `claim_workdir` reports
    raise UserError(
        f"work directory {workdir} has converted weights but no optimizer state to resume from; start a new run from "
        f"them: {command}"
    )


def _look_at_bystanders(folder: epath.Path) -> None:
    """Reports bystanders in a new work directory. Raises UserError if it has other files."""
    found = sorted(storage.children(folder), key=lambda file: file.name)
    theirs = [file.name for file in found if not _BYSTANDER.fullmatch(file.name) and not _is_new_log(file)]
    if theirs:
        raise UserError(
            f"work directory {folder} has files but no config.json; give an empty or new folder, or move away "
            f"{listed([shortened(name) for name in theirs], 5)}"
        )
    others = [file.name for file in found if not _OWN.fullmatch(file.name)]
    if others:
        print(
            f"work directory {folder}: ignoring {len(others)} other file{'s' if len(others) > 1 else ''}: "
            f"{listed([shortened(name) for name in others], 5)}",
            file=sys.stderr,
        )


def _is_new_log(path: epath.Path) -> bool:
    """Whether a file may be one that `tee` just created."""
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
            f"work directory {workdir} was created with other data (data.fingerprint was "
            f"{before['data.fingerprint'][:12]}, now {after['data.fingerprint'][:12]}); give the original data, in the "
            f"same order, or another --workdir"
        )
    if differing:
        listed = ", ".join(f"{key} (was {before.get(key)!r}, now {after.get(key)!r})" for key in differing)
        raise UserError(
            f"work directory {workdir} was created with another config: {listed}; use another --workdir, or the "
            f"original config"
        )


@takes_paths("workdir")
def read_workdir(workdir: str | os.PathLike[str]) -> ConfigDict:
    """Reads the resolved config of a work directory, which may have been moved with a tokenizer inside it.

    Nothing that the config names is opened, since the work directory may be untrusted. Older formats are migrated.

    Raises:
      UserError: there is no valid config, or its format is unknown.
    """
    storage.check(workdir)
    path = epath.Path(workdir)
    try:
        if not path.is_dir():
            raise UserError(
                f"work directory {workdir} does not exist; give the --workdir of a training run{suggestion(workdir)}"
            )
        if not (path / "config.json").exists():
            raise UserError(f"{workdir} has no config.json; give the --workdir of a training run{suggestion(workdir)}")
    except OSError as error:
        raise UserError(
            f"work directory {workdir} cannot be read ({error.strerror or error}); give a readable one"
        ) from None
    where = f"{workdir}/config.json"
    content = read_json(path / "config.json", {str: object}, advice="restore it, or give another --workdir")
    try:
        config = resolve(conform(migrate(content, where)), open_data=False)
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith(where) else f"{where}: {text}") from None
    if _lies_in(path, config.tokenizer.path):
        config.tokenizer.path = os.fspath(path / config.tokenizer.path)
    return config


def no_checkpoints(workdir: str | os.PathLike[str]) -> UserError:
    """The error for a work directory without checkpoints."""
    start = shlex.join(["marjax", "train", "--config", f"{workdir}/config.json", "--workdir", os.fspath(workdir)])
    return UserError(f"{workdir} has no checkpoints yet; wait for the first one, or resume training: {start}")


def suggestion(workdir: str | os.PathLike[str]) -> str:
    """ ", such as runs/digits" to end an error about a path: the work directories near it, or ""."""
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
            found = [siblings[name] for name in close_names(path.name, siblings, 3)]
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
    """When the run first started, in seconds since 1970, from `started.json`, which the first start writes.

    The current time if not `write` (in processes other than 0, which do not report goodput) or if the file is invalid.
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
            f"warning: {path}: unix_seconds is {found['unix_seconds']}, expected a time in the past; {advice}",
            file=sys.stderr,
        )
        return now
    return min(now, float(found["unix_seconds"]))


def shared_settings(config: ConfigDict) -> dict[str, Any]:
    """The fields of a resolved config that all processes of a run must share: all but local paths."""
    own = ("data.data_dir", "data.cache", "tokenizer.path", "log.progress")
    return {key: value for key, value in flatten(config).items() if key not in own}
