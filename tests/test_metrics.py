"""MetricWriter: files, resuming, slow and failing storage."""

import json
import re
import threading

import numpy as np
import pytest

from marjax import metrics
from marjax.errors import UserError
from marjax.metrics import MetricWriter


def write(folder, steps, start=0, **options):
    writer = MetricWriter(folder, start_step=start, total_steps=9, progress=False, **options)
    for step in steps:
        values = {"train/loss": step / 2, "train/loss_t_quarter1": float("nan")}
        assert writer.scalars(step, values) == {"train/loss": step / 2}
    writer.close()


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_writes_its_lines_again(tmp_path):
    write(tmp_path, [1, 2, 3, 4])
    assert lines(tmp_path)[1] == {"step": 2, "train/loss": 1.0}
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "tra')  # cut short by a crash
    write(tmp_path, [3, 4, 5], start=2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_other_processes_write_nothing(tmp_path):
    write(tmp_path, [1], active=False)
    assert not list(tmp_path.iterdir())


def test_pictures(tmp_path):
    writer = MetricWriter(tmp_path, start_step=0, total_steps=1, tensorboard=False, progress=False)
    writer.image(7, "raw_and_ema", np.zeros((4, 6, 3), np.uint8))
    writer.close()
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["raw_and_ema_00000007.png"]


def test_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        write(tmp_path / "gone", [1], tensorboard=False)


def test_storage_that_hangs_does_not_block(tmp_path, monkeypatch):
    """Lines that come meanwhile are written together afterwards."""
    hangs, writes, real = threading.Event(), [], metrics.write_bytes

    def slow(path, data):
        writes.append(data)
        assert hangs.wait(60)
        real(path, data)

    writer = MetricWriter(tmp_path, start_step=0, total_steps=9, tensorboard=False, progress=False)
    monkeypatch.setattr(metrics, "write_bytes", slow)
    for step in range(1, 6):
        writer.scalars(step, {"train/loss": 1.0})
    assert not writer.flush(seconds=0.05) and lines(tmp_path) == []
    hangs.set()
    assert writer.flush() and [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5] and len(writes) <= 3
    writer.close()


def test_a_failed_write_is_raised_by_the_next_call(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    writer = MetricWriter(folder, start_step=0, total_steps=9, tensorboard=False, progress=False)
    (folder / "metrics.jsonl").unlink()
    folder.rmdir()
    writer.scalars(1, {"train/loss": 1.0})
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        writer.flush()


def test_an_object_store_is_not_written_at_every_line(tmp_path, monkeypatch):
    """All lines are written before a checkpoint and at the end."""
    writes, real = [], metrics.write_bytes
    monkeypatch.setattr(metrics, "is_remote", lambda path: True)
    monkeypatch.setattr(metrics, "write_bytes", lambda path, data: (writes.append(data), real(path, data)))
    writer = MetricWriter(tmp_path, start_step=0, total_steps=99, tensorboard=False, progress=False)
    for step in range(1, 11):
        writer.scalars(step, {"train/loss": 1.0})
    assert writer.flush() and len(lines(tmp_path)) == 10
    writer.scalars(11, {"train/loss": 1.0})
    writer.close()
    assert len(lines(tmp_path)) == 11 and len(writes) <= 4


def test_printed_lines_have_an_eta_without_a_terminal(tmp_path, capsys):
    with MetricWriter(tmp_path, start_step=3, total_steps=9, tensorboard=False) as writer:
        writer.note("0.28 M parameters")
        for step in range(3, 7):
            writer.progress(step)
        writer.scalars(6, {"train/loss": 0.5})
        with writer.pause("drawing pictures"):
            pass
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["0.28 M parameters", "train: 3 of 9 steps"]
    assert re.fullmatch(r"step 6: loss 0.5, ETA \d\d:\d\d", lines[2])
    assert re.fullmatch(r"train: 6 of 9 steps, .*ETA \d\d:\d\d, loss 0.5", lines[3])
