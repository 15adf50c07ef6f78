"""Step times, pauses and goodput, with a fake clock."""

import time

import pytest

from marjax.training.clock import Clock


class Time:
    now = 100.0

    def __call__(self):
        return self.now


def steps(clock, moved, seconds, waited=0.0, idle=True, blocked=0.0):
    for each in seconds:
        moved.now += each
        clock.step(waited, idle, blocked)


def test_first_step_is_not_counted():
    moved = Time()
    clock = Clock(images=64, devices=4, flops_share=0.5, now=moved)
    steps(clock, moved, [50.0] + [1.0] * 8 + [3.0, 5.0], waited=0.5, blocked=0.25)
    line = clock.line()
    assert line["perf/images_per_sec_per_chip"] == 64 * 10 / 16 / 4 and line["perf/mfu"] == 5.0
    assert line["perf/step_seconds_p50"] == 1.0 and line["perf/step_seconds_p90"] == pytest.approx(3.2)
    assert line["perf/host_seconds_p50"] == 0.25 and line["data/wait_frac"] == 5 / 16
    steps(clock, moved, [2.0], idle=False)
    assert clock.line()["perf/step_seconds_p99"] == 2.0 and clock.productive == 18.0


def test_pauses_are_excluded_from_steps():
    moved = Time()
    clock = Clock(images=1, devices=1, now=moved)
    steps(clock, moved, [1.0, 1.0])
    for name, seconds in (("checkpoint", 2.0), ("eval", 30.0), ("checkpoint", 0.5)):
        with clock.pause(name):
            moved.now += seconds
    steps(clock, moved, [1.0])
    line = clock.line()
    assert (line["perf/checkpoint_seconds"], line["perf/eval_seconds"]) == (2.5, 30.0)
    assert line["perf/step_seconds_p99"] == 1.0 and "perf/mfu" not in line and "perf/eval_seconds" not in clock.line()


def test_goodput_over_restarts():
    """Steps before this start count, except those lost after the last checkpoint."""
    moved = Time()
    clock = Clock(images=1, devices=1, productive=60.0, first_start=time.time() - 200.0, now=moved)
    steps(clock, moved, [7.0] + [1.0] * 40)
    assert clock.line()["perf/goodput"] == pytest.approx(0.5, rel=0.01)
