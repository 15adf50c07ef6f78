"""What an evaluation needs and does not find, with the commands that make it."""

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
    """Checks that the files to measure with are there, before they are opened.

    Args:
      config: resolved; its data are what the files are made of.
      source: the arguments that name this config in a command: what follows `--config`.
      extractor: "inception" or "classifier".
      extractor_path: of its weights.
      statistics: the file of the statistics.
      default: how files are called that have no name yet, without a suffix.
      flag: how the flags begin that name the files to the command that needs them.

    Raises:
      UserError: a file is missing; it names all that are, and the commands that make them.
    """
    wrong, makes, then = list[str](), list[str](), list[str]()
    classifier = extractor_path or f"{default}_classifier.npz"
    if extractor == "classifier" and not (extractor_path and epath.Path(extractor_path).exists()):
        wrong.append(f"{extractor_path} does not exist" if extractor_path else "no weights of the classifier")
        makes.append(_command("train-classifier", "--config", *source, "--out", classifier))
        if not extractor_path:
            then.append(f"{flag}extractor_path={classifier}")
    if not (statistics and epath.Path(statistics).exists()):
        wrong.append(f"{statistics} does not exist" if statistics else "no statistics to measure against")
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
            f"{what}: marjax stats makes the statistics of your data (docs/evaluation.md); give them by --statistics"
        )
    more = f", then add {shlex.join(then)}" if then else ""
    imagenet = "; docs/evaluation.md says where to get those of ImageNet" if "imagenet" in config.data.source else ""
    raise UserError(f"{what}: run {' && '.join(makes)}{more}{imagenet}")


def _command(*arguments: str) -> str:
    return shlex.join(["marjax", *arguments])
