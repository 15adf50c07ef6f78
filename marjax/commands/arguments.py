"""Arguments shared by several commands, and their parsers."""

import argparse
import shlex
import sys
from collections.abc import Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from marjax import class_names
from marjax import config as config_lib
from marjax.commands.next_step import config_arguments
from marjax.config.files import METAVAR, shipped_names
from marjax.errors import UserError
from marjax.ranges import MAX_INT, shown
from marjax.values import unquoted
from marjax.workdir import read_workdir

# Fields of config.sample that `marjax sample` accepts.
SAMPLE_FIELDS = {
    "num_iter": int,
    "num_sampling_steps": str,
    "cfg": float,
    "cfg_schedule": str,
    "temperature": float,
    "confidence_order": str,
    "choice_temperature": float,
    "batch_size": int,
}


def add_config(parser: argparse.ArgumentParser, *flags: str, required: bool = True, what: str = "config") -> None:
    """Adds `--config`, or other `flags`; `what` starts its help."""
    parser.add_argument(
        *(flags or ("--config",)),
        required=required,
        metavar=METAVAR,
        help=f"{what}: a shipped one ({', '.join(shipped_names())}) or a Python file; ARG are its own arguments, such "
        f"as mnist:variant=ar",
    )


def parse_labels(text: str, names: class_names.Names = (), num_classes: int | None = None) -> list[int]:
    """Parses "0-2,7" as [0, 1, 2, 7], "none" as [-1] (no class), and "flower,temple" by class names.

    Args:
      text: classes as in `class_names.class_of`, and ranges of numbers, separated by commas.
      names: class names.
      num_classes: number of classes.

    Raises:
      UserError: an invalid text or an unknown class.
    """
    labels: list[int] = []
    parts = _without_brackets(text).split(",")
    commas = max((name.count(",") for name in names if name), default=0)
    while parts:
        for count in range(min(commas + 1, len(parts)), 0, -1):  # longest first: a name may contain commas
            part = ",".join(parts[:count]).strip()
            if part in names or unquoted(part) in names or count == 1:
                break
        del parts[:count]
        first, dash, last = (each.strip() for each in part.partition("-"))
        if not (dash and class_names.is_number(first) and class_names.is_number(last)) or part in names:
            labels.append(class_names.class_of(part, names, num_classes))
            continue
        numbers = range(int(first), int(last) + 1)
        if not numbers:
            raise UserError(f"labels {text!r}: the range {part} is empty; give the smaller number first")
        labels += numbers
    return labels


def join(args: argparse.Namespace, stops_at_steps: bool = False) -> None:
    """Connects this process to the others of its run, if any, and checks that all run the same command.

    Paths may differ between hosts; `marjax train` compares the configs itself.
    """
    import jax

    from marjax import distributed

    distributed.start(stops_at_steps=stops_at_steps)
    if jax.distributed.is_initialized() and jax.process_count() > 1 and args.command != "train":
        from marjax import sharding

        line = distributed.check(sharding.make_mesh(), {"command": args.command})
        if jax.process_index() == 0:
            print(line, file=sys.stderr)


def parse_range(text: str) -> tuple[int, int]:
    """Parses "10:15" as (10, 15). Raises UserError."""
    first, _, last = text.partition(":")
    few = len(text) <= 30  # Python refuses to parse numbers of thousands of digits
    if not (few and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last) <= MAX_INT):
        raise UserError(f"--profile {shown(text)} is invalid; give the first and the last step, such as 10:15")
    return int(first), int(last)


def split_list(text: str) -> list[str]:
    """Parses "1,2.9", "[1, 2.9]" or "(1, 2.9)" as ["1", "2.9"]."""
    return [unquoted(part.strip()) for part in _without_brackets(text).split(",")]


def _without_brackets(text: str) -> str:
    text = text.strip()
    return text[1:-1] if text[:1] + text[-1:] in ("[]", "()") else text


def check_files(config: ConfigDict, source: str, overrides: Mapping[str, str]) -> None:
    """Checks that the files of the tokenizer and of evaluations during training exist, which other commands make.

    Args:
      config: resolved.
      source: value of `--config`.
      overrides: overridden fields.

    Raises:
      UserError: a file is missing; the error names the command that makes it.
    """
    from marjax.evaluation.missing import check_there
    from marjax.tokenizers import AUTOENCODERS

    given = config_arguments(source, overrides)
    name, path = config.tokenizer.name, config.tokenizer.path
    own = name == "codebook" or (name in AUTOENCODERS and AUTOENCODERS[name].preset is None)
    if own and path and not epath.Path(path).exists():
        made_by = shlex.join(["marjax", "train-tokenizer", "--config", *given])
        raise UserError(f"config.tokenizer.path {path} does not exist; run {made_by}, or give another path")
    if config.eval.every:
        check_there(
            config,
            given,
            extractor=config.eval.extractor,
            extractor_path=config.eval.extractor_path,
            statistics=config.eval.statistics,
            default="runs/data",
            flag="--config.eval.",
        )


def load_config(path: str, overrides: Mapping[str, Any]) -> ConfigDict:
    """Returns the resolved config of `--config` and `--config.key=value`, without starting JAX. Raises UserError.

    Args:
      path: see `config.load`; or config.json of a work directory.
      overrides: fields to set.
    """
    folder, _, name = path.rpartition("/")
    config = read_workdir(folder or ".") if name == "config.json" else config_lib.load(path)
    return config_lib.resolve(config_lib.apply_overrides(config, overrides))
