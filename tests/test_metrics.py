"""Metric files: names, resumption, lines cut short."""

import json

import numpy as np
import pytest

from marjax.errors import UserError
from marjax.metrics import MetricWriter


def write(folder, steps, start=0, **options):
    writer = MetricWriter(folder, start_step=start, total_steps=9, progress=False, **options)
    for step in steps:
        writer.scalars(step, {"train/loss": step / 2, "train/loss_t_quarter1": float("nan")})
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
    with pytest.raises(UserError, match="cannot be written"):
        write(tmp_path / "gone", [1], tensorboard=False)
