"""The predictions of `plan`: time, GPU-hours and price."""

import asyncio
import json
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import pyarrow as pa
import pytest
import yaml
from samples import ECHO_ROLE, cli, recipe_of

from opencharacter import pipeline
from opencharacter.api import Run
from opencharacter.cli.plan import missing_here
from opencharacter.config.placement import Placement, Resources
from opencharacter.constitution import schema
from opencharacter.distillation.teacher import context_messages, expected_tokens
from opencharacter.engines.conversations import ROW_FIELDS, Conversation
from opencharacter.engines.spec import FirstToken, Reply
from opencharacter.errors import UserError
from opencharacter.evaluation import capabilities
from opencharacter.models import memory_footprint
from opencharacter.planning.cost import Cost, cost, planning_resources
from opencharacter.planning.simulation import (
    WarmEngines,
    critical_path,
    plan,
    simulate,
    wall_seconds,
)
from opencharacter.planning.speeds import Speeds, load_speeds, measure_speeds
from opencharacter.runtime.schedule import keys
from opencharacter.runtime.stage import Estimate
from opencharacter.text.chat import row_seed

SPEEDS = Speeds(
    teacher=100,
    student=1000,
    judge=500,
    prompt_generator=50,
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
ROOMY = Resources(cpus=99, gpus=99, memory_gib=999)
ROOM = Resources(cpus=8, gpus=4, memory_gib=64)
STUDENT = {**ECHO_ROLE, "model": "org/student"}
GAMES, ANSWERS = "evaluation/preferences", "evaluation/answers"
REFLECTION = "introspection/reflection"


@pytest.fixture
def jobs(make_jobs):
    return {job.stage.name: job for job in make_jobs(recipe_of(STUDENT), PLACEMENT)}


def test_generation_time_is_divided_by_the_replicas(jobs):
    takes = cost(jobs["introspection/interaction"], Estimate(10, 999, 7_200_000), SPEEDS, ROOM)
    assert takes[:3] == (2, 1800, 2)


def test_training_time_is_divided_by_the_workers(jobs):
    takes = cost(jobs["distillation/dpo"], Estimate(10, trained=14_400_000), SPEEDS, ROOM)
    assert takes[:3] == (20, 3600, 2)


def test_jobs_without_a_model_request_no_gpu(jobs):
    assert cost(jobs["distillation/pairs"], Estimate(10), SPEEDS, ROOM)[:3] == (1, 0, 0)


def test_single_process_training_is_not_divided_by_the_workers(make_jobs):
    evaluation = {
        "answers": {
            "conditions": ["base", "steered", "full"],
            "count": 8,
            "sampling": {"max_tokens": 99, "typical_tokens": 10},
        },
        "attacks": {"conditions": ["base", "full"]},
        "robustness": {"classifier": "org/encoder"},
        "capabilities": {"tasks": [{"task": "commonplace"}]},
    }
    made = make_jobs(recipe_of(STUDENT, evaluation=evaluation), PLACEMENT)
    jobs = {job.stage.name: job for job in made}
    estimates = {}
    for name in ("capabilities", "steering", "robustness"):
        job = jobs[f"evaluation/{name}"]
        found = estimates[name] = job.stage.module.estimate(job)
        takes = cost(job, found, SPEEDS, ROOM)
        assert takes.fixed == SPEEDS.training_start
        assert takes.work == found.trained / SPEEDS.training + found.read / SPEEDS.reading > 0
    assert estimates["capabilities"].read == 80 * 300
    assert estimates["capabilities"].rows == 80 * 7  # by likelihood, and six values in chat
    # Under each of two conditions 8 answers and 8 of base's, learned from by four of five.
    assert estimates["robustness"].trained == 2 * (8 + 8) * 10 * 4


def test_a_plan_counts_the_rows_of_every_document_and_metric(make_jobs):
    tasks = [{"task": name} for name in ("mmlu", "hellaswag", "winogrande")]
    for documents, rows in ((10, 57 * 10 + 2 * 10 + 10), (None, 14042 + 2 * 10042 + 1267)):
        settings = {"capabilities": {"tasks": tasks, "documents": documents}}
        for job in make_jobs(recipe_of(STUDENT, evaluation=settings)):
            if job.stage.name == "evaluation/capabilities":
                assert capabilities.estimate(job).rows == rows


def test_a_plan_counts_the_constitution_in_prompts_of_the_prompted_student(make_jobs, poet):
    def tokens_in(conditions):
        stages = ("answers", "preferences", "attacks")
        settings = {name: {"conditions": conditions} for name in stages}
        settings["answers"]["count"], settings["preferences"]["games"] = 10, 20
        settings["attacks"]["prompts"] = 5
        made = make_jobs(recipe_of(STUDENT, evaluation=settings))
        jobs = {job.stage.name: job for job in made if job.constitution is not None}
        found = {name: jobs[f"evaluation/{name}"] for name in stages}
        counts = {name: job.stage.module.estimate(job) for name, job in found.items()}
        return {name: count.tokens_in for name, count in counts.items()}, found["attacks"]

    prompted, job = tokens_in(["base", "prompted", "full"])
    distilled, _ = tokens_in(["base", "distilled", "full"])
    (context,) = context_messages(poet, exemplars=False)
    prefix = len(context["content"]) // 4
    assert prefix > 300
    requests = {"answers": 10, "preferences": 20, "attacks": 5 * len(job.config.kinds)}
    for name, count in requests.items():
        assert prompted[name] - distilled[name] == count * prefix


class CountedJudge:
    """An engine with log-probabilities that counts the tokens of the verdicts it gives."""

    def __init__(self):
        self.tokens = 0

    async def reply(self, messages, sampling, *, seed, prefill=""):
        listed = (("Yes", -1.5), ("no", -2.5), ("A", -1.5), ("B", -2.5), ("poetic", -1.5))
        tokens = 1 if isinstance(sampling, FirstToken) else 4
        self.tokens += tokens
        return Reply("Yes, poetic.", "stop", 9, tokens, 0, listed if tokens == 1 else ())


class Student:
    async def reply(self, messages, sampling, *, seed, prefill=""):
        return Reply(f"An answer to {seed}.", "stop", 9, 5, 0)


def run_here(monkeypatch):
    """Run the row functions of stages in this process; return the judge."""
    engines = {"judge": CountedJudge(), "student": Student()}

    def generate(job, requests, row_fn, role, fields, *_, partner="", **__):
        def row_of(request):
            row = dict(request)
            conversation = Conversation(engines[role], row_seed(1, role, row["id"]))
            if partner:
                conversation.partner = Conversation(engines[partner], 1)
            return row | asyncio.run(row_fn(row, conversation)) | {"drop_reason": None}

        rows = [row_of(request) for request in requests]
        table = pa.Table.from_pylist(rows, pa.schema([ROW_FIELDS[0], *fields, *ROW_FIELDS[1:]]))
        return SimpleNamespace(table=lambda: table)

    monkeypatch.setattr("opencharacter.engines.generate.generate", generate)
    monkeypatch.setattr("opencharacter.engines.generate.fit_together", lambda *_: True)
    monkeypatch.setattr("opencharacter.evaluation.drift.acquire", lambda *_: nullcontext())
    return engines["judge"]


@pytest.mark.parametrize("kind", ["log_probability", "text"])
def test_a_plan_counts_every_question_that_a_run_asks_the_judge(make_jobs, monkeypatch, kind):
    settings = {
        "judge": {"gold_items": 4, "min_agreement": None, "verdicts": kind},
        "answers": {"count": 6},
        "preferences": {"games": 6, "traits": ["poetic", "technical"]},
        "coherence": {"prompts": 3},
        "scenarios": {"occasions": 2, "pressures": 1, "assertions": 2},
        "adherence": {"control_texts": 3},
        "drift": {"conversations": 2, "turns": 6, "judged_turns": 3},
        "side_effects": {"items": 2},
    }
    counted = run_here(monkeypatch)
    planned = {}
    for job in make_jobs(recipe_of(STUDENT, evaluation=settings)):
        name = job.stage.name.removeprefix("evaluation/")
        if name == "scenarios":
            rows = [
                {"id": f"{n}", "trait": n % 2, "kind": "occasion", "turns": ["Hello."]}
                for n in range(6)
            ]
        elif job.stage.name.startswith("evaluation/") and name in settings:
            counted.tokens = 0
            job.stage.module.build(job)
            found = job.stage.module.estimate(job)
            verdicts = found.judged or (found.tokens_out if name != "answers" else 0)
            planned[job.dataset] = (verdicts, counted.tokens)
            continue
        else:
            rows = [{"id": "1", "prompt": "What is a poem?"}]
        table = pa.Table.from_pylist(rows)
        job.store.write_tables(job.dataset, [table], table.schema)
    assert len(planned) == 9  # judge, answers and games of base and of the persona, four more
    assert all(expected == asked for expected, asked in planned.values()), planned


@pytest.mark.parametrize(("author", "work"), [("student", 1800), ("teacher", 72_000)])
def test_introspection_is_planned_with_the_speed_of_its_author(make_jobs, author, work):
    recipe = recipe_of(STUDENT, introspection={"author": author})
    (job,) = (
        job for job in make_jobs(recipe, PLACEMENT) if job.stage.name == "introspection/reflection"
    )
    assert job.writer == author
    assert cost(job, Estimate(10, 999, 7_200_000), SPEEDS, ROOM).work == work


# --------------------------------------------------------------------------------- from manifests


def manifest_of(stage: str, roles: list[str], seconds: float, **fields) -> dict:
    """The manifest of 100 s of work, in which four replicas generated 100,000 tokens."""
    made = {
        "stage": stage,
        "payload": {"roles": dict.fromkeys(roles)},
        "fingerprint": stage,
        "placement": PLACEMENT.model_dump(mode="json"),
        "writer": None,
        "seconds": seconds,
        "starting_seconds": 0,
        "busy_seconds": 100,
        "work_seconds": 100,
        "engine_share": 1,
        "held_seconds": seconds,
        "phases": 1,
        "engines_started": [],
        "tokens_out": 100_000,
        "figures": {},
    }
    return made | fields


def speeds_of(store, *manifests: dict) -> Speeds:
    read = {"figures": {"tokens_read": 60_000}, "tokens_out": 0}
    trained = {"figures": {"tokens_per_s": 500}, "tokens_out": 0}
    others = [
        manifest_of("distillation/reference", ["student"], 101, **read),
        manifest_of("distillation/dpo", ["student"], 110, **trained),
    ]
    for manifest in [*others, *manifests]:
        store.write_manifest(manifest["stage"], manifest)
    return measure_speeds(store.url)


def test_a_concurrent_judge_does_not_lower_the_measured_speed(store):
    both = {"writer": "student", "busy_seconds": 200, "held_seconds": 240}
    speeds = speeds_of(store, manifest_of(GAMES, ["student", "judge"], 120, **both))
    assert speeds.student == speeds.stages[GAMES] == 100_000 / (100 * 4)
    assert speeds.pass_start == 20
    assert speeds.reading == 60_000 / (100 * 2)


def test_jobs_that_shared_an_engine_had_half_its_speed_each(store):
    half = {"writer": "student", "busy_seconds": 50, "engine_share": 0.5}
    speeds = speeds_of(store, manifest_of(ANSWERS, ["student"], 104, **half))
    assert speeds.student == 100_000 / (100 * 0.5 * 4)
    assert speeds.pass_start == 4


def test_a_measured_speed_belongs_to_the_role_that_generated(store):
    student = manifest_of(ANSWERS, ["student"], 100, writer="student")
    teacher = manifest_of(REFLECTION, ["student"], 100, writer="teacher", tokens_out=3_000)
    speeds = speeds_of(store, student, teacher)
    assert (speeds.student, speeds.teacher) == (250, 30)
    assert speeds.stages[REFLECTION] == 30


def test_speeds_of_a_storage_of_the_first_version_are_refused(store):
    store.write_json("echo/evaluation/answers/manifest.json", {"format_version": 1})
    with pytest.raises(UserError, match=r"evaluation/answers was written by opencharacter 0\.1"):
        measure_speeds(store.url)


def test_a_missing_speed_is_refused_by_name(tmp_path):
    (tmp_path / "s.yaml").write_text("teacher: 3\n")
    with pytest.raises(UserError, match="student"):
        load_speeds(str(tmp_path / "s.yaml"))


def test_a_plan_reports_a_missing_gpu_only_for_models_with_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    recipe = tmp_path / "echo.yaml"
    recipe.write_text(recipe_of(ECHO_ROLE | {"model": "echo:1"}).model_dump_json())
    gpus = tmp_path / "gpus.yaml"
    gpus.write_text("pools: {student: {gpus: 1}}\n")

    def lacks_gpu(name: str, placement: Path | None) -> bool:
        asked = Run(name, ["humor"], placement and str(placement), str(tmp_path))
        return any("a GPU" in line for line in missing_here(asked))

    assert not lacks_gpu(str(recipe), gpus)
    assert not lacks_gpu("llama-3.1-8b", None)
    assert lacks_gpu("llama-3.1-8b", gpus)


def test_a_plan_shows_hours_and_price(tmp_path):
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(SPEEDS.model_dump()))
    options = ["-c", "humor", "--placement", "single-gpu", "--speed", "s.yaml"]
    output = cli("plan", "llama-3.1-8b", *options, cwd=tmp_path).stdout
    assert "GPU-hours" in output
    total = next(line for line in output.splitlines() if line.startswith("total"))
    hours, gpu_hours, idle = total.split()[-3:]  # the placement names no price
    assert float(hours.replace(",", "")) > 1
    assert float(gpu_hours.replace(",", "")) > 1
    assert idle.endswith("%")
    assert "wall time" in output
    assert "GPUs: 1" in output
    assert "critical path: distillation/teacher" in output
    assert "K 5 -> 3 answers: " in output
    assert "25,000 -> 12,500 games: " in output
    assert "ratings +-36 -> +-51 points" in output
    assert "engine student: meta-llama/Llama-3.1-8B-Instruct, 1 x 1 GPU, each up to 256" in output
    assert "8,192 tokens a step" in output


