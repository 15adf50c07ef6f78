"""The `marjax` command. It only parses: each command is a function that a notebook can call."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from marjax import config as config_lib
from marjax.errors import TrainingError, UserError

# Fields of config.sample that `marjax sample` takes.
_SAMPLE_FIELDS = {"num_iter": int, "num_sampling_steps": str, "cfg": float, "cfg_schedule": str, "temperature": float,
                  "confidence_order": str, "choice_temperature": float, "batch_size": int}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; 0 on success, 2 after a user's slip, 1 for a run that cannot go on, 130 on Ctrl-C."""
    parser = _parser()
    given, rest = parser.parse_known_args(argv)
    try:
        overrides = parse_overrides(rest)
        if overrides and not given.takes_overrides:
            raise UserError(f"{given.command} takes no --config.key=value: the config is in the work directory")
        given.run(given, overrides)
    except (UserError, TrainingError) as error:
        print(f"marjax {given.command}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print(f"marjax {given.command}: interrupted; training resumes from its last checkpoint", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def parse_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """{"train.lr": "1e-3"} from ["--config.train.lr=1e-3"] or ["--config.train.lr", "1e-3"].

    Raises:
      UserError: anything else.
    """
    overrides: dict[str, str] = {}
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if not argument.startswith("--config."):
            raise UserError(f"unknown argument {argument!r}; single config fields are set by --config.key=value")
        key, has_value, value = argument.removeprefix("--config.").partition("=")
        if not has_value:
            if not remaining or remaining[0].startswith("--"):
                raise UserError(f"{argument} needs a value: {argument}=...")
            value = remaining.pop(0)
        overrides[key] = value
    return overrides


def parse_labels(text: str) -> list[int]:
    """[0, 1, 2, 7] from "0-2,7"; "none" is [-1], no class.

    Raises:
      UserError: anything else.
    """
    if text == "none":
        return [-1]
    labels: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UserError(f"labels {text!r}: give classes such as 0-9 or 1,5,7, or 'none'")
        numbers = range(int(first), int(last if dash else first) + 1)
        if not numbers:
            raise UserError(f"labels {text!r}: {part} runs backwards")
        labels += numbers
    return labels


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="marjax", description="Autoregressive image generation with continuous "
                                     "tokens. See README.md.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, run: Any, text: str, takes_overrides: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False,
                                  epilog="--config.key=value sets a field of the config." if takes_overrides else None)
        sub.set_defaults(run=run, takes_overrides=takes_overrides)
        return sub

    train = command("train", _train, "Train, or resume, in a work directory.")
    train.add_argument("--config", required=True, metavar="FILE.py[:ARG]")
    train.add_argument("--workdir", required=True)

    tokenizer = command("train-tokenizer", _train_tokenizer, "Train the tokenizer of a config (for now: codebook).")
    tokenizer.add_argument("--config", required=True, metavar="FILE.py[:ARG]")
    tokenizer.add_argument("--out", default="", metavar="FILE.npz", help="config.tokenizer.path by default")
    tokenizer.add_argument("--overwrite", action="store_true", help="replace a file with other contents")

    sample = command("sample", _sample, "Sample from a trained work directory.", takes_overrides=False)
    sample.add_argument("--workdir", required=True)
    sample.add_argument("--out", required=True, metavar="DIR", help="where samples.npz and grid.png go")
    sample.add_argument("--labels", default="", help="classes such as 0-9 or 1,5,7; 'none' for unconditional; "
                        "all classes by default")
    sample.add_argument("--num_per_label", type=int, default=1)
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--weights", choices=("ema", "raw"), default="ema")
    sample.add_argument("--step", type=int, help="of the checkpoint; the newest by default")
    sample.add_argument("--tokenizer_path", help="where the tokenizer's weights are now, if they have moved")
    for name, kind in _SAMPLE_FIELDS.items():
        sample.add_argument(f"--{name}", type=kind, help="as config.sample by default")

    sweep = command("sweep", _sweep, "Train and measure the points of a sweep file, and tabulate them.",
                    takes_overrides=False)
    sweep.add_argument("file", metavar="FILE.py")
    sweep.add_argument("--root", required=True, metavar="DIR", help="where work directories, logs and the table go")
    sweep.add_argument("--jobs", type=int, default=1, help="points at a time")
    sweep.add_argument("--only", metavar="NAME,NAME", help="points to run; all by default")
    sweep.add_argument("--table", action="store_true", help="only write the table of what is there")

    # What `sweep` starts; left out of the help, because nobody needs to.
    point = commands.add_parser("sweep-point", allow_abbrev=False)
    point.set_defaults(run=_sweep_point, takes_overrides=False)
    point.add_argument("file")
    point.add_argument("--root", required=True)
    point.add_argument("--name", required=True)

    bench = command("benchmark", _benchmark, "Measure training or sampling; prints one JSON line.")
    bench.add_argument("what", choices=("train", "sample"))
    bench.add_argument("--config", required=True, metavar="FILE.py[:ARG]")
    bench.add_argument("--repeats", type=int, default=3, help="timed runs; 0 only compiles, without any weights")
    bench.add_argument("--recompute", type=int, default=0, help="sampling by a causal backbone: time so many steps "
                       "without the KV cache too")
    return parser


def _train(given: argparse.Namespace, overrides: dict[str, str]) -> None:
    config = config_lib.apply_overrides(config_lib.load(given.config), overrides)
    config = config_lib.resolve(config)  # a slip is told before JAX has started
    from marjax.training.loop import train

    train(config, given.workdir)


def _train_tokenizer(given: argparse.Namespace, overrides: dict[str, str]) -> None:
    config = config_lib.apply_overrides(config_lib.load(given.config), overrides)
    config = config_lib.resolve(config)  # a slip is told before JAX has started
    out = given.out or config.tokenizer.path
    if not out:
        raise UserError("no file to write the tokenizer to: give --out FILE.npz, or --config.tokenizer.path=FILE.npz")
    from marjax.training.tokenizer import train_codebook

    made = train_codebook(config, out, overwrite=given.overwrite)
    print(f"{made['path']}: {made['num_codes']} codes ({made['codes_used']} used), {made['num_images']} images, mse "
          f"{made['mse']:.5f}, PSNR {made['psnr']:.2f} dB, {made['seconds']:.1f} s")


def _sample(given: argparse.Namespace, overrides: dict[str, str]) -> None:
    del overrides
    import numpy as np

    from marjax.generation.images import grid, make_folder, write_npz, write_png
    from marjax.generation.sample import sample

    if given.num_per_label < 1:
        raise UserError(f"num_per_label is {given.num_per_label}: give at least 1")
    config = config_lib.read_workdir(given.workdir)
    classes = parse_labels(given.labels) if given.labels else list(range(config.data.num_classes))
    labels = np.repeat(np.array(classes), given.num_per_label)
    is_new = not os.path.exists(given.out)
    out = make_folder(given.out)  # before the work, which would be lost
    try:
        images = sample(given.workdir, labels, seed=given.seed, weights=given.weights, step=given.step,
                        tokenizer_path=given.tokenizer_path,
                        **{name: getattr(given, name) for name in _SAMPLE_FIELDS})
    except UserError:
        if is_new:
            out.rmdir()
        raise
    write_npz(out / "samples.npz", images=images, labels=labels)
    columns = given.num_per_label if len(classes) > 1 else max(1, round(len(images) ** 0.5))
    shown = min(columns, 20)  # of each class
    if len(classes) > 1:
        images = images.reshape(len(classes), given.num_per_label, *images.shape[1:])[:100, :shown]
        images = images.reshape(-1, *images.shape[2:])
    write_png(out / "grid.png", grid(images[:2000], shown))
    print(f"{len(labels)} images in {out / 'samples.npz'}, a picture in {out / 'grid.png'}")


def _sweep(given: argparse.Namespace, overrides: dict[str, str]) -> None:
    del overrides
    from marjax.sweep import select, sweep, table

    if given.table:
        if given.only or given.jobs != 1:
            raise UserError("--table runs nothing: leave out --only and --jobs")
        table(given.file, given.root)
        return
    rows = sweep(given.file, given.root, jobs=given.jobs, only=given.only)
    names = list(dict.fromkeys(row["point"] for row in rows))
    chosen = names if given.only is None else select(given.only, names)
    failed = [row["point"] for row in rows if row["status"] == "failed" and row["point"] in chosen]
    print(f"the table is in {os.path.join(given.root, 'table.md')} and .csv")
    if failed:
        raise TrainingError(f"{len(failed)} of {len(chosen)} points failed: {' '.join(failed)}; see the logs in "
                            f"{os.path.join(given.root, 'logs')}, then start the sweep again")


def _sweep_point(given: argparse.Namespace, overrides: dict[str, str]) -> None:
    del overrides
    from marjax.sweep.points import run_point

    run_point(given.file, given.root, given.name)


def _benchmark(given: argparse.Namespace, overrides: dict[str, str]) -> None:
    from marjax.benchmark import benchmark

    for name in ("repeats", "recompute"):
        if getattr(given, name) < 0:
            raise UserError(f"{name} is {getattr(given, name)}: give at least 0")
    config = config_lib.apply_overrides(config_lib.load(given.config), overrides)
    print(json.dumps(benchmark(given.what, config, given.repeats, given.recompute)))
