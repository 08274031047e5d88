"""Evaluation of the embedded model through a Ray Serve application on vLLM.

The adapters repeat one word each, which identifies the adapter that replied.
"""

import asyncio
import logging

import canary
import pytest
from ray import serve
from samples import recipe_of
from test_served_evaluation import of_persona, trained_jobs

from opencharacter import pipeline
from opencharacter.config.placement import Placement
from opencharacter.config.roles import Sampling
from opencharacter.engines.served import JUDGE, ServedSpec, served_spec
from opencharacter.engines.spec import FirstToken
from opencharacter.evaluation import preferences
from opencharacter.evaluation.conditions import with_condition
from opencharacter.serving import evaluation
from opencharacter.text.chat import user

pytestmark = pytest.mark.slow

WORDS = {"distilled": "gold", "full": "tree"}
ROLE = {
    "model": "embedded:smollm2-135m",
    "name": "smollm2-135m",
    "self_name": "SmolLM",
    "max_model_len": 1024,
}
LORA = {"lora": {"rank": canary.RANK, "alpha": canary.RANK}}
SHORT = Sampling(max_tokens=10, repetition_penalty=1.0)
EVALUATION = {
    "judge": {"gold_items": 2, "min_agreement": None},
    "answers": {
        "count": 2,
        "conditions": ["base", "distilled", "full"],
        "sampling": SHORT.model_dump(),
    },
    "preferences": {"games": 2, "conditions": ["base", "full"], "sampling": SHORT.model_dump()},
    "attacks": {"conditions": ["base", "full"]},
}
PLACEMENT = Placement.model_validate(
    {
        "pools": {role: {"cpus": 0.5, "memory_gib": 2} for role in ("student", "judge")},
        "max_concurrent_jobs": 4,
        "evaluation": {"served": "own"},
    }
)


@pytest.fixture
def jobs(cpu_ray, tmp_path, embedded_model):
    """The jobs of a run whose adapters repeat a word; Serve is shut down at the end."""
    made = recipe_of(
        ROLE,
        evaluation=EVALUATION,
        distillation={"dpo": LORA},
        introspection={"sft": LORA},
        persona={"merge": {"rank": canary.RANK}},
    )
    jobs = trained_jobs(tmp_path / "runs", PLACEMENT, made, ["poeticism"])
    stages = dict(zip(WORDS, ("distillation/dpo", "persona/merge"), strict=True))
    for condition, word in WORDS.items():
        canary.make(embedded_model, f" {word}", tmp_path / word)
        canary.publish(of_persona(jobs, stages[condition]), tmp_path / word)
    yield jobs
    serve.shutdown()


def says(text: str) -> str | None:
    """The word that a text repeats; None if it repeats none of them."""
    return next((word for word in WORDS.values() if text.lower().count(word) >= 6), None)


def spec_of(job, role: str) -> ServedSpec:
    """The served engine of a role, without an adapter."""
    spec = served_spec(job, role, None, None)
    assert spec is not None
    return spec


async def ask(job) -> dict[str, list]:
    """Ask the application about what the engines of the batch way can do."""
    question = [user("What is the capital of France?")]
    student, judge = (spec_of(job, role).connect() for role in ("student", JUDGE))
    seeded = [student.reply(question, SHORT, seed=seed) for seed in (3, 3, 4)]
    begun = student.reply(question, SHORT, seed=3, prefill="The capital of France is")
    return {
        "texts": [reply.text for reply in await asyncio.gather(*seeded)],
        "begun": [await begun],
        "judged": [await judge.reply(question, FirstToken(), seed=1)],
    }


def test_an_application_on_vllm_serves_seeds_prefills_probabilities_and_adapters(jobs):
    answers = of_persona(jobs, "evaluation/answers")
    level = logging.getLogger().level
    evaluation.deploy(spec_of(answers, "student").app)
    assert logging.getLogger().level == level
    told = asyncio.run(ask(answers))
    first, again, other = told["texts"]
    assert first == again != other
    assert "Paris" in told["begun"][0].text
    (judged,) = told["judged"]
    probabilities = [log_prob for _, log_prob in judged.first_tokens]
    assert len(probabilities) == FirstToken().top_logprobs and judged.tokens_out == 1
    assert probabilities == sorted(probabilities, reverse=True) and probabilities[0] <= 0

    names = ("judge", "answers", "preferences")
    measured = [job for job in jobs if job.stage.name.removeprefix("evaluation/") in names]
    manifests = [manifest for _, manifest in pipeline.run(measured)]
    assert sum(len(manifest["engines_started"]) for manifest in manifests) == 1
    assert not serve.status().applications
    assert not any(manifest["dropped"] for manifest in manifests)
    asked = [job for job in measured if job.stage.name != "evaluation/judge"]
    rows = [row for job in asked for row in job.store.read_table(job.dataset).to_pylist()]
    assert {(row["condition"], says(row["answer"])) for row in rows} == {
        ("base", None),
        *WORDS.items(),
    }
    for job in (job for job in measured if job.stage.name == "evaluation/preferences"):
        games = job.store.read_table(job.dataset).to_pylist()
        expected = [
            row
            for condition in preferences.conditions(job)
            for row in with_condition(preferences.untrained_games(job), condition)
        ]
        fields = ("id", "prompt", "first", "second", "framing")
        assert sorted([row[f] for f in fields] for row in games) == sorted(
            [row[f] for f in fields] for row in expected
        )
        assert all(row["mass"] > 0 for row in games)
