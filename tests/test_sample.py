"""`marjax.sample`, `marjax.load`, and the commands that sample and benchmark sampling."""

import functools
import json

import numpy as np
import pytest
from support.configs import make_digits, make_model
from support.paths import DIGITS, ROOT

from marjax import config as config_lib
from marjax import load, sample, train
from marjax.cli import main
from marjax.commands.arguments import parse_labels
from marjax.errors import UserError
from marjax.generation.sample import open_sampler
from marjax.perf import peak
from marjax.workdir import read_workdir


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("sample") / "run"
    config = make_digits(
        train__steps=60,
        train__lr=5e-3,
        checkpoint__every=30,
        log__every=30,
        sample__cfg=2.0,
        sample__num_sampling_steps="ddim5",
        sample__batch_size=11,
        sample__max_stages=2,
    )
    train(config, workdir)
    return workdir


LABELS = np.arange(11) % 10


@pytest.fixture(scope="module")
def whole(run):
    """Samples with the run's settings, in one batch."""
    return sample(run, LABELS)


def test_an_image_does_not_depend_on_its_batch(run, whole):
    assert whole.shape == (11, 8, 8, 1) and whole.dtype == np.uint8
    close(sample(run, LABELS, batch_size=4), whole)
    close(sample(run, LABELS[7:], first_index=7), whole[7:])
    assert len({image.tobytes() for image in whole}) == 11


def close(a, b):
    assert np.abs(a.astype(int) - b.astype(int)).max() <= 1


@pytest.mark.parametrize(
    "change",
    [
        dict(seed=1),
        dict(weights="raw"),
        dict(step=30),
        dict(cfg=3.0),
        dict(num_iter=7),
        dict(temperature=0.5),
        dict(num_sampling_steps=7),
        dict(first_index=1),
    ],
)
def test_every_setting_matters(run, whole, change):
    assert (sample(run, LABELS, **change) != whole).any()


def test_cfg_schedules_differ_only_with_cfg(run):
    def draw(cfg, schedule):
        return sample(run, LABELS, cfg=cfg, cfg_schedule=schedule)

    assert (draw(3.0, "linear") != draw(3.0, "constant")).any()
    np.testing.assert_array_equal(draw(1.0, "linear"), draw(1.0, "constant"))


def test_null_class_differs_from_every_class(run):
    none = sample(run, [-1, -1])
    assert (none != sample(run, [0, 0])).any() and (none != sample(run, [9, 9])).any()


@pytest.mark.parametrize(
    "given, named",
    [
        (dict(labels=[10]), "label 10.*0 to 9"),
        (dict(labels=[-2]), "label -2"),
        (dict(labels=[]), "labels"),
        (dict(labels=[10**30]), "labels="),
        (dict(labels=[0.5]), "labels="),
        (dict(labels=[float("nan")]), "labels="),
        (dict(labels=[[0], [0, 1]]), "labels="),
        (dict(labels=None), "labels="),
        (dict(labels=10), "label 10"),
        (dict(labels="cat"), "labels 'cat'"),
        (dict(labels=[True]), "labels="),
        (dict(labels=np.array([2**64 - 1], np.uint64)), "label 18446744073709551615"),
        (dict(num_iter=17), "num_iter.*16"),
        (dict(num_sampling_steps=1001), "num_sampling_steps.*1000"),
        (dict(weights="best"), "weights.*best"),
        (dict(step=3), "step 3"),
        (dict(seed=-1), "seed.*-1"),
        (dict(temperature=-1.0), "temperature"),
        (dict(batch_size=0), "batch_size"),
        (dict(cfg_schedule="x"), "cfg_schedule"),
    ],
)
def test_invalid_arguments(run, given, named):
    with pytest.raises(UserError, match=named):
        sample(run, **{"labels": [0], **given})


def test_labels_on_the_command_line():
    assert parse_labels("0-3,7,5") == [0, 1, 2, 3, 7, 5] and parse_labels("none") == [-1]
    for text in ("a", "3-1", "1,,2", "-1", "1-", ""):
        with pytest.raises(UserError):
            parse_labels(text)


