"""Arguments that several commands share, and how they are parsed."""

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from marjax import config as config_lib
from marjax.config import shipped
from marjax.errors import UserError
from marjax.ranges import MAX_INT, shown

# Fields of config.sample that `marjax sample` takes.
SAMPLE_FIELDS = {"num_iter": int, "num_sampling_steps": str, "cfg": float, "cfg_schedule": str, "temperature": float,
                  "confidence_order": str, "choice_temperature": float, "batch_size": int}


# Those that `marjax evaluate` takes lists of: all that alter an image.
EVALUATE_FIELDS = tuple(name for name in SAMPLE_FIELDS if name != "batch_size")


def add_config(parser: argparse.ArgumentParser, *flags: str, required: bool = True, what: str = "the config") -> None:
    """Adds `--config`, or those flags; `what` says in the help what is taken from the config."""
    parser.add_argument(*(flags or ("--config",)), required=required, metavar=shipped.METAVAR,
                        help=f"{what}: one that comes with marjax ({', '.join(shipped.names())}) or a Python file; ARG "
                        f"is the config's own arguments, such as mnist:variant=ar")


def parse_labels(text: str) -> list[int]:
    """[0, 1, 2, 7] from "0-2,7"; "none" is [-1], no class.

    Raises:
      UserError: anything else.
    """
    if text == "none":
        return [-1]
    labels: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not _is_class(first) or (dash and not _is_class(last)):
            raise UserError(f"labels {shown(text)}: give classes such as 0-9 or 1,5,7, or 'none'")
        numbers = range(int(first), int(last if dash else first) + 1)
        if not numbers:
            raise UserError(f"labels {text!r}: {part} runs backwards")
        labels += numbers
    return labels


def _is_class(text: str) -> bool:
    return text.isdecimal() and len(text) <= 7  # no more than can be listed


def join(given: argparse.Namespace, stops_at_steps: bool = False) -> None:
    """Connects this process to the others of its run, if there are any, and says who they are.

    What only differs in where files are on a host need not be the same; `marjax train` looks at its config itself.
    """
    import jax

    from marjax import distributed

    distributed.start(stops_at_steps=stops_at_steps)
    if jax.distributed.is_initialized() and jax.process_count() > 1 and given.command != "train":
        from marjax import sharding

        line = distributed.check(sharding.make_mesh(), {"command": given.command})
        if jax.process_index() == 0:
            print(line, file=sys.stderr)


def parse_range(text: str) -> tuple[int, int]:
    """(10, 15) from "10:15". Raises UserError: anything else."""
    first, _, last = text.partition(":")
    few = len(text) <= 30  # digits: Python does not read numbers of thousands
    if not (few and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last) <= MAX_INT):
        raise UserError(f"--profile {shown(text)}: give the first and the last step, such as 10:15")
    return int(first), int(last)


def load_config(path: str, overrides: Mapping[str, Any]) -> ConfigDict:
    """The resolved config of `--config` and `--config.key=value`. User errors are reported before JAX starts."""
    return config_lib.resolve(config_lib.apply_overrides(config_lib.load(path), overrides))
