"""JSON files of others: what is read, and the one line for what is not."""

import math
import os
import re

import pytest
from support.errors import ADVICE, failure

from marjax.json_file import check_json, parse_json, read_json

SHAPE = {
    "num_classes": range(1, 10),
    "kind": {"ema", "raw"},
    "mean": float,
    "weights?": (str, None),
    "rows": [{"step": int}],
    "sums": {str: re.compile("[a-z]+")},
}
GOOD = {"num_classes": 2, "kind": "ema", "mean": 1, "rows": [{"step": 0, "other": 1}], "sums": {"a": "b"}, "more": []}


@pytest.mark.parametrize(
    "change, named",
    [
        ({"num_classes": 0}, "num_classes"),
        ({"num_classes": 10}, "num_classes"),
        ({"num_classes": True}, "num_classes"),
        ({"num_classes": 2.0}, "num_classes"),
        ({"num_classes": "2"}, "num_classes"),
        ({"kind": "other"}, "kind"),
        ({"kind": []}, "kind"),
        ({"mean": None}, "mean"),
        ({"mean": False}, "mean"),
        ({"weights": 1}, "weights"),
        ({"rows": {}}, "rows"),
        ({"rows": [{"step": 1}, 3]}, "rows[1]"),
        ({"rows": [{}]}, "rows[0].step"),
        ({"rows": [{"step": 2**63}]}, "rows[0].step"),
        ({"sums": {"x": "a\n"}}, "sums.x"),
        ({"sums": {"x\ny": 3}}, r"sums.x\ny"),
    ],
)
def test_a_value_of_another_shape_is_named(change, named):
    check_json(GOOD, SHAPE, where="file", advice=ADVICE)
    assert f"file: {named} is " in failure(check_json, GOOD | change, SHAPE, where="file")


def test_members_that_are_named_differ_from_the_others():
    shape = {"step": int, "note?": str, str: float}
    check_json({"step": 1, "a": 0.5, "b": 2}, shape, where="file", advice=ADVICE)
    for odd, named in (({"step": 0.5}, "step"), ({"step": 1, "note": 1}, "note"), ({"step": 1, "a": "x"}, "a")):
        assert f"file: {named} is " in failure(check_json, odd, shape, where="file")


def test_alternatives_name_what_is_wrong_inside():
    shape = ({"a": int}, None)
    assert "a is " in failure(check_json, {"a": ""}, shape, where="file")
    assert "null" in failure(check_json, 3, shape, where="file")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[1,]",
        b"nul",
        b"{} {}",
        b"\xff\xfe{}",
        b'"\xe4"',
        b"NaN",
        b"[-Infinity]",
        b"1e999",
        b"[" + b"9" * 5000 + b"]",
        b"18446744073709551616",
        b'{"a": 1, "a": 2}',
        b"[" * 200_000,
        b"[" * 101 + b"]" * 101,
        b'{"a":' * 900 + b"1" + b"}" * 900,
        b'"' + b"a" * 100,
        rb'["\ud800"]',
        rb'{"\udfff": 1}',
    ],
)
def test_what_is_no_json_is_one_line(tmp_path, data):
    (tmp_path / "x.json").write_bytes(data)
    assert "x.json" in failure(read_json, tmp_path / "x.json")


def test_what_is_read(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": [1, 1.5, 18446744073709551615, "\xc3\xa4"]}')
    assert read_json(path, {"a": list}, advice=ADVICE) == {"a": [1, 1.5, 2**64 - 1, "ä"]}
    assert parse_json(r'"\udcff \ud83d\ude00"', where="x", advice=ADVICE) == "\udcff \U0001f600"
    assert math.isnan(parse_json("NaN", where="x", advice=ADVICE, allow_nan=True))
    assert read_json(tmp_path / "none.json", missing=None, advice=ADVICE) is None
    assert read_json(path / "none.json", missing={}, advice=ADVICE) == {}


def test_what_is_no_file_is_one_line(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("none", "pipe", "", "a\0b", "\ud800"):
        failure(read_json, f"{tmp_path}/{name}")
    assert failure(read_json, "/dev/zero").startswith("/dev/zero")


def test_a_file_that_is_too_long_is_not_parsed(tmp_path):
    (tmp_path / "x.json").write_bytes(b"[" + b"[]," * 10 + b"0]")
    assert read_json(tmp_path / "x.json", list, advice=ADVICE, max_bytes=33)
    assert "32" in failure(read_json, tmp_path / "x.json", max_bytes=32)
