"""Normalises the paths that users give.

`normalised` is called where paths enter the program: for command arguments, for config fields in `config.resolve`, and
in public functions that take paths.
"""

import functools
import inspect
import os
import re
import urllib.parse
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from marjax.errors import UserError
from marjax.ranges import shown

P = ParamSpec("P")
R = TypeVar("R")

_MAX_PATH, _MAX_NAME = 4095, 255  # bytes of a path and of a name in it, on Linux and macOS

_SCHEMES = ("abfs", "az", "file", "gcs", "gs", "hdfs", "hf", "http", "https", "s3", "s3a")
_ADDRESS = re.compile(rf"([a-z][a-z0-9+.-]*)://|({'|'.join(_SCHEMES)}):", re.IGNORECASE)
_LOST_SLASH = re.compile(rf"(?:^|/)((?:{'|'.join(_SCHEMES)}):)/+", re.IGNORECASE)  # an address after pathlib.Path


def normalised(path: Any, name: str = "path") -> str:
    """Returns a local path or gs:// address without a trailing slash.

    `~` and `~user` are expanded, and file:// addresses become local paths. Relative paths stay relative.

    Args:
      path: str or os.PathLike.
      name: name of the argument, for errors.

    Raises:
      UserError: it is empty, not a path, a mangled address (gs:/bucket), an address of unsupported storage, or the home
        folder of a user who does not exist.
    """
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(text, str):
        raise UserError(f"{name} is {shown(path)}, expected str or os.PathLike")
    if not text:
        raise UserError(f"{name} is empty; give a path")
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise UserError(f"{name} is {shown(text)}, which cannot be encoded as a path; give another") from None
    if "\0" in text:
        raise UserError(f"{name} is {shown(text)}, expected a path without null characters")
    if (found := _ADDRESS.match(text)) is not None:
        scheme = (found[1] or found[2]).lower()
        if scheme != "file":
            return _address(text, scheme, name)
        text = _of_file_address(text, name)
    elif (lost := _LOST_SLASH.search(text)) is not None:  # perhaps after it was made absolute
        raise UserError(
            f"{name} {text} is a mangled address; give {_meant(lost[1], text[lost.end() :])} as str, since "
            f"pathlib.Path drops a slash"
        )
    if text.startswith("~"):
        text = _at_home(text, name)
    encoded = os.fsencode(text)
    if len(encoded) > _MAX_PATH or any(len(part) > _MAX_NAME for part in encoded.split(b"/")):
        raise UserError(f"{name} {shown(text)} is too long for a path; give another")
    return text.rstrip("/") or "/"


def takes_paths(*names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a function to normalise its arguments of these names, which are paths or lists of paths.

    Arguments that have a default may be None or "", for no path.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        defaults = [name for name in names if signature.parameters[name].default is not inspect.Parameter.empty]

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            given = signature.bind(*args, **kwargs)
            for name in names:
                if name in given.arguments:
                    value, understand = given.arguments[name], optional if name in defaults else normalised
                    given.arguments[name] = (
                        [normalised(each, name) for each in value]
                        if isinstance(value, list | tuple)
                        else understand(value, name)
                    )
            return function(*given.args, **given.kwargs)

        return call

    return decorate


def optional(path: Any, name: str = "path") -> str | None:
    """Normalises an optional path: "" and None are returned unchanged."""
    return path if path is None or (isinstance(path, str) and not path) else normalised(path, name)


def _address(text: str, scheme: str, name: str) -> str:
    rest = text[len(scheme) + 1 :]
    bucket = rest.removeprefix("//").partition("/")[0]
    if scheme not in ("gs", "gcs"):
        raise UserError(f"{name} {text} is on {scheme}://; give a local path or a gs:// address")
    if not rest.strip("/"):
        raise UserError(f"{name} {text} names no bucket; give gs://BUCKET/PATH")
    if not rest.startswith("//"):
        raise UserError(
            f"{name} {text} is a mangled address; give {_meant('gs:', rest)} as str, since pathlib.Path drops a slash"
        )
    if not bucket:
        raise UserError(f"{name} {text} names no bucket; give gs://BUCKET/PATH, such as {_meant('gs:', rest)}")
    if not text.startswith("gs://"):
        raise UserError(f"{name} {text} is not a known address; give {_meant('gs:', rest)}")
    return text.rstrip("/")


def _meant(scheme: str, rest: str) -> str:
    return f"{scheme.lower()}//{rest.lstrip('/')}"


def _of_file_address(text: str, name: str) -> str:
    rest = text[len("file:") :]
    host, slash, tail = rest.removeprefix("//").partition("/")
    if not slash or (host and (host.lower() != "localhost" or not rest.startswith("//"))):
        raise UserError(f"{name} {text} is not the address of a local file; give its path, or file:///PATH")
    return "/" + urllib.parse.unquote(tail.lstrip("/"))


def _at_home(text: str, name: str) -> str:
    expanded = os.path.expanduser(text)
    if expanded == text and not os.path.lexists(text):
        user, _, _ = text.partition("/")
        raise UserError(f"{name} {text} names unknown user {user.removeprefix('~')!r}; give another path, or ./{text}")
    return expanded
