"""Loggers: each value is sent once, failures do not end the run, run ids are kept."""

import importlib.machinery
import sys
import threading
import types

import numpy as np
import pytest
from support.configs import QUICK, make_digits

import marjax
from marjax import config as config_lib
from marjax.errors import UserError
from marjax.loggers import Guarded, Logger, check_loggers, guarded
from marjax.metrics import MetricWriter


class Kept(Logger):
    """Records its calls; raises or waits on demand."""

    def __init__(self, fails=None, waits=None):
        self.calls, self.fails, self.waits = [], fails, waits

    def hparams(self, values):
        self.calls.append(("hparams", values["train.steps"], values["log.progress"]))

    def text(self, name, text):
        self.calls.append(("text", name, '"train.steps"' in text))

    def scalars(self, step, values):
        if self.waits is not None:
            self.waits.wait(30)
        if self.fails == "scalars":
            raise OSError("no\nconnection")
        self.calls.append(("scalars", step, values["train/loss"]))

    def image(self, step, name, picture):
        self.calls.append(("image", step, picture.shape))

    def close(self):
        self.calls.append(("close",))
        if self.fails == "close":
            raise OSError("no connection")


def write(folder, steps, start, *loggers):
    with MetricWriter(
        folder,
        start_step=start,
        total_steps=9,
        tensorboard=False,
        progress=False,
        loggers=[Guarded(logger) for logger in loggers],
    ) as writer:
        writer.describe({"train.steps": 9, "log.progress": False, "train.lr": None})
        for step in steps:
            writer.scalars(step, {"train/loss": step / 2})
        writer.image(steps[-1], "ema", np.zeros((4, 6, 3), np.uint8))


def test_a_resumed_run_sends_nothing_twice(tmp_path):
    first, second = Kept(), Kept()
    write(tmp_path, [1, 2, 3], 0, first)
    described = [("hparams", 9, False), ("text", "config", True)]
    assert first.calls == [
        *described,
        ("scalars", 1, 0.5),
        ("scalars", 2, 1.0),
        ("scalars", 3, 1.5),
        ("image", 3, (4, 6, 3)),
        ("close",),
    ]
    write(tmp_path, [2, 3, 4], 1, second)
    assert second.calls == [*described, ("scalars", 4, 2.0), ("image", 4, (4, 6, 3)), ("close",)]


@pytest.mark.parametrize("fails", ["scalars", "close"])
def test_a_logger_that_fails_is_reported_once(tmp_path, capsys, fails):
    bad, good = Kept(fails), Kept()
    write(tmp_path, [1, 2, 3], 0, bad, good)
    assert [call[0] for call in good.calls].count("scalars") == 3 and bad.calls[-1] == ("close",)
    printed = capsys.readouterr().err
    assert printed.count("logger Kept failed") == 1 and f"in {fails}" in printed


