"""Grids, and atomic files."""

import numpy as np
import pytest
from PIL import Image

from marjax import files, images
from marjax.errors import UserError


def test_to_uint8_rounds_and_clips():
    values = np.array([-2.0, -1.0, 0.0, 1.0, 3.0, -1.0 + 2 * 77 / 255])
    assert images.to_uint8(values).tolist() == [0, 0, 128, 255, 255, 77]


def test_grid_puts_images_in_reading_order(tmp_path):
    tiles = np.arange(1, 6, dtype=np.uint8).reshape(5, 1, 1, 1) * np.ones((1, 8, 8, 1), np.uint8)
    picture = images.grid(tiles, 3)
    assert picture.shape == (2 * 34, 3 * 34, 3)
    centres = picture[17::34, 17::34, 0]
    assert centres.tolist() == [[1, 2, 3], [4, 5, 255]]
    images.write_png(tmp_path / "a.png", picture)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), picture)
    assert images.beside([picture, picture]).shape == (68, 2 * 102 + 16, 3)


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    images.write_npz(tmp_path / "x.npz", a=np.zeros(3))
    assert np.load(tmp_path / "x.npz")["a"].tolist() == [0, 0, 0]
    with pytest.raises(UserError, match=r"x\.npz"):
        images.write_npz(tmp_path / "missing" / "x.npz", a=np.zeros(3))
    with pytest.raises(UserError, match=r"x\.npz"):
        files.make_folder(tmp_path / "x.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


def test_grid_has_room_for_row_labels_and_a_caption():
    tiles = np.full((4, 8, 8, 1), 7, np.uint8)
    plain = images.grid(tiles, 2)
    labelled = images.grid(tiles, 2, rows=["cat", "Ж"])
    assert labelled.shape[0] == plain.shape[0]
    left = labelled.shape[1] - plain.shape[1]
    np.testing.assert_array_equal(labelled[:, left:], plain)
    labels = [labelled[row * 34 : (row + 1) * 34, :left] for row in range(2)]
    assert all((label < 128).any() and (label[0] == 255).all() for label in labels)
    assert (labels[0] != labels[1]).any()
    captioned = images.grid(tiles, 2, rows=["cat", "Ж"], caption="cfg 2")
    np.testing.assert_array_equal(captioned[:68, : labelled.shape[1]], labelled)
    assert (captioned[68:] < 128).any()
    longer = images.grid(tiles, 2, caption="cfg 2 " * 40)
    assert longer.shape[0] > captioned.shape[0]
    assert (longer[:, -1] == 255).all()  # no text is clipped


def test_long_row_labels_are_shortened():
    tiles = np.full((1, 8, 8, 3), 7, np.uint8)
    assert images.grid(tiles, 1, rows=["x" * 500]).shape[1] < 400
    assert images.grid(tiles, 1, caption="x" * 500).shape[1] < 400
