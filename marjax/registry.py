"""Heads, backbones, tokenizers and data sources from outside marjax, by name.

`register` adds one from Python. Installed packages add theirs by entry points. The environment variable MARJAX_PLUGINS
names Python files or modules to import, which call `register`. Nothing else is imported: a config or work directory can
name only what the user registered, installed or listed.
"""

import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from marjax.errors import TrainingError, UserError, closest, first_line, shortened

PLUGINS = "MARJAX_PLUGINS"

# Required attributes of each kind, documented in heads/protocol.py, models/protocol.py, tokenizers/protocol.py and
# data/source.py. A source is an opened data set or a function that opens it.
KINDS: dict[str, tuple[str, ...]] = {
    "head": ("from_config", "draw_loss_noise", "__call__", "draw_sample_noise", "sample"),
    "backbone": ("from_config", "draw_num_known", "__call__", "init_cache", "step"),
    "tokenizer": ("from_config", "stride"),
    "source": (),
}
ORDERS = ("raster", "random")  # token orders that a backbone may use
_MAX_NAME = 64

V = TypeVar("V")

_registered: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
_builtin: dict[str, set[str]] = {
    "tokenizer": {"pixels", "codebook", "kl", "kl8", "kl16", "vq", "vq16", "vq_continuous", "vq16_continuous"},
    "source": {"digits", "mnist", "tfds", "python"},
}
_loaded: set[str] = set()  # entries of MARJAX_PLUGINS


def register(kind: str, name: str, thing: Any) -> None:
    """Makes a head, backbone, tokenizer or data source available to configs by name.

    Call it wherever the name is used: in the config file, in a module that MARJAX_PLUGINS names, or through an entry
    point of an installed package (group `marjax.heads`, `marjax.backbones`, `marjax.tokenizers` or `marjax.sources`).
    docs/extending.md has an example of each kind. Registering the same class again replaces it.

    Args:
      kind: "head" (chosen by `config.model.head`), "backbone" (`config.model.variant`), "tokenizer"
        (`config.tokenizer.name`) or "source" (`config.data.source`).
      name: letters, digits, "_", "-" and ".", at most 64.
      thing: a class with the methods of the kind's protocol; for a source, the data (as `marjax.train` takes them), or
        a function that returns them, given `config.data`.

    Raises:
      UserError: the kind is unknown, the name invalid or taken, or the object lacks a method of its kind.
    """
    if kind not in KINDS:
        raise UserError(f"register: kind is {shortened(repr(kind))}; give one of {', '.join(KINDS)}")
    if (
        not isinstance(name, str)
        or not 1 <= len(name) <= _MAX_NAME
        or not all(each.isascii() and (each.isalnum() or each in "_-.") for each in name)
    ):
        raise UserError(
            f"register: name is {shortened(repr(name))}, expected 1 to {_MAX_NAME} letters, digits, '_', '-' or '.'"
        )
    if name in _builtin.get(kind, ()):
        raise UserError(f"register: the {kind} {name!r} is built into marjax; choose another name")
    _check(kind, name, thing)
    before = _registered[kind].get(name)
    if before is not None and not _same(before, thing):
        raise UserError(
            f"register: the {kind} {name!r} is already registered as {_described(before)}; choose another name for "
            f"{_described(thing)}"
        )
    _registered[kind][name] = thing


def find(kind: str, name: str) -> Any:
    """The object registered, listed in MARJAX_PLUGINS or installed under a name; None if there is none.

    Raises:
      UserError: it cannot be imported, lacks a method, or two installed packages provide the name.
    """
    if name not in _registered[kind]:
        _load_plugins()
    if name not in _registered[kind]:
        found = [point for point in _entry_points(kind) if point.name == name]
        if len({point.value for point in found}) > 1:
            raise UserError(
                f"the {kind} {name!r} is provided by {' and by '.join(sorted(p.value for p in found))}; uninstall one"
            )
        if found:
            try:
                thing = found[0].load()
            except Exception as error:
                raise UserError(
                    f"the {kind} {name!r} of {found[0].value} cannot be imported ({type(error).__name__}: "
                    f"{first_line(error, '')}); repair or uninstall its package"
                ) from error
            if name not in _registered[kind]:  # its import may have registered it
                register(kind, name, thing)
    return _registered[kind].get(name)


def names(kind: str) -> list[str]:
    """The names that `find` knows, without importing installed packages."""
    _load_plugins()
    return sorted({*_registered[kind], *(point.name for point in _entry_points(kind))})


