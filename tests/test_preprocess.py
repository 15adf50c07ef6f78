import pathlib

import grain
import numpy as np
import pytest
from PIL import Image

from marjax.data.preprocess import Preprocess, center_crop, to_channels
from marjax.errors import UserError

CROPS = np.load(pathlib.Path(__file__).parent / "parity" / "center_crop.npz")


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("case", [key.removeprefix("in/") for key in CROPS if key.startswith("in/")])
def test_crop_agrees_with_the_reference(case: str) -> None:
    cropped = center_crop(CROPS[f"in/{case}"], int(CROPS[f"size/{case}"]))
    assert cropped.dtype == np.uint8
    np.testing.assert_array_equal(cropped, CROPS[f"out/{case}"])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("height, width", [(32, 32), (32, 45), (45, 32)])
def test_crop_without_scaling_gives_what_scaling_by_one_gives(height: int, width: int, channels: int) -> None:
    image = noise(height, width, channels)
    slow = np.stack(
        [
            np.asarray(Image.fromarray(image[..., c]).resize((width, height), Image.Resampling.BICUBIC))
            for c in range(channels)
        ],
        axis=-1,
    )
    top, left = (height - 32) // 2, (width - 32) // 2
    np.testing.assert_array_equal(center_crop(image, 32), slow[top : top + 32, left : left + 32])


@pytest.mark.parametrize("height, width", [(5, 9), (31, 64), (200, 33), (64, 64), (129, 128)])
def test_crop_treats_channels_alone(height: int, width: int) -> None:
    image = noise(height, width, 3)
    cropped = center_crop(image, 32)
    assert cropped.shape == (32, 32, 3)
    for c in range(3):
        np.testing.assert_array_equal(center_crop(image[..., c : c + 1], 32), cropped[..., c : c + 1])


@pytest.mark.parametrize("channels", [1, 3])
def test_only_the_middle_of_long_thin_pictures_is_scaled(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    image = noise(3, 300, channels)
    for c in range(channels):
        whole = np.asarray(Image.fromarray(image[..., c]).resize((3200, 32), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(center_crop(image, 32)[..., c], whole[:, 1584:1616])
    sizes: list[tuple[int, int]] = []
    resize = Image.Image.resize

    def recorded(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
        sizes.append(size)
        return resize(image, size, resample)

    monkeypatch.setattr(Image.Image, "resize", recorded)
    for shape in ((3, 60_000), (60_000, 3), (1, 65_535), (1_000_000, 1), (600, 100_000)):
        assert center_crop(noise(*shape, channels), 256).shape == (256, 256, channels)
    assert max(width * height for width, height in sizes) <= 2_000_000


def test_channels() -> None:
    grey, colour, alpha = noise(6, 5, 1), noise(6, 5, 3), noise(6, 5, 4)
    assert to_channels(grey, 1) is grey and to_channels(colour, 3) is colour
    np.testing.assert_array_equal(to_channels(grey, 3), np.concatenate([grey] * 3, axis=-1))
    np.testing.assert_array_equal(to_channels(alpha, 3), alpha[..., :3])
    luma = np.asarray(Image.fromarray(colour).convert("L"))[..., None]
    np.testing.assert_array_equal(to_channels(colour, 1), luma)
    np.testing.assert_array_equal(to_channels(alpha, 1), to_channels(alpha[..., :3], 1))


@pytest.mark.parametrize("given", [1, 3, 4])
@pytest.mark.parametrize("wanted", [1, 3])
@pytest.mark.parametrize("size", [8, 20, 50])
def test_preprocess_always_gives_the_shape_it_promises(given: int, wanted: int, size: int) -> None:
    image = noise(41, 20, given)
    done = Preprocess(size, wanted, flip=False)({"image": image, "label": 7}, np.random.default_rng(0))
    assert done["image"].shape == (size, size, wanted) and done["image"].dtype == np.uint8 and done["label"] == 7
    np.testing.assert_array_equal(done["image"], center_crop(to_channels(image, wanted), size))


def test_flip_is_by_chance_and_only_when_asked() -> None:
    image = noise(8, 8, 1)
    rng = np.random.default_rng(0)
    kept = [Preprocess(8, 1, flip=False)({"image": image, "label": 0}, rng)["image"] for _ in range(20)]
    assert all(np.array_equal(one, image) for one in kept)
    drawn = [Preprocess(8, 1, flip=True)({"image": image, "label": 0}, rng)["image"] for _ in range(400)]
    flipped = [not np.array_equal(one, image) for one in drawn]
    assert 160 < sum(flipped) < 240
    assert all(np.array_equal(one, image[:, ::-1]) for one, flip in zip(drawn, flipped, strict=True) if flip)


@pytest.mark.parametrize("size, channels, words", [(0, 3, "data.image_size=0"), (8, 2, "data.channels=2")])
def test_impossible_sizes_are_refused(size: int, channels: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Preprocess(size, channels, flip=False)


def test_preprocess_fits_grain() -> None:
    elements = [{"image": noise(8, 8, 1), "label": 3}] * 50
    mapped = grain.MapDataset.source(elements).seed(0).random_map(Preprocess(8, 1, flip=True))
    assert len({element["image"].tobytes() for element in mapped}) == 2
