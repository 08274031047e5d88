"""Ray Data, the actors and the parts, on the echo engine."""

import pyarrow as pa
import pytest
from samples import ECHO_ROLE, recipe_of

from opencharacter import pipeline
from opencharacter.config.placement import Placement
from opencharacter.config.recipe import Sampling
from opencharacter.engines.backends import ENGINE_ERROR
from opencharacter.engines.conversations import ROW_FIELDS
from opencharacter.engines.generate import block_rows, generate
from opencharacter.errors import RowFailed, StageFailed
from opencharacter.runtime.store import SHARDS, RemoteDir, Shards
from opencharacter.text.chat import user

FIELDS = [pa.field("prompt", pa.string()), pa.field("answer", pa.string())]
PLACEMENT = Placement.model_validate({"pools": {"teacher": {"replicas": 2, "cpus": 0.2}}})


async def talk(row, conversation):
    if row["prompt"] == "poison":
        raise RowFailed("too_long", "as long as the night")
    reply = await conversation.reply([user(row["prompt"])], Sampling(max_tokens=20))
    return {"answer": reply.text}


def requests(count):
    return [{"id": f"{i:03}", "prompt": f"number {i}"} for i in range(count)]


@pytest.fixture
def job(make_jobs, echo_recipe):
    return make_jobs(echo_recipe, PLACEMENT)[1]


def test_every_id_is_answered_once_and_a_bad_row_stops_nothing(cpu_ray, job):
    rows = [*requests(99), {"id": "bad", "prompt": "poison"}]
    table = generate(job, rows, talk, "teacher", FIELDS).table()
    assert table["id"].to_pylist() == sorted(row["id"] for row in rows)
    bad = [row for row in table.to_pylist() if row["drop_reason"]]
    assert [(row["id"], row["drop_reason"]) for row in bad] == [("bad", "too_long")]
    assert all(row["tokens_out"] for row in table.to_pylist() if not row["drop_reason"])


def test_a_rerun_asks_only_for_what_is_not_there(cpu_ray, job):
    first = generate(job, requests(20), talk, "teacher", FIELDS).table()
    again = generate(job, requests(50), talk, "teacher", FIELDS).table()
    assert again.num_rows == 50
    assert again.slice(0, 20).equals(first)
    history = job.store.attempts(job.dataset)
    assert [entry["kept"] for entry in history] == [0, 20]


async def broken(row, conversation):
    raise RowFailed(ENGINE_ERROR, "unknown argument")


def test_what_the_engine_failed_is_asked_for_again_by_a_rerun(cpu_ray, job):
    first = generate(job, requests(20), broken, "teacher", FIELDS).table()
    assert first["drop_reason"].to_pylist() == [ENGINE_ERROR] * 20
    again = generate(job, requests(20), talk, "teacher", FIELDS).table()
    assert again["drop_reason"].null_count == 20


def test_a_stage_gives_up_where_every_conversation_fails(cpu_ray, job):
    with pytest.raises(StageFailed, match=r"first 50 conversations .* the last: unknown argument"):
        generate(job, requests(5000), broken, "teacher", FIELDS)
    assert sum(table.num_rows for table in job_parts(job)) < 1000


def job_parts(job):
    return Shards(
        RemoteDir(job.store, f"{job.dataset}/{SHARDS}"), pa.schema([*FIELDS, *ROW_FIELDS])
    )


def test_answers_do_not_depend_on_blocks_or_replicas(cpu_ray, make_jobs, echo_recipe, tmp_path):
    from dataclasses import replace

    from opencharacter.runtime.store import Store

    one = make_jobs(echo_recipe, Placement())[1]
    two = replace(make_jobs(echo_recipe, PLACEMENT)[1], store=Store(str(tmp_path / "elsewhere")))
    forwards = generate(one, requests(30), talk, "teacher", FIELDS).table()
    backwards = generate(two, requests(30)[::-1], talk, "teacher", FIELDS).table()
    assert forwards.equals(backwards)


def test_an_echo_run_goes_from_prompts_to_pairs_and_a_second_does_nothing(
    cpu_ray, make_jobs, echo_recipe
):
    jobs = pipeline.select(make_jobs(echo_recipe), until="distillation/pairs")
    ran = [job.dataset for job, _ in pipeline.run(jobs)]
    assert sorted(ran) == sorted(job.dataset for job in jobs)
    pairs = jobs[-1].read("distillation/teacher")
    assert pairs.num_rows == 2 * (10 + 6)
    manifest = jobs[-1].store.manifest(jobs[-1].dataset)
    assert manifest["rows"] == 32
    assert list(pipeline.run(jobs)) == []
    assert jobs[1].store.attempts(jobs[1].dataset) == []  # the parts are gone


def test_too_many_dropped_rows_fail_the_stage_and_say_why(cpu_ray, make_jobs):
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


@pytest.mark.parametrize(
    ("rows", "replicas", "size"), [(3, 8, 1), (100, 8, 13), (12_000, 1, 12_000), (10**6, 4, 25_000)]
)
def test_a_replica_gets_its_share_in_one_block_unless_that_is_very_much(rows, replicas, size):
    assert block_rows(rows, replicas) == size
