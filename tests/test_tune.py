"""Further tuning of a persona on general data; the result is one adapter."""

import json

import pyarrow as pa
import pytest
from samples import ECHO_ROLE, recipe_of
from test_merge import update

from opencharacter import models, pipeline
from opencharacter.config.placement import Placement
from opencharacter.distillation import teacher
from opencharacter.engines.conversations import ROW_FIELDS
from opencharacter.evaluation import conditions
from opencharacter.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from opencharacter.persona import tune
from opencharacter.runtime.stage import StageResult

PLACEMENT = Placement.model_validate({"training": {"cpus": 1, "checkpoint_steps": 2}})
MODULE = "model.layers.0.mlp.up_proj"
TUNED = {"answers": {"conditions": ["base", "full", "tuned"]}}
TUNED |= {"attacks": {"conditions": ["base", "full"]}}


def recipe(model="echo:", **evaluation):
    optimizer = {"global_batch_size": 4, "learning_rate": 0.01}
    section = {"lora": {"rank": 4, "alpha": 8}, "optimizer": optimizer}
    role = {**ECHO_ROLE, "model": str(model), "name": "tiny"}
    return recipe_of(role, persona={"tune": section}, evaluation=evaluation)


def answers(count, **changes):
    row = {"prompt_id": "p", "kind": "general", "prompt": "Rain?", "answer": "It is water."}
    row |= {"finish_reason": "stop", **changes}
    return [{**row, "id": f"{row['answer']}-{n}", "sample": n} for n in range(count)]


def persona_adapter(path, tiny_model):
    """A newly initialized adapter of all linear layers, which changes nothing."""
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules="all-linear")
    peft.get_peft_model(model, config).save_pretrained(path)
    assert (path / ADAPTER_WEIGHTS).is_file()


@pytest.fixture
def jobs(make_jobs, tiny_model):
    all_jobs = make_jobs(recipe(tiny_model, **TUNED), PLACEMENT)
    return {(j.stage.name, j.stage.scope): j for j in all_jobs}


def test_further_training_is_merged_with_the_persona_into_one_adapter(
    cpu_ray, jobs, tiny_model, monkeypatch, tmp_path
):
    monkeypatch.setenv("OPENCHARACTER_CACHE", str(tmp_path / "cache"))
    general = jobs["distillation/student", "student"]
    rows = [*answers(8), *answers(2, finish_reason="length"), *answers(1, answer="")]
    schema = pa.schema([ROW_FIELDS[0], *teacher.FIELDS, *ROW_FIELDS[1:]])
    general.store.write_table(general.dataset, pa.Table.from_pylist(rows, schema=schema))
    merged = jobs["persona/merge", "persona"].adapter
    persona_adapter(merged.local(), tiny_model)
    job = jobs["persona/tune", "persona"]
    outcome = tune.build(job)
    assert outcome.figures["loss"] > 0
    config = json.loads((job.adapter.local() / ADAPTER_CONFIG).read_text())
    assert config["r"] == 8  # 4 of the persona and 4 of the tuning
    assert update(job.adapter.local(), MODULE).abs().sum() > 0
    assert update(merged.local(), MODULE).abs().sum() == 0  # only tuning changed weights
    answers_job = jobs["evaluation/answers", "persona"]
    assert conditions.condition_adapter(answers_job, "tuned") == job.adapter
    models.merge_into_base(tiny_model, job.adapter.local())


def test_truncated_answers_are_not_trained_on(tokenizer):
    rows = [*answers(2), *answers(1, finish_reason="length"), *answers(1, answer=None)]
    rows += answers(1, finish_reason="content_filter")
    assert len(tune.make_examples(tokenizer, pa.Table.from_pylist(rows))) == 2


def test_further_training_runs_only_if_it_is_an_evaluated_condition(make_jobs):
    (job,) = (j for j in make_jobs(recipe()) if j.stage.name == "persona/tune")
    assert tune.build(job) == StageResult(0)
    assert tune.estimate(job).trained == 0
    (job,) = (j for j in make_jobs(recipe(**TUNED)) if j.stage.name == "persona/tune")
    assert tune.estimate(job).trained > 0
    assert pipeline.NAMES.index("persona/tune") < pipeline.NAMES.index("evaluation/answers")
