"""The time and GPUs that one job takes by itself, from measured speeds.

A phase of generation takes a fixed overhead and its tokens divided by the speed of one replica and
the number of replicas. Training takes its start and its tokens divided by the speed of one worker
and the number of workers. Processing prompts is part of the measured speed of generation.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from opencharacter.config.placement import Placement, Resources
from opencharacter.planning.speeds import Speeds
from opencharacter.runtime.cluster import local_cpus
from opencharacter.runtime.schedule import peak, phases, smallest_cluster
from opencharacter.runtime.stage import Estimate, Job, TrainingWorkers

RAY_MEMORY_SHARE = 0.7
"""Share of a machine's memory that Ray gives to tasks and actors."""


class Cost(NamedTuple):
    """What a job takes if it shares no engine with another job.

    Args:
        fixed: seconds in addition to its tokens, without the start of engines.
        work: seconds for its tokens.
        gpus: number of GPUs that it holds.
        judging: whether the judge, and not the student beside it, determines `work`.
    """

    fixed: float
    work: float
    gpus: float
    judging: bool = False


def cost(job: Job, estimate: Estimate, speeds: Speeds, available: Resources) -> Cost:
    """Compute what a job takes by itself.

    Args:
        job: with its placement.
        estimate: rows and tokens of the job.
        speeds: of one replica or worker.
        available: resources of the cluster.
    """
    job_phases = phases(job, available)
    gpus = peak(job_phases).gpus
    if not job_phases:
        return Cost(speeds.other, 0, 0)
    first = job_phases[0][0]
    if isinstance(first, TrainingWorkers):
        work = estimate.trained / speeds.training + estimate.read / speeds.reading
        return Cost(speeds.training_start, work / first.count, gpus)

    def seconds(role: str, tokens: int, speed: float) -> float:
        return tokens / (speed * getattr(job.placement.pools, role).replicas)

    role, tokens = first.role_name, estimate.tokens_out
    fixed = speeds.pass_start * len(job_phases)
    generating = seconds(role, tokens - estimate.judged, getattr(speeds, role))
    judging = seconds("judge", estimate.judged, speeds.judge)
    side_by_side = any(len(phase) > 1 for phase in job_phases)
    work = max(generating, judging) if side_by_side else generating + judging
    if job.stage.name in speeds.stages:
        work = seconds(role, tokens, speeds.stages[job.stage.name])
    return Cost(fixed, work, gpus, side_by_side and judging > generating)


def planning_resources(placement: Placement) -> Resources:
    """Return the resources that `plan` assumes: this machine's if the placement has no GPUs."""
    required = smallest_cluster(placement)
    declared = placement.cluster or (
        placement.autoscaling_resources if placement.autoscaling else None
    )
    if declared or required.gpus:
        return declared or required
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return required | Resources(cpus=local_cpus(placement), memory_gib=RAY_MEMORY_SHARE * memory)
