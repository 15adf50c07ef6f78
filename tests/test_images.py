"""Grids, and files that are whole or absent."""

import numpy as np
import pytest
from PIL import Image

from marjax.errors import UserError
from marjax.generation import images


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
    with pytest.raises(UserError, match="cannot be written"):
        images.write_npz(tmp_path / "missing" / "x.npz", a=np.zeros(3))
    with pytest.raises(UserError, match="cannot be written"):
        images.make_folder(tmp_path / "x.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]
