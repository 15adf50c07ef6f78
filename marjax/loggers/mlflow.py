"""MLflow (the extra marjax[mlflow]): a tracking server or a local database."""

import os
import time
from collections.abc import Mapping

import numpy as np

from marjax.loggers.ids import keep_id, read_id
from marjax.loggers.protocol import Logger

_PARAMS = 100  # per call, at most
_LONGEST = 500  # characters of a parameter, at most


class MLflow(Logger):
    """A run of the experiment that MLFLOW_EXPERIMENT_NAME names, or "marjax"; a resumed run continues it."""

    def __init__(self, uri: str, workdir: str | os.PathLike[str]) -> None:
        """Args:
        uri: of a tracking server, such as http://HOST:5000, or of a local database, such as sqlite:///mlflow.db.
        workdir: the work directory, which exists and keeps the run id.
        """
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=uri)
        run_id = read_id(workdir, "mlflow")
        if run_id is not None:
            try:
                self._client.update_run(run_id, status="RUNNING")
            except MlflowException:
                run_id = None  # deleted, or from another server
        if run_id is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "marjax")
            found = self._client.get_experiment_by_name(name)
            experiment = self._client.create_experiment(name) if found is None else found.experiment_id
            run_name = os.path.basename(os.fspath(workdir).rstrip("/"))
            run_id = self._client.create_run(experiment, run_name=run_name).info.run_id
            keep_id(workdir, "mlflow", run_id)
        self._run_id = run_id

    def hparams(self, values: Mapping[str, bool | int | float | str]) -> None:
        from mlflow.entities import Param

        there = self._client.get_run(self._run_id).data.params  # cannot be changed
        new = [Param(name, str(value)[:_LONGEST]) for name, value in values.items() if name not in there]
        for first in range(0, len(new), _PARAMS):
            self._client.log_batch(self._run_id, params=new[first : first + _PARAMS])

    def text(self, name: str, text: str) -> None:
        self._client.log_text(self._run_id, text, f"{name}.md")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._run_id, [Metric(name, value, now, step) for name, value in values.items()])

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        self._client.log_image(self._run_id, picture, f"samples/{name}_{step:08d}.png")

    def close(self) -> None:
        self._client.set_terminated(self._run_id)
