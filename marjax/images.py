"""Image grids, and atomic PNG and npz files."""

import functools
import io
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from marjax.files import write_bytes


def to_uint8(image: np.ndarray) -> np.ndarray:
    """Converts floats in [-1, 1] to uint8; clips values outside."""
    return np.clip(np.rint((image + 1.0) * 127.5), 0, 255).astype(np.uint8)


_LONGEST = 24  # characters of a row label
_CAPTION_WIDTH = 320  # pixels, at least
_MARGIN = 4  # pixels around text


def grid(
    images: np.ndarray, columns: int, min_side: int = 32, *, rows: Sequence[str] = (), caption: str = ""
) -> np.ndarray:
    """Arranges images in reading order.

    Small images are enlarged by an integer factor to at least `min_side` pixels; empty cells are white. Without text,
    the shape is (rows * S, columns * S, 3), where S is the enlarged side plus a margin of 2 pixels.

    Args:
      images: uint8 (N, H, W, 1 or 3).
      columns: images per row.
      min_side: see above.
      rows: the label of each row, drawn at its left; long labels are shortened.
      caption: text below, wrapped to the width of the picture.

    Returns:
      uint8 (height, width, 3).
    """
    factor = max(1, -(-min_side // images.shape[1]))
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    images = np.broadcast_to(images, (*images.shape[:3], 3))
    images = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
    num_rows = -(-len(images) // columns)
    images = np.pad(images, ((0, num_rows * columns - len(images)), (0, 0), (0, 0), (0, 0)), constant_values=255)
    _, height, width, _ = images.shape
    cells = images.reshape(num_rows, columns, height, width, 3).transpose(0, 2, 1, 3, 4)
    picture = cells.reshape(num_rows * height, columns * width, 3)
    if not rows and not caption:
        return picture
    return _with_text(picture, height, rows, caption)


def _with_text(picture: np.ndarray, height: int, rows: Sequence[str], caption: str) -> np.ndarray:
    """Draws a label at the left of each row of `height` pixels, and a caption below."""
    font, small = _font(min(24, max(12, height // 6))), _font(min(14, max(12, height // 6)))
    labels = [row if len(row) <= _LONGEST else f"{row[: _LONGEST - 1]}…" for row in rows]
    left = max((int(font.getlength(label)) + 2 * _MARGIN for label in labels), default=0)
    full_width = max(left + picture.shape[1], _CAPTION_WIDTH if caption else 0)
    lines = _wrapped(caption, small, full_width - 2 * _MARGIN)
    line_height = sum(small.getmetrics())
    below = len(lines) * line_height + 2 * _MARGIN if lines else 0
    canvas = Image.new("RGB", (full_width, picture.shape[0] + below), "white")
    canvas.paste(Image.fromarray(picture), (left, 0))
    draw = ImageDraw.Draw(canvas)
    for index, label in enumerate(labels):
        draw.text((left - _MARGIN, (index + 0.5) * height), label, "black", font, anchor="rm")
    for index, line in enumerate(lines):
        draw.text((_MARGIN, picture.shape[0] + _MARGIN + index * line_height), line, "black", small)
    return np.array(canvas)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Wraps a text to `width` pixels; splits longer words."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for character in word:
            if lines[-1] and font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return lines


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which ships with Matplotlib and has Latin, Greek, Cyrillic, Arabic and more."""
    import matplotlib

    return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def beside(pictures: Sequence[np.ndarray], gap: int = 16) -> np.ndarray:
    """Joins pictures of equal height side by side, with a white gap."""
    parts = [np.pad(picture, ((0, 0), (0, gap), (0, 0)), constant_values=255) for picture in pictures]
    return np.concatenate(parts, axis=1)[:, :-gap]


def write_png(path: str | os.PathLike[str], picture: np.ndarray) -> None:
    """Writes uint8 (H, W, 3). Raises UserError."""
    data = io.BytesIO()
    Image.fromarray(picture).save(data, format="png")
    write_bytes(path, data.getvalue())


def write_npz(path: str | os.PathLike[str], **arrays: np.ndarray) -> None:
    """Writes arrays by name. Raises UserError."""
    data = io.BytesIO()
    np.savez(data, **arrays)  # type: ignore[arg-type]
    write_bytes(path, data.getvalue())
