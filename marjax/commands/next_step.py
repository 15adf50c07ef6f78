"""The last line of a command: the next one to type, complete and quoted."""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping

from ml_collections import ConfigDict

from marjax import progress

_FEW_CLASSES = 20  # of which `marjax sample` makes a row each; of more, ten


def print_next(*command: str) -> None:
    """Prints a command on standard error, where it does not get between results."""
    program = ["marjax"] if shutil.which("marjax") else [sys.executable, "-m", "marjax"]
    progress.note(f"next: {shlex.join([*program, *command])}")


def config_arguments(path: str, overrides: Mapping[str, str]) -> list[str]:
    """The arguments of `--config` and single fields as they were given."""
    return [path, *(f"--config.{key}={value}" for key, value in overrides.items())]


def workdir_of(path: str) -> str:
    """The work directory of a `--config`: of the config.json of one, that one."""
    folder, name = os.path.split(path)
    if name == "config.json":
        return folder or "."
    return f"runs/{os.path.basename(re.split(r'[.]py(?![a-z])|:', path)[0]) or 'run'}"


def num_images(config: ConfigDict) -> list[str]:
    """How many images to evaluate: 50 of each class, at most the 50,000 of the papers."""
    return ["--num_images", str(min(50_000, 50 * config.data.num_classes))]


def train_command(path: str, overrides: Mapping[str, str]) -> list[str]:
    """Training with a config, in a work directory that is not there yet."""
    first, number = workdir_of(path), 2
    workdir = first
    while os.path.exists(workdir):
        workdir, number = f"{first}_{number}", number + 1
    return ["train", "--config", *config_arguments(path, overrides), "--workdir", workdir]


def sample_command(workdir: str, num_classes: int) -> list[str]:
    """Sampling from a work directory, some images of some classes."""
    few = num_classes <= _FEW_CLASSES
    return [
        "sample",
        "--workdir",
        workdir,
        *([] if few else ["--labels", "0-9"]),
        "--num_per_label",
        "8",
        "--out",
        f"{workdir.rstrip('/')}/out",
    ]


def measure_command(workdir: str, config: ConfigDict) -> list[str]:
    """Evaluating a work directory if its config names all that takes, otherwise drawing its metrics."""
    given = config.eval
    if os.path.exists(given.statistics or "") and (given.extractor_path == "" or os.path.exists(given.extractor_path)):
        return ["evaluate", "--workdir", workdir, *num_images(config)]
    return plot_command(workdir)


def plot_command(workdir: str) -> list[str]:
    """Drawing what a work directory has."""
    return ["plot", "--workdir", workdir, "--out", f"{workdir.rstrip('/')}/plots"]
