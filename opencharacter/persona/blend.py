"""Stage persona/blend: combine several trained personas in one adapter.

The evaluation then shows how much of each persona survives. The result is the exact weighted sum of
the adapters, as in persona/merge. Each persona in `persona.blend.weights` must be part of the run,
or have been trained with the same recipe in the same storage.

The stage does nothing unless an evaluation stage of the recipe has the condition `blended`.

Reads: persona/merge of every persona in `persona.blend.weights`.
Writes: adapter/, with composition.json.
Run: opencharacter run RECIPE --constitution NAME --only persona/blend
"""

from __future__ import annotations

from typing import Any

from opencharacter import lora
from opencharacter.constitution import schema
from opencharacter.errors import UserError
from opencharacter.evaluation.conditions import uses_condition
from opencharacter.persona.merge import WeightedAdapter, merge_and_store
from opencharacter.runtime.stage import Estimate, Job, StageResult

MERGE_STAGE = "persona/merge"


def is_enabled(job: Job) -> bool:
    """Return whether a stage of the recipe evaluates the blend."""
    return uses_condition(job.recipe, "blended")


def merge_jobs(job: Job) -> dict[str, Job]:
    """Return the merge jobs of the personas to blend, by the persona's name."""
    return {name: merge_job(job, name) for name in job.config.weights}


def merge_job(job: Job, name: str) -> Job:
    """Return the merge job of a persona with the recipe and the storage of another job."""
    from opencharacter import pipeline

    run_constitutions = {c.name: c for c in job.constitutions}
    constitution = run_constitutions.get(name) or schema.load(name)
    jobs = pipeline.jobs(job.recipe, [constitution], job.placement, job.store)
    return next(candidate for candidate in jobs if candidate.stage.name == MERGE_STAGE)


def check(job: Job) -> None:
    """Check before a run that the blend can be computed.

    Raises:
        UserError: if no personas are configured, one is neither part of the run nor trained, or the
            rank is too large for the engine.
    """
    if not is_enabled(job):
        return
    if not job.config.weights:
        raise UserError("condition 'blended' needs personas to blend: set persona.blend.weights")
    jobs = merge_jobs(job)
    in_run = {c.name for c in job.constitutions}
    for name, merge in jobs.items():
        if name not in in_run and merge.state()[0] != "done":
            raise UserError(
                f"persona.blend.weights names {name!r}, but {merge.dataset} is "
                f"{merge.state()[0]}; add --constitution {name}, or train that persona first"
            )
    ranks = [sum(p.config.lora.rank for p in merge.parents) for merge in jobs.values()]
    lora.allowed_rank(job.config.rank or sum(job.recipe.persona.merge.rank or r for r in ranks))


def identity(job: Job) -> dict[str, Any]:
    if not is_enabled(job):
        return {"enabled": False}
    return {name: merge.fingerprint for name, merge in merge_jobs(job).items()}


def estimate(job: Job) -> Estimate:
    return Estimate(0)


def build(job: Job) -> StageResult:
    if not is_enabled(job):
        return StageResult(0)
    weights = job.config.weights
    adapters = [
        WeightedAdapter(merge.adapter.local(), weights[name])
        for name, merge in merge_jobs(job).items()
    ]
    return StageResult(0, figures=merge_and_store(job, adapters, job.config.rank))
