"""A set of samples on disk that a killed run resumes without changing a byte.

The folder of a set has `plan.json`, the spec of its images, and one .npy file per batch, renamed into place once it is
complete. Processes share only the folder: process h of H makes batches h, h + H, ... on its own devices.

Legend: N images in the set, B in a batch, H x W pixels, C channels.
"""

import collections
import dataclasses
import hashlib
import io
import json
import os
import re
import time
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from marjax import progress
from marjax.errors import UserError
from marjax.evaluation.across_processes import ALONE, Processes
from marjax.files import atomic, make_folder, write_bytes
from marjax.generation.sampler import Sampler
from marjax.images import to_uint8, write_png
from marjax.json_file import read_json
from marjax.npz_file import read_npy

_AHEAD = 2  # batches dispatched at a time, so that the devices never wait for a file


@dataclasses.dataclass(frozen=True)
class SampleSpec:
    """What a set of samples depends on: image i is a function of (weights, settings, seed, i) and has class i mod K.

    Attributes:
      num_images: N.
      seed: of all randomness.
      num_classes: K.
      settings: the fields of `config.sample` that change images.
      weights: "ema" or "raw".
      step: of the checkpoint.
      digest: hash of the weights.
      tokenizer: checksum of its weights.
      batch_size: B, images per file; changes images by rounding only.
    """

    num_images: int
    seed: int
    num_classes: int
    settings: dict[str, Any]
    weights: str
    step: int
    digest: str
    tokenizer: str
    batch_size: int

    @property
    def identity(self) -> dict[str, Any]:
        """All fields but the batch size."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "batch_size"}

    @property
    def name(self) -> str:
        """The name of the folder."""
        text = json.dumps(self.identity, sort_keys=True)
        return f"{self.weights}-{self.step}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    @property
    def num_batches(self) -> int:
        return -(-self.num_images // self.batch_size)

    def indices(self, batch: int) -> np.ndarray:
        """The indices of a batch's images, int64 (B,); the last batch may have fewer."""
        return np.arange(batch * self.batch_size, min((batch + 1) * self.batch_size, self.num_images))

    def labels(self, indices: np.ndarray) -> np.ndarray:
        """The classes, int64, of images by index."""
        return indices % self.num_classes


