"""PyTorch files read without PyTorch: what the reference wrote, hand-made files of every kind, and hostile ones."""

import argparse
import io
import json
import pickle
import random
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
from support.compare import parity
from support.paths import PARITY
from support.pytorch_files import (
    Build,
    Call,
    Global,
    Pid,
    Raw,
    opcodes,
    pickled,
    storage,
    tensor,
    write_legacy,
    write_zip,
)

from marjax.errors import UserError
from marjax.interop import unpickle, weights_file
from marjax.interop.weights_file import read

FILES = PARITY / "checkpoints"


# A pickler that writes what it is told to: PyTorch is not here, and its pickler would not write what an attacker does.


def says(path, text):
    with pytest.raises(UserError, match=text) as caught:
        content = read(path).content
        for value in content.values() if isinstance(content, dict) else [content]:
            np.asarray(value)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 700


# --- What is in them -------------------------------------------------------------------------------------------------


def test_the_reference_files():
    arrays, _ = parity("mar_sample_cfg_linear")
    official = read(FILES / "mar_tiny.pth").content
    assert list(official) == ["model", "model_ema", "optimizer", "epoch", "scaler", "args"]
    assert official["epoch"] == 399 and official["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999)
    assert isinstance(official["args"], argparse.Namespace) and official["args"].diffloss_w == 64
    stored = {name.removeprefix("params/"): arrays[name] for name in arrays.files if name.startswith("params/")}
    assert official["model_ema"].keys() == official["model"].keys() == stored.keys()
    others = [read(FILES / name).content for name in ("mar_tiny.safetensors", "mar_tiny_legacy.pth")]
    for name, array in stored.items():
        np.testing.assert_array_equal(official["model_ema"][name], array)
        raw = np.asarray(official["model"][name])
        assert raw.dtype == array.dtype and raw.shape == official["model"][name].shape == array.shape
        for other in others:
            np.testing.assert_array_equal(other[name], raw)
    assert sum((np.asarray(official["model"][name]) != array).any() for name, array in stored.items()) == len(stored)


TYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "LongStorage": np.int64,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
    "ComplexFloatStorage": np.complex64,
}


@pytest.mark.parametrize("little", [True, False])
@pytest.mark.parametrize("kind, dtype", TYPES.items(), ids=TYPES)
def test_types_views_and_byte_orders(tmp_path, kind, dtype, little):
    flat = (np.arange(-11, 13) * 3.3).astype(dtype)
    if flat.dtype == np.complex64:
        flat += 1j
    where = storage(kind, "0", 24)
    value = {
        "whole": tensor(where, 0, (4, 6), (6, 1)),
        "transposed": tensor(where, 0, (6, 4), (1, 6)),
        "part": tensor(where, 7, (2, 3), (6, 2), 1),
        "number": tensor(where, 5, (), ()),
        "empty": tensor(where, 0, (0, 3), (3, 1)),
        "expanded": tensor(where, 2, (3, 2), (0, 1)),
        "parameter": Call(Global("torch._utils", "_rebuild_parameter"), (tensor(where, 0, (24,), (1,)), True, {})),
    }
    grid = flat.reshape(4, 6)
    expected = {
        "whole": grid,
        "transposed": grid.T,
        "part": flat[7:19].reshape(2, 6)[:, :6:2],
        "number": flat[5],
        "empty": flat[:0].reshape(0, 3),
        "expanded": np.stack([flat[2:4]] * 3),
        "parameter": flat,
    }
    swapped = (
        flat.astype(flat.dtype.newbyteorder("<" if little else ">")).tobytes()
        if flat.dtype.kind != "V"
        else flat.view(np.uint16).astype("<u2" if little else ">u2").tobytes()
    )
    files = [write_zip(tmp_path / "a.pth", value, [swapped], order=b"little" if little else b"big")]
    if flat.dtype.kind != "V":
        files.append(write_legacy(tmp_path / "b.pth", value, [flat], little=little))
    for file in files:
        content = read(file).content
        assert content.keys() == expected.keys()
        for name, array in expected.items():
            got = np.asarray(content[name])
            assert got.dtype == content[name].dtype == flat.dtype and got.shape == content[name].shape == array.shape
            assert got.tobytes() == np.ascontiguousarray(array).tobytes(), name


