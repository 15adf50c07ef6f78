"""The commands of `marjax`, one file each: its arguments, and `run`, which calls the function that does the work.

Modules of the work itself are imported inside `run`, so that `--help` and user errors do not wait for JAX.
"""

import argparse
import importlib
from collections.abc import Callable
from typing import Protocol, cast

# In the order of the help; each is the module of that name, with underscores.
NAMES = (
    "train",
    "train-tokenizer",
    "tokenizer",
    "sample",
    "convert",
    "export",
    "prepare",
    "cache-latents",
    "train-classifier",
    "stats",
    "evaluate",
    "plot",
    "sweep",
    "compile",
    "benchmark",
)
HIDDEN = ("sweep-point",)  # started by `marjax sweep` alone


class Command(Protocol):
    """The module of a command.

    Attributes:
      HELP: what it does, one sentence.
      EXAMPLE: a command line with what the command needs.
      TAKES_OVERRIDES: whether it takes --config.key=value; `run` then gets those as its second argument.
      run: does the work, and prints what came of it.
    """

    HELP: str
    EXAMPLE: str
    TAKES_OVERRIDES: bool
    run: Callable[..., None]

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds the command's arguments."""


def load(name: str) -> Command:
    """The command of that name."""
    return cast(Command, importlib.import_module(f"{__name__}.{name.replace('-', '_')}"))
