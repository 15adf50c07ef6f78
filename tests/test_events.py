"""Event files: their contents and their uploads to object stores."""

import struct

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from marjax import events
from marjax.errors import StorageError, TrainingError
from marjax.events import Events


def read(file):
    """The events of a file: records of length, its checksum, content, its checksum."""
    data, at, found = file.read_bytes(), 0, []
    while at < len(data):
        (size,) = struct.unpack_from("<Q", data, at)
        found.append(Event.FromString(data[at + 12 : at + 12 + size]))
        at += size + 16
    return found


def test_contents(tmp_path):
    written = Events(tmp_path / "tensorboard", start_step=4)
    written.scalars(5, {"train/loss": 1.5, "perf/mfu": 0.25})
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert len(read(file)) == 4  # written immediately
    written.image(6, "raw_and_ema", np.zeros((4, 6, 3), np.uint8))
    written.close()
    version, start, *rest = read(file)
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (
        5,
        SessionLog.START,
    )  # hides events of earlier starts from step 5 on
    assert [(event.step, event.summary.value[0].tag) for event in rest] == [
        (5, "train/loss"),
        (5, "perf/mfu"),
        (6, "raw_and_ema"),
    ]
    assert rest[0].summary.value[0].simple_value == 1.5
    image = rest[2].summary.value[0].image
    assert (image.height, image.width) == (4, 6) and image.encoded_image_string.startswith(b"\x89PNG")


def test_the_config_as_text_and_as_hparams(tmp_path):
    written = Events(tmp_path, start_step=0)
    written.text("config", "**bold**")
    written.hparams({"train.lr": 0.5, "model.head": "flow", "data.flip": True})
    written.close()
    _, _, text, *hparams = read(next(tmp_path.iterdir()))
    (value,) = text.summary.value
    assert value.tag.startswith("config") and value.metadata.plugin_data.plugin_name == "text"
    assert value.tensor.string_val == [b"**bold**"]
    plugins = [HParamsPluginData.FromString(event.summary.value[0].metadata.plugin_data.content) for event in hparams]
    assert [info.name.tag for info in plugins[0].experiment.metric_infos] == ["train/loss"]
    found = plugins[1].session_start_info.hparams
    assert (found["train.lr"].number_value, found["model.head"].string_value) == (0.5, "flow")
    assert found["data.flip"].bool_value


def test_uploads_to_an_object_store(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(events, "is_remote", lambda path: True)
    monkeypatch.setattr(events, "write_bytes", lambda path, data: sent.append((path, len(data))))
    written = Events(tmp_path, start_step=0)
    for step in range(1, 6):
        written.scalars(step, {"train/loss": 1.0})
    assert sent == [] and list(tmp_path.iterdir()) == []
    monkeypatch.setattr(events, "_UPLOAD_PAUSE", 0.0)
    written.scalars(6, {"train/loss": 1.0})
    monkeypatch.setattr(events, "_UPLOAD_PAUSE", 300.0)
    written.scalars(7, {"train/loss": 1.0})
    written.close()
    assert len(sent) == 2 and sent[0][0] == sent[1][0] and sent[0][0].parent == tmp_path and sent[0][1] < sent[1][1]


def test_an_outage_of_the_store_loses_nothing(tmp_path, monkeypatch):
    def fail(path, data):
        raise StorageError("no answer")

    monkeypatch.setattr(events, "is_remote", lambda path: True)
    monkeypatch.setattr(events, "write_bytes", fail)
    monkeypatch.setattr(events, "_UPLOAD_PAUSE", 0.0)
    written, sent = Events(tmp_path, start_step=0), []
    with pytest.raises(StorageError):
        written.scalars(1, {"train/loss": 1.0})
    monkeypatch.setattr(events, "write_bytes", lambda path, data: sent.append(data))
    written.close()
    assert b"train/loss" in sent[0]


def test_a_full_disk(tmp_path, monkeypatch):
    written = Events(tmp_path, start_step=0)

    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(events.EventsWriter, "flush", full)
    with pytest.raises(TrainingError, match="No space left on device"):
        written.scalars(1, {"train/loss": 1.0})
