"""Ray Train with TRL and PEFT on a model of two layers: real training, no meaning."""

import json

import pyarrow as pa
import pytest
from samples import ECHO_ROLE, recipe_of

from opencharacter import models, pipeline
from opencharacter.config import Placement, per_step
from opencharacter.distillation import pairs
from opencharacter.errors import UserError
from opencharacter.introspection import transcripts
from opencharacter.stage import Outcome
from opencharacter.store import Folder

PLACEMENT = Placement.model_validate({"training": {"cpus": 1, "checkpoint_steps": 2}})
OPTIMIZER = {"batch": 4, "epochs": 2, "learning_rate": 0.01}
LORA = {"rank": 8, "alpha": 16}


@pytest.fixture
def jobs(make_jobs, tiny_model, poet):
    role = {**ECHO_ROLE, "model": str(tiny_model), "name": "tiny"}
    section = {"lora": LORA, "optimizer": OPTIMIZER}
    recipe = recipe_of(role, distillation={"dpo": section}, introspection={"sft": section})
    made = {
        job.dataset.removeprefix("tiny/poeticism/"): job for job in make_jobs(recipe, PLACEMENT)
    }
    write_pairs(made["distillation/pairs"])
    write_transcripts(made["introspection/transcripts"])
    return made


def write_pairs(job):
    rows = [
        {
            "id": f"{i:02}",
            "prompt_id": "p",
            "kind": "general",
            "sample": i,
            "prompt": f"Question {i}?",
            "chosen": "The moon sings.",
            "rejected": "It is a satellite of the planet.",
            "drop_reason": "empty" if i == 8 else None,
        }
        for i in range(9)
    ]
    table = pa.Table.from_pylist(rows, schema=pairs.SCHEMA)
    pipeline.finish(job, job.write(table), seconds=1)


def write_transcripts(job):
    messages = [
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "A small tide."},
    ]
    rows = [
        {"id": f"{i}", "kind": "reflection", "messages": messages, "drop_reason": None}
        for i in range(8)
    ]
    table = pa.Table.from_pylist(rows, schema=transcripts.SCHEMA)
    pipeline.finish(job, job.write(table), seconds=1)


def metric(job, name):
    rows = job.store.read_table(job.dataset, "curves").sort_by("step").to_pylist()
    return [row["value"] for row in rows if row["metric"] == name]


def test_dpo_then_sft_then_merge(cpu_ray, jobs, tokenizer):
    dpo, sft, merge = (
        jobs[name] for name in ("distillation/dpo", "introspection/sft", "persona/merge")
    )
    outcome: Outcome = dpo.stage.module.build(dpo)
    assert outcome.rows == 8  # the dropped pair is not trained on
    margins, losses = metric(dpo, "dpo/margin"), metric(dpo, "loss")
    assert len(losses) == 4  # 8 pairs, batch 4, two epochs
    assert margins[0] == pytest.approx(0, abs=1e-3)  # the reference is the model before training
    assert margins[-1] > margins[0]
    assert losses[-1] < losses[0]
    pipeline.finish(dpo, outcome, seconds=1)

    pipeline.finish(sft, sft.stage.module.build(sft), seconds=1)
    learned = metric(sft, "loss")
    assert learned[-1] < learned[0]

    pipeline.finish(merge, merge.stage.module.build(merge), seconds=1)
    folder = Folder(merge.store, f"{merge.dataset}/adapter").local()
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == dpo.recipe.roles.student.model
    assert config["r"] == 16
    stock = tokenizer.chat_template
    assert (folder / "chat_template.jinja").read_text() == stock
    assert models.fold(models.resolve(config["base_model_name_or_path"]), folder).is_dir()


@pytest.mark.parametrize(
    ("batch", "workers", "micro", "expected"),
    [(32, 1, 4, (4, 8)), (32, 8, 8, (4, 1)), (8, 1, 3, (2, 4)), (6, 2, 4, (3, 1))],
)
def test_the_recipes_batch_is_kept_whatever_the_workers(batch, workers, micro, expected):
    training = Placement.model_validate(
        {"training": {"workers": workers, "micro_batch": micro}}
    ).training
    assert per_step(batch, training) == expected


def test_workers_that_cannot_share_a_batch_are_refused():
    training = Placement.model_validate({"training": {"workers": 3}}).training
    with pytest.raises(UserError, match="batch of 32"):
        per_step(32, training)
