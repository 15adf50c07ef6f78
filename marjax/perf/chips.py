"""Peak rates of accelerator chips, with their sources. Needs no JAX."""

import dataclasses

_CLOUD = "https://docs.cloud.google.com/tpu/docs/"


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates of a chip.

    Attributes:
      name: name in a topology, "v5e" in "v5e:8x8".
      kinds: prefixes of JAX's `device_kind`.
      flops: dense bfloat16 FLOP/s per chip.
      hbm_bandwidth: bytes/s per chip.
      link_bandwidth: bytes/s of one link to another chip, in one direction.
      source: source of these numbers.
      usable: bytes of HBM per device for programs, from the out-of-memory message of libtpu 0.0.52; 0 if unknown.
      devices: JAX devices per chip.
      clock: cycles/s, for the compiler's estimates in cycles; 0 if the source does not imply it.
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


# For TPUs the sources give the bidirectional bandwidth of all links together, so one direction of a link has half of
# it over the number of links: 4 for v5e and v6e, 6 for the others (v4: 50 GB/s, by Jouppi et al. 2023, arXiv
# 2304.01433, table 4). A clock is the peak over the FLOPs per cycle of the matrix units: 2 x 128 x 128 per unit, with 8
# units per chip (v4, v5p) or 4 (v5e).
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
    """Returns the chip with the longest prefix of JAX's `device_kind`; None if the chip is unknown."""
    found = [(len(kind), chip) for chip in CHIPS for kind in chip.kinds if device_kind.startswith(kind)]
    return max(found, key=lambda item: item[0])[1] if found else None
