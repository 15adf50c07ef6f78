"""`marjax tokenizer check`, as a function and as a command."""

import numpy as np
import pytest
from PIL import Image
from support.configs import make_autoencoder, make_digits
from support.paths import DIGITS, ROOT

from marjax import config as config_lib
from marjax.cli import main
from marjax.data.preprocess import center_crop
from marjax.errors import UserError
from marjax.tokenizer_training import reconstruction
from marjax.tokenizer_training.reconstruction import check
from marjax.tokenizers import kl as kl_lib
from marjax.tokenizers import open_tokenizer


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Seven pictures of mixed sizes, modes and depths, in order, beside another file."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "b").mkdir()
    rng = np.random.default_rng(0)
    made = []
    names = ("a.png", "b/1.PNG", "b/2.jpeg", "b/3.webp", "c.bmp", "d.png", "e.png")
    for name, size, mode in zip(
        names, (8, 9, 17, 8, 8, 12, 20), ("L", "L", "L", "RGB", "RGB", "RGBA", "P"), strict=True
    ):
        shape = (size, size + 3) if mode in "LP" else (size, size + 3, len(mode))
        Image.fromarray(rng.integers(0, 256, shape, np.uint8), mode if mode != "P" else "L").convert(mode).save(
            folder / name, lossless=True
        )
        layer = Image.open(folder / name).convert("RGBA")
        over_white = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
        made.append(np.asarray(over_white.convert("RGB").convert("L")))
    (folder / "b" / "labels.txt").write_text("no picture")
    (folder / "._a.png").write_text("what a Mac leaves")
    (folder / "b" / "around").symlink_to(folder)
    return folder, np.stack([center_crop(image[..., None], 8) for image in made])


def test_pictures_through_a_kl_autoencoder(autoencoders, pictures, tmp_path):
    folder, images = pictures
    path = autoencoders / "kl.safetensors"
    report = check(folder, path=str(path), image_size=8, batch_size=3, out=tmp_path / "new")
    tokenizer = open_tokenizer(config_lib.tokenizer_config(make_autoencoder("kl", path)))
    x = images / np.float32(127.5) - np.float32(1.0)
    moments = tokenizer.moments(tokenizer.params, x)
    assert report["num_images"] == 7 and report["image_size"] == 8
    # Statistics of the draws, as expected from means and log variances.
    mean, logvar = kl_lib.split(moments)
    std = float(np.sqrt((mean**2 + np.exp(logvar)).mean() - mean.mean() ** 2))
    assert report["std"] == pytest.approx(std, rel=0.2) and report["scale"] == 1.0 / report["std"]
    assert len(report["channel_means"]) == len(report["channel_stds"]) == 4
    assert report["mean"] == pytest.approx(np.mean(report["channel_means"]))
    assert report["psnr"] == pytest.approx(10 * np.log10(4 / report["mse"])) and 0 < report["mse"] < 4
    picture = np.asarray(Image.open(report["picture"]))
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["reconstructions.png"]
    # Two grids of seven images in three columns, enlarged four times, and a gap.
    assert picture.shape == (3 * 34, 2 * 3 * 34 + 16, 3)
    np.testing.assert_array_equal(picture[1:33:4, 1:33:4, 0], images[0, ..., 0])
    assert (picture[1:33, 1:33] != picture[1:33, 3 * 34 + 17 : 3 * 34 + 49]).any()
    # The batch size changes the draws only.
    other = check(folder, path=str(path), image_size=8, batch_size=7)
    assert other["mse"] == pytest.approx(report["mse"], rel=0.2) and "picture" not in other
    assert check(folder, path=str(path), image_size=8, batch_size=3, seed=1)["std"] != report["std"]
    assert check(folder, path=str(path), image_size=8, batch_size=3)["std"] == report["std"]


def test_statistics_by_hand(pictures):
    """Pixels are their own latents, so all numbers are known."""
    folder, images = pictures
    config = make_digits(data__channels=1)
    report = check(folder, config, num_images=5, batch_size=2)
    x = (images[:5] / 127.5 - 1.0).astype(np.float64)
    assert report["num_images"] == 5 and report["mse"] == 0.0 and report["psnr"] == np.inf
    assert report["mean"] == pytest.approx(x.mean(), abs=1e-6) and report["std"] == pytest.approx(x.std(), rel=1e-6)
    assert report["channel_stds"] == [pytest.approx(x.std(), rel=1e-6)] and "codes_used" not in report
    colour = check(folder, make_digits(data__channels=3), num_images=99, batch_size=2)
    assert colour["num_images"] == 7 and len(set(colour["channel_means"])) == 3


