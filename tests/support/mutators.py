"""Mutators: damaged and hostile files from sound ones, by a seeded generator; see fuzz.py."""

import io
import json
import pickletools
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

CANARY = "marjax_fuzz_canary"  # a module whose import is a failure

Mutator = Callable[[bytes, random.Random], bytes]

_EDGES = [
    b"\0",
    b"\xff",
    b"\x7f",
    b"\xff\xff",
    b"\0\x80",
    b"\xff\xff\xff\x7f",
    b"\xff" * 4,
    b"\0\0\0\x80",
    b"\xff" * 8,
    b"\xff" * 7 + b"\x7f",
    b"\0" * 8,
    b"\0\0\0\0\0\x10\0\0",
    b"\x7f" + b"\xff" * 3,
    b"\0\0\x10\0",
    b"9" * 12,
    b"\x80" + b"\0" * 7,
]


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to three edits, more likely near the beginning or the end, where headers are."""
    made = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        size = len(made)
        near = min(size, rng.choice([16, 64, 512, 4096, size]))
        at = rng.choice([rng.randrange(near), size - 1 - rng.randrange(near)]) if size else 0
        length = rng.choice([1, 2, 4, 8, rng.randint(1, 64), rng.randint(1, max(1, size))])
        match rng.randrange(8):
            case 0 if size:
                made[at] ^= 1 << rng.randrange(8)
            case 1:
                made[at : at + min(length, 64)] = rng.randbytes(min(length, 64, size - at))
            case 2:
                del made[rng.choice([at, max(0, size - length)]) :]
            case 3:
                del made[at : at + length]
            case 4:
                made[at:at] = made[at : at + min(length, 1 << 16)] * rng.choice([1, 1, 2, 100])
            case 5:
                edge = rng.choice(_EDGES)
                made[at : at + len(edge)] = edge
            case 6 if size:
                other = rng.randrange(size)
                made[at : at + length] = made[other : other + length]
            case _:
                made[at : at + length] = bytes(min(length, size - at))
    return bytes(made)


def _nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


_VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    3.0,
    2**31,
    2**53,
    2**63 - 1,
    2**63,
    2**64,
    10**12,
    10**15,
    10**40,
    -(10**40),
    0.5,
    -0.5,
    1e308,
    -1e308,
    1e-320,
    float("nan"),
    float("inf"),
    "",
    "a",
    "0",
    "-1",
    "nan",
    "a\nb\x1b[2J",
    "\0",
    "\ud800",
    "\udcff",
    "../../x",
    "/etc/passwd",
    "~",
    "gs://x/y",
    "x" * 5000,
    [],
    {},
    [[]],
    [None],
    [0] * 1000,
    {"a": {}},
    {"": []},
    _nested(40),
    _nested(300),
    CANARY,
    f"{CANARY}.Canary",
    f"{CANARY}:Canary",
    "os.system",
    "float32",
    "int8",
    "train",
    "train[:1]",
]


def _places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every (container, key) in a tree."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        found.append((value, key))
        _places(value[key], found)
    return found


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """Values, names and nesting of JSON, or its text."""
    if rng.random() < 0.15:
        return mutate_bytes(data, rng)
    holder = [json.loads(data)]
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        places = _places(holder, [])
        container, key = rng.choice(places)
        kind = rng.randrange(7)
        if kind == 0 and container is not holder:
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            container[rng.choice(["", "x", "\0", "format", "a" * 300, CANARY])] = container.pop(key)
        elif kind == 2:
            container[key] = rng.choice([[container[key]], {"x": container[key]}, [container[key]] * 3])
        elif kind == 3:
            other, name = rng.choice(places)
            container[key] = json.loads(json.dumps(other[name]))
        elif kind == 4 and type(container[key]) in (int, float):
            container[key] = container[key] * rng.choice([-1, 0, 2, 1e3, 10**9, 10**30]) + rng.choice([-1, 0, 1, 0.5])
        else:
            container[key] = rng.choice(_VALUES)
    text = json.dumps(holder[0]).encode()
    match rng.randrange(16):
        case 0:
            return b"\xef\xbb\xbf" + text
        case 1:
            return text.replace(b"1", b"1" * 5000, 1)
        case 2:
            return text.replace(b":", b": " + b"[" * 100_000, 1)
        case 3:
            return text.replace(b"{", b'{"format": 1, "format": 1,', 1)
        case 4:
            return text.decode().encode(rng.choice(["utf-16", "utf-32"]))
    return text


def mutate_lines(data: bytes, rng: random.Random) -> bytes:
    """Lines of JSON: one of them, their order, what is between them."""
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = rng.choice([mutate_json, mutate_json, mutate_bytes])(lines[at], rng)
    if rng.random() < 0.3:
        rng.shuffle(lines)
    if rng.random() < 0.3:
        lines.insert(
            at, rng.choice([b"text", b"\xff\xfe\0", b"{}", b"[" * 100_000, b"", b"9" * 5000, b"\xef\xbb\xbf{}"])
        )
    return rng.choice([b"\n", b"\n", b"\r\n", b"\r", b"\n\n"]).join(lines) + rng.choice([b"", b"\n"])


_SHAPES = [
    b"",
    b"-1,",
    b"0,",
    b"1,",
    b"99999999999999999999,",
    b"1000000, 1000000000,",
    b"2, 2",
    b"True,",
    b"1.5,",
    b"'a',",
    b"1,) * 99 + (1,",
    b"(1,),",
    b"[], ",
]
_DTYPES = [
    b"<f8",
    b">f4",
    b"|O",
    b"<U4",
    b"<U99999999",
    b"|S0",
    b"|V8",
    b"<M8[s]",
    b"|b1",
    b"<f2",
    b"<c8",
    b"<g",
    b"x",
    b"",
    b"<f8, <f8",
    b"O8",
]


def mutate_npy(data: bytes, rng: random.Random) -> bytes:
    """The header of an array, or any of it."""
    if data[:6] != b"\x93NUMPY" or rng.random() < 0.3:
        return mutate_bytes(data, rng)
    start = 8 + (2 if data[6] == 1 else 4)
    end = start + int.from_bytes(data[8:start], "little")
    header = data[start:end]
    match rng.randrange(6):
        case 0 | 1:
            head, _, tail = header.partition(b"'shape': (")
            header = head + b"'shape': (" + rng.choice(_SHAPES) + tail[tail.find(b")") :]
        case 2 | 3:
            head, _, tail = header.partition(b"'descr': '")
            header = head + b"'descr': '" + rng.choice(_DTYPES) + tail[tail.find(b"'") :]
        case 4:
            header = header.replace(b"False", rng.choice([b"True", b"None", b"[" * 3000, f"{CANARY}()".encode()]))
        case _:
            header = mutate_bytes(header, rng)
    length = len(header) if rng.random() < 0.8 else rng.choice([0, 1, 0xFFFF, len(header) + 64])
    prefix = data[:8] if rng.random() < 0.8 else b"\x93NUMPY" + rng.choice([b"\2\0", b"\3\0", b"\1\1", b"\4\0"])
    return prefix + length.to_bytes(start - 8, "little", signed=False)[: start - 8] + header + data[end:]


def mutate_zip(member: Mutator) -> Mutator:
    """A mutator of zip files: a member by `member`, written with its right checksum; or the archive itself."""

    def mutate(data: bytes, rng: random.Random) -> bytes:
        if rng.random() < 0.3:
            return mutate_bytes(data, rng)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(info, archive.read(info)) for info in archive.infolist()]
        at, kind, made = rng.randrange(len(members)), rng.randrange(12), io.BytesIO()
        with zipfile.ZipFile(made, "w") as archive:
            for index, (info, content) in enumerate(members):
                name, method = info.filename, info.compress_type
                if index == at:
                    if kind == 0:
                        continue
                    if kind == 1:
                        method = rng.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
                    elif kind == 2:
                        name = rng.choice(["x", "", "../x", "/x", "a\nb", name + ".npy", name.upper()])
                    elif kind == 3:
                        content, method = content[:200] + bytes(1 << 22), zipfile.ZIP_DEFLATED
                    elif kind == 4:
                        content = members[rng.randrange(len(members))][1]
                    else:
                        content = member(content, rng)
                archive.writestr(name, content, method)
        whole = bytearray(made.getvalue())
        if kind == 5:  # flags, method, checksum or sizes of the list of members
            entry = whole.find(b"PK\1\2")
            whole[entry + rng.choice([8, 10, 16, 20, 23, 24, 27, 42])] ^= rng.choice([1, 8, 255])
        return bytes(whole)

    return mutate


_PICKLES = [
    b"cos\nsystem\n(S'true'\ntR0",
    b"cbuiltins\nexec\n(S'import " + CANARY.encode() + b"'\ntR0",
    b"c" + CANARY.encode() + b"\nCanary\n)R0",
    b"(i" + CANARY.encode() + b"\nCanary\n0",
    b"cnumpy\nload\n0",
    b"c__builtin__\neval\n0",
    b"2",
    b"0",
    b"(",
    b"N",
    b"}",
    b"]",
    b")",
    b"R",
    b"b",
    b"u",
    b"\x81",
    b"\x94",
    b"Q",
    b"t",
    b"J\xff\xff\xff\x7f",
    b"\x8a\x08" + b"\xff" * 7 + b"\x7f",
    b"r\xff\xff\xff\x7f",
    b"X\xff\xff\xff\xff",
    b"h\0",
    b"a",
    b"ccollections\nOrderedDict\n)R",
    b"K\x01K\x02\x86",
    b"N" * 9,
]


def mutate_pickle(data: bytes, rng: random.Random) -> bytes:
    """Opcodes put in, left out or doubled, also such as would run code; or bytes."""
    if rng.random() < 0.3:
        return mutate_bytes(data, rng)
    try:
        places = [at for _, _, at in pickletools.genops(data)]
    except Exception:  # no pickle
        return mutate_bytes(data, rng)
    made = bytearray(data)
    for _ in range(rng.randint(1, 2)):
        index = rng.randrange(len(places))
        at, end = places[index], (*places, len(data))[min(len(places), index + rng.choice([1, 1, 3]))]
        match rng.randrange(4):
            case 0:
                del made[at:end]
            case 1:
                made[at:at] = made[at:end] * rng.choice([1, 3])
            case _:
                made[at:at] = rng.choice(_PICKLES)
    return bytes(made)


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """The header, with its right length, or any bytes."""
    if rng.random() < 0.3:
        return mutate_bytes(data, rng)
    end = 8 + int.from_bytes(data[:8], "little")
    header = mutate_json(data[8:end], rng)
    return len(header).to_bytes(8, "little") + header + data[end:]


def mutate_tar(data: bytes, rng: random.Random) -> bytes:
    """A field of a member's header, with its right checksum, or any bytes."""
    if rng.random() < 0.3:
        return mutate_bytes(data, rng)
    made = bytearray(data)
    at = rng.choice([place for place in range(0, len(made), 512) if made[place + 257 : place + 262] == b"ustar"])
    field, length = rng.choice([(0, 100), (100, 8), (124, 12), (124, 12), (156, 1), (156, 1), (257, 8), (345, 155)])
    value = rng.choice(
        [
            b"\xff" * 12,
            b"\x80" + b"\0" * 3 + b"\x7f" * 8,
            b"0" * 11,
            b"7" * 11,
            b"-1",
            b"1",
            b"x",
            b"L",
            b"g",
            b"S",
            b"2",
            b"K",
            b"a\nb",
            b"../x",
            b"n01440764.tar",
            b"ILSVRC2012_val_00000001.JPEG",
            b"",
        ]
    )
    made[at + field : at + field + length] = value[:length].ljust(length, b"\0")
    made[at + 148 : at + 156] = b" " * 8
    made[at + 148 : at + 156] = b"%06o\0 " % sum(made[at : at + 512])
    if rng.random() < 0.3:
        made[at:at] = made[at : at + 512] * rng.choice([1, 100])
    return bytes(made)