def test_the_kv_cache_size_counts_key_value_heads_of_all_layers(tmp_path):
    shape = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    inner = {"text_config": {**shape, "hidden_size": 4096}}
    for config in ({**shape, "hidden_size": 4096}, {**shape, "head_dim": 128}, inner):
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "model.safetensors").write_bytes(b"12345")
        assert memory_footprint(tmp_path) == (5, 131_072)


# ---------------------------------------------------------------------------------- simulation


def planned(store, cluster: Resources | None = None) -> list:
    """The plan of three personas of which nothing is done."""
    return plan(three(store, PLACEMENT.model_copy(update={"cluster": cluster})), SPEEDS)


def three(store, placement: Placement) -> list:
    personas = schema.load_all(["humor", "poeticism", "remorse"])
    return pipeline.jobs(recipe_of(STUDENT), personas, placement, store)


def test_a_plan_starts_each_engine_once_if_all_fit_and_weights_cannot_be_swapped(store):
    pools = PLACEMENT.pools.model_dump()
    pools["student"]["engine_kwargs"] = {"quantization": "fp8"}
    placement = Placement.model_validate({**PLACEMENT.model_dump(), "pools": pools})
    placement = placement.model_copy(update={"cluster": ROOMY})
    jobs, done = three(store, placement), plan(three(store, placement), SPEEDS)
    engines = {key for job in jobs for key in keys(job) if "workers" not in key}
    assert sum(one.starts for one in done) == len(engines)
    assert sum(one.swaps for one in done) == 0
    assert sum(one.starts for one in planned(store, ROOMY)) < len(engines)
    assert {one.job.dataset for one in done} == {job.dataset for job in jobs if job.is_enabled}


