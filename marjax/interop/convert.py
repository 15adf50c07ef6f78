"""The reference's checkpoints as work directories: what `marjax convert` does, as a function.

A converted work directory is like one of a training run, but its one checkpoint has only the weights that were chosen:
it can be sampled from, exported and evaluated, but not trained on.
"""

import argparse
import dataclasses
import logging
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from marjax import config as config_lib
from marjax import numerics, progress
from marjax.assembly import assemble
from marjax.checkpoints.manager import Checkpoints
from marjax.errors import UserError
from marjax.files import atomic
from marjax.interop import names, reference, weights_file, wrappers
from marjax.interop.convert_tokenizer import Autoencoder, holds, read_autoencoder, write_tokenizer
from marjax.interop.pytorch import Tensor
from marjax.json_file import parse_json
from marjax.lock import locked_file
from marjax.models.init import init_unboxed
from marjax.paths import takes_paths
from marjax.tokenizers import open_tokenizer
from marjax.workdir import claim_workdir, read_workdir

_OURS = {"ema": "ema", "raw": "params"}  # item of a checkpoint with each kind of weights
# Names that every MAR model has.
ANCHORS = ("z_proj.weight", "encoder_pos_embed_learned", "diffusion_pos_embed_learned")
_TOKENIZER = "tokenizer.safetensors"

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Converted:
    """What `convert` made.

    Attributes:
      config: of the work directory, resolved.
      weights: "ema" or "raw": which weights it holds.
      num_params: how many numbers they are.
      is_new: False if the work directory was there already, with these very contents.
    """

    config: ConfigDict
    weights: str
    num_params: int
    is_new: bool


@dataclasses.dataclass(frozen=True)
class _Source:
    """The weights chosen of a file: tensors by PyTorch name, which weights they are, the reference's arguments."""

    tensors: Mapping[str, Tensor]
    weights: str
    arguments: Mapping[str, Any]
    step: int = 0


