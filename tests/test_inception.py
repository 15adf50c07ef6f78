"""InceptionV3 against the reference's numbers at every layer; its weight files and image formats."""

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity.seeded_weights import seeded_array
from safetensors.numpy import save_file
from support.compare import parity, relative_error
from support.processes import run_program
from support.pytorch_files import storage, tensor, write_zip

from marjax.errors import UserError
from marjax.evaluation.networks import inception
from marjax.evaluation.networks.inception import Network, layers, resize
from marjax.evaluation.networks.inception_file import SOURCES, cache_path, checksum, convert_inception, open_inception
from marjax.interop import weights_file
from marjax.interop.inception_names import tensor_shapes, to_params

SHAPES = tensor_shapes(inception.kernel_shapes())
LAYERS = ("64", "192", "768", "2048", "logits_unbiased", "logits")


def view(place, shape):
    """A tensor over the first elements of a storage."""
    return tensor(place, 0, shape, tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))))


def write_pth(path, arrays):
    """A PyTorch file like the released ones, with the batch counters of some versions."""
    each = {
        name: view(storage("FloatStorage", str(i), array.size), array.shape)
        for i, (name, array) in enumerate(arrays.items())
    }
    counter = tensor(storage("LongStorage", str(len(arrays)), 1), 0, (), ())
    return write_zip(
        path,
        each | {"Conv2d_1a_3x3.bn.num_batches_tracked": counter},
        [*(array.tobytes() for array in arrays.values()), bytes(8)],
    )


def write_names(path, shapes, value=1.0):
    """A small PyTorch file: tensors of these shapes that share one constant storage."""
    size = max(int(np.prod(shape)) for shape in shapes.values())
    place = storage("FloatStorage", "0", size)
    return write_zip(
        path, {name: view(place, shape) for name, shape in shapes.items()}, [np.full(size, value, np.float32).tobytes()]
    )


@pytest.fixture(scope="module")
def state():
    return {name: seeded_array(name, shape, gain=1.5) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def pth(state, tmp_path_factory):
    return write_pth(tmp_path_factory.mktemp("inception") / "pt_inception-2015-12-05-6726825d.pth", state)


@pytest.fixture(scope="module")
def extractor(pth):
    return open_inception(pth, batch_size=2)


@pytest.fixture(scope="module")
def theirs():
    """The reference's numbers, and its images, uint8 (3, 64, 64, 3)."""
    arrays, _ = parity("inception")
    return arrays, np.ascontiguousarray(arrays["in/images"].transpose(0, 2, 3, 1))


@pytest.fixture(scope="module")
def ours(state, theirs):
    """The outputs of `layers` for the reference's images, and the input of Mixed_6d."""

    @jax.jit
    def run(params, images):
        x = (resize(images) - 128.0) / 128.0
        _, seen = Network().apply({"params": params}, x, capture_intermediates=lambda part, _: part.name == "Mixed_6c")
        return layers(params, images), seen["intermediates"]["Mixed_6c"]["__call__"][0][0]

    return jax.device_get(run(to_params(inception.kernel_shapes(), state), theirs[1]))


# --- The reference's own numbers -------------------------------------------------------------------------------------


def test_every_layer(ours, theirs):
    found, arrays = ours[0], theirs[0]
    for name in LAYERS:
        assert relative_error(found[name], arrays[f"out/{name}"]) < 1e-5, name
        assert relative_error(found[name][::-1], arrays[f"out/{name}"]) > 1e-2, name  # the images differ
    assert relative_error(found["logits"], arrays["out/logits_unbiased"]) > 1e-2


def test_the_extractor(extractor, ours, theirs):
    found, (arrays, images) = extractor.extract(theirs[1]), theirs
    assert relative_error(found.features, arrays["out/2048"]) < 1e-5
    assert relative_error(found.logits, arrays["out/logits_unbiased"]) < 1e-5
    assert relative_error(found.spatial, ours[0]["spatial"]) < 1e-5
    for array, width in zip(found, (extractor.num_features, extractor.num_classes, extractor.num_spatial), strict=True):
        assert array.shape == (len(images), width) and array.dtype == np.float32
    assert (extractor.name, extractor.image_size, extractor.num_spatial) == ("inception", 299, 2023)


def test_spatial_features_and_their_order(state, ours):
    """The 1 x 1 branch computed in NumPy from the PyTorch tensors."""
    found, before = ours
    weight, scale, shift, mean, variance = (
        state[f"Mixed_6d.branch1x1.{name}"].astype(np.float64)
        for name in ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    )
    after = (before @ weight[..., 0, 0].T - mean) / np.sqrt(variance + 1e-3) * scale + shift
    after = np.maximum(0.0, after)[..., :7]
    assert after.shape == (3, 17, 17, 7)
    by_rows, by_columns = after.reshape(3, -1), after.transpose(0, 2, 1, 3).reshape(3, -1)
    assert relative_error(found["spatial"], by_rows) < 1e-5 < 1e-2 < relative_error(found["spatial"], by_columns)


@pytest.mark.parametrize("height, width", [(64, 64), (30, 47), (299, 299), (300, 640), (1, 2)])
def test_resize(height, width):
    """Against linear interpolation weights in float64."""

    def tents(size):
        at = np.minimum(np.arange(299) * size / 299, size - 1)
        return np.maximum(0.0, 1.0 - np.abs(at[:, None] - np.arange(size)))

    images = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), np.uint8)
    expected = np.einsum("oh,bhwc,pw->bopc", tents(height), images, tents(width), optimize=True)
    made = resize(jnp.asarray(images))
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, expected, atol=0.02)  # float32 positions among 640 pixels have an error of 6e-5
    centred = jax.image.resize(images.astype(np.float32), made.shape, "linear", antialias=False)
    assert (height, width) == (299, 299) or np.abs(centred - expected).max() > 5.0
    if height == width == 299:
        np.testing.assert_array_equal(made, images)


