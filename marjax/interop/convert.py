"""The reference's checkpoints as work directories: what `marjax convert` does, as a function.

A converted work directory is like one of a training run, but its one checkpoint has only the weights that were chosen:
it can be sampled from, exported and evaluated, but not trained on.
"""

import argparse
import dataclasses
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from marjax import config as config_lib
from marjax.checkpoints.manager import Checkpoints
from marjax.errors import UserError
from marjax.files import claimed
from marjax.interop import names, reference, weights_file
from marjax.interop.convert_tokenizer import Autoencoder, holds, read_autoencoder, write_tokenizer
from marjax.interop.pytorch import Tensor
from marjax.models import generator as generator_lib
from marjax.tokenizers import open_tokenizer
from marjax.training.state import init_unboxed
from marjax.workdir import claim_workdir, read_workdir

# Where each kind of weights is, in a checkpoint of the reference and in one of ours.
_THEIRS = {"ema": "model_ema", "raw": "model"}
_OURS = {"ema": "ema", "raw": "params"}
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


def convert(checkpoint: str | os.PathLike[str], workdir: str | os.PathLike[str], *, weights: str | None = None,
            tokenizer: str | os.PathLike[str] | None = None,
            overrides: Mapping[str, Any] | None = None) -> Converted:
    """Makes a work directory of a MAR checkpoint in PyTorch's or the safetensors format.

    Args:
      checkpoint: the reference's own file, a bare state dict, or a safetensors file.
      workdir: a local folder, new or empty.
      weights: "ema" or "raw"; by default, EMA weights of the reference's own file, and of files with one set of
        weights that set, with a warning if the file does not say which it is.
      tokenizer: file of the autoencoder; it then becomes a part of the work directory.
      overrides: fields of the config, {"model.num_heads": 4}.

    Raises:
      UserError: a file that cannot be read or does not fit, or a work directory with other contents. Nothing is
        written then.
    """
    target = _check_target(workdir)
    source = _select(weights_file.read(checkpoint), checkpoint, weights)
    autoencoder = read_autoencoder(tokenizer) if tokenizer is not None else None
    given = dict(overrides or {})
    if autoencoder is not None:
        given = {"tokenizer.path": _TOKENIZER, "tokenizer.autoencoder.scale": autoencoder.scale} | given
        if given["tokenizer.autoencoder.scale"] is None:
            raise UserError(f"{tokenizer} is no released autoencoder, so nobody knows what its latents were multiplied "
                            f"with: give --config.tokenizer.autoencoder.scale=X (the reference's training has 0.2325)")
        checked = config_lib.apply_overrides(config_lib.base(), {
            "tokenizer.autoencoder.scale": given["tokenizer.autoencoder.scale"]})
        autoencoder = dataclasses.replace(autoencoder, scale=checked.tokenizer.autoencoder.scale)
        given["tokenizer.checksum"] = autoencoder.checksum
    try:
        shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
        config = reference.config_of(shapes, source.arguments, autoencoder.spec if autoencoder else None,
                                     given)
        params = _parameters(config, source.tensors)
    except UserError as error:
        raise UserError(f"{checkpoint} cannot be converted: {error}") from None

    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    if target.exists() and any(target.iterdir()):
        _check_same(target, config, source, params, autoencoder)
        return Converted(config, source.weights, num_params, is_new=False)
    _write(target, config, source, params, autoencoder, pathlib.Path(checkpoint).name)
    return Converted(config, source.weights, num_params, is_new=True)


def _check_target(workdir: str | os.PathLike[str]) -> pathlib.Path:
    if "://" in os.fspath(workdir):
        raise UserError(f"work directory {workdir} is not local: convert into a local folder, then copy that")
    target = pathlib.Path(os.path.abspath(os.path.expanduser(workdir)))
    if target.exists() and not target.is_dir():
        raise UserError(f"work directory {workdir} is a file: give a new folder")
    if target.exists() and any(target.iterdir()) and not (target / "config.json").exists():
        raise UserError(f"work directory {workdir} has files but no config.json: give an empty or new folder")
    return target


