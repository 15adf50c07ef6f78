"""Checkpoints of a training run: asynchronous saves, restores that detect damage, and retention.

A checkpoint is the directory `<directory>/<step>` with four parts: the trees `params`, `ema` and `optimizer`, and
`meta`, a JSON file with the caller's values and the shape, dtype and checksum of every array. Converted weights lack
some of the trees. Orbax stores them, but restores overwritten bytes silently; the checksums detect those.
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
_SHOWN = 3  # arrays or files that an error names
_UNREACHABLE = "not damaged: "  # start of a problem with another cause

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Restored:
    """One restored checkpoint.

    Attributes:
      step: its step.
      items: the trees that were requested, by name.
      meta: the values given to `save`.
      digests: for each tree, a hash of its arrays' names, shapes, dtypes and values.
    """

    step: int
    items: dict[str, PyTree]
    meta: dict[str, Any]
    digests: dict[str, str]


class _DamageError(Exception):
    """A checkpoint differs from what was written; the message says how."""


class Checkpoints(Closeable):
    """The checkpoints in one directory. Every process of a run must make the same calls in the same order.

    Only one training run may write to a directory; any number may open it with read_only.

    Args:
      directory: local path or gs:// address; created if missing, unless read_only.
      keep: number of latest checkpoints to keep.
      keep_every: if positive, also keep checkpoints whose step is a multiple of it.
      read_only: create, move and delete nothing.

    Raises:
      UserError: the directory cannot be created, or `keep` or `keep_every` is out of range.
    """

    def __init__(
        self, directory: epath.PathLike, *, keep: int = 3, keep_every: int = 0, read_only: bool = False
    ) -> None:
        if keep < 1 or keep_every < 0:
            raise UserError(f"keep={keep}, keep_every={keep_every}, expected keep >= 1 and keep_every >= 0")
        name = normalised(directory, "directory")
        self.directory = epath.Path(name if "://" in name else os.path.abspath(name))
        self.read_only = read_only
        policies: list[Any] = [ocp.checkpoint_managers.LatestN(keep)]
        if keep_every:
            policies.append(ocp.checkpoint_managers.EveryNSteps(keep_every))
        options = ocp.CheckpointManagerOptions(
            create=not read_only,
            # Left by killed saves.
            cleanup_tmp_directories=not read_only,
            save_root_metadata=False,
            # Process 0 lists the steps for all, so that processes agree.
            single_host_load_and_broadcast=True,
            enable_async_checkpointing=not read_only,
            # If creating a directory in the background fails, threads wait ten minutes for it and keep the process
            # from ending.
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
        """The steps of all checkpoints, damaged or not, in ascending order; waits for a pending save."""
        self.wait()
        # Orbax's cached list is wrong after a failed save, or if another process writes.
        try:
            self._manager.reload()
            return sorted(int(step) for step in self._manager.all_steps())
        except Exception as error:
            self._raise_unlisted(error)

    def trees(self, step: int | None = None) -> list[str]:
        """The trees of a checkpoint, by default the newest with readable metadata; all trees if there is none."""
        found = self.describe(step)
        return list(TREES) if found is None else list(found[1])

    def describe(self, step: int | None = None) -> tuple[int, dict[str, str]] | None:
        """The step of a checkpoint and the digests of its trees (see `Restored`), without reading arrays.

        By default the newest checkpoint with readable metadata; None if there is none, which `restore` reports.
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
        """Saves a checkpoint in the background. On return the arrays are copied and may be donated.

        Args:
          step: greater than all existing steps.
          params, ema, optimizer: trees of nonempty jax arrays; None to leave a tree out.
          meta: JSON values.

        Raises:
          UserError: this save could not start, the previous one failed, a checkpoint of this or a later step exists, or
            the directory was opened with read_only.
          TypeError: a leaf is not a jax array, or meta is not JSON.
        """
        if self.read_only:
            raise UserError(f"{self.directory} is read_only, cannot save step {step}")
        newest = max(self.steps(), default=-1)
        if step <= newest:
            raise UserError(
                f"cannot save step {step}: {self.directory} already has step {newest}; resume from that step, move it "
                f"away, or save to another directory"
            )
        given = {"params": params, "ema": ema, "optimizer": optimizer}
        trees = {name: tree for name, tree in given.items() if tree is not None}
        leaves = checksums.paths(trees)
        for path, leaf in leaves.items():
            if not isinstance(leaf, jax.Array) or leaf.size == 0:
                raise TypeError(f"{path} is {leaf!r}, expected a nonempty jax array")
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
        """Restores trees of the newest intact checkpoint, or of the one at `step`.

        A damaged checkpoint (a file missing, truncated or overwritten) is logged as a warning, and the previous one is
        tried. After a restore, newer damaged ones are moved to `<directory>-damaged`, so that training can save those
        steps again, unless read_only.

        Args:
          abstract: for each tree to read ("params", "ema", "optimizer"), its jax.ShapeDtypeStructs. Arrays without a
            sharding are restored to the first local device.
          step: one of `steps()`, or None for the newest intact checkpoint.

        Returns:
          The checkpoint, or None if step is None and there are no checkpoints.

        Raises:
          UserError: the step does not exist, it or all checkpoints are damaged, or its arrays have other names, shapes
            or dtypes than `abstract`.
          StorageError: storage does not answer or may not be read, on one of the processes.
        """
        unknown = sorted(set(abstract) - set(TREES))
        if unknown or not abstract:
            raise ValueError(f"trees are {unknown or list(abstract)}, expected some of {list(TREES)}")
        targets = {name: jax.tree.map(_abstract_leaf, tree) for name, tree in abstract.items()}
        if step is not None:
            return self._restore_step(targets, step)
        tried: dict[int, str] = {}
        while True:
            # Listed again each time, since a training run may delete and add checkpoints meanwhile.
            left = [s for s in self.steps() if s not in tried]
            if not left:
                break
            step = left.pop()
            try:
                restored = self._read(targets, step)
            except _DamageError as damage:
                tried[step] = str(damage)
                following = f"trying step {left[-1]}" if left else "there is none before it"
                _log.warning("checkpoint %s is damaged (%s); %s", self.directory / str(step), damage, following)
                continue
            if tried and not self.read_only:
                self._move_aside([s for s in tried if s > step])
            return restored
        if not tried:
            return None
        newest = max(tried)
        raise UserError(
            f"all checkpoints in {self.directory} are damaged (steps {sorted(tried)}; step {newest}: {tried[newest]}); "
            f"restore them from a copy, or start again in another directory"
        )

    def is_busy(self) -> bool:
        """Whether a save is pending on any process, so that the next would wait. All processes must call this."""
        return distributed.any_process(self._manager.is_saving_in_progress())

    def wait(self) -> None:
        """Waits for the pending save.

        Raises:
          UserError: it failed; earlier checkpoints are intact, and the next save is tried as usual.
          StorageError: it failed because an object store does not answer.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._raise_save_failure(error)

    def close(self) -> None:
        """Waits as `wait` does, and releases threads. The object cannot be used afterwards."""
        with self._quiet:
            try:
                with progress.activity("writing the checkpoint", show=self._manager.is_saving_in_progress()):
                    self.wait()
            finally:
                self._manager.close()

    def _raise_unlisted(self, error: Exception) -> NoReturn:
        """Raises the error for checkpoints that cannot be listed."""
        if (explained := storage.explain(error)) is not None:
            raise explained from error
        reason = None if isinstance(error, RecursionError) else failures.explain(error)
        if reason is not None or isinstance(error, OSError):
            raise UserError(f"{self.directory} cannot hold checkpoints: {reason or _one_line(error)}") from error
        raise UserError(
            f"cannot list the checkpoints in {self.directory} ({_one_line(error)}); delete the files {entries.TIMES} "
            f"in their folders, which have only times"
        ) from error

    def _restore_step(self, targets: dict[str, PyTree], step: int) -> Restored:
        steps = self.steps()
        if step not in steps:
            raise UserError(f"no checkpoint of step {step} in {self.directory}, only steps {steps}")
        try:
            return self._read(targets, step)
        except _DamageError as damage:
            others = [s for s in steps if s != step]
            advice = f"choose one of steps {others}" if others else "restore it from a copy"
            raise UserError(f"checkpoint {self.directory / str(step)} is damaged ({damage}); {advice}") from damage

    def _read(self, targets: dict[str, PyTree], step: int) -> Restored:
        """Reads and verifies one checkpoint. All processes agree on whether it is damaged.

        Handlers are called without Orbax's checkpointer, whose barrier would block while one process fails to read.
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
                f"checkpoint {path} has only {' and '.join(there)}, not {' and '.join(missing)}; sample with --weights "
                f"ema or raw, whichever it has (raw are params), or start a new run from them with --init_from"
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
                raise  # the device's memory, not the checkpoint
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
                    _log.warning("moved the damaged checkpoint of step %d to %s", step, target)
            except OSError as error:
                problem = f"cannot move damaged checkpoints away from {self.directory}: {_one_line(error)}"
        try:
            _agree(problem)
        except _DamageError as damage:
            raise UserError(f"{damage}; move steps {steps} away by hand") from damage

    def _raise_save_failure(self, error: Exception) -> NoReturn:
        step, self._saving = self._saving, None
        reason = next(filter(None, map(_storage_error, causes(error))), None)
        if reason is None:
            raise error
        if any(isinstance(storage.explain(each), StorageError) for each in causes(error)):
            raise StorageError(
                f"saving the checkpoint of step {step} in {self.directory} failed: {reason}; the same command resumes "
                f"from the previous one"
            ) from error
        raise UserError(f"saving the checkpoint of step {step} in {self.directory} failed: {reason}") from error


