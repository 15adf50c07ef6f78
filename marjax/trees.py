"""The type of nested containers of arrays, which Python cannot spell out."""

from typing import Any

PyTree = Any  # dicts, tuples, lists and dataclasses, nested, whose leaves are arrays or ShapeDtypeStructs