def test_untyped_storages_and_newer_types(tmp_path):
    data = np.arange(6, dtype=np.uint16)
    place = storage("UntypedStorage", "0", 12, module="torch.storage")
    value = {
        "x": tensor(place, 2, (2, 2), (2, 1), 3, Global("torch", "uint16")),
        "bytes": tensor(place, 0, (12,), (1,)),
    }
    content = read(write_zip(tmp_path / "a.pth", value, [data.tobytes()])).content
    np.testing.assert_array_equal(content["x"], [[2, 3], [4, 5]])
    assert content["x"].dtype == np.uint16 and np.asarray(content["bytes"]).tobytes() == data.tobytes()


def test_views_of_storages_in_the_older_format(tmp_path):
    whole = storage("FloatStorage", "0", 10, None)
    part = storage("FloatStorage", "0", 10, ("v", 4, 3))
    file = write_legacy(
        tmp_path / "a",
        {"a": tensor(whole, 8, (2,), (1,)), "b": tensor(part, 1, (2,), (1,))},
        [np.arange(10, dtype=np.float32)],
    )
    content = read(file).content
    np.testing.assert_array_equal(content["a"], [8, 9])
    np.testing.assert_array_equal(content["b"], [5, 6])
    for view in (("v", 8, 3), ("v", -1, 3), ("v", 4), 7):
        part = storage("FloatStorage", "0", 10, view)
        says(
            write_legacy(tmp_path / "b", {"b": tensor(part, 1, (2,), (1,))}, [np.zeros(10, np.float32)]),
            "view outside of the storage",
        )


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_of_every_protocol(tmp_path, protocol):
    value = {
        "a": [1, -2, 2**70, 1.5, None, True, False, "é\n", b"\x00\xff", (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
        3: {"b": {}, None: "x" * 300},
        -70: list(range(1100)),
        "args": argparse.Namespace(lr=0.1, name="x"),
    }
    if protocol < 2:  # there, objects and bytes are made by helpers that no checkpoint needs
        value.pop("args")
        value["a"].remove(b"\x00\xff")
    value["again"] = value["a"]
    content = read(write_zip(tmp_path / "a.pth", pickle.dumps(value, protocol))).content
    assert content == value and content["again"] is content["a"]


def test_what_else_checkpoints_hold(tmp_path):
    def ordered(*pairs):
        return Call(Global("collections", "OrderedDict"), pairs)

    f8 = Build(Call(Global("numpy", "dtype"), ("f8", False, True)), (3, "<", None, None, None, -1, -1, 0))
    number = Call(Global("_codecs", "encode"), (struct.pack("<d", 2.75).decode("latin1"), "latin1"))
    value = {
        "state_dict": Build(ordered([("a", 1), ("b", 2)]), {"_metadata": ordered()}),
        "size": Call(Global("torch", "Size"), ((2, 3),)),
        "device": Call(Global("torch", "device"), ("cuda", 1)),
        "dtype": Global("torch", "bfloat16"),
        "score": Call(Global("numpy.core.multiarray", "scalar"), (f8, number)),
        "callbacks": {Global("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"): {"best": 1}},
    }
    assert read(write_zip(tmp_path / "a.pth", value)).content == {
        "state_dict": {"a": 1, "b": 2},
        "size": (2, 3),
        "device": "cuda:1",
        "dtype": np.dtype(ml_dtypes.bfloat16),
        "score": 2.75,
        "callbacks": {"ModelCheckpoint": {"best": 1}},
    }


def test_only_what_is_asked_for_is_read(monkeypatch):
    reads = []
    real = weights_file.pytorch._Region.read
    monkeypatch.setattr(
        weights_file.pytorch._Region, "read", lambda self, *span: reads.append(self.start) or real(self, *span)
    )
    content = read(FILES / "mar_tiny.pth").content
    at_first = len(reads)
    np.asarray(content["model_ema"]["mask_token"])
    assert at_first == 2 and len(reads) == 3  # the pickle and the byte order, then one tensor


def test_safetensors(tmp_path):
    def write(header, data, path=tmp_path / "x.pth"):
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)
        return path

    array = np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3)
    header = {"x": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, "__metadata__": {"step": "7"}}
    file = read(write(header, array.tobytes()))  # whatever its name says
    assert file.metadata == {"step": "7"} and file.content["x"].shape == (2, 3)
    assert np.asarray(file.content["x"]).dtype == array.dtype == file.content["x"].dtype
    np.testing.assert_array_equal(file.content["x"], array)
    says(write(header, array.tobytes()[:-2]), "begins as a safetensors file, but is damaged or cut short")
    says(write(header | {"y": header["x"]}, array.tobytes()), "damaged or cut short")
    says(write({"x": header["x"] | {"dtype": "F8_E4M3", "data_offsets": [0, 6]}}, bytes(6)), "'x' of type F8_E4M3")
    says(write({"x": {"dtype": "F32", "shape": [0] * 1000, "data_offsets": [0, 0]}}, b""), "'x' of 1000 dimensions")
    whole = (FILES / "mar_tiny.safetensors").read_bytes()
    rng = random.Random(1)
    for length in [9, 100, *(rng.randrange(10, len(whole)) for _ in range(10))]:
        (tmp_path / "cut").write_bytes(whole[:length])
        says(tmp_path / "cut", "damaged or cut short")


