"""Held-out rows during training, and the trackers of curves and scores."""

import math
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pyarrow as pa
import pytest
import torch
import transformers
from samples import ECHO_ROLE, recipe_of
from test_training import metric, write_pairs, write_transcripts
from trl.trainer import add_fused_lm_head

from opencharacter import pipeline
from opencharacter.config.placement import Placement, Tracking, Training
from opencharacter.config.recipe import Dpo, Lora, Optimizer, Sft
from opencharacter.distillation import dpo
from opencharacter.errors import UserError
from opencharacter.introspection import sft
from opencharacter.planning import preflight
from opencharacter.training import adapters, callbacks, packing, trackers, trainer
from opencharacter.training.batches import PackedBatches, held_out_batch, split_held_out
from opencharacter.training.packing import Tokens

SCORES = [
    {"persona": "poet", "measure": "change", "condition": "full", "about": "warm & dry"}
    | {"value": 0.5, "low": 0.1, "high": 0.9, "n": 4, "unscored": 1},
    {"persona": "poet", "measure": "win_rate", "condition": None, "about": None}
    | {"value": None, "low": None, "high": None, "n": 0, "unscored": 4},
]
METRICS = {
    "poet/change/full/warm _ dry/value": 0.5,
    "poet/change/full/warm _ dry/low": 0.1,
    "poet/change/full/warm _ dry/high": 0.9,
    "poet/change/full/warm _ dry/n": 4.0,
    "poet/change/full/warm _ dry/unscored": 1.0,
}


def placement(**tracking) -> Placement:
    return Placement.model_validate({"tracking": tracking})


# --------------------------------------------------------------------------------- held-out rows


def test_held_out_rows_depend_on_the_ids_alone_and_a_larger_share_adds_to_them():
    rows = pa.table({"id": [f"{i:04}" for i in range(1000)]})
    trained, held_out = split_held_out(rows, 0.1)
    assert 70 < len(held_out) < 130
    assert set(trained["id"].to_pylist()).isdisjoint(held_out["id"].to_pylist())
    assert len(trained) + len(held_out) == 1000
    reversed_rows = rows.take(list(range(999, -1, -1)))
    assert split_held_out(reversed_rows, 0.1)[1].sort_by("id") == held_out
    assert set(held_out["id"].to_pylist()) < set(split_held_out(rows, 0.2)[1]["id"].to_pylist())
    assert split_held_out(rows, 0.0)[0] == rows


def test_all_pairs_of_a_prompt_are_trained_on_or_held_out():
    prompts = [[number] for number in range(40) for _ in range(5)]
    rows = pa.table({"id": [str(i) for i in range(200)], "prompt_ids": prompts})
    trained, held_out = (part["prompt_ids"].to_pylist() for part in split_held_out(rows, 0.3))
    assert held_out
    assert not {p for (p,) in trained} & {p for (p,) in held_out}


def test_a_share_of_zero_leaves_every_fingerprint_as_it_was():
    assert "held_out" not in Dpo().identity()
    assert "held_out" not in Sft(held_out=0.0).identity()
    assert Dpo(held_out=0.1).identity()["held_out"] == 0.1


def test_held_out_rows_are_not_counted_as_trained_by_a_plan(make_jobs):
    def trained(share: float) -> int:
        recipe = recipe_of(ECHO_ROLE, distillation={"dpo": {"held_out": share}})
        job = next(j for j in make_jobs(recipe) if j.stage.name == "distillation/dpo")
        return dpo.estimate(job).trained

    assert trained(0.25) == int(trained(0.0) * 0.75)


def test_held_out_packs_are_divided_among_workers_and_their_losses_add_up():
    examples = [[Tokens([1] * length, [1, 2])] for length in (4, 5, 6, 7, 8)]
    whole = held_out_batch(examples, 12, 0, 1)
    parts = [held_out_batch(examples, 12, rank, 2) for rank in range(2)]
    assert whole is not None
    assert all(part is not None and part[1] == whole[1] for part in parts)
    count = sum(len(pack.scored_positions) for part in parts for pack in part[0])  # pyright: ignore[reportOptionalSubscript]
    assert count == sum(len(pack.scored_positions) for pack in whole[0]) == 10
    assert held_out_batch([], 12, 0, 1) is None


