"""Figures: what is drawn, what is grouped, and files that are the same twice; inputs that cannot be read."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from matplotlib import rcParams
from matplotlib.image import AxesImage
from PIL import Image
from support.paths import ROOT

from marjax import plots
from marjax.errors import UserError
from marjax.images import beside, write_png
from marjax.plots import style, tradeoffs, training
from marjax.plots.curves import Result, curves, describe
from marjax.plots.runs import Run, distinct_names, read_runs

SETTINGS = {
    "weights": "ema",
    "num_iter": 64,
    "num_sampling_steps": "100",
    "cfg": 2.9,
    "cfg_schedule": "linear",
    "temperature": 1.0,
    "confidence_order": False,
    "step": 450,
    "num_images": 10000,
    "seed": 0,
}


def result(fid=5.0, seconds=1.0, inception_score=9.0, **settings):
    return Result(
        {"workdir": "run", **SETTINGS, **settings},
        {"fid": fid, "inception_score": inception_score, "seconds_per_image": seconds},
    )


def line(step, **values):
    return {"step": step, **{name.replace("__", "/"): value for name, value in values.items()}}


def write_lines(folder, lines):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in lines))


def write_evaluation(folder, measured, **fields):
    folder.mkdir(parents=True, exist_ok=True)
    networks = {
        "statistics": {"name": "digits", "checksum": "ab" * 32},
        "extractor": {"name": "classifier", "checksum": "cd" * 32},
    }
    results = [
        {
            "settings": SETTINGS | settings,
            "metrics": {"fid": fid, "kid": None},
            "seconds_per_image": seconds,
            **networks,
            **fields,
        }
        for settings, fid, seconds in measured
    ]
    (folder / "evaluation.json").write_text(json.dumps({"format": 1, "results": results}))


def write_samples(folder, steps):
    (folder / "samples").mkdir(parents=True)
    for i, step in enumerate(steps):
        raw, ema = np.full((6, 5, 3), 200, np.uint8), np.full((6, 5, 3), i, np.uint8)
        write_png(folder / "samples" / f"raw_and_ema_{step:08d}.png", beside([raw, ema]))


@pytest.fixture
def workdir(tmp_path):
    """All that a work directory can have."""
    folder = tmp_path / "run"
    write_lines(folder, [line(step, train__loss=8 / step, train__lr=1.0, eval__fid=9 / step) for step in (1, 2, 3)])
    write_samples(folder, [10, 20])
    varied = (
        (8, "100", 1.0, 1.0),
        (64, "100", 1.0, 1.0),
        (64, "ddim25", 1.0, 1.0),
        (64, "ddim50", 1.0, 1.0),
        (64, "100", 2.0, 1.0),
        (64, "100", 1.0, 0.9),
    )
    write_evaluation(
        folder,
        [
            ({"num_iter": n, "num_sampling_steps": steps, "cfg": cfg, "temperature": t}, n + cfg + t, 0.01 * n)
            for n, steps, cfg, t in varied
        ],
    )
    return folder


def xy(line):
    return list(map(tuple, line.get_xydata().tolist()))


def legend_of(figure):
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()], legend.get_title().get_text()


def ylabels(figure):
    return [axes.get_ylabel().replace("\n", " ") for axes in figure.axes]


def test_every_figure_in_every_format(tmp_path, workdir, capsys):
    before = dict(rcParams)
    made = plots.plot([workdir], tmp_path / "out")
    assert [path.name for path in made] == [f"{name}.{each}" for name in plots.FIGURES for each in plots.FORMATS]
    assert sorted(path.name for path in made) == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert dict(rcParams) == before
    assert len({path.read_bytes() for path in made}) == len(made)
    assert Image.open(tmp_path / "out" / "loss.png").size[0] > 600
    assert capsys.readouterr().err == ""


def test_matplotlib_is_imported_lazily():
    code = """
