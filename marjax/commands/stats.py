"""`marjax stats`."""

import argparse
import os
import shlex

from marjax import progress
from marjax.commands.arguments import add_config, join, load_config
from marjax.commands.next_step import num_images, print_next, train_command, workdir_of
from marjax.errors import UserError

HELP = "Make the statistics of real images that samples are measured against."
EXAMPLE = "marjax stats --dataset mnist"
TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, "--dataset", "--config", required=False, what="the config whose data to take")
    parser.add_argument("--images", metavar="DIR", help="instead, a folder of pictures")
    parser.add_argument("--npz", metavar="FILE", help="instead, images in a file, as arr_0")
    parser.add_argument("--out", metavar="FILE.npz", help="config.eval.statistics by default")
    parser.add_argument("--extractor", choices=("inception", "classifier"), help="of the config, or inception")
    parser.add_argument("--extractor_path", metavar="FILE", help="of its weights")
    parser.add_argument("--image_size", type=int, help="that pictures of a folder are cropped to")
    parser.add_argument("--keep_features", type=int, default=10_000, help="of how many images, at most")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--overwrite", action="store_true", help="replace the file")


def run(given: argparse.Namespace, overrides: dict[str, str]) -> None:
    if overrides and given.dataset is None:
        raise UserError("--config.key=value sets a field of a config: give --dataset NAME too")
    config = None
    if given.dataset is not None:
        config = load_config(given.dataset, overrides)
    out = given.out or (config.eval.statistics if config is not None else "")
    if not out:
        raise UserError("no file to write the statistics to: give --out FILE.npz, or --config.eval.statistics=FILE")
    join(given)
    from marjax.evaluation.statistics import make_statistics

    made = make_statistics(
        out,
        config=config,
        images=given.images,
        npz=given.npz,
        extractor=given.extractor,
        extractor_path=given.extractor_path,
        image_size=given.image_size,
        keep_features=given.keep_features,
        batch_size=given.batch_size,
        overwrite=given.overwrite,
    )
    assert made.gaussian is not None and made.extractor is not None
    kept = 0 if made.features is None else len(made.features)
    print(
        f"{out}: {made.gaussian.count} images of {made.source}, {len(made.gaussian.mean)} features of "
        f"{made.extractor['name']}, those of {kept} images kept; sha256 {made.checksum[:12]}"
    )
    run = None if given.dataset is None else workdir_of(given.dataset)
    if config is not None and run is not None and os.path.isdir(os.path.join(run, "checkpoints")):
        path = given.extractor_path or (
            config.eval.extractor_path if made.extractor["name"] == config.eval.extractor else ""
        )
        print_next(
            "evaluate",
            "--workdir",
            run,
            *num_images(config),
            "--statistics",
            out,
            "--extractor",
            made.extractor["name"],
            *(["--extractor_path", path] if path else []),
        )
    elif config is not None and given.dataset is not None:
        print_next(
            *train_command(
                given.dataset, overrides | ({} if out == config.eval.statistics else {"eval.statistics": out})
            )
        )
    else:
        progress.note(f"measure a run against it: marjax evaluate --workdir WORKDIR --statistics {shlex.quote(out)}")
