"""Creates the 200 training pictures of docs/data.md: `python docs/own_pictures.py pictures`.

Needs scikit-learn and matplotlib, which contain the three photographs. Each picture is a random crop of one photograph,
100 to 300 pixels wide; half of them are mirrored.
"""

import pathlib
import sys

import matplotlib
import numpy as np
import sklearn.datasets
from PIL import Image

PHOTOGRAPHS = {"flower": "flower.jpg", "portrait": "grace_hopper.jpg", "temple": "china.jpg"}
# The region of crop centres in each photograph, as x and y of two corners, and the range of crop sizes.
CENTRES = {"flower": (250, 180, 370, 230), "portrait": (230, 150, 280, 230), "temple": (170, 150, 240, 220)}
SIDES = {"flower": (260, 360), "portrait": (240, 360), "temple": (300, 400)}


def photograph(name: str) -> Image.Image:
    """Opens the photograph of a class, RGB."""
    if PHOTOGRAPHS[name] == "grace_hopper.jpg":
        return Image.open(pathlib.Path(matplotlib.get_data_path()) / "sample_data" / PHOTOGRAPHS[name]).convert("RGB")
    return Image.fromarray(sklearn.datasets.load_sample_image(PHOTOGRAPHS[name]))


def main(folder: str, count: int = 200) -> None:
    """Writes `count` JPEG files into a folder per class."""
    rng = np.random.default_rng(0)
    for index in range(count):
        name = list(PHOTOGRAPHS)[index % len(PHOTOGRAPHS)]
        original = photograph(name)
        left, top, right, bottom = CENTRES[name]
        side = rng.integers(*SIDES[name])
        x = np.clip(rng.integers(left, right) - side // 2, 0, original.width - side)
        y = np.clip(rng.integers(top, bottom) - side // 2, 0, original.height - side)
        crop = original.crop((x, y, x + side, y + side)).resize((rng.integers(100, 300),) * 2)
        if rng.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        target = pathlib.Path(folder) / name / f"{index:03}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        crop.save(target, quality=90)


if __name__ == "__main__":
    main(*sys.argv[1:2])