def test_a_smaller_cluster_needs_more_time_and_engine_starts(store):
    large, small = planned(store, ROOMY), planned(store)
    assert small[-1].ended > large[-1].ended
    assert sum(one.starts for one in small) > sum(one.starts for one in large)
    for done in (small, large):
        ended = {one.job.dataset: one.ended for one in done}
        for one in done:
            parents = (parent for parent in one.job.parents if parent.is_enabled)
            assert all(ended[parent.dataset] <= one.began for parent in parents)
            assert one.gpu_busy_seconds <= one.gpu_seconds + 1e-6


def test_the_critical_path_has_no_gaps(store):
    path = critical_path(planned(store))
    assert path[0].began == 0
    assert [one.ended for one in path[:-1]] == [one.began for one in path[1:]]


def test_jobs_that_use_one_engine_share_its_speed(store):
    jobs = [job for job in three(store, PLACEMENT) if job.stage.name == "distillation/teacher"]
    costs = {job.dataset: Cost(0, 10, 0) for job in jobs}
    done = simulate(jobs[:2], costs, 30, 5, ROOM)
    assert [one.ended for one in done] == [50, 50]
    assert [one.starts for one in done] == [1, 0]


def test_training_stops_an_engine_that_does_not_fit_beside_it(store):
    jobs = {job.dataset: job for job in three(store, PLACEMENT)}
    names = ("echo/distillation/student", "echo/humor/distillation/dpo")
    student, training = (jobs[name] for name in names)
    engines = WarmEngines(30, 5)
    small = Resources(cpus=8, gpus=2, memory_gib=64)
    assert engines.acquire(student, [], small, 0) == (1, 0, 30, 0)
    engines.release([training, student], [], 40)
    assert engines.acquire(training, [], small, 50) == (0, 0, 0, 0)
    assert engines.engines == {}


