"""The `marjax` command. It only parses: each command is a function that a notebook can call."""

import argparse
import importlib.metadata
import os
import platform
import sys
import textwrap
import traceback
from collections.abc import Sequence
from typing import Any

from marjax import __version__, commands, failures, progress, storage
from marjax.command_line import Parser, check_command, read
from marjax.completion import SHELLS, PrintCompletion
from marjax.errors import INTERRUPTED, PreemptedError, TrainingError, UserError, one_line
from marjax.interrupts import never_lost
from marjax.paths import normalised

# Arguments that are paths; those that may have an ARG after a colon (`--config`) are left to `config.load`.
PATHS = {
    "checkpoint",
    "extractor_path",
    "file",
    "hlo",
    "imagenet",
    "images",
    "inception",
    "init_from",
    "npz",
    "out",
    "path",
    "statistics",
    "root",
    "tokenizer",
    "tokenizer_path",
    "workdir",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command, and returns the exit code.

    0 on success, 2 after a user error, 1 for a run that cannot go on, 130 on Ctrl-C (training has saved, unless it was
    pressed twice); after 42 (preempted, and saved),
    134 (another process of the run was lost) and 200 (gs:// does not answer) the same command goes on.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments in (["-h"], ["--help"], ["help"]):
        _parser().print_help()
        return 0
    if arguments[0] == "help":
        arguments = [*arguments[1:2], "--help"]
    known = bool(arguments) and arguments[0] in (*commands.NAMES, *commands.HIDDEN)
    name = arguments[0] if known else ""
    program = f"marjax {name}".rstrip()
    failure: BaseException | None = None
    failures.quiet_interpreter()
    try:
        given, overrides = parse(arguments)
        command = commands.load(given.command)
        for flag in PATHS & vars(given).keys():
            value = getattr(given, flag)
            if value is not None:
                setattr(
                    given,
                    flag,
                    [normalised(each, f"--{flag}") for each in value]
                    if isinstance(value, list)
                    else normalised(value, f"--{flag}"),
                )
        for path in (*vars(given).values(), *overrides.values()):
            if isinstance(path, str) and path.startswith("gs://"):
                storage.check(path)
        with never_lost(), progress.command(program):
            if command.TAKES_OVERRIDES:
                command.run(given, overrides)
            else:
                command.run(given)
        code = 0
    except PreemptedError as error:
        print(f"{program}: {error.cause}: {one_line(str(error))}", file=sys.stderr)
        code = error.code
    except (UserError, TrainingError) as error:
        print(f"{program}: error: {one_line(str(error))}", file=sys.stderr)
        code, failure = error.code, error
    except KeyboardInterrupt as error:
        print(f"{program}: interrupted; run the same command again", file=sys.stderr)
        code, failure = INTERRUPTED, error
    except BrokenPipeError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code, failure = 1, error
    except Exception as error:
        explained = storage.explain(error) or failures.explain(error, name)
        if explained is not None:
            print(f"{program}: error: {one_line(str(explained))}", file=sys.stderr)
        if explained is None or failures.TRACEBACK in os.environ:
            traceback.print_exc()
        code = 1 if explained is None else explained.code
        failure = error
    if "marjax.distributed" in sys.modules:  # else the command has not touched a device
        from marjax import distributed

        return distributed.end(code, failure)
    return code


class _Version(argparse.Action):
    """Prints one line of versions, without starting JAX; their files are read only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        jax = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "flax"))
        print(f"marjax {__version__} (Python {platform.python_version()}, {jax})")
        parser.exit()


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """The parsed arguments, `command` among them, and the fields of the config. Raises UserError."""
    name, *rest = arguments
    if name not in (*commands.NAMES, *commands.HIDDEN):
        whole = _parser()
        options = [option for action in whole._actions for option in action.option_strings]
        if name in options:
            whole.parse_args(arguments)  # which prints something, and exits
        check_command(arguments, commands.NAMES, options)
    parser, command = Parser(prog=f"marjax {name}"), commands.load(name)  # the other commands are not even imported
    _describe(parser, command)
    kept, overrides = read(rest, name, parser, takes_fields=command.TAKES_OVERRIDES)
    return parser.parse_args(kept, argparse.Namespace(command=name)), overrides


def _parser() -> Parser:
    """The parser of all commands, for help and completion."""
    parser = Parser(
        prog="marjax",
        description="Autoregressive image generation with continuous tokens. See README.md.",
        epilog="marjax COMMAND --help lists the arguments of a command, with an example. To begin, two "
        "minutes on a laptop: marjax train --config digits --workdir runs/digits",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the versions of marjax, Python and JAX")
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=SHELLS,
        metavar="SHELL",
        help=f'print the completion script of {", ".join(SHELLS)}: eval "$(marjax --print-completion '
        f'bash)" in ~/.bashrc',
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name in (*commands.NAMES, *commands.HIDDEN):
        command = commands.load(name)
        text: dict[str, Any] = {} if name in commands.HIDDEN else {"help": command.HELP}
        _describe(subparsers.add_parser(name, **text), command)
    return parser


def _describe(parser: Parser, command: commands.Command) -> None:
    """Adds a command's arguments and help."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.example = textwrap.fill(command.HELP, 100), command.EXAMPLE
    parser.epilog = f"example: {command.EXAMPLE}"
    if command.TAKES_OVERRIDES:
        parser.epilog += "\n--config.key=value sets a field of the config."
    command.add_arguments(parser)
