"""The commands of `marjax`, one file each: `add_arguments`, and `run`, which calls the function that does the work.

Modules of the work itself are imported inside `run`, so that `--help` and user errors do not wait for JAX.
"""

import argparse
import importlib
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
HIDDEN = ("sweep-point",)  # only started by `marjax sweep`


class Command(Protocol):
    """The module of a command.

    Attributes:
      HELP: what it does, in one sentence.
      EXAMPLE: a command line with the required arguments.
      TAKES_OVERRIDES: whether it takes --config.key=value.
    """

    HELP: str
    EXAMPLE: str
    TAKES_OVERRIDES: bool

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds the command's arguments."""

    def run(self, args: argparse.Namespace) -> None:
        """Does the work and prints the result.

        Args:
          args: a value for each argument, and `overrides`, a dict of config fields, if the command takes them.

        Raises:
          UserError, TrainingError, PreemptedError: see `marjax.errors`; `cli.main` prints them in one line.
        """


def load(name: str) -> Command:
    """Imports the command of that name."""
    return cast(Command, importlib.import_module(f"{__name__}.{name.replace('-', '_')}"))
