"""Files are whole or not there, and writing them touches no other."""

import pytest

from marjax.files import write_bytes, write_text


@pytest.mark.parametrize(("write", "data"), [(write_bytes, b"new"), (write_text, "new")])
def test_a_link_in_place_of_the_partial_file_is_not_followed(tmp_path, monkeypatch, write, data):
    monkeypatch.setattr("os.getpid", lambda: 7)
    (tmp_path / "other").write_text("old")
    for name in ("x.partial", "x.partial7"):
        (tmp_path / name).symlink_to(tmp_path / "other")
    write(str(tmp_path / "x"), data)
    assert (tmp_path / "other").read_text() == "old" and (tmp_path / "x").read_text() == "new"
    assert not (tmp_path / "x").is_symlink()
