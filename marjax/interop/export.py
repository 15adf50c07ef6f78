"""Our weights under the reference's names, as a safetensors file: what `marjax export` does, as a function."""

import contextlib
import json
import os
import pathlib

import jax
import numpy as np
from etils import epath
from safetensors import SafetensorError
from safetensors.numpy import save_file

from marjax import config as config_lib
from marjax import numerics
from marjax.checkpoints.manager import Checkpoints
from marjax.errors import UserError
from marjax.interop import names, reference
from marjax.lock import locked_file
from marjax.models import generator as generator_lib
from marjax.ranges import check_arguments
from marjax.training.state import init_unboxed
from marjax.workdir import read_workdir


@numerics.pinned()
def export(workdir: str | os.PathLike[str], out: str | os.PathLike[str], *, weights: str | None = None,
           step: int | None = None) -> dict[str, str]:
    """Writes the weights of a work directory with PyTorch's names and layouts, float32, to the bit.

    Args:
      workdir: of a training run or a conversion; its model is variant mar with head diffusion.
      out: a local file that is not there yet; its name ends in .safetensors.
      weights: "ema" or "raw"; by default "ema", or what a converted work directory has.
      step: of the checkpoint, or None for the newest whole one.

    Returns:
      The file's metadata: `weights`, `step`, and `args`, JSON of the reference's arguments.

    Raises:
      UserError: the reference has no such model, there are no such weights, or the file cannot be written.
    """
    check_arguments(step=step)
    target = pathlib.Path(os.path.abspath(os.path.expanduser(out)))
    if "://" in os.fspath(out) or target.suffix != ".safetensors":
        raise UserError(f"--out {out}: give a local file whose name ends in .safetensors")
    if target.exists():
        raise UserError(f"--out {out} is there already: delete it, or give another name")
    if not target.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {target.parent}: make it first")
    if weights not in (None, "ema", "raw"):
        raise UserError(f"weights is {weights!r}: give 'ema' or 'raw'")
    config = read_workdir(workdir)
    arguments = reference.arguments_of(config)
    generator = generator_lib.of(config, config_lib.tokens_of(config))
    where = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
                            jax.eval_shape(lambda: init_unboxed(generator, numerics.key(0))))
    folder = epath.Path(workdir) / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{workdir} has no checkpoints yet: let the training run reach its first")
    with Checkpoints(folder, read_only=True) as checkpoints:
        if weights is None:
            weights = "ema" if "ema" in checkpoints.trees(step) else "raw"
        item = "ema" if weights == "ema" else "params"
        restored = checkpoints.restore({item: abstract}, step)
    if restored is None:
        raise UserError(f"{folder} has no checkpoints yet: let the training run reach its first")

    tensors = {name: np.ascontiguousarray(array) for name, array in names.to_pytorch(restored.items[item]).items()}
    metadata = {"format": "pt", "weights": weights, "step": str(restored.step), "args": json.dumps(arguments)}
    partial = target.with_name(f"{target.name}.partial")
    try:
        with locked_file(target, "marjax export"):
            save_file(tensors, partial, metadata)
            partial.replace(target)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise UserError(f"{out} cannot be written ({error}): free space, or give another file") from None
    return metadata
