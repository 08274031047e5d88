"""Blends: several trained personas in one adapter, whose fingerprint depends on all of them."""

import pytest
import torch
from samples import ECHO_ROLE, recipe_of
from test_merge import SHAPES, update, write_adapter

from opencharacter import pipeline
from opencharacter.config.placement import Placement
from opencharacter.constitution import schema
from opencharacter.errors import UserError
from opencharacter.evaluation import conditions
from opencharacter.persona import blend
from opencharacter.runtime.stage import StageResult

CONDITIONS = ["base", "full", "blended"]
EVALUATION = {
    "answers": {"conditions": CONDITIONS},
    "attacks": {"conditions": CONDITIONS},
    "preferences": {"conditions": ["base", "full"]},
}
WEIGHTS = {"poeticism": 0.5, "humor": 0.75}


def recipe(weights=WEIGHTS, evaluation=EVALUATION, **changes):
    sections = {"persona": {"blend": {"weights": weights}}, "evaluation": evaluation}
    return recipe_of(ECHO_ROLE, **{**sections, **changes})


@pytest.fixture
def jobs_of(store):
    """Jobs of these personas by persona and stage."""

    def make(recipe, *names):
        personas = [schema.load(name) for name in names]
        jobs = pipeline.jobs(recipe, personas, Placement(), store)
        return {(j.persona.name, j.stage.name): j for j in jobs if j.stage.scope == "persona"}

    return make


def train(job, seed):
    """An adapter as if the persona had been trained."""
    folder = job.adapter.local()
    folder.parent.mkdir(parents=True)
    write_adapter(folder, 4, seed)
    pipeline.finish(job, StageResult(0), seconds=1)
    return folder


def test_a_blend_is_the_weighted_sum_of_adapters_of_this_run_and_of_an_earlier_one(jobs_of):
    (humor,) = (j for (_, n), j in jobs_of(recipe(), "humor").items() if n == "persona/merge")
    other = train(humor, seed=2)
    jobs = jobs_of(recipe(), "poeticism")
    own = train(jobs["poeticism", "persona/merge"], seed=1)
    job = jobs["poeticism", "persona/blend"]
    blend.check(job)
    assert blend.build(job).figures["rank"] == 8
    for module in SHAPES:
        expected = 0.5 * update(own, module) + 0.75 * update(other, module)
        assert torch.allclose(update(job.adapter.local(), module), expected, atol=1e-5)
    answers = jobs["poeticism", "evaluation/answers"]
    assert conditions.condition_adapter(answers, "blended") == job.adapter


def test_a_blend_is_stale_when_one_of_its_personas_was_trained_differently(jobs_of):
    def fingerprint(**changes):
        return jobs_of(recipe(**changes), "poeticism")["poeticism", "persona/blend"].fingerprint

    assert fingerprint() == fingerprint()
    assert fingerprint(weights={"poeticism": 0.5}) != fingerprint()
    assert fingerprint(distillation={"dpo": {"beta": 0.2}}) != fingerprint()
    unused = {"weights": {}, "evaluation": {}}
    assert (
        "humor"
        not in jobs_of(recipe(**unused), "poeticism")["poeticism", "persona/blend"].payload[
            "inputs"
        ]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {}}, r"set persona\.blend\.weights"),
        ({}, "names 'humor', but echo/humor/persona/merge is missing; add --constitution humor"),
        ({"weights": {"poeticism": 1.0}, "distillation": {"dpo": {"lora": {"rank": 512}}}}, "576"),
    ],
)
def test_an_impossible_blend_is_refused_before_the_run(jobs_of, changes, message):
    with pytest.raises(UserError, match=message):
        blend.check(jobs_of(recipe(**changes), "poeticism")["poeticism", "persona/blend"])


def test_a_blend_of_two_personas_of_the_same_run_is_accepted(jobs_of):
    jobs = jobs_of(recipe(), "poeticism", "humor")
    for name in ("poeticism", "humor"):
        blend.check(jobs[name, "persona/blend"])


def test_a_blend_is_made_only_if_it_is_an_evaluated_condition(jobs_of):
    job = jobs_of(recipe(weights={}, evaluation={}), "poeticism")["poeticism", "persona/blend"]
    blend.check(job)
    assert blend.build(job) == StageResult(0)