@pytest.mark.parametrize(("steps", "measured"), [(3, [1, 2, 3]), (25, [*range(2, 25, 2), 25])])
def test_held_out_rows_are_measured_about_ten_times_and_after_the_last_step(steps, measured):
    assert [s for s in range(1, steps + 1) if callbacks.is_measured_after(s, steps)] == measured


def losses(tiny_model, scratch, held_out):
    """The log of three steps on a tiny model."""
    packing.register()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_model, dtype=torch.float32, attn_implementation=packing.ATTENTION
    )
    add_fused_lm_head(model)
    transformers.set_seed(0)
    peft_model = adapters.add_lora(model, Lora(rank=4, alpha=8), False)
    examples = [[Tokens([1, *range(5, 5 + 3 * n)], [*range(2, 3 * n)])] for n in (2, 3, 4)]
    optimizer = Optimizer(global_batch_size=1, learning_rate=0.05)
    task: Any = SimpleNamespace(optimizer=optimizer, placement=Training(), seed=0, dataset="x")
    arguments = trainer.trainer_arguments(task, str(scratch), on_gpu=False, model=peft_model)
    arguments |= {"report_to": [], "save_strategy": "no", "bf16": False}
    runner = trainer.PackedTrainer(
        model=peft_model,
        args=transformers.TrainingArguments(**arguments),
        batches=PackedBatches(examples, optimizer, 0, 64),
        loss_fn=sft.sft_loss,
        held_out=held_out_batch(examples if held_out else [], 16, 0, 1),
    )
    runner.train()
    return runner.state.log_history


def test_the_held_out_loss_is_measured_and_does_not_change_the_training(tiny_model, tmp_path):
    with_it = losses(tiny_model, tmp_path, held_out=True)
    without = losses(tiny_model, tmp_path, held_out=False)
    trained = [[e["loss"] for e in log if "loss" in e] for log in (with_it, without)]
    assert trained[0] == trained[1]
    measured = [(e["step"], e["eval_loss"]) for e in with_it if "eval_loss" in e]
    assert [step for step, _ in measured] == [0, 1, 2, 3]
    assert measured[-1][1] < measured[0][1]  # here the held-out rows are those of the training
    assert "eval_loss" in trainer.summarize_curves(trainer.curves_table(with_it))


# --------------------------------------------------------------------------------------- trackers


def test_trackers_are_those_of_the_placement_or_tensorboard_and_wandb_with_its_key(monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert trackers.selected(Tracking()) == ("tensorboard",)
    monkeypatch.setenv("WANDB_API_KEY", "key")
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: name == "wandb")
    assert trackers.selected(Tracking()) == ("tensorboard", "wandb")
    assert trackers.selected(Tracking(trackers=())) == ()
    assert trackers.selected(Tracking(trackers=("mlflow", "mlflow"))) == ("mlflow",)


def test_a_tracker_that_is_not_installed_is_refused_before_a_run(
    monkeypatch, make_jobs, echo_recipe
):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    jobs = make_jobs(echo_recipe, placement(trackers=["tensorboard", "trackio"]))
    training = [job for job in jobs if job.stage.name == "distillation/dpo"]
    with pytest.raises(UserError, match="trackio is not installed; pip install trackio"):
        preflight.check_training(training)


def test_trackers_are_configured_by_the_placement(monkeypatch):
    tracking = Tracking(
        trackers=("mlflow", "trackio"), project="poets", mlflow_uri="sqlite:///m.db"
    )
    assert trackers.environment(tracking, "events") == {
        "TENSORBOARD_LOGGING_DIR": "events",
        "WANDB_PROJECT": "poets",
        "MLFLOW_EXPERIMENT_NAME": "poets",
        "MLFLOW_TRACKING_URI": "sqlite:///m.db",
    }
    values = trackers.arguments(tracking, "s/poet/dpo")
    assert values == {
        "report_to": ["mlflow", "trackio"],
        "run_name": "s/poet/dpo",
        "project": "poets",
        "trackio_space_id": None,
        "trackio_static_space_id": False,
    }
    assert set(values) <= set(transformers.TrainingArguments.__dataclass_fields__)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert trackers.environment(Tracking(), "e") == {"TENSORBOARD_LOGGING_DIR": "e"}


