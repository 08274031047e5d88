"""Evaluation through a Ray Serve application gives the rows of the batch way."""

import asyncio
import faulthandler
import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pytest
import ray
from process_tree import kill_tree
from ray import serve
from ray.serve.exceptions import BackPressureError
from samples import ECHO_ROLE, recipe_of

from opencharacter import pipeline
from opencharacter.config.evaluation import Rating
from opencharacter.config.placement import Placement
from opencharacter.config.roles import Sampling
from opencharacter.constitution import schema
from opencharacter.engines import served
from opencharacter.engines.spec import FirstToken, Reply, engine_spec
from opencharacter.errors import RowFailed, StageFailed, UserError
from opencharacter.evaluation import live_ratings
from opencharacter.evaluation.rating import scored_games
from opencharacter.runtime import cluster
from opencharacter.runtime.stage import StageResult
from opencharacter.runtime.store import RemoteDir, Shards, Store
from opencharacter.serving import evaluation, replies
from opencharacter.serving.evaluation import free_port
from opencharacter.serving.protocol import ErrorBody
from opencharacter.text.chat import user
from opencharacter.text.templates import load_tokenizer, prompt_ids

PERSONAS = ("poeticism", "humor")
STUDENT = {**ECHO_ROLE, "name": "echo-1.5b"}
JUDGE = {**ECHO_ROLE, "model": "echo:0.01", "name": "echo-judge"}
SERVED = Placement.model_validate({"max_concurrent_jobs": 3, "evaluation": {"served": "own"}})
EVALUATION = {
    "judge": {"gold_items": 4, "min_agreement": None},
    "answers": {"count": 6, "conditions": ["base", "prompted", "distilled", "full"]},
    "attacks": {"prompts": 2, "kinds": ["plain", "prefill"], "conditions": ["base", "full"]},
    "preferences": {"games": 8, "conditions": ["base", "full"]},
    "coherence": {"prompts": 2},
}
MEASURED = {f"evaluation/{name}" for name in EVALUATION}
SHORT = Sampling(max_tokens=12)
TWO_NODES_S, DRIVE_S = 600, 240
"""Seconds for the test with two nodes, and after which a process in it prints where it is."""


def recipe(**student):
    roles = dict.fromkeys(("teacher", "student", "prompt_generator"), STUDENT | student)
    return recipe_of(STUDENT, roles=roles | {"judge": JUDGE}, evaluation=EVALUATION)


def trained_jobs(storage, placement, made_of=None, personas=PERSONAS):
    """All jobs of a run whose personas are trained, as far as echoes can tell."""
    constitutions = [schema.load(name) for name in personas]
    jobs = pipeline.jobs(made_of or recipe(), constitutions, placement, Store(str(storage)))
    for job in jobs:
        trains = not job.stage.name.startswith("evaluation/") or job.stage.name.endswith("steering")
        if trains and job.state()[0] != "done":
            table = pa.table({"id": ["1"], "prompt": [f"What is {job.scope}?"]})
            job.store.write_tables(job.dataset, [table], table.schema)
            pipeline.finish(job, StageResult(1), 0.1)
    return jobs


def of_persona(jobs, stage):
    (job,) = (job for job in jobs if job.stage.name == stage and job.constitution)
    return job


def measured(jobs):
    return [job for job in jobs if job.stage.name in MEASURED]


def evaluate(jobs):
    """Run the evaluation; verdicts of echoes name no trait, so ratings are left out."""
    return {job.dataset: manifest for job, manifest in pipeline.run(measured(jobs))}


def rows_of(jobs):
    """All rows without their costs, by dataset."""
    return {
        job.dataset: sorted(
            job.store.read_table(job.dataset).to_pylist(), key=lambda row: row["id"]
        )
        for job in measured(jobs)
    }


@pytest.fixture
def readable(monkeypatch):
    """Accept games whose verdicts name no trait, as those of echoes do."""
    monkeypatch.setattr("opencharacter.evaluation.preferences.check_scored", lambda *_: None)


