"""The exceptions that the command line prints as one line, without a traceback, and the codes it ends with.

Beside these are 0, 1 (a run that cannot go on) and 2 (a user error). A launcher starts the same command again after any
of those below but 130; GKE's xpk calls 42 and all from 127 to 255 retriable.
"""

import difflib
from collections.abc import Iterable, Sequence

PREEMPTED = 42  # asked to stop by SIGTERM, and saved
INTERRUPTED = 130  # Ctrl-C; of a training run, once it has saved
LOST_PEER = 134  # another process of the run has gone; an abort, as JAX's own watchdog ends a process
LOST_STORAGE = 200  # gs:// does not answer, or a checkpoint may not be read


class UserError(ValueError):
    """Says what was given, what was expected and what to do, in one sentence or two."""

    code = 2


def missing_extra(what: str, extra: str) -> UserError:
    """The error of what needs packages that only an extra of marjax installs; with the command that does it."""
    return UserError(f"{what} needs the {extra} extra: pip install 'marjax[{extra}]'")


class TrainingError(RuntimeError):
    """A run that cannot go on through no slip of the user's; the command line prints it as one line too."""

    code = 1


class LostPeerError(TrainingError):
    """Another process of the run has gone, or did not come; the same command goes on."""

    code = LOST_PEER


class StorageError(TrainingError):
    """The storage does not answer, and its clients have tried again; the same command goes on."""

    code = LOST_STORAGE


class PreemptedError(RuntimeError):
    """A run that was asked to stop and has saved; the same command resumes it."""

    code = PREEMPTED
    cause = "preempted"


class InterruptedRunError(PreemptedError):
    """The same, after Ctrl-C."""

    code = INTERRUPTED
    cause = "interrupted"


def causes(error: BaseException) -> list[BaseException]:
    """An exception and what it came from, the root cause last."""
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in chain:
        chain.append(following)
        following = following.__cause__ or following.__context__
    return chain


def one_line(text: str) -> str:
    """The text with its control characters, line breaks among them, written as escapes."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def first_line(error: BaseException, empty: str | None = None) -> str:
    """The first line of an error's text; where it has none, `empty`, by default the name of its type."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__ if empty is None else empty


def shortened(text: str, length: int = 60) -> str:
    """A foreign text for an error message: on one line, without control characters, and short."""
    return one_line(text[:length] + "..." * (len(text) > length))


def closest(name: str, names: Iterable[str]) -> str:
    """ "; the closest is 'x'" for an error about an unknown name; "" if no known name is close.

    Case is ignored. Where no dotted name is close, their last parts are compared.
    """
    name = name[:100].strip().casefold()
    known = {each.casefold(): each for each in sorted(names, key=lambda each: -each.count("."))}
    leaves = {key.rsplit(".", 1)[-1]: each for key, each in known.items()}  # of equal ones, the least nested
    match = [known[each] for each in difflib.get_close_matches(name, known, 1, 0.5)]
    match = match or [leaves[each] for each in difflib.get_close_matches(name.rsplit(".", 1)[-1], leaves, 1, 0.6)]
    return f"; the closest is {match[0]!r}" if match else ""


def listed(texts: Sequence[str], most: int = 20, between: str = ", ") -> str:
    """The first `most` of the texts, on one line."""
    return between.join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")
