"""What accelerators can do, one chip a line with where the numbers are from. Nothing here needs JAX."""

import dataclasses

_CLOUD = "https://docs.cloud.google.com/tpu/docs/"


@dataclasses.dataclass(frozen=True)
class Chip:
    """Attributes:
    name: as a topology names it, "v5e" of "v5e:8x8".
    kinds: how JAX's `device_kind` of its devices begins.
    flops: dense bfloat16 FLOP/s of a chip.
    hbm_bandwidth: bytes/s.
    link_bandwidth: bytes/s one way of one link to another chip.
    source: of these numbers.
    usable: bytes of HBM that a program may have on each device, by libtpu 0.0.52's out of memory message; 0: unknown.
    devices: JAX devices that share the chip.
    clock: cycles/s of its cores, of the compiler's estimates in cycles; 0 where the source does not imply it.
    """

    name: str
    kinds: tuple[str, ...]
    flops: float
    hbm_bandwidth: float
    link_bandwidth: float
    source: str
    usable: float = 0.0
    devices: int = 1
    clock: float = 0.0

    @property
    def device_flops(self) -> float:
        """Dense bfloat16 FLOP/s of one JAX device."""
        return self.flops / self.devices

    @property
    def device_hbm_bandwidth(self) -> float:
        """Bytes/s of one JAX device."""
        return self.hbm_bandwidth / self.devices


# Of TPUs the sources give the interconnect both ways and of all links together, so a link has one way half of it over
# the number of links: 4 of v5e and v6e, 6 of the others (v4: 50 GB/s, by Jouppi et al. 2023, arXiv 2304.01433, table
# 4). A clock is the peak over what the matrix units do in a cycle: 2 x 128 x 128 FLOPs each, 8 units a chip (v4, v5p)
# or 4 (v5e).
CHIPS = (
    Chip("v4", ("TPU v4",), 275e12, 1200e9, 50e9, _CLOUD + "v4", usable=30.75 * 2**30, clock=275e12 / (8 * 2 * 128**2)),
    Chip(
        "v5e",
        ("TPU v5 lite", "TPU v5e"),
        197e12,
        819e9,
        50e9,
        _CLOUD + "v5e",
        usable=15.75 * 2**30,
        clock=197e12 / (4 * 2 * 128**2),
    ),
    Chip(
        "v5p",
        ("TPU v5p", "TPU v5"),
        459e12,
        2765e9,
        100e9,
        _CLOUD + "v5p",
        usable=95.73 * 2**30,
        clock=459e12 / (8 * 2 * 128**2),
    ),
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 1638e9, 100e9, _CLOUD + "v6e", usable=31.24 * 2**30),
    Chip("tpu7x", ("TPU7x", "TPU v7x"), 2307e12, 7380e9, 100e9, _CLOUD + "tpu7x", usable=94.74 * 2**30, devices=2),
    Chip("a100", ("NVIDIA A100",), 312e12, 2039e9, 25e9, "NVIDIA A100 data sheet, SXM, 80 GB, dense"),
    Chip("h100", ("NVIDIA H100",), 989e12, 3350e9, 25e9, "NVIDIA H100 data sheet, SXM, dense"),
    Chip("h200", ("NVIDIA H200",), 989e12, 4800e9, 25e9, "NVIDIA H200 data sheet, SXM, dense"),
)


def of_kind(device_kind: str) -> Chip | None:
    """The chip of a device, by JAX's `device_kind`: the one whose name there is longest; None for others."""
    found = [(len(kind), chip) for chip in CHIPS for kind in chip.kinds if device_kind.startswith(kind)]
    return max(found, key=lambda item: item[0])[1] if found else None
