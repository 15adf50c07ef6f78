"""What each command does with its arguments: calls the function that does the work, and says what came of it.

Every one takes what was parsed and the config fields that were set; the work's own modules are imported when they are
needed, so that a slip is told at once.
"""

import argparse
import functools
import json
import os
import shlex
import sys

from marjax import config as config_lib
from marjax.errors import TrainingError, UserError
from marjax.paths import normalised
from marjax.ranges import MAX_INT, check_arguments, shown
from marjax.storage import is_remote
from marjax.workdir import read_workdir

# Fields of config.sample that `marjax sample` takes.
SAMPLE_FIELDS = {"num_iter": int, "num_sampling_steps": str, "cfg": float, "cfg_schedule": str, "temperature": float,
                  "confidence_order": str, "choice_temperature": float, "batch_size": int}


# Those that `marjax evaluate` takes lists of: all that alter an image.
EVALUATE_FIELDS = tuple(name for name in SAMPLE_FIELDS if name != "batch_size")


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
        if not _is_class(first) or (dash and not _is_class(last)):
            raise UserError(f"labels {shown(text)}: give classes such as 0-9 or 1,5,7, or 'none'")
        numbers = range(int(first), int(last if dash else first) + 1)
        if not numbers:
            raise UserError(f"labels {text!r}: {part} runs backwards")
        labels += numbers
    return labels


def _is_class(text: str) -> bool:
    return text.isdecimal() and len(text) <= 7  # no more than can be listed


def join(given: argparse.Namespace, stops_at_steps: bool = False) -> None:
    """Connects this process to the others of its run, if there are any, and says who they are.

    What only differs in where files are on a host need not be the same; `marjax train` looks at its config itself.
    """
    import jax

    from marjax import distributed

    distributed.start(stops_at_steps=stops_at_steps)
    if jax.distributed.is_initialized() and jax.process_count() > 1 and given.command != "train":
        from marjax import sharding

        line = distributed.check(sharding.make_mesh(), {"command": given.command})
        if jax.process_index() == 0:
            print(line, file=sys.stderr)


def parse_range(text: str) -> tuple[int, int]:
    """(10, 15) from "10:15". Raises UserError: anything else."""
    first, _, last = text.partition(":")
    few = len(text) <= 30  # digits: Python does not read numbers of thousands
    if not (few and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last) <= MAX_INT):
        raise UserError(f"--profile {shown(text)}: give the first and the last step, such as 10:15")
    return int(first), int(last)


def train(given: argparse.Namespace, overrides: dict[str, str]) -> None:
    config = config_lib.apply_overrides(config_lib.load(given.config), overrides)
    config = config_lib.resolve(config)  # a slip is told before JAX has started
    profile = None if given.profile is None else parse_range(given.profile)
    join(given, stops_at_steps=True)
    from marjax.training.loop import train

    train(config, given.workdir, profile=profile)


def train_tokenizer(given: argparse.Namespace, overrides: dict[str, str]) -> None:
    config = config_lib.apply_overrides(config_lib.load(given.config), overrides)
    config = config_lib.resolve(config)  # a slip is told before JAX has started
    out = given.out or config.tokenizer.path
    if not out:
        raise UserError("no file to write the tokenizer to: give --out FILE, or --config.tokenizer.path=FILE")
    join(given, stops_at_steps=config.tokenizer.name != "codebook")
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


