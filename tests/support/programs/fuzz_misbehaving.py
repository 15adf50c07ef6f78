"""A program of test_fuzz.py: a reader that does all that is not allowed."""

import json
import os
import pathlib
import sys

from support import fuzz

from marjax.errors import UserError


def misbehave(folder: pathlib.Path) -> None:
    kind = (folder / "x").read_bytes()[0]
    if kind == 1:
        os.system("true")
    elif kind == 2:
        raise KeyError("x")
    elif kind == 3:
        bytearray(3 << 30)
    elif kind == 4:
        os.abort()
    elif kind == 5:
        pathlib.Path(sys.argv[1], "elsewhere").write_text("x")
    elif kind == 6:
        raise UserError("two\nlines")


target = fuzz.Target("bad", ("x",), lambda data, rng: bytes([rng.randrange(7)]), misbehave)
print(json.dumps(fuzz.run([target], pathlib.Path(sys.argv[1]), 40, 0)))