# --- What is something else ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data, text",
    [
        (b"", "is empty: download"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"\n  <html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer.*git lfs pull"),
        (b"\x1f\x8b\x08\0\0\0", "compressed by gzip"),
        (bytes(257) + b"ustar\0", "tar archive: unpack"),
        (b"404: Not Found\n", r"is a text, not a checkpoint \(it begins with '404: Not Found"),
        (b"\x93NUMPY\x01\0", "is a NumPy array"),
        (b"\x00\x01\x02\x03" * 9, "neither .* begins with the bytes 00 01 02 03"),
        (b"PK\x05\x06" + bytes(18), "an empty zip"),
        (b"PK\x03\x04" + bytes(40), "its end is missing"),
        (pickle.dumps({"a": 1}), "is no PyTorch file"),
        (b"\x80\x02", "is no PyTorch file"),
    ],
    ids=range(13),
)
def test_files_of_other_kinds(tmp_path, data, text):
    (tmp_path / "x.pth").write_bytes(data)
    says(tmp_path / "x.pth", text)


def test_no_file_at_all(tmp_path):
    says(tmp_path / "x", "does not exist")
    says(tmp_path, "is a folder")
    with pytest.raises(UserError, match="no local file"):
        read("gs://bucket/x.pth")
    np.savez(tmp_path / "x.npz", a=np.zeros(3))
    says(tmp_path / "x.npz", "zip file with 0 members data.pkl")


# --- What is damaged -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mar_tiny.pth", "mar_tiny_legacy.pth"])
def test_cut_short_anywhere(tmp_path, name):
    whole = (FILES / name).read_bytes()
    rng = random.Random(0)
    lengths = [*range(1, 300, 13), *(rng.randrange(len(whole)) for _ in range(20)), len(whole) - 22, len(whole) - 1]
    for length in lengths:
        (tmp_path / "cut.pth").write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"cut\.pth "):
            read(tmp_path / "cut.pth")


def test_overwritten_weights_are_noticed(tmp_path):
    data = bytearray((FILES / "mar_tiny.pth").read_bytes())
    token = np.asarray(read(FILES / "mar_tiny.pth").content["model_ema"]["mask_token"]).tobytes()
    data[data.index(token) + 17] ^= 1
    (tmp_path / "x.pth").write_bytes(data)
    content = read(tmp_path / "x.pth").content
    np.asarray(content["model_ema"]["fake_latent"])
    with pytest.raises(UserError, match="checksum of the 256 bytes"):
        np.asarray(content["model_ema"]["mask_token"])