# --- Images ----------------------------------------------------------------------------------------------------------


def test_rows_depend_on_their_own_image_only(extractor, pth, theirs, tmp_path):
    images = np.concatenate([theirs[1], theirs[1][:2, ::-1]])  # two batches and a partial one
    found = extractor.extract(images)
    assert all(np.abs(array[i] - array[i + 1]).max() > 1e-3 for array in found for i in range(4))
    for rows in (slice(1, 4), slice(4, 5)):
        for whole, part in zip(found, extractor.extract(images[rows]), strict=True):
            np.testing.assert_array_equal(part, whole[rows])
    assert [array.shape for array in extractor.extract(images[:0])] == [(0, 2048), (0, 1008), (0, 2023)]
    # On two devices, also with a partial last batch.
    np.save(tmp_path / "images.npy", images)
    files = tmp_path / "images.npy", tmp_path / "found.npz"
    run_program("support.programs.inception_features", pth, *files, devices=2)
    for name, array in np.load(tmp_path / "found.npz").items():
        assert relative_error(array, found[int(name.removeprefix("arr_"))]) < 1e-6


def test_grey_images_are_three_equal_channels(extractor, theirs):
    images = theirs[1]
    grey = extractor.extract(images[..., :1])
    for one, three, colour in zip(
        grey, extractor.extract(images[..., :1].repeat(3, -1)), extractor.extract(images), strict=True
    ):
        np.testing.assert_array_equal(one, three)
        assert (one != colour).any()


def test_invalid_images(extractor, theirs):
    images = theirs[1]
    for wrong in (images.astype(np.float32), images[0], images[..., :2], images[:, :0]):
        with pytest.raises(ValueError, match="expected uint8"):
            extractor.extract(wrong)


# --- Weights ---------------------------------------------------------------------------------------------------------


