"""What real processes do that are asked to stop, killed, left alone by others, or kept waiting by the storage."""

import json
import os
import pathlib
import random
import signal
import time

import jax
import numpy as np
import pytest
from support.configs import QUICK, dotted, flags
from support.paths import DIGITS
from support.processes import Run, command, steps_of

from marjax.errors import INTERRUPTED, LOST_PEER, PREEMPTED
from marjax.generation.sample import open_sampler

ABORTED = (LOST_PEER, -signal.SIGABRT)  # by us, or by JAX's watchdog


DIFFUSION = {"model__variant": "ar", "sample__num_iter": 16}


def arguments(workdir, steps, every, model=QUICK, **fields):
    """Of `marjax train`, for a run that begins in a moment."""
    fields = {
        "train.steps": steps,
        "train.warmup_steps": 1,
        "checkpoint.every": every,
        "log.every": 1,
        "log.samples_every": 0,
        "log.tensorboard": "false",
        "log.progress": "false",
        **dotted(model | fields),
    }
    return ["train", "--config", f"{DIGITS}:debug", "--workdir", workdir, *flags(fields)]


def lines(workdir):
    try:
        return [json.loads(line) for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    except FileNotFoundError:
        return []


def last_line(workdir):
    return (lines(workdir) or [{"step": 0}])[-1]


def params(workdir):
    """Of the newest checkpoint, by name."""
    opened = open_sampler(workdir, weights="raw")
    return opened.step, {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(opened.params)
    }


ENDLESS = 100_000  # steps


def stop(run, workdir, after, victim=0):
    """Sends SIGTERM to one process once the run is that far; the step at which all have saved."""
    run.wait_for(lambda: last_line(workdir)["step"] >= after)
    os.kill(run.processes[victim].pid, signal.SIGTERM)
    assert run.wait() == [PREEMPTED] * len(run.processes), run.said()
    saved = steps_of(workdir)[-1]
    assert after <= saved == last_line(workdir)["step"] and f"preempted: saved at step {saved} of" in run.said()
    return saved


def assert_undisturbed(tmp_path, step, count, model):
    """The run in tmp_path/run has at that step what one has that was left alone, to the bit, and every line once."""
    with Run(tmp_path, command, *arguments(tmp_path / "whole", step, ENDLESS, model), count=count) as run:
        assert run.wait() == [0] * count, run.said()
    (own, a), (other, b) = params(tmp_path / "run"), params(tmp_path / "whole")
    assert own == other == step and a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])
    assert [row["step"] for row in lines(tmp_path / "run")] == list(range(1, step + 1))


@pytest.mark.slow
def test_sigterm_to_one_of_two_saves_at_one_step_on_both(tmp_path):
    """So it does between the start and its first step, which a slice that was just got back may well see."""
    given, workdir = arguments(tmp_path / "run", ENDLESS, ENDLESS), tmp_path / "run"
    with Run(tmp_path, command, *given, count=2) as run:
        first = stop(run, workdir, 3, victim=1)
    with Run(tmp_path, stopped_early, *given, count=2, each=True) as run:
        assert run.wait() == [PREEMPTED] * 2, run.said()
        assert f"preempted: before the first step after {first} of" in run.said()
    assert steps_of(workdir)[-1] == first
    with Run(tmp_path, stopped_early, *arguments(tmp_path / "new", ENDLESS, ENDLESS), count=2, each=True) as run:
        assert run.wait() == [PREEMPTED] * 2, run.said()
    assert steps_of(tmp_path / "new") == [1]


def stopped_early(index, *given):
    """SIGTERM comes while the checkpoint is read, or looked for."""
    from marjax.checkpoints.manager import Checkpoints

    restore = Checkpoints.restore

    def slow(self, *more):
        restored = restore(self, *more)
        if index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(4.0)  # JAX looks once a second whether it came
        return restored

    Checkpoints.restore = slow
    return command(*given)


