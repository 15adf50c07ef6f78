"""The `marjax` command. It only parses: each command is a function that a notebook can call."""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from marjax import commands, failures, storage
from marjax.errors import INTERRUPTED, PreemptedError, TrainingError, UserError, one_line
from marjax.interrupts import never_lost
from marjax.paths import normalised

# Arguments that are paths; those that may have an ARG after a colon (`--config`) are left to `config.load`.
PATHS = {"checkpoint", "extractor_path", "file", "hlo", "imagenet", "images", "inception", "init_from", "npz", "out",
         "path", "reference", "root", "tokenizer", "tokenizer_path", "workdir"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command, and returns the exit code.

    0 on success, 2 after a user error, 1 for a run that cannot go on, 130 on Ctrl-C (training has saved, unless it was
    pressed twice); after 42 (preempted, and saved),
    134 (another process of the run was lost) and 200 (gs:// does not answer) the same command goes on.
    """
    parser = _parser()
    given, rest = parser.parse_known_args(argv)
    failure: BaseException | None = None
    failures.quiet_interpreter()
    try:
        overrides = parse_overrides(rest)
        command = commands.load(given.command)
        if overrides and not command.TAKES_OVERRIDES:
            raise UserError(f"{given.command} takes no --config.key=value: the config is in the work directory")
        for name in PATHS & vars(given).keys():
            value = getattr(given, name)
            if value is not None:
                setattr(given, name, [normalised(each, f"--{name}") for each in value] if isinstance(value, list)
                        else normalised(value, f"--{name}"))
        for path in (*vars(given).values(), *overrides.values()):
            if isinstance(path, str) and path.startswith("gs://"):
                storage.check(path)
        with never_lost():
            if command.TAKES_OVERRIDES:
                command.run(given, overrides)
            else:
                command.run(given)
        code = 0
    except PreemptedError as error:
        print(f"marjax {given.command}: {error.cause}: {one_line(str(error))}", file=sys.stderr)
        code = error.code
    except (UserError, TrainingError) as error:
        print(f"marjax {given.command}: error: {one_line(str(error))}", file=sys.stderr)
        code, failure = error.code, error
    except KeyboardInterrupt as error:
        print(f"marjax {given.command}: interrupted; run the same command again", file=sys.stderr)
        code, failure = INTERRUPTED, error
    except BrokenPipeError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code, failure = 1, error
    except Exception as error:
        told = storage.explain(error) or failures.explain(error)
        if told is not None:
            print(f"marjax {given.command}: error: {one_line(str(told))}", file=sys.stderr)
        if told is None or failures.TRACEBACK in os.environ:
            traceback.print_exc()
        code = 1 if told is None else told.code
        failure = error
    if "marjax.distributed" in sys.modules:  # else the command has not touched a device
        from marjax import distributed

        return distributed.end(code, failure)
    return code


def parse_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """{"train.lr": "1e-3"} from ["--config.train.lr=1e-3"] or ["--config.train.lr", "1e-3"].

    Raises:
      UserError: anything else.
    """
    overrides: dict[str, str] = {}
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if not argument.startswith("--config."):
            raise UserError(f"unknown argument {argument!r}; single config fields are set by --config.key=value")
        key, has_value, value = argument.removeprefix("--config.").partition("=")
        if not has_value:
            if not remaining or remaining[0].startswith("--"):
                raise UserError(f"{argument} needs a value: {argument}=...")
            value = remaining.pop(0)
        overrides[key] = value
    return overrides


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="marjax", description="Autoregressive image generation with continuous "
                                     "tokens. See README.md.", allow_abbrev=False)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name in (*commands.NAMES, *commands.HIDDEN):
        command = commands.load(name)
        text: dict[str, Any] = {} if name in commands.HIDDEN else {"help": command.HELP}
        sub = subparsers.add_parser(
            name, **text, description=command.HELP, allow_abbrev=False,
            epilog="--config.key=value sets a field of the config." if command.TAKES_OVERRIDES else None)
        command.add_arguments(sub)
    return parser
