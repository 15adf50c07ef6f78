"""The `marjax` command. It only parses: each command is a function that a notebook can call."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from marjax import config as config_lib
from marjax.errors import TrainingError, UserError
from marjax.workdir import read_workdir

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
        print(f"marjax {given.command}: interrupted; the same command goes on from what is saved", file=sys.stderr)
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

    tokenizer = command("train-tokenizer", _train_tokenizer, "Train the tokenizer of a config, or resume.")
    tokenizer.add_argument("--config", required=True, metavar="FILE.py[:ARG]")
    tokenizer.add_argument("--out", default="", metavar="FILE", help="config.tokenizer.path by default")
    tokenizer.add_argument("--workdir", help="of a network's checkpoints, metrics and pictures; by default the file's "
                           "name without its suffix")
    tokenizer.add_argument("--overwrite", action="store_true", help="replace a file with other contents")

    checks = command("tokenizer", _tokenizer, "Check a tokenizer: images through it and back.")
    checks.add_argument("what", choices=("check",))
    checks.add_argument("--images", metavar="DIR", help="a folder of pictures; the data of --config by default")
    checks.add_argument("--config", metavar="FILE.py[:ARG]", help="whose tokenizer and data to take")
    checks.add_argument("--name", default="", help="of the tokenizer, such as kl16; of --config or by the file's "
                        "contents by default")
    checks.add_argument("--path", default="", metavar="FILE", help="of its weights; config.tokenizer.path by default")
    checks.add_argument("--image_size", type=int, help="pixels; of --config, or 256, by default")
    checks.add_argument("--num_images", type=int, default=256, help="at most")
    checks.add_argument("--seed", type=int, default=0)
    checks.add_argument("--out", required=True, metavar="DIR", help="where the picture goes")

    sample = command("sample", _sample, "Sample from a trained work directory.", takes_overrides=False)
    sample.add_argument("--workdir", required=True)
    sample.add_argument("--out", required=True, metavar="DIR", help="where samples.npz and grid.png go")
    sample.add_argument("--labels", default="", help="classes such as 0-9 or 1,5,7; 'none' for unconditional; "
                        "all classes by default")
    sample.add_argument("--num_per_label", type=int, default=1)
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--weights", choices=("ema", "raw"), help="ema by default, or what a converted one has")
    sample.add_argument("--step", type=int, help="of the checkpoint; the newest by default")
    sample.add_argument("--tokenizer_path", help="where the tokenizer's weights are now, if they have moved")
    for name, kind in _SAMPLE_FIELDS.items():
        sample.add_argument(f"--{name}", type=kind, help="as config.sample by default")

    convert = command("convert", _convert, "Make a work directory of a PyTorch or safetensors checkpoint of the "
                      "reference, or a tokenizer's file of an autoencoder's.")
    convert.add_argument("--checkpoint", metavar="FILE", help="of the model; leave it out to convert a tokenizer alone")
    convert.add_argument("--tokenizer", metavar="FILE", help="of its autoencoder, such as kl16.ckpt")
    convert.add_argument("--out", required=True, metavar="WORKDIR", help="or FILE.safetensors, of a tokenizer alone")
    convert.add_argument("--weights", choices=("ema", "raw"), help="of a checkpoint with both; ema by default")

    export = command("export", _export, "Write the weights of a work directory under the reference's PyTorch names.",
                     takes_overrides=False)
    export.add_argument("--workdir", required=True)
    export.add_argument("--out", required=True, metavar="FILE.safetensors")
    export.add_argument("--weights", choices=("ema", "raw"), help="ema by default, or what a converted one has")
    export.add_argument("--step", type=int, help="of the checkpoint; the newest by default")

    prepare = command("prepare", _prepare, "Turn a folder of pictures, or the ImageNet tars, into a data set.",
                      takes_overrides=False)
    prepare.add_argument("--images", metavar="DIR", help="class folders of pictures, or train/ and val/ with such")
    prepare.add_argument("--imagenet", nargs="+", metavar="TAR", help="ILSVRC2012_img_train.tar and "
                         "ILSVRC2012_img_val.tar, or a folder with them")
    prepare.add_argument("--out", required=True, metavar="DIR", help="where data sets lie: config.data.data_dir")
    prepare.add_argument("--name", help="of the data set; by default the folder's")
    prepare.add_argument("--num_shards", type=int, help="files of each split; by default, of 64 MiB or more")
    prepare.add_argument("--max_bad", type=int, default=0, help="unreadable pictures to leave out before giving up")
    prepare.add_argument("--val_share", type=float, default=0.0, help="of each class, set aside as split validation")
    prepare.add_argument("--workers", type=int, help="processes; by default as many as there are cores")
    prepare.add_argument("--overwrite", action="store_true", help="start afresh, and replace what was prepared there")

    cache = command("cache-latents", _cache_latents, "Encode the images of a config once, for training to read.")
    cache.add_argument("--config", required=True, metavar="FILE.py[:ARG]")
    cache.add_argument("--out", required=True, metavar="DIR", help="what config.data.cache names in training")
    cache.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the moments")
    cache.add_argument("--batch_size", type=int, default=32, help="images a device encodes at a time")
    cache.add_argument("--shard_examples", type=int, help="images a file; by default, for at most 64 MiB and at least "
                       "64 files")
    cache.add_argument("--overwrite", action="store_true", help="start afresh, and replace what is there")
    cache.add_argument("--measure", action="store_true", help="time the network alone too")

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
        raise UserError("no file to write the tokenizer to: give --out FILE, or --config.tokenizer.path=FILE")
    if config.tokenizer.name == "codebook":
        if given.workdir:
            raise UserError("--workdir is for networks: a codebook is found in one go")
        from marjax.training.train_codebook import train_codebook

        made = train_codebook(config, out, overwrite=given.overwrite)
    else:
        from marjax.training.train_autoencoder import train_autoencoder

        made = train_autoencoder(config, out, workdir=given.workdir, overwrite=given.overwrite)
    codes = f"{made['num_codes']} codes ({made['codes_used']} used), " if "num_codes" in made else ""
    scale = f", latents' std {made['std']:.4f}, scale {made['scale']:.5g}" if "scale" in made else ""
    print(f"{made['path']}: {codes}{made['num_images']} images, mse {made['mse']:.5f}, PSNR {made['psnr']:.2f} dB"
          f"{scale}, {made['seconds']:.1f} s")


def _tokenizer(given: argparse.Namespace, overrides: dict[str, str]) -> None:
    config = config_lib.load(given.config) if given.config else None
    if overrides:
        if config is None:
            raise UserError("--config.key=value sets a field of a config: give --config FILE.py too")
        config = config_lib.apply_overrides(config, overrides)
    from marjax.evaluation.reconstruction import check

    report = check(given.images, config, name=given.name, path=given.path, image_size=given.image_size,
                   num_images=given.num_images, seed=given.seed, out=given.out)
    size = report["image_size"]
    print(f"{report['num_images']} images of {size} x {size}: mse {report['mse']:.5f}, PSNR {report['psnr']:.2f} dB")
    if "codes_used" in report:
        print(f"{report['codes_used']} codes used")
    print(f"latents before scaling: mean {report['mean']:.4f}, std {report['std']:.4f}; the scale 1/std would be "
          f"{report['scale']:.5g}")
    for channel, (mean, std) in enumerate(zip(report["channel_means"], report["channel_stds"], strict=True)):
        print(f"  channel {channel}: mean {mean:.4f}, std {std:.4f}")
    print(f"originals beside reconstructions in {report['picture']}")


def _sample(given: argparse.Namespace, overrides: dict[str, str]) -> None:
    del overrides
    import numpy as np

    from marjax.generation.images import grid, make_folder, write_npz, write_png
    from marjax.generation.sample import sample

    if given.num_per_label < 1:
        raise UserError(f"num_per_label is {given.num_per_label}: give at least 1")
    config = read_workdir(given.workdir)
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


def _convert(given: argparse.Namespace, overrides: dict[str, str]) -> None:
    if given.checkpoint is None:
        if given.tokenizer is None or given.weights or overrides:
            raise UserError("give --checkpoint FILE; a tokenizer alone takes only --tokenizer FILE and --out "
                            "FILE.safetensors")
        from marjax.checkpoints.convert_tokenizer import convert_tokenizer

        made, is_new = convert_tokenizer(given.tokenizer, given.out)
        scale = "an unknown scale (config.tokenizer.autoencoder.scale)" if made.scale is None else f"scale {made.scale}"
        print(f"{given.out}{'' if is_new else ' is there already'}: tokenizer {made.name}, stride {made.spec.stride}, "
              f"{made.spec.embed_dim} channels, {scale}")
        return
    from marjax.checkpoints.convert import convert

    done = convert(given.checkpoint, given.out, weights=given.weights, tokenizer=given.tokenizer, overrides=overrides)
    model, sample = done.config.model, done.config.sample
    print(f"{given.out}{'' if done.is_new else ' is there already'}: {done.weights} weights, "
          f"{done.num_params / 1e6:.2f} M parameters, {model.width} wide, {model.encoder_depth} + "
          f"{model.decoder_depth} blocks, {model.num_heads} heads; num_iter {sample.num_iter}, cfg {sample.cfg}, "
          f"temperature {sample.temperature}")
    needs = done.config.tokenizer.name != "pixels" and not given.tokenizer
    print(f"sample it with: marjax sample --workdir {given.out} --out DIR"
          + (" --tokenizer_path FILE.safetensors (which marjax convert --tokenizer makes)" if needs else ""))


def _export(given: argparse.Namespace, overrides: dict[str, str]) -> None:
    del overrides
    from marjax.checkpoints.export import export

    made = export(given.workdir, given.out, weights=given.weights, step=given.step)
    print(f"{given.out}: {made['weights']} weights of step {made['step']}")


def _prepare(given: argparse.Namespace, overrides: dict[str, str]) -> None:
    del overrides
    from marjax.data.prepare import prepare

    if (given.images is None) == (given.imagenet is None):
        raise UserError("nothing to prepare: give either --images DIR or --imagenet TAR")
    print(prepare(given.images, given.imagenet, out=given.out, name=given.name, num_shards=given.num_shards,
                  max_bad=given.max_bad, val_share=given.val_share, workers=given.workers,
                  overwrite=given.overwrite).summary())


def _cache_latents(given: argparse.Namespace, overrides: dict[str, str]) -> None:
    config = config_lib.apply_overrides(config_lib.load(given.config), overrides)
    config = config_lib.resolve(config)  # a slip is told before JAX has started
    from marjax.data.cache import cache_latents

    made = cache_latents(config, given.out, dtype=given.dtype, batch_size=given.batch_size,
                         shard_examples=given.shard_examples, overwrite=given.overwrite, measure=given.measure)
    manifest = made.manifest
    print(f"{given.out}: {manifest.num_examples:,} images{' and their mirror images' if manifest.flips else ''}, "
          f"moments {manifest.dtype} {manifest.shape}, {made.num_bytes / 2**20:,.1f} MiB in {manifest.num_shards} files"
          + ("" if made.encoded else "; all were there, nothing done"))
    if made.seconds:
        print(f"{made.images_per_second:,.4g} images/s; at most {made.wait:.1%} of the time waiting for images (more "
              f"config.data.workers lower it)")
    if given.measure and made.seconds:
        print(f"the network alone: {made.alone:,.4g} images/s; the ratio is {made.images_per_second / made.alone:.2f}")
    print(f"train on it with: --config.data.cache={given.out}")


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
