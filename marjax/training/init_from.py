"""Fine-tuning: a new run that starts from the weights of another work directory (`config.init`).

A tensor is taken from the source if it has the same name and shape there. Only the class table, the position tables,
the projection of the tokens and the head may differ: these are then initialised as in any new run. The optimizer's
state is new and the EMA starts at the parameters. What the run started from is recorded in its config, so that a run
that is killed before its first checkpoint starts from the same weights again.
"""

import os
import re
import sys
from typing import NamedTuple

import jax
from etils import epath
from flax import traverse_util
from jax.sharding import Mesh
from ml_collections import ConfigDict

from marjax import config as config_lib
from marjax.assembly import assemble
from marjax.checkpoints.manager import Checkpoints
from marjax.errors import UserError
from marjax.sharding import Parameter
from marjax.training.fit import refuse
from marjax.variants import VARIANTS
from marjax.workdir import read_workdir

_ITEMS = {"ema": "ema", "raw": "params"}  # of a checkpoint, by kind of weights

# Fields that give weights their meaning, whether or not their shapes show it.
_BACKBONE = ("width", "encoder_depth", "decoder_depth", "num_heads", "mlp_ratio")
_MAY_DIFFER = re.compile(r"class_embedding|backbone/\w*pos_embed|backbone/z_proj/kernel|head/.*")


class Start(NamedTuple):
    """What a run starts from.

    Attributes:
      config: of the run, with `init` filled in.
      params: float32 arrays by the path of the parameter, sharded as the run's own; empty for a run that has a
        checkpoint, or that starts from random weights.
    """

    config: ConfigDict
    params: dict[str, jax.Array]


def prepare(config: ConfigDict, workdir: str | os.PathLike[str], mesh: Mesh) -> Start:
    """Reads the source's weights if the run still needs them. Every process of a run must call this; writes nothing.

    Args:
      config: resolved; of `init` only `path` has to be set. A work directory that records its source needs not even
        that, and once it has a checkpoint, the source may be gone.
      workdir: of the run, new or not.
      mesh: of the run.

    Raises:
      UserError: a source that is no work directory, has no such weights, does not fit the config, or is not the one
        that the run was started from.
    """
    path = epath.Path(workdir)
    is_new = not (path / "config.json").exists()
    if not is_new:
        config = _with_recorded(config, workdir)
    if not config.init.path:
        return Start(config, {})
    if is_new or not _has_checkpoints(path):
        return _read(config, mesh)
    return Start(_identified(config), {})


def _with_recorded(config: ConfigDict, workdir: str | os.PathLike[str]) -> ConfigDict:
    """The config with the source that the work directory records, where the config has none or the same."""
    old, new = read_workdir(workdir).init.to_dict(), config.init.to_dict()
    if (
        old["path"]
        and new["path"] in ("", old["path"])
        and all(new[key] in (None, old[key]) for key in ("weights", "step", "checksum"))
    ):
        return config_lib.apply_overrides(config, {f"init.{key}": value for key, value in old.items()})
    return config


def _has_checkpoints(workdir: epath.Path) -> bool:
    folder = workdir / "checkpoints"
    if not folder.is_dir():
        return False
    with Checkpoints(folder, read_only=True) as checkpoints:
        return bool(checkpoints.steps())


def _source(config: ConfigDict) -> ConfigDict:
    """The config of the source. Raises UserError, on all processes if one cannot read it."""
    source, problem = config, ""
    try:
        source = read_workdir(config.init.path)
    except UserError as error:
        problem = f"config.init.path, or --init_from: {error}"
    refuse(problem)
    return source


def _open(config: ConfigDict) -> Checkpoints:
    """The source's checkpoints. Raises UserError: it has none."""
    folder = epath.Path(config.init.path) / "checkpoints"
    if not folder.is_dir():
        raise UserError(
            f"config.init.path {config.init.path} has no checkpoints: give a work directory that marjax "
            f"convert or marjax train has made"
        )
    return Checkpoints(folder, read_only=True)


def _weights(config: ConfigDict, trees: list[str]) -> str:
    """Which weights to take of a checkpoint with these trees: "ema" or "raw"."""
    given: str | None = config.init.weights
    if given is None:
        return "ema" if "ema" in trees else "raw"
    if _ITEMS[given] not in trees:
        raise UserError(
            f"config.init.weights is {given!r}, but {config.init.path} has only "
            f"{' and '.join(name for name, item in _ITEMS.items() if item in trees)} weights"
        )
    return given


def _identified(config: ConfigDict) -> ConfigDict:
    """The config with the checksum of its source, for a run that needs no more of it: a contradiction is then found."""
    init = config.init
    if None not in (init.weights, init.step, init.checksum):
        return config
    _source(config)
    with _open(config) as checkpoints:
        found = checkpoints.describe(init.step)
    if found is None:
        raise UserError(f"config.init.path {init.path} has no checkpoint that can be read: leave it out to resume")
    step, digests = found
    weights = _weights(config, list(digests))
    return _filled(config, weights, step, digests[_ITEMS[weights]])