def tokenizer(given: argparse.Namespace, overrides: dict[str, str]) -> None:
    config = config_lib.load(given.config) if given.config is not None else None
    if overrides:
        if config is None:
            raise UserError("--config.key=value sets a field of a config: give --config FILE.py too")
        config = config_lib.apply_overrides(config, overrides)
    from marjax.evaluation.reconstruction import check

    report = check(given.images, config, name=given.name, path=given.path or "", image_size=given.image_size,
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


def sample(given: argparse.Namespace, overrides: dict[str, str]) -> None:
    del overrides
    import jax
    import numpy as np
    from etils import epath

    from marjax import distributed
    from marjax.generation.images import grid, make_folder, write_npz, write_png
    from marjax.generation.sample import sample

    check_arguments(num_per_label=given.num_per_label, seed=given.seed, step=given.step)
    config = read_workdir(given.workdir)
    classes = parse_labels(given.labels) if given.labels else list(range(config.data.num_classes))
    labels = np.repeat(np.array(classes), given.num_per_label)
    join(given)
    is_new = not is_remote(given.out) and not os.path.exists(given.out)  # an empty folder would be left behind
    out = epath.Path(normalised(given.out, "out"))
    distributed.on_first(lambda: make_folder(out))  # before the work, which would be lost
    try:
        images = sample(given.workdir, labels, seed=given.seed, weights=given.weights, step=given.step,
                        tokenizer_path=given.tokenizer_path,
                        **{name: getattr(given, name) for name in SAMPLE_FIELDS})
    except (UserError, KeyboardInterrupt):
        if is_new and jax.process_index() == 0:
            out.rmdir()
        raise
    if jax.process_index():
        return
    write_npz(out / "samples.npz", images=images, labels=labels)
    columns = given.num_per_label if len(classes) > 1 else max(1, round(len(images) ** 0.5))
    shown = min(columns, 20)  # of each class
    if len(classes) > 1:
        images = images.reshape(len(classes), given.num_per_label, *images.shape[1:])[:100, :shown]
        images = images.reshape(-1, *images.shape[2:])
    write_png(out / "grid.png", grid(images[:2000], shown))
    print(f"{len(labels)} images in {out / 'samples.npz'}, a picture in {out / 'grid.png'}")


def convert(given: argparse.Namespace, overrides: dict[str, str]) -> None:
    if given.inception is not None:
        if given.checkpoint or given.tokenizer or given.weights or overrides:
            raise UserError("--inception is converted alone: leave out --checkpoint, --tokenizer and the rest")
        from marjax.evaluation.inception_file import convert_inception

        path, is_new = convert_inception(given.inception, given.out)
        print(f"{path}{'' if is_new else ' is there already'}: FID's Inception network")
        return
    if given.out is None:
        raise UserError("no --out: give a WORKDIR, or FILE.safetensors for a tokenizer alone")
    if given.checkpoint is None:
        if given.tokenizer is None or overrides:
            raise UserError("give --checkpoint FILE; a tokenizer alone takes only --tokenizer FILE, --weights and "
                            "--out FILE.safetensors")
        from marjax.interop.convert_tokenizer import convert_tokenizer

        made, is_new = convert_tokenizer(given.tokenizer, given.out, weights=given.weights)
        scale = "an unknown scale (config.tokenizer.autoencoder.scale)" if made.scale is None else f"scale {made.scale}"
        print(f"{given.out}{'' if is_new else ' is there already'}: tokenizer {made.name}, stride {made.spec.stride}, "
              f"{made.spec.embed_dim} channels, {scale}")
        return
    from marjax.interop.convert import convert

    done = convert(given.checkpoint, given.out, weights=given.weights, tokenizer=given.tokenizer, overrides=overrides)
    model, sample = done.config.model, done.config.sample
    print(f"{given.out}{'' if done.is_new else ' is there already'}: {done.weights} weights, "
          f"{done.num_params / 1e6:.2f} M parameters, {model.width} wide, {model.encoder_depth} + "
          f"{model.decoder_depth} blocks, {model.num_heads} heads; num_iter {sample.num_iter}, cfg {sample.cfg}, "
          f"temperature {sample.temperature}")
    needs = done.config.tokenizer.name != "pixels" and not given.tokenizer
    print(f"sample it with: marjax sample --workdir {shlex.quote(given.out)} --out DIR"
          + (" --tokenizer_path FILE.safetensors (which marjax convert --tokenizer makes)" if needs else ""))


def export(given: argparse.Namespace, overrides: dict[str, str]) -> None:
    del overrides
    from marjax.interop.export import export

    is_new = not os.path.exists(given.out)
    made = export(given.workdir, given.out, weights=given.weights, step=given.step)
    print(f"{given.out}{'' if is_new else ' is there already'}: {made['weights']} weights of step {made['step']}")


def prepare(given: argparse.Namespace, overrides: dict[str, str]) -> None:
    del overrides
    from marjax.data.prepare import prepare

    if (given.images is None) == (given.imagenet is None):
        raise UserError("nothing to prepare: give either --images DIR or --imagenet TAR")
    print(prepare(given.images, given.imagenet, out=given.out, name=given.name, num_shards=given.num_shards,
                  max_bad=given.max_bad, val_share=given.val_share, workers=given.workers,
                  overwrite=given.overwrite, bits=given.bits).summary())


def cache_latents(given: argparse.Namespace, overrides: dict[str, str]) -> None:
    config = config_lib.apply_overrides(config_lib.load(given.config), overrides)
    config = config_lib.resolve(config)  # a slip is told before JAX has started
    join(given)
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
    print(f"train on it with: --config.data.cache={shlex.quote(given.out)}")


def train_classifier(given: argparse.Namespace, overrides: dict[str, str]) -> None:
    config = config_lib.apply_overrides(config_lib.load(given.config), overrides)
    config = config_lib.resolve(config)  # a slip is told before JAX has started
    out = given.out or config.eval.extractor_path
    if not out:
        raise UserError("no file to write the classifier to: give --out FILE.npz, or --config.eval.extractor_path=FILE")
    from marjax.evaluation.classifier import classifier_of

    made = classifier_of(config.data, out, seed=given.seed, steps=given.steps, held_out=given.held_out,
                         overwrite=given.overwrite)
    print(f"{out}: {made['accuracy']:.1%} right on {made['num_tested']} images that it was not trained on, of "
          f"{made['num_trained']} it was")


def stats(given: argparse.Namespace, overrides: dict[str, str]) -> None:
    if overrides and given.dataset is None:
        raise UserError("--config.key=value sets a field of a config: give --dataset FILE.py too")
    config = None
    if given.dataset is not None:
        config = config_lib.resolve(config_lib.apply_overrides(config_lib.load(given.dataset), overrides))
    out = given.out or (config.eval.reference if config is not None else "")
    if not out:
        raise UserError("no file to write the statistics to: give --out FILE.npz, or --config.eval.reference=FILE")
    join(given)
    from marjax.evaluation.stats import make_statistics

    made = make_statistics(out, config=config, images=given.images, npz=given.npz, extractor=given.extractor,
                           extractor_path=given.extractor_path, image_size=given.image_size,
                           keep_features=given.keep_features, batch_size=given.batch_size, overwrite=given.overwrite)
    assert made.gaussian is not None and made.extractor is not None
    kept = 0 if made.features is None else len(made.features)
    print(f"{out}: {made.gaussian.count} images of {made.source}, {len(made.gaussian.mean)} features of "
          f"{made.extractor['name']}, those of {kept} images kept; sha256 {made.checksum[:12]}")


def evaluate(given: argparse.Namespace, overrides: dict[str, str]) -> None:
    del overrides
    from marjax.evaluation.evaluate import Request, evaluate, table
    from marjax.evaluation.record import RECORD

    join(given)
    settings = {name: getattr(given, name).split(",") for name in EVALUATE_FIELDS if getattr(given, name) is not None}
    entries = evaluate(given.workdir, Request(
        num_images=given.num_images, seed=given.seed, weights=given.weights.split(",") if given.weights else (None,),
        step=given.step, settings=settings, batch_size=given.batch_size, extractor=given.extractor,
        extractor_path=given.extractor_path, reference=given.reference, tokenizer_path=given.tokenizer_path,
        save=given.save, out=given.out, overwrite=given.overwrite))
    print(table(entries))
    reference, extractor = entries[0]["reference"], entries[0]["extractor"]
    print(f"against {reference['name']} (sha256 {reference['checksum'][:12]}) by {extractor['name']}; all there is to "
          f"know is in {os.path.join(given.out or given.workdir, RECORD)}")


def plot(given: argparse.Namespace, overrides: dict[str, str]) -> None:
    del overrides
    from marjax.plots import plot

    for path in plot(given.workdir, given.out, given.format):
        print(path)


def sweep(given: argparse.Namespace, overrides: dict[str, str]) -> None:
    del overrides
    from marjax.sweep import select, status, sweep, table

    if given.table or given.status:
        if given.only or given.jobs is not None or given.engine != "local" or given.engine_args:
            raise UserError(f"{'--table' if given.table else '--status'} runs nothing: leave out --only, --jobs and "
                            f"--engine")
        if given.table:
            table(given.file, given.root)
        if given.status:
            print("\n".join(status(given.file, given.root)))
        return
    rows = sweep(given.file, given.root, jobs=given.jobs, only=given.only, engine=given.engine,
                 engine_args=given.engine_args)
    names = list(dict.fromkeys(row["point"] for row in rows))
    chosen = names if given.only is None else select(given.only, names)
    failed = [row["point"] for row in rows if row["status"] == "failed" and row["point"] in chosen]
    print(f"the table is in {os.path.join(given.root, 'table.md')} and .csv")
    if failed:
        raise TrainingError(f"{len(failed)} of {len(chosen)} points failed: {' '.join(failed)}; see the logs in "
                            f"{os.path.join(given.root, 'logs')}, then start the sweep again")


def sweep_point(given: argparse.Namespace, overrides: dict[str, str]) -> None:
    del overrides
    from marjax.sweep.points import PREPARE, end_with_parent, run_point

    if given.parent is not None:
        end_with_parent(given.parent)
    from marjax import distributed

    # SIGTERM has to end `prepare` as usual. Several points on one machine would take each other for one run: --alone.
    distributed.start(stops_at_steps=given.name != PREPARE, alone=given.alone)
    run_point(given.file, given.root, given.name)


def compile_for_slice(given: argparse.Namespace, overrides: dict[str, str]) -> None:
    config = config_lib.apply_overrides(config_lib.load(given.config), overrides)
    config_lib.resolve(config)  # a slip is told before JAX has started
    if given.search and (given.programs or given.hlo):
        raise UserError("--search compiles train steps only and keeps none: leave out --programs and --hlo")
    from marjax.compile.topology import prepare_environment

    prepare_environment()
    from marjax.compile.programs import NAMES
    from marjax.compile.run import compile_for, search_batch

    names = tuple(given.programs.split(",")) if given.programs else NAMES
    if unknown := [name for name in names if name not in NAMES]:
        raise UserError(f"--programs has {unknown[0]!r}: give some of {','.join(NAMES)}")
    say = (lambda text: None) if given.json else functools.partial(print, flush=True)
    made: object
    if given.search:
        made = records = [each.to_json() for each in search_batch(config, given.topology, cached=given.cached, say=say)]
    else:
        made = compile_for(config, given.topology, names=names, cached=given.cached, hlo_dir=given.hlo or "", say=say)
        records = made["programs"]
    if given.json:
        print(json.dumps(made))
    if failed := [each for each in records if "error" in each]:
        raise UserError(f"{len(failed)} of {len(records)} did not compile; the first: {failed[0]['error']}")


def benchmark(given: argparse.Namespace, overrides: dict[str, str]) -> None:
    from marjax.benchmark import benchmark

    check_arguments(repeats=given.repeats, recompute=given.recompute)
    if given.what == "metrics":
        from marjax.evaluation.rates import metric_seconds

        print(json.dumps(metric_seconds()))
        return
    if given.config is None:
        raise UserError(f"benchmark {given.what} needs --config FILE.py")
    config = config_lib.apply_overrides(config_lib.load(given.config), overrides)
    if given.what == "features":
        from marjax.evaluation.rates import feature_rate

        config = config_lib.check_fields(config)
        print(json.dumps(feature_rate(config.data.image_size, max(1, given.repeats))))
        return
    if given.what == "host":
        from marjax.training.overhead import host_work

        print(json.dumps(host_work(config)))
        return
    print(json.dumps(benchmark(given.what, config, given.repeats, given.recompute)))
