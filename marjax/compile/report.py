"""Reports of `marjax compile`, as text and JSON, with advice for programs that do not fit."""

import dataclasses
from typing import Any

import ml_collections
from jax.sharding import Mesh

from marjax.compile.programs import Compiled
from marjax.compile.roofline import estimate
from marjax.compile.topology import Slice
from marjax.host_memory import gib

TITLES = {"train": "train step", "sample": "sampler", "encode": "tokenizer, encoding", "decode": "tokenizer, decoding"}


def record(compiled: Compiled, config: ml_collections.ConfigDict, described: Slice, mesh: Mesh) -> dict[str, Any]:
    """Returns the JSON record of a program; bytes and FLOPs are per device unless named otherwise."""
    lowered, memory = compiled.lowered, compiled.memory
    found: dict[str, Any] = {
        "program": lowered.name,
        "images": lowered.images,
        "fits": compiled.program is not None,
        "hbm_bytes": {
            "needed": memory.peak,
            "usable": compiled.usable,
            "arguments": memory.arguments,
            "temporaries": memory.temporaries,
            "code": memory.code,
            "state": lowered.state_bytes,
        },
        "compile_seconds": compiled.seconds,
        "model_flops_all_devices": lowered.model_flops,
    }
    if compiled.program is None:
        return found | {"advice": advice(compiled, config, mesh)}
    program, expected = compiled.program, estimate(compiled.program, lowered.model_flops, described, mesh)
    found |= {
        "flops": program.flops,
        "flops_by_dtype": program.flops_by_dtype(),
        "hbm_traffic_bytes": program.bytes,
        "collective_bytes": program.collective_bytes(),
        "roofline": {**dataclasses.asdict(expected), "bound": expected.bound},
        "loops_not_read": list(program.unread),
    }
    if lowered.name == "train":
        seconds = expected.compiler or expected.seconds
        found |= {
            "steps": config.train.steps,
            "days": config.train.steps * seconds / 86400,
            "days_at_best": config.train.steps * expected.seconds / 86400,
        }
    return found


def text(compiled: Compiled, config: ml_collections.ConfigDict, described: Slice, mesh: Mesh) -> str:
    """Returns the report of a program for people, about ten lines."""
    lowered, memory, usable = compiled.lowered, compiled.memory, compiled.usable
    where = f"{lowered.images} images, {lowered.images / mesh.size:g} per device"
    lines = [f"{TITLES[lowered.name]} ({where})"]
    if compiled.program is None:
        return "\n".join(
            [
                *lines,
                f"  does not fit: needs {gib(memory.peak)} per device, {gib(memory.peak - usable)} more than the "
                f"{gib(usable)} usable; {gib(lowered.state_bytes)} of it is state",
                *(f"  try: {each}" for each in advice(compiled, config, mesh)),
            ]
        )
    program = compiled.program
    expected = estimate(program, lowered.model_flops, described, mesh)
    room = f", {gib(usable - memory.peak)} of {gib(usable)} free" if usable else ""
    lines.append(
        f"  fits: needs {gib(memory.peak)} per device{room}; arguments {gib(memory.arguments)}, temporaries "
        f"{gib(memory.temporaries)}, code {gib(memory.code)}"
    )
    by_dtype = ", ".join(f"{dtype} {flops / program.flops:.1%}" for dtype, flops in program.flops_by_dtype().items())
    lines.append(
        f"  FLOPs: model {lowered.model_flops / mesh.size:.3e} per device, executed {program.flops:.3e} ({by_dtype})"
    )
    moved = ", ".join(f"{kind} {size / 1e6:,.1f} MB" for kind, size in program.collective_bytes().items())
    lines.append(f"  sent per device in collectives: {moved or 'nothing'}")
    lines.append(
        f"  at best {duration(expected.seconds)}: {duration(expected.products)} of matrix products, "
        f"{duration(expected.memory)} of HBM traffic (plus {duration(expected.ahead)} overlapped), "
        f"{duration(expected.collectives)} waiting for collectives (plus {duration(expected.overlapped)} overlapped); "
        f"bound by {expected.bound}; MFU at most {expected.mfu:.1%}"
    )
    if expected.compiler:
        lines.append(
            f"  by the compiler's cycle estimate {duration(expected.compiler)}, MFU {expected.compiler_mfu:.1%}"
        )
    if program.unread:
        lines.append(f"  loops with an unknown number of iterations, counted once: {', '.join(program.unread)}")
    if lowered.name == "train":
        seconds = expected.compiler or expected.seconds
        lines.append(
            f"  {config.train.steps:,} steps: {config.train.steps * seconds / 86400:.1f} days, at best "
            f"{config.train.steps * expected.seconds / 86400:.1f}"
        )
    lines.append(f"  compiled in {compiled.seconds:.0f} s")
    return "\n".join(lines)


def advice(compiled: Compiled, config: ml_collections.ConfigDict, mesh: Mesh) -> list[str]:
    """Returns settings that reduce the memory of a program, cheapest first."""
    lowered = compiled.lowered
    if lowered.name == "sample":
        return ["a smaller --config.sample.batch_size, or --config.sample.max_stages=1"]
    if lowered.name != "train":  # with 32 images per device
        return ["--config.tokenizer.autoencoder.dtype=bfloat16, or chips with more memory"]
    tips = []
    if lowered.state_bytes > compiled.usable / 2 and (fsdp := fsdp_for(config, mesh)) > mesh.shape["fsdp"]:
        tips.append(f"shard the state over more devices: --config.mesh.fsdp={fsdp}")
    if config.model.remat == "none":
        tips.append("recompute activations: --config.model.remat=dots, or full")
    elif config.model.remat == "dots":
        tips.append("recompute more: --config.model.remat=full")
    if config.model.denoiser.remat != "full":
        tips.append("recompute the denoiser: --config.model.denoiser.remat=full")
    share = config.train.batch_size // mesh.shape["data"] // mesh.shape["fsdp"] // config.train.accumulate
    if share % 2 == 0:
        tips.append(f"more accumulation steps: --config.train.accumulate={2 * config.train.accumulate}")
    return tips or [f"a larger slice, or a smaller --config.train.batch_size than {config.train.batch_size}"]


def fsdp_for(config: ml_collections.ConfigDict, mesh: Mesh) -> int:
    """Returns the largest fsdp axis that leaves each device a multiple of 16 rows of every weight.

    A bfloat16 tile has 16 rows; of partial tiles, TPUs gather by an all-reduce of the entire weight, which sends twice
    as much. The tensor axis is kept, and so is `config.mesh.data` if it is a number.
    """
    devices = mesh.size // mesh.shape["tensor"] // max(1, config.mesh.data)
    sizes = [size for size in range(1, devices + 1) if devices % size == 0]
    widths = (config.model.width, config.model.denoiser.width)
    return max(size for size in sizes if all(width % (16 * size) == 0 for width in widths) or size == 1)


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"
