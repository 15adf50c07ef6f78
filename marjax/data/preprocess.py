"""Preprocessing of images: crop, channels, flip. Everything stays uint8."""

import dataclasses

import numpy as np
from PIL import Image

from marjax.data.config import check_image
from marjax.data.source import Element, Pixels

_LONGEST = 16  # times the shorter side; scaling all of 60,000 x 3 pixels would take gigabytes
CROP = "center"  # recorded in latent caches; another crop than `center_crop` needs another name


def center_crop(image: Pixels, size: int) -> Pixels:
    """The central square of `image`, its shorter side scaled to `size`.

    Halves with a box filter while the shorter side is at least 2 * size, then resizes with a bicubic filter: the crop
    of guided diffusion (Dhariwal and Nichol 2021), which the reference trains on. Small images are enlarged. Of an
    image over 16 times as long as wide, only the middle is scaled.

    Args:
      image: uint8 (H, W, C), C of 1 or 3.
      size: the side of the result, in pixels.

    Returns:
      uint8 (size, size, C); may be a view of `image`.
    """
    height, width = image.shape[:2]
    longest = _LONGEST * min(height, width)
    top, left = max(0, height - longest) // 2, max(0, width - longest) // 2
    image = image[top : height - top, left : width - left]
    height, width = image.shape[:2]
    if min(height, width) != size:
        image = _scale(image, size)
        height, width = image.shape[:2]
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]


def _scale(image: Pixels, size: int) -> Pixels:
    grey = image.shape[2] == 1
    scaled = Image.fromarray(image[..., 0] if grey else image)
    while min(scaled.size) >= 2 * size:
        scaled = scaled.resize((scaled.width // 2, scaled.height // 2), Image.Resampling.BOX)
    factor = size / min(scaled.size)
    exact = (round(scaled.width * factor), round(scaled.height * factor))
    pixels = np.asarray(scaled.resize(exact, Image.Resampling.BICUBIC))
    return pixels[..., None] if grey else pixels


def to_channels(image: Pixels, channels: int) -> Pixels:
    """Converts uint8 (H, W, 1, 3 or 4) to uint8 (H, W, `channels`), 1 or 3; the same array if nothing changes.

    Grey is repeated, colour becomes Pillow's luma (ITU-R 601-2), alpha is dropped.
    """
    given = image.shape[2]
    if given == channels:
        return image
    if given == 1:
        return np.repeat(image, channels, axis=2)
    colour = image[..., :3]
    if channels == 3:
        return colour
    return np.asarray(Image.fromarray(np.ascontiguousarray(colour)).convert("L"))[..., None]


def draw_flip(rng: np.random.Generator) -> bool:
    """Whether to flip an image, with probability 0.5."""
    return bool(rng.random() < 0.5)


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """Converts a source's element to a training example.

    Attributes:
      image_size: the side of the result, in pixels.
      channels: 1 or 3.
      flip: whether to flip horizontally with probability 0.5.

    Raises:
      UserError: an invalid size or number of channels.
    """

    image_size: int
    channels: int
    flip: bool

    def __post_init__(self) -> None:
        check_image(self.image_size, self.channels)

    def __call__(self, element: Element, rng: np.random.Generator) -> Element:
        """The same label with an image of uint8 (image_size, image_size, channels), which may be a view."""
        image = element["image"]
        # Scaling is per channel, so channels are dropped before it and repeated after it.
        if image.shape[2] > self.channels:
            image = to_channels(image, self.channels)
        image = to_channels(center_crop(image, self.image_size), self.channels)
        if self.flip and draw_flip(rng):
            image = image[:, ::-1]
        return {"image": image, "label": element["label"]}
