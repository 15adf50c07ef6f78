"""Statistics files: of other programs, ours, broken ones; images from npz files, folders and configs."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image
from support.configs import make_digits
from support.networks import Network

from marjax import config as config_lib
from marjax.data.preprocess import center_crop
from marjax.data.sources import open_source
from marjax.errors import UserError
from marjax.evaluation.across_processes import ALONE, Processes
from marjax.evaluation.image_sets import ConfigImages, FolderImages, NpzImages
from marjax.evaluation.metrics.frechet import gaussian
from marjax.evaluation.statistics import compute_statistics, read_statistics, write_statistics

RNG = np.random.default_rng(0)
STATS = gaussian(RNG.normal(size=(30, 5)))
SPATIAL = gaussian(RNG.normal(size=(30, 3)))
IMAGES = RNG.integers(0, 256, (11, 4, 6, 3), np.uint8)
ADM = {"mu": STATS.mean, "sigma": STATS.cov, "mu_s": SPATIAL.mean, "sigma_s": SPATIAL.cov, "arr_0": IMAGES}


def npz(tmp_path, compressed=False, **arrays):
    path = tmp_path / "stats.npz"
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


def all_of(images, batch_size, hosts=ALONE):
    batches = list(images.batches(batch_size, hosts))
    return np.concatenate([indices for indices, _ in batches]), np.concatenate([images for _, images in batches])


def test_an_adm_reference_batch(tmp_path):
    path = npz(tmp_path, **ADM)
    found = read_statistics(path)
    assert (found.name, found.path, found.source) == ("stats.npz", str(path), "")
    assert found.checksum == hashlib.sha256(path.read_bytes()).hexdigest()
    for ours, theirs in ((found.gaussian, STATS), (found.spatial, SPATIAL)):
        np.testing.assert_array_equal(ours.mean, theirs.mean)
        np.testing.assert_array_equal(ours.cov, theirs.cov)
        assert ours.count == 0
    assert found.features is None and found.extractor is None and found.images.shape == IMAGES.shape
    np.testing.assert_array_equal(all_of(found.images, 4)[1], IMAGES)


@pytest.mark.parametrize("keys", [("mu", "sigma"), ("ref_mu", "ref_sigma")])
def test_files_with_statistics_only(tmp_path, keys):
    single = STATS.mean.astype(np.float32), STATS.cov.astype(np.float32)
    found = read_statistics(npz(tmp_path, **dict(zip(keys, single, strict=True))))
    assert found.gaussian.mean.dtype == found.gaussian.cov.dtype == np.float64
    np.testing.assert_array_equal(found.gaussian.cov, single[1])
    assert found.spatial is None and found.images is None


def test_files_with_images_only(tmp_path):
    found = read_statistics(npz(tmp_path, arr_0=IMAGES, arr_1=np.arange(11)))
    assert found.gaussian is None and len(found.images) == 11


def test_write_and_read(tmp_path):
    images = RNG.integers(0, 256, (40, 4, 4, 3), np.uint8)
    batches = [(np.arange(0, 30), images[:30]), (np.arange(30, 40), images[30:])]
    made = compute_statistics(batches, 40, Network(), source="noise", keep_features=8)
    extracted = Network().extract(images)
    np.testing.assert_allclose(made.gaussian.cov, np.cov(extracted.features.T), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(made.spatial.mean, extracted.spatial.mean(0), rtol=1e-5, atol=1e-6)
    rows = [np.flatnonzero((extracted.features == row).all(axis=1)).tolist() for row in made.features]
    assert rows == sorted(rows) and all(len(found) == 1 for found in rows) and rows != [[i] for i in range(8)]
    written = write_statistics(tmp_path / "ours.npz", made)
    found = read_statistics(tmp_path / "ours.npz")
    assert (found.path, found.checksum) == (written.path, written.checksum)
    assert (found.source, found.extractor) == ("noise", {"name": "linear", "checksum": "0" * 64})
    assert found.gaussian.count == found.spatial.count == 40
    np.testing.assert_array_equal(found.gaussian.cov, made.gaussian.cov)
    np.testing.assert_array_equal(found.spatial.cov, made.spatial.cov)
    assert found.features.dtype == np.float32 and found.features.tolist() == made.features.tolist()
    assert write_statistics(tmp_path / "again.npz", made).checksum == written.checksum
    assert sorted(file.name for file in tmp_path.iterdir()) == ["again.npz", "ours.npz"]


def test_each_image_once():
    images = RNG.integers(0, 256, (4, 4, 4, 3), np.uint8)
    for indices in ([0, 1, 2], [0, 1, 2, 2]):
        with pytest.raises(ValueError, match="of 4 images"):
            compute_statistics([(np.array(indices), images[: len(indices)])], 4, Network())
    with pytest.raises(UserError, match="images is 1"):
        compute_statistics([], 1, Network())


ASYMMETRIC = STATS.cov + np.eye(5, k=1)
META = json.dumps({"format": 1, "count": 30, "source": "", "extractor": None})


@pytest.mark.parametrize(
    "arrays, said",
    [
        ({"weights": np.zeros(3)}, "weights"),
        ({"mu": STATS.mean}, "sigma"),
        ({"ref_sigma": STATS.cov}, "ref_mu"),
        ({**ADM, "sigma_s": STATS.cov}, r"sigma_s .*\(5, 5\).*\(3, 3\)"),
        ({"mu": STATS.mean, "sigma": STATS.mean}, "sigma"),
        ({"mu": np.arange(5), "sigma": STATS.cov}, "mu"),
        ({"mu": STATS.mean, "sigma": ASYMMETRIC}, "sigma"),
        ({"mu": STATS.mean, "sigma": -STATS.cov}, "sigma"),
        ({"mu": STATS.mean * np.nan, "sigma": STATS.cov}, "mu"),
        ({"mu": np.array([print, None]), "sigma": STATS.cov}, "mu"),
        ({**ADM, "arr_0": IMAGES.astype(np.float32)}, "arr_0"),
        ({**ADM, "arr_0": IMAGES[0]}, r"arr_0"),
        ({**ADM, "arr_0": np.asfortranarray(IMAGES)}, "in Fortran order"),
        ({**ADM, "features": np.zeros((4, 3), np.float32)}, "features"),
        ({**ADM, "meta": META.replace("1", "2", 1)}, "meta: format"),
        ({**ADM, "meta": META.replace("30", "true")}, "meta: count"),
        ({**ADM, "meta": META.replace("null", '{"name": 1, "checksum": ""}')}, "meta: extractor.name"),
        ({**ADM, "meta": META.replace("null", '{"name": "a\\nb", "checksum": ""}')}, "meta: extractor.name"),
        ({**ADM, "meta": "[" * 100_000}, "meta"),
        ({**ADM, "meta": np.array([META])}, "meta"),
        ({**ADM, "mu": np.full(5, 1e200)}, "mu"),
        ({**ADM, "sigma": STATS.cov * 1e300}, "sigma"),
        ({**ADM, "sigma": np.zeros((0, 0)), "mu": np.zeros(0)}, "mu"),
        ({**ADM, "meta": "[]"}, "meta"),
    ],
)
def test_errors_name_file_and_key(tmp_path, arrays, said):
    path = npz(tmp_path, **arrays)
    with pytest.raises(UserError, match=said) as caught:
        read_statistics(path)
    assert str(path) in str(caught.value)


def test_files_in_another_format(tmp_path):
    with pytest.raises(UserError, match=r"none\.npz"):
        read_statistics(tmp_path / "none.npz")
    whole = npz(tmp_path, **ADM).read_bytes()
    single = tmp_path / "single.npy"
    np.save(single, STATS.mean)
    for content in (
        whole[: len(whole) // 2],
        b"",
        b"text",
        single.read_bytes(),
        whole.replace(STATS.cov.tobytes(), STATS.cov.tobytes()[::-1]),
    ):
        (tmp_path / "stats.npz").write_bytes(content)
        with pytest.raises(UserError, match="stats.npz"):
            read_statistics(tmp_path / "stats.npz")


@pytest.mark.parametrize("compressed", [False, True])
def test_images_of_an_npz_file_by_process(tmp_path, compressed):
    images = NpzImages(npz(tmp_path, compressed, other=IMAGES), "other")
    for size in (1, 4, 99):
        indices, found = all_of(images, size)
        assert indices.tolist() == list(range(11))
        np.testing.assert_array_equal(found, IMAGES)
    shares = [all_of(images, 3, Processes(index, 2)) for index in range(2)]
    assert [share[0].tolist() for share in shares] == [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10]]
    for indices, found in shares:
        np.testing.assert_array_equal(found, IMAGES[indices])
    with pytest.raises(UserError, match="arr_0"):
        NpzImages(tmp_path / "stats.npz")


def test_pictures_of_a_folder(tmp_path):
    (tmp_path / "b").mkdir()
    for name, image in zip(("b/0.png", "a.png", "c.png"), IMAGES, strict=False):
        Image.fromarray(image).save(tmp_path / name)
    images = FolderImages(tmp_path)
    indices, found = all_of(images, 2)
    assert len(images) == 3 and indices.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(found, IMAGES[[1, 0, 2]])
    np.testing.assert_array_equal(all_of(images, 2, Processes(1, 2))[1], IMAGES[[2]])
    np.testing.assert_array_equal(all_of(FolderImages(tmp_path, 4), 9)[1][0], center_crop(IMAGES[1], 4))
    Image.fromarray(IMAGES[3, :3, :3, 0]).save(tmp_path / "d.png")
    with pytest.raises(UserError, match=r"d\.png .*3 x 3.*4 x 6"):
        all_of(FolderImages(tmp_path), 9)
    assert all_of(FolderImages(tmp_path, 4), 9)[1].shape == (4, 4, 4, 3)
    grey = all_of(FolderImages(tmp_path, 4, channels=1), 9)[1]
    assert grey.shape == (4, 4, 4, 1)
    with pytest.raises(UserError, match="none"):
        FolderImages(tmp_path / "none")


def test_the_data_of_a_config():
    data = config_lib.data_config(make_digits(data__split="train[:11]"))
    images, source = ConfigImages(data), open_source(data)
    expected = np.stack([source[index]["image"] for index in range(11)])
    assert len(images) == 11 and "digits" in images.source
    for size, count in ((4, 1), (2, 2), (3, 4), (5, 4)):  # in the last case one process has none
        shares = [list(images.batches(size, Processes(index, count))) for index in range(count)]
        seen = np.concatenate([indices for share in shares for indices, _ in share])
        assert sorted(seen.tolist()) == list(range(11))
        for indices, found in [batch for share in shares for batch in share]:
            np.testing.assert_array_equal(found, expected[indices])
