"""Tolerant command lines, and one-line errors about mistakes in them.

argparse does the parsing. Before that, `read` accepts dashes for underscores in flags and blanks around "=", separates
config fields, and reports mistakes that argparse does not explain.
"""

import argparse
import itertools
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from marjax.errors import UserError, close_names, closest, shortened
from marjax.values import parse_value

FIELD = "--config."  # prefix of flags that set a config field
_DASHES = "-‐‑‒–—―−﹣-"  # web pages and word processors replace hyphens by these
_NUMBER = re.compile(r"-\.?\d.*")  # a value, not a flag
_ASSIGNMENT = re.compile(r"(config\.)?([a-z_]\w*(\.\w+)*)=(.*)", re.DOTALL)
# Suffixes that mark a file where a folder is expected.
_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".webp", ".gif", ".svg", ".pdf"),
    *(".npz", ".npy", ".json", ".csv", ".md", ".txt", ".safetensors", ".zip", ".tar"),
)
# Preferred sections for a field name that several sections have.
_SECTIONS = {
    "train-tokenizer": ("tokenizer.train.", "tokenizer."),
    "stats": ("eval.", "data."),
    "train-classifier": ("data.", "eval."),
    "cache-latents": ("data.", "tokenizer."),
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserErrors and parses numbers as the config does.

    Attributes:
      example: a valid command line.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"allow_abbrev": False} | kwargs)
        self.example = ""
        for kind in (int, float):
            self.register("type", kind, _number(kind))

    def error(self, message: str) -> NoReturn:
        """Raises argparse's error as a UserError that tells what to type."""
        if found := re.fullmatch(r"the following arguments are required: (.*)", message):
            raise UserError(f"{found[1].replace(', ', ' and ')} missing; for example: {self.example}")
        if found := re.fullmatch(r"argument (\S+): expected (one|at least one) argument", message):
            raise UserError(f"{found[1]} needs a value; for example: {self.example}")
        if found := re.fullmatch(r"argument (\S+): invalid choice: (.*) \(choose from (.*)\)", message, re.DOTALL):
            choices = found[3].replace("'", "").split(", ")
            given = found[2].strip("'\"")
            raise UserError(
                f"{found[1]} is {shortened(found[2])}{closest(given, choices)}; give one of {', '.join(choices)}"
            )
        raise UserError(re.sub(r"^argument (\S+): =", r"\1=", message))


def _number(kind: type) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return parse_value("", text, kind)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def check_command(arguments: Sequence[str], names: Sequence[str], options: Sequence[str]) -> None:
    """Raises UserError if the first argument is neither a command nor an option of `marjax`."""
    given = arguments[0]
    if given in names:
        return
    if given[:1] and given[0] in _DASHES:
        if found := [each for each in arguments if each in names]:
            raise UserError(f"the command must precede its arguments; write marjax {found[0]} {given} ...")
        close = closest("--" + _plain(given), options)
        raise UserError(f"unknown argument {shortened(repr(given))}{close}; marjax --help lists the commands")
    name = given.lower().replace("_", "-")
    match = [each for each in names if len(name) > 1 and each.startswith(name)]
    raise UserError(f"unknown command {shortened(repr(given))}{closest(name, match or names)}; marjax --help lists all")


def read(
    arguments: Sequence[str], command: str, parser: Parser, *, takes_fields: bool
) -> tuple[list[str], dict[str, str]]:
    """Returns a command's arguments for argparse, and the config fields that they set.

    Args:
      arguments: arguments after the command's name.
      command: the command's name.
      parser: the command's parser.
      takes_fields: whether the command takes --config.key=value.

    Raises:
      UserError: an unknown flag, an unexpected word, or a value that the shell has split.
    """
    reader = _Reader(command, parser, takes_fields)
    if {"-h", "--help"} & set(arguments):
        return ["--help"], {}
    _check_split(arguments, reader)
    kept, fields, words = list[str](), dict[str, str](), 0
    most_words = sum(not action.option_strings for action in parser._actions)
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if argument.startswith(FIELD):
            if not takes_fields:
                raise reader.unwanted_field(argument)
            key, value = take_field(argument, remaining)
            fields[key] = value
        elif not is_flag(argument):
            words += 1
            if words > most_words:
                raise reader.unexpected(argument, kept)
            kept.append(argument)
        else:
            flag, has_value, value = argument.partition("=")
            action = reader.find(flag)
            if action is None and kept and (before := reader.find(kept[-1])) is not None and before.nargs != 0:
                raise UserError(
                    f"{kept[-1]} needs a value; if it starts with a dash, write {kept[-1]}="
                    f"{shlex.quote(shortened(argument))}"
                )
            if action is None:
                raise reader.unknown(argument, remaining)
            if action.nargs == 0:
                kept.append(action.option_strings[-1] + has_value + value)
                continue
            if not has_value and remaining and remaining[0].startswith("="):  # "--flag = value", "--flag =value"
                value = remaining.pop(0)[1:]
                has_value = "="
            if has_value and not value and not most_words and remaining and not is_flag(remaining[0]):
                value = remaining.pop(0)
            if has_value:
                reader.check_value(action, value)
                kept.append(f"{action.option_strings[-1]}={value}")
                continue
            if remaining:
                reader.check_value(action, remaining[0])
            kept.append(action.option_strings[-1])
            while remaining and not is_flag(remaining[0]):
                kept.append(remaining.pop(0))
                if action.nargs != "+":
                    break
    return kept, fields


