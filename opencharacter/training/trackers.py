"""Trackers of experiments: where training curves and the scores of the report are logged.

The curves are logged by the callbacks of transformers, the scores by each tracker's own functions.
"""

from __future__ import annotations

import importlib.util
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.markup import escape

from opencharacter.config.placement import Tracker, Tracking
from opencharacter.errors import UserError
from opencharacter.runtime.progress import console
from opencharacter.runtime.stage import Job

PACKAGES: dict[Tracker, str] = {"wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}
"""Package of each tracker; TensorBoard is installed with this one."""
KEY = "WANDB_API_KEY"
MLFLOW_BATCH = 500
"""Number of metrics per request; MLflow accepts at most 1,000."""
FORBIDDEN = re.compile(r"[^\w\-./ ]+")
"""Characters that MLflow does not allow in the name of a metric."""


def selected(tracking: Tracking) -> tuple[Tracker, ...]:
    """Return the trackers of a placement, or the default ones."""
    if tracking.trackers is not None:
        return tuple(dict.fromkeys(tracking.trackers))
    wandb = os.environ.get(KEY) and importlib.util.find_spec("wandb")
    return ("tensorboard", "wandb") if wandb else ("tensorboard",)


def check(tracking: Tracking) -> None:
    """Raise UserError if the package of a tracker is not installed."""
    for tracker in selected(tracking):
        package = PACKAGES.get(tracker)
        if package and importlib.util.find_spec(package) is None:
            raise UserError(
                f"tracking.trackers: {tracker} is not installed; pip install {package}, or remove "
                "it from the placement"
            )


def environment(tracking: Tracking, tensorboard: str) -> dict[str, str]:
    """Return the environment variables by which transformers' callbacks are configured.

    Args:
        tracking: the trackers.
        tensorboard: folder of TensorBoard's files.
    """
    values = {"TENSORBOARD_LOGGING_DIR": tensorboard}
    if tracking.trackers is not None:  # without it, a project of the environment is kept
        values |= {"WANDB_PROJECT": tracking.project, "MLFLOW_EXPERIMENT_NAME": tracking.project}
    if tracking.mlflow_uri:
        values["MLFLOW_TRACKING_URI"] = tracking.mlflow_uri
    return values


def arguments(tracking: Tracking, run_name: str) -> dict[str, Any]:
    """Return the arguments of `transformers.TrainingArguments` that concern trackers.

    Args:
        tracking: the trackers.
        run_name: name of the run.
    """
    trackers = selected(tracking)
    values: dict[str, Any] = {"report_to": list(trackers), "run_name": run_name}
    if "trackio" in trackers:
        values |= {"project": tracking.project, "trackio_space_id": tracking.trackio_space}
        values["trackio_static_space_id"] = False
    return values


# ------------------------------------------------------------------------------------------ scores


def score_metrics(scores: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return scores of the report as metrics: the value, and the ends of the interval.

    Scores without a value are left out. No name is the beginning of another one before a slash,
    because MLflow's files are named so.

    Args:
        scores: rows of `evaluation.report.stage.SCORES`.
    """
    metrics = {}
    for row in scores:
        parts = (row["persona"], row["measure"], row["condition"], row["about"])
        name = "/".join(str(part) for part in parts if part)
        for field in ("value", "low", "high", "n", "unscored"):
            if row["value"] is not None and row[field] is not None:
                metrics[FORBIDDEN.sub("_", f"{name}/{field}")] = float(row[field])
    return metrics


def log_scores(job: Job, scores: Iterable[Mapping[str, Any]]) -> None:
    """Log the scores of the report to the trackers of the placement, as a run of their own.

    Args:
        job: the report's job.
        scores: rows of `evaluation.report.stage.SCORES`.
    """
    tracking, metrics = job.placement.tracking, score_metrics(scores)
    for tracker in selected(tracking) if metrics else ():
        if tracker == "tensorboard":
            log_to_tensorboard(job, metrics)
        elif importlib.util.find_spec(PACKAGES[tracker]):  # else the run was on another machine
            try:
                LOG[tracker](tracking, job.dataset, metrics)
            except Exception as error:  # the report is in storage; a tracker is only a copy of it
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                console.print(f"scores were not logged to {tracker}: {escape(reason)}")


def log_to_tensorboard(job: Job, metrics: dict[str, float]) -> None:
    """Write the event file of the scores to storage."""
    from tensorboardX import SummaryWriter

    with tempfile.TemporaryDirectory() as scratch:
        with SummaryWriter(scratch) as writer:
            for name, value in metrics.items():
                writer.add_scalar(name, value, 0)
        job.store.upload(Path(scratch), f"{job.dataset}/tensorboard")


def log_to_wandb(tracking: Tracking, run_name: str, metrics: dict[str, float]) -> None:
    import wandb  # pyright: ignore[reportMissingImports]

    project = os.environ.get("WANDB_PROJECT") if tracking.trackers is None else None
    with wandb.init(project=project or tracking.project, name=run_name) as run:
        run.log(metrics)


def log_to_mlflow(tracking: Tracking, run_name: str, metrics: dict[str, float]) -> None:
    import mlflow  # pyright: ignore[reportMissingImports]

    if tracking.mlflow_uri:
        mlflow.set_tracking_uri(tracking.mlflow_uri)
    mlflow.set_experiment(tracking.project)
    with mlflow.start_run(run_name=run_name):
        items = list(metrics.items())
        for start in range(0, len(items), MLFLOW_BATCH):
            mlflow.log_metrics(dict(items[start : start + MLFLOW_BATCH]))


def log_to_trackio(tracking: Tracking, run_name: str, metrics: dict[str, float]) -> None:
    import trackio  # pyright: ignore[reportMissingImports]

    trackio.init(
        project=tracking.project, name=run_name, space_id=tracking.trackio_space, resume="allow"
    )
    trackio.log(metrics)
    trackio.finish()


LOG = {"wandb": log_to_wandb, "mlflow": log_to_mlflow, "trackio": log_to_trackio}
