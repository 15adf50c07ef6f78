"""`evaluation.json`: what was measured of a work directory, an entry for each setting."""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from marjax.errors import UserError
from marjax.evaluation.metrics import names
from marjax.files import write_bytes
from marjax.json_file import read_json

RECORD = "evaluation.json"
FORMAT = 1
_ADVICE = "measure again with another --out, or move it away"
_NETWORK = {"name": str, "checksum": str}
_SHAPE = {
    "format": {FORMAT},
    "results": [
        {  # the format first: what a later one says of its entries is not known here
            "identity?": str,
            "settings": {"num_images": range(1 << 53), str: (float, bool, str, None)},
            "metrics": {str: (float, None)},
            "seconds_per_image": (float, None),
            "samples?": (str, None),
            "extractor": _NETWORK,
            "statistics?": _NETWORK,
            "reference?": _NETWORK,  # the same, in older records
        }
    ],
}


def read_record(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The entries of a record, none if there is no such file; numbers may be infinite or not a number.

    Raises:
      UserError: it cannot be read, or is of another format.
      StorageError: gs:// does not answer.
    """
    found = read_json(path, _SHAPE, advice=_ADVICE, missing={"results": []}, allow_nan=True)
    return [_updated(each, path) for each in found["results"]]


def _updated(entry: dict[str, Any], path: str | os.PathLike[str]) -> dict[str, Any]:
    """An entry under today's names: older records have "reference", and call all distances FID."""
    entry = dict(entry)
    if "reference" in entry:
        entry["statistics"] = entry.pop("reference")
    if "statistics" not in entry:
        raise UserError(f"{os.fspath(path)}: an entry has no statistics; {_ADVICE}")
    return entry | {"metrics": names.of_extractor(entry["metrics"], entry["extractor"]["name"])}


class Record:
    """The entries of a file, which other commands may add to meanwhile."""

    def __init__(self, path: epath.Path) -> None:
        """Reads them. Raises UserError, StorageError as `read_record` does."""
        self.path = path
        self.results = read_record(path)

    def find(self, identity: Mapping[str, Any]) -> dict[str, Any] | None:
        """The entry of the same samples measured the same way."""
        return next((entry for entry in self.results if entry.get("identity") == _digest(identity)), None)

    def put(self, identity: Mapping[str, Any], entry: dict[str, Any], write: bool) -> None:
        """Adds an entry, in place of one of the same; every host knows it then, and one of them writes."""
        entry["identity"] = _digest(identity)
        if write:
            self.results = read_record(self.path)  # which another command may have added to
        self.results = [each for each in self.results if each.get("identity") != entry["identity"]] + [entry]
        if write:
            write_bytes(self.path, (json.dumps({"format": FORMAT, "results": self.results}, indent=1) + "\n").encode())


def _digest(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