def take_field(argument: str, remaining: list[str]) -> tuple[str, str]:
    """Returns key and value of an argument that starts with FIELD; the value may be the next argument.

    Raises:
      UserError: no value.
    """
    key, has_value, value = argument.removeprefix(FIELD).partition("=")
    if not has_value and remaining and remaining[0].startswith("="):
        has_value, value = "=", remaining.pop(0)[1:]
    if not value and remaining and not is_flag(remaining[0]):
        has_value, value = "=", remaining.pop(0)
    if not has_value:
        raise UserError(f"{argument} needs a value; write {argument}=...")
    return key, value


def is_flag(argument: str) -> bool:
    """Whether an argument starts like a flag, with any kind of dash."""
    return len(argument) > 1 and argument[0] in _DASHES and not _NUMBER.fullmatch(argument)


def _check_split(arguments: Sequence[str], reader: "_Reader") -> None:
    """Raises UserError if the shell has split a value at a blank next to a comma."""
    for index, (first, second) in enumerate(itertools.pairwise(arguments)):
        if is_flag(second) or (is_flag(first) and "=" not in first):
            continue
        if first.endswith(",") or second.startswith(","):
            start = index if is_flag(first) or not index else index - 1
            end = index + 1
            while (
                end + 1 < len(arguments)
                and not is_flag(arguments[end + 1])
                and (arguments[end].endswith(",") or arguments[end + 1].startswith(","))
            ):
                end += 1
            flag, values = arguments[start].partition("=")[0], "".join(arguments[index : end + 1])
            action = reader.find(flag)
            if action is not None and action.nargs == "+":
                values, advice = values.replace(",", " "), "separate the values only by blanks"
            else:
                advice = "remove the blank next to the comma, or quote the value"
            meant = values if start == index else f"{flag} {values}"
            raise UserError(
                f"{shortened(repr(first))} and {shortened(repr(second))} are two arguments; {advice}: "
                f"{shortened(meant, 200)}"
            )


