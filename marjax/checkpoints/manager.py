"""Checkpoints of a training run: asynchronous saves, restores that notice damage, and what to keep.

A checkpoint is the directory `<directory>/<step>` with four parts: the trees `params`, `ema` and `optimizer`, and
`meta`, a JSON file with the caller's own values, and the shape, dtype and checksum of every array. One that was made of
weights alone lacks some of the trees. Storage is Orbax's, which restores overwritten bytes without a word; the
checksums are how they are noticed.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import orbax.checkpoint as ocp
from etils import epath

from marjax import distributed, failures, progress, storage
from marjax.checkpoints import checksums, entries
from marjax.checkpoints.quiet import QuietOrbax
from marjax.closeable import Closeable
from marjax.errors import StorageError, UserError, causes
from marjax.json_file import check_json
from marjax.paths import normalised
from marjax.trees import PyTree

TREES = ("params", "ema", "optimizer")
META = "meta"
FORMAT = 1
_META_SHAPE = {"user": dict, "digest": str, "arrays": {str: {"shape": [range(1 << 48)], "dtype": str, "checksum": str}}}
_SHOWN = 3  # How many arrays or files an error names.
_UNREACHABLE = "not damaged: "  # Begins the text of a problem that has another cause.

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Restored:
    """One restored checkpoint.

    Attributes:
      step: of it.
      items: a tree for each name asked for.
      meta: what was given to `save`.
      digests: of each of these trees, a hash of all its arrays' names, shapes, dtypes and values.
    """

    step: int
    items: dict[str, PyTree]
    meta: dict[str, Any]
    digests: dict[str, str]


class _DamageError(Exception):
    """A checkpoint that cannot be read back as it was written; its text says what is wrong."""


class Checkpoints(Closeable):
    """The checkpoints in one directory. Every process of a run must make the same calls in the same order.

    Only one training run may write to a directory; any number may open it with read_only.

    Args:
      directory: local path or gs:// address. Created if need be, except with read_only.
      keep: how many of the latest checkpoints to keep.
      keep_every: if positive, also keep every checkpoint whose step is a multiple of it.
      read_only: create, move and delete nothing.

    Raises:
      UserError: the directory cannot be created, or `keep` or `keep_every` make no sense.
    """

    def __init__(
        self, directory: epath.PathLike, *, keep: int = 3, keep_every: int = 0, read_only: bool = False
    ) -> None:
        if keep < 1 or keep_every < 0:
            raise UserError(f"Got keep={keep}, keep_every={keep_every}: expected keep >= 1 and keep_every >= 0.")
        name = normalised(directory, "directory")
        self.directory = epath.Path(name if "://" in name else os.path.abspath(name))
        self.read_only = read_only
        policies: list[Any] = [ocp.checkpoint_managers.LatestN(keep)]
        if keep_every:
            policies.append(ocp.checkpoint_managers.EveryNSteps(keep_every))
        options = ocp.CheckpointManagerOptions(
            create=not read_only,
            # What a killed save left behind.
            cleanup_tmp_directories=not read_only,
            save_root_metadata=False,
            # Process 0 lists the steps for all, so that no two processes see different ones.
            single_host_load_and_broadcast=True,
            enable_async_checkpointing=not read_only,
            # Where a directory cannot be created, save says so; made in the background, its failure would leave threads
            # that wait ten minutes for it and keep the process from ending.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
        )
        with contextlib.ExitStack() as stack:
            stack.enter_context(QuietOrbax())
            try:
                entries.check_times(self.directory)
                self._manager = ocp.CheckpointManager(self.directory, options=options)
            except Exception as error:
                self._raise_unlisted(error)
            self._quiet = stack.pop_all()
        self._saving: int | None = None

    def steps(self) -> list[int]:
        """The steps of the checkpoints there are, whole or not, in ascending order; waits for a save under way."""
        self.wait()
        # Orbax keeps a list of its own, which goes wrong where a save fails or someone else writes.
        try:
            self._manager.reload()
            return sorted(int(step) for step in self._manager.all_steps())
        except Exception as error:
            self._raise_unlisted(error)

    def trees(self, step: int | None = None) -> list[str]:
        """The trees that a checkpoint has, those of the newest with readable metadata if step is None, else all."""
        found = self.describe(step)
        return list(TREES) if found is None else list(found[1])

    def describe(self, step: int | None = None) -> tuple[int, dict[str, str]] | None:
        """The step of a checkpoint and the digests of its trees (see `Restored`); no array is read.

        If step is None, that of the newest with readable metadata; None where there is none, which `restore` reports.
        """
        for each in reversed(self.steps()):
            if step in (None, each):
                try:
                    meta = _read_meta(self.directory / str(each) / META)
                except _DamageError:
                    continue
                _check_format(meta, self.directory / str(each))
                return each, _digests(meta)
        return None

    def save(
        self, step: int, *, params: PyTree = None, ema: PyTree = None, optimizer: PyTree = None, meta: Mapping[str, Any]
    ) -> None:
        """Saves a checkpoint. On return the arrays are copied, and may be donated; writing goes on in the background.

        Args:
          step: greater than every step there is.
          params, ema, optimizer: trees of jax arrays, none of them empty; those left out can never be restored.
          meta: JSON values.

        Raises:
          UserError: this save could not start or the one before it failed; or a checkpoint of this or a later step
            exists; or the directory was opened with read_only.
          TypeError: a leaf is not a jax array, or meta is not JSON.
        """
        if self.read_only:
            raise UserError(f"{self.directory} was opened for reading only: step {step} cannot be saved there.")
        newest = max(self.steps(), default=-1)
        if step <= newest:
            raise UserError(
                f"Cannot save step {step}: {self.directory} already has step {newest}. "
                "Continue from that step, move it away, or save to another directory."
            )
        given = {"params": params, "ema": ema, "optimizer": optimizer}
        trees = {name: tree for name, tree in given.items() if tree is not None}
        leaves = checksums.paths(trees)
        for path, leaf in leaves.items():
            if not isinstance(leaf, jax.Array) or leaf.size == 0:
                raise TypeError(f"Only jax arrays with at least one element can be saved: {path} is {leaf!r}.")
        sums = checksums.checksum(trees)
        arrays = {p: {"shape": list(x.shape), "dtype": x.dtype.name, "checksum": sums[p]} for p, x in leaves.items()}
        body = {"format": FORMAT, "user": dict(meta), "arrays": arrays}
        body["digest"] = _digest(body)
        saves = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        self._saving = step
        try:
            self._manager.save(step, args=ocp.args.Composite(**saves, meta=ocp.args.JsonSave(body)), force=True)
        except Exception as error:
            self._raise_save_failure(error)

    def restore(self, abstract: Mapping[str, PyTree], step: int | None = None) -> Restored | None:
        """Restores some or all trees of the newest whole checkpoint, or of the one of the given step.

        A damaged checkpoint (a file missing, cut short or overwritten) is reported with a warning, and the one before
        it is tried. Once one is restored, the damaged newer ones are moved to `<directory>-damaged`, so that training
        can save those steps again; not so with read_only.

        Args:
          abstract: for each tree to read ("params", "ema", "optimizer"), jax.ShapeDtypeStructs that say where its
            arrays go. Without a sharding an array goes to the first local device. Other trees are not read.
          step: a step in `steps()`, or None for the newest that is whole.

        Returns:
          The checkpoint, or None if step is None and there is none at all.

        Raises:
          UserError: there is no such step; it is damaged, or all are; or it holds arrays of other names, shapes or
            dtypes than `abstract`.
          StorageError: the storage does not answer, or may not be read, on one of the processes.
        """
        unknown = sorted(set(abstract) - set(TREES))
        if unknown or not abstract:
            raise ValueError(f"Got trees {unknown or list(abstract)}: expected some of {list(TREES)}.")
        targets = {name: jax.tree.map(_abstract_leaf, tree) for name, tree in abstract.items()}
        if step is not None:
            return self._restore_step(targets, step)
        tried: dict[int, str] = {}
        while True:
            # Listed anew each time: while a reader reads, the run that writes may delete and add.
            left = [s for s in self.steps() if s not in tried]
            if not left:
                break
            step = left.pop()
            try:
                restored = self._read(targets, step)
            except _DamageError as damage:
                tried[step] = str(damage)
                following = f"trying step {left[-1]}" if left else "there is none before it"
                _log.warning("Checkpoint %s is damaged (%s); %s.", self.directory / str(step), damage, following)
                continue
            if tried and not self.read_only:
                self._move_aside([s for s in tried if s > step])
            return restored
        if not tried:
            return None
        newest = max(tried)
        raise UserError(
            f"All checkpoints in {self.directory} are damaged (steps {sorted(tried)}; step {newest}: {tried[newest]}). "
            "Restore them from a copy, or start again in another directory."
        )

    def is_busy(self) -> bool:
        """Whether a save is under way on any process: the next would wait for it. All processes must call this."""
        return distributed.any_process(self._manager.is_saving_in_progress())

    def wait(self) -> None:
        """Waits until the save under way is complete.

        Raises:
          UserError: it failed. The checkpoints before it are untouched, and the next save is tried as usual.
          StorageError: it failed because an object store does not answer.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._raise_save_failure(error)

    def close(self) -> None:
        """Waits as `wait` does, and releases threads. The object is of no use afterwards."""
        with self._quiet:
            try:
                with progress.activity("writing the checkpoint", show=self._manager.is_saving_in_progress()):
                    self.wait()
            finally:
                self._manager.close()

    def _raise_unlisted(self, error: Exception) -> NoReturn:
        """Raises what to say of checkpoints that cannot be listed."""
        if (told := storage.explain(error)) is not None:
            raise told from error
        reason = None if isinstance(error, RecursionError) else failures.explain(error)
        if reason is not None or isinstance(error, OSError):
            raise UserError(f"Cannot use {self.directory} for checkpoints: {reason or _one_line(error)}") from error
        raise UserError(
            f"Cannot list the checkpoints in {self.directory} ({_one_line(error)}): delete the files "
            f"{entries.TIMES} in their folders, which only tell times"
        ) from error

    def _restore_step(self, targets: dict[str, PyTree], step: int) -> Restored:
        steps = self.steps()
        if step not in steps:
            there = f"there are steps {steps}" if steps else "there are no checkpoints"
            raise UserError(f"No checkpoint of step {step} in {self.directory}: {there}.")
        try:
            return self._read(targets, step)
        except _DamageError as damage:
            others = [s for s in steps if s != step]
            advice = f"Choose another step of {others}." if others else "Restore it from a copy."
            raise UserError(f"Checkpoint {self.directory / str(step)} is damaged ({damage}). {advice}") from damage

    def _read(self, targets: dict[str, PyTree], step: int) -> Restored:
        """Reads and verifies one checkpoint. All processes agree on whether it is damaged.

        The handlers are called without Orbax's checkpointer around them, whose barrier would keep the processes that
        can read their part waiting for one that cannot.
        """
        path = self.directory / str(step)
        meta: dict[str, Any] = {}
        problem = ""
        try:
            meta = _read_meta(path / META)
        except _DamageError as damage:
            problem = str(damage)
        _agree(problem)
        _check_format(meta, path)
        there = list(_digests(meta))
        if not set(targets) <= set(there):
            missing = [name for name in TREES if name in targets and name not in there]
            raise UserError(
                f"Checkpoint {path} has only {' and '.join(there)}, not {' and '.join(missing)}: it was made of "
                "weights alone. Sample with --weights ema or raw, whichever it has (raw are params); start a new run "
                "from them with --init_from."
            )
        _check_fit(meta["arrays"], targets, path)

        with progress.activity(f"loading the checkpoint of step {step}"):
            return self._read_items(path, targets, step, meta)

    def _read_items(self, path: epath.Path, targets: dict[str, PyTree], step: int, meta: dict[str, Any]) -> Restored:
        items: dict[str, PyTree] = {}
        problem = ""
        for name, target in targets.items():
            handler = ocp.StandardCheckpointHandler()
            try:
                entries.check_part(path / name)
                items[name] = handler.restore(path / name, args=ocp.args.StandardRestore(target))
            except (MemoryError, jax.errors.JaxRuntimeError):
                raise  # The device's memory, not the checkpoint.
            except Exception as error:
                problem = _problem(name, error)
                break
            finally:
                handler.close()
        _agree(problem)
        found = checksums.checksum(items)
        changed = [p for p, value in found.items() if value != meta["arrays"][p]["checksum"]]
        if changed:
            raise _DamageError(f"wrong checksum of {_some(changed)}")
        digests = _digests(meta)
        return Restored(step, items, meta["user"], {name: digests[name] for name in items})

    def _move_aside(self, steps: list[int]) -> None:
        problem = ""
        if jax.process_index() == 0:
            try:
                for step in steps:
                    target = _free_name(self.directory.parent / f"{self.directory.name}-damaged", step)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    (self.directory / str(step)).rename(target)
                    _log.warning("Moved the damaged checkpoint of step %d to %s.", step, target)
            except OSError as error:
                problem = f"cannot move damaged checkpoints away from {self.directory}: {_one_line(error)}"
        try:
            _agree(problem)
        except _DamageError as damage:
            raise UserError(f"Stopped: {damage}. Move steps {steps} away by hand.") from damage

    def _raise_save_failure(self, error: Exception) -> NoReturn:
        step, self._saving = self._saving, None
        reason = next(filter(None, map(_storage_error, causes(error))), None)
        if reason is None:
            raise error
        if any(isinstance(storage.explain(each), StorageError) for each in causes(error)):
            raise StorageError(
                f"Saving the checkpoint of step {step} in {self.directory} failed: {reason}. The same "
                f"command goes on from the one before."
            ) from error
        raise UserError(f"Saving the checkpoint of step {step} in {self.directory} failed: {reason}") from error


