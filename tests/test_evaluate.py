"""marjax evaluate: samples and metrics, several settings and processes, resuming, user errors."""

import json
import os

import jax
import numpy as np
import pytest
from support.configs import make_digits
from support.paths import DIGITS
from support.processes import Run, steps_of

import marjax
from marjax import distributed, train
from marjax.cli import main
from marjax.errors import UserError
from marjax.evaluation.evaluate import Request, evaluate
from marjax.evaluation.metrics.frechet import frechet_distance, gaussian
from marjax.evaluation.metrics.inception_score import ScoreSums
from marjax.evaluation.networks.classifier import Classifier
from marjax.evaluation.statistics import make_statistics, read_statistics
from marjax.images import write_npz


@pytest.fixture(scope="module")
def measure(tmp_path_factory):
    """A classifier and dataset statistics of the digits, made by the commands."""
    folder = tmp_path_factory.mktemp("measure")
    network, statistics = folder / "classifier.npz", folder / "statistics.npz"
    config = [f"--config.eval.extractor_path={network}", f"--config.eval.statistics={statistics}"]
    assert main(["train-classifier", "--config", DIGITS, "--steps", "60", *config]) == 0
    assert main(["stats", "--dataset", DIGITS, "--keep_features", "300", *config]) == 0
    return {"extractor": "classifier", "extractor_path": str(network), "statistics": str(statistics)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("evaluate") / "run"
    train(
        make_digits(
            train__steps=40,
            train__lr=5e-3,
            checkpoint__every=40,
            log__every=40,
            sample__cfg=2.0,
            sample__batch_size=20,
            eval__statistics="",
        ),
        workdir,
    )
    return workdir


def ask(measure, out, **fields):
    return Request(num_images=50, out=out, progress=False, **{**measure, **fields})


def test_metrics_are_those_of_the_saved_images(run, measure, tmp_path):
    (entry,) = evaluate(run, ask(measure, tmp_path, save="npz"))
    images = np.load(tmp_path / entry["samples"])["arr_0"]
    found = Classifier.load(measure["extractor_path"]).extract(images)
    metrics = entry["metrics"]
    real = read_statistics(measure["statistics"])
    assert len(images) == 50 and real.features.shape == (300, 64) and real.gaussian.count == 1797
    distance = frechet_distance(gaussian(found.features), real.gaussian)
    assert metrics["frechet_classifier_distance"] == pytest.approx(distance, rel=1e-9)
    sums = ScoreSums(50, 10)
    sums.add(np.arange(50), found.logits)
    assert (metrics["classifier_score"], metrics["classifier_score_std"]) == pytest.approx(tuple(sums.result()))
    assert metrics["accuracy"] == np.mean(found.logits.argmax(1) == np.arange(50) % 10)
    assert 0 <= metrics["precision"] <= 1 and 0 <= metrics["recall"] <= 1 and metrics["kernel_classifier_distance"] > 0
    assert entry["settings"] == {
        "num_iter": 4,
        "num_sampling_steps": "ddim5",
        "cfg": 2.0,
        "cfg_schedule": "linear",
        "temperature": 0.9,
        "confidence_order": False,
        "weights": "ema",
        "step": 40,
        "num_images": 50,
        "seed": 0,
        "dtype": "float32",
    }
    assert entry["batch_size"] == 20
    assert entry["seconds_per_image"] > 0 and entry["statistics"]["checksum"] == real.checksum
    assert entry["machine"]["hosts"] == 1 and entry["machine"]["jax"]
    assert json.loads((tmp_path / "evaluation.json").read_text()) == {"format": 1, "results": [entry]}
    assert [path.name for path in (tmp_path / "evaluation").iterdir()] == [entry["samples"].split("/")[1]]


def test_settings_are_measured_once(run, measure, tmp_path, capsys, monkeypatch):
    arguments = [
        "evaluate",
        "--workdir",
        str(run),
        "--out",
        str(tmp_path),
        "--num_images",
        "50",
        "--cfg",
        "1,2",
        "--cfg_schedule",
        "linear,constant",
        "--temperature",
        "0.5,1",
        "--weights",
        "ema,raw",
        "--extractor_path",
        measure["extractor_path"],
        "--statistics",
        measure["statistics"],
    ]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    results = json.loads((tmp_path / "evaluation.json").read_text())["results"]
    assert len(first.splitlines()) == 2 + 16 + 1 and "against statistics.npz" in first
    # Without guidance the schedule has no effect: 4 of the 16 combinations are duplicates.
    assert len(results) == 12
    # Every setting matters, though after so short a training not in all images.
    assert len({json.dumps(each["metrics"]) for each in results}) > 6
    monkeypatch.setattr("marjax.generation.sampler.Sampler.dispatch", None)  # nothing is sampled again
    assert main(arguments) == 0
    assert capsys.readouterr().out == first
    monkeypatch.undo()
    (again,) = evaluate(run, ask(measure, tmp_path, overwrite=True, settings={"cfg": [1], "temperature": [0.5]}))
    kept = json.loads((tmp_path / "evaluation.json").read_text())["results"]
    assert len(kept) == 12 and again["metrics"] == next(
        each["metrics"] for each in results if each["identity"] == again["identity"]
    )
    (other,) = evaluate(run, ask(measure, tmp_path, seed=1, settings={"cfg": [1], "temperature": [0.5]}))
    assert other["metrics"]["frechet_classifier_distance"] != again["metrics"]["frechet_classifier_distance"]


def test_images_as_statistics(run, measure, tmp_path):
    """As for the ADM's reference batches, features for precision and recall come from the file's images."""
    digits = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), np.uint8)
    write_npz(tmp_path / "images.npz", arr_0=digits)
    (entry,) = evaluate(run, ask(measure, tmp_path, statistics=str(tmp_path / "images.npz")))
    given = {key: measure[key] for key in ("extractor", "extractor_path")}
    made = make_statistics(tmp_path / "made.npz", npz=tmp_path / "images.npz", **given)
    assert made.features.shape == (40, 64)
    (other,) = evaluate(run, ask(measure, tmp_path / "other", statistics=str(tmp_path / "made.npz")))
    assert entry["metrics"] == pytest.approx(other["metrics"], rel=1e-6)
    assert "precision" in entry["metrics"] and len(list((tmp_path / "evaluation").glob("statistics-*.npz"))) == 1
    (again,) = evaluate(run, ask(measure, tmp_path, statistics=str(tmp_path / "images.npz"), seed=1))
    assert again["metrics"]["frechet_classifier_distance"] != entry["metrics"]["frechet_classifier_distance"]