def test_zip_files_that_torch_does_not_write(tmp_path):
    good = {"x": tensor(storage("FloatStorage", "0", 2), 0, (2,), (1,))}
    path, data = tmp_path / "x.pth", bytes(8)
    np.testing.assert_array_equal(read(write_zip(path, good, [data], order=None, folder="a/b")).content["x"], [0, 0])
    says(write_zip(path, good, [data], method=zipfile.ZIP_DEFLATED), "compressed or encrypted member 'archive/data.p")
    says(write_zip(path, good, [data], extra=[("other/data.pkl", b"")]), "with 2 members data.pkl")
    with pytest.warns(UserWarning, match="Duplicate"):
        write_zip(path, good, [data], extra=[("archive/data/0", data)])
    says(path, "'archive/data/0' is there twice")
    says(write_zip(path, good, [data], order=b"middle"), "byte order is b'middle'")
    says(write_zip(path, good), "storage '0', which the file does not have")
    says(write_zip(path, good, [data[:7]]), "has 2 elements of float32, but it has 7 bytes")

    def directory(change):
        whole = bytearray(write_zip(path, good, [data]).read_bytes())
        at = whole.rindex(b"PK\x01\x02")  # the last member's entry in the directory: archive/data/0
        change(whole, at)
        path.write_bytes(whole)
        return path

    def huge(whole, at):
        struct.pack_into("<II", whole, at + 20, 1 << 31, 1 << 31)

    def elsewhere(whole, at):
        struct.pack_into("<I", whole, at + 42, 0)  # where data.pkl begins

    says(directory(huge), "lies outside of the file")
    says(directory(elsewhere), "overlap")
    says(directory(lambda whole, at: struct.pack_into("<H", whole, at + 8, 1)), "compressed or encrypted")


# --- What is hostile -------------------------------------------------------------------------------------------------


class Marker:
    """What a victim's unpickler would do."""

    def __reduce__(self):
        return exec, ("raise SystemExit('ran')",)


