"""Roofline model: the best step time of a compiled program on a chip.

Instructions run in sequence, and each takes the longer of its matrix products and its HBM traffic. Copies started ahead
of their use overlap with all that, within the HBM bandwidth; so do asynchronous collectives, while synchronous ones
block. Not modelled: the vector unit, latencies, and everything outside the program.
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
    """Seconds per run, in total and by part.

    Attributes:
      seconds: best total.
      products: instructions bound by matrix products.
      memory: instructions bound by HBM traffic, and waiting for copies that exceed the HBM bandwidth.
      collectives: synchronous collectives, and waiting for asynchronous ones that take longer than everything else.
      overlapped: asynchronous collectives, which overlap with the rest.
      ahead: copies started ahead of their use, which overlap with the rest.
      mfu: model FLOP/s at `seconds` over the peak, an upper bound.
      compiler: the TPU compiler's estimate of all instructions but collectives, plus waiting for collectives; 0 if it
        gives none or the chip's clock is unknown. It models the vector unit and partial tiles, so it is more realistic.
      compiler_mfu: model FLOP/s at `compiler` over the peak.
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
        """The largest part: "matrix products", "HBM" or "interconnect"."""
        parts = {"matrix products": self.products, "HBM": self.memory, "interconnect": self.collectives}
        return max(parts, key=lambda name: parts[name])


def estimate(program: hlo.Program, model_flops: float, described: Slice, mesh: Mesh) -> Estimate:
    """Estimates one run of a program on a mesh; `model_flops` are per run on all devices."""
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
    blocking = overlapped = 0.0
    for collective in program.collectives:
        if collective.group == 1:
            continue
        # A permutation sends to one other device, over one link.
        ring = [] if collective.kind == "collective-permute" else group_of(mesh, collective.group)
        seconds = collective.total / described.link_bandwidth(ring)
        if collective.overlapped:
            overlapped += seconds
        else:
            blocking += seconds
    memory += max(0.0, traffic - products - memory - blocking)
    collectives = blocking + max(0.0, overlapped - products - memory)
    seconds = products + memory + collectives
    compiler = sum(each.cycles * each.times for each in program.operations) / chip.clock if chip.clock else 0.0
    if compiler:
        compiler += blocking + max(0.0, overlapped - compiler)
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
    """Returns a group of `size` devices along the fewest mesh axes with that product, or the first of the mesh.

    A program gives only the group size of a collective; the mesh axes are inferred from it.
    """
    axes = range(mesh.devices.ndim)
    for count in range(1, mesh.devices.ndim + 1):
        for chosen in itertools.combinations(axes, count):
            if math.prod(mesh.devices.shape[axis] for axis in chosen) == size:
                index = tuple(slice(None) if axis in chosen else 0 for axis in axes)
                return list(mesh.devices[index].flat)
    return list(mesh.devices.flat)[:size]