class _Reader:
    """Finds a command's flags and config fields, and explains mistakes."""

    def __init__(self, command: str, parser: Parser, takes_fields: bool) -> None:
        self._command, self._takes_fields = command, takes_fields
        self._actions: Mapping[str, argparse.Action] = {
            option: action for action in parser._actions for option in action.option_strings
        }
        self._required = [action for action in parser._actions if action.required and action.option_strings]

    def find(self, flag: str) -> argparse.Action | None:
        """Returns the action of a flag, with dashes or underscores in its name; None if there is none."""
        for spelling in (flag, "--" + flag[2:].replace("-", "_"), "--" + flag[2:].replace("_", "-")):
            if flag.startswith("-") and spelling in self._actions:
                return self._actions[spelling]
        return None

    def check_value(self, action: argparse.Action, value: str) -> None:
        """Raises UserError if --config has a config field, or --out a file for a folder or vice versa."""
        if action.dest == "out":
            _check_out(value, str(action.metavar).split("|"))
        found = _ASSIGNMENT.fullmatch(value) if self._takes_fields and "--config" in action.option_strings else None
        if found and (field := self._field(found[2], exact=True)):
            raise UserError(f"--config takes a file, not a field; add {field}={shortened(found[4], 200)} to it")

    def unwanted_field(self, argument: str) -> UserError:
        """Returns the error about a config field for a command that takes none."""
        field, _, value = argument.removeprefix(FIELD).partition("=")
        option = "--" + field.rpartition(".")[2]
        has = f"; give {option}={shortened(value, 200)}" if option in self._actions else ""
        where = ", since the config is in the work directory" if "--workdir" in self._actions else ""
        return UserError(f"{self._command} takes no {FIELD}key=value{where}{has}")

    def unexpected(self, word: str, kept: Sequence[str]) -> UserError:
        """Returns the error about a word that belongs to no flag."""
        if (found := _ASSIGNMENT.fullmatch(word)) and (self._takes_fields or f"--{found[2]}" in self._actions):
            return self.unknown(f"--{found[2]}={found[4]}", [], shown=word)
        given = {each.partition("=")[0] for each in kept}
        missing = [action.option_strings[-1] for action in self._required if not given & {*action.option_strings}]
        advice = f"write {missing[0]} {shortened(shlex.quote(word), 200)}" if missing else self._help()
        return UserError(f"unexpected argument {shortened(repr(word))}; {advice}")

    def unknown(self, argument: str, remaining: Sequence[str], shown: str = "") -> UserError:
        """Returns the error about an unknown flag."""
        flag, has_value, value = argument.partition("=")
        if not has_value and remaining and not is_flag(remaining[0]):
            has_value, value = "=", remaining[0]
        what = f"unknown argument {shortened(repr(shown or flag))}"
        name = flag.lstrip(_DASHES).lower()
        name = "".join("_" if character in _DASHES else character for character in name)
        if name == "config" and "--config" not in self._actions and "--workdir" in self._actions:
            return UserError(f"{what}, since the config is in the work directory; {self._help()}")
        options = {_plain(option): option for option in self._actions if option.startswith("--")}
        meant = options.get(_plain(name)) or self._field(name, exact=True)
        if meant is None:
            close = close_names(_plain(name), options, least=0.6)
            meant = options[close[0]] if close else self._field(name, exact=False)
        if meant is None:
            single = f"; {FIELD}key=value sets a config field" if self._takes_fields else ""
            return UserError(f"{what}{single}; {self._help()}")
        if meant.startswith(FIELD):
            return UserError(f"{what}; write {meant}={shortened(value, 200) if has_value else '...'}")
        return UserError(f"{what}; the closest is {meant}; {self._help()}")

    def _field(self, name: str, exact: bool) -> str | None:
        """Returns the flag that sets the field of that name, with or without its section."""
        if not self._takes_fields:
            return None
        from marjax.config.overrides import known_fields

        first = _SECTIONS.get(self._command, ("train.", "model.", "data.", "sample."))
        fields = sorted(
            known_fields(),
            key=lambda key: (
                next((rank for rank, section in enumerate(first) if key.startswith(section)), len(first)),
                key.count("."),
            ),
        )
        key = name.removeprefix("config.")
        names = {_plain(each): each for each in reversed(fields)} | {
            _plain(each.rpartition(".")[2]): each for each in reversed(fields)
        }
        match = [_plain(key)] if exact and _plain(key) in names else []
        if not exact:
            match = close_names(_plain(key), names, least=0.7)
        return FIELD + names[match[0]] if match else None

    def _help(self) -> str:
        return f"marjax {self._command} --help lists all"


def _check_out(path: str, kinds: Sequence[str]) -> None:
    """Raises UserError if `path` is a file where a folder is expected, or vice versa; `kinds` is the metavar, split."""
    suffix = os.path.splitext(path)[1].lower()
    folder, is_file = "DIR" in kinds, os.path.isfile(path)
    if folder and not os.path.isdir(path) and f"FILE{suffix}" not in kinds and (is_file or suffix in _SUFFIXES):
        others = "".join(f", or {kind}" for kind in kinds if kind != "DIR")
        meant = path.removesuffix(suffix) if suffix in _SUFFIXES else f"{path}_out"
        raise UserError(
            f"--out {path} is {'a file' if is_file else 'a file name'}; give a folder, such as "
            f"{shlex.quote(meant)}{others}"
        )
    if kinds[0].startswith("FILE") and (os.path.isdir(path) or path.endswith("/")):
        meant = os.path.join(path, f"NAME{os.path.splitext(kinds[0])[1]}")
        raise UserError(f"--out {path} is a folder; give a file, such as {shlex.quote(meant)}")


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character not in f"{_DASHES}_")
