"""The table of chips: lookup by device kind, and consistency."""

import pytest

from marjax.perf import chips, peak


@pytest.mark.parametrize(
    "kind, name",
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
    ],
)
def test_a_device_kind_names_its_chip(kind, name):
    assert chips.of_kind(kind).name == name


@pytest.mark.parametrize("kind", ["cpu", "TPU v2", "NVIDIA T4"])
def test_other_devices_are_unknown(kind):
    assert chips.of_kind(kind) is None


def test_numbers_are_consistent():
    assert len({chip.name for chip in chips.CHIPS}) == len(chips.CHIPS)
    for chip in chips.CHIPS:
        # Arithmetic is faster than memory, and memory than the links.
        assert chip.flops > 100 * chip.hbm_bandwidth > 500 * chip.link_bandwidth, chip.name
        assert chip.source
    # GiB per chip, most of which programs may use; for v5p 96, which Google's page rounds down to 95.
    memory = {"v4": 32, "v5e": 16, "v5p": 96, "v6e": 32, "tpu7x": 192}
    for chip in chips.CHIPS:
        most = memory.get(chip.name, 0)
        assert 0.96 * most <= chip.usable * chip.devices / 2**30 <= most, chip.name
    # Clocks from other sources, in GHz.
    assert {chip.name: round(chip.clock / 1e9, 2) for chip in chips.CHIPS if chip.clock} == {
        "v4": 1.05,
        "v5e": 1.5,
        "v5p": 1.75,
    }
    assert chips.of_kind("TPU7x").device_flops == pytest.approx(2307e12 / 2)


class Device:
    device_kind, platform = "TPU v5 lite", "tpu"


def test_the_peak_of_a_known_chip_is_from_the_table(monkeypatch):
    peak.device_peak.cache_clear()
    monkeypatch.setattr(peak.jax, "devices", lambda: [Device()])
    try:
        assert peak.device_peak("bfloat16") == 197e12
    finally:
        peak.device_peak.cache_clear()
