"""The configs that come with marjax: the folder configs/ of a clone, marjax/configs in a wheel."""

import functools
import os
import pathlib
import re
import sys

from marjax.errors import UserError, closest
from marjax.paths import normalised
from marjax.ranges import shown

METAVAR = "NAME[:ARG]|FILE.py[:ARG]"  # what `--config` takes

_FILE = re.compile(r"(.*?\.py)(?::(.*))?", re.DOTALL)  # a folder may have a colon in its name
_NAME = re.compile(r"([\w-]+)(?::(.*))?", re.DOTALL)
_DOCUMENTED = re.compile(r"(?:\./)?configs/([\w-]+)\.py")  # how a clone's own files are named in its root folder


@functools.cache
def folder() -> pathlib.Path:
    """Where the shipped configs are."""
    package = pathlib.Path(__file__).resolve().parent.parent
    return next(
        (path for path in (package / "configs", package.parent / "configs") if path.is_dir()), package / "configs"
    )


def names() -> list[str]:
    """The names that `--config` takes for the shipped configs, sorted; none if the folder cannot be read."""
    try:
        return sorted(path.stem for path in folder().glob("*.py"))
    except OSError:  # `--help` lists them; a command that needs one says what is wrong
        return []


def locate(given: str | os.PathLike[str]) -> tuple[str, str | None]:
    """The file and the argument of "NAME", "NAME:ARG", "FILE.py" or "FILE.py:ARG".

    A FILE.py that exists is used. `configs/NAME.py` where there is no such file is the shipped config of that name, and
    a line on stderr says so.

    Raises:
      UserError: no such file, no such name, or no path; it names the closest shipped config.
    """
    text = os.fspath(given) if isinstance(given, os.PathLike) else given
    if not isinstance(text, str):
        text = normalised(text, "config file")
    in_file, by_name = _FILE.fullmatch(text), _NAME.fullmatch(text)
    if in_file and os.path.isfile(normalised(in_file[1], "config file")):
        return normalised(in_file[1], "config file"), in_file[2]
    if by_name and os.path.isfile(_path(by_name[1])):
        return _path(by_name[1]), by_name[2]
    file, arg = normalised(text, "config file"), None  # a mangled address is no name
    if (form := in_file or by_name) is not None:
        file, arg = normalised(form[1], "config file"), form[2]
    if (documented := _DOCUMENTED.fullmatch(file)) is not None and os.path.isfile(_path(documented[1])):
        print(
            f"marjax: there is no {file} here: using the config {documented[1]!r} that comes with marjax",
            file=sys.stderr,
        )
        return _path(documented[1]), arg
    if os.path.exists(file):
        problem = f"config file {file!r} is not a Python file"
    elif _NAME.fullmatch(file):
        problem = f"there is no config {shown(file)}"
    else:
        problem = f"config file {file!r} does not exist"
    close = closest(pathlib.PurePath(file).stem, names())
    raise UserError(f"{problem}{close}; give {METAVAR}, where NAME is one of {', '.join(names())}")


def _path(name: str) -> str:
    return str(folder() / f"{name}.py")
