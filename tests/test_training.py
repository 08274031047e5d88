"""Training on Ray Train with PEFT, on a random model of two layers."""

import json
import os
import subprocess
import threading
import time
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
import transformers
from process_tree import descendants
from ray import cloudpickle
from samples import ECHO_ROLE, recipe_of
from trl.trainer import add_fused_lm_head

from opencharacter import models, pipeline
from opencharacter.config.placement import Placement, Training
from opencharacter.config.recipe import Lora, Optimizer, Recipe
from opencharacter.constitution import schema
from opencharacter.distillation import pairs
from opencharacter.errors import StageFailed
from opencharacter.introspection import sft, transcripts
from opencharacter.runtime.stage import StageResult
from opencharacter.runtime.store import RemoteDir, Store
from opencharacter.training import adapters, packing, trainer
from opencharacter.training.batches import PackedBatches
from opencharacter.training.packing import Tokens

PLACEMENT = Placement.model_validate({"training": {"cpus": 1, "checkpoint_steps": 2}})
OPTIMIZER = {"global_batch_size": 4, "epochs": 2, "learning_rate": 0.01}
LORA = {"rank": 8, "alpha": 16}


@pytest.fixture
def jobs(make_jobs, tiny_model):
    return ready(make_jobs, tiny_model)


def ready(make_jobs, model):
    """The jobs of a student with its training data in storage, by name."""
    role = {**ECHO_ROLE, "model": str(model), "name": "tiny"}
    section = {"lora": LORA, "optimizer": OPTIMIZER}
    recipe = recipe_of(role, distillation={"dpo": section}, introspection={"sft": section})
    jobs = {
        job.dataset.removeprefix("tiny/poeticism/"): job for job in make_jobs(recipe, PLACEMENT)
    }
    write_pairs(jobs["distillation/pairs"])
    write_transcripts(jobs["introspection/transcripts"])
    return jobs


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


def build(job) -> StageResult:
    return job.stage.module.build(job)


def packed_trainer(
    path: Path, scratch: Path, activation_checkpointing: bool = False, loss_fn: Any = sft.sft_loss
) -> trainer.PackedTrainer:
    """A trainer of two steps in bf16 with the adapters in float32, as on a GPU."""
    packing.register()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, attn_implementation=packing.ATTENTION
    )
    add_fused_lm_head(model)
    transformers.set_seed(0)
    peft_model = adapters.add_lora(model, Lora(rank=4, alpha=8), activation_checkpointing)
    sequences = [Tokens([1, *range(5, 5 + 3 * n)], [*range(2, 3 * n)]) for n in (2, 3, 4, 5)]
    optimizer = Optimizer(global_batch_size=2)
    task: Any = SimpleNamespace(optimizer=optimizer, placement=Training(), seed=0, dataset="x")
    arguments = trainer.trainer_arguments(task, str(scratch), on_gpu=False, model=peft_model)
    arguments |= {"report_to": [], "save_strategy": "no"}
    return trainer.PackedTrainer(
        model=peft_model,
        args=transformers.TrainingArguments(**arguments),
        batches=PackedBatches([[sequence] for sequence in sequences], optimizer, 0, 16),
        loss_fn=loss_fn,
    )


def steps(path: Path, scratch: Path, activation_checkpointing: bool) -> list[float]:
    """Losses and gradient norms of two steps."""
    runner = packed_trainer(path, scratch, activation_checkpointing)
    runner.train()
    logs = [entry for entry in runner.state.log_history if "loss" in entry]
    return [entry[name] for entry in logs for name in ("loss", "grad_norm")]


@pytest.fixture
def bf16(monkeypatch):
    """Training under autocast, also on a CPU that does not multiply bf16 in hardware."""
    monkeypatch.setattr(models, "fast_bf16", lambda: True)


def test_activation_checkpointing_does_not_change_the_result(bf16, tiny_model, tmp_path):
    expected = steps(tiny_model, tmp_path, activation_checkpointing=False)
    assert len(expected) == 4
    assert steps(tiny_model, tmp_path, activation_checkpointing=True) == pytest.approx(
        expected, rel=1e-3
    )


def test_training_stops_at_the_step_whose_loss_is_not_a_number(bf16, tiny_model, tmp_path):
    """Otherwise it would end, and store an adapter of nan as finished."""

    def diverging(policy, batch, denominators):
        loss = sft.sft_loss(policy, batch, denominators)["loss"]
        return {"loss": loss * torch.log(-torch.ones(()))}

    runner = packed_trainer(tiny_model, tmp_path, loss_fn=diverging)
    with pytest.raises(StageFailed, match=r"diverged at step 1: loss nan.*learning_rate"):
        runner.train()


@pytest.mark.parametrize("loss, grad_norm", [(float("inf"), 1.0), (1.0, float("nan"))])
def test_a_loss_or_a_gradient_that_is_not_finite_is_an_error(loss, grad_norm):
    trainer.check_finite(2.0, 1.0, step=3)
    with pytest.raises(StageFailed, match="step 3"):
        trainer.check_finite(loss, grad_norm, step=3)


