"""Stage persona/tune: the persona is fine-tuned on plain general data. Does it revert?

The data are the student's own answers, from before all training, to the general prompts. A new
adapter learns them on top of the persona, and what is stored is the exact sum of both.

Nothing is done unless a stage of the recipe has the condition `tuned`.

Reads: persona/merge, distillation/student (general prompts). Writes: adapter/, curves,
tensorboard/.
Run: opencharacter run RECIPE --constitution NAME --only persona/tune
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from opencharacter.evaluation.conditions import compared
from opencharacter.introspection import sft
from opencharacter.persona.merge import WeightedAdapter, merge_into
from opencharacter.runtime.stage import Estimate, Job, ResourceRequest, StageResult
from opencharacter.text.chat import assistant, user

if TYPE_CHECKING:
    import pyarrow as pa

    from opencharacter.training.packing import Example


def wanted(job: Job) -> bool:
    return compared(job.recipe, "tuned")


def general(job: Job) -> Job:
    """The job of the student's answers to the general prompts."""
    named = (p for p in job.parents if p.stage.name == "distillation/student")
    return next(p for p in named if p.constitution is None)


def examples(tokenizer: Any, rows: pa.Table) -> list[Example]:
    """Finished answers in tokens, as sft learns transcripts."""
    return [
        sft.example(tokenizer, [user(row["prompt"]), assistant(row["answer"])])
        for row in rows.to_pylist()
        if row["answer"] and row["finish_reason"] != "length"
    ]


def identity(job: Job) -> dict[str, Any]:
    return {"wanted": wanted(job)}


def resource_requests(job: Job) -> list[tuple[ResourceRequest, ...]]:
    return [(job.workers(),)] if wanted(job) else []


def estimate(job: Job) -> Estimate:
    if not wanted(job):
        return Estimate(0)
    answers = general(job).stage.module.estimate(general(job))
    return Estimate(answers.rows, trained=answers.tokens_out * job.config.optimizer.epochs)


def build(job: Job) -> StageResult:
    if not wanted(job):
        return StageResult(0)
    from opencharacter.training.trainer import train

    persona = job.parent("persona/merge").adapter
    outcome = train(job, general(job), examples, sft.sft_loss, base_adapter=persona)
    parts = [WeightedAdapter(persona.local(), 1.0), WeightedAdapter(job.adapter.local(), 1.0)]
    return replace(outcome, figures=outcome.figures | merge_into(job, parts))
