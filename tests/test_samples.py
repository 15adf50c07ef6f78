"""Sets of samples on disk: specs, interrupted starts, several processes, files for other programs."""

import dataclasses
import os
import signal
import time
import zipfile

import numpy as np
import pytest
from PIL import Image
from support.configs import make_digits
from support.processes import Run

from marjax import train
from marjax.errors import UserError
from marjax.evaluation.across_processes import ALONE, Processes
from marjax.evaluation.evaluate import LOCK
from marjax.evaluation.samples import SampleSet, SampleSpec
from marjax.generation.sample import open_sampler
from marjax.lock import locked_folder

SPEC = SampleSpec(
    num_images=23,
    seed=3,
    num_classes=10,
    settings={"cfg": 1.0},
    weights="ema",
    step=4,
    digest="d",
    tokenizer="",
    batch_size=6,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("samples") / "run"
    train(make_digits(train__steps=2, checkpoint__every=2), workdir)
    return workdir


@pytest.fixture(scope="module")
def opened(run):
    return open_sampler(run, local=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, opened):
    """All 23 images, made without interruption, and the bytes of their npz file."""
    folder = tmp_path_factory.mktemp("whole")
    samples = SampleSet(folder, SPEC)
    samples.generate(opened.sampler, opened.params)
    samples.write_npz(folder / "all.npz")
    return np.load(folder / "all.npz")["arr_0"], (folder / "all.npz").read_bytes()


def test_names_of_specs():
    same = dataclasses.replace(SPEC, batch_size=7)
    others = [
        dataclasses.replace(SPEC, **change)
        for change in (
            {"num_images": 24},
            {"seed": 4},
            {"settings": {"cfg": 2.0}},
            {"weights": "raw"},
            {"step": 5},
            {"digest": "e"},
            {"tokenizer": "t"},
            {"num_classes": 9},
        )
    ]
    assert same.name == SPEC.name and len({each.name for each in [SPEC, *others]}) == 9
    assert SPEC.num_batches == 4 and SPEC.indices(3).tolist() == [18, 19, 20, 21, 22]
    assert np.bincount(SPEC.labels(np.arange(23))).tolist() == [3, 3, 3, *[2] * 7]


def test_images_are_the_sampler_s_own_by_index(whole, opened):
    images = whole[0]
    assert images.shape == (23, 8, 8, 1) and images.dtype == np.uint8
    direct = opened.sampler(opened.params, np.arange(7, 13) % 10, 3, first_index=7, batch_size=6)
    assert np.abs(images[7:13].astype(int) - direct).max() <= 1
    assert len({image.tobytes() for image in images}) == 23


def test_a_resumed_set_keeps_its_batch_size(whole, opened, tmp_path):
    first = SampleSet(tmp_path, SPEC)
    first.generate(opened.sampler, opened.params)
    for batch in (1, 3):
        (first.folder / f"batch-{batch:06d}.npy").unlink()
    kept = os.stat(first.folder / "batch-000000.npy").st_mtime_ns
    again = SampleSet(tmp_path, dataclasses.replace(SPEC, batch_size=5))
    assert again.missing() == [1, 3] and again.spec.batch_size == 6
    again.generate(opened.sampler, opened.params)
    again.write_npz(tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == whole[1]
    assert os.stat(first.folder / "batch-000000.npy").st_mtime_ns == kept
    assert again.seconds_per_image() > 0
    again.remove()
    assert not again.folder.exists()


def test_processes_make_a_share_each(whole, opened, tmp_path):
    for host in range(3):
        part = SampleSet(tmp_path, SPEC, Processes(host, 3))
        part.generate(opened.sampler, opened.params)
        found = np.concatenate([indices for indices, _ in part.batches()])
        assert found.tolist() == [index for batch in range(host, 4, 3) for index in SPEC.indices(batch)]
        part.write_pngs(tmp_path / "png")
    everything = list(part.batches(ALONE))
    np.testing.assert_array_equal(np.concatenate([images for _, images in everything]), whole[0])
    names = sorted(path.name for path in (tmp_path / "png").iterdir())
    assert names == [f"{index:06d}.png" for index in range(23)]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "png" / "000019.png")), whole[0][19, :, :, 0])


def test_the_npz_file_equals_numpy_s(whole, tmp_path):
    (tmp_path / "all.npz").write_bytes(whole[1])
    with np.load(tmp_path / "all.npz", allow_pickle=False) as file:
        assert sorted(file.files) == ["arr_0", "arr_1"] and file["arr_1"].tolist() == [i % 10 for i in range(23)]
    assert zipfile.ZipFile(tmp_path / "all.npz").testzip() is None