def test_the_controller_of_ray_starts_without_the_training_code(store):
    """It would import transformers before it starts the workers, which import it themselves."""
    task = dict.fromkeys(field.name for field in fields(trainer.TrainingTask))
    task |= {"store": store, "dataset": "dpo", "placement": Training()}
    context = trainer.torch_trainer(trainer.TrainingTask(**task)).train_run_context
    assert b"opencharacter.training" not in cloudpickle.dumps(context)


def test_workers_with_different_free_memory_lay_out_the_same_packs(monkeypatch):
    """With plans of their own, they would count some examples twice and leave others out."""
    sizes = (60, 50, 40, 30, 20, 10)
    examples = [[Tokens([size] * size, [1])] for size in sizes]
    plans = [adapters.MemoryPlan(110, False), adapters.MemoryPlan(70, True)]

    def processed(plans):
        batches = [
            PackedBatches(examples, Optimizer(), 0, plan.max_tokens, rank, len(plans))
            for rank, plan in enumerate(plans)
        ]
        tokens = [t for batch in batches for pack in batch[0][0] for t in pack.input_ids[0]]
        return sorted({int(t) for t in tokens} - {0}), sum(int(t) > 0 for t in tokens)

    assert processed(plans) != (sorted(sizes), sum(sizes))
    workers = torch.tensor([[110, 1], [70, 0]])
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr(
        "torch.distributed.all_reduce", lambda own, op: own.copy_(workers.amin(dim=0))
    )
    agreed = [adapters.smallest_plan(plan, "cpu") for plan in plans]
    assert agreed == [adapters.MemoryPlan(70, True)] * 2
    assert processed(agreed) == (sorted(sizes), sum(sizes))


@pytest.mark.parametrize(("layer", "expected"), [("experts", True), ("shared", False)])
def test_ddp_looks_for_unused_parameters_only_with_expert_layers(layer, expected):
    block = torch.nn.ModuleDict({layer: torch.nn.ModuleList([torch.nn.Linear(2, 2)])})
    model: Any = torch.nn.ModuleDict({"mlp": block})
    model._no_split_modules = None
    task: Any = SimpleNamespace(optimizer=Optimizer(), placement=Training(), seed=0, dataset="x")
    arguments = trainer.trainer_arguments(task, "scratch", on_gpu=False, model=model)
    assert arguments["ddp_find_unused_parameters"] is expected


def test_dpo_sft_and_merge_run_in_sequence(cpu_ray, jobs, tokenizer):
    names = ("distillation/reference", "distillation/dpo", "introspection/sft", "persona/merge")
    reference, dpo, sft, merge = (jobs[name] for name in names)
    pipeline.finish(reference, build(reference), seconds=1)
    outcome = build(dpo)
    assert outcome.rows == 8  # the dropped pair is not trained on
    assert outcome.figures["packed"] is True
    margins, losses = metric(dpo, "dpo/margin"), metric(dpo, "loss")
    assert len(losses) == 4  # 8 pairs, batch 4, two epochs
    assert margins[0] == pytest.approx(0, abs=1e-3)  # the reference is the model before training
    assert margins[-1] > margins[0]
    assert losses[-1] < losses[0]
    for name in (
        "grad_norm",
        "learning_rate",
        "tokens_per_s",
        "mfu",
        "dpo/sq_log_ratio",
        "rewards/chosen",
        "rewards/rejected",
        "dpo/accuracy",
    ):
        assert len(metric(dpo, name)) == 4
    events = Path(dpo.store.url, dpo.dataset, "tensorboard").glob("events.out.tfevents.*")
    assert list(events)
    pipeline.finish(dpo, outcome, seconds=1)

    pipeline.finish(sft, build(sft), seconds=1)
    losses = metric(sft, "loss")
    assert losses[-1] < losses[0]

    pipeline.finish(merge, build(merge), seconds=1)
    folder = RemoteDir(merge.store, f"{merge.dataset}/adapter").local()
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == dpo.recipe.roles.student.model
    assert config["r"] == 16
    stock = tokenizer.chat_template
    assert (folder / "chat_template.jinja").read_text() == stock
    assert models.merge_into_base(
        models.resolve(config["base_model_name_or_path"]), folder
    ).is_dir()


@pytest.mark.slow
def test_a_vision_model_is_trained_with_dpo_and_sft(cpu_ray, make_jobs, tiny_gemma):
    jobs = ready(make_jobs, tiny_gemma)
    for name in ("distillation/reference", "distillation/dpo", "introspection/sft"):
        pipeline.finish(jobs[name], build(jobs[name]), seconds=1)
    margins = metric(jobs["distillation/dpo"], "dpo/margin")
    assert margins[0] == pytest.approx(0, abs=1e-3)  # training and reference agree
    assert margins[-1] > margins[0]
    losses = metric(jobs["introspection/sft"], "loss")
    assert losses[-1] < losses[0]
    build(jobs["persona/merge"])
    models.merge_into_base(tiny_gemma, jobs["persona/merge"].adapter.local())


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_workers_take_the_same_steps_as_one(cpu_ray, jobs, strategy):
    pipeline.finish(jobs["distillation/reference"], build(jobs["distillation/reference"]), 1)
    dpo = jobs["distillation/dpo"]

    def placed(**training) -> Placement:
        common = {"cpus": 0.5, "checkpoint_steps": 2, "max_tokens_per_microbatch": 90}
        return Placement.model_validate({"training": common | training})

    build(replace(dpo, placement=placed(workers=1)))
    alone = {name: metric(dpo, name) for name in ("loss", "dpo/margin", "grad_norm")}
    dpo.store.delete(dpo.dataset)
    build(replace(dpo, placement=placed(workers=2, strategy=strategy)))
    assert metric(dpo, "grad_norm")[0] == pytest.approx(alone["grad_norm"][0], rel=2e-2)
    assert metric(dpo, "loss") == pytest.approx(alone["loss"], rel=2e-2)
    # Adam amplifies the rounding errors of bf16.
    assert metric(dpo, "dpo/margin") == pytest.approx(alone["dpo/margin"], abs=0.05)


