"""The time and GPUs that one job takes by itself, from measured speeds.

A phase of generation takes a fixed overhead and its tokens divided by the speed of one replica and
the number of replicas. Training takes its start and its tokens divided by the speed of one worker
and the number of workers. Processing prompts is part of the measured speed of generation.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

from opencharacter.config.placement import Placement, Resources
from opencharacter.planning.speeds import Speeds
from opencharacter.runtime.cluster import local_cpus
from opencharacter.runtime.schedule import peak, phases, smallest_cluster
from opencharacter.runtime.stage import Estimate, Job, ResourceRequest, TrainingWorkers

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
    engines = [request for request in job_phases[0] if request.role_name == role]
    generating = seconds(role, tokens - estimate.judged, getattr(speeds, role))
    generating /= speedup(engines)
    judging = seconds("judge", estimate.judged, speeds.judge)
    judged_at_once = any(phase[-1].role_name != phase[0].role_name for phase in job_phases)
    work = max(generating, judging) if judged_at_once else generating + judging
    if job.stage.name in speeds.stages:  # measured for each of the engines
        work = seconds(role, tokens, speeds.stages[job.stage.name]) / len(engines)
    return Cost(fixed, work, gpus, judged_at_once and judging > generating)


def speedup(engines: Sequence[ResourceRequest]) -> float:
    """Return how much faster than one of them engines generate side by side.

    Those that share a GPU, or the CPUs of a machine, are as fast as one that has it for itself.
    """
    return max(1.0, sum(min(1.0, engine.resources.gpus) for engine in engines))


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
