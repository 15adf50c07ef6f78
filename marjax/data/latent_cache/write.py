"""Makes a latent cache: every image of a data set through the tokenizer's encoder once, mirrored too.

Hosts share nothing but the folder: each encodes a range of files of its own on its own devices, at its own pace. A file
is renamed into place when it is whole, so what a killed run has finished is not done again.

Legend: B images at a time, S pixels, F copies of an image (2 with flips, else 1).
"""

import collections
import contextlib
import dataclasses
import os
import time
from collections.abc import Generator, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from marjax import config as config_lib
from marjax import distributed, memory, numerics, progress, sharding
from marjax.data.latent_cache.read import DTYPES, MANIFEST, Manifest, check_fits, pack, read_manifest, runs
from marjax.data.pipeline import Batches
from marjax.data.preprocess import CROP
from marjax.data.sources import fingerprint, open_source
from marjax.errors import TrainingError, UserError
from marjax.files import sync, write_text
from marjax.lock import NAME as LOCK
from marjax.lock import locked_folder
from marjax.paths import takes_paths
from marjax.ranges import check_arguments
from marjax.tokenizers import Cacheable, Tokenizer, open_tokenizer

_SHARD_BYTES = 64 << 20  # at most, by default
_LEAST_SHARDS = 64  # by default: what is lost by a kill, and what hosts share out
_PLAN = f"plan-{MANIFEST}"


@dataclasses.dataclass(frozen=True)
class Cached:
    """What a call has done.

    Attributes:
      manifest: of the cache.
      encoded: images encoded by this process; 0 if its part was there.
      num_bytes: of all files.
      seconds: this process has encoded, without compiling: from the second batch on.
      images_per_second: over that time; NaN for one batch.
      wait: at most this share of that time had the devices nothing to do because images were not there yet.
      alone: images per second of the network on one batch that is there already, if that was measured.
    """

    manifest: Manifest
    encoded: int
    num_bytes: int
    seconds: float
    images_per_second: float
    wait: float
    alone: float = float("nan")