def _read_meta(path: epath.Path) -> dict[str, Any]:
    """The metadata in a folder; of another format than ours, only "format" is known to be there.

    Raises:
      _DamageError: it cannot be read as it was written.
    """
    handler = ocp.JsonCheckpointHandler()
    try:
        entries.check_part(path)
        body = dict(handler.restore(path))
        check_json(body, {"format": int}, where=META, advice="")
        if body["format"] != FORMAT:
            return body
        check_json(body, _META_SHAPE, where=META, advice="")
        whole = body.pop("digest") == _digest(body)
    except Exception as error:
        raise _DamageError(_problem(META, error)) from error
    finally:
        handler.close()
    if not whole:
        raise _DamageError(f"wrong checksum of {META}")
    return body


def _check_format(meta: dict[str, Any], path: epath.Path) -> None:
    if meta["format"] != FORMAT:
        raise UserError(
            f"Checkpoint {path} has format {meta['format']}, expected {FORMAT}: read it with the version "
            f"of marjax that wrote it, or move it away"
        )


def _digests(meta: dict[str, Any]) -> dict[str, str]:
    """A hash of each tree that a checkpoint has, by name."""
    trees = {
        name: {path: each for path, each in meta["arrays"].items() if path.split("/")[0] == name} for name in TREES
    }
    return {name: _digest(arrays) for name, arrays in trees.items() if arrays}


