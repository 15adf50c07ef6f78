"""TPU slices by name, as devices to compile for; needs only the compiler, libtpu, not a TPU."""

import dataclasses
import importlib.util
import os
import re
from typing import Any

from marjax.errors import UserError, missing_extra
from marjax.perf import chips
from marjax.quiet import LIBTPU

# Slices by accelerator type: "v5e-64" counts chips, "v4-32" TensorCores, two per chip.
_SHAPES_2D = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_SHAPES_3D = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"}
_SHAPES = {
    "v4": _SHAPES_3D,
    "v5p": _SHAPES_3D,
    "v5e": _SHAPES_2D,
    "v5litepod": _SHAPES_2D,
    "v6e": _SHAPES_2D,
    "tpu7x": _SHAPES_3D,
}
_HOSTS = {(1, 1), (2, 4)}  # shapes of v5e and v6e with one host; larger slices have hosts of 2 x 2 chips
_CORES = {"v4": 2, "v5p": 2, "tpu7x": 2}  # per chip, as accelerator types count them


@dataclasses.dataclass(frozen=True)
class Slice:
    """A described slice: its `name` in libtpu, chip, shape in chips, and JAX devices."""

    name: str
    chip: chips.Chip
    shape: tuple[int, ...]
    devices: tuple[Any, ...]

    def link_bandwidth(self, group: list[Any]) -> float:
        """Bytes/s that a device can send in a ring over a group of devices; one link's for an empty group.

        Each axis along which the group extends contributes two links, or one if it does not wrap around (the ring then
        returns the way it came). Axes wrap around in full rows of a v5e or v6e pod, and in slices of the other chips
        that consist of cubes of 4 x 4 x 4.
        """
        points = [tuple(device.coords) for device in group]
        cubes = len(self.shape) == 3 and all(size % 4 == 0 for size in self.shape)
        links = 0
        for axis, size in enumerate(self.shape):
            extent = len({point[axis] for point in points})
            if extent > 1:
                wraps = (cubes or (len(self.shape) == 2 and size >= 16)) and extent == size
                links += 2 if wraps else 1
        return max(links, 1) * self.chip.link_bandwidth / self.chip.devices


def prepare_environment() -> None:
    """Makes JAX start on the CPU. Call it before JAX starts, in a process that does nothing else."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"


def _prepare_compiler() -> None:
    """Keeps libtpu from looking for a TPU when it is loaded; without effect if a TPU is in use."""
    # Only one process may use a TPU through libtpu, but many may compile. LIBTPU has the settings that libtpu would
    # otherwise query from the machine, with warnings; they do not affect a described slice.
    for name, value in {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", **LIBTPU}.items():
        os.environ.setdefault(name, value)


def describe(name: str) -> Slice:
    """Describes the slice of a topology, "v5e:8x8", or of an accelerator type, "v5e-64" or "v4-32".

    Raises:
      UserError: libtpu is not installed, a chip that is not in `chips.CHIPS`, or a shape that libtpu refuses.
    """
    kind, shape = _parse(name)
    if importlib.util.find_spec("libtpu") is None:
        raise missing_extra("marjax compile, which runs the compiler libtpu without a TPU,", "tpu")
    _prepare_compiler()
    from jax.experimental import topologies

    # The two cores of a v4 chip are one device, as on a real slice.
    settings: dict[str, Any] = {"chip_config_name": "megacore"} if kind == "v4" else {}
    if len(shape) == 2 and shape in _HOSTS:
        settings["chips_per_host_bounds"] = (*shape, 1)
    text = f"{kind}:{'x'.join(map(str, shape))}"
    try:
        devices: Any = topologies.get_topology_desc(platform="tpu", topology_name=text, **settings).devices
    except Exception as error:  # its type is not public
        raise UserError(f"--topology {name}: libtpu refuses {text}: {str(error).splitlines()[0]}") from None
    chip = chips.of_kind(devices[0].device_kind)
    if chip is None:
        raise UserError(f"--topology {name}: unknown chip {devices[0].device_kind!r}; add it to marjax/perf/chips.py")
    return Slice(text, chip, shape, tuple(devices))


def _parse(name: str) -> tuple[str, tuple[int, ...]]:
    known = ", ".join(dict.fromkeys(chip.name for chip in chips.CHIPS if chip.source.startswith("http")))
    expected = f"give CHIP:SHAPE such as v5e:8x8 or v4:2x2x4, or a type such as v5e-64; chips: {known}"
    if found := re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)", name):
        kind, text = found.groups()
    elif found := re.fullmatch(r"([a-z0-9]+)-(\d+)", name):
        kind, count = found[1], int(found[2])
        shapes = _SHAPES.get(kind, {})
        text = shapes.get(count // _CORES.get(kind, 1), "")
        if kind in _SHAPES and not text:
            counts = ", ".join(str(number * _CORES.get(kind, 1)) for number in shapes)
            raise UserError(
                f"--topology {name}: sizes of {kind} are {counts}; use one, or a shape such as "
                f"{kind}:{next(iter(shapes.values()))}"
            )
    else:
        raise UserError(f"--topology {name!r} is invalid; {expected}")
    kind = "v5e" if kind == "v5litepod" else kind
    if kind not in _SHAPES:
        raise UserError(f"--topology {name}: no chip {kind!r}; {expected}")
    return kind, tuple(int(size) for size in text.split("x"))