SYSTEM = Global("posix", "system")
NEWOBJ = b"\x81"
HOSTILE = {
    "os.system": (Call(SYSTEM, ("touch ran",)), "asks for 'posix.system'"),
    "eval": (Call(Global("builtins", "eval"), ("1",)), "asks for 'builtins.eval'"),
    "getattr": (Call(Global("builtins", "getattr"), (Global("torch", "Size"), "x")), "asks for 'builtins.getattr'"),
    "by import": (Call(Global("importlib", "import_module"), ("os",)), "asks for 'importlib.import_module'"),
    "dots": (Global("torch._utils", "_rebuild_tensor_v2.__globals__"), r"_rebuild_tensor_v2.__globals__'"),
    "dots in the stack": (
        Raw(opcodes("torch") + opcodes("_utils._rebuild_tensor_v2") + b"\x93"),
        "asks for 'torch._utils._rebuild_tensor_v2'",
    ),
    "a name that is none": (Raw(opcodes(7) + opcodes("x") + b"\x93"), "a name that is no text"),
    "our own": (Global("marjax.interop.pytorch", "read"), "asks for 'marjax.interop.pytorch.read'"),
    "torch.load": (Call(Global("torch", "load"), ("x",)), "asks for 'torch.load'"),
    "_reconstructor": (Call(Global("copyreg", "_reconstructor"), (1, 2)), "asks for 'copyreg._reconstructor'"),
    "a partial": (Call(Global("functools", "partial"), (SYSTEM, "x")), "asks for 'functools.partial'"),
    "an object": (Call(Global("builtins", "object"), (), NEWOBJ), "asks for 'builtins.object'"),
    "EXT": (Raw(b"\x82\x01"), "opcode EXT1"),
    "INST": (Raw(b"(S'touch ran'\niposix\nsystem\n"), "asks for 'posix.system'"),
    "OBJ": (Raw(b"(" + opcodes(SYSTEM) + opcodes("touch ran") + b"o"), "asks for 'posix.system'"),
    "NEWOBJ_EX": (Raw(opcodes(SYSTEM) + opcodes(("touch ran",)) + b"}\x92"), "asks for 'posix.system'"),
    "NEWOBJ_EX of ours": (Raw(opcodes(Global("torch", "Size")) + b")" + opcodes({"shape": ()}) + b"\x92"), "by name"),
    "a long name": (Raw(opcodes("x" * 999) + opcodes("yz") + b"\x93"), "a name of 1001 characters"),
    "a long key": (storage("FloatStorage", "0" * 2000, 2), "describes a storage in another way"),
    "attributes of anything": (
        Call(Global("torch._tensor", "_rebuild_from_type_v2"), (SYSTEM, 1, ("x",), {})),
        "asks for 'posix.system'",
    ),
    "attributes of ours": (
        Call(Global("torch._tensor", "_rebuild_from_type_v2"), (Global("torch", "Size"), 1, (), {})),
        "makes a tensor in another way",
    ),
    "BUILD of a list": (Build([], {"x": 1}), "sets the state of a list"),
    "BUILD of a tensor": (Build(tensor(storage("FloatStorage", "0", 2), 0, (2,), (1,)), {"read": 1}), "of a Tensor"),
    "BUILD of a function": (Build(Global("torch", "Size"), {"call": 1}), "of a Function"),
    "dunder": (Build(Call(Global("argparse", "Namespace"), (), NEWOBJ), {"__class__": 1}), "attributes of an"),
    "state that is no dict": (Build(Call(Global("argparse", "Namespace"), ()), (None, {"a": 1})), "attributes of an"),
    "a call of a value": (Call(Global("torch", "float32"), ()), "calls something that is no function"),
    "a call of text": (Call("posix.system", ("x",)), "calls something that is no function"),
    "a call of anything": (Call(Global("torch", "Size"), [1]), "calls something that is no function"),
    "other arguments": (Call(Global("torch", "Size"), (1, 2, 3)), "other arguments than it takes"),
    "a module": (Pid(("module", Global("torch", "Size"), "f", "s")), "whole Python module"),
    "an id of something": (Pid(("file", "/etc/passwd")), "refers to something that is no storage"),
    "an object as id": (Pid(Global("torch", "float32")), "refers to something that is no storage"),
    "no type": (storage("Size", "0", 2), "describes a storage in another way"),
    "huge storage": (storage("FloatStorage", "0", 10**12), "has 1000000000000 elements, which the file"),
    "negative storage": (storage("FloatStorage", "0", -1), "describes a storage in another way"),
    "not the storage's": (storage("FloatStorage", "0", 1), "has 1 elements of float32, but it has 8 bytes"),
    "a path as key": (storage("FloatStorage", "../data.pkl", 2), "the file does not have"),
    "huge string": (Raw(b"\x8e" + struct.pack("<Q", 1 << 40)), "holds a string of 1099511627776 bytes"),
    "huge text": (Raw(b"\x8d" + struct.pack("<Q", 1 << 62)), "holds a string of"),
    "huge number": (Raw(b"\x8b" + struct.pack("<I", 1000) + b"\x7f" * 1000), "holds a number of 7999 bits"),
    "endless digits": (Raw(b"I" + b"9" * 5000 + b"\n"), "breaks off or is damaged"),
    "huge memo": (Raw(b"Nr" + struct.pack("<I", 2**32 - 1)), "numbers an object 4294967295"),
    "no such memo": (Raw(b"Nr" + struct.pack("<I", 6) + b"j" + struct.pack("<I", 5)), "an object that it has not"),
    "no mark": (Raw(b"t"), "there is no mark"),
    "empty stack": (Raw(b"00"), "there is no mark"),
    "a protocol to come": (Raw(b"\x80\x09"), "pickle protocol 9"),
    "no opcode": (Raw(b"\xff"), "breaks off or is damaged"),
    "append to a tuple": (Raw(opcodes((1,)) + opcodes(2) + b"a"), "a list was expected"),
    "a NumPy object": (Call(Global("numpy", "dtype"), ("O8", False, True)), "NumPy type 'O8'"),
    "a NumPy array": (Call(Global("numpy.core.multiarray", "_reconstruct"), ()), "_reconstruct'"),
    "another encoding": (Call(Global("_codecs", "encode"), ("x", "rot13")), "other than latin1"),
    "a device of a device": (Call(Global("torch", "device"), ((1, 2),)), "torch.device that is none"),
    "no dtype": (tensor(storage("FloatStorage", "0", 2), 0, (2,), (1,), 3, 7), "a tensor without a dtype"),
    "another dtype": (tensor(storage("FloatStorage", "0", 2), 0, (2,), (1,), 3, Global("torch", "int8")), "other type"),
}
TWO = storage("FloatStorage", "0", 2)
SHAPES = {
    "beyond the end": (0, (3,), (1,)),
    "by its stride": (0, (2,), (2,)),
    "by its offset": (1, (2,), (1,)),
    "offset alone": (3, (0,), (1,)),
    "negative size": (0, (-1,), (1,)),
    "negative stride": (1, (2,), (-1,)),
    "negative offset": (-1, (1,), (1,)),
    "huge": (0, (2**40, 2**40), (0, 0)),
    "huge stride": (0, (2,), (2**61,)),
    "another rank": (0, (2,), ()),
    "too many": (0, (1,) * 65, (1,) * 65),
    "text": (0, ("2",), (1,)),
    "overflow": (0, (2**80,), (0,)),
    "bool": (0, (True,), (1,)),
    "a list": (0, [2], [1]),
}
HOSTILE |= {
    f"view, {name}": (tensor(TWO, *view), "does not fit its storage|in another way than torch.save")
    for name, view in SHAPES.items()
}


