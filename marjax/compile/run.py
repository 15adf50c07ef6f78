"""`marjax compile` as functions, from a config and a slice to records and text."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections

from marjax import config as config_lib
from marjax import sharding
from marjax.compile import report, search
from marjax.compile.process import compile_program, prepare
from marjax.compile.programs import NAMES, CompilerError, Lowered, lowered_programs
from marjax.files import write_bytes
from marjax.host_memory import gib
from marjax.paths import takes_paths


@takes_paths("hlo_dir")
def compile_for(
    config: ml_collections.ConfigDict,
    topology: str,
    *,
    names: Sequence[str] = NAMES,
    cached: bool = False,
    hlo_dir: str = "",
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Compiles a config's programs for a slice that need not exist, each in its own process.

    Args:
      config: as a config file returns it, or resolved.
      topology: such as "v5e:8x8" or "v5e-64".
      names: programs, among `programs.NAMES`.
      cached: the train step reads a latent cache.
      hlo_dir: folder for the programs' HLO texts; "" writes none.
      log: called with the report of each program as text.

    Returns:
      The slice, the mesh and a record for every program, as JSON values; the record of a program that failed to compile
      has only its name and an "error".

    Raises:
      UserError: libtpu is not installed, no such slice, or a config that cannot run on it.
    """
    config, described, mesh = prepare(config, topology)
    log(f"{described.name}: {mesh.size} devices {described.devices[0].device_kind!r}, mesh {dict(mesh.shape)}")
    records = []
    for lowered in lowered_programs(config, mesh, names, cached):
        try:
            compiled = compile_program(lowered, config, topology, cached=cached, keep_text=bool(hlo_dir))
        except CompilerError as error:  # other programs may still compile
            records.append({"program": lowered.name, "error": str(error)})
            log(f"{report.TITLES[lowered.name]}\n  {error}")
            continue
        records.append(report.record(compiled, config, described, mesh))
        log(report.text(compiled, config, described, mesh))
        if compiled.text:
            os.makedirs(hlo_dir, exist_ok=True)
            write_bytes(os.path.join(hlo_dir, f"{lowered.name}.txt"), compiled.text.encode())
    return {
        "topology": described.name,
        "chip": described.chip.name,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "remat": config.model.remat,
        "denoiser_remat": config.model.denoiser.remat,
        "accumulate": config.train.accumulate,
        "programs": records,
    }


def search_batch(
    config: ml_collections.ConfigDict,
    topology: str,
    *,
    cached: bool = False,
    policies: Sequence[str] = search.POLICIES,
    log: Callable[[str], None] = print,
) -> list[search.Found]:
    """Finds the largest batch per device with which the train step fits on a slice, for each remat policy.

    Gradients are not accumulated, and the number of steps stays that of the config's own batch size; it does not change
    the memory. If the compiler fails, a policy has an `error` and the search continues with the next.

    Args and raises: see `compile_for`.
    """
    resolved, described, mesh = prepare(config, topology)
    log(f"{described.name}: {mesh.size} devices {described.devices[0].device_kind!r}, mesh {dict(mesh.shape)}")
    shards, found = sharding.batch_shards(mesh), []
    start = max(1, resolved.train.batch_size // shards)

    def lower(batch: int, overrides: Mapping[str, Any]) -> tuple[Lowered, ml_collections.ConfigDict]:
        """Returns the train step for `batch` images per device, and its config."""
        counted = {"train.steps": resolved.train.steps, "train.warmup_steps": resolved.train.warmup_steps}
        changed = config_lib.apply_overrides(
            config, {**counted, "train.batch_size": batch * shards, "train.accumulate": 1, **overrides}
        )
        changed = config_lib.resolve(changed)
        return lowered_programs(changed, mesh, ("train",), cached)[0], changed

    fixed = lower(start, {})[0].state_bytes
    for policy in policies:

        def compile_at(batch: int, policy: str = policy) -> search.Trial:
            remat = {"model.remat": policy, "model.denoiser.remat": policy}
            compiled = compile_program(*lower(batch, remat), topology, cached=cached)
            needed, usable, fits = compiled.memory.peak, compiled.usable, compiled.program is not None
            log(
                f"  remat {policy}, {batch} images per device: {gib(needed)} of {gib(usable)}"
                f"{'' if fits else ', does not fit'}"
            )
            return search.Trial(needed, usable, fits, compiled)

        try:
            found.append(search.largest_batch(policy, compile_at, start, fixed))
        except CompilerError as error:
            found.append(search.Found(policy, 0, math.nan, described.chip.usable, math.nan, error=str(error)))
    log(search.table(found))
    return found
