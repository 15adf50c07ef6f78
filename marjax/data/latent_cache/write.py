"""Writes a latent cache: the tokenizer's network encodes every image of a data set once, and its mirror image.

Hosts share only the folder: each encodes its own range of files on its own devices. A file is renamed into place when
it is complete, so a killed run loses at most one file per host.

Legend: B batch, S pixels, F copies of an image (2 with flips, else 1).
"""

import collections
import contextlib
import dataclasses
import os
import time
from collections.abc import Generator, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from marjax import distributed, memory, progress, sharding
from marjax.data.config import DataConfig
from marjax.data.latent_cache.read import DTYPES, MANIFEST, Manifest, check_fits, pack, read_manifest, runs
from marjax.data.pipeline import Batches
from marjax.data.preprocess import CROP
from marjax.data.source import fingerprint
from marjax.data.sources import open_source
from marjax.errors import TrainingError, UserError
from marjax.files import atomic, write_text
from marjax.lock import NAME as LOCK
from marjax.lock import locked_folder
from marjax.ranges import check_arguments

_SHARD_BYTES = 64 << 20  # default maximum
_LEAST_SHARDS = 64  # default; bounds what a kill loses, and what hosts share
_PLAN = f"plan-{MANIFEST}"


class Network(Protocol):
    """The part of a tokenizer whose outputs are cached; see `marjax.tokenizers.Cacheable`."""

    params: Any
    checksum: str

    def moments(self, params: Any, image: jax.Array) -> jax.Array: ...


@dataclasses.dataclass(frozen=True)
class Cached:
    """The result of `write`.

    Attributes:
      manifest: of the cache.
      encoded: images encoded by this process; 0 if its files were complete.
      num_bytes: of all files.
      seconds: spent encoding by this process after the first batch, which compiles.
      images_per_second: over that time; NaN for a single batch.
      wait: upper bound of the share of that time in which the devices waited for images.
      alone: images per second of the network alone, on one batch in memory, if measured.
    """

    manifest: Manifest
    encoded: int
    num_bytes: int
    seconds: float
    images_per_second: float
    wait: float
    alone: float = float("nan")


