"""LPIPS against a NumPy computation, and its weight files."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from marjax.errors import UserError
from marjax.tokenizer_training import lpips


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files with seeded weights, scaled to keep activations alive through 13 layers."""
    rng = np.random.default_rng(0)

    def draw(shapes, classifier):
        arrays = {
            name: rng.standard_normal(shape).astype(np.float32) * np.sqrt(2.0 / max(1, np.prod(shape[1:])))
            for name, shape in shapes.items()
        }
        return arrays | classifier

    folder = tmp_path_factory.mktemp("lpips")
    save_file(draw(lpips.names(), {"classifier.0.weight": np.zeros((2, 3), np.float32)}), folder / "vgg.safetensors")
    linear = {name: np.abs(array) for name, array in draw(lpips.linear_names(), {}).items()}
    save_file(linear, folder / "linear.safetensors")
    return folder / "vgg.safetensors", folder / "linear.safetensors"


def by_hand(params, one, other):
    def features(image):
        x = (image.astype(np.float64) - [-0.030, -0.088, -0.188]) / [0.458, 0.448, 0.450]
        found = []
        for place, layer in enumerate(params["features"]):
            if place in (2, 4, 7, 10):
                b, h, w, c = x.shape
                x = x[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))
            windows = np.lib.stride_tricks.sliding_window_view(
                np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), (3, 3), axis=(1, 2)
            )
            x = np.maximum(0.0, np.einsum("bhwcij,ijco->bhwo", windows, layer["kernel"], optimize=True) + layer["bias"])
            if place in (1, 3, 6, 9, 12):
                found.append(x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-20))
        return found

    pairs = zip(features(one), features(other), params["linear"], strict=True)
    return sum((((a - b) ** 2) * shares).sum(-1).mean((1, 2)) for a, b, shares in pairs)


def test_agrees_with_numpy(files):
    params = lpips.read(*files)
    images = np.random.default_rng(1).uniform(-1, 1, (2, 2, 18, 18, 3)).astype(np.float32)
    distance = jax.jit(lpips.distance)
    ours = distance(params, *images)
    assert ours.shape == (2,) and (ours > 1e-3).all()
    np.testing.assert_allclose(ours, by_hand(params, *images), rtol=1e-4)
    np.testing.assert_array_equal(distance(params, images[0], images[0]), [0.0, 0.0])
    grey = images[..., :1]
    np.testing.assert_allclose(distance(params, *grey), by_hand(params, *np.repeat(grey, 3, -1)), rtol=1e-4)
    # The gradient is finite between equal black images.
    gradient = jax.jit(jax.grad(lambda x: lpips.distance(params, x, images[0][:1] * 0.0).sum()))(images[0][:1] * 0.0)
    assert np.isfinite(gradient).all()


def test_invalid_files(files, tmp_path):
    vgg, linear = files
    with pytest.raises(UserError, match=r"VGG16 of torchvision: features\.0\.weight"):
        lpips.read(linear, linear)
    with pytest.raises(UserError, match=r"LPIPS.*: lin0\.model\.1\.weight is missing"):
        lpips.read(vgg, vgg)
    arrays = {name: np.ones(shape, np.float32) for name, shape in lpips.linear_names().items()}
    for change, said in (
        ({"lin0.model.1.weight": np.ones((1, 3, 1, 1), np.float32)}, r"\(1, 3, 1, 1\)"),
        ({"more": np.ones(1, np.float32)}, "more is not used"),
        ({"lin1.model.1.weight": np.full((1, 128, 1, 1), np.nan, np.float32)}, r"lin1\.model\.1\.weight"),
    ):
        save_file(arrays | change, tmp_path / "bad.safetensors")
        with pytest.raises(UserError, match=said):
            lpips.read(vgg, tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match="nowhere"):
        lpips.read(tmp_path / "nowhere.pth", linear)
