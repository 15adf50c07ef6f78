"""Exports weights to a safetensors file with the names of the reference."""

import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from marjax import numerics, progress
from marjax.assembly import assemble
from marjax.checkpoints.manager import Checkpoints
from marjax.errors import UserError
from marjax.files import atomic, open_regular
from marjax.interop import names, reference
from marjax.lock import locked_file
from marjax.models.init import init_unboxed
from marjax.paths import takes_paths
from marjax.ranges import check_arguments
from marjax.workdir import no_checkpoints, read_workdir


@numerics.pinned()
@takes_paths("workdir", "out")
def export(
    workdir: str | os.PathLike[str], out: str | os.PathLike[str], *, weights: str | None = None, step: int | None = None
) -> dict[str, str]:
    """Writes the weights of a work directory with PyTorch's names and layouts, in float32, to the bit.

    Equal weights give equal bytes.

    Args:
      workdir: a training run or a conversion, of variant mar with head diffusion.
      out: a local file whose name ends in .safetensors. An existing file must have the same contents.
      weights: "ema" or "raw"; by default "ema", or what a converted work directory has.
      step: the step of the checkpoint, or None for the newest complete one.

    Returns:
      The file's metadata: `weights`, `step`, and `args`, JSON of the reference's arguments.

    Raises:
      UserError: the reference has no such model, there are no such weights, or the file has other contents or cannot
        be written.
    """
    check_arguments(step=step)
    target = pathlib.Path(os.path.abspath(out))
    if "://" in os.fspath(out) or target.suffix != ".safetensors":
        raise UserError(f"--out {out}: give a local file whose name ends in .safetensors")
    if not target.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {target.parent}: make it first")
    if weights not in (None, "ema", "raw"):
        raise UserError(f"weights is {weights!r}: give 'ema' or 'raw'")
    config = read_workdir(workdir)
    arguments = reference.arguments_of(config)
    generator = assemble(config).generator
    where = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        jax.eval_shape(lambda: init_unboxed(generator, numerics.key(0))),
    )
    folder = epath.Path(workdir) / "checkpoints"
    if not folder.is_dir():
        raise no_checkpoints(workdir)
    with Checkpoints(folder, read_only=True) as checkpoints:
        if weights is None:
            weights = "ema" if "ema" in checkpoints.trees(step) else "raw"
        item = "ema" if weights == "ema" else "params"
        restored = checkpoints.restore({item: abstract}, step)
    if restored is None:
        raise no_checkpoints(workdir)

    metadata = {"format": "pt", "weights": weights, "step": str(restored.step), "args": json.dumps(arguments)}
    parts = _parts(names.to_pytorch(restored.items[item]), metadata)
    if target.exists():
        with progress.activity(f"comparing with {out}"):
            same = _holds(target, parts)
        if not same:
            raise UserError(f"--out {out} is there already, with other contents: delete it, or give another name")
        return metadata
    try:
        with (
            locked_file(target, "marjax export"),
            progress.activity(f"writing {out}"),
            atomic(target) as partial,
            open(partial, "xb") as file,
        ):
            for part in parts:
                file.write(part)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error}): free space, or give another file") from None
    return metadata


def _parts(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> Iterator[bytes | memoryview]:
    """Yields a safetensors file of float32 tensors in parts.

    Equal tensors and metadata give equal bytes. The safetensors library orders metadata differently every time.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, array in sorted(tensors.items()):
        start, end = end, end + array.nbytes
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, array in sorted(tensors.items()):
        if array.nbytes:
            yield np.ascontiguousarray(array, "<f4").reshape(-1).view(np.uint8).data


def _holds(path: pathlib.Path, parts: Iterator[bytes | memoryview]) -> bool:
    """Whether a file has exactly these contents."""
    try:
        with open_regular(path) as file:
            return all(file.read(len(part)) == part for part in parts) and not file.read(1)
    except OSError as error:
        raise UserError(
            f"--out {path} is there already and cannot be read ({error.strerror or error}): give another name"
        ) from None
