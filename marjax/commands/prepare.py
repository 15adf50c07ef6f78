"""`marjax prepare`."""

import argparse

from marjax.errors import UserError

HELP = "Turn a folder of pictures, or the ImageNet tars, into a data set."
EXAMPLE = "marjax prepare --images pictures --out data"
TAKES_OVERRIDES = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", metavar="DIR", help="class folders of pictures, or train/ and val/ with such")
    parser.add_argument(
        "--imagenet",
        nargs="+",
        metavar="TAR",
        help="ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, or a folder with them",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="where data sets lie: config.data.data_dir")
    parser.add_argument("--name", help="of the data set; by default the folder's")
    parser.add_argument("--num_shards", type=int, help="files of each split; by default, of 64 MiB or more")
    parser.add_argument("--max_bad", type=int, default=0, help="unreadable pictures to leave out before giving up")
    parser.add_argument("--val_share", type=float, default=0.0, help="of each class, set aside as split validation")
    parser.add_argument("--bits", type=int, help="used of 16 bits a channel; by default as many as each picture needs")
    parser.add_argument("--workers", type=int, help="processes; by default as many as there are cores")
    parser.add_argument("--overwrite", action="store_true", help="start afresh, and replace what was prepared there")


def run(given: argparse.Namespace) -> None:
    from marjax.data.prepare.prepare import prepare

    if (given.images is None) == (given.imagenet is None):
        raise UserError("nothing to prepare: give either --images DIR or --imagenet TAR")
    print(
        prepare(
            given.images,
            given.imagenet,
            out=given.out,
            name=given.name,
            num_shards=given.num_shards,
            max_bad=given.max_bad,
            val_share=given.val_share,
            workers=given.workers,
            overwrite=given.overwrite,
            bits=given.bits,
        ).summary()
    )
