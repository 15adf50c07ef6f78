"""Commands that are killed or asked to stop at random moments: the same bytes at the end, and nothing left over.

Training is in test_preemption.py. A campaign, MARJAX_KILLS=20, sends so many signals to each command, and to commands
that take longer too; MARJAX_KILL_SEED=N chooses other moments.
"""

import contextlib
import json
import os
import pathlib
import random
import signal
import time
import uuid

import numpy as np
import pytest
from PIL import Image
from support.configs import QUICK, dotted, flags
from support.paths import DIGITS
from support.processes import Run, command

CAMPAIGN = "MARJAX_KILLS" in os.environ
KILLS = int(os.environ.get("MARJAX_KILLS", "1"))
SEED = int(os.environ.get("MARJAX_KILL_SEED", "0"))
SMALL = flags(
    {
        "train.steps": 1,
        "train.warmup_steps": 1,
        "log.samples_every": 0,
        "log.tensorboard": "false",
        "log.progress": "false",
    }
)
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A trained work directory and its weights exported; in a campaign, what the other commands need."""
    folder = tmp_path_factory.mktemp("made")
    config = ["--config", f"{DIGITS}:debug"]
    given = [
        ["train", *config, "--workdir", "run", *SMALL],
        ["export", "--workdir", "run", "--out", "exported.safetensors"],
    ]
    if CAMPAIGN:
        given += [
            ["train", *config, "--workdir", "quick", *SMALL, *flags(QUICK)],
            ["train-classifier", *config, "--out", "classifier.npz", "--steps", "1"],
            [
                "stats",
                "--dataset",
                f"{DIGITS}:debug",
                "--out",
                "stats.npz",
                "--extractor",
                "classifier",
                "--extractor_path",
                "classifier.npz",
                "--config.data.split=train[:40]",
            ],
        ]
    paths = {"run", "quick", "exported.safetensors", "classifier.npz", "stats.npz"}
    for each in given:
        assert command(*(folder / part if part in paths else part for part in each)) == 0
    rng = np.random.default_rng(0)
    for index in range(60):
        path = folder / "own" / f"class{index % 3}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    return folder


def arguments(name, made, out):
    """Of the command; all that it writes is in the folder `out`."""
    return {
        "prepare": ["prepare", "--images", made / "own", "--out", out, "--num_shards", 12, "--workers", 2],
        "export": ["export", "--workdir", made / "run", "--out", out / "x.safetensors"],
        "convert": [
            "convert",
            "--checkpoint",
            made / "exported.safetensors",
            "--out",
            out / "run",
            *flags({"data.image_size": 8, "data.channels": 1}),
        ],
        "evaluate": [
            "evaluate",
            "--workdir",
            made / "quick",
            "--out",
            out,
            "--num_images",
            200,
            "--batch_size",
            20,
            "--extractor",
            "classifier",
            "--extractor_path",
            made / "classifier.npz",
            "--statistics",
            made / "stats.npz",
            "--save",
            "npz",
        ],
        "sweep": ["sweep", made / "sweep.py", "--root", out / "root"],
    }[name]


def contents(out):
    """What a command has written, without times and what names them."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if path.is_dir():
            continue
        if path.name == "evaluation.json":
            found[name] = [
                {key: value for key, value in entry.items() if key != "seconds_per_image"}
                for entry in json.loads(path.read_text())["results"]
            ]
        elif path.name == "result.json":
            found[name] = json.loads(path.read_text())["rows"]
        elif path.name == "config.json":
            found[name] = path.read_text().replace(str(out), "OUT")
        elif not set(path.relative_to(out).parts) & {
            "checkpoints",
            "logs",
            "jobs",
            "table.csv",
            "table.md",
            "metrics.jsonl",
            "started.json",
        }:
            found[name] = path.read_bytes()
    return found


def left_over(out, temporary, mark):
    """Files and folders that only a command at work has, and processes that it has started."""
    files = [
        path.name
        for path in out.rglob("*")
        if any(each in path.name for each in (".partial", ".lock", ".preparing", ".old", "orbax-checkpoint-tmp"))
    ]
    processes = []
    for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                processes.append((path.parent / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return files + [path.name for path in temporary.iterdir()] + processes


def marked(mark, temporary, began, *given):
    os.environ |= {"MARJAX_MARK": mark, "TMPDIR": str(temporary)}
    began.touch()
    return command(*given)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "export",
        "convert",
        *(
            pytest.param(name, marks=pytest.mark.skipif(not CAMPAIGN, reason="takes minutes: set MARJAX_KILLS"))
            for name in ("prepare", "evaluate", "sweep")
        ),
    ],
)
def test_killed_at_random_moments(made, tmp_path, name):
    rng = random.Random(f"{SEED} {name}")
    calm, killed, temporary, logs = (tmp_path / each for each in ("calm", "killed", "temporary", "logs"))
    for folder in (calm, killed, temporary, logs):
        folder.mkdir()
    overlay = {
        "train.steps": 2,
        "train.warmup_steps": 1,
        "checkpoint.every": 1,
        "log.tensorboard": False,
        "log.samples_every": 0,
        **dotted(QUICK),
    }
    (made / "sweep.py").write_text(
        f"CONFIG = {DIGITS + ':debug'!r}\n\ndef get_sweep():\n    yield 'a', {overlay!r}\n"
        "\ndef measure(workdir, root):\n    return [{'score': 0.5}]\n"
    )
    mark = f"mark-{uuid.uuid4().hex}"

    @contextlib.contextmanager
    def start(out):
        began = tmp_path / f"began-{uuid.uuid4().hex}"
        with Run(logs, marked, mark, temporary, began, *arguments(name, made, out)) as run:
            run.wait_for(began.exists)
            yield run

    with start(calm) as run:
        begun = time.monotonic()
        assert run.wait() == [0], run.said()
    seconds, hits = time.monotonic() - begun, []
    while len(hits) < KILLS:
        with start(killed) as run:
            process, number = run.processes[0], rng.choice(SIGNALS)
            process.join(rng.uniform(0.0, 0.9 * seconds))
            if process.is_alive():
                os.kill(process.pid, number)
                hits.append(number)
            (code,) = run.wait()
            # What was done already is said by export in its own way.
            assert code in (-number, 0, 2, 128 + number, 42) and "Traceback" not in run.said(), run.said()
            if code in (0, 2):
                assert contents(killed) == contents(calm), run.said()
                for path in killed.iterdir():  # and once more from the start
                    path.rename(tmp_path / uuid.uuid4().hex)
    with start(killed) as run:
        (code,) = run.wait()
    assert code == 0 or (name == "export" and "is there already" in run.said()), run.said()
    assert contents(killed) == contents(calm), run.said()
    limit = time.monotonic() + 60
    while (left := left_over(killed, temporary, mark)) and time.monotonic() < limit:
        time.sleep(0.1)
    assert not left
    print(f"{name}: {len(hits)} signals: {sorted(signal.Signals(number).name for number in hits)}")