@pytest.mark.slow
def test_a_killed_worker_does_not_change_the_result(cpu_ray, jobs):
    """After a SIGKILL, a new worker resumes from the checkpoint and reaches the same losses."""
    pipeline.finish(jobs["distillation/reference"], build(jobs["distillation/reference"]), 1)
    dpo = jobs["distillation/dpo"]
    dpo = longer(dpo)
    build(dpo)
    expected = metric(dpo, "loss")
    dpo.store.delete(dpo.dataset)
    killed: list[int] = []

    def kill() -> None:
        snapshot = Path(
            dpo.store.url, dpo.dataset, ".shards/train/checkpoint_manager_snapshot.json"
        )
        while not (snapshot.is_file() and "checkpoint_" in snapshot.read_text()):
            time.sleep(0.05)
        for process in descendants([os.getpid()], "RayTrainWorker"):
            killed.append(process.pid)
            process.kill()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    build(dpo)
    killer.join(timeout=1)
    assert killed
    assert metric(dpo, "loss") == pytest.approx(expected, rel=1e-3)


def longer(job, store=None):
    """The same training with more epochs, optionally in another storage."""
    recipe = job.recipe.model_dump()
    recipe["distillation"]["dpo"]["optimizer"]["epochs"] = 12
    return replace(job, recipe=Recipe.model_validate(recipe), store=store or job.store)


def moved(jobs, store):
    """A longer DPO training in another storage, with its reference."""
    reference = jobs["distillation/reference"]
    pipeline.finish(reference, build(reference), 1)
    store.upload(Path(reference.store.path(reference.dataset)), reference.dataset)
    return longer(jobs["distillation/dpo"], store)


@pytest.mark.slow
def test_training_continues_through_a_storage_outage(cpu_ray, jobs, bucket):
    """The bucket is unavailable for 12 seconds from the first checkpoint on."""
    dpo = moved(jobs, Store.at(bucket.url, retry_seconds=60))
    stopped: list[float] = []

    def interrupt_storage() -> None:
        while not any("/checkpoint_2" in path for path in bucket.paths()):
            time.sleep(0.2)
        bucket.stop()
        stopped.append(time.monotonic())
        time.sleep(12)
        bucket.start()

    threading.Thread(target=interrupt_storage, daemon=True).start()
    build(dpo)
    assert time.monotonic() - stopped[0] > 12
    assert len(metric(dpo, "loss")) == 24
    assert [attempt["kept"] for attempt in dpo.store.attempts(dpo.dataset)] == [0]


@pytest.mark.slow
def test_training_stopped_by_a_full_disk_resumes_once_there_is_space(cpu_ray, jobs, small_disk):
    dpo = moved(jobs, Store(str(small_disk)))
    limits = {"cpus": 1, "checkpoint_steps": 2, "max_failures": 0}
    once = Placement.model_validate({"training": limits})
    dpo = replace(dpo, placement=once)
    with pytest.raises(StageFailed, match="No space left") as failed:
        build(dpo)
    assert "\n" not in str(failed.value)
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    build(dpo)
    assert len(metric(dpo, "loss")) == 24


@pytest.mark.slow
def test_personas_are_trained_concurrently(cpu_ray, jobs, make_jobs):
    """Both trainings start before either ends."""
    placement = Placement.model_validate({"training": {"cpus": 0.5}})
    recipe = jobs["distillation/dpo"].recipe
    names = ("distillation/pairs", "distillation/reference", "distillation/dpo")
    jobs_to_run = [
        job
        for job in pipeline.jobs(
            recipe,
            list(map(schema.load, ("humor", "sarcasm"))),
            placement,
            jobs["distillation/dpo"].store,
        )
        if job.stage.name in names
    ]
    for job in jobs_to_run:
        if job.stage.name == "distillation/pairs":
            write_pairs(job)
    manifests = [(job.dataset, manifest) for job, manifest in pipeline.run(jobs_to_run)]
    trained = {name: manifest for name, manifest in manifests if name.endswith("dpo")}
    assert len(trained) == 2
    assert len(manifests) == 4
    started = [m["attempts"][0]["at"] for m in trained.values()]
    finished = [m["finished"] for m in trained.values()]
    assert max(started) < min(finished)
