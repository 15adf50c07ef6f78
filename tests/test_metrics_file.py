"""Reading metrics.jsonl with lines of editors, other tools and crashes."""

import json
import os

import pytest

from marjax.errors import UserError
from marjax.metrics import MetricWriter
from marjax.metrics_file import read_metrics
from marjax.plots.runs import read_runs
from marjax.sweep.rows import last_metrics

FOREIGN = [
    b"text",
    b"[1]",
    b"\xff\xfe",
    b'{"loss": 1}',
    b'{"step": "4", "train/loss": 1}',
    b'{"step": true}',
    b"null",
    b'{"step": NaN}',
    b'{"step": -1}',
    b'{"step": 2.5}',
    b'{"step": 1e300}',
    b'{"step": 18446744073709551615}',
    b'{"step": 9' + b"9" * 5000 + b"}",
    b"[" * 100_000,
    b'{"step": 1, "step": 2}',
]


def good(step, **more):
    return json.dumps({"step": step, "train/loss": step / 4, **more}).encode()


@pytest.fixture
def folder(tmp_path):
    """Steps 1 to 4, out of order, with foreign lines between them."""
    rows = [
        good(2),
        b"",
        good(1),
        b'{"step": 3.0, "train/loss": 0.75, "note": "x", "a": NaN, "b": 1e999, "c": [1]}',
        good(4),
    ]
    (tmp_path / "metrics.jsonl").write_bytes(
        b"\xef\xbb\xbf"
        + b"\n".join(
            [*(row for pair in zip(rows[:4], FOREIGN[:4], strict=True) for row in pair), *FOREIGN[4:], rows[4]]
        )
        + b'\r\n{"step": 5, "tra'
    )
    return tmp_path


def test_foreign_lines_are_ignored(folder, capsys):
    found = read_metrics(folder / "metrics.jsonl")
    assert found.foreign == FOREIGN
    assert found.lines == [
        {"step": step, "train/loss": step / 4} | ({"note": "x"} if step == 3 else {}) for step in (1, 2, 3, 4)
    ]
    assert f"{len(FOREIGN)} of 21 lines" in capsys.readouterr().err
    (run,) = read_runs([folder])
    assert [values.tolist() for values in run.series("train/loss")] == [[1, 2, 3, 4], [0.25, 0.5, 0.75, 1.0]]
    assert last_metrics(folder) == {"step": 4, "train/loss": 1.0}


def test_a_resumed_run_moves_foreign_lines_to_another_file(folder):
    for rest in (FOREIGN, [*FOREIGN, b"more"]):
        writer = MetricWriter(folder, start_step=3, total_steps=9, progress=False)
        writer.scalars(4, {"train/loss": 7.0})
        writer.close()
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [(line["step"], line["train/loss"]) for line in lines] == [(1, 0.25), (2, 0.5), (3, 0.75), (4, 7.0)]
        assert (folder / "metrics-foreign.txt").read_bytes() == b"".join(line + b"\n" for line in rest)
        with (folder / "metrics.jsonl").open("a") as file:
            file.write("more\n")


def test_unreadable_files(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == ([], [])
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(UserError, match=str(path)):
            read_metrics(path)
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(8 << 30)
    with pytest.raises(UserError, match="sparse"):
        read_metrics(tmp_path / "sparse")
