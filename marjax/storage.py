"""Object store addresses (`gs://bucket/path`): checked before any work, with failures reported in one line.

Paths are read and written through `etils.epath`, which reaches gs:// through gcsfs (the `gcs` extra); checkpoint arrays
go through TensorStore's own client. An object store has no folders: an empty one does not exist, and `mkdir` does
nothing. Objects are written atomically, without renaming.
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

_TIMEOUT = 120.0  # seconds; the client itself gives up earlier and gives a reason
_LOG_AFTER = 5.0  # seconds


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is an address such as gs://bucket/run instead of a local path."""
    return "://" in os.fspath(path)


def check(path: str | os.PathLike[str]) -> None:
    """Checks that an address can be reached, with one request per bucket; local paths pass.

    Raises:
      UserError: the address is not gs://, no client is installed, or the bucket does not answer, does not exist or
        may not be read with the current credentials.
    """
    text = os.fspath(path)
    if not is_remote(text):
        return
    scheme, _, rest = text.partition("://")
    if scheme != "gs":
        raise UserError(f"{text} is on {scheme}://; give a local path or a gs:// address")
    bucket = rest.partition("/")[0]
    if not bucket:
        raise UserError(f"{text} names no bucket; give gs://BUCKET/PATH")
    # etils would use TensorFlow where it is installed, which allocates the accelerators on first use.
    os.environ.setdefault("EPATH_USE_TF", "false")
    if os.environ["EPATH_USE_TF"].lower() in ("false", "no", "f", "0") and not importlib.util.find_spec("gcsfs"):
        raise missing_extra(text, "gcs")
    failure = _reach(bucket)
    if failure is not None:
        raise UserError(f"{text}: {failure}")


def on_this_machine(path: str | os.PathLike[str], what: str) -> None:
    """Raises UserError if a path is an address: the library that reads it supports only local files."""
    if is_remote(path):
        raise UserError(
            f"{what} {os.fspath(path)} must be a local path; copy it to a disk of every host "
            f"(gcloud storage cp -r), or mount the bucket with gcsfuse, and give that folder"
        )


def children(folder: epath.Path) -> list[epath.Path]:
    """The contents of a folder; [] if it does not exist, as an empty one on an object store."""
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def explain(error: BaseException) -> UserError | TrainingError | None:
    """The error to report for a failure of the object store or its clients; None for any other error.

    Covers missing packages, expired credentials and lost networks; the clients have retried by then. A StorageError is
    returned unchanged.
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

    # gcsfs logs tracebacks of what it raises, and one warning per call about buckets whose type it cannot determine.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    waiting = threading.Timer(_LOG_AFTER, lambda: print(f"waiting for gs://{bucket} ...", file=sys.stderr, flush=True))
    waiting.daemon = True
    waiting.start()
    try:
        client = fsspec.filesystem("gcs", finalize_on_close=True)  # the same client as etils uses
        client.dircache.use_listings_cache = False  # to see what other processes write
        sync(client.loop, client._call, "GET", "b/{}/o", bucket, maxResults=1, json_out=True, timeout=_TIMEOUT)
    except FileNotFoundError:
        return f"bucket {bucket!r} does not exist or you may not see it; create it, or check the name"
    except fsspec.FSTimeoutError:
        return f"no answer within {_TIMEOUT:.0f} s; check the network"
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        return reason
    finally:
        waiting.cancel()
    return None


def _reason(error: BaseException) -> str | None:
    """What failed in gcsfs, aiohttp, google.auth, google.cloud or TensorStore, and how to fix it."""
    text = " ".join(str(error).split())[:200]
    package = type(error).__module__.partition(".")[0]
    code: Any = getattr(error, "code", None)
    login = (
        "run `gcloud auth application-default login`, or give the machine a service account that may read and write "
        "the bucket"
    )
    if package == "google" or (package == "gcsfs" and str(code) in ("401", "403")):
        return f"the credentials are missing or refused ({text}); {login}"
    if isinstance(error, OSError) and text.startswith("Forbidden"):
        return f"the credentials do not allow it ({text}); {login}"
    if package == "aiohttp":
        return f"it cannot be reached ({text}); check the network"
    if package in ("gcsfs", "requests"):
        return f"it answers {text or type(error).__name__}"
    if "gcs" in text.lower() and text.startswith(("UNAUTHENTICATED", "PERMISSION_DENIED")):
        return f"the credentials do not allow it ({text}); {login}"
    if "gcs" in text.lower() and text.startswith(("UNAVAILABLE", "DEADLINE_EXCEEDED")):
        return text
    return None