def test_command(run, tmp_path, capsys):
    out = tmp_path / "out"
    code = main(
        [
            "sample",
            "--workdir",
            str(run),
            "--labels",
            "0-2,9",
            "--num_per_label",
            "3",
            "--seed",
            "5",
            "--out",
            str(out),
            "--cfg",
            "2",
            "--num_iter",
            "8",
        ]
    )
    assert code == 0, capsys.readouterr().err
    assert {path.name for path in out.iterdir()} == {"samples.npz", "grid.png"}
    saved = np.load(out / "samples.npz")
    assert saved["labels"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 9, 9, 9]
    close(saved["images"], sample(run, saved["labels"], seed=5, cfg=2.0, num_iter=8))


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["sample", "--workdir", "RUN", "--out", "OUT", "--labels", "12"], "label 12"),
        (["sample", "--workdir", "RUN", "--out", "/proc/no", "--labels", "1"], "/proc/no"),
        (["sample", "--workdir", "nowhere", "--out", "OUT"], "nowhere"),
        (["sample", "--workdir", "RUN", "--out", "OUT", "--config.seed=1"], "--config"),
        (["sample", "--workdir", "RUN", "--out", "OUT", "--num_per_label", "0"], "num_per_label"),
        (["sample", "--workdir", "RUN", "--out", "OUT", "--num_iter", "99"], "num_iter"),
        (["train", "--config", "configs/none.py", "--workdir", "W"], "configs/none.py"),
        (["train", "--config", "DIGITS", "--workdir", "W", "--config.train.lrr=1"], "'train.lr'"),
        (["train", "--config", "DIGITS", "--workdir", "W", "--learning_rate=1"], "--learning_rate"),
        (["train", "--config", "DIGITS", "--workdir", "/proc/no"], "/proc/no"),
        (["benchmark", "train", "--config", "DIGITS", "--repeats", "-1"], "repeats"),
    ],
)
def test_user_errors_are_one_line_and_leave_no_files(run, tmp_path, capsys, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    names = {"RUN": str(run), "OUT": str(tmp_path / "out"), "DIGITS": f"{DIGITS}:debug"}
    assert main([names.get(argument, argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and len(error.splitlines()) == 1 and error.startswith(f"marjax {arguments[0]}: error: ")
    assert not list(tmp_path.iterdir())


def test_run_without_checkpoint_cannot_be_sampled(run, tmp_path):
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    with pytest.raises(UserError, match="checkpoints"):
        sample(tmp_path, [0])
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.fixture
def briefly(monkeypatch):
    """Measures the rate of the machine with one product instead of for a second."""
    monkeypatch.setattr(peak, "measured_peak", functools.partial(peak.measured_peak, seconds=1e-9))


def test_benchmark_compiles_without_weights(capsys):
    assert main(["benchmark", "train", "--config", f"{DIGITS}:debug", "--repeats", "0"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["compile_seconds"] > 0 and "seconds" not in row


MNIST = str(ROOT / "configs" / "mnist.py")


@pytest.mark.parametrize("config", [f"{DIGITS}:debug", f"{MNIST}:head=categorical,variant=ar,debug"])
def test_benchmark_prints_one_line_of_json(capsys, briefly, config):
    for what in ("train", "sample"):
        assert main(["benchmark", what, "--config", config, "--repeats", "1"]) == 0
        row = json.loads(capsys.readouterr().out)
        assert row["ratio"] == pytest.approx(row["model_gflops_per_sec"] / row["matmul_gflops_per_sec"])
        assert row["images_per_sec"] > 0 and row["compile_seconds"] > 0 and row["peak_memory_gib"] > 0


def test_benchmark_compares_kv_cache_with_recomputation(capsys, briefly):
    config = f"{MNIST}:variant=ar,debug"
    assert main(["benchmark", "sample", "--config", config, "--repeats", "1", "--recompute", "2"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["kv_cache_speedup"] == pytest.approx(row["images_per_sec"] / row["recompute_images_per_sec"])
    for arguments in (["sample", "--config", f"{DIGITS}:debug"], ["train", "--config", config]):
        assert main(["benchmark", *arguments, "--recompute", "2"]) == 2
        assert "recompute is for 'sample' with a causal backbone" in capsys.readouterr().err


def test_scales_and_temperatures_share_one_program(run):
    opened = open_sampler(run, cfg=2.0, temperature=1.0)
    sampler, params = opened.sampler, opened.params
    config = read_workdir(run)

    def settings(**fields):
        given = {f"sample.{key}": value for key, value in fields.items()}
        return config_lib.resolve(config_lib.apply_overrides(config, given)).sample

    other = sampler.with_settings(settings(cfg=3.0, temperature=0.5))
    assert other.program is sampler.program
    close(other(params, LABELS, 0, batch_size=11), sample(run, LABELS, cfg=3.0, temperature=0.5))
    close(sampler(params, LABELS, 0, batch_size=11), sample(run, LABELS, cfg=2.0, temperature=1.0))
    for fields in (dict(cfg=1.0), dict(num_iter=7), dict(num_sampling_steps="4")):
        other = sampler.with_settings(settings(**{"cfg": 2.0, **fields}))
        assert other.program is not sampler.program and other.tokenizer_params is sampler.tokenizer_params
    close(other(params, LABELS, 0, batch_size=11), sample(run, LABELS, cfg=2.0, num_sampling_steps="4"))


def test_load_gives_equal_images_and_compiles_once_per_shape(run, whole):
    model = load(run)
    close(model.sample(LABELS), whole)
    close(model.sample(LABELS[7:], first_index=7), whole[7:])
    close(model.sample(LABELS, seed=1, cfg=3.0, temperature=0.5), sample(run, LABELS, seed=1, cfg=3.0, temperature=0.5))
    (sampler,) = model._samplers.values()
    assert len(sampler.checked.compiled) == 2  # of 11 and of 4 labels
    assert (model.step, model.weights, model.config.data.num_classes) == (60, "ema", 10)
    assert "60" in repr(model) and load(run, weights="raw", step=30).step == 30
    assert model.params["class_embedding"].shape == (10, 32)
    for wrong, says in (
        ({"labels": [10]}, "label 10"),
        ({"labels": [1], "cgf": 2.0}, "'sample.cfg'"),
        ({"labels": [1], "seed": -1}, "seed"),
        ({"labels": []}, "label"),
    ):
        with pytest.raises(UserError, match=says):
            model.sample(**wrong)
    with pytest.raises(UserError, match="gone"):
        load("gone")


def test_open_sampler_reports_its_weights(run):
    ema, raw, before = (
        open_sampler(run, weights=weights, step=step) for weights, step in ((None, None), ("raw", None), ("ema", 30))
    )
    assert [(each.weights, each.step) for each in (ema, raw, before)] == [("ema", 60), ("raw", 60), ("ema", 30)]
    assert len({each.digest for each in (ema, raw, before)}) == 3
    assert open_sampler(run, cfg=1.0).digest == ema.digest


def test_run_with_codebook(tmp_path, codebook, capsys):
    """Samples in confidence order from the command line, with a moved and with a missing codebook."""
    here = tmp_path / "codebook.npz"
    here.write_bytes(codebook.read_bytes())
    run = tmp_path / "run"
    train(make_model("mar", "categorical", here, train__steps=2), run)
    images = sample(run, LABELS)
    assert (sample(run, LABELS, confidence_order=True) != images).any()
    arguments = ["sample", "--workdir", str(run), "--labels", "0-9", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--confidence_order", "true", "--choice_temperature", "1"]) == 0
    assert main([*arguments, "--confidence_order", "maybe"]) == 2
    here.rename(tmp_path / "moved.npz")
    capsys.readouterr()
    assert main(arguments) == 2
    assert "--tokenizer_path" in capsys.readouterr().err
    close(sample(run, LABELS, tokenizer_path=str(tmp_path / "moved.npz")), images)


def test_model_trained_on_a_pod_is_sampled_on_any_devices(run, tmp_path):
    import shutil

    shutil.copytree(run, tmp_path / "run")
    text = (tmp_path / "run" / "config.json").read_text()
    assert '"fsdp": 1' in text
    (tmp_path / "run" / "config.json").write_text(
        text.replace('"fsdp": 1', '"fsdp": 16').replace('"data": -1', '"data": 4')
    )
    np.testing.assert_array_equal(sample(tmp_path / "run", [0, 1], seed=3), sample(run, [0, 1], seed=3))


@pytest.fixture
def foreign(run, tmp_path, monkeypatch):
    """An untrusted work directory: its config names a data set that runs code when opened."""
    import shutil

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "runs_code.py").write_text("import pathlib\npathlib.Path('ran').touch()\nclass Feature: pass\n")
    data_set = tmp_path / "theirs" / "digits_of_mine" / "1.0.0"
    data_set.mkdir(parents=True)
    (data_set / "features.json").write_text(json.dumps({"pythonClassName": "runs_code.Feature"}))
    (data_set / "dataset_info.json").write_text(
        json.dumps(
            {
                "name": "digits_of_mine",
                "version": "1.0.0",
                "fileFormat": "array_record",
                "splits": [
                    {
                        "name": "train",
                        "shardLengths": ["5"],
                        "numBytes": "5",
                        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                    }
                ],
            }
        )
    )
    shutil.copytree(run, tmp_path / "run")

    def make(**fields):
        content = json.loads((tmp_path / "run" / "config.json").read_text())
        content["data"] |= {"source": "tfds:digits_of_mine", "data_dir": "theirs", "cache": "theirs", **fields}
        content["eval"] |= {"every": 1, "reference": "runs_code.py", "extractor_path": "runs_code.py"}
        (tmp_path / "run" / "config.json").write_text(json.dumps(content))
        return tmp_path / "run"

    return make


def test_foreign_work_directory_runs_no_code(foreign, run, tmp_path, monkeypatch):
    def opened(*args, **kwargs):
        raise AssertionError("opened")

    workdir = foreign(num_examples=None)
    monkeypatch.setattr("marjax.data.sources.open_source", opened)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    np.testing.assert_array_equal(sample(workdir, [0, 1], seed=3), sample(run, [0, 1], seed=3))
    assert main(["export", "--workdir", "run", "--out", "weights.safetensors"]) == 0
    assert main(["plot", "--workdir", "run", "--out", "figures", "--format", "png"]) == 0
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("fields", [{"cache": ""}, {}])
def test_foreign_work_directory_data_is_never_opened(foreign, tmp_path, capsys, fields):
    foreign(num_classes=None, num_examples=None, **fields)
    for command in (
        ["sample", "--out", "out"],
        ["evaluate", "--num_images", "2"],
        ["export", "--out", "weights.safetensors"],
    ):
        assert main([*command, "--workdir", "run"]) == 2
        error = capsys.readouterr().err
        assert "config.data.num_classes is missing" in error and error.count("\n") == 1
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()
