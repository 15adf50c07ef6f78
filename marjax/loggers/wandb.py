"""Weights & Biases (the extra marjax[wandb]); WANDB_MODE=offline keeps everything local."""

import os
import secrets
from collections.abc import Mapping
from typing import Any

import numpy as np

from marjax.loggers.ids import keep_id, read_id
from marjax.loggers.protocol import Logger
from marjax.storage import is_remote


class Wandb(Logger):
    """A run of a project; a resumed run continues it."""

    def __init__(self, project: str, workdir: str | os.PathLike[str]) -> None:
        """Args:
        project: "PROJECT", or "ENTITY/PROJECT".
        workdir: the work directory, which exists and keeps the run id.
        """
        import wandb

        self._image = wandb.Image
        run_id = read_id(workdir, "wandb")
        if run_id is None:
            run_id = secrets.token_hex(4)
            keep_id(workdir, "wandb", run_id)
        entity, _, name = project.rpartition("/")
        self._run: Any = wandb.init(
            entity=entity or None,
            project=name,
            id=run_id,
            resume="allow",
            name=os.path.basename(os.fspath(workdir).rstrip("/")),
            dir=None if is_remote(workdir) else os.path.abspath(workdir),
            settings=wandb.Settings(console="off"),
        )

    def hparams(self, values: Mapping[str, bool | int | float | str]) -> None:
        self._run.config.update(dict(values), allow_val_change=True)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        self._run.log({name: self._image(picture)}, step=step)

    def close(self) -> None:
        self._run.finish()
