"""Where a run reports beside its work directory: Weights & Biases, MLflow, or a logger of your own."""

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from marjax import progress
from marjax.errors import UserError, first_line, missing_extra, shortened
from marjax.loggers.guarded import Guarded
from marjax.loggers.protocol import Logger

__all__ = ["Guarded", "Logger", "check_loggers", "open_loggers"]

_EXTRAS = ("wandb", "mlflow")  # fields of config.log, the packages that they need, and their extras


def check_loggers(log: ConfigDict, given: Sequence[Any] = ()) -> None:
    """Checks what `open_loggers` needs, before anything is written.

    Raises:
      UserError: a package of `config.log` is not installed, or an object has not the methods of a `Logger`.
    """
    for name in _EXTRAS:
        if log[name] and importlib.util.find_spec(name) is None:
            raise missing_extra(f"config.log.{name}", name)
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise UserError(f"loggers is a {type(given).__name__}: give a list of loggers")
    for logger in given:
        missing = [
            method
            for method in ("hparams", "text", "scalars", "image", "close")
            if not callable(getattr(logger, method, None))
        ]
        if missing or isinstance(logger, type):
            raise UserError(
                f"loggers has {logger if isinstance(logger, type) else type(logger)}, "
                + (
                    "a class: give an object"
                    if isinstance(logger, type)
                    else f"which has no {', '.join(missing)}: make it a subclass of marjax.loggers.Logger"
                )
            )


def open_loggers(log: ConfigDict, workdir: str | os.PathLike[str], given: Sequence[Logger] = ()) -> list[Guarded]:
    """The loggers of `config.log` and those given, each guarded; one that cannot start is reported and left out."""
    opened = [Guarded(logger) for logger in given]
    for name in _EXTRAS:
        if not log[name]:
            continue
        try:
            if name == "wandb":
                from marjax.loggers.wandb import Wandb

                logger: Logger = Wandb(log.wandb, workdir)
            else:
                from marjax.loggers.mlflow import MLflow

                logger = MLflow(log.mlflow, workdir)
        except UserError:
            raise
        except Exception as error:
            progress.note(
                f"{name} cannot be started ({type(error).__name__}: "
                f"{shortened(first_line(error, ''), 200)}); the run continues without it"
            )
        else:
            opened.append(Guarded(logger, name))
    return opened
