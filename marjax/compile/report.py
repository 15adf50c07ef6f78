"""What `marjax compile` finds, for people and for scripts, and what to change where memory does not suffice."""

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
    """All there is to say of one program, as JSON has it; bytes are of one device, FLOPs of one unless said."""
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
    """The same for people, some ten lines."""
    lowered, memory, usable = compiled.lowered, compiled.memory, compiled.usable
    where = f"{lowered.images} images, {lowered.images / mesh.size:g} a device"
    lines = [f"{TITLES[lowered.name]} ({where})"]
    if compiled.program is None:
        return "\n".join(
            [
                *lines,
                f"  does not fit: needs {gib(memory.peak)} a device, {gib(memory.peak - usable)} "
                f"more than the {gib(usable)} there are; {gib(lowered.state_bytes)} of it is state",
                *(f"  try: {each}" for each in advice(compiled, config, mesh)),
            ]
        )
    program = compiled.program
    expected = estimate(program, lowered.model_flops, described, mesh)
    room = f", {gib(usable - memory.peak)} to spare of {gib(usable)}" if usable else ""
    lines.append(
        f"  fits: needs {gib(memory.peak)} a device{room}; arguments {gib(memory.arguments)}, temporaries "
        f"{gib(memory.temporaries)}, code {gib(memory.code)}"
    )
    by_dtype = ", ".join(f"{dtype} {flops / program.flops:.1%}" for dtype, flops in program.flops_by_dtype().items())
    lines.append(
        f"  FLOPs: model {lowered.model_flops / mesh.size:.3e} a device, executed {program.flops:.3e} ({by_dtype})"
    )
    moved = ", ".join(f"{kind} {size / 1e6:,.1f} MB" for kind, size in program.collective_bytes().items())
    lines.append(f"  sent by a device in collectives: {moved or 'nothing'}")
    lines.append(
        f"  at best {time_of(expected.seconds)}: {time_of(expected.products)} of matrix products, "
        f"{time_of(expected.memory)} of HBM traffic ({time_of(expected.ahead)} beside), "
        f"{time_of(expected.collectives)} waiting for collectives ({time_of(expected.overlapped)} beside); "
        f"bound by {expected.bound}; MFU at most {expected.mfu:.1%}"
    )
    if expected.compiler:
        lines.append(
            f"  by the compiler's own count of cycles {time_of(expected.compiler)}, MFU {expected.compiler_mfu:.1%}"
        )
    if program.unread:
        lines.append(f"  counted once, since how often they run is not to be read: loops {', '.join(program.unread)}")
    if lowered.name == "train":
        seconds = expected.compiler or expected.seconds
        lines.append(
            f"  {config.train.steps:,} steps: {config.train.steps * seconds / 86400:.1f} days, at best "
            f"{config.train.steps * expected.seconds / 86400:.1f}"
        )
    lines.append(f"  compiled in {compiled.seconds:.0f} s")
    return "\n".join(lines)


def advice(compiled: Compiled, config: ml_collections.ConfigDict, mesh: Mesh) -> list[str]:
    """What to set for a program that does not fit, the cheapest first."""
    lowered = compiled.lowered
    if lowered.name == "sample":
        return ["a smaller --config.sample.batch_size, or --config.sample.max_stages=1"]
    if lowered.name != "train":  # of 32 images a device
        return ["--config.tokenizer.autoencoder.dtype=bfloat16, or chips with more memory"]
    tips = []
    if lowered.state_bytes > compiled.usable / 2 and (fsdp := fsdp_for(config, mesh)) > mesh.shape["fsdp"]:
        tips.append(f"cut the state over more devices: --config.mesh.fsdp={fsdp}")
    if config.model.remat == "none":
        tips.append("recompute activations: --config.model.remat=dots, or full")
    elif config.model.remat == "dots":
        tips.append("recompute more: --config.model.remat=full")
    if config.model.denoiser.remat != "full":
        tips.append("recompute the denoiser: --config.model.denoiser.remat=full")
    share = config.train.batch_size // mesh.shape["data"] // mesh.shape["fsdp"] // config.train.accumulate
    if share % 2 == 0:
        tips.append(f"the same batch in more parts: --config.train.accumulate={2 * config.train.accumulate}")
    return tips or [f"a larger slice, or a smaller --config.train.batch_size than {config.train.batch_size}"]


def fsdp_for(config: ml_collections.ConfigDict, mesh: Mesh) -> int:
    """The most devices to cut the state over so that each keeps 16 rows, or a multiple, of every weight.

    With fewer TPUs gather by an all-reduce of the whole, which sends twice as much: a bfloat16 tile has 16 rows. The
    tensor group stays as it is, and so does `config.mesh.data` where it is a number.
    """
    devices = mesh.size // mesh.shape["tensor"] // max(1, config.mesh.data)
    sizes = [size for size in range(1, devices + 1) if devices % size == 0]
    widths = (config.model.width, config.model.denoiser.width)
    return max(size for size in sizes if all(width % (16 * size) == 0 for width in widths) or size == 1)


def time_of(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"
