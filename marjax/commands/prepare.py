"""`marjax prepare`."""

import argparse

from marjax.errors import UserError

HELP = "Prepare a dataset from a folder of pictures, or from the ImageNet tars."
EXAMPLE = "marjax prepare --images pictures --out data"
TAKES_OVERRIDES = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", metavar="DIR", help="one folder of pictures per class, also below train/ and val/")
    parser.add_argument(
        "--imagenet",
        nargs="+",
        metavar="TAR",
        help="ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, or a folder with both",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of datasets; config.data.data_dir")
    parser.add_argument("--name", help="name of the dataset (default: the folder's)")
    parser.add_argument("--num_shards", type=int, help="files per split (default: files of 64 MiB or more)")
    parser.add_argument(
        "--max_bad", type=int, default=0, help="unreadable pictures to skip before failing (default: 0)"
    )
    parser.add_argument(
        "--val_share", type=float, default=0.0, help="share of each class for the split validation (default: 0)"
    )
    parser.add_argument("--bits", type=int, help="bits used of 16-bit channels (default: as each picture needs)")
    parser.add_argument("--workers", type=int, help="processes (default: the number of cores)")
    parser.add_argument("--overwrite", action="store_true", help="start again, and replace an existing dataset")


def run(args: argparse.Namespace) -> None:
    """Writes or resumes a dataset and prints its summary. Raises UserError, TrainingError: see `prepare.prepare`."""
    from marjax.data.prepare.prepare import prepare

    if (args.images is None) == (args.imagenet is None):
        raise UserError("nothing to prepare; give either --images DIR or --imagenet TAR")
    print(
        prepare(
            args.images,
            args.imagenet,
            out=args.out,
            name=args.name,
            num_shards=args.num_shards,
            max_bad=args.max_bad,
            val_share=args.val_share,
            workers=args.workers,
            overwrite=args.overwrite,
            bits=args.bits,
        ).summary()
    )
