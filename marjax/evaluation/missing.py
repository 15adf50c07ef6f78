"""The error for files that an evaluation lacks, with the commands that make them."""

import shlex
from collections.abc import Sequence

import ml_collections
from etils import epath

from marjax.errors import UserError

_NUM_DIGITS = 10


def check_there(
    config: ml_collections.ConfigDict,
    source: Sequence[str],
    *,
    extractor: str,
    extractor_path: str,
    statistics: str,
    default: str,
    flag: str = "--",
) -> None:
    """Checks that the files of an evaluation exist.

    Args:
      config: resolved.
      source: the arguments after `--config` that name this config on the command line.
      extractor: "inception" or "classifier".
      extractor_path: the file of its weights.
      statistics: the file of dataset statistics.
      default: the stem of the names suggested for files without one.
      flag: the prefix of the flags that set these fields.

    Raises:
      UserError: files are missing; it lists them and the commands that make them.
    """
    wrong, makes, then = list[str](), list[str](), list[str]()
    classifier = extractor_path or f"{default}_classifier.npz"
    if extractor == "classifier" and not (extractor_path and epath.Path(extractor_path).exists()):
        wrong.append(f"{extractor_path} does not exist" if extractor_path else "no classifier (extractor_path) is set")
        makes.append(_command("train-classifier", "--config", *source, "--out", classifier))
        if not extractor_path:
            then.append(f"{flag}extractor_path={classifier}")
    if not (statistics and epath.Path(statistics).exists()):
        wrong.append(f"{statistics} does not exist" if statistics else "no dataset statistics (statistics) are set")
        out = statistics or f"{default}_statistics.npz"
        given = ["--extractor", extractor] if extractor != config.eval.extractor else []
        if extractor == "classifier" and classifier != config.eval.extractor_path:
            given += ["--extractor_path", classifier]
        makes.append(_command("stats", "--dataset", *source, "--out", out, *given))
        if not statistics:
            then.append(f"{flag}statistics={out}")
    if not wrong:
        return
    what = " and ".join(wrong)
    if config.data.source == "digits" and config.data.num_classes != _NUM_DIGITS:  # of a converted checkpoint
        raise UserError(
            f"{what}; make the statistics of your data with marjax stats (docs/evaluation.md) and give --statistics"
        )
    more = f", then add {shlex.join(then)}" if then else ""
    imagenet = "; for those of ImageNet see docs/evaluation.md" if "imagenet" in config.data.source else ""
    raise UserError(f"{what}; run {' && '.join(makes)}{more}{imagenet}")


def _command(*arguments: str) -> str:
    return shlex.join(["marjax", *arguments])
