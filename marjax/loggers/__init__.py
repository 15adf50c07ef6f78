"""Loggers of a run besides its work directory: Weights & Biases, MLflow, or your own."""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any

from marjax import progress
from marjax.errors import UserError, missing_extra
from marjax.loggers.guarded import Guarded, reason
from marjax.loggers.protocol import Logger

__all__ = ["Guarded", "Logger", "check_loggers", "open_loggers"]

LOGGERS = ("wandb", "mlflow")  # each the name of a field of config.log, of its package and of its extra


def check_loggers(targets: Mapping[str, str], given: Sequence[Any] = ()) -> None:
    """Checks what `open_loggers` needs.

    Raises:
      UserError: a package of `config.log` is not installed, or an object lacks methods of `Logger`.
    """
    for name in LOGGERS:
        if targets[name] and importlib.util.find_spec(name) is None:
            raise missing_extra(f"config.log.{name}", name)
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise UserError(f"loggers is a {type(given).__name__}; give a list of loggers")
    for logger in given:
        if isinstance(logger, type):
            raise UserError(f"loggers has the class {logger.__name__}; give an instance of it")
        methods = ("hparams", "text", "scalars", "image", "close")
        if missing := [method for method in methods if not callable(getattr(logger, method, None))]:
            raise UserError(
                f"loggers has a {type(logger).__name__} without {', '.join(missing)}; subclass marjax.loggers.Logger"
            )


def open_loggers(
    targets: Mapping[str, str], workdir: str | os.PathLike[str], given: Sequence[Logger] = ()
) -> list[Guarded]:
    """Opens and guards the loggers of `config.log` and `given`; reports and omits one that cannot start."""
    opened = [Guarded(logger) for logger in given]
    for name in LOGGERS:
        if not targets[name]:
            continue
        try:
            if name == "wandb":
                from marjax.loggers.wandb import Wandb

                logger: Logger = Wandb(targets["wandb"], workdir)
            else:
                from marjax.loggers.mlflow import MLflow

                logger = MLflow(targets["mlflow"], workdir)
        except UserError:
            raise
        except Exception as error:
            progress.note(f"{name} cannot be started ({reason(error)}); the run continues without it")
        else:
            opened.append(Guarded(logger, name))
    return opened
