"""What a run will take: hours, GPU-hours and money by stage, from measured speeds.

A stage that generates takes its tokens over the speed of one replica and the number of replicas; a
stage that trains takes its tokens over the speed of one worker and the number of workers. Reading
prompts is in the measured speed; starts of engines are not counted, so small runs take longer.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from pydantic import PositiveFloat, ValidationError

from opencharacter.config import Config, explain, read_yaml
from opencharacter.stage import Estimate, Job


class Speeds(Config):
    """Measured on the hardware of the placement, with the recipe's models."""

    teacher: PositiveFloat
    """Generated tokens per second of one replica."""
    student: PositiveFloat
    judge: PositiveFloat
    expander: PositiveFloat
    training: PositiveFloat
    """Trained tokens per second of one worker."""


class Cost(NamedTuple):
    """Of one job: wall time in seconds, and the GPUs that it holds meanwhile."""

    seconds: float
    gpus: float

    @property
    def gpu_hours(self) -> float:
        return self.seconds * self.gpus / 3600


def load_speeds(path: str) -> Speeds:
    """Read speeds from a YAML file.

    Raises:
        UserError: naming the field that is missing or wrong.
    """
    try:
        return Speeds.model_validate(read_yaml("speeds", Path(path)))
    except ValidationError as error:
        raise explain("speeds", Path(path), error) from None


def cost(job: Job, estimate: Estimate, speeds: Speeds) -> Cost:
    """What a job will take by itself.

    Args:
        job: with its placement.
        estimate: of the job.
        speeds: of one replica or worker.
    """
    if estimate.trained:
        training = job.placement.training
        seconds = estimate.trained / (speeds.training * training.workers)
        return Cost(seconds, training.workers * training.gpus)
    if not estimate.tokens_out:
        return Cost(0, 0)
    role = job.stage.roles[0]
    pool = getattr(job.placement.pools, role)
    return Cost(estimate.tokens_out / (getattr(speeds, role) * pool.replicas), job.gpus(role))
