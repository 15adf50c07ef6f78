"""Config files: Python files with `get_config(arg)`, and their arguments."""

import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from marjax.config.overrides import closest, parse_value
from marjax.errors import UserError


def parse_arg(arg: str | None, **spec: Any) -> ConfigDict:
    """A config file's argument, "name=value,flag", typed by its defaults.

    Args:
      arg: what follows the colon in `configs/x.py:arg`; None or "" for all defaults.
      **spec: name=default of type bool, int, float or str; or a tuple of the allowed strings, the default first.

    Raises:
      UserError: an unknown name or a value of the wrong type or not among the allowed.
    """
    values = {name: default[0] if isinstance(default, tuple) else default for name, default in spec.items()}
    for part in filter(None, (arg or "").split(",")):
        name, has_value, text = part.partition("=")
        if name not in spec:
            raise UserError(f"unknown config argument {name!r}{closest(name, spec)}; there are: {', '.join(spec)}")
        if not has_value:
            if not isinstance(spec[name], bool):
                raise UserError(f"config argument {name!r} needs a value: {name}=...")
            text = "true"
        if isinstance(spec[name], tuple):
            if text not in spec[name]:
                raise UserError(f"config argument {name}={text!r}: give one of {', '.join(spec[name])}")
            values[name] = text
        else:
            values[name] = parse_value(name, text, type(spec[name]))
    return ConfigDict(values)


def load(path: str) -> ConfigDict:
    """The config of "FILE.py" or "FILE.py:ARG", not yet resolved.

    Raises:
      UserError: no such file, or one without `get_config`.
    """
    file, _, arg = path.partition(":")
    config = load_function(file, "config", "get_config")(arg or None)
    if not isinstance(config, ConfigDict):
        raise UserError(f"get_config of {file!r} returned {type(config).__name__}, not a ConfigDict")
    return config


class _AsItIs(importlib.machinery.SourceFileLoader):
    """Compiles the file every time and writes nothing beside it.

    What Python keeps compiled is told apart by size and whole seconds: a file that was just changed could be the old.
    """

    def get_code(self, fullname: str) -> types.CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def load_function(file: str, kind: str, name: str) -> Callable[..., Any]:
    """The function of that name in a Python file that is no module of ours; `kind` says in errors what file it is.

    Raises:
      UserError: no such file, or one without that function.
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
    loader.exec_module(module)
    if not hasattr(module, name):
        raise UserError(f"{kind} file {file!r} has no {name}")
    return getattr(module, name)
