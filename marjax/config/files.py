"""Config files: Python files with `get_config(arg)`, given by path or, if they come with marjax, by name.

The shipped configs are in the folder configs/ of a clone, and in marjax/configs of a wheel.
"""

import contextlib
import functools
import importlib.machinery
import importlib.util
import os
import pathlib
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from marjax.config.overrides import conform, sections, unknown_key
from marjax.errors import TrainingError, UserError, closest, first_line
from marjax.paths import normalised
from marjax.ranges import shown
from marjax.values import parse_value

METAVAR = "NAME[:ARG]|FILE.py[:ARG]"  # what `--config` takes

_FILE = re.compile(r"(.*?\.py)(?::(.*))?", re.DOTALL)  # a folder may have a colon in its name
_NAME = re.compile(r"([\w-]+)(?::(.*))?", re.DOTALL)
_DOCUMENTED = re.compile(r"(?:\./)?configs/([\w-]+)\.py")  # how a clone's own files are named in its root folder


def parse_arg(arg: str | None, **spec: Any) -> ConfigDict:
    """Parses a config file's argument, "name=value,flag"; see `parse_value` for values.

    Args:
      arg: what follows the colon in `NAME:ARG`; None or "" for all defaults.
      **spec: name=default, whose type (bool, int, float or str) is the argument's; or a tuple of the allowed strings,
        the default first.

    Raises:
      UserError: an unknown name, or an invalid value.
    """
    values = {name: default[0] if isinstance(default, tuple) else default for name, default in spec.items()}
    for part in filter(None, (each.strip() for each in (arg or "").split(","))):
        name, has_value, text = part.partition("=")
        name = name.rstrip()
        if name not in spec:
            raise UserError(f"unknown config argument {name!r}{closest(name, spec)}; there are: {', '.join(spec)}")
        if not has_value:
            if not isinstance(spec[name], bool):
                raise UserError(f"config argument {name!r} needs a value: {name}=...")
            text = "true"
        if isinstance(spec[name], tuple):
            text = parse_value(name, text, str)
            if text not in spec[name]:
                raise UserError(
                    f"config argument {name}={text!r}{closest(text, spec[name])}; use one of {', '.join(spec[name])}"
                )
            values[name] = text
        else:
            values[name] = parse_value(name, text, type(spec[name]))
    return ConfigDict(values)


def load(path: str | os.PathLike[str]) -> ConfigDict:
    """The config of "NAME", "NAME:ARG", "FILE.py" or "FILE.py:ARG", not yet resolved; NAME is one of `shipped_names()`.

    Raises:
      UserError: no such name or file, a file without `get_config`, an error in it, or a config whose fields are not
        those of `base()`.
    """
    file, arg = _locate(path)
    function = load_function(file, "config", "get_config")
    with errors_of(file, "config"):
        config = function(arg or None)
    if not isinstance(config, ConfigDict):
        raise UserError(f"get_config of {file!r} returned {type(config).__name__}, not a ConfigDict")
    try:
        return conform(config)
    except UserError as error:
        raise UserError(f"get_config of {file!r}: {error}") from None


@functools.cache
def _folder() -> pathlib.Path:
    package = pathlib.Path(__file__).resolve().parent.parent
    return next(
        (path for path in (package / "configs", package.parent / "configs") if path.is_dir()), package / "configs"
    )


def shipped_names() -> list[str]:
    """The names of the shipped configs, sorted; none if the folder cannot be read."""
    try:
        return sorted(path.stem for path in _folder().glob("*.py"))
    except OSError:  # `--help` lists them; a command that needs one reports the error
        return []


def _locate(given: str | os.PathLike[str]) -> tuple[str, str | None]:
    """The file and the argument of "NAME", "NAME:ARG", "FILE.py" or "FILE.py:ARG".

    An existing FILE.py comes first. `configs/NAME.py`, if there is no such file, means the shipped config NAME; a line
    on stderr reports it.

    Raises:
      UserError: no such file or name, or not a path; names the closest shipped config.
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
    close = closest(pathlib.PurePath(file).stem, shipped_names())
    raise UserError(f"{problem}{close}; give {METAVAR}, where NAME is one of {', '.join(shipped_names())}")


def _path(name: str) -> str:
    return str(_folder() / f"{name}.py")


class _FreshLoader(importlib.machinery.SourceFileLoader):
    """Compiles the file every time, and writes no bytecode.

    Python recognises stale bytecode by size and whole seconds, so it could run the old version of a file just changed.
    """

    def get_code(self, fullname: str) -> types.CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def load_function(file: str, kind: str, name: str) -> Callable[..., Any]:
    """A function from a user's Python file.

    Args:
      file: path of the file.
      kind: of file, for errors, such as "config".
      name: of the function.

    Raises:
      UserError: no such file, no such function, or an error in the file.
    """
    if not os.path.isfile(file):
        raise UserError(f"{kind} file {file!r} does not exist; give a Python file with {name}")
    module_name = f"marjax_{kind}_file"
    loader = _FreshLoader(module_name, file)
    spec = importlib.util.spec_from_file_location(module_name, file, loader=loader)
    if not file.endswith(".py") or spec is None:
        raise UserError(f"{kind} file {file!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickle look it up
    with errors_of(file, kind):
        loader.exec_module(module)
    if not hasattr(module, name):
        raise UserError(f"{kind} file {file!r} has no {name}")
    return getattr(module, name)


@contextlib.contextmanager
def errors_of(file: str, kind: str) -> Iterator[None]:
    """Turns any error of a user's file (see `load_function`) into a UserError of one line, with its line number."""
    try:
        yield
    except (UserError, TrainingError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        frames = list(traceback.walk_tb(error.__traceback__))
        lines = [line for frame, line in frames if frame.f_code.co_filename == file]
        if isinstance(error, SyntaxError) and error.filename == file:
            lines = [error.lineno or 1]
        where = f"{kind} file {file!r}" + (f", line {lines[-1]}" if lines else "")
        raise UserError(f"{where}: {_of_config(error, frames) or _first_line(error)}") from error


def _of_config(error: Exception | SystemExit, frames: Sequence[tuple[types.FrameType, int]]) -> str | None:
    """The message if a ConfigDict refused a field or a value; None for any other error."""
    for frame, _ in reversed(frames):
        section = frame.f_locals.get("self")
        key = frame.f_locals.get("key", frame.f_locals.get("attribute"))
        if isinstance(section, ConfigDict) and isinstance(key, str):
            names = set(section)
            prefix = next((f"{name}." for name, fields in sections().items() if name and fields == names), "")
            if isinstance(error, KeyError | AttributeError) and key not in section:
                return str(unknown_key(prefix + key))
            return f"config.{prefix}{key}: {_first_line(error)}"
    return None


def _first_line(error: Exception | SystemExit) -> str:
    return f"{type(error).__name__}: {first_line(error, '')[:300]}".removesuffix(": ")