@pytest.mark.parametrize("value, text", HOSTILE.values(), ids=HOSTILE)
def test_refused(tmp_path, monkeypatch, value, text):
    monkeypatch.chdir(tmp_path)
    if not isinstance(value, Raw) or "EXT" in text or "asks for" in text:
        value = {"x": value, "y": tensor(TWO, 0, (2,), (1,))}
    says(write_zip(tmp_path / "x.pth", value, [bytes(8)]), text)
    if "8 bytes" not in text and "file does not have" not in text:  # which that format sees in another way
        says(write_legacy(tmp_path / "y.pth", value, [np.zeros(2, np.float32)]), text)
    assert sorted(path.name for path in tmp_path.iterdir()) in (["x.pth"], ["x.pth", "y.pth"])


def test_the_attack_works_elsewhere(tmp_path):
    """What is refused above would run under Python's own unpickler."""
    with pytest.raises(SystemExit, match="ran"):
        pickle.loads(pickle.dumps(Marker()))
    says(write_zip(tmp_path / "x.pth", pickle.dumps({"x": Marker()}, 4)), "asks for 'builtins.exec'")
    (tmp_path / "y.pth").write_bytes(pickle.dumps(Marker()))
    says(tmp_path / "y.pth", "is no PyTorch file")


def calls(function, arguments, times, opcode=b"R"):
    """A dict with text, after many calls with the same arguments."""
    return Raw(
        opcodes(arguments)
        + b"q\x09"
        + opcodes(function)
        + b"q\x08"
        + b"".join(b"0h\x08h\x09" + opcode for _ in range(times))
    )


