"""A program of test_lock.py: the lock of a folder in a bucket."""

import dataclasses
import os
import time

from etils import epath

from marjax import lock, storage
from marjax.errors import UserError

lock._PATIENCE, lock._POLL, lock._REFRESH, lock._STALE = 0.1, 0.02, 0.1, 0.5
storage.check("gs://bucket/run")
folder = epath.Path("gs://bucket/run")
with lock.locked_folder(folder, "marjax train") as descriptor:
    assert descriptor is None
    first = (folder / lock.NAME).read_bytes()
    time.sleep(0.5)
    assert (folder / lock.NAME).read_bytes() != first  # refreshed
    try:
        with lock.locked_folder(folder, "other"):
            raise AssertionError
    except UserError as error:
        assert f"process {os.getpid()}" in str(error)
assert not (folder / lock.NAME).exists()
holder = dataclasses.replace(lock._Holder.here("marjax train"), boot="another", host="far")
(folder / lock.NAME).write_bytes(holder.to_bytes())
with lock.locked_folder(folder, "marjax train"):
    parsed = lock._Holder.parse((folder / lock.NAME).read_bytes())
    assert parsed and parsed.host != "far"
cell = lock._Object(folder / lock.NAME)
version = cell.write(b"a", None)
assert version and cell.write(b"b", None) is None and cell.write(b"b", "7777") is None
assert cell.read() == (b"a", version) and cell.write(b"b", version) not in (None, version)
print("all is well")
