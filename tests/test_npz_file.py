"""NumPy files of others: what is read, and the one line for what is not, before memory is taken."""

import io
import os
import struct
import zipfile

import numpy as np
import pytest
from support.errors import ADVICE, failure

from marjax.errors import UserError
from marjax.npz_file import NUMBERS, PLAIN, NpzFile, read_npy, read_npz


def npy(array, **kwargs):
    data = io.BytesIO()
    np.lib.format.write_array(data, array, **kwargs)
    return data.getvalue()


def headed(header, data=b"", version=b"\1\0"):
    length = struct.pack("<H" if version[0] == 1 else "<L", len(header))
    return b"\x93NUMPY" + version + length + header.encode() + data


def write(path, members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6.0).reshape(2, 3),
        np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.arange(4, dtype=">i4"),
        np.array("text"),
        np.array(b"bytes"),
        np.zeros((0, 3)),
        np.array(True),
        np.float16(3),
    ],
    ids=repr,
)
def test_arrays_come_as_numpy_reads_them(tmp_path, array):
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", a=array, b=np.arange(3))
        for found in (
            read_npz(tmp_path / "x.npz", advice=ADVICE),
            read_npz(tmp_path / "x.npz", {"a": (PLAIN, None)}, advice=ADVICE),
        ):
            np.testing.assert_array_equal(found["a"], array)
            assert found["a"].dtype == array.dtype.newbyteorder("=") and found["a"].flags.c_contiguous
        assert sorted(read_npz(tmp_path / "x.npz", {"b": ("i", 1), "c?": ("i", 1)}, advice=ADVICE)) == ["b"]
    np.save(tmp_path / "x.npy", array)
    np.testing.assert_array_equal(read_npy(tmp_path / "x.npy", advice=ADVICE), array)


def test_a_number_in_fortran_order_is_a_number(tmp_path):
    header = "{'descr': '<i8', 'fortran_order': True, 'shape': ()}"
    write(tmp_path / "x.npz", [("a.npy", headed(header, bytes([7, 0, 0, 0, 0, 0, 0, 0])))])
    assert int(read_npz(tmp_path / "x.npz", {"a": ("i", 0)}, advice=ADVICE)["a"]) == 7