def test_work_is_bounded(tmp_path, monkeypatch):
    # Tuples that share their parts: whoever compares or prints these never ends.
    doubling = Raw(b")" + b"2\x86" * 100)
    for value in (
        {"x": Pid(doubling)},
        {"x": Pid((doubling, 1, 2, 3, 4))},
        {"x": storage("FloatStorage", doubling, 2)},
        {"x": tensor(TWO, 0, doubling, (1,))},
        {"x": Call(Global("torch", "device"), (doubling,))},
        {"x": Call(Global("numpy", "dtype"), (doubling,))},
    ):
        with pytest.raises(UserError):
            read(write_zip(tmp_path / "x.pth", value, [bytes(8)]))
    assert len(read(write_zip(tmp_path / "x.pth", Raw(b"}" + doubling.opcodes + b"Ns"))).content) == 1

    monkeypatch.setattr(unpickle, "MAX_WORK", 20_000)
    ordered, many = Global("collections", "OrderedDict"), {f"k{i}": 1 for i in range(200)}
    same = [["k", 1]] * 200  # of which each call makes next to nothing
    namespace = Call(Global("argparse", "Namespace"), ())
    repeated = {
        "calls": calls(ordered, ([[key, 1] for key in many],), 200),
        "calls with one key": calls(ordered, (same,), 200),
        "long text": calls(Global("_codecs", "encode"), ("y" * 60_000, "latin1"), 20),
        "sizes": calls(Global("torch", "Size"), (tuple(range(200)),), 200),
        "states": calls(namespace, many, 200, b"b"),
        "small calls": calls(ordered, (), 2000),
        "placeholders": calls(SYSTEM, (), 2000),
        "storages": Raw(opcodes(TWO) * 1000),
        "opcodes": Raw(b"N0" * 20_000),
    }
    for name, value in repeated.items():
        file = write_zip(tmp_path / "x.pth", value, [bytes(8)])
        with pytest.raises(UserError, match="takes more than 20000 steps"):
            pytest.fail(f"{name}: {len(read(file).content)}")
    for function, arguments, opcode in ((ordered, ([[key, 1] for key in many],), b"R"), (namespace, many, b"b")):
        read(write_zip(tmp_path / "x.pth", calls(function, arguments, 20, opcode)))
    file = write_legacy(tmp_path / "x.pth", Raw(b"N0" * 7000 + b"N"), [])
    read(file)
    file.write_bytes(file.read_bytes().replace(pickled([]), pickled(Raw(b"N0" * 7000 + b"]"))))
    says(file, "takes more than 20000 steps")  # both of its pickles together
    monkeypatch.setattr(unpickle, "MAX_STRING", 1000)
    says(write_zip(tmp_path / "x.pth", {"x": "y" * 1001}), "1022 bytes, where a list of tensors")
    says(write_legacy(tmp_path / "x.pth", ["y" * 600, "z" * 600], []), "holds a string of 600 bytes, of at most 1000")


def test_keys_cannot_be_chosen_to_collide(tmp_path):
    """Integers of one hash, long strings and floats: each is a key of its own, without being hashed or compared."""
    prime = 2**61 - 1
    for keys in ([i * prime for i in range(20)], [1.5, 1.5, 70_000, 2**40], ["y" * 5000, "y" * 5000], [(1, 2), (1, 2)]):
        pairs = b"".join(opcodes(key) + b"K\x01" for key in keys)
        content = read(write_zip(tmp_path / "x.pth", Raw(b"}(" + pairs + b"u"))).content
        assert len(content) == len(keys) and all(isinstance(key, unpickle.Refused) for key in list(content)[1:])


def test_long_lists_of_members(tmp_path, monkeypatch):
    value = {"x": tensor(TWO, 0, (2,), (1,))}
    path = write_zip(tmp_path / "x.pth", value, [bytes(8)], extra=[(f"archive/data/{i}", b"") for i in range(9, 50)])
    read(path)
    monkeypatch.setattr(weights_file.pytorch, "_MAX_DIRECTORY", 2000)
    says(path, "a list of members of 2[0-9]{3} bytes")
    path = write_zip(path, value, [bytes(8)], order=b"little" * 1000)
    says(path, "byte order is b'a long text'")