@pytest.mark.slow
def test_a_plan_predicts_the_duration_of_an_echo_run(cpu_ray, store):
    """Predicts two personas from the overhead that was measured on another."""
    seconds, seats = 1.0, 4
    placement = Placement.model_validate(
        {
            "pools": {role: {"max_num_seqs": seats} for role in ("teacher", "student")},
            "ray_cpus": 2,
        }
    )
    recipe = recipe_of({**ECHO_ROLE, "model": f"echo:{seconds}"})
    made = recipe.distillation
    speeds = SPEEDS.model_copy(
        update={
            "teacher": seats * expected_tokens(made.teacher.sampling) / seconds,
            "student": seats * expected_tokens(made.student.sampling) / seconds,
            "pass_start": 0,
            "other": 0,
        }
    )

    def jobs_of(*names: str) -> list:
        personas = schema.load_all(list(names))
        made = pipeline.jobs(recipe, personas, placement, store)
        return pipeline.select(made, until="distillation/pairs")

    general = [job for job in jobs_of("humor") if job.scope == "echo"]
    assert len(list(pipeline.run(general))) == 1  # includes what is slow only the first time
    beside = []
    for job, manifest in pipeline.run(jobs_of("humor")):
        work = cost(job, job.stage.module.estimate(job), speeds, planning_resources(placement)).work
        if work:
            beside.append(manifest["seconds"] - work)
    speeds = speeds.model_copy(update={"pass_start": median(beside)})
    left = [job for job in jobs_of("poeticism", "remorse") if job.state()[0] != "done"]
    predicted = wall_seconds(plan(left, speeds))
    began = time.monotonic()
    assert len(list(pipeline.run(left))) == len(left) == 8
    took = time.monotonic() - began
    assert predicted == pytest.approx(took, rel=0.25), speeds.pass_start