def test_an_unfinished_deletion_is_completed(opened, tmp_path):
    samples = SampleSet(tmp_path, SPEC)
    samples.generate(opened.sampler, opened.params)
    (samples.folder / "plan.json").unlink()
    again = SampleSet(tmp_path, dataclasses.replace(SPEC, batch_size=5))
    assert again.spec.batch_size == 5 and again.missing() == [0, 1, 2, 3, 4]


def test_a_full_disk_leaves_no_partial_file(opened, tmp_path, monkeypatch):
    samples = SampleSet(tmp_path, SPEC)
    samples.generate(opened.sampler, opened.params)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("marjax.evaluation.samples._write_header", full)
    with pytest.raises(UserError, match=r"x\.npz .*No space left"):
        samples.write_npz(tmp_path / "x.npz")
    assert [path.name for path in tmp_path.iterdir()] == [SPEC.name]


def test_damaged_files(opened, tmp_path):
    samples = SampleSet(tmp_path, SPEC)
    samples.generate(opened.sampler, opened.params)
    path = samples.folder / "batch-000002.npy"
    content = path.read_bytes()
    for broken in (content[:60], b"", content.replace(b"|u1", b"|i1")):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=r"batch-000002\.npy"):
            list(samples.batches())
    headers = ("(10000000, 8, 8, 1)", "(4, 10000000000, 8, 1)", "(4, 8, 4, 2)")  # our header with another shape
    for shape in headers:
        header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}".ljust(117).encode() + b"\n"
        path.write_bytes(content[:10] + header + content[128:])
        with pytest.raises(UserError, match=r"batch-000002\.npy"):
            list(samples.batches())
    path.unlink()
    with pytest.raises(UserError, match=r"batch-000002\.npy"):
        samples.write_npz(tmp_path / "x.npz")
    assert not (tmp_path / "x.npz").exists()
    for text in ("[]", "[" * 100_000, '{"batch_size": 0}', '{"batch_size": "4"}', '{"batch_size": true}', "\0"):
        (samples.folder / "plan.json").write_text(text)
        with pytest.raises(UserError, match=r"plan\.json"):
            SampleSet(tmp_path, SPEC)
    (samples.folder / "plan.json").write_text('{"batch_size": 2000000000}')
    assert SampleSet(tmp_path, SPEC).spec.batch_size == SPEC.num_images


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[" * 100_000,
        '{"images": 1}',
        '{"images": "1", "seconds": 1}',
        '{"images": 1, "seconds": NaN}',
        '{"images": 1, "seconds": -1}',
    ],
)
def test_a_damaged_timing_is_ignored(tmp_path, text):
    samples = SampleSet(tmp_path, SPEC)
    (samples.folder / "timing-0.json").write_text(text)
    assert samples.seconds_per_image() is None
    (samples.folder / "timing-1.json").write_text('{"images": 4, "seconds": 2}')
    assert samples.seconds_per_image() == 0.5


def generate(workdir, folder):
    """Runs in its own process."""
    opened = open_sampler(workdir, local=True)
    plan = SampleSpec(10_000, 0, 10, {}, "ema", 2, opened.digest, "", 100)
    samples = SampleSet(folder, plan)
    print("begins", flush=True)
    try:
        with locked_folder(folder, "marjax evaluate", LOCK):
            samples.generate(opened.sampler, opened.params)
            samples.write_npz(folder / "all.npz")
    except UserError as error:
        print(error)
        return 2
    return 0


@pytest.mark.slow
def test_ten_thousand_images_survive_kills(run, tmp_path):
    """After kills at random moments, the set equals that of an uninterrupted run, byte for byte."""
    folders = {name: tmp_path / name for name in ("calm", "killed", "logs", "others")}
    for folder in folders.values():
        folder.mkdir()

    def start(name, logs="logs"):
        return Run(folders[logs], generate, run, folders[name])

    with start("calm") as process:
        assert process.wait() == [0], process.said()
    rng, kills = np.random.default_rng(), 0
    for _ in range(4):
        before = process.said().count("begins")
        with start("killed") as process:
            process.wait_for(lambda process=process, before=before: process.said().count("begins") > before)
            time.sleep(rng.uniform(0.2, 2.0))  # while it starts or runs
            process.processes[0].kill()
            kills += process.wait() == [-signal.SIGKILL]
    assert kills, process.said()
    with start("killed") as process, start("killed", "others") as other:
        codes = [process.wait()[0], other.wait()[0]]  # the second is refused or has nothing to do
    said = [process.said(), other.said()]
    assert 0 in codes and all(
        code == 0 or "is being written by marjax evaluate" in text for code, text in zip(codes, said, strict=True)
    ), said
    assert (folders["killed"] / "all.npz").read_bytes() == (folders["calm"] / "all.npz").read_bytes()
    assert len(np.load(folders["killed"] / "all.npz")["arr_0"]) == 10_000
