"""`marjax compile` as functions: a config and a slice in, records and text out."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections

from marjax import config as config_lib
from marjax import sharding
from marjax.compile import report, search
from marjax.compile.programs import NAMES, Compiled, compile_program, lowered_programs
from marjax.compile.topology import Slice, describe
from marjax.files import write_bytes


def compile_for(config: ml_collections.ConfigDict, topology: str, *, names: Sequence[str] = NAMES, cached: bool = False,
                hlo_dir: str = "", say: Callable[[str], None] = print) -> dict[str, Any]:
    """Compiles a config's programs for a slice that need not be there.

    Args:
      config: as a config file returns it, or resolved.
      topology: such as "v5e:8x8" or "v5e-64".
      names: of programs, among `programs.NAMES`.
      cached: batches of the train step are of a latent cache.
      hlo_dir: a folder for the programs' HLO texts; "" writes none.
      say: takes the report for people, a program at a time.

    Returns:
      What JSON has of it: the slice, the mesh and a record for every program.

    Raises:
      UserError: no libtpu, no such slice, or a config that cannot run on it.
    """
    config, described, mesh = _prepare(config, topology)
    say(f"{described.name}: {mesh.size} devices {described.devices[0].device_kind!r}, mesh {dict(mesh.shape)}")
    records = []
    for lowered in lowered_programs(config, mesh, names, cached):
        compiled = compile_program(lowered, mesh, described.chip.usable, keep_text=bool(hlo_dir))
        records.append(report.record(compiled, config, described, mesh))
        say(report.text(compiled, config, described, mesh))
        if compiled.text:
            os.makedirs(hlo_dir, exist_ok=True)
            write_bytes(os.path.join(hlo_dir, f"{lowered.name}.txt"), compiled.text.encode())
    return {"topology": described.name, "chip": described.chip.name, "devices": mesh.size, "mesh": dict(mesh.shape),
            "remat": config.model.remat, "denoiser_remat": config.model.denoiser.remat,
            "accumulate": config.train.accumulate, "programs": records}


def search_batch(config: ml_collections.ConfigDict, topology: str, *, cached: bool = False,
                 policies: Sequence[str] = search.POLICIES, say: Callable[[str], None] = print) -> list[search.Found]:
    """The largest batch a device of the train step that fits on a slice, for each remat policy.

    Takes two or three compiles a policy. Raises UserError as `compile_for` does.
    """
    base = config
    config, described, mesh = _prepare(config, topology)
    say(f"{described.name}: {mesh.size} devices {described.devices[0].device_kind!r}, mesh {dict(mesh.shape)}")
    shards, found = sharding.batch_shards(mesh), []
    start = config.train.batch_size // shards
    fixed = lowered_programs(config, mesh, ("train",), cached)[0].state_bytes
    for policy in policies:

        def compile_at(batch: int, policy: str = policy) -> search.Trial:
            compiled = _compile_step(base, {"model.remat": policy, "model.denoiser.remat": policy,
                                            "train.batch_size": batch * shards, "train.accumulate": 1}, mesh, described,
                                     cached)
            needed, usable = compiled.memory.peak, compiled.usable
            say(f"  remat {policy}, {batch} images a device: {report.gib(needed)} of {report.gib(usable)}")
            return search.Trial(needed, usable if compiled.program is not None else min(usable, needed - 1), compiled)

        found.append(search.largest_batch(policy, compile_at, start, fixed))
    say(search.table(found))
    return found


def _compile_step(config: ml_collections.ConfigDict, overrides: Mapping[str, Any], mesh: Any, described: Slice,
                  cached: bool) -> Compiled:
    config = config_lib.resolve(config_lib.apply_overrides(config, overrides))
    lowered = lowered_programs(config, mesh, ("train",), cached)[0]
    return compile_program(lowered, mesh, described.chip.usable)


def _prepare(config: ml_collections.ConfigDict, topology: str) -> tuple[ml_collections.ConfigDict, Slice, Any]:
    config = config_lib.resolve(config)
    described = describe(topology)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices=described.devices)
    return config, described, mesh