@pytest.fixture
def serve_ray(cpu_ray):
    yield
    serve.shutdown()


@pytest.mark.slow
def test_a_served_evaluation_has_the_ids_prompts_and_texts_of_the_batch_way(
    serve_ray, readable, tmp_path
):
    batch = trained_jobs(tmp_path / "batch", Placement())
    through_serve = trained_jobs(tmp_path / "served", SERVED)
    evaluate(batch)
    manifests = evaluate(through_serve)
    assert rows_of(through_serve) == rows_of(batch)
    fingerprints = [{job.fingerprint for job in measured(jobs)} for jobs in (batch, through_serve)]
    assert fingerprints[0] == fingerprints[1]
    starts = [label for m in manifests.values() for label in m["engines_started"]]
    assert len(starts) == 1 and starts[0].startswith("Serve application")
    assert not serve.status().applications  # deleted at the end


def test_only_student_and_judge_of_the_evaluation_are_served(tmp_path):
    jobs = {(job.stage.name, job.scope): job for job in trained_jobs(tmp_path, SERVED)}
    student = STUDENT["name"]
    answers = jobs["evaluation/answers", f"{student}/humor"]

    def is_served(job, *arguments):
        return isinstance(engine_spec(job, *arguments), served.ServedSpec)

    merged = answers.parent("persona/merge").adapter
    assert is_served(answers, "student") and is_served(answers, "judge")
    assert is_served(answers, "student", merged)
    assert is_served(answers, "student", answers.parent("distillation/dpo").adapter)
    assert not is_served(answers, "student", answers.parent("evaluation/steering").adapter)
    assert not is_served(answers, "prompt_generator")
    assert not is_served(jobs["distillation/student", student], "student")
    other = answers.recipe.roles.judge.model_copy(update={"name": "another"})
    assert not is_served(answers, "judge", None, other)
    keys = {engine_spec(answers, "student", a).key() for a in (None, merged)}
    assert keys == {engine_spec(answers, "judge").key()}


def test_an_adapter_is_requested_by_its_revision(tmp_path):
    job = of_persona(trained_jobs(tmp_path, SERVED, personas=["humor"]), "evaluation/answers")
    merged, dpo = job.parent("persona/merge"), job.parent("distillation/dpo")
    names = [
        served.served_model(served.served_spec(job, "student", parent.adapter, None))
        for parent in (merged, dpo)
    ]
    assert names[0].startswith(f"echo-1.5b:humor@{merged.fingerprint}.")
    assert names[1].startswith(f"echo-1.5b:humor:dpo@{dpo.fingerprint}.")
    job.store.delete(merged.dataset)
    with pytest.raises(StageFailed, match="is not in storage"):
        served.served_model(served.served_spec(job, "student", merged.adapter, None))


class Handle:
    """A handle whose replies are taken from a list; exceptions in it are raised."""

    def __init__(self, *results):
        self.results, self.calls = list(results), []
        self.reply = self

    async def remote(self, *arguments):
        self.calls.append(arguments)
        result = self.results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result


def client(*results):
    engine = object.__new__(served.ServedEngine)
    engine.role, engine.model, engine.handle = None, "student:humor@1", Handle(*results)
    engine.app, engine.last_reply = type("App", (), {"name": "app"}), time.monotonic()
    return engine


HELLO = Reply("Hello.", "stop", 1, 2, 0)


def ask(engine):
    return asyncio.run(engine.reply([user("Hi")], SHORT, seed=3))


def test_a_request_is_sent_again_when_the_queue_is_full_or_a_replica_was_lost():
    full = BackPressureError(num_queued_requests=1, max_queued_requests=1)
    engine = client(full, ray.exceptions.ActorDiedError(), full, HELLO)
    assert ask(engine) == HELLO
    first, *others = engine.handle.calls
    assert len(others) == 3 and all(call == first for call in others)
    assert first[1:] == ("student:humor@1", [user("Hi")], SHORT, 3, "")


