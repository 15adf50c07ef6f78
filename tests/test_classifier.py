"""The classifier on the digits of scikit-learn: training, determinism, its file."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from marjax.errors import UserError
from marjax.evaluation.networks import classifier as classifier_lib
from marjax.evaluation.networks.classifier import Classifier, train_classifier


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    shuffled = np.random.default_rng(0).permutation(len(data.target))  # they are sorted by writer
    return np.round(data.images * 255 / 16).astype(np.uint8)[shuffled, ..., None], data.target[shuffled]


@pytest.fixture(scope="module")
def trained(digits):
    images, labels = digits
    return train_classifier(images[:1400], labels[:1400], 10, steps=300, batch_size=64, max_shift=1)


def test_accuracy_and_shapes(trained, digits):
    images, labels = (part[1400:] for part in digits)
    assert trained.accuracy(images, labels) > 0.9
    assert trained.accuracy(images, (labels + 1) % 10) < 0.1
    features, logits, spatial = trained.extract(images)
    assert spatial is None
    assert features.shape == (397, trained.num_features) and logits.shape == (397, 10)
    assert features.dtype == logits.dtype == np.float32
    assert (trained.image_size, trained.channels) == (8, 1)
    # The logits are a linear map of the features.
    design = np.concatenate([features, np.ones((397, 1))], axis=1)
    np.testing.assert_allclose(design @ np.linalg.lstsq(design, logits, rcond=None)[0], logits, atol=1e-2)


def test_rows_depend_on_their_own_image_only(trained, digits, monkeypatch):
    images = digits[0][:300]  # more than a batch
    features = trained.extract(images).features
    assert features.std(axis=0).max() > 0
    np.testing.assert_array_equal(trained.extract(images[257:260]).features, features[257:260])
    assert trained.extract(images[:0]).features.shape == (0, trained.num_features)
    monkeypatch.setattr(classifier_lib, "EVAL_BATCH", 7)
    np.testing.assert_allclose(trained.extract(images).features, features, atol=1e-5)


def test_the_same_seed_gives_the_same_network(digits):
    images, labels = digits
    one, same, other, unshifted = (
        train_classifier(images, labels, 10, steps=3, batch_size=16, **more).extract(images[:8]).logits
        for more in ({"seed": 3}, {"seed": 3}, {"seed": 4}, {"seed": 3, "max_shift": 0})
    )
    np.testing.assert_array_equal(one, same)
    assert (one != other).any() and (one != unshifted).any()


def test_shifts_move_whole_pixels_up_to_the_limit():
    import jax

    image = np.zeros((1, 9, 9, 1), np.uint8)
    image[0, 4, 4] = 255
    moved = np.asarray(classifier_lib._shifted(image.repeat(400, axis=0), jax.random.key(0), 2))
    places = {tuple(place[:2]) for place in (np.argwhere(one) for one in moved) for place in place}
    assert places == {(row, column) for row in range(2, 7) for column in range(2, 7)}


@pytest.mark.parametrize(
    "name, change",
    [
        ("image_size", 9),
        ("image_size", 0),
        ("image_size", 1 << 40),
        ("image_size", [8]),
        ("image_size", 8.0),
        ("channels", -1),
        ("num_classes", 11),
        ("num_classes", None),
        ("Dense_0/bias", np.zeros(3, np.float32)),
        ("Dense_0/bias", np.full(64, np.nan, np.float32)),
        ("Dense_0/bias", np.array([{}], object)),
        ("Dense_0/bias", "x"),
        ("other", 1),
    ],
)
def test_a_file_with_an_invalid_array(trained, tmp_path, name, change):
    trained.save(tmp_path / "classifier.npz")
    arrays = dict(np.load(tmp_path / "classifier.npz")) | {name: change}
    np.savez(tmp_path / "odd.npz", **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(UserError, match=r"odd\.npz"):
        Classifier.load(tmp_path / "odd.npz")


def test_save_and_load(trained, digits, tmp_path):
    trained.save(tmp_path / "classifier.npz")
    again = Classifier.load(tmp_path / "classifier.npz")
    assert (again.image_size, again.channels, again.num_classes) == (8, 1, 10)
    assert again.checksum == trained.checksum
    for theirs, ours in zip(again.extract(digits[0][:20])[:2], trained.extract(digits[0][:20])[:2], strict=True):
        np.testing.assert_array_equal(theirs, ours)
    assert [path.name for path in tmp_path.iterdir()] == ["classifier.npz"]
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("text")
    (tmp_path / "empty.npz").touch()
    (tmp_path / "cut.npz").write_bytes((tmp_path / "classifier.npz").read_bytes()[:1000])
    for name in ("missing.npz", "other.npz", "array.npy", "text.npz", "empty.npz", "cut.npz"):
        with pytest.raises(UserError, match=name):
            Classifier.load(tmp_path / name)


def test_invalid_images_and_labels(trained, digits):
    images, labels = digits
    with pytest.raises(ValueError, match="expected uint8"):
        trained.extract(images.astype(np.float32))
    with pytest.raises(ValueError, match=r"\(N, \*\(8, 8, 1\)\)"):
        trained.extract(images[:, :4])
    with pytest.raises(ValueError, match="labels"):
        trained.accuracy(images, labels[:5])
    for wrong_images, wrong_labels, says in (
        (images / 255, labels, "uint8"),
        (images[:, :4], labels, "S, S"),
        (images, labels[:5], "integers"),
        (images, labels + 1, r"\[1, 10\]"),
    ):
        with pytest.raises(ValueError, match=says):
            train_classifier(wrong_images, wrong_labels, 10, steps=1)