def test_the_same_command_goes_on_after_sigterm_to_a_process_alone(tmp_path):
    given, workdir = arguments(tmp_path / "run", ENDLESS, ENDLESS), tmp_path / "run"
    with Run(tmp_path, command, *given) as run:
        first = stop(run, workdir, 3)
    with Run(tmp_path, command, *given) as run:
        run.wait_for(lambda: last_line(workdir)["step"] > first)
        assert f"resuming at step {first} of" in run.said()
    assert 0 < last_line(workdir)["perf/goodput"] < 1


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ctrl_c_saves_at_one_step(tmp_path, count):
    """As it reaches a terminal's processes, all of them; the exit code is a shell's."""
    given, workdir = arguments(tmp_path / "run", ENDLESS, ENDLESS), tmp_path / "run"
    with Run(tmp_path, command, *given, count=count) as run:
        run.wait_for(lambda: last_line(workdir)["step"] >= 3)
        for process in run.processes:
            os.kill(process.pid, signal.SIGINT)
        assert run.wait() == [INTERRUPTED] * count, run.said()
        saved = steps_of(workdir)[-1]
        assert saved == last_line(workdir)["step"]
        assert run.said().count(f"interrupted: saved at step {saved} of") == count
        assert "Traceback" not in run.said() and not (workdir / "marjax.lock").exists()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_peer_ends_the_others(tmp_path, victim):
    """So that a launcher starts them all again; `Run` sets the time to 10 s."""
    with Run(tmp_path, command, *arguments(tmp_path / "run", ENDLESS, ENDLESS), count=2) as run:
        run.wait_for(lambda: last_line(tmp_path / "run")["step"] >= 3)
        run.processes[victim].kill()
        codes = run.wait(seconds=60)
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] in ABORTED, run.said()


@pytest.mark.slow
def test_a_slip_on_one_process_ends_all(tmp_path):
    with Run(tmp_path, one_slips, str(tmp_path / "run"), count=2, each=True) as run:
        codes = run.wait(seconds=60)
    assert codes[1] == 2 and codes[0] in ABORTED, run.said()
    assert "no such disk" in run.said()


def one_slips(index, workdir):
    from marjax.data.pipeline import Batches
    from marjax.errors import UserError

    following = Batches.__next__

    def slips(self):
        if index == 1 and last_line(workdir)["step"] >= 3:
            raise UserError("no such disk")
        return following(self)

    Batches.__next__ = slips
    return command(*arguments(workdir, ENDLESS, ENDLESS))


def test_slow_storage_does_not_stop_the_steps(tmp_path):
    """The first checkpoint is written for as long as it takes the run to be some steps further on."""
    with Run(tmp_path, slowly, str(tmp_path / "run")) as run:
        assert run.wait() == [0], run.said()
    reached = int((tmp_path / "reached").read_text())
    assert reached >= 9 and "deferred: the previous checkpoint" in run.said()
    steps = steps_of(tmp_path / "run")
    assert steps[-1] == 40 and 4 not in steps


def slowly(workdir):
    import orbax.checkpoint as ocp

    finalize = ocp.CompositeCheckpointHandler.finalize

    def slow(self, path):
        if not steps_of(workdir):
            end = time.monotonic() + 60
            while last_line(workdir)["step"] < 9 and time.monotonic() < end:
                time.sleep(0.01)
            (pathlib.Path(workdir).parent / "reached").write_text(str(last_line(workdir)["step"]))
        return finalize(self, path)

    ocp.CompositeCheckpointHandler.finalize = slow
    return command(*arguments(workdir, 40, 2, checkpoint__keep=40))


@pytest.mark.slow
@pytest.mark.parametrize("count, kills, model", [(1, 17, QUICK), (2, 3, DIFFUSION)])
def test_killed_twenty_times(tmp_path, count, kills, model):
    """Or asked to stop, shortly before; at random moments of start, training and saving.

    What is left at the end is an undisturbed run's, to the bit.
    """
    rng = random.Random(int.from_bytes(os.urandom(4), "big"))
    given, workdir, reached = arguments(tmp_path / "run", ENDLESS, 2, model), tmp_path / "run", []
    for kill in range(kills):
        with Run(tmp_path, command, *given, count=count) as run:
            if kill % 4:  # else while it starts, or whatever it is at after that long
                target = last_line(workdir)["step"] + rng.randint(1, 3)
                run.wait_for(lambda target=target: last_line(workdir)["step"] >= target)
                time.sleep(rng.uniform(0.0, 0.05))
            else:
                time.sleep(rng.uniform(0.0, 2.0))
            victim = rng.choice(run.processes)
            assert victim.is_alive(), run.said()
            os.kill(victim.pid, rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)))
            time.sleep(rng.uniform(0.0, 0.1))  # then the other, which would notice in some seconds
        reached.append(last_line(workdir)["step"])
    assert len(set(reached)) > 2, reached
    with Run(tmp_path, command, *given, count=count) as run:
        step = stop(run, workdir, max(reached) + 1)
    assert not [path for path in workdir.rglob("*") if path.name.endswith((".lock", ".partial"))]
    assert_undisturbed(tmp_path, step, count, model)