def test_a_request_fails_after_losing_many_replicas_or_by_the_error_of_its_replica(monkeypatch):
    monkeypatch.setattr(served, "MAX_WAIT_SECONDS", 0.01)
    with pytest.raises(StageFailed, match="'app' does not reply"):
        ask(client(*[ray.exceptions.ActorDiedError()] * served.MAX_FAILURES))
    refused = ray.exceptions.RayTaskError("reply", "trace", RowFailed("too_long", "9 tokens"))
    with pytest.raises(RowFailed, match="too_long"):
        ask(client(refused))


def test_a_deployment_is_found_although_ray_changes_its_name():
    names = ["ingress", "PersonaServer:qwen-2_5-coder", "PersonaServer:judge"]
    assert served.find_deployment(names, "qwen-2.5-coder") == names[1]
    with pytest.raises(StageFailed, match="no deployment of other"):
        served.find_deployment(names, "other")


def test_an_application_reserves_what_student_and_judge_do_and_shares_equal_engines():
    pools = {"student": {"gpus": 1, "cpus": 2}, "judge": {"gpus": 1, "cpus": 3}}
    placement = Placement.model_validate({"pools": pools, "evaluation": {"served": "own"}})

    def app(**judge):
        real = {**ECHO_ROLE, "model": "org/model"}
        made = recipe_of(
            real,
            roles=dict.fromkeys(("teacher", "prompt_generator", "student"), real)
            | {"judge": real | judge},
        )
        return served.ServedApp("own", made, placement, Store("runs"), ())

    assert app(model="org/judge").resources.gpus == 2
    assert app(name="same").resources.gpus == 1
    assert app(endpoint="http://127.0.0.1:1/v1").resources.gpus == 1
    assert app().name == app().name != app(model="org/judge").name


def test_a_cluster_that_is_too_small_for_both_models_is_refused(cpu_ray, monkeypatch):
    real = {**ECHO_ROLE, "model": "org/model"}
    placement = Placement.model_validate({"pools": {"student": {"cpus": 64}}})
    app = served.ServedApp("own", recipe_of(real), placement, Store("runs"), ())
    with pytest.raises(UserError, match=r"together need 64.*the cluster has .*without --served"):
        evaluation.deploy(app)


def test_a_completion_becomes_a_reply_with_its_costs_and_first_tokens():
    usage = {"prompt_tokens": 9, "completion_tokens": 1}
    usage["prompt_tokens_details"] = {"cached_tokens": 4}
    listed = {"top_logprobs": [{"B": -2.0, " A": -0.5}]}
    choice = {"text": " A", "finish_reason": "length", "logprobs": listed}
    reply = replies.to_reply({"choices": [choice], "usage": usage})
    assert reply == Reply(" A", "length", 9, 1, 4, ((" A", -0.5), ("B", -2.0)))
    assert not replies.to_reply(
        {"choices": [choice | {"logprobs": None}], "usage": usage}
    ).first_tokens


def test_a_request_has_the_token_ids_and_the_limit_of_the_batch_way(embedded_model, tokenizer):
    student = {**STUDENT, "model": "embedded:smollm2-135m", "max_model_len": 64}
    role, hello = recipe_of(student).roles.student, [user("Hello")]
    ids = prompt_ids(load_tokenizer(embedded_model, role), hello, "Well,")
    payload = replies.completion_payload(role, hello, Sampling(max_tokens=99), 7, "Well,")
    assert payload["prompt"] == ids and payload["max_tokens"] == 64 - len(ids)
    assert payload["seed"] == 7 and payload["logprobs"] is None
    assert replies.completion_payload(role, hello, FirstToken(), None, "")["logprobs"] == 20
    with pytest.raises(RowFailed, match="too_long"):
        replies.completion_payload(role, [user("word " * 80)], SHORT, 7, "")


def test_what_the_engine_refuses_concerns_the_row_and_a_missing_adapter_the_stage():
    assert isinstance(replies.to_error(ErrorBody(400, "no")), RowFailed)
    assert isinstance(replies.to_error(ErrorBody(404, "no such adapter")), StageFailed)


