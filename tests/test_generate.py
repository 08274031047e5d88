"""Generation with the echo engine: Ray Data, tasks, shards and resuming."""

import warnings
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.util.annotations import RayDeprecationWarning
from samples import ECHO_ROLE, recipe_of

from opencharacter import pipeline
from opencharacter.config.placement import Placement
from opencharacter.config.roles import Sampling
from opencharacter.engines.backends import ENGINE_ERROR
from opencharacter.engines.conversations import ROW_FIELDS, EngineRef, run_conversations
from opencharacter.engines.generate import block_rows, generate, stored_counts
from opencharacter.engines.spec import engine_spec
from opencharacter.errors import RowFailed, StageFailed
from opencharacter.runtime.progress import start_counters
from opencharacter.runtime.store import SHARDS, RemoteDir, Shards, Store
from opencharacter.text.chat import user

FIELDS = [pa.field("prompt", pa.string()), pa.field("answer", pa.string())]
PLACEMENT = Placement.model_validate({"pools": {"teacher": {"replicas": 2, "cpus": 0.2}}})


async def answer(row, conversation):
    if row["prompt"] == "poison":
        raise RowFailed("too_long", "prompt has 9000 tokens")
    reply = await conversation.reply([user(row["prompt"])], Sampling(max_tokens=20))
    return {"answer": reply.text}


def requests(count):
    return [{"id": f"{i:03}", "prompt": f"number {i}"} for i in range(count)]


@pytest.fixture
def job(make_jobs, echo_recipe):
    return make_jobs(echo_recipe, PLACEMENT)[1]


def test_every_id_is_answered_once_and_a_failed_row_is_dropped(cpu_ray, job):
    rows = [*requests(99), {"id": "bad", "prompt": "poison"}]
    table = generate(job, rows, answer, "teacher", FIELDS).table()
    assert table["id"].to_pylist() == sorted(row["id"] for row in rows)
    bad = [row for row in table.to_pylist() if row["drop_reason"]]
    assert [(row["id"], row["drop_reason"]) for row in bad] == [("bad", "too_long")]
    assert all(row["tokens_out"] for row in table.to_pylist() if not row["drop_reason"])


def test_a_rerun_requests_only_missing_rows(cpu_ray, job):
    first = generate(job, requests(20), answer, "teacher", FIELDS).table()
    again = generate(job, requests(50), answer, "teacher", FIELDS).table()
    assert again.num_rows == 50
    assert again.slice(0, 20).equals(first)
    history = job.store.attempts(job.dataset)
    assert [entry["kept"] for entry in history] == [0, 20]


async def fail(row, conversation):
    raise RowFailed(ENGINE_ERROR, "unknown argument")


def test_a_rerun_requests_rows_with_engine_errors_again(cpu_ray, job):
    first = generate(job, requests(20), fail, "teacher", FIELDS).table()
    assert first["drop_reason"].to_pylist() == [ENGINE_ERROR] * 20
    again = generate(job, requests(20), answer, "teacher", FIELDS).table()
    assert again["drop_reason"].null_count == 20


def test_a_stage_fails_after_fifty_leading_engine_errors(cpu_ray, job):
    with pytest.raises(
        StageFailed, match=r"first 50 conversations .* the last error: unknown argument"
    ):
        generate(job, requests(5000), fail, "teacher", FIELDS)
    assert sum(len(table) for table in shards_of(job)) < 1000


def shards_of(job):
    schema = pa.schema([ROW_FIELDS[0], *FIELDS, *ROW_FIELDS[1:]])
    return Shards(RemoteDir(job.store, f"{job.dataset}/{SHARDS}"), schema)


def test_answers_do_not_depend_on_blocks_or_replicas(cpu_ray, make_jobs, echo_recipe, tmp_path):
    one_replica = make_jobs(echo_recipe, Placement())[1]
    other_store = Store(str(tmp_path / "elsewhere"))
    two_replicas = replace(make_jobs(echo_recipe, PLACEMENT)[1], store=other_store)
    forwards = generate(one_replica, requests(30), answer, "teacher", FIELDS).table()
    backwards = generate(two_replicas, requests(30)[::-1], answer, "teacher", FIELDS).table()
    assert forwards.equals(backwards)


def test_a_repeated_task_skips_the_rows_that_its_predecessor_stored(cpu_ray, job):
    """Ray repeats a lost task with the same block."""
    shards, block = shards_of(job), pa.Table.from_pylist(requests(30))
    counters = start_counters(job.dataset, gpus=0)

    def run_task():
        tables = run_conversations(
            block,
            engine_ref=EngineRef(engine_spec(job, "teacher"), None),
            partner=None,
            row_fn=answer,
            shards=shards,
            stage=job.stage.name,
            seed=0,
            counters=counters,
        )
        return sum(table["stored"][0].as_py() for table in tables)

    assert run_task() == 30
    (file,) = shards.files()
    pq.write_table(pq.read_table(file).slice(0, 10), file)
    assert run_task() == 20
    assert [row["id"] for row in shards.table().to_pylist()] == [f"{i:03}" for i in range(30)]
    counters.end.remote()


def test_an_echo_run_makes_pairs_and_a_second_run_does_nothing(cpu_ray, make_jobs, echo_recipe):
    jobs = pipeline.select(make_jobs(echo_recipe), until="distillation/pairs")
    ran = [job.dataset for job, _ in pipeline.run(jobs)]
    assert sorted(ran) == sorted(job.dataset for job in jobs)
    pairs = jobs[-1].read("distillation/teacher")
    assert pairs.num_rows == 2 * (10 + 6)
    manifest = jobs[-1].store.manifest(jobs[-1].dataset)
    assert manifest["rows"] == 32
    assert list(pipeline.run(jobs)) == []
    assert jobs[1].store.attempts(jobs[1].dataset) == []  # the shards are deleted


def test_too_many_dropped_rows_fail_the_stage_with_the_main_reason(cpu_ray, make_jobs):
    recipe = recipe_of(
        ECHO_ROLE,
        distillation={
            "prompts": {"questions_per_trait": 1, "general": 6},
            "pairs": {"max_drop_rate": 0.1, "max_tokens": 1},
        },
    )
    jobs = pipeline.select(make_jobs(recipe), until="distillation/pairs")
    with pytest.raises(StageFailed, match=r"dropped .* limit 10%.*'too_long'"):
        list(pipeline.run(jobs))
    assert jobs[-1].state()[0] != "done"


def test_tasks_with_large_blocks_are_spread_without_a_deprecation_warning(cpu_ray):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RayDeprecationWarning)
        dataset = stored_counts([pa.table({"id": ["1"]})], {}, 1)
    assert dataset.context.scheduling_strategy == "SPREAD"
    assert dataset.context.scheduling_strategy_large_args == "SPREAD"


@pytest.mark.parametrize(
    ("rows", "replicas", "size"), [(3, 8, 1), (100, 8, 13), (12_000, 1, 12_000), (10**6, 4, 25_000)]
)
def test_each_replica_gets_one_block_up_to_the_maximum_size(rows, replicas, size):
    assert block_rows(rows, replicas) == size