def test_an_array_can_be_read_in_parts(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", a=np.arange(10, dtype=np.uint8), other=np.zeros(3))
    with NpzFile(tmp_path / "x.npz", advice=ADVICE) as file:
        assert file.names == ("a", "other") and file.header("a").shape == (10,)
        with file.stream("a", ("u", 1)) as (data, header):
            assert data.read(4) == bytes(range(4)) and header.nbytes == 10
        with pytest.raises(UserError, match="has no b, only a, other"):
            file.read("b")


HEADERS = {
    "petabytes": "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000, 1000000000)}",
    "no bytes": "{'descr': '<f8', 'fortran_order': False, 'shape': (0, 99999999999999999999)}",
    "too short": "{'descr': '<f8', 'fortran_order': False, 'shape': (2,)}",
    "too long": "{'descr': '<f8', 'fortran_order': False, 'shape': ()}",
    "negative": "{'descr': '<f8', 'fortran_order': False, 'shape': (-1, -3)}",
    "pickled": "{'descr': '|O', 'fortran_order': False, 'shape': (3,)}",
    "structured": "{'descr': [('a', '<f8')], 'fortran_order': False, 'shape': (3,)}",
    "raw": "{'descr': '|V8', 'fortran_order': False, 'shape': (3,)}",
    "empty items": "{'descr': '|S0', 'fortran_order': False, 'shape': (3,)}",
    "dates": "{'descr': '<M8[s]', 'fortran_order': False, 'shape': (3,)}",
    "no dtype": "{'descr': 'nothing', 'fortran_order': False, 'shape': (3,)}",
    "subarray": "{'descr': ('<f8', (3,)), 'fortran_order': False, 'shape': (1,)}",
    "other keys": "{'descr': '<f8', 'shape': (3,)}",
    "a call": "__import__('os').abort()",
    "nested": "[" * 5000,
    "long": " " * 20_000,
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies_is_one_line(tmp_path, name):
    for version in (b"\1\0", b"\2\0", b"\3\0", b"\1\7", b"\4\0"):
        data = headed(HEADERS[name], bytes(24), version)
        for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            write(tmp_path / "x.npz", [("a.npy", data)], method)
            assert "x.npz: a " in failure(read_npz, tmp_path / "x.npz", {"a": (PLAIN, None)})
        (tmp_path / "x.npy").write_bytes(data)
        assert "x.npy" in failure(read_npy, tmp_path / "x.npy")


def test_a_header_of_gigabytes_is_not_read(tmp_path):
    write(tmp_path / "x.npz", [("a.npy", b"\x93NUMPY\2\0\xff\xff\xff\xff" + b" " * 100)])
    assert "4294967295" in failure(read_npz, tmp_path / "x.npz")


def test_zeros_that_fill_the_memory_are_refused_unread(tmp_path):
    size = 65 << 20
    with (
        zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("a.npy", "w") as file,
    ):
        file.write(headed(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({size},)}}"))
        for _ in range(65):
            file.write(bytes(1 << 20))
    assert (tmp_path / "x.npz").stat().st_size < 1 << 20
    assert "compressed" in failure(read_npz, tmp_path / "x.npz")
    assert read_npz(tmp_path / "x.npz", advice=ADVICE, max_ratio=1000)["a"].nbytes == size


def test_odd_members_are_one_line(tmp_path):
    array = npy(np.arange(3.0))
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        failure(read_npz, write(tmp_path / "x.npz", [("a.npy", array)], method))
    for members in (
        [("a.npy", b"")],
        [("a.npy", b"text, no array")],
        [("a.npy", npy(np.array([{}], object)))],
        [("a.npy", array[:-1])],
        [("a.npy", array + b"x")],
        [("x\n\x1b[2J.npy", b"")],
    ):
        failure(read_npz, write(tmp_path / "x.npz", members))
    with pytest.warns(UserWarning, match="Duplicate"):
        write(tmp_path / "x.npz", [("a.npy", array), ("a.npy", array)])
    failure(read_npz, tmp_path / "x.npz")
    whole = bytearray(write(tmp_path / "x.npz", [("a.npy", array)]).read_bytes())
    whole[whole.rindex(b"PK\1\2") + 8] |= 1
    (tmp_path / "x.npz").write_bytes(whole)
    assert "encrypted" in failure(read_npz, tmp_path / "x.npz")
    write(tmp_path / "x.npz", [("a.npy", array)])
    damaged = bytearray((tmp_path / "x.npz").read_bytes())
    damaged[damaged.index(array) + len(array) - 1] ^= 1
    (tmp_path / "x.npz").write_bytes(damaged)
    assert "a cannot be read" in failure(read_npz, tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", a=np.array(["ab"]))
    data = (tmp_path / "x.npz").read_bytes()
    write(tmp_path / "x.npz", [("a.npy", npy(np.array(["ab"]))[:-4] + b"\xff\xff\xff\xff")])
    assert data and "text" in failure(read_npz, tmp_path / "x.npz")


def test_what_was_expected_is_named(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.zeros((2, 3)))
    for kind, named in ((("iu", 2), "integers"), (("f", 1), "1 axes")):
        assert named in failure(read_npz, tmp_path / "x.npz", {"a": kind})
    assert "has no b" in failure(read_npz, tmp_path / "x.npz", {"b": (NUMBERS, 1)})


def test_what_is_no_npz_file_is_one_line(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "text").write_text("text")
    (tmp_path / "empty").write_text("")
    np.save(tmp_path / "one.npy", np.zeros(3))
    whole = write(tmp_path / "whole", [("a.npy", npy(np.arange(3.0)))]).read_bytes()
    (tmp_path / "cut").write_bytes(whole[:-30])
    end = bytearray(whole)
    end[-10:-6] = struct.pack("<L", 5 << 20)
    (tmp_path / "directory").write_bytes(end)
    for name in ("none", "pipe", "", "text", "empty", "one.npy", "cut", "directory", "a\0b"):
        failure(read_npz, f"{tmp_path}/{name}")
