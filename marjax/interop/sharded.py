"""Sharded weights with an index, in the format of Hugging Face: safetensors or PyTorch files."""

import os
import re
from collections.abc import Callable

from marjax.errors import UserError, shortened
from marjax.interop.pytorch import Tensor
from marjax.json_file import read_json

SUFFIX = ".index.json"
SHARD = re.compile(r"-\d{5}-of-(\d{5})\.(?:safetensors|bin|pth?)$")  # the group is the number of shards
_MAX_SHARDS = 200
_ALONE = (
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
)


def file_of(folder: str) -> str:
    """Returns the index of a folder, or else its only weights file. Raises UserError: none, or several indexes."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror or error}): give a folder that can") from None
    indexes = [name for name in names if name.endswith(SUFFIX)]
    # Both formats, or a whole file and its shards, are the same weights twice.
    found = (
        [name for name in indexes if ".safetensors" in name]
        or indexes
        or [name for name in _ALONE if name in names][:1]
    )
    if not found and any(name.endswith(".distcp") for name in names):
        raise UserError(
            f"{folder} is a checkpoint of torch.distributed: make it one file with python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {folder} FILE.pth"
        )
    if len(found) != 1:
        what = (
            f"has several indexes ({', '.join(map(shortened, found[:5]))})"
            if found
            else f"is a folder without an index of weights (*{SUFFIX}) or a {_ALONE[0]}"
        )
        raise UserError(f"{folder} {what}: give the file of a checkpoint in it")
    return os.path.join(folder, found[0])


def read(path: str, read_file: Callable[[str], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Reads the tensors of all shards, by name.

    Args:
      path: the index.
      read_file: reads the tensors of one shard.

    Raises:
      UserError: the index is damaged, names a file elsewhere, or its shards are missing or hold other tensors.
    """
    advice = "get the index and all of its shards again"
    places = read_json(path, {"weight_map": {str: str}}, advice=advice)["weight_map"]
    folder, shards = os.path.dirname(path), sorted(set(places.values()))
    for shard in shards:
        unsafe = shard != os.path.basename(shard) or shard in ("", ".", "..") or "\\" in shard or "\0" in shard
        if unsafe or shard.endswith(SUFFIX):
            raise UserError(f"{path} names {shortened(shard)!r}, which is no file beside it; {advice}")
    if not 0 < len(shards) <= _MAX_SHARDS:
        raise UserError(f"{path} names {len(shards)} shards, expected 1 to {_MAX_SHARDS}; {advice}")
    missing = [shard for shard in shards if not os.path.exists(os.path.join(folder, shard))]
    if missing:
        raise UserError(
            f"{path} names {len(missing)} of {len(shards)} shards that are not beside it "
            f"({', '.join(map(shortened, missing[:5]))}); {advice}"
        )
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        for name, tensor in read_file(os.path.join(folder, shard)).items():
            if places.get(name) != shard:
                said = f"in {shortened(places[name])}" if name in places else "in none"
                raise UserError(
                    f"{os.path.join(folder, shard)} has the tensor {shortened(name)}, which is {said} by "
                    f"{path}; {advice}"
                )
            tensors[name] = tensor
    lost = [name for name in places if name not in tensors]
    if lost:
        raise UserError(
            f"{os.path.join(folder, places[lost[0]])} has no tensor {shortened(lost[0])} (of {len(lost)} "
            f"that are missing), which {path} says it has; {advice}"
        )
    return tensors
