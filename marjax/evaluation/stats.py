"""What `marjax stats` does, as a function: the statistics file of a set of real images."""

import os

import ml_collections
import numpy as np
from etils import epath

from marjax import config as config_lib
from marjax import distributed, numerics
from marjax.errors import UserError
from marjax.evaluation.across_processes import all_processes
from marjax.evaluation.image_sets import ConfigImages, FolderImages, ImageSet, NpzImages
from marjax.evaluation.networks.extractor import open_extractor
from marjax.evaluation.statistics import Reference, make_reference, read_reference, write_reference
from marjax.files import make_folder
from marjax.lock import locked_file
from marjax.paths import takes_paths
from marjax.ranges import check_arguments


@numerics.pinned()
@takes_paths("out", "images", "npz", "extractor_path")
def make_statistics(
    out: str | os.PathLike[str],
    *,
    config: ml_collections.ConfigDict | None = None,
    images: str | os.PathLike[str] | None = None,
    npz: str | os.PathLike[str] | None = None,
    extractor: str | None = None,
    extractor_path: str | None = None,
    image_size: int | None = None,
    keep_features: int = 10_000,
    batch_size: int = 64,
    overwrite: bool = False,
) -> Reference:
    """Sends images through an extractor and writes what `marjax evaluate` measures against.

    All processes of a run may call this; each reads its share, and the first writes.

    Args:
      out: the npz file. If it is there, it must have these very contents, which are computed again.
      config: its data set, cropped as in training, without flips; `config.eval` has the extractor by default.
      images: instead, a folder of pictures.
      npz: instead, a file with images uint8 (N, H, W, C) as `arr_0`, such as the samples of another program.
      extractor, extractor_path: see `open_extractor`; inception by default.
      image_size: that pictures of a folder are cropped to; by default they all have one size.
      keep_features: of how many images, at most, the features are kept, for precision, recall and KID.
      batch_size: images read at a time.
      overwrite: replace a file with other contents.

    Raises:
      UserError: not exactly one source, or anything that cannot be used.
    """
    if (images is None) + (npz is None) + (config is None) != 2:
        raise UserError("statistics are made of one source: give --dataset NAME, --images DIR or --npz FILE")
    if image_size is not None and images is None:
        raise UserError("image_size crops the pictures of a folder: leave it out, or give --images DIR")
    check_arguments(image_size=image_size, keep_features=keep_features, batch_size=batch_size)
    if config is not None:
        config = config_lib.check_fields(config)
    make_folder(os.path.dirname(os.fspath(out)) or ".")
    with distributed.first_holds(locked_file(out, "marjax stats")):
        there = read_reference(out) if epath.Path(out).exists() and not overwrite else None
        if config is not None:
            extractor = extractor or config.eval.extractor
            if extractor_path is None and extractor == config.eval.extractor:
                extractor_path = config.eval.extractor_path
        network = open_extractor(extractor or "inception", extractor_path or "")
        source: ImageSet
        if images is not None:
            source = FolderImages(images, image_size, getattr(network, "channels", 3))
        elif npz is not None:
            source = NpzImages(npz)
        else:
            assert config is not None
            config_lib.tokens_of(config)  # invalid sizes of the data are reported before anything is read
            source = ConfigImages(config.data)
        processes = all_processes()
        if there is not None:  # at once, where that is enough to tell
            network_of = {"name": network.name, "checksum": network.checksum}
            if (there.extractor, there.source, there.gaussian and there.gaussian.count) != (
                network_of,
                source.source,
                len(source),
            ):
                raise _other(out)
        try:
            made = make_reference(
                source.batches(batch_size, processes),
                len(source),
                network,
                source=source.source,
                keep_features=keep_features,
                processes=processes,
            )
        except ValueError as error:
            raise UserError(f"{source.source} cannot be measured by {network.name}: {error}") from None
        if there is not None:
            if not _same(there, made):
                raise _other(out)
            return there
        if processes.index == 0:
            write_reference(out, made)
        processes.barrier()
        return read_reference(out)


def _other(out: str | os.PathLike[str]) -> UserError:
    return UserError(
        f"{os.fspath(out)} is there already, with other contents: give another --out, or --overwrite to replace it"
    )


def _same(one: Reference, other: Reference) -> bool:
    """Whether two files would have the same contents."""

    def arrays(reference: Reference) -> list[np.ndarray | None]:
        gaussians = [each for each in (reference.gaussian, reference.spatial) if each is not None]
        return [array for each in gaussians for array in (each.mean, each.cov)] + [reference.features]

    pairs = zip(arrays(one), arrays(other), strict=False)
    return len(arrays(one)) == len(arrays(other)) and all(
        (a is None and b is None) or np.array_equal(a, b)  # type: ignore[arg-type]
        for a, b in pairs
    )