@numerics.pinned()
@takes_paths("checkpoint", "workdir", "tokenizer")
def convert(
    checkpoint: str | os.PathLike[str],
    workdir: str | os.PathLike[str],
    *,
    weights: str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Converted:
    """Makes a work directory of a MAR checkpoint in PyTorch's or the safetensors format.

    Args:
      checkpoint: the reference's own file, a state dict, or a safetensors file, whatever wrapped or averaged its
        weights (see `wrappers`); or the index of a sharded checkpoint, or its folder.
      workdir: a local folder, new or empty.
      weights: "ema" or "raw"; by default EMA weights, and of files without any the only set, with a warning if the
        file does not say which it is.
      tokenizer: file of the autoencoder; it then becomes a part of the work directory.
      overrides: fields of the config, {"model.num_heads": 4}.

    Raises:
      UserError: a file that cannot be read or does not fit, or a work directory with other contents. Nothing is
        written then.
    """
    target = _check_target(workdir)
    with progress.activity(f"reading {checkpoint}"):
        source = _select(weights_file.read(checkpoint), checkpoint, weights)
    autoencoder = read_autoencoder(tokenizer) if tokenizer is not None else None
    given = dict(overrides or {})
    if autoencoder is not None:
        given = {"tokenizer.path": _TOKENIZER, "tokenizer.autoencoder.scale": autoencoder.scale} | given
        if given["tokenizer.autoencoder.scale"] is None:
            raise UserError(
                f"{tokenizer} is no released autoencoder, so nobody knows what its latents were multiplied "
                f"with: give --config.tokenizer.autoencoder.scale=X (the reference's training has 0.2325)"
            )
        checked = config_lib.apply_overrides(
            config_lib.base(), {"tokenizer.autoencoder.scale": given["tokenizer.autoencoder.scale"]}
        )
        autoencoder = dataclasses.replace(autoencoder, scale=checked.tokenizer.autoencoder.scale)
        given["tokenizer.checksum"] = autoencoder.checksum
    try:
        shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
        config = reference.config_of(shapes, source.arguments, autoencoder.spec if autoencoder else None, given)
        with progress.activity("converting and checking the weights"):
            params = _parameters(config, source.tensors)
    except UserError as error:
        raise UserError(f"{checkpoint} cannot be converted: {error}") from None

    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    if target.exists() and any(target.iterdir()):
        with progress.activity(f"comparing with {target}"):
            _check_same(target, config, source, params, autoencoder)
        return Converted(config, source.weights, num_params, is_new=False)
    with progress.activity(f"writing {target}"):
        _write(target, config, source, params, autoencoder, pathlib.Path(checkpoint).name)
    return Converted(config, source.weights, num_params, is_new=True)


def _check_target(workdir: str | os.PathLike[str]) -> pathlib.Path:
    if "://" in os.fspath(workdir):
        raise UserError(f"work directory {workdir} is not local: convert into a local folder, then copy that")
    target = pathlib.Path(os.path.abspath(workdir))
    if target.exists() and not target.is_dir():
        raise UserError(f"work directory {workdir} is a file: give a new folder")
    if target.exists() and any(target.iterdir()) and not (target / "config.json").exists():
        raise UserError(f"work directory {workdir} has files but no config.json: give an empty or new folder")
    return target


def _select(file: weights_file.WeightsFile, path: str | os.PathLike[str], weights: str | None) -> _Source:
    if weights not in (None, "ema", "raw"):
        raise UserError(f"weights is {weights!r}: give 'ema' or 'raw'")
    metadata = file.metadata or {}
    said = metadata.get("weights")  # by `marjax export`
    if said not in _OURS:
        said = None
    if None not in (said, weights) and said != weights:
        raise UserError(f"{path} holds {said} weights, not {weights}: leave out --weights")
    chosen = wrappers.choose(file, ANCHORS, path, weights=weights or said)
    wrappers.check_size(chosen, file, path)
    arguments, step = _arguments(file.content), 0
    if said is not None:
        arguments, step = _exported(metadata)
    elif weights is None and not chosen.is_ema:
        _log.warning(
            "%s does not say whether its weights are EMA weights. The known public MAR safetensors files hold the raw "
            "ones, which score far worse: the reference's own .pth files have both. Converted as raw; say --weights "
            "ema or raw if you know.",
            path,
        )
    return _Source(
        reference.without_tables(chosen.tensors),
        said or weights or ("ema" if chosen.is_ema else "raw"),
        arguments,
        step,
    )


def _arguments(content: Any) -> dict[str, Any]:
    """The reference's arguments in its checkpoints, {} where there are none."""
    arguments = content.get("args") if isinstance(content, dict) else None
    arguments = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
    return arguments if isinstance(arguments, dict) else {}


def _exported(metadata: Mapping[str, str]) -> tuple[dict[str, Any], int]:
    """The arguments and the step that `marjax export` wrote."""
    try:
        step = int(metadata["step"])
        arguments = parse_json(metadata["args"], dict, where="its metadata", advice="export it again")
    except (KeyError, ValueError):
        return {}, 0
    return arguments, step if 0 <= step < 1 << 53 else 0


def _parameters(config: ConfigDict, tensors: Mapping[str, Tensor]) -> Any:
    """The parameter tree, float32 numpy. Raises UserError: names of tensors and parameters that do not match."""
    generator = assemble(config).generator
    abstract = jax.eval_shape(lambda: init_unboxed(generator, numerics.key(0)))
    odd = [
        f"{name} ({tensor.dtype})"
        for name, tensor in tensors.items()
        if not jax.numpy.issubdtype(tensor.dtype, jax.numpy.floating)
    ]
    if odd:
        raise UserError(f"tensors that are no floating point numbers: {', '.join(odd)}")
    try:
        params = names.to_marjax(tensors, abstract)  # type: ignore[arg-type]
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from None
    odd = [path for path, leaf in names.flatten(params).items() if not np.isfinite(leaf).all()]
    if odd:
        raise UserError(f"weights that are infinite or not a number, in {', '.join(odd)}")
    return params


def _write(
    target: pathlib.Path,
    config: ConfigDict,
    source: _Source,
    params: Any,
    autoencoder: Autoencoder | None,
    file_name: str,
) -> None:
    """Writes the work directory completely or not at all."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked_file(target, "marjax convert"), atomic(target) as partial:
            claim_workdir(partial, config)
            if autoencoder is not None:
                write_tokenizer(partial / _TOKENIZER, autoencoder)
                open_tokenizer(config_lib.tokenizer_config(read_workdir(partial)))  # as sampling will
            cpu = jax.local_devices(backend="cpu")[0]
            with Checkpoints(partial / "checkpoints") as checkpoints:
                checkpoints.save(
                    source.step,
                    **{_OURS[source.weights]: jax.device_put(params, cpu)},
                    meta={"converted": {"file": file_name, "weights": source.weights}},
                )
    except OSError as error:
        raise UserError(
            f"work directory {target} cannot be written ({error.strerror or error}): free space, or give another"
        ) from None


def _check_same(
    target: pathlib.Path, config: ConfigDict, source: _Source, params: Any, autoencoder: Autoencoder | None
) -> None:
    """Raises a UserError unless the work directory is what would be written."""
    advice = "give a new --out, or delete it"
    old, new = (config_lib.flatten(each) for each in (read_workdir(target), config))
    # The tokenizer's path depends on where the work directory is.
    differing = [key for key in new if old[key] != new[key] and key != "tokenizer.path"]
    if differing:
        raise UserError(
            f"work directory {target} is there already, with another config ({', '.join(differing[:5])}): {advice}"
        )
    if autoencoder is not None and not holds(target / _TOKENIZER, autoencoder):
        raise UserError(f"work directory {target} is there already, with another tokenizer: {advice}")
    item, cpu = _OURS[source.weights], jax.local_devices(backend="cpu")[0]
    where = jax.sharding.SingleDeviceSharding(cpu)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), params)
    with Checkpoints(target / "checkpoints", read_only=True) as checkpoints:
        if checkpoints.steps() != [source.step] or checkpoints.trees(source.step) != [item]:
            raise UserError(f"work directory {target} is there already, with other checkpoints: {advice}")
        found = checkpoints.restore({item: abstract}, source.step)
    assert found is not None
    same = jax.tree.map(lambda a, b: np.array_equal(np.asarray(a), b), found.items[item], params)
    if not all(jax.tree.leaves(same)):
        raise UserError(f"work directory {target} is there already, with other weights: {advice}")
