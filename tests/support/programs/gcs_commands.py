"""A program of test_storage.py: marjax commands in a bucket, and what they leave there."""

import json
import sys

import numpy as np
from etils import epath
from support.configs import QUICK, flags
from support.paths import DIGITS

from marjax import cli

SMALL = [
    "--config.train.warmup_steps=1",
    "--config.checkpoint.every=2",
    "--config.log.every=1",
    "--config.log.samples_every=0",
    "--config.log.tensorboard=False",
    "--config.log.progress=False",
    "--config.train.schedule=constant",
    *flags(QUICK),
]


def main(file: str) -> None:
    root = epath.Path("gs://bucket/sweep")
    run = str(root / "point")
    train = ["train", "--config", f"{DIGITS}:debug", "--workdir", run, *SMALL]
    assert cli.main([*train, "--config.train.steps=2"]) == 0
    first = json.loads((root / "point" / "metrics.jsonl").read_text().splitlines()[0])
    assert cli.main([*train, "--config.train.steps=4"]) == 0  # resumes: the first lines are kept, not written again
    lines = [json.loads(line) for line in (root / "point" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and lines[0] == first
    assert {path.name for path in (root / "point" / "checkpoints").iterdir()} == {"2", "4"}
    assert not [path for path in (root / "point").iterdir() if "partial" in path.name]
    assert cli.main([*train, "--config.train.steps=4", "--config.seed=1"]) == 2  # made with another config

    tuned = ["train", "--config", f"{DIGITS}:debug", "--workdir", "gs://bucket/tuned", *SMALL, "--config.train.steps=2"]
    assert cli.main([*tuned, "--init_from", run]) == 0 and cli.main(tuned) == 0
    assert json.loads(epath.Path("gs://bucket/tuned/config.json").read_text())["init"]["path"] == run

    assert cli.main(["sample", "--workdir", run, "--out", str(root / "samples"), "--labels", "0,1"]) == 0
    assert cli.main(["sample", "--workdir", run, "--out", str(root / "none"), "--labels", "77"]) == 2
    assert not (root / "none").exists()
    with (root / "samples" / "samples.npz").open("rb") as stored, np.load(stored) as arrays:
        assert arrays["images"].shape == (2, 8, 8, 1) and list(arrays["labels"]) == [0, 1]

    assert cli.main(["sweep", file, "--root", str(root), "--status"]) == 0
    assert cli.main(["sweep", file, "--root", str(root), "--table"]) == 0
    log = root / "logs" / "point.log"
    log.write_text("on another machine\n")
    assert cli.main(["sweep", file, "--root", str(root)]) == 0  # in a process of its own, which resumes and measures
    printed = log.read_text()
    assert printed.startswith("on another machine\n---") and "resuming at step 4 of 4" in printed
    assert "| 0.5 |" in (root / "table.md").read_text()
    assert cli.main(["sweep", file, "--root", str(root)]) == 0 and log.read_text() == printed  # finished: nothing runs
    assert cli.main(["sweep", file, "--root", str(root), "--status"]) == 0
    assert cli.main(["train", "--config", DIGITS, "--workdir", "gs://no-such-bucket/run"]) == 2
    print("all is well")


if __name__ == "__main__":
    main(sys.argv[1])