def unknown(kind: str, name: str, known: Iterator[str] | Mapping[str, Any] | list[str]) -> str:
    """The end of an error about an unknown name: the known ones, and how to add one."""
    listed = list(known)
    return (
        f"give one of {', '.join(listed)}{closest(name, listed)}; or register your own {kind}: "
        f"marjax.register({kind!r}, {shortened(name)!r}, ...) before this, or {PLUGINS}=FILE.py with the file that "
        f"calls it"
    )


class Choices(Mapping[str, V]):
    """The built-in and registered values of one kind, by name."""

    def __init__(self, kind: str, builtin: Mapping[str, V], convert: Callable[[str, Any], V]) -> None:
        """Args:
        kind: a key of KINDS.
        builtin: built-in values; their names cannot be registered.
        convert: makes the value from a registered name and object.
        """
        self.kind = kind
        self._own, self._convert = builtin, convert
        _builtin.setdefault(kind, set()).update(builtin)

    def __getitem__(self, name: str) -> V:
        if name in self._own:
            return self._own[name]
        thing = find(self.kind, name) if isinstance(name, str) else None
        if thing is None:
            raise KeyError(name)
        return self._convert(name, thing)

    def __iter__(self) -> Iterator[str]:
        yield from self._own
        yield from names(self.kind)

    def __len__(self) -> int:
        return len(self._own) + len(names(self.kind))

    def is_own(self, name: str) -> bool:
        """Whether a name is built into marjax."""
        return name in self._own


def _entry_points(kind: str) -> list[importlib.metadata.EntryPoint]:
    return [
        point
        for point in importlib.metadata.entry_points(group=f"marjax.{kind}s")
        if point.name not in _builtin.get(kind, ())
    ]


def _load_plugins() -> None:
    for entry in filter(None, (part.strip() for part in os.environ.get(PLUGINS, "").split(","))):
        if entry in _loaded:
            continue
        _loaded.add(entry)
        try:
            if entry.endswith(".py"):
                _import_file(os.path.expanduser(entry))
            else:
                importlib.import_module(entry)
        except (UserError, TrainingError, MemoryError):
            _loaded.discard(entry)
            raise
        except Exception as error:
            _loaded.discard(entry)  # so that a notebook gets this error again instead of an unknown name
            raise UserError(
                f"{PLUGINS}: {entry} cannot be imported ({type(error).__name__}: {first_line(error, '')}); give "
                f"Python files or installed modules, separated by commas"
            ) from error


def _import_file(path: str) -> None:
    name = f"marjax_plugin_{os.path.basename(path).removesuffix('.py')}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # as dataclasses and pickle expect
    spec.loader.exec_module(module)


def _check(kind: str, name: str, thing: Any) -> None:
    if kind != "source" and not isinstance(thing, type):
        raise UserError(f"register: the {kind} {name!r} is {_described(thing)}; give a class")
    missing = [
        method
        for method in KINDS[kind]
        if getattr(thing, method, None) is None
        or (method == "__call__" and not any("__call__" in vars(base) for base in thing.__mro__))
    ]
    if missing:
        raise UserError(
            f"register: {_described(thing)} has no {', '.join(missing)}, which a {kind} needs; see docs/extending.md"
        )
    if kind == "backbone" and (order := getattr(thing, "order", "random")) not in ORDERS:
        raise UserError(
            f"register: {_described(thing)} has order {shortened(repr(order))}; give one of {', '.join(ORDERS)}"
        )
    if kind == "source" and not callable(thing) and not hasattr(thing, "__getitem__"):
        raise UserError(
            f"register: the source {name!r} is {_described(thing)}; give (images, labels), an object with "
            f"__len__ and __getitem__, or a function that returns one"
        )


def _described(thing: Any) -> str:
    if not hasattr(thing, "__qualname__"):
        return f"an object of type {type(thing).__name__}"
    return f"{thing.__module__}.{thing.__qualname__}"


def _same(one: Any, other: Any) -> bool:
    """Whether an object replaces another: the same code, imported or run again."""
    if _described(one) == _described(other):
        return True
    names = [getattr(each, "__qualname__", None) for each in (one, other)]
    return names[0] is not None and names[0] == names[1] and _files(one) & _files(other) != set()


def _files(thing: Any) -> set[str]:
    """The files that define its functions."""
    functions = [thing, *vars(thing).values()] if isinstance(thing, type) else [thing]
    plain = [inspect.unwrap(each) for each in (getattr(each, "__func__", each) for each in functions) if callable(each)]
    codes = [getattr(each, "__code__", None) for each in plain]
    return {code.co_filename for code in codes if code is not None}
