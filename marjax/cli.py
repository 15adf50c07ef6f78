"""The `marjax` command. It only parses: each command is a function that a notebook can call."""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from marjax import commands, failures, storage
from marjax.errors import INTERRUPTED, PreemptedError, TrainingError, UserError, one_line
from marjax.interrupts import never_lost
from marjax.paths import normalised

# Arguments that are paths; those that may have an ARG after a colon (`--config`) are left to `config.load`.
PATHS = {"checkpoint", "extractor_path", "file", "hlo", "imagenet", "images", "inception", "npz", "out", "path",
         "reference", "root", "tokenizer", "tokenizer_path", "workdir"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command, and returns the exit code.

    0 on success, 2 after a user error, 1 for a run that cannot go on, 130 on Ctrl-C (training has saved, unless it was
    pressed twice); after 42 (preempted, and saved),
    134 (another process of the run was lost) and 200 (gs:// does not answer) the same command goes on.
    """
    parser = _parser()
    given, rest = parser.parse_known_args(argv)
    failure: BaseException | None = None
    failures.quiet_interpreter()
    try:
        overrides = parse_overrides(rest)
        if overrides and not given.takes_overrides:
            raise UserError(f"{given.command} takes no --config.key=value: the config is in the work directory")
        for name in PATHS & vars(given).keys():
            value = getattr(given, name)
            if value is not None:
                setattr(given, name, [normalised(each, f"--{name}") for each in value] if isinstance(value, list)
                        else normalised(value, f"--{name}"))
        for path in (*vars(given).values(), *overrides.values()):
            if isinstance(path, str) and path.startswith("gs://"):
                storage.check(path)
        with never_lost():
            given.run(given, overrides)
        code = 0
    except PreemptedError as error:
        print(f"marjax {given.command}: {error.cause}: {one_line(str(error))}", file=sys.stderr)
        code = error.code
    except (UserError, TrainingError) as error:
        print(f"marjax {given.command}: error: {one_line(str(error))}", file=sys.stderr)
        code, failure = error.code, error
    except KeyboardInterrupt as error:
        print(f"marjax {given.command}: interrupted; run the same command again", file=sys.stderr)
        code, failure = INTERRUPTED, error
    except BrokenPipeError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code, failure = 1, error
    except Exception as error:
        told = storage.explain(error) or failures.explain(error)
        if told is not None:
            print(f"marjax {given.command}: error: {one_line(str(told))}", file=sys.stderr)
        if told is None or failures.TRACEBACK in os.environ:
            traceback.print_exc()
        code = 1 if told is None else told.code
        failure = error
    if "marjax.distributed" in sys.modules:  # else the command has not touched a device
        from marjax import distributed

        return distributed.end(code, failure)
    return code


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="marjax", description="Autoregressive image generation with continuous "
                                     "tokens. See README.md.", allow_abbrev=False)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, run: Any, text: str, takes_overrides: bool = True) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(name, help=text, description=text, allow_abbrev=False,
                                  epilog="--config.key=value sets a field of the config." if takes_overrides else None)
        sub.set_defaults(run=run, takes_overrides=takes_overrides)
        return sub

    train = command("train", commands.train, "Train, or resume, in a work directory.")
    train.add_argument("--config", required=True, metavar="FILE.py[:ARG]")
    train.add_argument("--workdir", required=True)
    train.add_argument("--profile", metavar="FIRST:LAST", help="trace those steps, for TensorBoard or xprof, into "
                       "the work directory's profile/")

    tokenizer = command("train-tokenizer", commands.train_tokenizer, "Train the tokenizer of a config, or resume.")
    tokenizer.add_argument("--config", required=True, metavar="FILE.py[:ARG]")
    tokenizer.add_argument("--out", metavar="FILE", help="config.tokenizer.path by default")
    tokenizer.add_argument("--workdir", help="of a network's checkpoints, metrics and pictures; by default the file's "
                           "name without its suffix")
    tokenizer.add_argument("--overwrite", action="store_true", help="replace a file with other contents")

    checks = command("tokenizer", commands.tokenizer, "Check a tokenizer: images through it and back.")
    checks.add_argument("what", choices=("check",))
    checks.add_argument("--images", metavar="DIR", help="a folder of pictures; the data of --config by default")
    checks.add_argument("--config", metavar="FILE.py[:ARG]", help="whose tokenizer and data to take")
    checks.add_argument("--name", default="", help="of the tokenizer, such as kl16; of --config or by the file's "
                        "contents by default")
    checks.add_argument("--path", metavar="FILE", help="of its weights; config.tokenizer.path by default")
    checks.add_argument("--image_size", type=int, help="pixels; of --config, or 256, by default")
    checks.add_argument("--num_images", type=int, default=256, help="at most")
    checks.add_argument("--seed", type=int, default=0)
    checks.add_argument("--out", required=True, metavar="DIR", help="where the picture goes")

    sample = command("sample", commands.sample, "Sample from a trained work directory.", takes_overrides=False)
    sample.add_argument("--workdir", required=True)
    sample.add_argument("--out", required=True, metavar="DIR", help="where samples.npz and grid.png go")
    sample.add_argument("--labels", default="", help="classes such as 0-9 or 1,5,7; 'none' for unconditional; "
                        "all classes by default")
    sample.add_argument("--num_per_label", type=int, default=1)
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--weights", choices=("ema", "raw"), help="ema by default, or what a converted one has")
    sample.add_argument("--step", type=int, help="of the checkpoint; the newest by default")
    sample.add_argument("--tokenizer_path", help="where the tokenizer's weights are now, if they have moved")
    for name, kind in commands.SAMPLE_FIELDS.items():
        sample.add_argument(f"--{name}", type=kind, help="as config.sample by default")

    convert = command("convert", commands.convert, "Make a work directory of a PyTorch or safetensors checkpoint of "
                      "the reference, or a tokenizer's file of an autoencoder's.")
    convert.add_argument("--checkpoint", metavar="FILE", help="of the model, or the index or folder of its shards; "
                         "leave it out to convert a tokenizer alone")
    convert.add_argument("--inception", metavar="FILE", help="instead, the PyTorch weights of FID's Inception network")
    convert.add_argument("--tokenizer", metavar="FILE", help="of its autoencoder, such as kl16.ckpt, or of a latent "
                         "diffusion model that holds it")
    convert.add_argument("--out", metavar="WORKDIR", help="or FILE.safetensors, of a tokenizer or Inception network "
                         "alone; the latter has a default, where it is looked for")
    convert.add_argument("--weights", choices=("ema", "raw"), help="of a checkpoint with both, or of a tokenizer "
                         "alone; ema by default")

    export = command("export", commands.export, "Write the weights of a work directory under the reference's PyTorch "
                     "names.", takes_overrides=False)
    export.add_argument("--workdir", required=True)
    export.add_argument("--out", required=True, metavar="FILE.safetensors")
    export.add_argument("--weights", choices=("ema", "raw"), help="ema by default, or what a converted one has")
    export.add_argument("--step", type=int, help="of the checkpoint; the newest by default")

    prepare = command("prepare", commands.prepare, "Turn a folder of pictures, or the ImageNet tars, into a data set.",
                      takes_overrides=False)
    prepare.add_argument("--images", metavar="DIR", help="class folders of pictures, or train/ and val/ with such")
    prepare.add_argument("--imagenet", nargs="+", metavar="TAR", help="ILSVRC2012_img_train.tar and "
                         "ILSVRC2012_img_val.tar, or a folder with them")
    prepare.add_argument("--out", required=True, metavar="DIR", help="where data sets lie: config.data.data_dir")
    prepare.add_argument("--name", help="of the data set; by default the folder's")
    prepare.add_argument("--num_shards", type=int, help="files of each split; by default, of 64 MiB or more")
    prepare.add_argument("--max_bad", type=int, default=0, help="unreadable pictures to leave out before giving up")
    prepare.add_argument("--val_share", type=float, default=0.0, help="of each class, set aside as split validation")
    prepare.add_argument("--bits", type=int, help="used of 16 bits a channel; by default as many as each picture needs")
    prepare.add_argument("--workers", type=int, help="processes; by default as many as there are cores")
    prepare.add_argument("--overwrite", action="store_true", help="start afresh, and replace what was prepared there")

    cache = command("cache-latents", commands.cache_latents, "Encode the images of a config once, for training to "
                    "read.")
    cache.add_argument("--config", required=True, metavar="FILE.py[:ARG]")
    cache.add_argument("--out", required=True, metavar="DIR", help="what config.data.cache names in training")
    cache.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the moments")
    cache.add_argument("--batch_size", type=int, default=32, help="images a device encodes at a time")
    cache.add_argument("--shard_examples", type=int, help="images a file; by default, for at most 64 MiB and at least "
                       "64 files")
    cache.add_argument("--overwrite", action="store_true", help="start afresh, and replace what is there")
    cache.add_argument("--measure", action="store_true", help="time the network alone too")

    classifier = command("train-classifier", commands.train_classifier, "Train the small network that measures samples "
                         "of data which the Inception network does not know.")
    classifier.add_argument("--config", required=True, metavar="FILE.py[:ARG]", help="whose data to learn")
    classifier.add_argument("--out", metavar="FILE.npz", help="config.eval.extractor_path by default")
    classifier.add_argument("--steps", type=int, default=1000)
    classifier.add_argument("--held_out", type=float, default=0.2, help="share of the images that it is tested on")
    classifier.add_argument("--seed", type=int, default=0)
    classifier.add_argument("--overwrite", action="store_true", help="replace the file")

    stats = command("stats", commands.stats, "Make the statistics of real images that samples are measured against.")
    stats.add_argument("--dataset", "--config", metavar="FILE.py[:ARG]", help="the data of a config")
    stats.add_argument("--images", metavar="DIR", help="instead, a folder of pictures")
    stats.add_argument("--npz", metavar="FILE", help="instead, images in a file, as arr_0")
    stats.add_argument("--out", metavar="FILE.npz", help="config.eval.reference by default")
    stats.add_argument("--extractor", choices=("inception", "classifier"), help="of the config, or inception")
    stats.add_argument("--extractor_path", metavar="FILE", help="of its weights")
    stats.add_argument("--image_size", type=int, help="that pictures of a folder are cropped to")
    stats.add_argument("--keep_features", type=int, default=10_000, help="of how many images, at most")
    stats.add_argument("--batch_size", type=int, default=64)
    stats.add_argument("--overwrite", action="store_true", help="replace the file")

    evaluate = command("evaluate", commands.evaluate, "Sample from a work directory and measure: FID and more.",
                       takes_overrides=False)
    evaluate.add_argument("--workdir", required=True)
    evaluate.add_argument("--out", metavar="DIR", help="where evaluation.json goes; the work directory by default")
    evaluate.add_argument("--num_images", type=int, default=50_000, help="equally many of each class")
    evaluate.add_argument("--seed", type=int, default=0)
    evaluate.add_argument("--weights", metavar="ema,raw", help="one or both; the first there is by default")
    evaluate.add_argument("--step", type=int, help="of the checkpoint; the newest by default")
    evaluate.add_argument("--batch_size", type=int, help="images at a time on a host; config.sample.batch_size by "
                          "default")
    evaluate.add_argument("--extractor", choices=("inception", "classifier"), help="of the config by default")
    evaluate.add_argument("--extractor_path", metavar="FILE", help="of its weights")
    evaluate.add_argument("--reference", metavar="FILE.npz", help="statistics of real images; of the config by default")
    evaluate.add_argument("--tokenizer_path", help="where the tokenizer's weights are now, if they have moved")
    evaluate.add_argument("--save", choices=("npz", "png"), default="", help="keep the samples")
    evaluate.add_argument("--overwrite", action="store_true", help="measure again what has been measured")
    for name in commands.EVALUATE_FIELDS:
        evaluate.add_argument(f"--{name}", metavar="A,B", help="one or several, all combinations of which are measured")

    plots = command("plot", commands.plot, "Draw loss, evaluations and samples of work directories.",
                    takes_overrides=False)
    plots.add_argument("--workdir", required=True, nargs="+", help="one or several")
    plots.add_argument("--out", required=True, metavar="DIR", help="where the figures go")
    plots.add_argument("--format", nargs="+", default=["png", "svg"], choices=("png", "svg"), help="both by default")

    sweep = command("sweep", commands.sweep, "Train and measure the points of a sweep file, and tabulate them.",
                    takes_overrides=False)
    sweep.add_argument("file", metavar="FILE.py")
    sweep.add_argument("--root", required=True, metavar="DIR", help="where work directories, logs and the table go; "
                       "local or gs://")
    sweep.add_argument("--engine", choices=("local", "slurm", "xpk"), default="local", help="what runs a point: a "
                       "process of this machine, a task of a Slurm array, or a workload of a GKE cluster")
    sweep.add_argument("--engine_args", default="", metavar="ARGS", help="of sbatch or xpk workload create, such as "
                       "--engine_args=\"--partition=x --time=4:00:00\"")
    sweep.add_argument("--jobs", type=int, help="points at a time; by default 1 on this machine, no limit for Slurm")
    sweep.add_argument("--only", metavar="NAME,NAME", help="points to run; all by default")
    sweep.add_argument("--table", action="store_true", help="only write the table of what is there")
    sweep.add_argument("--status", action="store_true", help="only say how each point is")

    # What `sweep` starts; left out of the help, because nobody needs to.
    point = subparsers.add_parser("sweep-point", allow_abbrev=False)
    point.set_defaults(run=commands.sweep_point, takes_overrides=False)
    point.add_argument("file")
    point.add_argument("--root", required=True)
    point.add_argument("--name", required=True)
    point.add_argument("--alone", action="store_true")
    point.add_argument("--parent", type=int)

    ahead = command("compile", commands.compile_for_slice, "Compile a config's programs for a TPU slice that need not "
                    "be there: do they fit, what do they send, how long would they take.")
    ahead.add_argument("--topology", required=True, metavar="NAME", help="such as v5e:8x8, v4:2x2x4, v5e-64 or v4-32")
    ahead.add_argument("--config", required=True, metavar="FILE.py[:ARG]")
    ahead.add_argument("--programs", default="", metavar="A,B", help="of train, sample, encode, decode; all by default")
    ahead.add_argument("--cached", action="store_true", help="train on a latent cache, as with config.data.cache")
    ahead.add_argument("--search", action="store_true", help="instead, find the largest batch a device that fits, by "
                       "remat policy, without accumulation")
    ahead.add_argument("--json", action="store_true", help="print JSON instead of text")
    ahead.add_argument("--hlo", metavar="DIR", help="keep the compiled programs' HLO texts")

    bench = command("benchmark", commands.benchmark, "Measure training, sampling, the host's own work in a training "
                    "step, Inception's features of images of a config's size, or the metrics of 10,000 features; "
                    "prints one JSON line.")
    bench.add_argument("what", choices=("train", "sample", "host", "features", "metrics"))
    bench.add_argument("--config", metavar="FILE.py[:ARG]", help="for all but metrics")
    bench.add_argument("--repeats", type=int, default=3, help="timed runs; 0 only compiles, without any weights")
    bench.add_argument("--recompute", type=int, default=0, help="sampling by a causal backbone: time so many steps "
                       "without the KV cache too")
    return parser