def _read_meta(path: epath.Path) -> dict[str, Any]:
    """The metadata in a folder; in another format than FORMAT, only "format" is checked.

    Raises:
      _DamageError: it differs from what was written.
    """
    handler = ocp.JsonCheckpointHandler()
    try:
        entries.check_part(path)
        body = dict(handler.restore(path))
        check_json(body, {"format": int}, where=META, advice="")
        if body["format"] != FORMAT:
            return body
        check_json(body, _META_SHAPE, where=META, advice="")
        intact = body.pop("digest") == _digest(body)
    except Exception as error:
        raise _DamageError(_problem(META, error)) from error
    finally:
        handler.close()
    if not intact:
        raise _DamageError(f"wrong checksum of {META}")
    return body


def _check_format(meta: dict[str, Any], path: epath.Path) -> None:
    if meta["format"] != FORMAT:
        raise UserError(
            f"checkpoint {path} has format {meta['format']}, expected {FORMAT}; read it with the version of marjax "
            f"that wrote it, or move it away"
        )


def _digests(meta: dict[str, Any]) -> dict[str, str]:
    """A hash of each tree of a checkpoint, by name."""
    trees = {
        name: {path: each for path, each in meta["arrays"].items() if path.split("/")[0] == name} for name in TREES
    }
    return {name: _digest(arrays) for name, arrays in trees.items() if arrays}


