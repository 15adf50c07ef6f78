"""Which tensors of a checkpoint are the weights: training programs wrap, rename and average them in many ways.

A file may hold several sets of the same weights, as dicts or lists in each other and with prefixes before the names.
A set is found by its anchors: names that every set of such weights has.
"""

import dataclasses
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from marjax.errors import UserError, shortened
from marjax.interop.pytorch import Tensor
from marjax.interop.sharded import SHARD
from marjax.interop.unpickle import Refused
from marjax.interop.weights_file import WeightsFile

# Modules around a module: DistributedDataParallel and AveragedModel, torch.compile, FSDP and activation checkpointing
# of PyTorch and of fairscale, Lightning's DeepSpeed. They add a part to names, anywhere.
WRAPPERS = frozenset(
    ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_fpw_module", "_forward_module")
)
# Last parts of names that are no weights: counters of averages and of BatchNorm, what profilers and layers keep, and
# how the codes of a VQ network were averaged.
IGNORED = frozenset(
    (
        "n_averaged",
        "initted",
        "step",
        "num_updates",
        "decay",
        "num_batches_tracked",
        "total_ops",
        "total_params",
        "_extra_state",
        "_metadata",
        "position_ids",
        "cluster_size",
        "embed_avg",
        "embed_prob",
        "colorize",
        "scale_factor",
    )
)
# Words in keys and prefixes ("model_ema", "ema_model.", "shadow_params") that tell an average from live weights.
_AVERAGE = re.compile(r"emas?\d*|emamodel|modelema|shadow|averaged|averages?|swa|polyak")
_CONTAINERS = frozenset(("model", "module", "net", "network", "state", "dict", "params", "parameters", "weights"))
_LIVE = frozenset(("online", "live", "student"))
# Not weights, whatever their names.
_OTHERS = re.compile(
    r"optimizer|exp_avg|discriminator|"
    r"(^|_)(optim|opt|sched|scheduler|lr|grads?|moments?|momentum|scaler|loss|losses|metrics?)(_|$)"
)
# The likelier place first; others come last, in the order of the file.
_KEYS = (
    "",
    "model",
    "state_dict",
    "model_state_dict",
    "module",
    "model_ema",
    "ema",
    "ema_state_dict",
    "state_dict_ema",
    "ema_model",
    "ema_params",
    "params_ema",
    "shadow_params",
)
_PREFIXES = ("", "model.", "net.", "first_stage_model.", "vae.", "autoencoder.", "model_ema.", "ema_model.", "ema.")
_MAX_DEPTH, _MAX_VISITS, _MAX_SETS = 5, 4, 50
_SLACK = 1 << 26  # bytes

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Weights:
    """One set of weights in a file.

    Attributes:
      where: its place, for people; "" for all of the file.
      is_ema: whether it is an exponential moving average.
      tensors: by plain names, without wrappers and prefixes.
      refused: what is no tensor, by name.
      problem: why it cannot be used, or "".
    """

    where: str
    is_ema: bool
    tensors: Mapping[str, Tensor]
    refused: Mapping[str, Refused] = dataclasses.field(default_factory=dict)
    problem: str = ""


def choose(
    file: WeightsFile,
    anchors: Sequence[str],
    path: str | os.PathLike[str],
    *,
    weights: str | None = None,
    what: str = "a checkpoint with 'model_ema' and 'model' as the reference's, 'state_dict', or tensors by name",
) -> Weights:
    """The weights of a file: by default the EMA weights where there are several sets.

    Args:
      file: what was read.
      anchors: names that the weights have; without any of these, what looks most like weights is returned.
      path: of the file, for errors.
      weights: "ema" or "raw" to ask for these. All of a file that does not say what it holds may be either.
      what: the file should be, for errors.

    Raises:
      UserError: the file has no weights, or not those, or they cannot be used.
    """
    shard = SHARD.search(os.fspath(path))
    if shard is not None and int(shard[1]) > 1:
        raise UserError(f"{path} is one of {int(shard[1])} shards: give their index (*.index.json), or the folder")
    sets = find(file.content, anchors)
    if not sets:
        raise UserError(f"{path} is not {what}: it holds no weights{_whole(file.content)}")
    averages, live = [each for each in sets if each.is_ema], [each for each in sets if not each.is_ema]
    if weights == "ema" and not averages and live[0].where:
        raise UserError(f"{path} has no EMA weights, only {_places(live)}: give --weights raw")
    if weights == "raw" and not live:
        raise UserError(f"{path} has only EMA weights ({_places(averages)}): leave out --weights raw")
    candidates = (averages or live) if weights != "raw" else live
    chosen = candidates[0]
    if len(candidates) > 1:
        _log.warning("%s has several sets of these weights, %s: took the first", path, _places(candidates))
    if chosen.problem:
        raise UserError(f"{path}: {chosen.problem}")
    for name, each in chosen.refused.items():
        if "." in name:  # else it is beside the weights of a bare state dict, or is found to be missing
            raise UserError(
                f"{path}: the weight {shortened(name)} is an object of {shortened(each.name)}, which is "
                f"refused, and nothing of it was run: save its weights as a plain dict of tensors"
            )
    return chosen