# ---------------------------------------------------------------------------------- live ratings


def games(count, seed=0):
    """Games of four traits whose strengths differ by 0.8 logits, each pair in both orders."""
    rng = np.random.default_rng(seed)
    traits = ("blunt", "casual", "formal", "poetic")
    for n in range(count):
        one, two = sorted(rng.choice(4, 2, replace=False))
        wins = rng.random() < 1 / (1 + math.exp(0.8 * (two - one)))
        first, second = traits[one], traits[two]
        chosen = first if wins else second
        yield {
            "id": str(n),
            "game": n,
            "condition": "full",
            "first": first,
            "second": second,
            "chosen": chosen if n % 10 else None,
        }


def test_ratings_so_far_name_the_highest_traits_with_intervals_that_shrink():
    widths = []
    for count in (40, 640):
        (line,) = live_ratings.describe([*games(count), *games(5)], Rating())
        assert line.startswith("full: poetic ")
        assert line.endswith(f"({count * 9 // 10} games, {count // 10} unscored)")
        widths.append(int(line.split("± ")[1].split(",")[0]))
    assert widths[1] < widths[0] / 3
    assert live_ratings.describe([row | {"chosen": None} for row in games(4)], Rating()) == [
        "full: 0 games, 4 unscored"
    ]


def test_the_interval_of_ratings_so_far_covers_the_truth():
    truth = 0.8 * (np.arange(4) - 1.5)
    hits = []
    for seed in range(300):
        rows = [row for row in games(300, seed) if row["chosen"]]
        index = {trait: i for i, trait in enumerate(("blunt", "casual", "formal", "poetic"))}
        strengths, errors = live_ratings.with_errors(scored_games(rows, index).wins(4), 0.1)
        hits += list(abs(strengths - truth) < 1.96 * errors)
    assert 0.93 <= np.mean(hits) <= 0.97


def test_ratings_so_far_are_read_from_the_rows_of_all_phases(tmp_path, echo_recipe):
    jobs = trained_jobs(tmp_path, Placement(), echo_recipe, ["humor"])
    job = of_persona(jobs, "evaluation/preferences")
    rows = pa.Table.from_pylist(list(games(20)))
    for phase, table in {"full": rows, "distilled-answers": rows.drop_columns("chosen")}.items():
        folder = RemoteDir(job.store, f"{job.dataset}/.shards/{phase}")
        Shards(folder, table.schema).write(table, "shard-1")
    (line,) = job.stage.module.live(job)
    assert "18 games, 2 unscored" in line


# ------------------------------------------------------------------------------ joining and kills


def chat(url, model="echo-1.5b"):
    body = {"model": model, "messages": [{"role": "user", "content": "hello there"}]}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)


@pytest.mark.slow
def test_a_run_joins_an_application_that_answers_chats_meanwhile(serve_ray, tmp_path):
    jobs = trained_jobs(tmp_path, SERVED, recipe(model="echo:0.5"), ["humor"])
    own = served.ServedApp("own", jobs[0].recipe, SERVED, jobs[0].store, jobs[0].constitutions)
    port = free_port(0)
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    serve.run(evaluation.build(own), name="mine")
    for target in ("mine", f"http://127.0.0.1:{port}"):
        placement = Placement.model_validate({"evaluation": {"served": target}})
        joined = trained_jobs(tmp_path, placement, jobs[0].recipe, ["humor"])
        answers = of_persona(joined, "evaluation/answers")
        for job in joined:
            if job.stage.name == "evaluation/answers":
                job.store.delete(job.dataset)
        both = [job for job in joined if job.stage.name == "evaluation/answers"]
        running = threading.Thread(target=lambda jobs=both: list(pipeline.run(jobs)))
        running.start()
        response = chat(f"http://127.0.0.1:{port}")
        assert response.json()["choices"][0]["message"]["content"] == "echo-1.5b: hello there"
        running.join()
        rows = answers.store.read_table(answers.dataset).to_pylist()
        assert len(rows) == 18 and not any(row["drop_reason"] for row in rows)
        assert serve.status().applications["mine"].status.value == "RUNNING"
    answer = {row["condition"]: row["answer"] for row in rows}  # by HTTP, they begin with the model
    assert answer["full"].startswith("echo-1.5b:humor@")
    assert answer["distilled"].startswith("echo-1.5b:humor:dpo@")
    missing = Placement.model_validate({"evaluation": {"served": "another"}})
    jobs = trained_jobs(tmp_path / "other", missing, personas=["humor"])
    jobs = [job for job in jobs if job.stage.name == "evaluation/answers"]
    with pytest.raises(UserError, match="application 'another' is NOT_RUNNING in this Ray cluster"):
        list(pipeline.run(jobs))