def test_codes_of_a_configs_data(autoencoders):
    config = make_autoencoder("vq", autoencoders / "vq.safetensors", data__split="train[:21]")
    report = check(config=config, batch_size=4)
    assert report["num_images"] == 21 and 1 < report["codes_used"] <= 16
    # Without codes the network is the same, and its scale is measured.
    before = check(config=config, name="vq_continuous", batch_size=4)
    assert before["mse"] == pytest.approx(report["mse"], rel=1e-4) and before["codes_used"] == report["codes_used"]
    assert before["std"] != report["std"] and before["scale"] > 0
    assert check(config=config, num_images=3)["num_images"] == 3


def test_command(autoencoders, pictures, tmp_path, capsys):
    folder, _ = pictures
    path = str(autoencoders / "kl.safetensors")
    assert (
        main(
            [
                "tokenizer",
                "check",
                "--images",
                str(folder),
                "--path",
                path,
                "--image_size",
                "8",
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    report = check(folder, path=path, image_size=8)
    assert lines[0] == f"7 images of 8 x 8: mse {report['mse']:.5f}, PSNR {report['psnr']:.2f} dB"
    assert f"std {report['std']:.4f}; scale 1/std: {report['scale']:.5g}" in lines[1]
    assert lines[-1].endswith("reconstructions.png") and len(lines) == 7
    flags = [
        "--config.tokenizer.autoencoder.width=32",
        "--config.tokenizer.autoencoder.channel_mults=1,1",
        "--config.tokenizer.autoencoder.num_res_blocks=1",
        "--config.tokenizer.autoencoder.latent_channels=4",
        "--config.tokenizer.num_codes=16",
        "--config.tokenizer.patch_size=1",
    ]
    vq = str(autoencoders / "vq.safetensors")
    assert (
        main(
            [
                "tokenizer",
                "check",
                "--config",
                f"{DIGITS}:debug",
                "--name",
                "vq",
                "--path",
                vq,
                "--num_images",
                "5",
                *flags,
                "--out",
                str(tmp_path / "vq"),
            ]
        )
        == 0
    )
    assert " codes used" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--path", "KL"], "--images"),
        (["--images", "PICTURES"], "--path"),
        (["--images", "none", "--path", "KL"], "images none"),
        (["--images", "EMPTY", "--path", "KL"], "has no pictures: give another folder"),
        (["--images", "BAD", "--path", "KL"], "bad.png cannot be read"),
        (["--images", "PICTURES", "--path", "none"], "none does not exist"),
        (["--images", "PICTURES", "--path", "PICTURES"], "is a folder"),
        (["--images", "PICTURES", "--path", "KL", "--image_size", "9"], "sides that 2 divides"),
        (["--images", "PICTURES", "--path", "KL", "--image_size", "0"], "image_size is 0"),
        (["--images", "PICTURES", "--path", "KL", "--num_images", "0"], "num_images is 0"),
        (["--images", "PICTURES", "--path", "KL", "--name", "kl16"], "width 32 instead of 128"),
        (["--images", "PICTURES", "--path", "KL", "--name", "kl17"], "give one of codebook, kl, kl16"),
        (["--images", "PICTURES", "--path", "KL", "--config.seed=1"], "give --config NAME too"),
        (["--images", "PICTURES", "--name", "kl16"], "marjax convert makes it from the reference's kl16.ckpt"),
        (["--config", "IMAGENET"], "path is empty, but tokenizer 'kl16' is a file"),
    ],
)
def test_user_errors_are_one_line_and_write_nothing(autoencoders, pictures, tmp_path, capsys, arguments, says):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "bad.png").write_bytes(b"none")
    names = {
        "KL": str(autoencoders / "kl.safetensors"),
        "PICTURES": str(pictures[0]),
        "BAD": str(tmp_path / "bad"),
        "EMPTY": str(tmp_path / "empty"),
        "IMAGENET": str(ROOT / "configs" / "imagenet256.py"),
    }
    assert (
        main(["tokenizer", "check", *[names.get(each, each) for each in arguments], "--out", str(tmp_path / "out")])
        == 2
    )
    error = capsys.readouterr().err
    assert says in error and len(error.splitlines()) == 1 and error.startswith("marjax tokenizer: error: ")
    assert not (tmp_path / "out").exists()


def test_the_picture_shows_the_first_few(autoencoders, tmp_path, monkeypatch):
    monkeypatch.setattr(reconstruction, "_SHOWN", 4)
    config = make_digits(data__split="train[:10]")
    check(config=config, batch_size=3, out=tmp_path)
    assert np.asarray(Image.open(tmp_path / "reconstructions.png")).shape == (2 * 34, 2 * 2 * 34 + 16, 3)


def test_a_folder_that_cannot_be_written(pictures):
    with pytest.raises(UserError, match="/proc/no"):
        check(pictures[0], make_digits(), out="/proc/no")