@numerics.pinned()
@takes_paths("out")
def cache_latents(
    config: ml_collections.ConfigDict,
    out: str | os.PathLike[str],
    *,
    dtype: str = "bfloat16",
    batch_size: int = 32,
    shard_examples: int | None = None,
    overwrite: bool = False,
    measure: bool = False,
    progress: bool = True,
) -> Cached:
    """Encodes `config.data` with `config.tokenizer` into a cache that `config.data.cache` names in training.

    With `config.data.flip`, every image is encoded as it is and mirrored. Images are read and cropped by
    `config.data.workers` processes. With several JAX processes, all call this, with a folder that they share.

    Args:
      config: as a config file returns it, or resolved.
      out: a local folder, made if need be; a cache begun there before is gone on with.
      dtype: of the moments, "bfloat16" or "float32"; codes are always int32.
      batch_size: images a device encodes at a time, each with its mirror image.
      shard_examples: images a file; by default, for files of at most 64 MiB and at least 64 of them.
      overwrite: start afresh, and replace a cache of something else.
      measure: whether to time the network alone too, before and after.
      progress: whether to show how far it is.

    Raises:
      UserError: a tokenizer without a network, data that cannot be used, another cache in the folder, or another
        process at work on it.
      TrainingError: a file cannot be written, or moments are not finite.
    """
    config = config_lib.resolve(config)
    if dtype not in ("bfloat16", "float32"):
        raise UserError(f"dtype is {dtype!r}: give bfloat16 or float32")
    check_arguments(batch_size=batch_size, shard_examples=shard_examples)
    folder = os.fspath(out)
    if "://" in folder:
        raise UserError(f"{folder} is not on this machine: write the cache to a local or mounted folder, then copy it")
    folder = os.path.abspath(folder)
    tokenizer = open_tokenizer(config.tokenizer)
    if not isinstance(tokenizer, Cacheable):
        raise UserError(f"tokenizer {config.tokenizer.name!r} has no network: there is nothing to encode ahead")
    with Batches(config.data, 1, 0, train=False) as batches:
        manifest = _plan(
            config,
            tokenizer,
            batches.num_examples,
            dtype,
            shard_examples or _shard_examples_of(folder),
            fingerprint(open_source(config.data)),
        )
        manifest = dataclasses.replace(manifest, class_names=batches.class_names)
    index, count = jax.process_index(), jax.process_count()
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}): give an --out that can be written") from None
    try:
        with distributed.first_holds(locked_folder(folder, "marjax cache-latents")):
            distributed.on_first(lambda: _begin(folder, manifest, overwrite))
            mine = range(index * manifest.num_shards // count, (index + 1) * manifest.num_shards // count)
            waiting = [shard for shard in mine if not os.path.exists(os.path.join(folder, manifest.shard_file(shard)))]
            worker = _Encoder(config, tokenizer, manifest, folder, batch_size, measure, progress)
            worker.run(runs(waiting), sum(len(manifest.examples_of(shard)) for shard in mine))
            _meet(count)
            if index == 0:
                _finish(folder, manifest)
            _meet(count)
    except OSError as error:  # a folder that cannot be written, too few file descriptors
        raise TrainingError(
            f"{error.filename or folder}: {error.strerror or error}; change that, then start the same again"
        ) from None
    num_bytes = manifest.num_examples * (1 + manifest.flips) * manifest.record_bytes
    return Cached(manifest, worker.encoded, num_bytes, *worker.speed(), worker.alone())


def open_fitting(config: ml_collections.ConfigDict, tokenizer: Tokenizer) -> Manifest:
    """The manifest of `config.data.cache`, once it has been found to fit. Raises UserError."""
    manifest = read_manifest(config.data.cache)
    if not isinstance(tokenizer, Cacheable):
        raise UserError(
            f"config.data.cache is {config.data.cache}, but tokenizer {config.tokenizer.name!r} has no "
            f"network whose latents could be in it: leave it empty"
        )
    moments = _moments(config, tokenizer)
    try:
        images = fingerprint(open_source(config.data))
    except UserError:  # a cache does without the images it was made of
        images = None
    check_fits(
        manifest, config, checksum=tokenizer.checksum, shape=moments.shape[1:], dtype=moments.dtype, fingerprint=images
    )
    return manifest


def _moments(config: ml_collections.ConfigDict, tokenizer: Cacheable) -> jax.ShapeDtypeStruct:
    data = config.data
    image = jax.ShapeDtypeStruct((1, data.image_size, data.image_size, data.channels), jnp.float32)
    return jax.eval_shape(tokenizer.moments, tokenizer.params, image)


def _plan(
    config: ml_collections.ConfigDict,
    tokenizer: Cacheable,
    num_examples: int,
    dtype: str,
    shard_examples: int | None,
    images: str,
) -> Manifest:
    data, moments = config.data, _moments(config, tokenizer)
    if jnp.issubdtype(moments.dtype, jnp.integer):
        dtype = "int32"
    made = Manifest(
        tokenizer.checksum,
        data.source,
        data.split,
        images,
        data.image_size,
        data.channels,
        CROP,
        num_examples,
        data.num_classes,
        bool(data.flip),
        moments.shape[1:],
        dtype,
        config.tokenizer.autoencoder.dtype,
        1,
    )
    if shard_examples is None:
        shard_examples = min(_SHARD_BYTES // (made.record_bytes * (1 + made.flips)), -(-num_examples // _LEAST_SHARDS))
    return dataclasses.replace(made, shard_examples=max(1, shard_examples))


def _shard_examples_of(folder: str) -> int | None:
    """Of a cache that was begun there."""
    for name in (MANIFEST, _PLAN):
        with contextlib.suppress(UserError):
            if (found := Manifest.read(os.path.join(folder, name), missing=None)) is not None:
                return int(found.shard_examples)
    return None


def _begin(folder: str, manifest: Manifest, overwrite: bool) -> None:
    """Leaves in the folder only what belongs to this cache, or refuses."""
    known = {manifest.shard_file(shard) for shard in range(manifest.num_shards)}
    before = next((path for name in (MANIFEST, _PLAN) if os.path.exists(path := os.path.join(folder, name))), None)
    if before and not overwrite:
        try:
            differences = Manifest.read(before).differences(manifest)
        except UserError:
            differences = [f"a {os.path.basename(before)} that cannot be read"]
        if differences:
            raise UserError(
                f"{folder} holds another latent cache (it has {'; '.join(differences)}): give another "
                f"--out, or --overwrite to start afresh"
            )
    ours = [
        name for name in os.listdir(folder) if name in (MANIFEST, _PLAN) or name.startswith("latents.array_record-")
    ]
    odd = [
        name
        for name in os.listdir(folder)
        if name not in ours and not name.startswith(LOCK) and not name.startswith((MANIFEST, _PLAN))
    ]
    if odd and not before:
        raise UserError(f"{folder} has other files, such as {odd[0]}: give an empty or new folder")
    if overwrite or not before:
        known = set()
    for name in ours:
        if name not in (MANIFEST, _PLAN) and name not in known:  # also what a killed run was writing
            os.remove(os.path.join(folder, name))
    if not known and os.path.exists(os.path.join(folder, MANIFEST)):
        os.remove(os.path.join(folder, MANIFEST))
    write_text(os.path.join(folder, _PLAN), manifest.to_json())


def _finish(folder: str, manifest: Manifest) -> None:
    write_text(os.path.join(folder, MANIFEST), manifest.to_json())
    os.remove(os.path.join(folder, _PLAN))


def _meet(count: int) -> None:
    """Waits for all processes."""
    if count > 1:
        multihost_utils.sync_global_devices("marjax cache-latents")


class _Encoder:
    """Runs images of this process's files through the network, and writes what comes out."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        tokenizer: Cacheable,
        manifest: Manifest,
        folder: str,
        batch_size: int,
        measure: bool,
        progress: bool,
    ) -> None:
        self.config, self.manifest, self.folder, self.progress = config, manifest, folder, progress
        self.measure, self.seconds_alone = measure, list[float]()
        self.mesh = sharding.make_mesh(devices=jax.local_devices())
        self.batch_size = batch_size * self.mesh.size
        self.tokenizer = tokenizer
        self.encoded = self.timed = 0
        self.waited, self.begin, self.end = 0.0, 0.0, 0.0

    def speed(self) -> tuple[float, float, float]:
        """Seconds, images a second and the share of waiting, from the second batch on."""
        seconds = self.end - self.begin
        return (seconds, self.timed / seconds, self.waited / seconds) if self.timed else (0.0, float("nan"), 0.0)

    def alone(self) -> float:
        """Images a second of the network alone: the median of all timings."""
        return self.batch_size / float(np.median(self.seconds_alone)) if self.seconds_alone else float("nan")

    def run(self, parts: list[range], total: int) -> None:
        """Writes the files of every part, a range of neighbouring ones."""
        if not parts:
            return
        manifest = self.manifest
        left = sum(len(manifest.examples_of(shard)) for part in parts for shard in part)
        with (
            jax.set_mesh(self.mesh),
            progress.bar("encoding", total, "images", start=total - left, show=self.progress) as bar,
        ):
            params = sharding.put_replicated(self.tokenizer.params, self.mesh)
            encode = memory.Checked(
                jax.jit(self._encode),
                "the tokenizer's encoder",
                lambda _, images: memory.Batch("batch_size", len(images) // self.mesh.size),
            )
            if self.measure:
                self._time_alone(encode, params)
            for part in parts:
                with contextlib.closing(self._encoded(encode, params, part, bar)) as rows:
                    for shard in part:
                        self._write(shard, rows)
            if self.measure:
                self._time_alone(encode, params)

    def _time_alone(self, encode: Any, params: Any) -> None:
        data = self.config.data
        shape = (self.batch_size, data.image_size, data.image_size, data.channels)
        batch = sharding.put_batch(np.random.default_rng(0).integers(0, 256, shape, np.uint8), self.mesh)
        encode(params, batch).block_until_ready()
        for _ in range(3):
            start = time.perf_counter()
            encode(params, batch).block_until_ready()
            self.seconds_alone.append(time.perf_counter() - start)

    def _encode(self, params: Any, image: jax.Array) -> jax.Array:
        """Moments as they are stored, (B, F, ...), of images uint8 (B, S, S, C)."""
        image = image.astype(jnp.float32) / 127.5 - 1.0
        copies = jnp.stack([image, image[:, :, ::-1]] if self.manifest.flips else [image], axis=1)
        moments = self.tokenizer.moments(params, copies.reshape(-1, *image.shape[1:]))
        return moments.reshape(*copies.shape[:2], *moments.shape[1:]).astype(DTYPES[self.manifest.dtype])

    def _encoded(self, encode: Any, params: Any, part: range, bar: progress.Bar) -> Generator[tuple[np.ndarray, int]]:
        """Moments (F, ...) and label of each example of a part, in order.

        Two batches are on the devices, so that they never wait for what is done with a result.
        """
        first = self.manifest.examples_of(part[0]).start
        left = self.manifest.examples_of(part[-1]).stop - first
        pending: collections.deque[tuple[Any, np.ndarray]] = collections.deque()
        with Batches(self.config.data, self.batch_size, 0, train=False, first=first) as batches:
            while left > 0:
                if len(pending) * self.batch_size < left and len(pending) < 2:
                    before = time.perf_counter()
                    batch = next(batches)
                    if self.begin and all(moments.is_ready() for moments, _ in pending):
                        self.waited += time.perf_counter() - before
                    pending.append((encode(params, sharding.put_batch(batch["image"], self.mesh)), batch["label"]))
                    continue
                moments, labels = pending.popleft()
                rows = np.asarray(moments)
                if not np.isfinite(rows.astype(np.float32)).all():
                    raise TrainingError(
                        "the tokenizer's moments are not finite: look at its file, or encode in "
                        "float32 (config.tokenizer.autoencoder.dtype)"
                    )
                count = min(left, self.batch_size)
                left -= count
                self._tick(count)
                bar.update(count)
                yield from zip(rows[:count], labels[:count].tolist(), strict=True)

    def _tick(self, count: int) -> None:
        """Keeps time from the end of the first batch on, which has compiled."""
        self.encoded += count
        self.end = time.perf_counter()
        if not self.begin:
            self.begin = self.end
        else:
            self.timed += count

    def _write(self, shard: int, rows: Iterator[tuple[np.ndarray, int]]) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        path = os.path.join(self.folder, self.manifest.shard_file(shard))
        partial = f"{path}.partial{os.getpid()}"
        try:
            writer = ArrayRecordWriter(partial, "group_size:1,uncompressed")
            try:
                for _ in self.manifest.examples_of(shard):
                    moments, label = next(rows)
                    for copy in moments:
                        writer.write(pack(copy, label))
            finally:
                writer.close()
            sync(partial)
            os.replace(partial, path)
        except (OSError, RuntimeError) as error:
            raise TrainingError(f"{path} cannot be written ({error}): make room, then start the same again") from None
        finally:
            with contextlib.suppress(OSError):
                os.remove(partial)
