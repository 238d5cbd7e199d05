"""Tracking by Weights & Biases or MLflow (the setting `track`), beside log.jsonl and TensorBoard.

A run's scalars, its settings and its name are sent, nothing else: no code, git state, environment,
console output or pictures. A resumed run goes on with its record, which tracking.json names; a
copy of its folder has a new one.
Whatever a service raises switches tracking off with a warning; the training goes on.
"""

import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from engine.run.records import FINAL
from util.files import printable, write_text

PROJECT = "mae"  # unless the environment names another
ENVIRONMENT = {  # unless it says something else already
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_FILE_STORE": "true",  # the local one, which needs no data base
    # a server that does not answer is given up after a minute, not after many
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
logger = logging.getLogger(__name__)
Values = Mapping[str, object]  # numbers, or of settings also texts


class Wandb:
    """A run of Weights & Biases; WANDB_MODE=offline keeps it in the run's folder, for `wandb sync`.

    Each record is a row with its own `step`, as W&B drops what comes late for its own counter.
    """

    def __init__(self, folder: Path, name: str, settings: Values, known_id: str | None):
        import wandb

        str(folder).encode()  # at a name that is no UTF-8, W&B's own log would fail later
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=name,
            dir=folder,
            id=known_id,
            resume="allow",
            reinit="create_new",  # not a run that is open in this process already
            config=dict(settings),
            allow_val_change=True,
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_code=True,
                disable_git=True,
                save_code=False,
                x_disable_machine_info=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_save_requirements=False,
                host="",
                username="",
                program="",
                finish_timeout=60.0,  # seconds that the end of a run waits for uploads
            ),
        )
        self.id = self.run.id
        self.run.define_metric("*", step_metric="step")
        self.place = str(Path(self.run.dir).parent if self.run.offline else self.run.url)

    def log(self, values: Values, step: int) -> None:
        self.run.log({**values, "step": step})

    def close(self, is_done: bool) -> None:
        self.run.finish(exit_code=0 if is_done else 1)


class Mlflow:
    """A run of MLflow, where MLFLOW_TRACKING_URI says or else in the run's folder."""

    def __init__(self, folder: Path, name: str, settings: Values, known_id: str | None):
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self.place = os.environ.get("MLFLOW_TRACKING_URI") or (
            (folder / "mlruns").resolve().as_uri()
        )
        self.client, self.metric = MlflowClient(tracking_uri=self.place), Metric
        if known_id is None:
            project = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            experiment = self.client.get_experiment_by_name(project)
            of = experiment.experiment_id if experiment else self.client.create_experiment(project)
            self.id = self.client.create_run(of, run_name=name).info.run_id
            rows = [Param(key, str(value)) for key, value in settings.items()]
            for first in range(0, len(rows), 100):  # MLflow takes no more at once
                self.client.log_batch(self.id, params=rows[first : first + 100])
        else:
            self.id = known_id
            self.client.update_run(self.id, status="RUNNING")

    def log(self, values: Values, step: int) -> None:
        now = int(time.time() * 1000)
        rows = [
            self.metric(name, value, now, step)
            for name, value in values.items()
            if isinstance(value, int | float)
        ]
        self.client.log_batch(self.id, metrics=rows)

    def close(self, is_done: bool) -> None:
        self.client.set_terminated(self.id, status="FINISHED" if is_done else "KILLED")


SERVICES: dict[str, type[Wandb] | type[Mlflow]] = {"wandb": Wandb, "mlflow": Mlflow}


def clean(text: str) -> str:
    """A service's text for log.txt: on one line, and without the password of an address."""
    return printable(re.sub("//[^/]*@", "//", text))


class Tracker:
    """Sends a run's scalars to the service of that name. For the main process.

    A run that goes on from `step` goes on with its record, if it has one: what a killed run sent
    after its last checkpoint is not sent again. A run that begins has a new record.
    """

    def __init__(self, folder: Path, name: str, settings: Values, step: int = 0):
        self.path, self.name = folder / "tracking.json", name
        self.origin = {"service": name, "folder": str(folder.resolve())}
        self.service: Wandb | Mlflow | None = None
        self.sent: dict[str, int] = {}  # the last step of each kind
        known_id = None
        with self._guarded():
            os.environ |= {**ENVIRONMENT, **os.environ}
            stored = json.loads(self.path.read_text()) if step and self.path.exists() else {}
            if self.origin.items() <= stored.items():
                known_id, self.sent = stored["id"], stored["steps"]
            title = "/".join(folder.resolve().parts[-2:]).encode(errors="replace").decode()
            # services cannot write names that are no UTF-8
            texts = {key: printable(v) for key, v in settings.items() if isinstance(v, str)}
            self.service = SERVICES[name](folder, title, {**settings, **texts}, known_id)
            logger.info(
                "tracked by %s: %s, run %s", name, clean(self.service.place), self.service.id
            )

    def log(self, kind: str, step: int, values: Values) -> None:
        """Sends a record's scalars, unless the service has them already."""
        if self.service is not None and step > self.sent.get(kind, -1):
            with self._guarded():
                self.service.log(values, step)
                self.sent[kind] = step
                if kind != FINAL:  # which an evaluation sends, that may lie in a run's folder
                    known = {**self.origin, "id": self.service.id, "steps": self.sent}
                    write_text(self.path, json.dumps(known))

    def close(self) -> None:
        """Says that the run has ended, and whether it came to its end."""
        with self._guarded():
            if self.service is not None:
                self.service.close(FINAL in self.sent)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001  (no error of a service may end a run)
            logger.warning(
                "%s failed, and this run is tracked no longer; log.jsonl has all records: %s",
                self.name,
                clean(str(error))[:300] or type(error).__name__,
            )
            self.service = None
