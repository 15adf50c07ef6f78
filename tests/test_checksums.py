"""Content checksums: every bit counts, every place counts, nothing else does."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marjax.checkpoints.checksums import checksum, paths

DTYPES = ["float32", "bfloat16", "float16", "int32", "uint32", "int16", "int8", "uint8"]


def bits(x):
    """A numpy view of an array's bit patterns."""
    x = np.array(x)
    return x.view(f"uint{8 * x.dtype.itemsize}")


def changed(x, index, bit):
    out = np.array(x)
    bits(out)  # Raises for a dtype without bit patterns.
    view = out.view(f"uint{8 * out.dtype.itemsize}")
    view[index] ^= view.dtype.type(1 << bit)
    return jnp.asarray(out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_changed_bit_changes_it(dtype):
    x = jnp.asarray(np.random.default_rng(0).integers(0, 100, (3, 5)), dtype)
    width = 8 * x.dtype.itemsize
    others = [changed(x, (i, j), bit) for i, j in ((0, 0), (1, 3), (2, 4)) for bit in range(width)]
    for other in others:
        assert np.sum(bits(other) != bits(x)) == 1
    sums = checksum({"x": x, "others": others})
    assert len(set(sums.values())) == len(sums) == 3 * width + 1


def test_bool_scalar_and_empty():
    sums = checksum(
        {
            "false": jnp.array(False),
            "true": jnp.array(True),
            "flags": jnp.array([True, False]),
            "swapped": jnp.array([False, True]),
            "zero": jnp.float32(0.0),
            "minus": jnp.float32(-0.0),
            "empty": jnp.zeros((0, 3)),
        }
    )
    assert all(len(value) == 16 and int(value, 16) >= 0 for value in sums.values())
    assert sums["false"] != sums["true"]
    assert sums["flags"] != sums["swapped"]
    assert sums["zero"] != sums["minus"]
    assert sums["empty"] == "0" * 16


@pytest.mark.parametrize("a, b", [(1.0, 2.0), (1.5, -1.5), (0.0, -0.0), (0.0, 1e-45)])
def test_swapping_two_elements_changes_it(a, b):
    # x and -x differ in the top bit only, which a sum of products modulo 2**32 would lose.
    x = np.arange(100, 124, dtype=np.float32).reshape(4, 6)
    x[0, 1], x[3, 2] = a, b
    y = x.copy()
    y[0, 1], y[3, 2] = b, a
    assert x.tobytes() != y.tobytes()
    assert checksum({"x": jnp.asarray(x)}) != checksum({"x": jnp.asarray(y)})


def test_both_words_are_independent():
    rows = jnp.asarray(np.random.default_rng(0).standard_normal((64, 3)), jnp.float32)
    sums = list(checksum([rows[i] for i in range(64)]).values())
    assert len({s[:8] for s in sums}) == len({s[8:] for s in sums}) == 64
    assert all(s[:8] != s[8:] for s in sums)


def test_wide_and_complex_numbers():
    assert checksum([jnp.asarray([1 + 2j])]) != checksum([jnp.asarray([2 + 1j])])
    with jax.enable_x64(True):
        x = jnp.asarray([1, 1 << 40, 3], jnp.int64)
        assert x.dtype == jnp.int64
        others = [changed(x, 1, bit) for bit in range(64)]
        assert len(set(checksum([x, *others]).values())) == 65


def test_one_value_for_numpy_and_jax_and_any_layout_of_the_tree():
    x = np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32)
    assert checksum({"x": x})["x"] == checksum([0, jnp.asarray(x)])["1"]


def test_names():
    State = collections.namedtuple("State", "count mu")
    tree = {"opt": (State(jnp.int32(1), {"w": jnp.zeros(2)}), None), "b": [jnp.ones(1)]}
    assert list(checksum(tree)) == list(paths(tree)) == ["b/0", "opt/0/count", "opt/0/mu/w"]
    assert checksum({}) == {}
    with pytest.raises(ValueError, match="slash"):
        checksum({"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}})


def test_golden():
    # Checkpoints on disk hold these values. If this moves, either the change was not meant, or FORMAT in manager.py
    # goes up and old checkpoints need a way in.
    x = jnp.arange(12, dtype=jnp.float32).reshape(3, 4)
    assert checksum({"x": x, "h": x.astype(jnp.bfloat16), "n": jnp.int32(7)}) == {
        "x": "a4e4c5e2530c8b53",
        "h": "83e0f65483390ba1",
        "n": "2703de93c05e44c0",
    }