def _filled(config: ConfigDict, weights: str, step: int, checksum: str) -> ConfigDict:
    if config.init.checksum not in (None, checksum):
        raise UserError(
            f"config.init.checksum is {config.init.checksum}, but the {weights} weights of step {step} in "
            f"{config.init.path} have {checksum}: give the work directory that the run started from"
        )
    return config_lib.apply_overrides(config, {"init.weights": weights, "init.step": step, "init.checksum": checksum})


def _read(config: ConfigDict, mesh: Mesh) -> Start:
    init = config.init
    source = _source(config)
    same_head = source.model.head == config.model.head
    wanted = _abstract(config, mesh)
    denoises = same_head and any(path.startswith("head/denoiser/") for path in wanted)
    _check_meaning(config, source, denoises)
    there = _abstract(source, mesh)
    taken = {
        path
        for path, leaf in wanted.items()
        if path in there and there[path].shape == leaf.shape and (same_head or not path.startswith("head/"))
    }
    fresh = [path for path in wanted if path not in taken]
    odd = [path for path in fresh if not _MAY_DIFFER.fullmatch(path)]
    if odd:
        raise UserError(
            f"config.init.path {init.path} does not fit config.model: {odd[0]} is "
            f"{_shape(there.get(odd[0]))} there, expected {_shape(wanted[odd[0]])}; set the fields of "
            f"config.model as in its config.json"
        )
    with _open(config) as checkpoints:
        found = checkpoints.describe(init.step)
        weights = _weights(config, list(_ITEMS.values()) if found is None else list(found[1]))
        item = _ITEMS[weights]
        restored = checkpoints.restore({item: traverse_util.unflatten_dict(there, sep="/")}, init.step)
    if restored is None:
        raise UserError(f"config.init.path {init.path} has no checkpoint yet: give another work directory")
    config = _filled(config, weights, restored.step, restored.digests[item])
    if jax.process_index() == 0:
        for text in [
            *_warnings(config, source, denoises),
            f"starting from {init.path}: {weights} weights of step "
            f"{restored.step}, checksum {config.init.checksum[:8]}; {len(taken)} of {len(wanted)} tensors",
            *(
                f"freshly initialised: {path}, {_shape(wanted[path])} here, {_shape(there.get(path))} there"
                for path in fresh
            ),
        ]:
            print(text, file=sys.stderr)
    params = traverse_util.flatten_dict(restored.items[item], sep="/")
    return Start(config, {path: params[path] for path in taken})


def _abstract(config: ConfigDict, mesh: Mesh) -> dict[str, Parameter]:
    """The parameters of a config's model, with their shardings, by path."""
    flat: dict[str, Parameter] = traverse_util.flatten_dict(assemble(config, mesh).params, sep="/")
    return flat


def _check_meaning(config: ConfigDict, source: ConfigDict, denoises: bool) -> None:
    """Raises a UserError that names all fields in which the weights would have another meaning."""
    ours, theirs = VARIANTS[config.model.variant].attention, VARIANTS[source.model.variant].attention
    if ours != theirs:
        raise UserError(
            f"config.model.variant is {config.model.variant!r} ({ours} attention), but {config.init.path} "
            f"has {theirs} attention: set --config.model.variant={source.model.variant}"
        )
    keys = [f"model.{name}" for name in _BACKBONE]
    if ours == "bidirectional":
        keys.append("model.buffer_size")
    if denoises:
        keys.append("model.diffusion.num_steps")  # timesteps are counted in these
    if _same_tokenizer(config, source) and source.tokenizer.autoencoder.scale is not None:
        keys.append("tokenizer.autoencoder.scale")
    before, after = config_lib.flatten(source), config_lib.flatten(config)
    differing = [key for key in keys if before[key] != after[key]]
    if differing:
        raise UserError(
            f"config.init.path {config.init.path} has another "
            f"{', '.join(f'{key} ({before[key]}, not {after[key]})' for key in differing)}: add "
            f"{' '.join(f'--config.{key}={before[key]}' for key in differing)}"
        )


def _same_tokenizer(config: ConfigDict, source: ConfigDict) -> bool:
    """As far as is known: a converted work directory without a tokenizer has no checksum of it."""
    ours, theirs = config.tokenizer, source.tokenizer
    return ours.name == theirs.name and (not theirs.checksum or ours.checksum == theirs.checksum)


def _warnings(config: ConfigDict, source: ConfigDict, denoises: bool) -> list[str]:
    """What is worth a second look: tokens with another meaning, and a denoiser that could have been taken."""
    lines = []
    if not _same_tokenizer(config, source):
        ours, theirs = (
            f"{each.name}{f' ({each.checksum[:8]})' if each.checksum else ''}"
            for each in (config.tokenizer, source.tokenizer)
        )
        lines.append(
            f"warning: the tokenizer is {ours}, but {config.init.path} was trained with {theirs}: the tokens "
            f"have another meaning"
        )
    size = source.model.denoiser
    sizes = [name for name in ("depth", "width") if config.model.denoiser[name] != size[name]]
    if denoises and sizes:
        lines.append(
            "warning: the denoiser has another size; to start from all its weights, add "
            + " ".join(f"--config.model.denoiser.{name}={size[name]}" for name in sizes)
        )
    return lines


def _shape(leaf: jax.ShapeDtypeStruct | None) -> str:
    return "none" if leaf is None else str(tuple(leaf.shape))
