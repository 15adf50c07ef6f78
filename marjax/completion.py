"""Shell completion of `marjax`: a static script, so that completion does not start Python."""

import argparse
from typing import Any

from marjax.config.files import shipped_names

SHELLS = ("bash", "zsh", "tcsh")
# Shell function that completes shipped configs and files; "_file" in its name tells shtab that it completes paths.
_CONFIGS = "_marjax_config_files"


class PrintCompletion(argparse.Action):
    """Action of --print-completion: prints the script for a shell and exits."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        print(script(parser, values))
        parser.exit()


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Returns the completion script of a parser with subcommands, for one of SHELLS."""
    import shtab

    complete: Any = shtab.complete
    for sub in next(each for each in parser._actions if isinstance(each, argparse._SubParsersAction)).choices.values():
        for action in sub._actions:
            kinds = str(action.metavar).split("|")
            if action.dest in ("config", "dataset"):
                vars(action)["complete"] = {"bash": _CONFIGS, "zsh": _CONFIGS, "tcsh": "f"}
            elif action.dest == "workdir" or kinds in (["DIR"], ["WORKDIR"]):
                vars(action)["complete"] = shtab.DIRECTORY
            elif action.dest.endswith("_path") or any(each.startswith(("DIR", "FILE", "TAR")) for each in kinds):
                vars(action)["complete"] = shtab.FILE
    names = shipped_names()
    words, lines = " ".join(names), "\\n".join(names)  # some versions of bash split only at line breaks
    preamble = {
        "bash": f'{_CONFIGS}() {{\n  compgen -W $\'{lines}\' -- "$1"\n  compgen -f -- "$1"\n}}\n',
        "zsh": f"{_CONFIGS}() {{\n  _alternative 'configs:config:({words})' 'files:file:_files'\n}}\n",
    }.get(shell, "")
    return str(complete(parser, shell, preamble=preamble))
