"""Sampled images as files: grids, PNG and npz, written whole or not at all."""

import io
import os
import uuid
from collections.abc import Sequence

import numpy as np
from etils import epath
from PIL import Image

from marjax.errors import UserError
from marjax.files import write_bytes


def to_uint8(image: np.ndarray) -> np.ndarray:
    """uint8 from float in [-1, 1], any shape; values outside are clipped."""
    return np.clip(np.rint((image + 1.0) * 127.5), 0, 255).astype(np.uint8)


def grid(images: np.ndarray, columns: int, min_side: int = 32) -> np.ndarray:
    """One picture, uint8 (rows * S, columns * S, 3), of images uint8 (N, H, W, 1 or 3) in reading order.

    Small images are enlarged by a whole factor to at least `min_side`; empty places are white.
    """
    factor = max(1, -(-min_side // images.shape[1]))
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    images = np.broadcast_to(images, (*images.shape[:3], 3))
    images = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
    rows = -(-len(images) // columns)
    images = np.pad(images, ((0, rows * columns - len(images)), (0, 0), (0, 0), (0, 0)), constant_values=255)
    _, height, width, _ = images.shape
    cells = images.reshape(rows, columns, height, width, 3).transpose(0, 2, 1, 3, 4)
    return cells.reshape(rows * height, columns * width, 3)


def beside(pictures: Sequence[np.ndarray], gap: int = 16) -> np.ndarray:
    """Pictures of one height side by side, with a white gap."""
    parts = [np.pad(picture, ((0, 0), (0, gap), (0, 0)), constant_values=255) for picture in pictures]
    return np.concatenate(parts, axis=1)[:, :-gap]


def make_folder(path: str | os.PathLike[str]) -> epath.Path:
    """The folder, created if need be and checked to be writable. Raises UserError."""
    folder = epath.Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / f".writable-{uuid.uuid4().hex}"  # several processes may try at once
        trial.write_text("")
        trial.unlink()
    except OSError as error:
        raise UserError(f"folder {path} cannot be written ({error.strerror or error}): give one that can") from None
    return folder


def write_png(path: str | os.PathLike[str], picture: np.ndarray) -> None:
    """Writes uint8 (H, W, 3). Raises UserError."""
    data = io.BytesIO()
    Image.fromarray(picture).save(data, format="png")
    write_bytes(path, data.getvalue())


def write_npz(path: str | os.PathLike[str], **arrays: np.ndarray) -> None:
    """Writes arrays under their names. Raises UserError."""
    data = io.BytesIO()
    np.savez(data, **arrays)  # type: ignore[arg-type]
    write_bytes(path, data.getvalue())