def _digest(body: dict[str, Any]) -> str:
    """A hash of JSON values that does not change when they are written and read."""
    text = json.dumps(json.loads(json.dumps(body)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _abstract_leaf(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _check_fit(saved: dict[str, Any], targets: dict[str, PyTree], path: epath.Path) -> None:
    """Raises UserError if the requested arrays are not those saved."""
    wanted = checksums.paths(targets)
    in_checkpoint = {p: _describe(v["shape"], v["dtype"]) for p, v in saved.items() if p.split("/")[0] in targets}
    expected = {p: _describe(v.shape, v.dtype.name) for p, v in wanted.items()}
    wrong = [
        f"{p}: {in_checkpoint.get(p, 'nothing')} in the checkpoint, expected {expected.get(p, 'nothing')}"
        for p in sorted(in_checkpoint | expected)
        if in_checkpoint.get(p) != expected.get(p)
    ]
    if wrong:
        raise UserError(f"{path} is a checkpoint of another model ({_some(wrong, '; ')}); check --config.model")


def _describe(shape: Any, dtype: str) -> str:
    return f"{dtype}[{','.join(map(str, shape))}]"


def _free_name(folder: epath.Path, step: int) -> epath.Path:
    path, suffix = folder / str(step), 0
    while path.exists():
        suffix += 1
        path = folder / f"{step}.{suffix}"
    return path


def _problem(name: str, error: Exception) -> str:
    """Describes a part of a checkpoint that cannot be read, for `_agree`."""
    unreachable = any(failures.is_passing(each) or storage.explain(each) is not None for each in causes(error))
    return f"{_UNREACHABLE if unreachable else ''}cannot read {name}: {_one_line(error)}"


def _agree(problem: str) -> None:
    """Raises on all processes if any has a problem.

    Raises:
      _DamageError: the checkpoint is damaged.
      StorageError: it may be intact, but a process cannot read it.
    """
    problem = distributed.agree(problem)
    if _UNREACHABLE in problem:
        raise StorageError(f"{problem.replace(_UNREACHABLE, '')}; the same command resumes once it can be read")
    if problem:
        raise _DamageError(problem)


def _some(names: list[str], separator: str = ", ") -> str:
    more = f"{separator}and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return separator.join(names[:_SHOWN]) + more


def _storage_error(error: BaseException) -> str | None:
    """The storage failure behind an error, or None; TensorStore raises ValueErrors that start with a status."""
    if (explained := failures.explain(error)) is not None:
        return str(explained)
    if isinstance(error, OSError) or re.match(r"[A-Z]+(_[A-Z]+)*: ", str(error)):
        return _one_line(error)
    return None


def _one_line(error: BaseException) -> str:
    """The root cause of an exception in one short line, without the array specifications that Orbax adds."""
    error = causes(error)[-1]
    text = " ".join(str(error).split()) or type(error).__name__
    return text.rstrip(".") if len(text) <= 300 else text[:300] + " (cut)"