def test_scores_become_metrics_and_missing_ones_are_left_out():
    assert trackers.score_metrics(SCORES) == METRICS


class FakeRun:
    """A run of a tracker that records what is logged."""

    seen: ClassVar[list] = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        FakeRun.seen.append("end")

    def log(self, metrics):
        FakeRun.seen.append(metrics)


def fake_modules() -> dict[str, Any]:
    def noted(name, result=None):
        return lambda *a, **k: FakeRun.seen.append((name, *a, k)) or result

    wandb, mlflow, trackio = (types.ModuleType(name) for name in ("wandb", "mlflow", "trackio"))
    wandb.__dict__["init"] = noted("wandb", FakeRun())
    for name in ("set_tracking_uri", "set_experiment", "log_metrics"):
        mlflow.__dict__[name] = noted(name)
    mlflow.__dict__["start_run"] = noted("start_run", FakeRun())
    for name in ("init", "log", "finish"):
        trackio.__dict__[name] = noted(name)
    return {"wandb": wandb, "mlflow": mlflow, "trackio": trackio}


def test_scores_are_logged_to_each_tracker_and_to_storage(
    monkeypatch, make_jobs, echo_recipe, store
):
    for name, module in fake_modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: name)
    FakeRun.seen.clear()
    names = ["tensorboard", "wandb", "mlflow", "trackio"]
    job = make_jobs(echo_recipe, placement(trackers=names, project="p", mlflow_uri="u"))[-1]
    trackers.log_scores(job, SCORES)
    name = "echo/evaluation/report"
    assert FakeRun.seen == [
        ("wandb", {"project": "p", "name": name}),
        METRICS,
        "end",
        ("set_tracking_uri", "u", {}),
        ("set_experiment", "p", {}),
        ("start_run", {"run_name": name}),
        ("log_metrics", METRICS, {}),
        "end",
        ("init", {"project": "p", "name": name, "space_id": None, "resume": "allow"}),
        ("log", METRICS, {}),
        ("finish", {}),
    ]
    assert list(Path(store.url, job.dataset, "tensorboard").iterdir())


def test_a_tracker_that_fails_is_reported_and_does_not_stop_the_report(
    monkeypatch, make_jobs, echo_recipe, capsys
):
    def refuse(*_):
        raise ConnectionError("no route\nto it")

    monkeypatch.setitem(trackers.LOG, "mlflow", refuse)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: name)
    job = make_jobs(echo_recipe, placement(trackers=["mlflow"]))[-1]
    trackers.log_scores(job, SCORES)
    assert "scores were not logged to mlflow: no route" in capsys.readouterr().out


@pytest.mark.slow
def test_dpo_and_sft_measure_held_out_rows_and_train_on_the_others(cpu_ray, make_jobs, tiny_model):
    role = {**ECHO_ROLE, "model": str(tiny_model), "name": "tiny"}
    section = {"lora": {"rank": 8, "alpha": 16}, "held_out": 0.3}
    section["optimizer"] = {"global_batch_size": 4, "learning_rate": 0.01}
    recipe = recipe_of(role, distillation={"dpo": section}, introspection={"sft": section})
    local = Placement.model_validate({"training": {"cpus": 1}})
    jobs = {job.stage.name: job for job in make_jobs(recipe, local) if job.constitution}
    write_pairs(jobs["distillation/pairs"])
    write_transcripts(jobs["introspection/transcripts"])
    reference = jobs["distillation/reference"]
    pipeline.finish(reference, reference.stage.module.build(reference), 1)
    for stage, rows, names in (
        ("distillation/dpo", 8, dpo.HELD_OUT_CURVES),
        ("introspection/sft", 8, ("eval_loss",)),
    ):
        job = jobs[stage]
        result = job.stage.module.build(job)
        held_out = result.figures["held_out_rows"]
        assert 0 < held_out < rows
        assert result.rows == rows - held_out
        for name in names:
            assert len(metric(job, name)) == 1 + math.ceil(result.rows / 4)
            assert result.figures[name] == metric(job, name)[-1]
        pipeline.finish(job, result, 1)
        (section_of_report,) = job.stage.module.report(job)
        ((_, curves),) = section_of_report.trainings.items()
        assert set(names) <= {curve.metric for curve in curves}