def check_size(weights: Weights, file: WeightsFile, path: str | os.PathLike[str]) -> None:
    """For networks whose sizes follow from the file, before anything is read.

    Raises:
      UserError: the weights, which may be views that repeat a few values, are far larger than the file, or in float32
        larger than this machine's memory, as those of a file with holes may be.
    """
    needed = sum(math.prod(each.shape) * each.dtype.itemsize for each in weights.tensors.values())
    if file.size is not None and needed > 2 * file.size + _SLACK:
        raise UserError(
            f"{path} says that its weights have {needed} bytes, but it has {file.size}: it is damaged or hostile"
        )
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    widened = sum(math.prod(each.shape) * 4 for each in weights.tensors.values())
    if widened > memory:
        raise UserError(
            f"{path} has weights of {widened} bytes in float32, and this machine {memory} bytes of memory: "
            f"use a larger one, or get the file again if it should be smaller"
        )


def find(content: Any, anchors: Sequence[str]) -> list[Weights]:
    """All sets of weights in what a file holds, the likeliest first."""
    places = list(_places_of(content))
    ranked: list[tuple[tuple[int, int], Weights]] = []
    for keys, node in places:
        if isinstance(node, dict):
            ranked += [
                ((_rank(_KEYS, "/".join(keys)), _rank(_PREFIXES, prefix)), each)
                for prefix, each in _sets(keys, node, anchors)
            ]
    if not ranked:
        # Other weights: whoever asked says what is missing.
        return [
            Weights("/".join(keys), _is_ema(keys), *_entries(_plain(node)[0]))
            for keys, node in places
            if isinstance(node, dict)
        ][:1]
    found = [each for _, each in sorted(ranked, key=lambda each: each[0])]
    live = next((each for each in found if not each.is_ema), None)
    lists = (
        _of_list("/".join(keys), node, live)
        for keys, node in places
        if isinstance(node, list | tuple) and _is_ema(keys)
    )
    return found + [each for each in lists if each is not None] + _refused_averages(content)


def _refused_averages(content: Any) -> list[Weights]:
    """Averages that are an object, such as a whole module."""
    return [
        Weights(
            shortened(key),
            True,
            {},
            {},
            f"its EMA weights ({shortened(key)}) are an object of "
            f"{shortened(each.name)}, which is refused: give --weights raw, or save its state_dict() where it "
            f"can be loaded",
        )
        for key, each in (content.items() if isinstance(content, dict) else ())
        if isinstance(each, Refused)
        and isinstance(key, str)
        and _is_ema([key])
        and all(_AVERAGE.fullmatch(word) or word in _CONTAINERS for word in _words(key))
    ]


