"""What `plan` says of hours and price."""

import json

import pytest
import yaml
from samples import ECHO_ROLE, cli, recipe_of

from opencharacter.config import Placement, Room
from opencharacter.cost import Speeds, cost, load_speeds
from opencharacter.errors import UserError
from opencharacter.models import footprint
from opencharacter.stage import Estimate

SPEEDS = Speeds(
    teacher=100,
    student=1000,
    judge=500,
    expander=50,
    training=2000,
    reading=4000,
    engine_start=30,
    pass_start=2,
    training_start=20,
    other=1,
)
PLACEMENT = Placement.model_validate(
    {
        "pools": {"student": {"replicas": 4, "gpus": 0.5}},
        "training": {"workers": 2, "gpus": 1},
        "price_per_gpu_hour": 3,
    }
)
ROOM = Room(cpus=8, gpus=4, memory_gib=64)
STUDENT = {**ECHO_ROLE, "model": "org/student"}


@pytest.fixture
def jobs(make_jobs):
    return {job.stage.name: job for job in make_jobs(recipe_of(STUDENT), PLACEMENT)}


def test_generation_is_shared_by_the_replicas(jobs):
    takes = cost(jobs["introspection/interaction"], Estimate(10, 999, 7_200_000), SPEEDS, ROOM)
    assert takes == (2, 1800, 2)


def test_training_is_shared_by_the_workers(jobs):
    takes = cost(jobs["distillation/dpo"], Estimate(10, trained=14_400_000), SPEEDS, ROOM)
    assert takes == (20, 3600, 2)


def test_what_runs_no_model_holds_nothing(jobs):
    assert cost(jobs["distillation/pairs"], Estimate(10), SPEEDS, ROOM) == (1, 0, 0)


def test_a_missing_speed_is_named(tmp_path):
    (tmp_path / "s.yaml").write_text("teacher: 3\n")
    with pytest.raises(UserError, match="student"):
        load_speeds(str(tmp_path / "s.yaml"))


def test_plan_shows_hours_and_price(tmp_path):
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(SPEEDS.model_dump()))
    options = ["-c", "humor", "--placement", "single-gpu", "--speed", "s.yaml"]
    said = cli("plan", "llama-3.1-8b", *options, cwd=tmp_path).stdout
    assert "GPU-hours" in said
    total = next(line for line in said.splitlines() if line.startswith("total"))
    assert float(total.split()[-1].replace(",", "")) > 1
    assert "engine student: meta-llama/Llama-3.1-8B-Instruct, 1 x 1 GPU, each up to 256" in said
    assert "8,192 tokens a step" in said


def test_a_footprint_counts_key_value_heads_of_all_layers(tmp_path):
    shape = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    inner = {"text_config": {**shape, "hidden_size": 4096}}
    for config in ({**shape, "hidden_size": 4096}, {**shape, "head_dim": 128}, inner):
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "model.safetensors").write_bytes(b"12345")
        assert footprint(tmp_path) == (5, 131_072)
