"""The `marjax` command: parses the command line, runs a command of `marjax.commands` and reports errors."""

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

# Arguments that are paths; `config.load` handles those with an optional ARG after a colon (`--config`).
PATHS = {
    *("checkpoint", "extractor_path", "file", "hlo", "imagenet", "images", "inception", "init_from"),
    *("npz", "out", "path", "statistics", "root", "tokenizer", "tokenizer_path", "workdir"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command, and returns the exit code.

    0 on success, 2 after a user error, 1 for a run that cannot continue, 130 on Ctrl-C (training has saved, unless it
    was pressed twice). After 42 (preempted after saving), 134 (another process of the run was lost) and 200 (gs:// does
    not answer), the same command resumes.
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
        args, overrides = parse(arguments)
        command = commands.load(args.command)
        args.overrides = overrides
        for flag in PATHS & vars(args).keys():
            match getattr(args, flag):
                case list() as values:
                    setattr(args, flag, [normalised(each, f"--{flag}") for each in values])
                case str() as value:
                    setattr(args, flag, normalised(value, f"--{flag}"))
        for path in (*vars(args).values(), *overrides.values()):
            if isinstance(path, str) and path.startswith("gs://"):
                storage.check(path)
        with never_lost(), progress.command(program):
            command.run(args)
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
    if "marjax.distributed" in sys.modules:  # otherwise the command has not used a device
        from marjax import distributed

        return distributed.end(code, failure)
    return code


class _Version(argparse.Action):
    """Prints one line of versions, without importing JAX."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        jax = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "flax"))
        print(f"marjax {__version__} (Python {platform.python_version()}, {jax})")
        parser.exit()


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """Returns the arguments, including `command`, and the overridden config fields. Raises UserError."""
    name, *rest = arguments
    if name not in (*commands.NAMES, *commands.HIDDEN):
        parser = _parser()
        options = [option for action in parser._actions for option in action.option_strings]
        if name in options:
            parser.parse_args(arguments)  # prints and exits
        check_command(arguments, commands.NAMES, options)
    parser, command = Parser(prog=f"marjax {name}"), commands.load(name)  # without importing the other commands
    _describe(parser, command)
    kept, overrides = read(rest, name, parser, takes_fields=command.TAKES_OVERRIDES)
    return parser.parse_args(kept, argparse.Namespace(command=name)), overrides


def _parser() -> Parser:
    """Returns the parser of all commands, for help and completion."""
    parser = Parser(
        prog="marjax",
        description="Autoregressive image generation with continuous tokens. See README.md.",
        epilog="marjax COMMAND --help lists the arguments of a command, with an example. A first run takes two minutes "
        "on a laptop: marjax train --config digits --workdir runs/digits",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the versions of marjax, Python and JAX")
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=SHELLS,
        metavar="SHELL",
        help=f'print the completion script for {", ".join(SHELLS)}; for bash, add eval "$(marjax --print-completion '
        f'bash)" to ~/.bashrc',
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
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
