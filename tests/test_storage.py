"""gs:// addresses: what is told without a client, credentials or network, and real commands on an emulator's bucket."""

import os
import pathlib
import subprocess
import sys
import threading
from http import server

import pytest
from conftest import DIGITS, ROOT
from fake_gcs import FakeGcs

from marjax import cli, storage
from marjax import config as config_lib
from marjax.errors import TrainingError, UserError

# So that nothing looks for a Google machine, whose credentials would be asked for over the network.
ALONE = {"NO_GCE_CHECK": "true", "GCE_METADATA_ROOT": "127.0.0.1:9", "GCE_METADATA_HOST": "127.0.0.1:9",
         "GCE_METADATA_IP": "127.0.0.1:9", "GCE_METADATA_TIMEOUT": "1", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
         "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any"}


def test_what_is_no_address_passes(tmp_path):
    for path in (tmp_path, str(tmp_path), "relative/x", "/gs/x"):
        storage.check(path)
        assert not storage.is_remote(path)
    assert storage.is_remote("gs://bucket/x") and storage.is_remote(storage.epath.Path("gs://bucket/x"))


@pytest.mark.parametrize(("path", "says"), [
    ("s3://bucket/x", "s3://: give a local path or a gs:// address"), ("gs://", "names no bucket"),
    ("gs:///x", "names no bucket"), ("gs://bucket/x", r"needs the gcs extra: pip install 'marjax\[gcs\]'")])
def test_addresses_that_cannot_be_used(monkeypatch, path, says):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=says):
        storage.check(path)


def test_commands_without_the_client(monkeypatch, capsys, tmp_path):
    """One line and the code of a slip, whichever argument the address is in, and before anything is made."""
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: None)
    out = str(tmp_path / "out")
    for arguments in (["train", "--config", f"{DIGITS}:debug", "--workdir", "gs://b/run"],
                      ["train", "--config", f"{DIGITS}:debug", "--workdir", out, "--config.tokenizer.path=gs://b/x"],
                      ["sample", "--workdir", "gs://b/run", "--out", out],
                      ["evaluate", "--workdir", out, "--reference", "gs://b/x.npz"],
                      ["sweep", "file.py", "--root", "gs://b/sweep"]):
        assert cli.main(arguments) == 2
        error = capsys.readouterr().err
        assert "gcs extra" in error and len(error.splitlines()) == 1
    assert not os.path.exists(out)


def test_what_array_record_cannot_read(capsys):
    """Its reader waits for ever for an address, so nothing may come that far."""
    from marjax.data.latents import read_manifest
    from marjax.data.sources import open_source

    config = config_lib.base()
    config.data.source, config.data.data_dir = "tfds:mnist", "gs://bucket/data"
    with pytest.raises(UserError, match=r"data.data_dir gs://bucket/data is read from files alone: copy it .*gcsfuse"):
        open_source(config.data)
    with pytest.raises(UserError, match="data.cache gs://bucket/cache is read from files alone"):
        read_manifest("gs://bucket/cache")


def test_failures_that_come_later_are_told(monkeypatch, capsys):
    class ClientConnectorError(OSError):
        __module__ = "aiohttp.client_exceptions"

    class HttpError(Exception):
        __module__ = "gcsfs.retry"
        code = 401

    class RefreshError(Exception):
        __module__ = "google.auth.exceptions"

    for error, kind, says in (
            (ImportError("Please install gcsfs to access Google Storage"), UserError, "gcs extra"),
            (ClientConnectorError("Cannot connect to host x"), TrainingError, "cannot be reached .*network"),
            (HttpError("Anonymous caller"), TrainingError, "application-default login"),
            (RefreshError("expired"), TrainingError, "application-default login"),
            (OSError("Forbidden: b/x\nno storage.objects.create"), TrainingError, "do not allow it .*objects.create")):
        told = storage.explain(error)
        assert type(told) is kind
        with pytest.raises(kind, match=says):
            raise told
    for error in (ValueError("gcsfs"), OSError("No space left"), ImportError("No module named x"), KeyError("gs://")):
        assert storage.explain(error) is None

    def fail(given, overrides):
        raise ClientConnectorError("Cannot connect to host x")

    monkeypatch.setattr(cli.commands, "plot", fail)
    assert cli.main(["plot", "--workdir", "x", "--out", "y"]) == 1
    assert capsys.readouterr().err.startswith("marjax plot: error: gs:// failed: it cannot be reached (Cannot connect")


class _Refusing(server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(403)
        self.end_headers()
        self.wfile.write(b'{"error": {"code": 403, "message": "x does not have storage.objects.list access"}}')

    def log_message(self, *arguments):
        pass


def test_a_bucket_that_refuses():
    pytest.importorskip("gcsfs")
    with server.ThreadingHTTPServer(("127.0.0.1", 0), _Refusing) as refusing:
        threading.Thread(target=refusing.serve_forever, daemon=True).start()
        done = run(f"http://127.0.0.1:{refusing.server_port}", "-m", "marjax", "train", "--config", f"{DIGITS}:debug",
                   "--workdir", "gs://bucket/run")
        refusing.shutdown()
    assert done.returncode == 2
    line, = done.stderr.splitlines()
    assert line.startswith("marjax train: error: gs://bucket/run: the credentials do not allow it (Forbidden: ")
    assert "x does not have storage.objects.list access" in line


@pytest.mark.slow
def test_commands_in_a_bucket(tmp_path, monkeypatch):
    """Training, resuming, sampling and a sweep; what a stand-in cannot show is in docs/storage.md."""
    pytest.importorskip("gcsfs")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where the logs of points are while they run
    overlay = {"train.steps": 4, "train.warmup_steps": 1, "checkpoint.every": 2, "log.every": 1}
    file = tmp_path / "sweep.py"
    file.write_text(f'CONFIG = {DIGITS + ":debug"!r}\n\ndef get_sweep():\n    yield "point", {overlay!r}\n\n'
                    'def measure(workdir, root):\n    return [{"score": 0.5}]\n')
    with FakeGcs("bucket") as google:
        done = run(google.address, str(ROOT / "tests" / "gcs_commands.py"), str(file))
    assert done.returncode == 0 and "all is well" in done.stdout, done.stderr[-3000:]
    assert "point  unfinished, step 4 of 4, updated" in done.stdout and "point  done in " in done.stdout
    assert "gs://no-such-bucket/run: there is no bucket 'no-such-bucket'" in done.stderr


def run(address, *arguments):
    """A Python process to which that server is Google's."""
    environment = os.environ | ALONE | {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300,
                          cwd=pathlib.Path(ROOT))