import sys
from marjax.plots import style
assert "matplotlib" not in sys.modules
style.new_figure(1, 1, "")
assert "matplotlib" in sys.modules and not {"matplotlib.pyplot", "jax"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_loss_and_its_parts():
    rng = np.random.default_rng(0)
    values = rng.uniform(1, 2, 200)
    long = Run(
        "long", [line(i + 1, train__loss=x, train__mse=x / 2, train__grad_norm=1.0) for i, x in enumerate(values)]
    )
    short = Run("_short$1$", [line(1, train__loss=40.0), line(2, train__other=None)])
    figure = training.loss([long, Run("empty"), short])
    loss, mse = figure.axes
    assert [axes.get_title("left") for axes in figure.axes] == ["loss", "squared error"]
    raw, smooth, other = loss.get_lines()
    np.testing.assert_array_equal(raw.get_xydata(), np.stack([np.arange(1, 201), values], 1))
    assert 0.5 > smooth.get_ydata().std() / values.std() > 0 and raw.get_alpha() < 0.5
    assert xy(other) == [(1, 40.0)] and [len(each.get_xdata()) for each in mse.get_lines()] == [200, 200, 0]
    colors = style.colors(3)
    assert raw.get_color() == smooth.get_color() == colors[0] and other.get_color() == colors[2]
    assert loss.get_yscale() == "log" and mse.get_yscale() == "linear"
    assert legend_of(figure) == (["long", "_short$1$"], "")
    alone = training.loss([long])
    assert alone.get_suptitle() == "Training loss: long" and not alone.legends
    assert training.loss([Run("empty"), Run("of an evaluation", [line(1, eval__fid=1.0)])]) is None


def test_smoothing():
    few = np.array([3.0, 1.0])
    assert training.smoothed(few) is few
    ramp = np.arange(100.0)
    np.testing.assert_allclose(training.smoothed(ramp)[3:-3], ramp[3:-3])
    np.testing.assert_allclose(training.smoothed(np.ones(100)), 1.0)  # to the ends
    assert training.smoothed(ramp)[0] > 0


def test_evaluations_during_training():
    first = Run(
        "a",
        [
            line(5, train__loss=1.0),
            line(5, eval__fid=90.0, eval__fid_guided=40.0),
            line(10, eval__fid=50.0, eval__fid_guided=10.0, eval__inception_score=3.0),
        ],
    )
    figure = training.evaluations([first, Run("b", [line(7, eval__fid_guided=20.0)]), Run("c")])
    fid, score = figure.axes
    drawn = {(each.get_color(), each.get_linestyle()): xy(each) for each in fid.get_lines() if len(each.get_xdata())}
    a, b, _ = style.colors(3)
    assert drawn == {(a, "-"): [(5, 90.0), (10, 50.0)], (a, "--"): [(5, 40.0), (10, 10.0)], (b, "--"): [(7, 20.0)]}
    assert [xy(each) for each in score.get_lines() if len(each.get_xdata())] == [[(10, 3.0)]]
    assert (fid.get_ylabel(), score.get_ylabel()) == ("FID", "Inception Score")
    assert legend_of(figure)[0] == ["a", "b", "without guidance", "with guidance"]
    unguided = training.evaluations([Run("a", [line(5, eval__fid=90.0)])])
    assert len(unguided.axes) == 1 and legend_of(unguided)[0] == ["without guidance"]
    assert training.evaluations([Run("a", [line(1, train__loss=1.0)])]) is None


def test_samples_are_the_ema_half_at_six_steps(tmp_path):
    write_samples(tmp_path / "many", range(100, 1200, 100))
    write_samples(tmp_path / "few", [7, 3])
    (tmp_path / "few" / "samples" / "other_00000004.png").write_bytes(b"")
    runs = read_runs([tmp_path / "many", tmp_path / "few"])
    figure = training.samples(runs)
    steps = [axes.get_title() for axes in figure.axes]
    assert steps == [f"step {step}" for step in ("100", "300", "500", "700", "900", "1,100", "3", "7")]
    pictures = [axes.findobj(AxesImage)[0].get_array() for axes in figure.axes]
    assert [picture.shape for picture in pictures] == [(6, 5, 3)] * 8
    assert [int(picture.max()) for picture in pictures] == [0, 2, 4, 6, 8, 10, 1, 0]
    assert [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()] == ["many", "few"]
    assert training.samples([Run("none")]) is None


def test_a_curve_holds_all_but_one_setting():
    results = [
        result(num_iter=64, fid=3.0),
        result(num_iter=8, fid=9.0),
        result(num_iter=8, cfg=1.0, fid=20.0),
        result(num_iter=64, cfg=1.0, fid=30.0),
        result(num_iter=64, temperature=0.9),  # alone
        result(num_iter=64, fid=4.0),
    ]  # measured again
    found = curves(results, "num_iter", ["fid"])
    assert [(curve.fixed["cfg"], curve.x, curve.values("fid")) for curve in found] == [
        (1.0, [8, 64], [20.0, 30.0]),
        (2.9, [8, 64], [9.0, 4.0]),
    ]
    assert all("num_iter" not in curve.fixed for curve in found)
    untimed = [Result(each.settings, {"fid": 1.0}) for each in results[:2]]
    assert not curves([*untimed, *results[2:3]], "num_iter", ["fid", "seconds_per_image"])
    assert len(curves(untimed, "num_iter", ["fid"])) == 1
    assert not curves(results, "weights", ["fid"]) and not curves(results, "confidence_order", ["fid"])
    assert not curves(results, "no_such", ["fid"])


def test_ddim_steps_are_a_family_of_their_own():
    steps = ("ddim50", "100", "25", "ddim25", "nonsense", 50)
    found = curves([result(num_sampling_steps=each) for each in steps], "num_sampling_steps", ["fid"])
    assert [(curve.fixed["spacing"], curve.x) for curve in found] == [("ddim", [25, 50]), ("even", [25, 50, 100])]
    # Along another setting they are told apart all the same, and sorted as numbers.
    results = [result(num_sampling_steps=s, num_iter=n) for s in ("100", "ddim25", "25") for n in (8, 64)]
    found = curves(results, "num_iter", ["fid"])
    assert [curve.fixed["num_sampling_steps"] for curve in found] == ["25", "ddim25", "100"]
    assert all("spacing" not in curve.fixed for curve in found)


def test_every_schedule_starts_without_cfg():
    results = [
        result(fid=9.0, cfg=1.0),
        *(result(fid=c, cfg=c, cfg_schedule=s) for c in (2.0, 3.0) for s in ("linear", "constant")),
    ]
    found = curves(results, "cfg", ["fid"])
    assert [(curve.fixed["cfg_schedule"], curve.x) for curve in found] == [
        ("constant", [1, 2, 3]),
        ("linear", [1, 2, 3]),
    ]
    assert len(curves(results, "temperature", ["fid"])) == 0


def test_labels_say_what_differs():
    results = [result(num_iter=n, cfg=c, workdir=w) for n in (8, 64) for c in (1.0, 2.9) for w in ("a", "b")]
    common, labels = describe(curves(results, "num_iter", ["fid"]))
    assert labels == ["a, cfg 1", "a, cfg 2.9", "b, cfg 1", "b, cfg 2.9"]
    assert common == (
        "ema weights, num_sampling_steps 100, linear schedule, temperature 1, no confidence_order, "
        "step 450, 10,000 images, seed 0"
    )
    common, labels = describe(curves(results[::4], "num_iter", ["fid"]))
    assert labels == [""] and common.startswith("a, ema weights, ") and "cfg 1, " in common


def test_quality_over_a_setting():
    first = Run(
        "a",
        results=[
            result(workdir="a", num_iter=n, cfg=c, fid=c * n, inception_score=n / 10)
            for n in (16, 8, 128)
            for c in (1.0, 2.0)
        ],
    )
    second = Run("b", results=[result(workdir="b", num_iter=n, fid=7.0 + n) for n in (8, 16)])
    figure = tradeoffs.over([first, Run("c"), second], "num_iter")
    fid, score = figure.axes
    assert [xy(each) for each in fid.get_lines()] == [
        [(8, 8.0), (16, 16.0), (128, 128.0)],
        [(8, 16.0), (16, 32.0), (128, 256.0)],
        [(8, 15.0), (16, 23.0)],
    ]
    assert xy(score.get_lines()[0]) == [(8, 0.8), (16, 1.6), (128, 12.8)]
    lines = fid.get_lines()
    assert lines[0].get_color() == style.colors(3)[0].lower() and lines[2].get_color() == style.colors(3)[2].lower()
    assert len({each.get_color() for each in lines}) == 3 and lines[0].get_marker() != lines[1].get_marker()
    assert [each.get_color() for each in lines] == [each.get_color() for each in score.get_lines()]
    labels, common = legend_of(figure)
    assert labels == [each.get_label() for each in lines] == ["a, cfg 1", "a, cfg 2", "b, cfg 2.9"]
    assert common.replace("\N{NO-BREAK SPACE}", " ").startswith("all: ema weights, num_sampling_steps 100")
    assert fid.get_xscale() == fid.get_yscale() == "log" and fid.get_xticks().tolist() == [8, 16, 128]
    assert tradeoffs.over([first, second], "temperature") is None
    guided = tradeoffs.over([first, second], "cfg")
    assert guided.axes[0].get_xscale() == "linear" and len(guided.axes[0].get_lines()) == 3


def test_quality_over_time():
    results = [result(num_iter=n, seconds=n / 100, fid=80 / n) for n in (8, 16, 64)]
    results += [result(num_sampling_steps=s, seconds=t, fid=f) for s, t, f in (("25", 0.2, 4.0), ("50", None, 2.0))]
    results = [Result(each.settings, {k: v for k, v in each.metrics.items() if v is not None}) for each in results]
    figure = tradeoffs.over_time([Run("run", results=results)])
    iterations, sampling = figure.axes
    (along_iterations,), (along_sampling,) = iterations.get_lines(), sampling.get_lines()
    assert xy(along_iterations) == [(0.08, 10.0), (0.16, 5.0), (0.64, 1.25)]
    assert xy(along_sampling) == [(0.2, 4.0), (0.64, 1.25)]  # 50 steps were not timed
    assert [text.get_text() for text in iterations.texts] == ["8", "16", "64"]
    assert [text.get_text() for text in sampling.texts] == ["25", "100"]
    assert legend_of(figure)[0] == ["num_sampling_steps 100", "num_iter 64, even spacing"]
    assert iterations.get_ylabel() == "FID" and iterations.get_xlabel() == "seconds per image"
    assert tradeoffs.over_time([Run("run", results=results[:1])]) is None


LONG = "photographs_of_flowers_and_temples_" * 5


def cut_off(figure):
    """What is written in a figure and not whole within it."""
    from matplotlib.text import Text

    figure.draw_without_rendering()
    found = []
    ticks = {id(label) for axes in figure.axes for each in (axes.xaxis, axes.yaxis) for label in each.get_ticklabels()}
    for text in [each for each in figure.findobj(Text) if id(each) not in ticks]:  # of which some are not drawn
        box = text.get_window_extent()
        whole = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1
        if text.get_visible() and text.get_text().strip() and not whole:
            found.append(text.get_text())
    return found


def test_labels_fit_and_name_every_curve_once(tmp_path):
    """Long names of work directories, with and without places to break them, and many curves."""
    runs = []
    for name in (LONG, "many words and $math$ " * 6, "b"):
        write_samples(tmp_path / name, [1, 2])
        run = read_runs([tmp_path / name])[0]
        lines = [
            line(
                5 * i,
                train__loss=1.0 / i,
                eval__fid=9.0 / i,
                eval__fid_guided=5.0,
                eval__inception_score=i,
                **{f"train__{LONG[:40]}{j}": 1.0 for j in range(3)},
            )
            for i in (1, 2, 3)
        ]
        results = [result(workdir=run.name, num_iter=n, cfg=c, seconds=n / 100) for n in (8, 64) for c in (1.0, 3.0)]
        runs.append(Run(run.name, lines, run.pictures, results))
    for draw in (
        training.loss,
        training.evaluations,
        training.samples,
        tradeoffs.over_time,
        lambda runs: tradeoffs.over(runs, "cfg"),
    ):
        for drawn in (runs[:1], runs):
            with style.applied():
                figure = draw(drawn)
            assert not cut_off(figure)
            if figure.legends:
                labels = [label.replace("\n", "") for label in legend_of(figure)[0]]
                assert len(labels) == len(set(labels)) and all(labels)
                if len(drawn) > 1:
                    assert any(label.startswith(LONG[:60]) for label in labels)
    looks = [
        (each.get_color(), each.get_marker())
        for axes in tradeoffs.over_time(
            [Run("run", results=[result(num_iter=n, num_sampling_steps=s) for n in (8, 16) for s in ("25", "50")])]
        ).axes
        for each in axes.get_lines()
    ]
    assert len(looks) == len(set(looks)) == 4  # also of curves in different panels


def test_seeds_are_repeats_with_error_bars():
    results = [result(num_iter=n, seed=seed, fid=n + seed) for n in (8, 16) for seed in ((0, 1, 2) if n == 8 else (0,))]
    results = [each._replace(metrics={**each.metrics, "inception_score_std": 0.5}) for each in results]
    (curve,) = curves(results, "num_iter", ["fid"])
    assert curve.values("fid") == [9.0, 16.0]
    errors, source = curve.errors("fid")
    assert errors[0] == 1.0 and np.isnan(errors[1]) and source == "seeds"
    figure = tradeoffs.over([Run("run", results=results)], "num_iter")
    (bars,) = figure.axes[0].collections
    assert bars.get_segments()[0].tolist() == [[8.0, 8.0], [8.0, 10.0]]
    common = legend_of(figure)[1].replace("\N{NO-BREAK SPACE}", " ").replace("\n", " ")
    assert "mean of 3 seeds" in common and common.endswith("bars: standard deviation over seeds")
    alone = tradeoffs.over([Run("run", results=[each for each in results if each.settings["seed"] == 0])], "num_iter")
    assert not alone.axes[0].collections  # nobody knows how a distance would spread
    assert alone.axes[1].collections[0].get_segments()[0].tolist() == [[8.0, 8.5], [8.0, 9.5]]
    assert "splits of the images" in legend_of(alone)[1].replace("\N{NO-BREAK SPACE}", " ").replace("\n", " ")


def test_classifier_distances_are_not_called_fid(tmp_path):
    """Nor in files of older versions."""
    write_lines(
        tmp_path / "old",
        [
            line(
                s,
                eval__fid=9.0 / s,
                eval__fid_guided=4.0,
                eval__inception_score=2.0,
                eval__inception_score_std=0.5,
                eval__accuracy=1.0,
            )
            for s in (1, 2)
        ],
    )
    (tmp_path / "old" / "config.json").write_text(
        json.dumps({"eval": {"extractor": "classifier", "num_images": 500, "every": 1}, "data": {}})
    )
    write_evaluation(tmp_path / "old", [({"cfg": cfg}, cfg, 0.1) for cfg in (1.0, 2.0)])
    write_lines(
        tmp_path / "new",
        [line(s, eval__frechet_classifier_distance=8.0, eval__num_images=n) for s, n in ((1, 500), (2, 1000))],
    )
    write_lines(tmp_path / "inception", [line(s, eval__fid=3.0) for s in (1, 2)])
    old, new, other = read_runs([tmp_path / "old", tmp_path / "new", tmp_path / "inception"])
    assert {name for name in old.lines[0] if name.startswith("eval/")} == {
        "eval/frechet_classifier_distance",
        "eval/frechet_classifier_distance_guided",
        "eval/classifier_score",
        "eval/classifier_score_std",
        "eval/accuracy",
        "eval/num_images",
    }
    assert old.results[0].metrics.keys() == {"frechet_classifier_distance", "seconds_per_image"}
    figure = training.evaluations([old])
    assert ylabels(figure) == ["Frechet distance (classifier)", "classifier score"]
    common = legend_of(figure)[1].replace("\N{NO-BREAK SPACE}", " ")
    assert common == "500 images a point, bars: standard deviation over splits of the images"
    figure = training.evaluations([old, new, other])
    assert sorted(ylabels(figure)) == ["FID", "Frechet distance (classifier)", "classifier score"]
    assert legend_of(figure)[0][:3] == [
        "old (500 images)",
        "new (500 to 1,000 images)",
        "inception (number of images not known)",
    ]
    assert ylabels(tradeoffs.over([old], "cfg"))[0] == "Frechet distance (classifier)"


def test_results_against_other_statistics_are_separate_curves(tmp_path):
    results = [({"cfg": cfg}, cfg, None) for cfg in (1.0, 2.0)]
    for name, checksum in (("a", "ab"), ("b", "ef")):
        write_evaluation(tmp_path / name, results, statistics={"name": "digits", "checksum": checksum * 32})
    figure = tradeoffs.over(read_runs([tmp_path / "a", tmp_path / "b"]), "cfg")
    assert ylabels(figure)[0] == "Frechet distance (classifier)"  # FID is what Inception's features give
    labels, common = legend_of(figure)
    assert labels == ["a, against digits (abababab)", "b, against digits (efefefef)"]
    words = common.replace("\N{NO-BREAK SPACE}", " ").replace("\n", " ")
    assert "step 450, 10,000 images, seed 0, features of classifier (cdcdcdcd)" in words


def test_names_of_work_directories(tmp_path, workdir):
    assert distinct_names(["/a/run", "/b/run", "/b/other"]) == ["a/run", "b/run", "other"]
    assert distinct_names(["/run", "/b/run"]) == ["/run", "b/run"]
    assert distinct_names(["gs://bucket/run", "/bucket/x"]) == ["run", "x"]
    assert [run.name for run in read_runs([workdir, f"{workdir}/"])] == ["run"]
    assert len(set(style.colors(6))) == 6 and len(set(style.colors(20))) == 20


def test_truncated_metrics(tmp_path):
    write_lines(tmp_path, [line(2, train__loss=1.0), line(1, train__loss=2.0)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "train/lo')
    (run,) = read_runs([tmp_path])
    steps, values = run.series("train/loss")
    assert steps.tolist() == [1, 2] and values.tolist() == [2.0, 1.0]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("\n{}\n")
    (run,) = read_runs([tmp_path])
    assert run.series("train/loss")[1].tolist() == [2.0, 1.0]


def test_missing_input_is_reported(tmp_path, capsys):
    write_lines(tmp_path / "run", [line(1, train__loss=1.0)])
    made = plots.plot([tmp_path / "run"], tmp_path / "out", formats=("png",))
    assert [path.name for path in made] == ["loss.png"]
    assert "run has no samples and no evaluation.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"format": 2}',
        '{"format": 1}',
        '{"format": 1, "results": [3]}',
        "\xff",
        "[" * 200_000,
        '{"format": 1, "results": ' + "9" * 5000 + "}",
    ],
)
def test_invalid_evaluation_files(tmp_path, text):
    write_lines(tmp_path, [line(1, train__loss=1.0)])
    (tmp_path / "evaluation.json").write_bytes(text.encode("latin1"))
    with pytest.raises(UserError, match=r"evaluation\.json"):
        plots.plot([tmp_path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "fields",
    [
        {"metrics": None},
        {"settings": SETTINGS | {"num_images": "all"}},
        {"settings": SETTINGS | {"cfg": []}},
        {"seconds_per_image": "1"},
        {"metrics": {"fid": "1"}},
        {"statistics": "digits"},
        {"extractor": {"name": "classifier", "checksum": None}},
    ],
)
def test_evaluations_with_wrong_fields(tmp_path, fields):
    write_evaluation(tmp_path, [({}, 1.0, None)], **fields)
    with pytest.raises(UserError, match=r"evaluation\.json"):
        read_runs([tmp_path])


def test_broken_inputs(tmp_path, workdir):
    for given, message in (
        ([], "no work directory"),
        ([tmp_path / "gone"], "gone"),
        ([workdir / "metrics.jsonl"], r"metrics\.jsonl"),
        ([workdir, tmp_path / "bare"], r"bare .*metrics\.jsonl"),
    ):
        (tmp_path / "bare").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=message):
            plots.plot(given, tmp_path / "out")
    for formats in ([], ["png", "gif"]):
        with pytest.raises(UserError, match="formats"):
            plots.plot([workdir], tmp_path / "out", formats)
    write_lines(tmp_path / "bare", [line(1, perf__mfu=0.5)])
    with pytest.raises(UserError, match=r"bare.*train/loss"):
        plots.plot([tmp_path / "bare"], tmp_path / "out")
    for content in (b"not a picture", (workdir / "samples" / "raw_and_ema_00000010.png").read_bytes()[:60]):
        (workdir / "samples" / "raw_and_ema_00000020.png").write_bytes(content)
        with pytest.raises(UserError, match="raw_and_ema_00000020.png cannot be read"):
            plots.plot([workdir], tmp_path / "out")
    write_png(workdir / "samples" / "raw_and_ema_00000020.png", np.zeros((4, 16, 3), np.uint8))
    with pytest.raises(UserError, match="16 pixels wide"):
        plots.plot([workdir], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_matplotlibrc_of_the_current_folder_is_not_read(tmp_path):
    (tmp_path / "matplotlibrc").write_bytes(b"\xff")
    code = "from marjax.plots import style\nwith style.applied():\n    pass\n"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize(
    "make",
    [
        os.mkfifo,
        lambda path: path.symlink_to("x"),
        lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_RDWR), 1 << 40),
        lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 9\n"),
        lambda path: Image.new("1", (13_000, 13_000)).save(path),
    ],
)
def test_foreign_pictures_of_samples(tmp_path, make, recwarn):
    """A pipe, an endless file, a link to nothing, what Ghostscript would run, and what fills the memory."""
    path = tmp_path / "raw_and_ema_00000020.png"
    make(path)
    with pytest.raises(UserError, match=path.name) as caught:
        training.ema_half(path)
    assert "\n" not in str(caught.value) and "Ghostscript" not in str(caught.value) and not len(recwarn)