def _digest(body: dict[str, Any]) -> str:
    """A hash of JSON values, the same before they are written and after they are read."""
    text = json.dumps(json.loads(json.dumps(body)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _abstract_leaf(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _check_fit(saved: dict[str, Any], targets: dict[str, PyTree], path: epath.Path) -> None:
    """Raises a UserError if the arrays wanted are not the arrays saved."""
    wanted = checksums.paths(targets)
    in_checkpoint = {p: _describe(v["shape"], v["dtype"]) for p, v in saved.items() if p.split("/")[0] in targets}
    expected = {p: _describe(v.shape, v.dtype.name) for p, v in wanted.items()}
    wrong = [
        f"{p}: {in_checkpoint.get(p, 'nothing')} in the checkpoint, expected {expected.get(p, 'nothing')}"
        for p in sorted(in_checkpoint | expected)
        if in_checkpoint.get(p) != expected.get(p)
    ]
    if wrong:
        raise UserError(f"{path} is a checkpoint of another model: check --config.model ({_some(wrong, '; ')}).")


def _describe(shape: Any, dtype: str) -> str:
    return f"{dtype}[{','.join(map(str, shape))}]"


def _free_name(folder: epath.Path, step: int) -> epath.Path:
    path, suffix = folder / str(step), 0
    while path.exists():
        suffix += 1
        path = folder / f"{step}.{suffix}"
    return path


def _problem(name: str, error: Exception) -> str:
    """What is wrong with a part of a checkpoint that cannot be read, for `_agree`."""
    unreachable = any(failures.is_passing(each) or storage.explain(each) is not None for each in causes(error))
    return f"{_UNREACHABLE if unreachable else ''}cannot read {name}: {_one_line(error)}"


def _agree(problem: str) -> None:
    """Lets no process go on if any has a problem.

    Raises:
      _DamageError: the checkpoint is damaged.
      StorageError: it may well be whole, but one of the processes does not get at it.
    """
    problem = distributed.agree(problem)
    if _UNREACHABLE in problem:
        raise StorageError(f"{problem.replace(_UNREACHABLE, '')}. The same command goes on once it can be read")
    if problem:
        raise _DamageError(problem)


def _some(names: list[str], separator: str = ", ") -> str:
    more = f"{separator}and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return separator.join(names[:_SHOWN]) + more


def _storage_error(error: BaseException) -> str | None:
    """What the storage said, if it is the storage that failed; tensorstore's errors are ValueErrors with a status."""
    if (explained := failures.explain(error)) is not None:
        return str(explained)
    if isinstance(error, OSError) or re.match(r"[A-Z]+(_[A-Z]+)*: ", str(error)):
        return _one_line(error)
    return None


def _one_line(error: BaseException) -> str:
    """The root cause of an exception in one short line: Orbax adds the whole specification of the array."""
    error = causes(error)[-1]
    text = " ".join(str(error).split()) or type(error).__name__
    return text.rstrip(".") if len(text) <= 300 else text[:300] + " (cut)"