def evaluate_together(run, fields, results):
    distributed.start()
    assert jax.device_count() == 4
    found = evaluate(run, Request(**fields))
    if jax.process_index() == 0:
        results.write_text(json.dumps(found))
    return distributed.end(0, None)


@pytest.mark.slow
def test_two_processes_measure_what_one_does(run, measure, tmp_path):
    fields = {
        **measure,
        "num_images": 50,
        "batch_size": 8,
        "progress": False,
        "save": "npz",
        "settings": {"cfg": [1, 2], "cfg_schedule": ["linear", "constant"]},
    }  # of which two are one
    one = evaluate(run, Request(**fields, out=tmp_path / "one"))
    with Run(
        tmp_path,
        evaluate_together,
        run,
        fields | {"out": tmp_path / "two"},
        tmp_path / "results.json",
        count=2,
        devices=2,
    ) as both:
        assert both.wait() == [0, 0], both.said()
    two = json.loads((tmp_path / "results.json").read_text())
    for a, b in zip(one, two, strict=True):
        images = [
            np.load(folder / each["samples"])["arr_0"].astype(int)
            for folder, each in ((tmp_path / "one", a), (tmp_path / "two", b))
        ]
        assert (
            np.abs(images[0] - images[1]).max() <= 1
        )  # rounding; the next line checks that the images have grey values
        assert np.mean((images[0] > 0) & (images[0] < 255)) > 0.5
        assert a["metrics"] == pytest.approx(b["metrics"], rel=0.02)
        assert b["machine"]["hosts"] == 2 and b["seconds_per_image"] > 0
    assert sorted(path.name for path in (tmp_path / "two" / "evaluation").iterdir()) == sorted(
        path.name for path in (tmp_path / "one" / "evaluation").iterdir()
    )


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"statistics": None}, "statistics"),
        ({"statistics": "gone.npz"}, "gone.npz does not exist"),
        ({"extractor_path": "gone.npz"}, "gone.npz"),
        ({"extractor_path": ""}, "extractor_path"),
        ({"settings": {"cfg": ["much"]}}, "cfg"),
        ({"settings": {"steps": [1]}}, "steps"),
        ({"settings": {"num_iter": [17]}}, "num_iter"),
        ({"settings": {"cfg": 2.0}}, "cfg"),
        ({"save": "gif"}, "save"),
        ({"weights": ["ema", "best"]}, "best"),
        ({"step": 3}, "step"),
        ({"seed": -1}, "seed"),
        ({"num_images": 1}, "num_images"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_user_errors_write_nothing(run, measure, tmp_path, fields, says):
    request = Request(**{**measure, "num_images": 50, "out": tmp_path / "out", **fields})
    with pytest.raises(UserError, match=says):
        evaluate(run, request)
    assert not list(tmp_path.glob("out/*"))


def test_fields_of_a_request_as_arguments(run, measure, tmp_path, monkeypatch):
    fields = {**measure, "num_images": 50, "out": tmp_path, "progress": False}
    (one,) = marjax.evaluate(run, **fields, cfg=1.0, weights="ema")
    monkeypatch.setattr("marjax.generation.sampler.Sampler.dispatch", None)  # the entry exists
    assert evaluate(run, Request(**fields, settings={"cfg": [1.0]}, weights=("ema",))) == [one]
    assert evaluate(run, Request(**fields), cfg=[1.0]) == [one]
    for wrong, says in (
        ({"num_image": 5}, "'num_images'"),
        ({"cgf": 2.0}, "'cfg'"),
        ({"weights": "best"}, "'best'"),
        ({"cfg": "much"}, "cfg"),
    ):
        with pytest.raises(UserError, match=says):
            evaluate(run, **{**fields, **wrong})


def test_killed_at_any_point(run, measure, tmp_path, monkeypatch):
    """Samples are kept until their entry is written, deleted afterwards, and partial folders are ignored."""
    request = ask(measure, tmp_path, save="png")
    (whole,) = evaluate(run, ask(measure, tmp_path / "whole", save="png"))

    def killed(*arguments, **fields):
        raise KeyboardInterrupt

    for target in ("marjax.evaluation.samples.write_png", "marjax.evaluation.record.Record.put"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(target, killed)
            evaluate(run, request)
        (folder,) = (path for path in (tmp_path / "evaluation").iterdir() if not path.name.endswith(("partial", "png")))
        assert len(list(folder.glob("batch-*"))) == 3
    np.save(
        folder / "features-000000007.npy", np.full((9, 64), 5, np.float32)
    )  # of a run with another number of processes
    with monkeypatch.context() as patch:
        patch.setattr("marjax.generation.sampler.Sampler.dispatch", killed)  # all images exist
        (entry,) = evaluate(run, request)
    assert entry["metrics"] == whole["metrics"]
    assert [path.name for path in (tmp_path / "evaluation").iterdir()] == [entry["samples"].split("/")[1]]
    assert len(list((tmp_path / entry["samples"]).iterdir())) == 50
    (tmp_path / "evaluation" / folder.name).mkdir()  # as if killed before the deletion
    assert evaluate(run, request) == [entry] and not folder.exists()


def test_a_batch_size_that_does_not_fit_is_not_kept(run, measure, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr("marjax.generation.sampler.Sampler.dispatch", lambda *_: (_ for _ in ()).throw(MemoryError()))
        evaluate(run, ask(measure, tmp_path, batch_size=30))
    (entry,) = evaluate(run, ask(measure, tmp_path, batch_size=15))
    assert entry["batch_size"] == 15


def test_a_second_command_is_refused_meanwhile(run, measure, tmp_path, monkeypatch):
    import marjax.evaluation.evaluate as module

    own, refused = module._Evaluation.measure, []

    def meanwhile(*arguments):
        with pytest.raises(UserError, match="marjax evaluate") as caught:
            evaluate(run, ask(measure, tmp_path, seed=1))
        refused.append(caught.value)
        return own(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module._Evaluation, "measure", meanwhile)
        evaluate(run, ask(measure, tmp_path))
    assert len(refused) == 1
    evaluate(run, ask(measure, tmp_path, seed=1))
    results = json.loads((tmp_path / "evaluation.json").read_text())["results"]
    assert [each["settings"]["seed"] for each in results] == [0, 1]


def test_existing_statistics(measure, tmp_path, capsys):
    images, out = _images(tmp_path, 8, 20), tmp_path / "stats.npz"
    argv = [
        "stats",
        "--npz",
        str(images),
        "--out",
        str(out),
        "--extractor",
        "classifier",
        "--extractor_path",
        measure["extractor_path"],
    ]
    assert main(argv) == 0
    before = out.read_bytes()
    assert main(argv) == 0 and "20 images of" in capsys.readouterr().out
    assert main([*argv, "--keep_features", "3"]) == 2
    other = np.load(images)["arr_0"]
    for changed in (other[:19], 255 - other):
        write_npz(images, arr_0=changed)
        capsys.readouterr()
        assert main(argv) == 2 and str(out) in capsys.readouterr().err
    assert out.read_bytes() == before
    assert main([*argv, "--overwrite"]) == 0 and out.read_bytes() != before
    out.write_text("mine")
    assert main(argv) == 2 and out.read_text() == "mine"


def test_statistics_with_few_features_or_other_images(run, measure, tmp_path):
    few = [
        make_statistics(
            tmp_path / f"{kept}.npz",
            npz=_images(tmp_path, 8, 20),
            keep_features=kept,
            extractor="classifier",
            extractor_path=measure["extractor_path"],
        )
        for kept in (0, 3)
    ]
    assert few[0].features is None and len(few[1].features) == 3
    for statistics in few:  # too few features for neighbours
        (entry,) = evaluate(run, ask(measure, tmp_path / "out", statistics=statistics.path))
        assert "frechet_classifier_distance" in entry["metrics"] and "precision" not in entry["metrics"]
    with pytest.raises(UserError, match=r"28\.npz"):
        evaluate(run, ask(measure, tmp_path / "wide", statistics=str(_images(tmp_path, 28, 20))))


def _images(folder, size, count):
    write_npz(folder / f"{size}.npz", arr_0=np.random.default_rng(0).integers(0, 256, (count, size, size, 1), np.uint8))
    return folder / f"{size}.npz"


def test_evaluations_during_training(measure, tmp_path):
    """Every so many steps and after the last, without guidance and with, once the step is saved; and one that a kill
    left out is made up."""
    fields = {
        "train__steps": 4,
        "checkpoint__every": 1000,
        "eval__every": 3,
        "eval__num_images": 30,
        "sample__cfg": 2.0,
        **{f"eval__{key}": value for key, value in measure.items()},
    }
    train(make_digits(**fields), tmp_path / "run")
    assert steps_of(tmp_path / "run") == [3, 4]
    path = tmp_path / "run" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    distance = "eval/frechet_classifier_distance"
    measured = [line for line in lines if distance in line]
    assert [line["step"] for line in measured] == [3, 4] and len(lines) == 6
    assert {f"{distance}_guided", "eval/classifier_score", "eval/accuracy_guided"} <= measured[0].keys()
    assert all(line["eval/num_images"] == 30 for line in measured) and not any("fid" in name for name in measured[0])
    assert measured[0][distance] != measured[1][distance]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines if line not in measured))
    train(make_digits(**fields), tmp_path / "run")
    again = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line for line in again if distance in line] == measured[1:]
    plain = make_digits(**{**fields, "sample__cfg": 1.0, "train__steps": 3})
    train(plain, tmp_path / "plain")
    last = json.loads((tmp_path / "plain" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last[distance] == measured[0][distance] and f"{distance}_guided" not in last
    with pytest.raises(UserError, match=r"gone\.npz"):
        train(make_digits(**{**fields, "eval__statistics": "gone.npz"}), tmp_path / "none")
    with pytest.raises(UserError, match=r"config\.eval\.statistics"):
        train(make_digits(**{**fields, "eval__statistics": ""}), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_statistics_of_another_network(run, measure, tmp_path):
    arguments = ["--config", DIGITS, "--out", str(tmp_path / "other.npz"), "--steps", "1"]
    assert main(["train-classifier", *arguments]) == 0
    with pytest.raises(UserError, match=r"statistics\.npz .*classifier.*checksum"):
        evaluate(run, ask(measure, tmp_path, extractor_path=str(tmp_path / "other.npz")))
    write_npz(tmp_path / "narrow.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(UserError, match=r"narrow\.npz .*3 features"):
        evaluate(run, ask(measure, tmp_path, statistics=str(tmp_path / "narrow.npz")))


def test_invalid_records(run, measure, tmp_path):
    for text in ('{"format": 7}', '{"format": 1, "results": [{}]}', "[]", "{", "[" * 200_000):
        (tmp_path / "evaluation.json").write_text(text)
        with pytest.raises(UserError, match=r"evaluation\.json"):
            evaluate(run, ask(measure, tmp_path))


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["stats", "--out", "x.npz"], "--npz"),
        (["stats", "--dataset", "DIGITS", "--images", "."], "--npz"),
        (["stats", "--npz", "gone.npz"], "no file to write"),
        (["stats", "--npz", "gone.npz", "--config.seed=1"], "give --dataset"),
        (["stats", "--npz", "gone.npz", "--out", "x.npz", "--image_size", "8"], "image_size"),
        (["stats", "--dataset", "DIGITS", "--out", "x.npz", "--extractor", "inception"], "MARJAX_INCEPTION"),
        (["train-classifier", "--config", "DIGITS", "--out", "x.npz", "--held_out", "1"], "held_out is 1.0"),
        (["train-classifier", "--config", "DIGITS", "--config.eval.extractor_path="], "no file to write"),
        (["plot", "--workdir", "gone", "--out", "x"], "gone"),
        (["convert"], "--out"),
        (["convert", "--inception", "a", "--weights", "ema"], "converted alone"),
        (["evaluate", "--workdir", "gone"], "does not exist"),
    ],
)
def test_user_errors_of_the_commands(tmp_path, capsys, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MARJAX_INCEPTION", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path))
    assert main([DIGITS if argument == "DIGITS" else argument for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and len(error.splitlines()) == 1
    assert not [path for path in tmp_path.iterdir() if path.is_file()]
