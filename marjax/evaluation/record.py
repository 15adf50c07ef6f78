"""`evaluation.json`: the metrics of a work directory, one entry per setting."""

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
# The fields of config.sample that change images.
SETTINGS = (
    "num_iter",
    "num_sampling_steps",
    "cfg",
    "cfg_schedule",
    "temperature",
    "confidence_order",
    "choice_temperature",
)
_ADVICE = "evaluate with another --out or move it away"
_NETWORK = {"name": str, "checksum": str}
_SHAPE = {
    "format": {FORMAT},
    "results": [
        {
            "identity?": str,
            "settings": {"num_images": range(1 << 53), str: (float, bool, str, None)},
            "metrics": {str: (float, None)},
            "seconds_per_image": (float, None),
            "samples?": (str, None),
            "extractor": _NETWORK,
            "statistics?": _NETWORK,
            "reference?": _NETWORK,  # its name in older records
        }
    ],
}


def read_record(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads the entries; [] without a file. Numbers may be infinite or NaN.

    Raises:
      UserError: the file cannot be read or has another format.
      StorageError: gs:// does not answer.
    """
    found = read_json(path, _SHAPE, advice=_ADVICE, missing={"results": []}, allow_nan=True)
    return [_updated(each, path) for each in found["results"]]


def _updated(entry: dict[str, Any], path: str | os.PathLike[str]) -> dict[str, Any]:
    """Renames the fields of older records, which have "reference" and call every distance FID."""
    entry = dict(entry)
    if "reference" in entry:
        entry["statistics"] = entry.pop("reference")
    if "statistics" not in entry:
        raise UserError(f"{os.fspath(path)}: an entry has no field statistics; {_ADVICE}")
    return entry | {"metrics": names.of_extractor(entry["metrics"], entry["extractor"]["name"])}


class Record:
    """The entries of a file to which other commands may add."""

    def __init__(self, path: epath.Path) -> None:
        """Raises UserError, StorageError: see `read_record`."""
        self.path = path
        self.results = read_record(path)

    def find(self, identity: Mapping[str, Any]) -> dict[str, Any] | None:
        """Returns the entry with this identity, or None."""
        return next((entry for entry in self.results if entry.get("identity") == _digest(identity)), None)

    def put(self, identity: Mapping[str, Any], entry: dict[str, Any], write: bool) -> None:
        """Adds or replaces an entry; every process calls this, and one of them with `write`."""
        entry["identity"] = _digest(identity)
        if write:
            self.results = read_record(self.path)  # with the entries of other commands
        self.results = [each for each in self.results if each.get("identity") != entry["identity"]] + [entry]
        if write:
            write_bytes(self.path, (json.dumps({"format": FORMAT, "results": self.results}, indent=1) + "\n").encode())


def _digest(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
