"""Exceptions that the command line prints as one line, without a traceback, and the exit codes of commands.

Other codes are 0, 1 (a failed run) and 2 (a user error). A launcher restarts the same command after any of the codes
below except 130; GKE's xpk treats 42 and 127 to 255 as retriable.
"""

import difflib
from collections.abc import Iterable, Sequence

PREEMPTED = 42  # stopped by SIGTERM, after saving
INTERRUPTED = 130  # stopped by Ctrl-C; a training run saves first
LOST_PEER = 134  # another process of the run died; the code of an abort, as after JAX's watchdog
LOST_STORAGE = 200  # gs:// does not answer, or denies access to a checkpoint


class UserError(ValueError):
    """Invalid input: one line with what is wrong, what was expected and how to fix it."""

    code = 2


def missing_extra(what: str, extra: str) -> UserError:
    """The error about missing packages of an extra."""
    return UserError(f"{what} needs the {extra} extra: pip install 'marjax[{extra}]'")


class TrainingError(RuntimeError):
    """A run that cannot continue, not because of invalid input."""

    code = 1


class LostPeerError(TrainingError):
    """Another process of the run died or never started; the same command resumes."""

    code = LOST_PEER


class StorageError(TrainingError):
    """The storage does not answer, despite retries; the same command resumes."""

    code = LOST_STORAGE


class PreemptedError(RuntimeError):
    """A run stopped by a preemption notice, after saving; the same command resumes it."""

    code = PREEMPTED
    cause = "preempted"


class InterruptedRunError(PreemptedError):
    """A run stopped by Ctrl-C, after saving."""

    code = INTERRUPTED
    cause = "interrupted"


def causes(error: BaseException) -> list[BaseException]:
    """An exception and its causes, the root cause last."""
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in chain:
        chain.append(following)
        following = following.__cause__ or following.__context__
    return chain


def one_line(text: str) -> str:
    """The text with control characters, including line breaks, as escapes."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def first_line(error: BaseException, empty: str | None = None) -> str:
    """The first line of an error's text; `empty` if there is none, by default the name of its type."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__ if empty is None else empty


def shortened(text: str, length: int = 60) -> str:
    """A foreign text for an error message: one short line without control characters."""
    return one_line(text[:length] + "..." * (len(text) > length))


def close_names(name: str, names: Iterable[str], most: int = 1, least: float = 0.5) -> list[str]:
    """Up to `most` names whose similarity to `name` is at least `least`, of 1, the closest first."""
    return difflib.get_close_matches(name[:100], list(names), most, least)


def closest(name: str, names: Iterable[str]) -> str:
    """ "; the closest is 'x'" for an error about an unknown name; "" if no known name is close.

    Case is ignored. Where no dotted name is close, their last parts are compared.
    """
    name = name[:100].strip().casefold()
    known = {each.casefold(): each for each in sorted(names, key=lambda each: -each.count("."))}
    leaves = {key.rsplit(".", 1)[-1]: each for key, each in known.items()}  # of equal ones, the least nested
    match = [known[each] for each in close_names(name, known)]
    match = match or [leaves[each] for each in close_names(name.rsplit(".", 1)[-1], leaves, least=0.6)]
    return f"; the closest is {match[0]!r}" if match else ""


def listed(texts: Sequence[str], most: int = 20, between: str = ", ") -> str:
    """The first `most` of the texts, on one line."""
    return between.join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")
