"""What lies in a work directory beside the config, as anyone may have left it."""

import json
import time

import pytest

from marjax.workdir import first_start


def test_the_first_start_is_kept(tmp_path):
    before = time.time()
    first = first_start(tmp_path, write=True)
    assert before <= first <= time.time() and first_start(tmp_path, write=True) == first
    (tmp_path / "started.json").write_text('{"unix_seconds": 5}')
    assert first_start(tmp_path, write=True) == 5


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "[" * 100_000,
        "\0",
        '{"unix_seconds": "5"}',
        '{"unix_seconds": true}',
        '{"unix_seconds": NaN}',
        '{"unix_seconds": -1}',
        '{"unix_seconds": 1e300}',
        '{"unix_seconds": ' + "9" * 5000 + "}",
    ],
)
def test_a_first_start_that_is_none_is_now_and_said(tmp_path, capsys, text):
    (tmp_path / "started.json").write_text(text)
    assert abs(first_start(tmp_path, write=True) - time.time()) < 60
    assert "started.json" in capsys.readouterr().err
    assert (tmp_path / "started.json").read_text() == text
    (tmp_path / "started.json").write_text(json.dumps({"unix_seconds": time.time() + 10}))  # another machine's clock
    assert first_start(tmp_path, write=True) <= time.time() and not capsys.readouterr().err
