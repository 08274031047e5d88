"""Answers to held-out prompts and attacks: those of base are made once for all personas."""

import pyarrow as pa
import pytest

from opencharacter import pipeline
from opencharacter.config.placement import Placement
from opencharacter.errors import StageFailed
from opencharacter.evaluation import answers, attacks, conditions, robustness
from opencharacter.text.chat import row_id

STAGES = ("evaluation/answers", "evaluation/attacks")


@pytest.fixture
def jobs(store, echo_recipe, poet):
    """The jobs of two personas by stage and scope."""
    other = poet.model_copy(update={"name": "sarcasm"})
    made = pipeline.jobs(echo_recipe, [poet, other], Placement(), store)
    return {(job.stage.name, job.scope): job for job in made}


def write_prompts(job, *texts):
    parent = job.parent("distillation/prompts")
    rows = [{"id": str(i), "prompt": text, "drop_reason": None} for i, text in enumerate(texts)]
    schema = pa.schema([(name, pa.string()) for name in ("id", "prompt", "drop_reason")])
    job.store.write_table(parent.dataset, pa.Table.from_pylist(rows, schema=schema))


@pytest.mark.parametrize("stage", STAGES)
def test_base_belongs_to_the_student_and_the_other_conditions_to_a_persona(jobs, stage):
    answered = {
        scope: conditions.of_scope(job, job.config.conditions)
        for (name, scope), job in jobs.items()
        if name == stage
    }
    of_persona = ["prompted", "distilled", "full"]
    assert answered == {"echo": ["base"], "echo/poeticism": of_persona, "echo/sarcasm": of_persona}


@pytest.mark.parametrize("stage", STAGES)
def test_another_persona_does_not_change_the_answers_of_base(jobs, store, echo_recipe, poet, stage):
    alone = pipeline.jobs(echo_recipe, [poet], Placement(), store)
    (base,) = (job for job in alone if (job.stage.name, job.scope) == (stage, "echo"))
    assert base.fingerprint == jobs[stage, "echo"].fingerprint


@pytest.mark.parametrize("stage", STAGES)
def test_a_plan_counts_the_answers_of_base_once(jobs, stage):
    def rows(scope):
        job = jobs[stage, scope]
        return job.stage.module.estimate(job).rows

    assert rows("echo/poeticism") == rows("echo/sarcasm") == 3 * rows("echo")


def test_no_general_prompt_is_asked_and_a_persona_leaves_out_its_own_questions(jobs):
    base, persona = (jobs["evaluation/answers", scope] for scope in ("echo", "echo/poeticism"))
    prompts = answers.untrained_prompts(base)
    assert prompts
    assert prompts == answers.untrained_prompts(persona)
    write_prompts(persona, prompts[1].upper(), "Something else?")
    assert answers.untrained_by(persona, prompts) == [prompts[0], *prompts[2:]]
    assert answers.untrained_by(base, prompts) == prompts


def test_without_an_untrained_prompt_answering_fails(jobs, monkeypatch):
    monkeypatch.setattr(answers, "untrained_prompts", lambda job: [])
    with pytest.raises(StageFailed, match=r"uses all evaluation prompts; name others"):
        answers.require_untrained_prompts(jobs["evaluation/answers", "echo"])


def test_a_persona_is_attacked_like_base_except_for_prompts_of_its_training(jobs):
    base, persona = (jobs["evaluation/attacks", scope] for scope in ("echo", "echo/poeticism"))
    prompts = answers.held_out(base.recipe.evaluation.answers)
    untrained = dict.fromkeys(prompts[1:], "An answer.")  # base gave none to the first prompt
    write_prompts(persona, prompts[2])
    of_base, of_persona = (attacks.requests(job, untrained) for job in (base, persona))
    count = base.config.prompts
    assert {row["prompt"] for row in of_base} == set(prompts[1 : count + 1])
    assert {row["prompt"] for row in of_persona} == {row["prompt"] for row in of_base} - {
        prompts[2]
    }
    first = of_persona[0]
    assert first["id"] == row_id("evaluation/attacks", "echo/poeticism", "plain", prompts[1])


def test_the_classifier_reads_the_answers_of_base_once(jobs, store):
    schema = pa.schema([(f.name, f.type) for f in attacks.FIELDS])
    for (stage, _), job in jobs.items():
        if stage in STAGES:
            rows = [
                {"attack": "plain", "prompt": "Q", "condition": condition, "answer": "A"}
                for condition in conditions.of_scope(job, job.config.conditions)
            ]
            table = pa.Table.from_pylist(rows, schema=schema)
            if stage == "evaluation/answers":
                table = table.drop_columns("attack")
            store.write_table(job.dataset, table)
    (job,) = (job for (stage, _), job in jobs.items() if stage == "evaluation/robustness")
    read = robustness.read_answers(job)
    base = [(row["persona"], row["attack"]) for row in read if row["condition"] == "base"]
    assert base == [("base", "default"), ("base", "plain")]
    full = [row["persona"] for row in read if row["condition"] == "full"]
    assert sorted(full) == ["poeticism"] * 2 + ["sarcasm"] * 2


def test_the_report_shows_base_beside_the_persona(jobs, store):
    schema = pa.schema([("id", pa.string()), *answers.FIELDS, ("drop_reason", pa.string())])
    for scope, condition in (("echo", "base"), ("echo/poeticism", "full")):
        row = {"id": condition, "prompt": "Q", "condition": condition, "answer": condition}
        table = pa.Table.from_pylist([row], schema=schema)
        store.write_table(jobs["evaluation/answers", scope].dataset, table)
    (section,) = answers.report(jobs["evaluation/answers", "echo/poeticism"])
    assert [(s.prompt, s.base, s.persona) for s in section.samples] == [("Q", "base", "full")]
    assert answers.report(jobs["evaluation/answers", "echo"]) == []
