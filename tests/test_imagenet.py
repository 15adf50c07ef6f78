"""Tars that are not as they are downloaded: one line for each, at once."""

import io
import tarfile

import pytest

from marjax.data.prepare.imagenet import list_imagenet
from marjax.errors import UserError

VAL = "ILSVRC2012_val_00000001.JPEG"


def header(name, size=0, kind=tarfile.REGTYPE, data=b""):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


def with_size(block, field):
    """The same header with another size field, and the checksum that belongs to it."""
    made = bytearray(block)
    made[124:136] = field
    made[148:156] = b" " * 8
    made[148:156] = b"%06o\0 " % sum(made)
    return bytes(made)


NEGATIVE = b"\xff" * 8 + (-512 & 0xFFFFFFFF).to_bytes(4, "big")
CASES = {
    "a negative size": with_size(header(VAL), NEGATIVE),
    "a negative size that leads back": header(VAL, 3, data=b"abc") + with_size(header(VAL), b"\xff" * 10 + b"\xfc\x00"),
    "petabytes": with_size(header(VAL), b"\x80" + b"\0" * 3 + b"\x7f" * 8),
    "no number": with_size(header(VAL), b"zzzzzzzzzzz\0"),
    "a huge pax header": header("x", 1 << 20, tarfile.XHDTYPE, bytes(1 << 20)) + header(VAL),
    "a huge long name": header("x", 1 << 20, tarfile.GNUTYPE_LONGNAME, b"a" * (1 << 20)) + header(VAL),
    "thousands of headers": header("x", 12, tarfile.XHDTYPE, b"12 a=bcdefg\n") * 5000 + header(VAL),
    "thousands of long names": header("x", 3, tarfile.GNUTYPE_LONGNAME, b"abc") * 5000 + header(VAL),
    "a pax size": header("x", 19, tarfile.XHDTYPE, b"19 size=1000000000\n") + header(VAL),
    "a pax path": header("x", 12, tarfile.XHDTYPE, b"12 path=abc\n") + header(VAL),
    "a sparse member": header(VAL, 0, tarfile.GNUTYPE_SPARSE),
    "a link": header(VAL, 0, tarfile.SYMTYPE),
    "a hard link": header(VAL, 0, tarfile.LNKTYPE),
    "a device": header(VAL, 0, tarfile.CHRTYPE),
    "a pipe": header(VAL, 0, tarfile.FIFOTYPE),
    "cut short": header(VAL, 5000, data=b"abc"),
    "a wrong checksum": b"x" + header(VAL)[1:],
}


@pytest.mark.parametrize("case", CASES)
def test_odd_members_are_refused(tmp_path, case):
    for data in (CASES[case], header("n01440764.tar", len(CASES[case]), data=CASES[case])):
        (tmp_path / "x.tar").write_bytes(data + bytes(1024))
        with pytest.raises(UserError, match="x.tar cannot be read as an uncompressed tar") as caught:
            list_imagenet([str(tmp_path / "x.tar")])
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_that_were_packed_again_are_read(tmp_path, form):
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w", format=form) as archive:
        folder = tarfile.TarInfo("./n01440764/")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for i in range(3):
            info = tarfile.TarInfo(f"./n01440764/n01440764_{i}.JPEG")
            info.size, info.mtime = 700 + i, 1.5  # a PAX header of its own
            archive.addfile(info, io.BytesIO(bytes([i]) * info.size))
    deep = "/".join(["a" * 50] * 3 if form == tarfile.GNU_FORMAT else ["a"])  # a long name in GNU's way
    with tarfile.open(tmp_path / "x.tar", "w", format=form) as archive:
        info = tarfile.TarInfo(f"{deep}/n01440764.tar")
        info.size = len(inner.getvalue())
        archive.addfile(info, io.BytesIO(inner.getvalue()))
    items = list_imagenet([str(tmp_path / "x.tar")], progress=False).splits["train"]
    assert [item[:2] for item in items] == [(f"n01440764_{i}.JPEG", 0) for i in range(3)]
    data = (tmp_path / "x.tar").read_bytes()
    assert all(data[item.offset : item.offset + item.size] == bytes([i]) * (700 + i) for i, item in enumerate(items))