def test_a_logger_that_hangs_is_abandoned(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(guarded, "_PATIENCE", 0.05)
    waits = threading.Event()
    write(tmp_path, [1, 2], 0, Kept(waits=waits))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert "does not answer" in capsys.readouterr().err
    waits.set()


@pytest.mark.parametrize("given, told", [([Kept], "Kept"), ([object()], "hparams"), (Kept(), "Kept"), ("wandb", "str")])
def test_invalid_loggers(given, told):
    with pytest.raises(UserError, match=told):
        check_loggers(config_lib.base().log, given)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_names_its_extra_before_anything_is_written(tmp_path, monkeypatch, name):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"config.log.{name}.*marjax\[{name}\]"):
        marjax.train(make_digits(**{f"log__{name}": "digits"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def stand_in(monkeypatch, name, **contents):
    """Installs a fake module with these attributes."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


def make_wandb(monkeypatch, started, logged):
    class Run:
        config = types.SimpleNamespace(update=lambda values, allow_val_change: logged.append(("config", values)))

        def log(self, values, step):
            logged.append((step, *values))

        def finish(self):
            logged.append("finish")

    def init(**options):
        started.append(options)
        return Run()

    stand_in(monkeypatch, "wandb", init=init, Image=np.shape, Settings=dict)


class MlflowError(Exception):
    """As MlflowException."""


def make_mlflow(monkeypatch, runs, uris):
    class Client:
        def __init__(self, tracking_uri):
            uris.append(tracking_uri)

        def get_experiment_by_name(self, name):
            return None

        def create_experiment(self, name):
            return name

        def create_run(self, experiment, run_name):
            runs["r1"] = {"experiment": experiment, "name": run_name, "params": {}, "metrics": [], "artifacts": []}
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))

        def update_run(self, run_id, status):
            if run_id not in runs:
                raise MlflowError
            runs[run_id]["status"] = status

        def get_run(self, run_id):
            return types.SimpleNamespace(data=types.SimpleNamespace(params=runs[run_id]["params"]))

        def log_batch(self, run_id, metrics=(), params=()):
            assert len(params) <= 100 and not runs[run_id]["params"].keys() & dict(params).keys()
            runs[run_id]["params"] |= dict(params)
            runs[run_id]["metrics"] += [(step, name) for name, value, _, step in metrics if name == "train/loss"]

        def log_text(self, run_id, text, file):
            runs[run_id]["artifacts"].append(file)

        def log_image(self, run_id, picture, file):
            runs[run_id]["artifacts"].append(file)

        def set_terminated(self, run_id):
            runs[run_id]["status"] = "FINISHED"

    stand_in(monkeypatch, "mlflow")
    stand_in(monkeypatch, "mlflow.entities", Metric=lambda *fields: fields, Param=lambda name, value: (name, value))
    stand_in(monkeypatch, "mlflow.exceptions", MlflowException=MlflowError)
    stand_in(monkeypatch, "mlflow.tracking", MlflowClient=Client)


def test_a_run_in_both_services_and_its_resumption(tmp_path, monkeypatch):
    """The second start continues the run of each service and sends only what is new."""
    started, logged, runs, uris = [], [], {}, []
    make_wandb(monkeypatch, started, logged)
    make_mlflow(monkeypatch, runs, uris)
    own = Kept()
    for steps in (1, 2):
        marjax.train(
            make_digits(
                **QUICK, train__steps=steps, log__wandb="me/digits", log__mlflow="http://there", log__samples_every=2
            ),
            tmp_path / "run",
            loggers=[own],
        )
    assert [call[:2] for call in own.calls if call[0] == "scalars"] == [("scalars", 1), ("scalars", 2)]
    first, second = started
    assert (first["entity"], first["project"], first["name"], first["resume"]) == ("me", "digits", "run", "allow")
    assert first["id"] == second["id"] and first["dir"] == str(tmp_path / "run")
    steps = [entry[0] for entry in logged if isinstance(entry[0], int) and "train/loss" in entry]
    assert steps == [1, 2] and logged.count("finish") == 2 and logged[0][1]["model.head"] == "regression"
    assert any("raw_and_ema" in entry for entry in logged if entry != "finish")
    (run,) = runs.values()
    assert run["metrics"] == [(1, "train/loss"), (2, "train/loss")] and run["status"] == "FINISHED"
    assert run["params"]["model.head"] == "regression" and len(run["params"]) > 100 and uris == ["http://there"] * 2
    assert run["artifacts"].count("samples/raw_and_ema_00000002.png") == 1 and "config.md" in run["artifacts"]


def test_a_service_that_cannot_start_is_omitted(tmp_path, monkeypatch, capsys):
    def init(**options):
        raise RuntimeError("no network\nat all")

    stand_in(monkeypatch, "wandb", init=init, Image=None, Settings=dict)
    (tmp_path / "loggers.json").write_text('{"wandb": "../../etc"}')  # not an id: a new one is made
    assert marjax.loggers.open_loggers(make_digits(log__wandb="digits").log, tmp_path) == []
    assert "wandb cannot be started (RuntimeError: no network)" in capsys.readouterr().err
    assert "etc" not in (tmp_path / "loggers.json").read_text()
