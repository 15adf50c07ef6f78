"""The last line of a command: the next command to type, complete and quoted."""

import os
import re
import shlex
from collections.abc import Mapping

from ml_collections import ConfigDict

from marjax import progress

_FEW_CLASSES = 20  # `marjax sample` makes a row for each class; with more classes, the next command samples ten


def print_next(*command: str) -> None:
    """Prints a command on standard error, apart from results on standard output."""
    progress.note(f"next: {shlex.join(['marjax', *command])}")


def config_arguments(path: str, overrides: Mapping[str, str]) -> list[str]:
    """Returns the arguments of `--config` and of the overridden fields."""
    return [path, *(f"--config.{key}={value}" for key, value in overrides.items())]


def workdir_of(path: str) -> str:
    """Returns the work directory for a `--config`; for the config.json of a work directory, that directory."""
    folder, name = os.path.split(path)
    if name == "config.json":
        return folder or "."
    return f"runs/{os.path.basename(re.split(r'[.]py(?![a-z])|:', path)[0]) or 'run'}"


def num_images(config: ConfigDict) -> list[str]:
    """Returns the number of images to evaluate: 50 per class, at most the 50,000 of the papers."""
    return ["--num_images", str(min(50_000, 50 * config.data.num_classes))]


def train_command(path: str, overrides: Mapping[str, str]) -> list[str]:
    """Trains a config in a new work directory."""
    first, number = workdir_of(path), 2
    workdir = first
    while os.path.exists(workdir):
        workdir, number = f"{first}_{number}", number + 1
    return ["train", "--config", *config_arguments(path, overrides), "--workdir", workdir]


def sample_command(workdir: str, num_classes: int) -> list[str]:
    """Samples a few images of some classes from a work directory."""
    labels = [] if num_classes <= _FEW_CLASSES else ["--labels", "0-9"]
    return ["sample", "--workdir", workdir, *labels, "--num_per_label", "8", "--out", f"{workdir.rstrip('/')}/out"]


def measure_command(workdir: str, config: ConfigDict) -> list[str]:
    """Evaluates a work directory if the files of its config exist, otherwise plots its metrics."""
    given = config.eval
    if os.path.exists(given.statistics or "") and (given.extractor_path == "" or os.path.exists(given.extractor_path)):
        return ["evaluate", "--workdir", workdir, *num_images(config)]
    return plot_command(workdir)


def plot_command(workdir: str) -> list[str]:
    """Plots the metrics of a work directory."""
    return ["plot", "--workdir", workdir, "--out", f"{workdir.rstrip('/')}/plots"]
