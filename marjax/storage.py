"""Addresses on object stores (`gs://bucket/path`): checked before any work, and their failures told in one line.

Paths are read and written through `etils.epath`, which reaches gs:// through gcsfs (the `gcs` extra); the arrays of
checkpoints go through TensorStore's own client. An object store has no folders: one that is empty does not exist, and
`mkdir` does nothing. But an object is there as a whole or not at all, without renaming anything.
"""

import functools
import importlib.util
import logging
import os
import sys
import threading
from typing import Any

from etils import epath

from marjax.errors import StorageError, TrainingError, UserError, missing_extra

_PATIENCE = 120.0  # seconds; the client itself gives up before, and then says why
_SAID_AFTER = 5.0


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is an address such as gs://bucket/run, and so on no file system of this machine."""
    return "://" in os.fspath(path)


def check(path: str | os.PathLike[str]) -> None:
    """Makes sure that an address can be reached, by one request the first time a bucket is seen; local paths pass.

    Raises:
      UserError: an address of another kind than gs://, no client for it, or a bucket that does not answer, does not
        exist or may not be read with the credentials at hand.
    """
    text = os.fspath(path)
    if not is_remote(text):
        return
    scheme, _, rest = text.partition("://")
    if scheme != "gs":
        raise UserError(f"{text} is on {scheme}://: give a local path or a gs:// address")
    bucket = rest.partition("/")[0]
    if not bucket:
        raise UserError(f"{text} names no bucket: give gs://BUCKET/PATH")
    # Where TensorFlow is installed, etils would go through it, which takes the accelerators on its first use.
    os.environ.setdefault("EPATH_USE_TF", "false")
    if os.environ["EPATH_USE_TF"].lower() in ("false", "no", "f", "0") and not importlib.util.find_spec("gcsfs"):
        raise missing_extra(text, "gcs")
    failure = _reach(bucket)
    if failure is not None:
        raise UserError(f"{text}: {failure}")


def on_this_machine(path: str | os.PathLike[str], what: str) -> None:
    """Raises UserError if a path is an address: what lies there is read by a library that knows only files."""
    if is_remote(path):
        raise UserError(
            f"{what} {os.fspath(path)} is read from files alone: copy it to a disk of every host "
            f"(gcloud storage cp -r), or mount the bucket with gcsfuse, and give that folder"
        )


def children(folder: epath.Path) -> list[epath.Path]:
    """What is in a folder, none if there is no such folder, which on an object store is the same thing."""
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def explain(error: BaseException) -> UserError | TrainingError | None:
    """What to tell instead of a failure of the store's clients; None if the error is something else.

    A StorageError, which tells it already, is returned as it is. Those who have no `try` of their own around a read or
    write meet these: a missing package, credentials that ran out, a network that is gone. The clients have retried by
    then.
    """
    if isinstance(error, StorageError):
        return error
    if isinstance(error, ImportError) and "gcsfs" in str(error):
        return missing_extra("a gs:// address", "gcs")
    reason = _reason(error)
    if reason is None:
        return None
    kind = TrainingError if "the credentials" in reason else StorageError
    return kind(f"gs:// failed: {reason}. Run the same command again: it resumes from what is saved")


@functools.cache
def _reach(bucket: str) -> str | None:
    """Why a bucket cannot be listed; None if it can."""
    import fsspec
    from fsspec.asyn import sync

    # It prints tracebacks of what it then raises, and a warning a call about buckets of a kind that it cannot tell.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    waiting = threading.Timer(_SAID_AFTER, lambda: print(f"waiting for gs://{bucket} ...", file=sys.stderr, flush=True))
    waiting.daemon = True
    waiting.start()
    try:
        client = fsspec.filesystem("gcs", finalize_on_close=True)  # the one that etils makes
        client.dircache.use_listings_cache = False  # what other processes write would never be seen
        sync(client.loop, client._call, "GET", "b/{}/o", bucket, maxResults=1, json_out=True, timeout=_PATIENCE)
    except FileNotFoundError:
        return f"there is no bucket {bucket!r}, or none that you may see: make it, or check the name"
    except fsspec.FSTimeoutError:
        return f"no answer within {_PATIENCE:.0f} s: check the network"
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        return reason
    finally:
        waiting.cancel()
    return None


def _reason(error: BaseException) -> str | None:
    """What a failure of gcsfs, aiohttp, google.auth, google.cloud or TensorStore comes to, and what to do."""
    text = " ".join(str(error).split())[:200]
    package = type(error).__module__.partition(".")[0]
    code: Any = getattr(error, "code", None)
    login = (
        "run `gcloud auth application-default login`, or give the machine a service account that may read and "
        "write the bucket"
    )
    if package == "google" or (package == "gcsfs" and str(code) in ("401", "403")):
        return f"the credentials are missing or refused ({text}): {login}"
    if isinstance(error, OSError) and text.startswith("Forbidden"):
        return f"the credentials do not allow it ({text}): {login}"
    if package == "aiohttp":
        return f"it cannot be reached ({text}): check the network"
    if package in ("gcsfs", "requests"):
        return f"it answers {text or type(error).__name__}"
    if "gcs" in text.lower() and text.startswith(("UNAUTHENTICATED", "PERMISSION_DENIED")):
        return f"the credentials do not allow it ({text}): {login}"
    if "gcs" in text.lower() and text.startswith(("UNAVAILABLE", "DEADLINE_EXCEEDED")):
        return text
    return None
