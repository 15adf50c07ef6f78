"""Paths as users write them, understood in the same way everywhere.

`normalised` is called where a path comes in: for the arguments of commands in `cli.py`, for the config's fields in
`config.resolve`, and on entry to the functions that take paths. What lies below takes the result.
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
_LOST_SLASH = re.compile(rf"(?:^|/)((?:{'|'.join(_SCHEMES)}):)/+", re.IGNORECASE)  # as pathlib.Path writes an address


def normalised(path: Any, name: str = "path") -> str:
    """A local path, or a gs:// address, without a slash at its end.

    `~` and `~user` become home folders, file:// addresses local paths. A relative path stays one: it is relative to the
    current folder.

    Args:
      path: str or os.PathLike.
      name: what it is, for errors.

    Raises:
      UserError: it is empty or no path, an address that is mangled (gs:/bucket) or of a storage that is not supported,
        or the home folder of a user who does not exist.
    """
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(text, str):
        raise UserError(f"{name} is {shown(path)}: expected a path as text or os.PathLike")
    if not text:
        raise UserError(f"{name} is empty: give a path")
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise UserError(f"{name} is {shown(text)}, which is no text that a path can be: give another") from None
    if "\0" in text:
        raise UserError(f"{name} is {shown(text)}: a path has no null character")
    if (found := _ADDRESS.match(text)) is not None:
        scheme = (found[1] or found[2]).lower()
        if scheme != "file":
            return _address(text, scheme, name)
        text = _of_file_address(text, name)
    elif (lost := _LOST_SLASH.search(text)) is not None:  # made absolute, too
        raise UserError(
            f"{name} {text} is a mangled address: give {_meant(lost[1], text[lost.end() :])} as text, since "
            f"pathlib.Path loses a slash"
        )
    if text.startswith("~"):
        text = _at_home(text, name)
    encoded = os.fsencode(text)
    if len(encoded) > _MAX_PATH or any(len(part) > _MAX_NAME for part in encoded.split(b"/")):
        raise UserError(f"{name} {shown(text)} is longer than a path can be: give another")
    return text.rstrip("/") or "/"


def takes_paths(*names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a function whose arguments of these names are paths, or lists of paths: it gets them normalised.

    An argument with a default may be None or "", for no path.
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
    """The same, of a path that may be left out: "" and None are returned as they are."""
    return path if path is None or (isinstance(path, str) and not path) else normalised(path, name)


def _address(text: str, scheme: str, name: str) -> str:
    rest = text[len(scheme) + 1 :]
    bucket = rest.removeprefix("//").partition("/")[0]
    if scheme not in ("gs", "gcs"):
        raise UserError(f"{name} {text} is on {scheme}://: give a local path or a gs:// address")
    if not rest.strip("/"):
        raise UserError(f"{name} {text} names no bucket: give gs://BUCKET/PATH")
    if not rest.startswith("//"):
        raise UserError(
            f"{name} {text} is a mangled address: give {_meant('gs:', rest)} as text, since pathlib.Path loses a slash"
        )
    if not bucket:
        raise UserError(f"{name} {text} names no bucket: give gs://BUCKET/PATH, such as {_meant('gs:', rest)}")
    if not text.startswith("gs://"):
        raise UserError(f"{name} {text} is no address that is known: give {_meant('gs:', rest)}")
    return text.rstrip("/")


def _meant(scheme: str, rest: str) -> str:
    return f"{scheme.lower()}//{rest.lstrip('/')}"


def _of_file_address(text: str, name: str) -> str:
    rest = text[len("file:") :]
    host, slash, tail = rest.removeprefix("//").partition("/")
    if not slash or (host and (host.lower() != "localhost" or not rest.startswith("//"))):
        raise UserError(f"{name} {text} is no address of a local file: give its path, or file:///PATH")
    return "/" + urllib.parse.unquote(tail.lstrip("/"))


def _at_home(text: str, name: str) -> str:
    expanded = os.path.expanduser(text)
    if expanded == text and not os.path.lexists(text):
        user, _, _ = text.partition("/")
        raise UserError(f"{name} {text}: there is no user {user.removeprefix('~')!r}; give another path, or ./{text}")
    return expanded
