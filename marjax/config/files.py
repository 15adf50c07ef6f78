"""Config files: Python files with `get_config(arg)`, and their arguments."""

import contextlib
import importlib.machinery
import importlib.util
import os
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from marjax.config import shipped
from marjax.config.overrides import conform, sections, unknown_key
from marjax.errors import TrainingError, UserError, closest
from marjax.values import parse_value


def parse_arg(arg: str | None, **spec: Any) -> ConfigDict:
    """A config file's argument, "name=value,flag", typed by its defaults; values are written as `parse_value` says.

    Args:
      arg: what follows the colon in `NAME:ARG`; None or "" for all defaults.
      **spec: name=default of type bool, int, float or str; or a tuple of the allowed strings, the default first.

    Raises:
      UserError: an unknown name or a value of the wrong type or not among the allowed.
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
                    f"config argument {name}={text!r}{closest(text, spec[name])}; give one of {', '.join(spec[name])}"
                )
            values[name] = text
        else:
            values[name] = parse_value(name, text, type(spec[name]))
    return ConfigDict(values)


def load(path: str | os.PathLike[str]) -> ConfigDict:
    """The config of "NAME", "NAME:ARG", "FILE.py" or "FILE.py:ARG", not yet resolved; NAME is one of `shipped.names()`.

    Raises:
      UserError: no such name or file, a file without `get_config`, an error in it, or a config that has other fields
        than `base()`.
    """
    file, arg = shipped.locate(path)
    function = load_function(file, "config", "get_config")
    with errors_of(file, "config"):
        config = function(arg or None)
    if not isinstance(config, ConfigDict):
        raise UserError(f"get_config of {file!r} returned {type(config).__name__}, not a ConfigDict")
    try:
        return conform(config)
    except UserError as error:
        raise UserError(f"get_config of {file!r}: {error}") from None


class _AsItIs(importlib.machinery.SourceFileLoader):
    """Compiles the file every time and writes nothing beside it.

    What Python keeps compiled is told apart by size and whole seconds: a file that was just changed could be the old.
    """

    def get_code(self, fullname: str) -> types.CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def load_function(file: str, kind: str, name: str) -> Callable[..., Any]:
    """The function of that name in a Python file that is no module of ours; `kind` says in errors what file it is.

    Raises:
      UserError: no such file, one without that function, or an error in it.
    """
    if not os.path.isfile(file):
        raise UserError(f"{kind} file {file!r} does not exist: give a Python file with {name}")
    module_name = f"marjax_{kind}_file"
    loader = _AsItIs(module_name, file)
    spec = importlib.util.spec_from_file_location(module_name, file, loader=loader)
    if not file.endswith(".py") or spec is None:
        raise UserError(f"{kind} file {file!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # as dataclasses and pickle expect of a module
    with errors_of(file, kind):
        loader.exec_module(module)
    if not hasattr(module, name):
        raise UserError(f"{kind} file {file!r} has no {name}")
    return getattr(module, name)


@contextlib.contextmanager
def errors_of(file: str, kind: str) -> Iterator[None]:
    """Makes one line with the line's number of whatever the code of a user's file raises; see `load_function`.

    Raises:
      UserError: with the original error as its cause.
    """
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
    """What to report if a config refused a field or a value; None if it did not."""
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
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
