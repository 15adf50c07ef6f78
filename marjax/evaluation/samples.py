"""A set of samples as files, made in any number of sittings and by any number of hosts.

A set is a folder with `plan.json`, which says all that decides the images, and a file a batch, in NumPy's format, which
is renamed into place when it is whole. Hosts share nothing but the folder: host h of H makes batches h, h + H, ... on
its own devices, at its own pace. What a killed run has finished is not done again, and the set is the same to the byte
as if it had not been killed.

Legend: N images in all, B a batch, H x W pixels of C channels.
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
from marjax.files import atomic, make_folder, write_bytes
from marjax.generation.sampler import Sampler
from marjax.images import to_uint8, write_png
from marjax.json_file import read_json
from marjax.npz_file import read_npy

_AHEAD = 2  # batches on the devices at a time, so that these never wait for a file to be written


@dataclasses.dataclass(frozen=True)
class SampleSpec:
    """What decides a set of samples: image i is a function of (weights, settings, seed, i) and its class is i mod K.

    Attributes:
      num_images: N.
      seed: of all randomness.
      num_classes: K: of every class there are as many images as of any other, give or take one.
      settings: the fields of `config.sample` that alter an image.
      weights: "ema" or "raw".
      step: of the checkpoint.
      digest: of these weights.
      tokenizer: the checksum of its weights.
      batch_size: images a file, B; of no influence on what they are but for rounding.
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
        """All but the batch size: what two sets of the same images have in common."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "batch_size"}

    @property
    def name(self) -> str:
        """Of the folder."""
        text = json.dumps(self.identity, sort_keys=True)
        return f"{self.weights}-{self.step}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    @property
    def num_batches(self) -> int:
        return -(-self.num_images // self.batch_size)

    def indices(self, batch: int) -> np.ndarray:
        """Of the images in a file, int64 (B,), or fewer in the last."""
        return np.arange(batch * self.batch_size, min((batch + 1) * self.batch_size, self.num_images))

    def labels(self, indices: np.ndarray) -> np.ndarray:
        """The classes of images, int64, by index."""
        return indices % self.num_classes


class SampleSet:
    """The folder `root/<spec.name>`. A set that was begun there with another batch size keeps that.

    Attributes:
      spec: of the set.
      folder: where it is.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        spec: SampleSpec,
        host: int = 0,
        hosts: int = 1,
        *,
        image_shape: tuple[int, int, int] | None = None,
    ) -> None:
        """Begins or resumes a set.

        Args:
          root: the folder of its folder.
          spec: of the set.
          host, hosts: which part of it is this host's.
          image_shape: (H, W, C) of an image, to check files of an earlier start; without it they must agree.

        Raises:
          UserError: the folder cannot be written, or holds a spec that cannot be read.
        """
        self.folder = epath.Path(root) / spec.name
        self.host, self.hosts, self._image_shape = host, hosts, image_shape
        path = self.folder / "plan.json"
        if host == 0 and self.folder.exists() and not path.exists():
            self.remove()  # what was left of a set that was being deleted
        make_folder(self.folder)
        # A batch size with which nothing was made, such as one that the memory did not suffice for, is forgotten.
        if path.exists() and any(each.name.startswith("batch-") for each in self.folder.iterdir()):
            begun = read_json(path, {"batch_size": range(1, 1 << 31)}, advice="delete its folder and start again")
            # Of one batch that holds all images, there is nothing left to generate.
            spec = dataclasses.replace(spec, batch_size=min(begun["batch_size"], max(spec.num_images, spec.batch_size)))
        elif host == 0:
            write_bytes(path, (json.dumps(dataclasses.asdict(spec), indent=1) + "\n").encode())
        self.spec = spec

    def missing(self) -> list[int]:
        """This host's batches that are not there yet, in order."""
        there = {path.name for path in self.folder.iterdir()}
        return [batch for batch in range(self.host, self.spec.num_batches, self.hosts) if _file(batch) not in there]

    def generate(self, sampler: Sampler, params: Any, show: bool = True) -> None:
        """Makes this host's missing batches, and shows how far it is. Raises UserError: a file cannot be written."""
        missing = self.missing()
        mine = len(range(self.host, self.spec.num_batches, self.hosts))
        clock = _Clock(self.folder / f"timing-{self.host}.json")
        with progress.bar("sampling", mine, "batches", start=mine - len(missing), show=show) as bar:
            for batch, image in self._dispatched(sampler, params, missing):
                pixels = to_uint8(np.asarray(image)[: len(self.spec.indices(batch))])
                write_bytes(self.folder / _file(batch), _to_npy(pixels))
                clock.tick(len(pixels))
                bar.update()

    def _dispatched(self, sampler: Sampler, params: Any, batches: list[int]) -> Iterator[tuple[int, Any]]:
        """The images of these batches, on the devices, where those of the next are being made already."""
        spec, pending = self.spec, collections.deque[tuple[int, Any]]()
        for batch in batches:
            index = batch * spec.batch_size + np.arange(sampler.fitting(spec.batch_size))
            pending.append((batch, sampler.dispatch(params, spec.labels(index), spec.seed, index)))
            if len(pending) == _AHEAD:
                yield pending.popleft()
        yield from pending

    def batches(self, everyones: bool = False) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Indices, int64 (B,), and images, uint8 (B, H, W, C), of this host's batches, or of all.

        Raises:
          UserError: a file is missing or damaged.
        """
        first, step = (0, 1) if everyones else (self.host, self.hosts)
        advice, shape = "delete it and start again, which makes it anew", self._image_shape
        for batch in range(first, self.spec.num_batches, step):
            path, indices = self.folder / _file(batch), self.spec.indices(batch)
            images = read_npy(path, ("u", 4), advice=advice)
            shape = shape or images.shape[1:]
            if images.dtype != np.uint8 or images.shape != (len(indices), *shape):
                raise UserError(
                    f"{path} is {images.dtype} {images.shape}, expected uint8 {(len(indices), *shape)}; {advice}"
                )
            yield indices, images

    def seconds_per_image(self) -> float | None:
        """Of all hosts together, without each sitting's first batch, which compiles; None if nothing was timed."""
        timings = [_timing(path) for path in self.folder.iterdir() if re.fullmatch(r"timing-\d+\.json", path.name)]
        rate = sum(images / seconds for images, seconds in timings if seconds > 0)
        return 1.0 / rate if rate else None

    def write_npz(self, path: str | os.PathLike[str]) -> None:
        """All images and labels as `arr_0` and `arr_1` of one file, as the ADM evaluator reads it; whole or not at all.

        Goes through one batch at a time. Raises UserError.
        """
        target = epath.Path(path)
        spec = self.spec
        try:
            with (
                atomic(target) as partial,
                partial.open("wb") as file,
                zipfile.ZipFile(file, "w", allowZip64=True) as archive,
            ):
                batches = self.batches(everyones=True)
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
                f"{path} cannot be written ({error.strerror or error}): free space, or give another folder"
            ) from None

    def write_pngs(self, folder: str | os.PathLike[str]) -> None:
        """This host's images as `folder/000123.png`, by index; those that are there are left. Raises UserError."""
        target = make_folder(folder)
        there = {path.name for path in target.iterdir()}
        for indices, images in self.batches():
            for index, image in zip(indices.tolist(), images, strict=True):
                if (name := f"{index:06d}.png") not in there:
                    write_png(target / name, image[..., 0] if image.shape[-1] == 1 else image)

    def remove(self) -> None:
        """Deletes the folder, all of whose files can be made again."""
        self.folder.rmtree(missing_ok=True)


class _Clock:
    """Keeps the time that images took, over several sittings; the first batch of each compiles and does not count."""

    def __init__(self, path: epath.Path) -> None:
        self.path = path
        self.images, self.seconds = _timing(path)
        self.last: float | None = None

    def tick(self, images: int) -> None:
        """To be called when a batch is done."""
        now = time.perf_counter()
        if self.last is not None:
            self.images += images
            self.seconds += now - self.last
            write_bytes(self.path, json.dumps({"images": self.images, "seconds": self.seconds}).encode())
        self.last = now


def _timing(path: epath.Path) -> tuple[int, float]:
    """Images and the seconds that they took; a file that cannot be read only costs what it had counted."""
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
