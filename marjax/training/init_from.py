"""Fine-tuning: initialises a run from the weights of another work directory, the source (`config.init`).

Tensors with the same name and shape are loaded from the source. Only class embeddings, position embeddings, the token
projection and the head may differ; these are initialised randomly. The optimizer state is new and the EMA starts at the
parameters. The run's config records the source, so a run killed before its first checkpoint restarts from it.
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

_ITEMS = {"ema": "ema", "raw": "params"}  # kind of weights -> item of a checkpoint

# Fields that must agree, whether or not tensor shapes depend on them.
_BACKBONE = ("width", "encoder_depth", "decoder_depth", "num_heads", "mlp_ratio")
_MAY_DIFFER = re.compile(r"class_embedding|backbone/\w*pos_embed|backbone/z_proj/kernel|head/.*")


class Start(NamedTuple):
    """The initial weights of a run.

    Attributes:
      config: the run's config, with `init` completed.
      params: float32 arrays by parameter path, sharded as in the run; empty if the run has a checkpoint or starts from
        random weights.
    """

    config: ConfigDict
    params: dict[str, jax.Array]


def prepare(config: ConfigDict, workdir: str | os.PathLike[str], mesh: Mesh) -> Start:
    """Reads the source's weights if the run still needs them. Every process must call this; it writes no files.

    Args:
      config: resolved. `init.path` is required only for a new run; once the run has a checkpoint, the source may be
        deleted.
      workdir: the run's work directory, new or existing.
      mesh: the run's mesh.

    Raises:
      UserError: the source is not a work directory, lacks the weights, does not fit the config, or is not the one that
        the run was started from.
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
    """Completes the config from the recorded source, unless they contradict each other."""
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
    """The source's config. Raises UserError on all processes if any cannot read it."""
    source, problem = config, ""
    try:
        source = read_workdir(config.init.path)
    except UserError as error:
        problem = f"config.init.path (--init_from): {error}"
    refuse(problem)
    return source


def _open(config: ConfigDict) -> Checkpoints:
    """The source's checkpoints. Raises UserError if it has none."""
    folder = epath.Path(config.init.path) / "checkpoints"
    if not folder.is_dir():
        raise UserError(
            f"config.init.path={config.init.path} has no checkpoints; use a work directory of marjax convert or train"
        )
    return Checkpoints(folder, read_only=True)


def _weights(config: ConfigDict, trees: list[str]) -> str:
    """Chooses "ema" or "raw" for a checkpoint with these trees. Raises UserError."""
    given: str | None = config.init.weights
    if given is None:
        return "ema" if "ema" in trees else "raw"
    if _ITEMS[given] not in trees:
        raise UserError(
            f"config.init.weights={given}, but {config.init.path} has only "
            f"{' and '.join(name for name, item in _ITEMS.items() if item in trees)} weights"
        )
    return given


def _identified(config: ConfigDict) -> ConfigDict:
    """Completes the config of a run with a checkpoint, checking the source's checksum."""
    init = config.init
    if None not in (init.weights, init.step, init.checksum):
        return config
    _source(config)
    with _open(config) as checkpoints:
        found = checkpoints.describe(init.step)
    if found is None:
        raise UserError(f"config.init.path={init.path} has no readable checkpoint; leave it unset to resume")
    step, digests = found
    weights = _weights(config, list(digests))
    return _filled(config, weights, step, digests[_ITEMS[weights]])


