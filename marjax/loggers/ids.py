"""The run ids of services, kept in the work directory so that a resumed run continues the same one."""

import json
import os
from typing import Any

from etils import epath

from marjax import progress
from marjax.errors import UserError
from marjax.files import write_bytes
from marjax.json_file import read_json

FILE = "loggers.json"


def read_id(workdir: str | os.PathLike[str], service: str) -> str | None:
    """The id that `keep_id` stored; None if there is no valid one."""
    found = _read(workdir).get(service)
    usable = (
        isinstance(found, str)
        and 0 < len(found) <= 64
        and all(each.isascii() and (each.isalnum() or each in "-_") for each in found)
    )
    return found if usable else None


def keep_id(workdir: str | os.PathLike[str], service: str, run_id: str) -> None:
    """Stores the run id of a service."""
    content = {**_read(workdir), service: run_id}
    write_bytes(epath.Path(workdir) / FILE, (json.dumps(content, indent=2) + "\n").encode())


def _read(workdir: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        return read_json(epath.Path(workdir) / FILE, {str: object}, advice="delete it", missing={})
    except UserError as error:
        progress.note(f"warning: {error}; starting new runs")
        return {}
