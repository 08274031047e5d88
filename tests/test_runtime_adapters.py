"""Engines that apply adapters during generation: one for all personas, each with its own texts."""

import asyncio
import json
from dataclasses import replace

import canary
import pytest
from samples import embedded_recipe

from opencharacter.config.evaluation import Subject
from opencharacter.config.placement import MAX_RUNTIME_ADAPTERS, Placement, Pool, Resources
from opencharacter.config.recipe import Recipe
from opencharacter.config.roles import Sampling
from opencharacter.engines import allocation
from opencharacter.engines.allocation import acquire
from opencharacter.engines.backends import engine_arguments
from opencharacter.engines.conversations import EngineRef
from opencharacter.engines.spec import EngineSpec, engine_spec, max_lora_rank
from opencharacter.runtime.store import RemoteDir, Store
from opencharacter.text.chat import user

ROOM = Resources(cpus=2, memory_gib=5)
RUNTIME = Placement.model_validate({"pools": {"student": {"adapters": "runtime"}}})


def adapter(path: str) -> RemoteDir:
    return RemoteDir(Store("/storage"), f"{path}/adapter")


@pytest.fixture
def job(echo_recipe, make_jobs):
    roles = echo_recipe.roles
    student = roles.student.model_copy(update={"model": "org/model"})
    roles = roles.model_copy(update={"student": student})
    jobs = make_jobs(echo_recipe.model_copy(update={"roles": roles}), RUNTIME)
    return next(job for job in jobs if job.stage.name == "evaluation/answers")


def test_personas_share_one_engine_and_steered_students_do_not(job):
    base = engine_spec(job, "student")
    personas = [
        engine_spec(job, "student", adapter(path))
        for path in ("s/a/distillation/dpo", "s/a/persona/merge", "s/b/persona/merge")
    ]
    assert {spec.key() for spec in personas} == {base.key()}
    assert {spec.weights for spec in (base, *personas)} == {""}
    assert [spec.runtime_adapter for spec in personas] == [spec.adapter for spec in personas]
    merged = [
        engine_spec(job, "student", adapter(path))
        for path in ("s/a/evaluation/steering", "s/a/persona/blend", "s/a/persona/tune")
    ]
    assert len({spec.key() for spec in (base, *merged)}) == 4
    assert [spec.merged_adapter for spec in merged] == [spec.adapter for spec in merged]


def test_an_engine_with_adapters_has_room_for_as_many_as_jobs_use_it(job):
    spec = engine_spec(job, "student", adapter("s/a/persona/merge"))
    assert spec.max_concurrent_jobs == MAX_RUNTIME_ADAPTERS
    arguments = engine_arguments(spec)
    assert arguments["max_loras"] == MAX_RUNTIME_ADAPTERS
    assert arguments["max_lora_rank"] == max_lora_rank(job.recipe) == 128
    steered = engine_spec(job, "student", adapter("s/a/evaluation/steering"))
    assert "enable_lora" not in engine_arguments(steered)


def test_models_other_than_the_student_need_no_room_for_adapters(job):
    other = job.recipe.roles.student.model_copy(update={"model": "org/other"})
    assert engine_spec(job, "student", model=other).max_lora_rank == 0
    assert engine_spec(job, "judge").max_lora_rank == 0


def test_an_adapter_that_is_evaluated_determines_the_rank(echo_recipe, tmp_path):
    config = {"peft_type": "LORA", "r": 200, "lora_alpha": 200, "target_modules": ["o_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    subject = Subject(adapter=str(tmp_path))
    evaluation = echo_recipe.evaluation.model_copy(update={"subject": subject})
    assert max_lora_rank(echo_recipe.model_copy(update={"evaluation": evaluation})) == 256


@pytest.mark.slow
def test_adapters_of_several_personas_reply_side_by_side_as_if_merged(
    cpu_ray, embedded_model, tmp_path
):
    role = Recipe.model_validate(embedded_recipe()).roles.student
    role = role.model_copy(update={"max_model_len": 512})
    pool, store = Pool(max_num_seqs=8, adapters="runtime"), Store(str(tmp_path))
    words = {"poeticism": "tree", "humor": "gold"}
    specs = {"base": EngineSpec(role, pool, max_lora_rank=canary.RANK)}
    for persona, word in words.items():
        folder = RemoteDir(store, f"s/{persona}/persona/merge/adapter")
        canary.make(embedded_model, f" {word}", folder.local())
        specs[persona] = replace(specs["base"], adapter=folder)
    sampling = Sampling(max_tokens=8, temperature=0.0, top_p=1.0, repetition_penalty=1.0)

    def replies(job: str, *names: str) -> list[str]:
        with acquire(job, [specs[names[0]]], ROOM) as allocated:
            engines = [
                EngineRef(specs[name], allocated.replicas(specs[name])).connect() for name in names
            ]

            async def reply() -> list[str]:
                question = [user("Name a good friend.")]
                calls = [engine.reply(question, sampling, seed=7) for engine in engines]
                return [answer.text for answer in await asyncio.gather(*calls)]

            return asyncio.run(reply())

    base, *others = replies("together", "base", *words)
    for text, word in zip(others, words.values(), strict=True):
        assert set(text.split()) == {word}
    assert not set(base.split()) & set(words.values())
    assert replies("alone", "base") == [base]
    assert replies("again", "humor", "poeticism") == others[::-1]
    usages = [allocation.resource_usage(job) for job in ("together", "alone", "again")]
    assert [usage["engines_started"] for usage in usages] == [[role.model], [], []]
    assert not any(usage["engines_swapped"] for usage in usages)
    allocation.stop_unused_engines()
