"""`marjax compile` as functions: a config and a slice in, records and text out."""

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
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Compiles a config's programs for a slice that need not be there, each in a process of its own.

    Args:
      config: as a config file returns it, or resolved.
      topology: such as "v5e:8x8" or "v5e-64".
      names: of programs, among `programs.NAMES`.
      cached: batches of the train step are of a latent cache.
      hlo_dir: a folder for the programs' HLO texts; "" writes none.
      say: takes the report for people, a program at a time.

    Returns:
      What JSON has of it: the slice, the mesh and a record for every program; where the compiler gave up or crashed,
      that has only the program's name and an "error".

    Raises:
      UserError: no libtpu, no such slice, or a config that cannot run on it.
    """
    config, described, mesh = prepare(config, topology)
    say(f"{described.name}: {mesh.size} devices {described.devices[0].device_kind!r}, mesh {dict(mesh.shape)}")
    records = []
    for lowered in lowered_programs(config, mesh, names, cached):
        try:
            compiled = compile_program(lowered, config, topology, cached=cached, keep_text=bool(hlo_dir))
        except CompilerError as error:  # the others may compile nevertheless
            records.append({"program": lowered.name, "error": str(error)})
            say(f"{report.TITLES[lowered.name]}\n  {error}")
            continue
        records.append(report.record(compiled, config, described, mesh))
        say(report.text(compiled, config, described, mesh))
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
    say: Callable[[str], None] = print,
) -> list[search.Found]:
    """The largest batch a device of the train step that fits on a slice, for each remat policy.

    Batches are not accumulated, and steps are as many as the config's own batch makes them: neither changes what a step
    needs. Where the compiler gives up, a policy has an `error`, and the search goes on with the next.

    Raises:
      UserError: no libtpu, no such slice, or a config that cannot run on it.
    """
    resolved, described, mesh = prepare(config, topology)
    say(f"{described.name}: {mesh.size} devices {described.devices[0].device_kind!r}, mesh {dict(mesh.shape)}")
    shards, found = sharding.batch_shards(mesh), []
    start = max(1, resolved.train.batch_size // shards)

    def lower(batch: int, overrides: Mapping[str, Any]) -> tuple[Lowered, ml_collections.ConfigDict]:
        """The train step of so many images a device, and its config."""
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
            say(
                f"  remat {policy}, {batch} images a device: {gib(needed)} of {gib(usable)}"
                f"{'' if fits else ', does not fit'}"
            )
            return search.Trial(needed, usable, fits, compiled)

        try:
            found.append(search.largest_batch(policy, compile_at, start, fixed))
        except CompilerError as error:
            found.append(search.Found(policy, 0, math.nan, described.chip.usable, math.nan, error=str(error)))
    say(search.table(found))
    return found
