"""Bars, activities and notes, with a clock that the tests move."""

import io
import itertools
import threading

import pytest

from marjax.progress import Bar, Console, Task


class _Clock:
    def __init__(self):
        self.seconds = 1000.0

    def __call__(self):
        return self.seconds

    def wait(self, console, seconds):
        for _ in range(round(2 * seconds)):
            self.seconds += 0.5
            console.tick()


@pytest.fixture
def clock():
    return _Clock()


def _console(clock, live=False, encoding="utf-8"):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    return Console(stream, live=live, now=clock, threads=False)


def _text(console):
    return console.stream.buffer.getvalue().decode(console.stream.encoding)


def _screen(console):
    """The lines of a terminal."""
    lines = [""]
    for character in _text(console):
        if character == "\n":
            lines.append("")
            column = 0
        elif character == "\r":
            column = 0
        else:
            column = column if lines[-1] else 0
            lines[-1] = lines[-1][:column].ljust(column) + character + lines[-1][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


def test_no_ten_seconds_pass_without_a_line_where_there_is_no_terminal(clock):
    console, seen = _console(clock), []
    with Task(console, "compiling the train step", advice="compiled programs are kept"):
        for _ in range(120):
            clock.wait(console, 0.5)
            seen.append(_text(console).count("\n"))
    changes = [0, *(i for i in range(1, len(seen)) if seen[i] != seen[i - 1])]
    assert max(b - a for a, b in itertools.pairwise(changes)) < 20  # halves of a second
    lines = _text(console).splitlines()
    assert lines[0] == "compiling the train step: 00:03 (compiled programs are kept)"
    assert (len(lines), lines[-1]) == (7, "compiling the train step: 00:57")


def test_lines_become_rare_in_a_long_run(clock):
    console = _console(clock)
    with Bar(console, "train", 10, "steps", 0):
        clock.wait(console, 10_000)
        before = _text(console).count("\n")
        clock.wait(console, 1_000)
    assert 8 <= _text(console).count("\n") - before <= 11


def test_the_rate_leaves_out_the_first_unit_and_pauses(clock):
    console = _console(clock)
    with Bar(console, "train", 100, "steps", 40) as bar:
        clock.wait(console, 300)  # compiles
        bar.update()
        assert (bar.rate(), bar.eta()) == (0.0, "")
        for step in range(19):
            clock.wait(console, 2)
            if step % 5 == 0:
                with bar.pause("drawing pictures"):
                    clock.wait(console, 50)
            bar.update()
        assert bar.rate() == pytest.approx(0.5)
        assert bar.eta() == "01:20"
        assert "train: 60 of 100 steps, 08:58, ETA 01:20" in bar.line()
    assert "drawing pictures: 00:03\n" in _text(console)


def test_the_rate_follows_a_change_of_speed(clock):
    with Bar(_console(clock), "sampling", 10_000, "images", 0) as bar:
        for seconds in (1.0, 0.1):
            for _ in range(4000):
                clock.seconds += seconds
                bar.update()
        assert bar.rate() == pytest.approx(10, rel=0.5)


def test_notes_are_whole_lines_beside_a_live_bar(clock):
    console = _console(clock, live=True)
    with Bar(console, "train", 4, "steps", 0) as bar:
        for step in range(4):
            clock.wait(console, 1)
            bar.update()
            console.note(f"note {step}")
            with Task(console, "saving a checkpoint"):
                clock.wait(console, 2)
                assert _screen(console)[-1] == "saving a checkpoint: 00:02"
            assert _screen(console)[-1].startswith("train")
    lines = _screen(console)
    assert lines[:4] == ["note 0", "note 1", "note 2", "note 3"]
    assert lines[4].startswith("train: 100%") and "4/4" in lines[4] and lines[5:] == [""]


def test_a_terminal_of_another_encoding_gets_what_it_can_show(clock):
    for live in (True, False):
        console = _console(clock, live, "ascii")
        with Bar(console, "encoding φ", 2, "images", 0) as bar:
            bar.update(1)
            console.note("größe")
        assert "gr\\xf6\\xdfe" in _text(console)


def test_nothing_is_shown_inside_of_what_is_hidden(clock):
    console = _console(clock)
    with Bar(console, "train", 2, "steps", 0, show=False) as bar, bar.pause("drawing"):
        clock.wait(console, 100)
        bar.update()
        console.note("a note")
    assert _text(console) == "a note\n"


def test_short_work_inside_of_other_work_gets_no_line(clock):
    console = _console(clock)
    with Bar(console, "train", 9, "steps", 0):
        for seconds in (2.5, 4.0):
            with Bar(console, "sampling", 8, "images", 0) as bar:
                clock.wait(console, seconds)
                bar.update(8)
    assert _text(console).splitlines()[1:] == ["sampling: 0 of 8 images, 00:03", "sampling: 8 of 8 images, 00:04"]


@pytest.mark.parametrize("live", [False, True])
def test_a_command_is_named_only_where_nothing_else_is_shown(clock, live):
    console = _console(clock, live)
    with Task(console, "marjax sample", is_command=True):
        clock.wait(console, 20)
        with Task(console, "loading the checkpoint"):
            clock.wait(console, 3)
            assert _screen(console)[2].startswith("loading the checkpoint")
        clock.wait(console, 6)
    assert [line for line in _screen(console) if line.startswith("marjax")] == [
        "marjax sample: 00:06",
        "marjax sample: 00:15",
    ]


def test_the_thread_ends_with_the_last_task_whatever_ends_it():
    console = Console(io.StringIO(), live=False)
    with pytest.raises(KeyboardInterrupt), Task(console, "one"), Task(console, "two"):
        assert any(each.name == "marjax-progress" for each in threading.enumerate())
        raise KeyboardInterrupt
    for each in threading.enumerate():
        if each.name == "marjax-progress":
            each.join(10)
            assert not each.is_alive()


def test_a_closed_standard_error_is_no_failure(clock, monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    console = Console(now=clock, threads=False)
    with Bar(console, "train", 2, "steps", 0) as bar:
        bar.update()
        clock.wait(console, 20)
        console.note("a note")
