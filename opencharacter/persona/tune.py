"""Stage persona/tune: fine-tune the trained persona on general data.

The evaluation then shows how much of the persona remains. The data are the answers of the untrained
student to the general prompts. A new adapter is trained on top of the persona, and the exact sum of
both adapters is stored.

The stage does nothing unless an evaluation stage of the recipe has the condition `tuned`.

Reads: persona/merge, distillation/student (general prompts).
Writes: adapter/, curves, tensorboard/.
Run: opencharacter run RECIPE --constitution NAME --only persona/tune
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from opencharacter.evaluation.conditions import uses_condition
from opencharacter.evaluation.report.sections import Section, training_curves
from opencharacter.introspection import sft
from opencharacter.persona.merge import WeightedAdapter, merge_and_store
from opencharacter.runtime.stage import Estimate, Job, ResourceRequest, StageResult
from opencharacter.text.chat import assistant, user
from opencharacter.text.filters import CUT_OFF

if TYPE_CHECKING:
    import pyarrow as pa

    from opencharacter.training.packing import Example


def is_enabled(job: Job) -> bool:
    """Return whether a stage of the recipe evaluates the tuned persona."""
    return uses_condition(job.recipe, "tuned")


def general_answers_job(job: Job) -> Job:
    """Return the parent job that wrote the student's answers to the general prompts."""
    student_jobs = (p for p in job.parents if p.stage.name == "distillation/student")
    return next(p for p in student_jobs if p.constitution is None)


def make_examples(tokenizer: Any, rows: pa.Table) -> list[Example]:
    """Tokenize the finished answers like transcripts of introspection/sft."""
    return [
        sft.transcript_example(tokenizer, [user(row["prompt"]), assistant(row["answer"])])
        for row in rows.to_pylist()
        if row["answer"] and row["finish_reason"] not in CUT_OFF
    ]


def identity(job: Job) -> dict[str, Any]:
    return {"enabled": is_enabled(job)}


def resource_requests(job: Job) -> list[tuple[ResourceRequest, ...]]:
    return [(job.workers(),)] if is_enabled(job) else []


def estimate(job: Job) -> Estimate:
    if not is_enabled(job):
        return Estimate(0)
    student = general_answers_job(job)
    answers = student.stage.module.estimate(student)
    return Estimate(answers.rows, trained=answers.tokens_out * job.config.optimizer.epochs)


def build(job: Job) -> StageResult:
    if not is_enabled(job):
        return StageResult(0)
    from opencharacter.training.trainer import train

    persona = job.parent("persona/merge").adapter
    data = general_answers_job(job)
    result = train(job, data, make_examples, sft.sft_loss, base_adapter=persona)
    adapters = [WeightedAdapter(persona.local(), 1.0), WeightedAdapter(job.adapter.local(), 1.0)]
    return replace(result, figures=result.figures | merge_and_store(job, adapters))


def report(job: Job) -> list[Section]:
    """The training curves."""
    return training_curves(job, "Further training on general data", ("loss",))
