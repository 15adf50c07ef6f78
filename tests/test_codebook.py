"""The codebook of patches: its training, its file, its latents, and the command."""

import pathlib
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.configs import make_digits
from support.paths import DIGITS

from marjax import config as config_lib
from marjax.cli import main
from marjax.data.sources import open_source
from marjax.errors import UserError
from marjax.tokenizer_training import codebook as training
from marjax.tokenizer_training.codebook import train_codebook
from marjax.tokenizers import codebook as codebook_lib
from marjax.tokenizers import open_tokenizer
from marjax.tokenizers.codebook import Codebook
from marjax.tokenizers.nearest_code import nearest

NUM_CODES = 16


def make_config(**overrides):
    return make_digits(
        **{
            "tokenizer__name": "codebook",
            "tokenizer__patch_size": 2,
            "tokenizer__num_codes": NUM_CODES,
            "data__split": "train[:300]",
            **overrides,
        }
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A trained codebook: its config with the path, and the report."""
    path = tmp_path_factory.mktemp("codebook") / "new" / "codebook.npz"
    report = train_codebook(make_config(), path)
    assert [file.name for file in path.parent.iterdir()] == ["codebook.npz"]
    return make_config(tokenizer__path=str(path)), report


def contents(path):
    return pathlib.Path(path).read_bytes()


def digits(config):
    source = open_source(config_lib.data_config(config))
    return np.stack([source[i]["image"] for i in range(len(source))]).astype(np.float32) / 127.5 - 1.0


def patches_of(images, p=2):
    """Patches in raster order, values ordered (channel, row, column), by plain loops."""
    _, height, width, _ = images.shape
    return np.stack(
        [
            images[:, i : i + p, j : j + p].transpose(0, 3, 1, 2).reshape(len(images), -1)
            for i in range(0, height, p)
            for j in range(0, width, p)
        ],
        1,
    )


def test_latents_are_rows_of_the_codebook(made):
    config, _ = made
    tokenizer, images = open_tokenizer(config_lib.tokenizer_config(config)), digits(config)
    shape = config_lib.tokens_of(config)
    latent = jax.jit(tokenizer.encode)(tokenizer.params, images, jax.random.key(0))
    assert latent.shape == images.shape and latent.dtype == jnp.float32
    codes = np.asarray(tokenizer.codebook(tokenizer.params))
    assert codes.shape == (NUM_CODES, 4) and codes.dtype == np.float32
    tokens = np.asarray(shape.patchify(latent))
    index = np.asarray(nearest(tokens, codes))
    np.testing.assert_array_equal(tokens, codes[index])  # to the bit
    patches = patches_of(images)
    np.testing.assert_array_equal(index, np.argmin(((patches[:, :, None] - codes) ** 2).sum(-1), -1))
    assert (tokens != patches).any()
    np.testing.assert_array_equal(tokenizer.decode(tokenizer.params, latent), latent)
    # Quantisation is idempotent.
    np.testing.assert_array_equal(tokenizer.encode(tokenizer.params, latent, jax.random.key(1)), latent)


def test_colour_patches():
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, 4, 6, 3)).astype(np.float32)
    patches = patches_of(images)
    codes = rng.permutation(patches.reshape(-1, 12))
    tokenizer = Codebook(codes, patch_size=2, channels=3)
    np.testing.assert_array_equal(tokenizer.encode(tokenizer.params, images, jax.random.key(0)), images)
    only = Codebook(codes[:1], patch_size=2, channels=3)
    latent = np.asarray(only.encode(only.params, images, jax.random.key(0)))
    np.testing.assert_array_equal(patches_of(latent), np.broadcast_to(codes[0], patches.shape))


@pytest.mark.parametrize("shape", [(1, 4, 4, 1), (1, 4, 5, 3), (1, 5, 4, 3)])
def test_invalid_image_shapes(shape):
    tokenizer = Codebook(np.zeros((1, 12), np.float32), patch_size=2, channels=3)
    with pytest.raises(UserError, match="2 x 2 patches with 3"):
        jax.eval_shape(tokenizer.encode, tokenizer.params, jnp.zeros(shape), jax.random.key(0))


def test_report_says_what_is_measured(made):
    config, report = made
    tokenizer, images = open_tokenizer(config_lib.tokenizer_config(config)), digits(config)
    latent = np.asarray(tokenizer.encode(tokenizer.params, images, jax.random.key(0)), np.float64)
    mse = ((latent - images) ** 2).mean()
    assert report["mse"] == pytest.approx(mse, rel=1e-6) and report["psnr"] == pytest.approx(10 * np.log10(4 / mse))
    assert report["num_images"] == 300 and report["num_codes"] == NUM_CODES
    assert report["codes_used"] == len(np.unique(patches_of(latent).reshape(-1, 4), axis=0)) == NUM_CODES
    assert report["checksum"] == tokenizer.checksum and report["path"] == config.tokenizer.path
    _, fit = codebook_lib.read(config.tokenizer.path)
    assert (fit.mse, fit.psnr, fit.num_images, fit.seed) == (report["mse"], report["psnr"], 300, config.seed)
    assert fit.source == "digits, split train[:300], 8 x 8"


def test_codes_fit_the_data(made):
    """Codes beat random patches of the data and are a minimum of k-means: each is the mean of its patches."""
    config, report = made
    patches = patches_of(digits(config)).reshape(-1, 4)
    drawn = np.random.default_rng(0).choice(np.unique(patches, axis=0), NUM_CODES, replace=False)
    assert report["mse"] < 0.6 * ((patches[:, None] - drawn) ** 2).mean(-1).min(-1).mean()
    codes = open_tokenizer(config_lib.tokenizer_config(config)).params["codebook"]
    index = ((patches[:, None] - codes) ** 2).sum(-1).argmin(-1)
    means = np.stack([patches[index == k].mean(0) for k in range(NUM_CODES)])
    np.testing.assert_allclose(codes, means, atol=0.02)


def test_as_many_codes_as_distinct_patches_have_no_error(tmp_path):
    config = make_config(data__split="train[:2]")
    kinds = len(np.unique(patches_of(digits(config)).reshape(-1, 4), axis=0))
    report = train_codebook(make_config(data__split="train[:2]", tokenizer__num_codes=kinds), tmp_path / "all.npz")
    assert report["mse"] < 1e-12 and report["psnr"] > 120.0 and report["codes_used"] == kinds
    with pytest.raises(UserError, match=f"num_codes={kinds + 1} .* {kinds} "):
        train_codebook(make_config(data__split="train[:2]", tokenizer__num_codes=kinds + 1), tmp_path / "no" / "a.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["all.npz"]


def test_same_seed_same_file(made, tmp_path):
    config, report = made
    again = train_codebook(make_config(), tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == contents(config.tokenizer.path)
    assert again["checksum"] == report["checksum"]
    other = train_codebook(make_config(), tmp_path / "other.npz", seed=1)
    assert (
        other["checksum"]
        != report["checksum"]
        == train_codebook(make_config(seed=1), tmp_path / "0.npz", seed=0)["checksum"]
    )


def test_flips_do_not_matter_but_data_do(made, tmp_path):
    _, report = made
    assert train_codebook(make_config(data__flip=True), tmp_path / "a.npz")["checksum"] == report["checksum"]
    other = train_codebook(make_config(data__split="train[300:600]"), tmp_path / "b.npz")
    assert other["checksum"] != report["checksum"]


def test_large_data_are_sampled(made, tmp_path, monkeypatch):
    _, report = made
    monkeypatch.setattr(training, "MAX_PATCHES", 400)
    monkeypatch.setattr(training, "_LOOKED_UP", 16 * 70)  # 300 images in batches of 70
    config = make_config()
    data, shape = config_lib.data_config(config), config_lib.tokens_of(config)
    drawn, num_images = training._draw_patches(data, shape, seed=0)
    assert drawn.shape == (400, 4) and drawn.dtype == np.uint8 and num_images == 300
    everything = np.rint((patches_of(digits(config)).reshape(-1, 4) + 1.0) * 127.5).astype(np.uint8)
    chosen = np.sort(np.random.default_rng(0).choice(4800, 400, replace=False, shuffle=False))
    np.testing.assert_array_equal(drawn, everything[chosen])
    sampled = train_codebook(config, tmp_path / "sampled.npz")
    assert sampled["num_images"] == 300 and report["mse"] < sampled["mse"] < 1.5 * report["mse"]
    monkeypatch.setattr(training, "MAX_PATCHES", 4800)
    whole = training._draw_patches(data, shape, seed=0)[0]
    np.testing.assert_array_equal(whole, everything)


def test_checksum_is_of_values_and_shape():
    codes = np.arange(16, dtype=np.float32).reshape(4, 4)
    checksum = Codebook(codes, 2, 1).checksum
    assert len(checksum) == 64 and checksum == Codebook(codes.copy(), 2, 1).checksum
    changed = codes.copy()
    changed[3, 3] = np.nextafter(changed[3, 3], np.float32(99.0))
    assert len({checksum, Codebook(changed, 2, 1).checksum, Codebook(codes.reshape(16, 1), 1, 1).checksum}) == 3


def damaged(path, how):
    data, arrays = path.read_bytes(), dict(np.load(path))
    if how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("no codebook")
    elif how == "bits":  # of the codes themselves
        at = data.index(arrays["codes"].tobytes())
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    else:
        if how == "other":
            arrays = {"images": np.zeros(3)}
        elif how == "nan":
            arrays["codes"][0, 0] = np.nan
        elif how == "double":
            arrays["codes"] = arrays["codes"].astype(np.float64)
        elif how == "dim":
            arrays["codes"] = arrays["codes"][:, :3]
        elif how == "text size":
            arrays["patch_size"] = np.array("2")
        elif how == "petabytes":  # which np.load would allocate
            header = np.lib.format.header_data_from_array_1_0(arrays["codes"]) | {"shape": (1 << 48, 4)}
            with zipfile.ZipFile(path, "w") as archive, archive.open("codes.npy", "w") as file:
                np.lib.format.write_array_header_1_0(file, header)
            return
        elif how == "array":
            with open(path, "wb") as file:
                np.save(file, arrays["codes"])
            return
        np.savez(path, **arrays)


@pytest.mark.parametrize(
    "how", ["cut", "empty", "text", "bits", "other", "nan", "double", "dim", "array", "text size", "petabytes"]
)
def test_damaged_files(made, tmp_path, how):
    path = tmp_path / "damaged.npz"
    path.write_bytes(contents(made[0].tokenizer.path))
    config = make_config(tokenizer__path=str(path))
    open_tokenizer(config_lib.tokenizer_config(config))
    damaged(path, how)
    with pytest.raises(UserError, match=f"^{path}.* ") as caught:
        open_tokenizer(config_lib.tokenizer_config(config))
    assert "marjax train-tokenizer" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(path=""), "path is empty.*marjax train-tokenizer --config"),
        (dict(path="nowhere.npz"), "nowhere.npz does not exist.*marjax train-tokenizer --config"),
        (dict(num_codes=17), "num_codes is 17, but the codebook .* with 16"),
        (dict(patch_size=4), "patch_size is 4, but the codebook .* with 2"),
        (dict(checksum="0" * 64), "has checksum .* 000000000000"),
    ],
)
def test_a_codebook_that_does_not_match_the_config(made, changes, says):
    config, report = made
    changed = make_config(
        **{
            f"tokenizer__{key}": value
            for key, value in {"path": config.tokenizer.path, "checksum": report["checksum"], **changes}.items()
        }
    )
    with pytest.raises(UserError, match=says) as caught:
        open_tokenizer(config_lib.tokenizer_config(changed))
    assert "\n" not in str(caught.value)
    changed.tokenizer.update(path=config.tokenizer.path, num_codes=NUM_CODES, patch_size=2, checksum=report["checksum"])
    assert open_tokenizer(config_lib.tokenizer_config(changed)).checksum == report["checksum"]


FLAGS = [
    "--config.tokenizer.name=codebook",
    "--config.tokenizer.patch_size=2",
    f"--config.tokenizer.num_codes={NUM_CODES}",
    "--config.data.split=train[:300]",
]


def command(*arguments):
    return main(["train-tokenizer", "--config", f"{DIGITS}:debug", *FLAGS, *arguments])


def test_command(made, tmp_path, capsys):
    out = tmp_path / "c.npz"
    for flags in (["--out", str(out), "--config.tokenizer.path=elsewhere.npz"], [f"--config.tokenizer.path={out}"]):
        assert command(*flags) == 0  # the second start finds the same file
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 1 and lines[0].startswith(f"{out}: 16 codes (16 used), 300 images, mse 0.")
        assert f"PSNR {made[1]['psnr']:.2f} dB" in lines[0]
    assert out.read_bytes() == contents(made[0].tokenizer.path)
    assert command("--out", str(out), "--config.seed=1") == 2
    error = capsys.readouterr().err
    assert "seed 0, not 1" in error and len(error.splitlines()) == 1
    assert out.read_bytes() == contents(made[0].tokenizer.path)
    assert command("--out", str(out), "--config.seed=1", "--overwrite") == 0
    assert out.read_bytes() != contents(made[0].tokenizer.path)
    assert [path.name for path in tmp_path.iterdir()] == ["c.npz"]


def test_same_settings_but_other_contents_are_kept(made, tmp_path):
    path = tmp_path / "c.npz"
    codebook, fit = codebook_lib.read(made[0].tokenizer.path)
    other = Codebook(codebook.params["codebook"] * np.float32(0.5), 2, 1)
    np.savez(path, **codebook_lib.arrays_of(other, fit))
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"c\.npz .*mse"):
        train_codebook(make_config(), path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "arguments, says",
    [
        ([], "give --out FILE"),
        (["--out", "/proc/no/c.npz"], "/proc/no"),
        (["--out", "."], "is a folder"),
        (["--out", "c.npz", "--config.tokenizer.name=pixels"], "codebook"),
        (
            [
                "--out",
                "c.npz",
                "--config.tokenizer.name=kl16",
                "--config.data.image_size=64",
                "--config.data.channels=3",
            ],
            ".safetensors",
        ),
        (["--out", "c.npz", "--config.tokenizer.num_codes=0"], "num_codes is 0"),
        (["--out", "c.npz", "--config.tokenizer.num_codes=1000000"], "num_codes=1000000"),
        (["--out", "c.npz", "--config.tokenizer.patch_size=3"], "not divisible"),
        (["--out", "c.npz", "--config.seed=-1"], "config.seed is -1"),
        (["--out", "c.npz", "--config.data.split=test"], "data.split='test'"),
        (["--out", "c.npz", "--codes=3"], "unknown argument"),
    ],
)
def test_user_errors_are_one_line_and_write_nothing(tmp_path, capsys, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert command(*arguments) == 2
    error = capsys.readouterr().err
    assert says in error and error.splitlines()[-1].startswith("marjax train-tokenizer: error: ")
    assert error.count("error: ") == 1
    assert not list(tmp_path.iterdir())