def write(
    folder: str,
    data: DataConfig,
    network: Network,
    *,
    compute_dtype: str,
    dtype: str,
    batch_size: int,
    shard_examples: int | None,
    overwrite: bool,
    measure: bool,
    show: bool,
) -> Cached:
    """Encodes the images of `data`; see `marjax.training.latent_cache.cache_latents` for arguments and errors.

    `compute_dtype` is that of the network's convolutions; `show` shows a progress bar.
    """
    if dtype not in ("bfloat16", "float32"):
        raise UserError(f"dtype is {dtype!r}: give bfloat16 or float32")
    check_arguments(batch_size=batch_size, shard_examples=shard_examples)
    if "://" in folder:
        raise UserError(f"{folder} is not on this machine: write the cache to a local or mounted folder, then copy it")
    folder = os.path.abspath(folder)
    manifest = _plan(data, network, dtype, compute_dtype, shard_examples or _shard_examples_of(folder))
    index, count = jax.process_index(), jax.process_count()
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be created ({error.strerror}): give an --out that is writable") from None
    try:
        with distributed.first_holds(locked_folder(folder, "marjax cache-latents")):
            distributed.on_first(lambda: _begin(folder, manifest, overwrite))
            mine = range(index * manifest.num_shards // count, (index + 1) * manifest.num_shards // count)
            missing = [shard for shard in mine if not os.path.exists(os.path.join(folder, manifest.shard_file(shard)))]
            encoder = _Encoder(data, network, manifest, folder, batch_size, measure, show)
            encoder.run(runs(missing), sum(len(manifest.examples_of(shard)) for shard in mine))
            if count > 1:
                multihost_utils.sync_global_devices("marjax cache-latents")
            distributed.on_first(lambda: _finish(folder, manifest))
    except OSError as error:  # a folder that is not writable, too few file descriptors
        raise TrainingError(
            f"{error.filename or folder}: {error.strerror or error}; fix that, then start the same command again"
        ) from None
    num_bytes = manifest.num_examples * (1 + manifest.flips) * manifest.record_bytes
    return Cached(manifest, encoder.encoded, num_bytes, *encoder.speed(), encoder.alone())


def open_fitting(data: DataConfig, network: Network) -> Manifest:
    """The manifest of `data.cache`, checked against the images and the network. Raises UserError."""
    manifest = read_manifest(data.cache)
    moments = _moments(data, network)
    try:
        images = fingerprint(open_source(data))
    except UserError:  # the images are not needed once they are cached
        images = None
    check_fits(
        manifest, data, checksum=network.checksum, shape=moments.shape[1:], dtype=moments.dtype, fingerprint=images
    )
    return manifest


def _moments(data: DataConfig, network: Network) -> jax.ShapeDtypeStruct:
    image = jax.ShapeDtypeStruct((1, data.image_size, data.image_size, data.channels), jnp.float32)
    return jax.eval_shape(network.moments, network.params, image)


def _plan(data: DataConfig, network: Network, dtype: str, compute_dtype: str, shard_examples: int | None) -> Manifest:
    assert data.num_classes is not None  # the config is resolved
    with Batches(data, 1, 0, train=False) as batches:
        num_examples, class_names = batches.num_examples, batches.class_names
    moments = _moments(data, network)
    plan = Manifest(
        checksum=network.checksum,
        source=data.source,
        split=data.split,
        fingerprint=fingerprint(open_source(data)),
        image_size=data.image_size,
        channels=data.channels,
        crop=CROP,
        num_examples=num_examples,
        num_classes=data.num_classes,
        flips=data.flip,
        shape=moments.shape[1:],
        dtype="int32" if jnp.issubdtype(moments.dtype, jnp.integer) else dtype,
        compute_dtype=compute_dtype,
        shard_examples=1,
        class_names=class_names,
    )
    if shard_examples is None:
        shard_examples = min(_SHARD_BYTES // (plan.record_bytes * (1 + plan.flips)), -(-num_examples // _LEAST_SHARDS))
    return dataclasses.replace(plan, shard_examples=max(1, shard_examples))


def _shard_examples_of(folder: str) -> int | None:
    """Of the cache in the folder, complete or not; None if there is none."""
    for name in (MANIFEST, _PLAN):
        with contextlib.suppress(UserError):
            if (found := Manifest.read(os.path.join(folder, name), missing=None)) is not None:
                return int(found.shard_examples)
    return None


def _begin(folder: str, manifest: Manifest, overwrite: bool) -> None:
    """Removes the files that do not belong to this cache. Raises UserError: they belong to something else."""
    before = next((path for name in (MANIFEST, _PLAN) if os.path.exists(path := os.path.join(folder, name))), None)
    if before and not overwrite:
        try:
            differences = Manifest.read(before).differences(manifest)
        except UserError:
            differences = [f"a {os.path.basename(before)} that cannot be read"]
        if differences:
            raise UserError(
                f"{folder} holds another latent cache (it has {'; '.join(differences)}): give another "
                f"--out, or --overwrite to replace it"
            )
    names = os.listdir(folder)
    shards = [name for name in names if name.startswith("latents.array_record-")]
    others = [name for name in names if not name.startswith((LOCK, MANIFEST, _PLAN)) and name not in shards]
    if others and not before:
        raise UserError(f"{folder} has other files, such as {others[0]}: give an empty or new folder")
    resumed = before is not None and not overwrite
    complete = {manifest.shard_file(shard) for shard in range(manifest.num_shards)} if resumed else set()
    for name in shards:
        if name not in complete:  # also what a killed run was writing
            os.remove(os.path.join(folder, name))
    if not resumed and os.path.exists(os.path.join(folder, MANIFEST)):
        os.remove(os.path.join(folder, MANIFEST))
    write_text(os.path.join(folder, _PLAN), manifest.to_json())


def _finish(folder: str, manifest: Manifest) -> None:
    write_text(os.path.join(folder, MANIFEST), manifest.to_json())
    os.remove(os.path.join(folder, _PLAN))


class _Encoder:
    """Encodes the images of this process's files and writes their moments."""

    def __init__(
        self,
        data: DataConfig,
        network: Network,
        manifest: Manifest,
        folder: str,
        batch_size: int,
        measure: bool,
        show: bool,
    ) -> None:
        self.data, self.network, self.manifest, self.folder, self.show = data, network, manifest, folder, show
        self.measure, self.seconds_alone = measure, list[float]()
        self.mesh = sharding.make_mesh(devices=jax.local_devices())
        self.batch_size = batch_size * self.mesh.size
        self.encoded = self.timed = 0
        self.waited, self.begin, self.end = 0.0, 0.0, 0.0

    def speed(self) -> tuple[float, float, float]:
        """Seconds, images per second and the share of waiting, from the second batch on."""
        seconds = self.end - self.begin
        return (seconds, self.timed / seconds, self.waited / seconds) if self.timed else (0.0, float("nan"), 0.0)

    def alone(self) -> float:
        """Images per second of the network alone: the median of all timings."""
        return self.batch_size / float(np.median(self.seconds_alone)) if self.seconds_alone else float("nan")

    def run(self, parts: list[range], total: int) -> None:
        """Writes the files of `parts`, ranges of consecutive shards, out of `total` images."""
        if not parts:
            return
        manifest = self.manifest
        left = sum(len(manifest.examples_of(shard)) for part in parts for shard in part)
        with (
            jax.set_mesh(self.mesh),
            progress.bar("encoding", total, "images", start=total - left, show=self.show) as bar,
        ):
            params = sharding.put_replicated(self.network.params, self.mesh)
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
        shape = (self.batch_size, self.data.image_size, self.data.image_size, self.data.channels)
        batch = sharding.put_batch(np.random.default_rng(0).integers(0, 256, shape, np.uint8), self.mesh)
        encode(params, batch).block_until_ready()
        for _ in range(3):
            start = time.perf_counter()
            encode(params, batch).block_until_ready()
            self.seconds_alone.append(time.perf_counter() - start)

    def _encode(self, params: Any, image: jax.Array) -> jax.Array:
        """Moments in the dtype of the cache, (B, F, ...), of images uint8 (B, S, S, C)."""
        image = image.astype(jnp.float32) / 127.5 - 1.0
        copies = jnp.stack([image, image[:, :, ::-1]] if self.manifest.flips else [image], axis=1)
        moments = self.network.moments(params, copies.reshape(-1, *image.shape[1:]))
        return moments.reshape(*copies.shape[:2], *moments.shape[1:]).astype(DTYPES[self.manifest.dtype])

    def _encoded(self, encode: Any, params: Any, part: range, bar: progress.Bar) -> Generator[tuple[np.ndarray, int]]:
        """Moments (F, ...) and label of each example of a part, in order.

        Two batches are in flight, so that the devices do not wait for the host.
        """
        first = self.manifest.examples_of(part[0]).start
        left = self.manifest.examples_of(part[-1]).stop - first
        pending: collections.deque[tuple[Any, np.ndarray]] = collections.deque()
        with Batches(self.data, self.batch_size, 0, train=False, first=first) as batches:
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
                        "the tokenizer's moments are not finite: check its file, or set "
                        "config.tokenizer.autoencoder.dtype=float32"
                    )
                count = min(left, self.batch_size)
                left -= count
                self._tick(count)
                bar.update(count)
                yield from zip(rows[:count], labels[:count].tolist(), strict=True)

    def _tick(self, count: int) -> None:
        """Measures time from the end of the first batch, which compiles."""
        self.encoded += count
        self.end = time.perf_counter()
        if not self.begin:
            self.begin = self.end
        else:
            self.timed += count

    def _write(self, shard: int, rows: Iterator[tuple[np.ndarray, int]]) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        path = os.path.join(self.folder, self.manifest.shard_file(shard))
        try:
            with atomic(path, shared=True, fsync=True) as partial:
                writer = ArrayRecordWriter(os.fspath(partial), "group_size:1,uncompressed")
                with contextlib.closing(writer):
                    for _ in self.manifest.examples_of(shard):
                        moments, label = next(rows)
                        for copy in moments:
                            writer.write(pack(copy, label))
        except (OSError, RuntimeError) as error:
            raise TrainingError(f"{path} cannot be written ({error}): free some space, then start it again") from None
