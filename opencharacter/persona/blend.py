"""Stage persona/blend: several trained personas in one adapter. Does each of them survive?

The weighted sum of their adapters, exact as in persona/merge. Each persona that the recipe weighs
is one of this run, or one that was trained before from the same recipe into the same storage.

Nothing is done unless a stage of the recipe has the condition `blended`.

Reads: persona/merge of every persona that is weighed. Writes: adapter/, with composition.json.
Run: opencharacter run RECIPE --constitution NAME --only persona/blend
"""

from __future__ import annotations

from typing import Any

from opencharacter import models
from opencharacter.constitution import schema
from opencharacter.errors import UserError
from opencharacter.evaluation.conditions import compared
from opencharacter.persona.merge import WeightedAdapter, merge_into
from opencharacter.runtime.stage import Estimate, Job, StageResult

MERGED = "persona/merge"


def wanted(job: Job) -> bool:
    return compared(job.recipe, "blended")


def members(job: Job) -> dict[str, Job]:
    """By name, the jobs that make the adapters of the personas that are weighed."""
    return {name: merged(job, name) for name in job.config.weights}


def merged(job: Job, name: str) -> Job:
    """The job that makes a persona's adapter, from the same recipe into the same storage."""
    from opencharacter import pipeline

    known = {c.name: c for c in job.constitutions}
    owner = known.get(name) or schema.load(name)
    jobs = pipeline.jobs(job.recipe, [owner], job.placement, job.store)
    return next(one for one in jobs if one.stage.name == MERGED)


def check(job: Job) -> None:
    """Refuse, before a run, a blend of nothing, or of what is neither trained nor to be trained.

    Raises:
        UserError: with the remedy.
    """
    if not wanted(job):
        return
    if not job.config.weights:
        raise UserError("condition 'blended' needs personas: set persona.blend.weights")
    others = members(job)
    here = {c.name for c in job.constitutions}
    for name, other in others.items():
        if name not in here and other.state()[0] != "done":
            raise UserError(
                f"persona.blend.weights names {name!r}, whose {other.dataset} is "
                f"{other.state()[0]}; add --constitution {name}, or train it first"
            )
    ranks = [sum(p.config.lora.rank for p in other.parents) for other in others.values()]
    models.allowed_rank(job.config.rank or sum(job.recipe.persona.merge.rank or r for r in ranks))


def identity(job: Job) -> dict[str, Any]:
    if not wanted(job):
        return {"wanted": False}
    return {name: other.fingerprint for name, other in members(job).items()}


def estimate(job: Job) -> Estimate:
    return Estimate(0)


def build(job: Job) -> StageResult:
    if not wanted(job):
        return StageResult(0)
    weights = job.config.weights
    adapters = [
        WeightedAdapter(other.adapter.local(), weights[name])
        for name, other in members(job).items()
    ]
    return StageResult(0, figures=merge_into(job, adapters, job.config.rank))