def _select(file: weights_file.WeightsFile, path: str | os.PathLike[str], weights: str | None) -> _Source:
    if weights not in (None, "ema", "raw"):
        raise UserError(f"weights is {weights!r}: give 'ema' or 'raw'")
    content = file.content
    if isinstance(content, dict) and any(isinstance(content.get(key), dict) for key in _THEIRS.values()):
        chosen = weights or "ema"
        tensors = content.get(_THEIRS[chosen])
        if not isinstance(tensors, dict):
            other = "raw" if chosen == "ema" else "ema"
            if any(str(name).startswith("encoder.conv_in.") for name in content[_THEIRS[other]]):
                raise UserError(f"{path} is an autoencoder, not a MAR model: give it by --tokenizer")
            raise UserError(f"{path} has no {_THEIRS[chosen]}, so no {chosen} weights: give --weights {other}")
        arguments = content.get("args") or {}
        arguments = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
        source = _Source(tensors, chosen, arguments if isinstance(arguments, dict) else {})
    else:
        source = _single(content, file.metadata or {}, path, weights)
    odd = [str(name)[:80] for name, each in source.tensors.items()
           if not isinstance(each, Tensor) or not isinstance(name, str)]
    if odd or not source.tensors:
        raise UserError(f"{path} has something else than tensors among its weights ({', '.join(odd[:5]) or 'nothing'}):"
                        f" give a checkpoint of the reference, a state dict or a safetensors file")
    return source


def _single(content: Any, metadata: Mapping[str, str], path: str | os.PathLike[str], weights: str | None) -> _Source:
    """A file with one set of weights. Those that `marjax export` wrote say which."""
    if not isinstance(content, dict) or not any(isinstance(each, Tensor) for each in content.values()):
        raise UserError(f"{path} holds no weights: expected 'model_ema' and 'model' as in the reference's checkpoints, "
                        f"or tensors by name")
    said = metadata.get("weights")
    if said not in _OURS:
        if weights is None:
            _log.warning(
                "%s does not say whether its weights are EMA weights. The known public MAR safetensors files hold the "
                "raw ones, which score far worse: the reference's own .pth files have both. Converted as raw; say "
                "--weights ema or raw if you know.", path)
        return _Source(content, weights or "raw", {})
    if weights not in (None, said):
        raise UserError(f"{path} holds {said} weights, not {weights}: leave out --weights")
    try:
        arguments, step = json.loads(metadata["args"]), int(metadata["step"])
    except (KeyError, ValueError, RecursionError):
        arguments, step = {}, 0
    return _Source(content, said, arguments if isinstance(arguments, dict) else {}, max(0, step))


def _parameters(config: ConfigDict, tensors: Mapping[str, Tensor]) -> Any:
    """The parameter tree, float32 numpy. Raises UserError: names of tensors and parameters that do not match."""
    generator = generator_lib.of(config, config_lib.tokens_of(config))
    abstract = jax.eval_shape(lambda: init_unboxed(generator, jax.random.key(0)))
    odd = [f"{name} ({tensor.dtype})" for name, tensor in tensors.items()
           if not jax.numpy.issubdtype(tensor.dtype, jax.numpy.floating)]
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


def _write(target: pathlib.Path, config: ConfigDict, source: _Source, params: Any, autoencoder: Autoencoder | None,
           file_name: str) -> None:
    """Writes the work directory under another name and renames it, so that it is whole or not there."""
    partial = target.with_name(f"{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with claimed(os.fspath(target.parent), "marjax convert", f"{partial.name}.lock"):
            shutil.rmtree(partial, ignore_errors=True)  # what a killed run has left
            try:
                claim_workdir(partial, config)
                if autoencoder is not None:
                    write_tokenizer(partial / _TOKENIZER, autoencoder)
                    # What sampling will do, which finds whatever does not fit.
                    open_tokenizer(read_workdir(partial).tokenizer)
                cpu = jax.local_devices(backend="cpu")[0]
                with Checkpoints(partial / "checkpoints") as checkpoints:
                    checkpoints.save(source.step, **{_OURS[source.weights]: jax.device_put(params, cpu)},
                                     meta={"converted": {"file": file_name, "weights": source.weights}})
                partial.rename(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(f"work directory {target} cannot be written ({error.strerror or error}): free space, or give "
                        f"another") from None


def _check_same(target: pathlib.Path, config: ConfigDict, source: _Source, params: Any,
                autoencoder: Autoencoder | None) -> None:
    """Raises a UserError unless the work directory is what would be written."""
    advice = "give a new --out, or delete it"
    old, new = (config_lib.flatten(each) for each in (read_workdir(target), config))
    # The tokenizer's path depends on where the work directory is.
    differing = [key for key in new if old[key] != new[key] and key != "tokenizer.path"]
    if differing:
        raise UserError(f"work directory {target} is there already, with another config ({', '.join(differing[:5])}): "
                        f"{advice}")
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
