"""gs:// addresses: what is told without a client, credentials or network, and real commands on an emulator's bucket."""

import os
import sys
import threading
from http import server

import jax
import pytest
from support.configs import QUICK, dotted
from support.gcs import FakeGcs, run_with_gcs
from support.paths import DIGITS

from marjax import cli, metrics, storage
from marjax import config as config_lib
from marjax.checkpoints.manager import Checkpoints
from marjax.commands import plot
from marjax.errors import LOST_STORAGE, StorageError, TrainingError, UserError


def test_what_is_no_address_passes(tmp_path):
    for path in (tmp_path, str(tmp_path), "relative/x", "/gs/x"):
        storage.check(path)
        assert not storage.is_remote(path)
    assert storage.is_remote("gs://bucket/x") and storage.is_remote(storage.epath.Path("gs://bucket/x"))


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("s3://bucket/x", "s3://"),
        ("gs://", "bucket"),
        ("gs:///x", "bucket"),
        ("gs://bucket/x", r"needs the gcs extra: pip install 'marjax\[gcs\]'"),
    ],
)
def test_addresses_that_cannot_be_used(monkeypatch, path, says):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=says):
        storage.check(path)


def test_commands_without_the_client(monkeypatch, capsys, tmp_path):
    """One line and the code of a slip, whichever argument the address is in, and before anything is made."""
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: None)
    out = str(tmp_path / "out")
    for arguments in (
        ["train", "--config", f"{DIGITS}:debug", "--workdir", "gs://b/run"],
        ["train", "--config", f"{DIGITS}:debug", "--workdir", out, "--config.tokenizer.path=gs://b/x"],
        ["sample", "--workdir", "gs://b/run", "--out", out],
        ["evaluate", "--workdir", out, "--statistics", "gs://b/x.npz"],
        ["sweep", "file.py", "--root", "gs://b/sweep"],
    ):
        assert cli.main(arguments) == 2
        error = capsys.readouterr().err
        assert "gcs extra" in error and len(error.splitlines()) == 1
    assert not os.path.exists(out)


def test_what_array_record_cannot_read(capsys):
    """Its reader waits for ever for an address, so nothing may come that far."""
    from marjax.data.latent_cache.read import read_manifest
    from marjax.data.sources import open_source

    config = config_lib.base()
    config.data.source, config.data.data_dir = "tfds:mnist", "gs://bucket/data"
    with pytest.raises(UserError, match=r"data.data_dir gs://bucket/data .*gcsfuse"):
        open_source(config_lib.data_config(config))
    with pytest.raises(UserError, match="data.cache gs://bucket/cache"):
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
        (ClientConnectorError("Cannot connect to host x"), StorageError, "cannot be reached .*network"),
        (HttpError("Anonymous caller"), TrainingError, "application-default login"),
        (RefreshError("expired"), TrainingError, "application-default login"),
        (ValueError("UNAVAILABLE: CURL error 7 [gcs_key_value_store]"), StorageError, "CURL error 7"),
        (ValueError("PERMISSION_DENIED: no [gcs]"), TrainingError, "do not allow it .*PERMISSION_DENIED"),
        (OSError("Forbidden: b/x\nno storage.objects.create"), TrainingError, "do not allow it .*objects.create"),
    ):
        told = storage.explain(error)
        assert type(told) is kind
        with pytest.raises(kind, match=says):
            raise told
    for error in (ValueError("gcsfs"), OSError("No space left"), ImportError("No module named x"), KeyError("gs://")):
        assert storage.explain(error) is None

    def fail(given):
        raise ClientConnectorError("Cannot connect to host x")

    monkeypatch.setattr(plot, "run", fail)
    assert cli.main(["plot", "--workdir", "x", "--out", "y"]) == LOST_STORAGE
    assert capsys.readouterr().err.startswith("marjax plot: error: gs:// failed: it cannot be reached (Cannot connect")


class ConnectionFailedError(OSError):
    __module__ = "aiohttp.client_exceptions"


def test_an_outage_keeps_the_lines_of_metrics_until_it_is_over(tmp_path, monkeypatch, capsys):
    written = []

    def write(path, data):
        if fails:
            raise ConnectionFailedError("Cannot connect to host x")
        written.append(data.decode().count("\n"))

    def open_writer():
        return metrics.MetricWriter(tmp_path, start_step=0, total_steps=9, tensorboard=False, progress=False)

    monkeypatch.setattr(metrics, "write_bytes", write)
    fails = False
    writer = open_writer()
    fails = True
    for step in (1, 2):
        writer.scalars(step, {"train/loss": 1.0})
        assert not writer.flush()
    assert capsys.readouterr().err.count("metrics are not being written: gs:// failed: it cannot be reached") == 1
    fails = False
    assert writer.flush()
    writer.close()
    assert written == [0, 2]
    writer = open_writer()
    fails = True
    writer.scalars(1, {"train/loss": 1.0})
    with pytest.raises(StorageError):
        writer.close()


def test_a_checkpoint_that_an_outage_stops_may_be_tried_again(tmp_path, monkeypatch):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:

        def fail(*args, **more):
            raise ValueError("Encountered error") from ValueError("UNAVAILABLE: CURL error 7 [gcs_key_value_store]")

        monkeypatch.setattr(checkpoints._manager, "save", fail)
        with pytest.raises(StorageError, match="step 1 in .* failed: UNAVAILABLE"):
            checkpoints.save(1, params={"x": jax.numpy.ones(1)}, meta={})


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
        done = run_with_gcs(
            f"http://127.0.0.1:{refusing.server_port}",
            "marjax",
            "train",
            "--config",
            f"{DIGITS}:debug",
            "--workdir",
            "gs://bucket/run",
        )
        refusing.shutdown()
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("marjax train: error: gs://bucket/run: the credentials do not allow it (Forbidden: ")
    assert "x does not have storage.objects.list access" in line


@pytest.mark.slow
def test_commands_in_a_bucket(tmp_path, monkeypatch):
    """Training, resuming, sampling and a sweep; what a stand-in cannot show is in docs/storage.md."""
    pytest.importorskip("gcsfs")
    monkeypatch.setenv("HOME", str(tmp_path))  # where the logs of points are while they run
    overlay = {"train.steps": 4, "train.warmup_steps": 1, "checkpoint.every": 2, "log.every": 1, **dotted(QUICK)}
    file = tmp_path / "sweep.py"
    file.write_text(
        f'CONFIG = {DIGITS + ":debug"!r}\n\ndef get_sweep():\n    yield "point", {overlay!r}\n\n'
        'def measure(workdir, root):\n    return [{"score": 0.5}]\n'
    )
    with FakeGcs("bucket") as google:
        done = run_with_gcs(google.address, "support.programs.gcs_commands", file)
    assert done.returncode == 0 and "all is well" in done.stdout, done.stdout + done.stderr[-3000:]
    assert "point  unfinished, step 4 of 4, updated" in done.stdout and "point  done in " in done.stdout
    assert "gs://no-such-bucket/run" in done.stderr