def test_objects_beside_the_weights_are_inert(tmp_path, monkeypatch, caplog):
    """An optimizer of a class that is not known, settings, a schedule: neither imported nor run, nor an error."""
    monkeypatch.chdir(tmp_path)
    x = tensor(TWO, 0, (2,), (1,))
    mine = Call(Global("my.optim", "Lion"), (), NEWOBJ)
    value = {
        "model": Call(Global("collections", "OrderedDict"), ()),
        "optimizer": Build(mine, {"state": x, "lr": 0.1}),
        "config": Raw(
            opcodes(Global("omegaconf", "DictConfig")) + b")\x81" + opcodes({"a": 1}) + b"b(" + opcodes("k") + b"K\x01u"
        ),
        "queue": Raw(opcodes(Global("collections", "deque")) + b")R(K\x01K\x02e"),
        "set": Raw(b"\x8f(K\x01\x90"),
        "frozen": Raw(b"(K\x01\x91"),
        "call": Call(SYSTEM, ("touch ran",)),
        "keys": {mine: 1},
        "path": Call(Global("pathlib", "PosixPath"), ("a",)),
        "old": Raw(b"(imy.old\nThing\n}b"),
        "dict": Call(Global("collections", "defaultdict"), (SYSTEM,)),
    }
    for path in (
        write_zip(tmp_path / "x.pth", value, [bytes(8)]),
        write_legacy(tmp_path / "y.pth", value, [np.zeros(2, np.float32)]),
    ):
        content = read(path).content
        assert content["model"] == content["dict"] == {}
        for name in ("optimizer", "config", "queue", "set", "frozen", "call", "path", "old"):
            assert isinstance(content[name], unpickle.Refused), name
            with pytest.raises(UserError, match=f"{path} asks for '.* where a tensor was expected"):
                np.asarray(content[name])
        assert "my.optim.Lion" in caplog.text and str(path) in caplog.text
    assert sorted(each.name for each in tmp_path.iterdir()) == ["x.pth", "y.pth"]


def test_parameters_with_attributes(tmp_path):
    x = tensor(TWO, 0, (2,), (1,))
    state = {"tensor_model_parallel": True, "owner": Global("megatron", "Layer")}
    value = {
        "a": Call(Global("torch._utils", "_rebuild_parameter_with_state"), (x, True, {}, state)),
        "b": Call(
            Global("torch._tensor", "_rebuild_from_type_v2"),
            (Global("torch._utils", "_rebuild_tensor_v2"), Global("torch.nn.parameter", "Buffer"), x.arguments, state),
        ),
    }
    content = read(write_zip(tmp_path / "x.pth", value, [np.float32([1, 2]).tobytes()])).content
    for each in content.values():
        np.testing.assert_array_equal(each, [1, 2])


def test_a_directory_that_leads_before_the_file(tmp_path):
    data = bytearray(write_zip(tmp_path / "x.pth", {"x": 1}).read_bytes())
    end = data.rindex(b"PK\x05\x06")
    struct.pack_into("<I", data, end + 12, len(data) * 2)  # the size of the directory, so that it begins before 0
    (tmp_path / "x.pth").write_bytes(data)
    says(tmp_path / "x.pth", "its end is missing or damaged .*download")


def test_the_older_format_says_the_same_twice(tmp_path):
    x = {"x": tensor(TWO, 0, (2,), (1,))}
    path = tmp_path / "x.pth"
    np.testing.assert_array_equal(read(write_legacy(path, x, [np.ones(2, np.float32)])).content["x"], [1, 1])
    says(write_legacy(path, x, [np.ones(3, np.float32)]), "another size than its tensors say")
    says(write_legacy(path, x, [np.ones(2, np.float32)], keys=["1"]), "the storages that the file lists")
    says(write_legacy(path, x, [np.ones(2, np.float32)], keys=[["0"]]), "the storages that the file lists")
    two = x | {"y": tensor(storage("FloatStorage", "0", 1), 0, (1,), (1,))}
    says(write_legacy(path, two, [np.ones(2, np.float32)]), "two different things")
    says(write_legacy(path, x, [], keys=["0"]), "ends in the middle of its weights")
    buffer = io.BytesIO()
    for part in (0x1950A86A20F9469CFC6C, 1002):
        pickle.dump(part, buffer, 2)
    path.write_bytes(buffer.getvalue())
    says(path, "another version")