def drive(storage, placement):
    """The client that `test_rows_are_complete...` kills: a process of its own."""
    from opencharacter.evaluation import preferences

    faulthandler.dump_traceback_later(DRIVE_S)
    preferences.check_scored = lambda *_: None
    slow = {name: STUDENT | {"model": "echo:1"} for name in ("student", "teacher")}
    roles = slow | {"prompt_generator": STUDENT, "judge": JUDGE | {"model": "echo:1.5"}}
    made = recipe_of(STUDENT, roles=roles, evaluation=EVALUATION)
    few = {name: {"max_num_seqs": 3} for name in ("student", "judge")}
    pools = {"pools": few, "training": {"cpus": 1}}
    where = Placement.model_validate(json.loads(placement) | pools)
    cluster.connect(where)
    evaluate(trained_jobs(storage, where, made))


def kill_replica(deployment):
    """Kill a replica of a deployment; return whether there was one."""
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["name"].startswith("SERVE_REPLICA") and f"#{deployment}#" in actor["name"]:
            ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]), no_restart=True)
            return True
    return False


def wait_for(condition, process):
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)


def kill_on_two_nodes(folder):
    """The body of `test_rows_are_complete...`: a process of its own, since it joins a cluster."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100_000_000}
    )
    nodes.add_node(num_cpus=1, object_store_memory=100_000_000)
    os.environ["RAY_ADDRESS"] = nodes.address
    command = own_process("drive", f"{folder}/served", SERVED.model_dump_json())

    def shards():
        return len(list(Path(folder, "served").rglob("shard-*.parquet")))

    client = subprocess.Popen(command)
    try:
        ray.init(nodes.address, log_to_driver=False)
        wait_for(lambda: shards() >= 2, client)
        assert kill_replica("echo-1.5b") and kill_replica("echo-judge")
        before = shards()
        wait_for(lambda: shards() > before + 2, client)
        client.kill()
        client.wait()
        assert any(name.startswith("opencharacter-") for name in serve.status().applications)
        subprocess.run(command, check=True, timeout=DRIVE_S + 10)
        assert not serve.status().applications
        serve.shutdown()
        subprocess.run(
            own_process("drive", f"{folder}/batch", "{}"), check=True, timeout=DRIVE_S + 10
        )
    finally:
        client.kill()
        ray.shutdown()
        nodes.shutdown()


def own_process(function, *arguments):
    """The command that calls a function of this module in a process of its own."""
    code = f"import sys, {__name__} as test; test.{function}(*sys.argv[1:])"
    return [sys.executable, "-c", code, *arguments]


@pytest.mark.slow
def test_rows_are_complete_when_replicas_and_the_client_are_killed_on_two_nodes(tmp_path):
    process = subprocess.Popen(
        own_process("kill_on_two_nodes", str(tmp_path)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=TWO_NODES_S)
    finally:
        if process.poll() is None:  # its Ray processes would outlive it
            kill_tree(process)
    assert process.returncode == 0, output
    served_way, batch_way = (
        rows_of(trained_jobs(tmp_path / way, Placement())) for way in ("served", "batch")
    )
    assert served_way == batch_way