def test_conversion_of_pytorch_files(state, pth, tmp_path, monkeypatch):
    out = tmp_path / "inception.safetensors"
    assert convert_inception(pth, out) == (checksum(state), True)
    written = out.read_bytes()
    assert convert_inception(pth, out) == (checksum(state), False) and out.read_bytes() == written
    stored = weights_file.read(out).content
    assert stored.keys() == state.keys()  # without the counter
    assert all(np.array_equal(np.asarray(stored[name]), array) for name, array in state.items())
    # The checksum depends on the weights only, not on the file format.
    save_file(state, tmp_path / "plain.safetensors")
    assert convert_inception(tmp_path / "plain.safetensors", out) == (checksum(state), False)
    monkeypatch.setenv("MARJAX_INCEPTION", str(out))
    assert open_inception().checksum == open_inception(pth).checksum == checksum(state)
    changed = state | {"fc.bias": state["fc.bias"] + 1}
    assert checksum(changed) != checksum(state)
    # Files with other weights, and files that are not ours, are not replaced.
    save_file(changed, tmp_path / "plain.safetensors")
    for source, there in ((tmp_path / "plain.safetensors", out), (pth, tmp_path / "plain.safetensors")):
        with pytest.raises(UserError, match=str(there)):
            convert_inception(source, there)
    with pytest.raises(UserError, match=r"x\.pth.* \.safetensors"):
        convert_inception(pth, tmp_path / "x.pth")
    # A flipped bit.
    out.write_bytes(written[:-1] + bytes([written[-1] ^ 1]))
    with pytest.raises(UserError, match="inception.safetensors is damaged"):
        open_inception()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inception.safetensors", "plain.safetensors"]


def test_the_path_of_the_weights(tmp_path, monkeypatch):
    monkeypatch.delenv("MARJAX_INCEPTION", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_path() == os.path.expanduser("~/.cache/marjax/inception.safetensors")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small = write_names(tmp_path / "small.pth", SHAPES)

    def missing(path, given=None):
        with pytest.raises(UserError) as caught:
            open_inception(given)
        said = str(caught.value)
        assert said.startswith(f"{path} does not exist") and "marjax convert --inception FILE" in said
        assert all(source in said for source in SOURCES) and "MARJAX_INCEPTION" in said

    missing(tmp_path / "cache" / "marjax" / "inception.safetensors")
    total, is_new = convert_inception(small)
    assert is_new and open_inception().checksum == total and pathlib.Path(cache_path()).parent.parent.name == "cache"
    monkeypatch.setenv("MARJAX_INCEPTION", str(tmp_path / "variable.pth"))
    missing(tmp_path / "variable.pth")
    missing(tmp_path / "given.pth", tmp_path / "given.pth")
    assert open_inception(small).checksum == total


def test_invalid_weights(tmp_path):
    less = {name: shape for name, shape in SHAPES.items() if name != "Mixed_7c.branch1x1.bn.bias"}
    for given, value, text in (
        (less, 1.0, r"Mixed_7c\.branch1x1\.bn\.bias is missing"),
        (SHAPES | {"AuxLogits.fc.weight": (2, 3)}, 1.0, r"AuxLogits\.fc\.weight is not used"),
        (SHAPES | {"fc.bias": (1000,)}, 1.0, r"fc\.bias .*\(1000,\).*\(1008,\)"),
        ({"x": (1,)}, 1.0, r"Conv2d_1a_3x3\.conv\.weight is missing; .* 453 more"),
        (SHAPES, np.nan, r"Conv2d_1a_3x3\.conv\.weight is not finite"),
    ):
        with pytest.raises(UserError, match=text):
            convert_inception(write_names(tmp_path / "x.pth", given, value), tmp_path / "x.safetensors")
    for content in ([1], {"fc.bias": 3}, {7: 1}):
        with pytest.raises(UserError, match=r"x\.pth is not FID's InceptionV3"):
            convert_inception(write_zip(tmp_path / "x.pth", content), tmp_path / "x.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]


def test_the_shapes_are_those_of_the_2015_graph():
    assert len(SHAPES) == 94 * 5 + 2 and sum(int(np.prod(shape)) for shape in SHAPES.values()) > 23e6
    assert SHAPES["Mixed_6c.branch7x7_2.conv.weight"] == (160, 160, 1, 7)
    assert SHAPES["fc.weight"] == (inception.NUM_CLASSES, inception.NUM_FEATURES)