class SampleSet:
    """The folder `root/<spec.name>`; a set that exists there keeps its batch size.

    Attributes:
      spec: of the set, with its batch size.
      folder: the folder.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        spec: SampleSpec,
        processes: Processes = ALONE,
        *,
        image_shape: tuple[int, int, int] | None = None,
    ) -> None:
        """Creates or resumes a set.

        Args:
          root: the parent folder.
          spec: of the set.
          processes: those that share the batches.
          image_shape: (H, W, C), to check existing files; by default only that they agree.

        Raises:
          UserError: the folder cannot be written, or its plan.json cannot be read.
        """
        self.folder = epath.Path(root) / spec.name
        self.processes, self._image_shape = processes, image_shape
        path = self.folder / "plan.json"
        if processes.index == 0 and self.folder.exists() and not path.exists():
            self.remove()  # an unfinished deletion
        make_folder(self.folder)
        # A batch size that made no batch, such as one that did not fit into memory, is dropped.
        if path.exists() and any(each.name.startswith("batch-") for each in self.folder.iterdir()):
            begun = read_json(path, {"batch_size": range(1, 1 << 31)}, advice="delete its folder and start again")
            # The limit matters for one batch with all images, which needs no more generation.
            spec = dataclasses.replace(spec, batch_size=min(begun["batch_size"], max(spec.num_images, spec.batch_size)))
        elif processes.index == 0:
            write_bytes(path, (json.dumps(dataclasses.asdict(spec), indent=1) + "\n").encode())
        self.spec = spec

    def missing(self) -> list[int]:
        """This process's batches without a file, in order."""
        there = {path.name for path in self.folder.iterdir()}
        return [batch for batch in self.processes.share(self.spec.num_batches) if _file(batch) not in there]

    def generate(self, sampler: Sampler, params: Any) -> None:
        """Makes this process's missing batches. Raises UserError: a file cannot be written."""
        missing = self.missing()
        mine = len(self.processes.share(self.spec.num_batches))
        clock = _Clock(self.folder / f"timing-{self.processes.index}.json")
        with progress.bar("sampling", mine, "batches", start=mine - len(missing)) as bar:
            for batch, image in self._dispatched(sampler, params, missing):
                pixels = to_uint8(np.asarray(image)[: len(self.spec.indices(batch))])
                write_bytes(self.folder / _file(batch), _to_npy(pixels))
                clock.tick(len(pixels))
                bar.update()

    def _dispatched(self, sampler: Sampler, params: Any, batches: list[int]) -> Iterator[tuple[int, Any]]:
        """Yields batches and their images on the devices, with the next batch already dispatched."""
        spec, pending = self.spec, collections.deque[tuple[int, Any]]()
        for batch in batches:
            index = batch * spec.batch_size + np.arange(sampler.fitting(spec.batch_size))
            pending.append((batch, sampler.dispatch(params, spec.labels(index), spec.seed, index)))
            if len(pending) == _AHEAD:
                yield pending.popleft()
        yield from pending

    def batches(self, processes: Processes | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields indices, int64 (B,), and images, uint8 (B, H, W, C), of a process's share, by default this one's.

        Raises:
          UserError: a file is missing or damaged.
        """
        advice, shape = "delete it and start again", self._image_shape
        for batch in (processes or self.processes).share(self.spec.num_batches):
            path, indices = self.folder / _file(batch), self.spec.indices(batch)
            images = read_npy(path, ("u", 4), advice=advice)
            shape = shape or images.shape[1:]
            if images.dtype != np.uint8 or images.shape != (len(indices), *shape):
                raise UserError(
                    f"{path} is {images.dtype} {images.shape}, expected uint8 {(len(indices), *shape)}; {advice}"
                )
            yield indices, images

    def seconds_per_image(self) -> float | None:
        """The time over all processes, without the first batch of each start, which compiles; None if not timed."""
        timings = [_timing(path) for path in self.folder.iterdir() if re.fullmatch(r"timing-\d+\.json", path.name)]
        rate = sum(images / seconds for images, seconds in timings if seconds > 0)
        return 1.0 / rate if rate else None

    def write_npz(self, path: str | os.PathLike[str]) -> None:
        """Writes all images and labels as `arr_0` and `arr_1` of one file for the ADM evaluator; atomic.

        Holds one batch at a time. Raises UserError.
        """
        target = epath.Path(path)
        spec = self.spec
        try:
            with (
                atomic(target) as partial,
                partial.open("wb") as file,
                zipfile.ZipFile(file, "w", allowZip64=True) as archive,
            ):
                batches = self.batches(ALONE)
                _, first = next(batches)
                with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                    _write_header(member, (spec.num_images, *first.shape[1:]), first.dtype)
                    member.write(first.tobytes())
                    for _, images in batches:
                        member.write(images.tobytes())
                labels = spec.labels(np.arange(spec.num_images))
                with archive.open("arr_1.npy", "w") as member:
                    _write_header(member, labels.shape, labels.dtype)
                    member.write(labels.tobytes())
        except OSError as error:
            raise UserError(
                f"{path} cannot be written ({error.strerror or error}): free space or give another folder"
            ) from None

    def write_pngs(self, folder: str | os.PathLike[str]) -> None:
        """Writes this process's images as `folder/000123.png`, by index; keeps existing files. Raises UserError."""
        target = make_folder(folder)
        there = {path.name for path in target.iterdir()}
        for indices, images in self.batches():
            for index, image in zip(indices.tolist(), images, strict=True):
                if (name := f"{index:06d}.png") not in there:
                    write_png(target / name, image[..., 0] if image.shape[-1] == 1 else image)

    def remove(self) -> None:
        """Deletes the folder."""
        self.folder.rmtree(missing_ok=True)


class _Clock:
    """Times the images over several starts, without the first batch of each, which compiles."""

    def __init__(self, path: epath.Path) -> None:
        self.path = path
        self.images, self.seconds = _timing(path)
        self.last: float | None = None

    def tick(self, images: int) -> None:
        """Call this after each batch."""
        now = time.perf_counter()
        if self.last is not None:
            self.images += images
            self.seconds += now - self.last
            write_bytes(self.path, json.dumps({"images": self.images, "seconds": self.seconds}).encode())
        self.last = now


def _timing(path: epath.Path) -> tuple[int, float]:
    """The images and seconds counted so far; (0, 0.0) if the file cannot be read."""
    try:
        kept = read_json(path, {"images": range(1 << 53), "seconds": float}, advice="", missing=None)
    except UserError:
        kept = None
    return (0, 0.0) if kept is None or not 0.0 <= kept["seconds"] < 1e15 else (kept["images"], kept["seconds"])


def _file(batch: int) -> str:
    return f"batch-{batch:06d}.npy"


def _to_npy(array: np.ndarray) -> bytes:
    data = io.BytesIO()
    np.save(data, array)
    return data.getvalue()


def _write_header(member: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    np.lib.format.write_array_header_1_0(
        member, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    )