def mutate_picture(data: bytes, rng: random.Random) -> bytes:
    """Of PNG a chunk, with its right checksum; of other formats bytes."""
    if data[:8] != b"\x89PNG\r\n\x1a\n" or rng.random() < 0.3:
        return mutate_bytes(data, rng)
    chunks, at = [], 8
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    index = rng.randrange(len(chunks))
    name, content = chunks[index]
    if name == b"IHDR" and rng.random() < 0.7:
        width, height, *rest = struct.unpack(">IIBBBBB", content)
        sizes = [0, 1, 7, 8, 100, 9000, 13_000, 65_535, 1 << 20, 0x7FFFFFFF, 0xFFFFFFFF]
        content = struct.pack(
            ">IIBBBBB",
            rng.choice([width, *sizes]),
            rng.choice([height, *sizes]),
            *(rng.choice([each, 0, 1, 3, 4, 8, 16]) for each in rest),
        )
    elif name == b"IDAT" and rng.random() < 0.5:
        content = zlib.compress(bytes(rng.choice([1, 1 << 16, 1 << 24])))
    else:
        content = mutate_bytes(content, rng)
    chunks[index] = (name, content)
    if rng.random() < 0.3:
        chunks.insert(
            index,
            rng.choice(
                [
                    (b"tEXt", b"a\0" + b"b" * 70_000),
                    (b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 24))),
                    (b"iCCP", b"a\0\0" + zlib.compress(bytes(1 << 20))),
                    (b"acTL", bytes(8)),
                    (b"PLTE", bytes(5)),
                    (b"tRNS", b"\0"),
                    (b"eXIf", b"II*\0" + b"\xff" * 8),
                ]
            ),
        )
    return data[:8] + b"".join(
        len(each).to_bytes(4, "big") + kind + each + zlib.crc32(kind + each).to_bytes(4, "big") for kind, each in chunks
    )
