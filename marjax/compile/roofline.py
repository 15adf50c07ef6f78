"""How long a compiled program takes at best, from what it does and what the chip can do.

An instruction that multiplies matrices and moves memory does both at once, so it takes the longer of the two; one
instruction follows the other. Copies that start ahead of their use run beside all that, as far as HBM has time for
them; so do collectives that the compiler made asynchronous, the others stop it.
Left out: work of the vector unit, which is not a matrix product, latencies, and everything outside the program.
"""

import dataclasses
import itertools
import math
from typing import Any

from jax.sharding import Mesh

from marjax.compile import hlo
from marjax.compile.topology import Slice


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of one run, and what they consist of.

    Attributes:
      seconds: at best.
      products: in instructions that matrix products bound.
      memory: in instructions that HBM traffic bounds, or waiting for copies that HBM has no time for beside the rest.
      collectives: stopping for collectives, or waiting for asynchronous ones that take longer than all else.
      overlapped: asynchronous collectives, beside the rest.
      ahead: copies that start ahead of their use, beside the rest.
      mfu: model FLOP/s at that speed over the peak: a ceiling.
      compiler: the TPU compiler's own estimate of all instructions but collectives, plus those that stop it or take
        longer; 0 where it gives none or the chip's clock is not known. It knows the vector unit and how tiles fill, so
        it is the likelier.
      compiler_mfu: model FLOP/s at that speed over the peak.
    """

    seconds: float
    products: float
    memory: float
    collectives: float
    overlapped: float
    ahead: float
    mfu: float
    compiler: float
    compiler_mfu: float

    @property
    def bound(self) -> str:
        """What takes most of the time: "matrix products", "HBM" or "interconnect"."""
        parts = {"matrix products": self.products, "HBM": self.memory, "interconnect": self.collectives}
        return max(parts, key=lambda name: parts[name])


def estimate(program: hlo.Program, model_flops: float, described: Slice, mesh: Mesh) -> Estimate:
    """The estimate of one run of a program of that mesh; `model_flops` of one run on all devices."""
    chip = described.chip
    products = memory = ahead = traffic = 0.0
    for each in program.operations:
        busy, moving = each.passes / chip.device_flops, each.bytes / chip.device_hbm_bandwidth
        traffic += moving * each.times
        if each.overlapped:
            ahead += moving * each.times
        elif busy >= moving:
            products += busy * each.times
        else:
            memory += moving * each.times
    stopping = overlapped = 0.0
    for collective in program.collectives:
        if collective.group == 1:
            continue
        # What is passed on to one other device goes over one link.
        ring = [] if collective.kind == "collective-permute" else group_of(mesh, collective.group)
        seconds = collective.total / described.link_bandwidth(ring)
        if collective.overlapped:
            overlapped += seconds
        else:
            stopping += seconds
    memory += max(0.0, traffic - products - memory - stopping)
    collectives = stopping + max(0.0, overlapped - products - memory)
    seconds = products + memory + collectives
    compiler = sum(each.cycles * each.times for each in program.operations) / chip.clock if chip.clock else 0.0
    if compiler:
        compiler += stopping + max(0.0, overlapped - compiler)
    peak = chip.device_flops * mesh.size
    return Estimate(
        seconds,
        products,
        memory,
        collectives,
        overlapped,
        ahead,
        model_flops / seconds / peak,
        compiler,
        model_flops / compiler / peak if compiler else 0.0,
    )


def group_of(mesh: Mesh, size: int) -> list[Any]:
    """The first so many devices along the fewest mesh axes whose sizes multiply to it, or of the mesh if none do.

    A program's text names the size of a collective's groups, and the axes of a mesh it may run along follow from it.
    """
    axes = range(mesh.devices.ndim)
    for count in range(1, mesh.devices.ndim + 1):
        for chosen in itertools.combinations(axes, count):
            if math.prod(mesh.devices.shape[axis] for axis in chosen) == size:
                index = tuple(slice(None) if axis in chosen else 0 for axis in axes)
                return list(mesh.devices[index].flat)
    return list(mesh.devices.flat)[:size]