def _filled(config: ConfigDict, weights: str, step: int, checksum: str) -> ConfigDict:
    if config.init.checksum not in (None, checksum):
        raise UserError(
            f"config.init.checksum={config.init.checksum}, but the {weights} weights of step {step} in "
            f"{config.init.path} have {checksum}; use the work directory that the run started from"
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
            f"config.init.path={init.path} does not fit config.model: {odd[0]} has shape {_shape(there.get(odd[0]))}, "
            f"expected {_shape(wanted[odd[0]])}; set config.model as in its config.json"
        )
    with _open(config) as checkpoints:
        found = checkpoints.describe(init.step)
        weights = _weights(config, list(_ITEMS.values()) if found is None else list(found[1]))
        item = _ITEMS[weights]
        restored = checkpoints.restore({item: traverse_util.unflatten_dict(there, sep="/")}, init.step)
    if restored is None:
        raise UserError(f"config.init.path={init.path} has no checkpoint yet; use another work directory")
    config = _filled(config, weights, restored.step, restored.digests[item])
    if jax.process_index() == 0:
        for text in [
            *_warnings(config, source, denoises),
            f"starting from {init.path}: {weights} weights of step "
            f"{restored.step}, checksum {config.init.checksum[:8]}; {len(taken)} of {len(wanted)} tensors",
            *(
                f"randomly initialised: {path}, {_shape(wanted[path])}, in the source {_shape(there.get(path))}"
                for path in fresh
            ),
        ]:
            print(text, file=sys.stderr)
    params = traverse_util.flatten_dict(restored.items[item], sep="/")
    return Start(config, {path: params[path] for path in taken})


def _abstract(config: ConfigDict, mesh: Mesh) -> dict[str, Parameter]:
    """The abstract parameters of a config by path."""
    flat: dict[str, Parameter] = traverse_util.flatten_dict(assemble(config, mesh).params, sep="/")
    return flat


def _check_meaning(config: ConfigDict, source: ConfigDict, denoises: bool) -> None:
    """Raises UserError, naming all fields that must agree and do not."""
    attention, expected = (VARIANTS[each.model.variant].attention for each in (config, source))
    if attention != expected:
        raise UserError(
            f"config.model.variant={config.model.variant} has {attention} attention, but {config.init.path} has "
            f"{expected} attention; set --config.model.variant={source.model.variant}"
        )
    keys = [f"model.{name}" for name in _BACKBONE]
    if attention == "bidirectional":
        keys.append("model.buffer_size")
    if denoises:
        keys.append("model.diffusion.num_steps")  # the unit of timesteps
    if _same_tokenizer(config, source) and source.tokenizer.autoencoder.scale is not None:
        keys.append("tokenizer.autoencoder.scale")
    before, after = config_lib.flatten(source), config_lib.flatten(config)
    differing = [key for key in keys if before[key] != after[key]]
    if differing:
        raise UserError(
            f"config.init.path={config.init.path} differs in "
            f"{', '.join(f'{key} ({before[key]}, not {after[key]})' for key in differing)}; set "
            f"{' '.join(f'--config.{key}={before[key]}' for key in differing)}"
        )


def _same_tokenizer(config: ConfigDict, source: ConfigDict) -> bool:
    """Compares name and checksum; a work directory converted without a tokenizer has no checksum."""
    new, old = config.tokenizer, source.tokenizer
    return new.name == old.name and (not old.checksum or new.checksum == old.checksum)


def _warnings(config: ConfigDict, source: ConfigDict, denoises: bool) -> list[str]:
    """Warnings about another tokenizer, and about a denoiser that is not loaded because of its size."""
    lines = []
    if not _same_tokenizer(config, source):
        new, old = (
            f"{each.name}{f' ({each.checksum[:8]})' if each.checksum else ''}"
            for each in (config.tokenizer, source.tokenizer)
        )
        lines.append(
            f"warning: the tokenizer is {new}, but {config.init.path} was trained with {old}, whose tokens differ"
        )
    size = source.model.denoiser
    sizes = [name for name in ("depth", "width") if config.model.denoiser[name] != size[name]]
    if denoises and sizes:
        lines.append(
            "warning: the denoiser has another size; to load its weights, set "
            + " ".join(f"--config.model.denoiser.{name}={size[name]}" for name in sizes)
        )
    return lines


def _shape(leaf: jax.ShapeDtypeStruct | None) -> str:
    return "none" if leaf is None else str(tuple(leaf.shape))