def _places_of(content: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(keys, node) of every dict or list that has tensors, the outer ones first; those of optimizers are left out."""
    level: list[tuple[tuple[str, ...], Any]] = [((), content)]
    visits: Counter[int] = Counter()  # a file can hold one list in many places
    for _ in range(_MAX_DEPTH):
        following: list[tuple[tuple[str, ...], Any]] = []
        for keys, node in level:
            visits[id(node)] += 1
            if not isinstance(node, dict | list | tuple) or visits[id(node)] > _MAX_VISITS:
                continue
            items = list(node.items() if isinstance(node, dict) else enumerate(node))
            kinds = {Tensor if isinstance(each, Tensor) else None for _, each in items}
            if (
                Tensor in kinds
                and (isinstance(node, dict) or len(kinds) == 1)
                and (not any(map(_OTHERS.search, keys)) or _is_ema(keys))
            ):
                yield keys, node
            if visits[id(node)] == 1:
                following += [
                    ((*keys, shortened(str(key))), each)
                    for key, each in items
                    if isinstance(each, dict | list | tuple) and isinstance(key, str | int)
                ]
        level = following


def _sets(keys: tuple[str, ...], node: Mapping[Any, Any], anchors: Sequence[str]) -> Iterator[tuple[str, Weights]]:
    """(prefix, weights) of the sets in one dict."""
    names, clashes = _plain(node)
    found = {
        name.removesuffix(anchor)
        for name in names
        for anchor in anchors
        if name == anchor or name.endswith(f".{anchor}")
    }
    found = set(sorted(found, key=lambda each: (_rank(_PREFIXES, each), len(each), each))[:_MAX_SETS])
    longest = sorted(found, key=len, reverse=True)
    entries: dict[str, dict[str, Any]] = {prefix: {} for prefix in found}
    for name, value in names.items():
        prefix = next((each for each in longest if name.startswith(each)), None)
        if prefix is not None:
            entries[prefix][name.removeprefix(prefix)] = value
    for prefix in sorted(found):
        place = "/".join((*keys, *([f"{prefix}*"] if prefix else [])))
        problem = next(
            (
                f"{first} and {second} are one name without wrappers"
                for first, second, plain in clashes
                if plain.startswith(prefix)
            ),
            "",
        )
        flat = _flat_average(names, prefix, entries[prefix])
        if flat:
            for name in [name for name in entries[prefix] if name.startswith("model_ema.")]:
                del entries[prefix][name]
            yield "model_ema.", Weights("/".join((*keys, "model_ema.*")), True, flat, {}, problem)
        yield prefix, Weights(place, _is_ema((*keys, prefix)), *_entries(entries[prefix]), problem)


def _flat_average(names: Mapping[str, Any], prefix: str, live: Mapping[str, Any]) -> dict[str, Tensor]:
    """LDM's LitEma: an average under model_ema, by names without their dots."""
    flat = {
        name.removeprefix("model_ema."): value
        for name, value in names.items()
        if name.startswith("model_ema.") and isinstance(value, Tensor)
    }
    if prefix.startswith("model_ema.") or not flat:
        return {}
    for start in ("", prefix):
        found = {name: flat[key] for name in live if (key := f"{start}{name}".replace(".", "")) in flat}
        if found and len({name.replace(".", "") for name in found}) == len(found):
            return found
    return {}


def _of_list(where: str, values: Sequence[Tensor], live: Weights | None) -> Weights | None:
    """An average that is a list, in the order of the live weights' parameters; None for a list of something else."""
    if live is None:
        return Weights(
            where,
            True,
            {},
            {},
            f"its EMA weights are a list ({where}), without names: give a file with the live weights beside them",
        )
    found: dict[str, Tensor] = {}
    names = [name for name, each in live.tensors.items() if each.dtype.kind not in "iub"]
    for name in names:  # some are buffers, which the list leaves out; a weight that then has none is found missing
        if len(found) < len(values) and values[len(found)].shape == live.tensors[name].shape:
            found[name] = values[len(found)]
    if len(found) == len(values):
        return Weights(where, True, found)
    if 2 * len(values) < len(names):
        return None
    return Weights(
        where,
        True,
        {},
        {},
        f"its EMA weights are a list of {len(values)} tensors ({where}), which do not "
        f"match the {len(names)} of {live.where or 'the others'}: give --weights raw",
    )


def _plain(node: Mapping[Any, Any]) -> tuple[dict[str, Any], list[tuple[str, str, str]]]:
    """Entries by names without wrappers, and (name, name, plain name) of those that then have one name."""
    plain: dict[str, Any] = {}
    origin: dict[str, str] = {}
    clashes = []
    for name, value in node.items():
        if isinstance(name, str):
            short = ".".join(part for part in name.split(".") if part not in WRAPPERS)
            if short in plain:
                clashes.append((shortened(origin[short]), shortened(name), short))
            plain[short], origin[short] = value, name
    return plain, clashes


def _entries(entries: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Refused]]:
    """The tensors, and what was refused in place of one."""
    kept = {name: value for name, value in entries.items() if name.rpartition(".")[2] not in IGNORED}
    return (
        {name: value for name, value in kept.items() if isinstance(value, Tensor)},
        {name: value for name, value in kept.items() if isinstance(value, Refused)},
    )


def _is_ema(keys: Sequence[str]) -> bool:
    words = [word for key in keys for word in _words(key)]
    return any(_AVERAGE.fullmatch(word) for word in words) and not _LIVE.intersection(words)


def _words(key: str) -> list[str]:
    return re.split(r"[^a-z0-9]+", key.lower())


def _rank(order: Sequence[str], value: str) -> int:
    return order.index(value) if value in order else len(order)


def _places(sets: Sequence[Weights]) -> str:
    return ", ".join(shortened(each.where) or "all of it" for each in sets[:5])


def _whole(content: Any) -> str:
    """What else a file holds that was meant as weights."""
    level = [content]
    for _ in range(3):
        for each in level:
            if isinstance(each, Refused):
                return (
                    f"; it has an object of {shortened(each.name)}, which is refused: save its state_dict() where "
                    f"it can be loaded"
                )
        level = [value for each in level if isinstance(each, dict) for value in each.values()][:1000]
    return ""
