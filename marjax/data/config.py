"""The values of `config.data`, for what opens and reads the images."""

import dataclasses

from marjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The fields of `config.data`; `config/schema.py` describes them. None: not known yet."""

    source: str
    fingerprint: str | None
    data_dir: str
    split: str
    image_size: int
    channels: int
    num_classes: int | None
    num_examples: int | None
    flip: bool
    workers: int
    cache: str


def check_image(image_size: int, channels: int) -> None:
    """Raises UserError: images of this shape are not supported."""
    if image_size < 1:
        raise UserError(f"data.image_size={image_size} is too small; use at least 1 pixel")
    if channels not in (1, 3):
        raise UserError(f"data.channels={channels} is not supported; use 1 (grey) or 3 (colour)")
