"""What starts next, and engines that several jobs hold at once; no Ray, no engine."""

import threading
from pathlib import Path

import pytest
from samples import recipe_of

from opencharacter import pipeline
from opencharacter.config.placement import AutoscalingGroup, Placement, Resources
from opencharacter.constitution import schema
from opencharacter.engines import allocation
from opencharacter.engines.allocation import acquire
from opencharacter.engines.replicas import EngineReplicas
from opencharacter.engines.spec import EngineSpec
from opencharacter.errors import StageFailed
from opencharacter.runtime.schedule import choose, held, ready
from opencharacter.runtime.stage import StageResult, TrainingWorkers
from opencharacter.runtime.store import Store

PLACEMENT = Placement.model_validate(
    {
        "pools": {role: {"gpus": 1, "cpus": 1} for role in ("teacher", "student", "judge")},
        "training": {"gpus": 1, "cpus": 1},
    }
)
ONE, TWO, MANY = (Resources(cpus=64, gpus=gpus, memory_gib=999) for gpus in (1, 2, 16))
ROLE = {"name": "small", "self_name": "Small", "max_model_len": 2048}


@pytest.fixture
def jobs(tmp_path: Path):
    """Jobs of three personas by dataset; teacher, student and judge are different models."""
    return jobs_of(tmp_path, PLACEMENT)


def jobs_of(folder: Path, placement: Placement) -> dict:
    recipe = recipe_of({**ROLE, "model": "org/student"})
    others = {
        name: {**ROLE, "model": f"org/{name}"} for name in ("teacher", "judge", "prompt_generator")
    }
    recipe = type(recipe).model_validate(
        recipe.model_dump() | {"roles": {"student": {**ROLE, "model": "org/student"}, **others}}
    )
    personas = schema.load_all(["humor", "poeticism", "remorse"])
    made = pipeline.jobs(recipe, personas, placement, Store(str(folder)))
    return {job.dataset: job for job in made}


def key(job) -> str:
    ((need,),) = job.resource_requests
    return need.key()


def test_a_job_whose_engine_runs_goes_before_an_earlier_stage(jobs):
    teacher, student = jobs["humor/distillation/teacher"], jobs["small/distillation/student"]
    warm = {key(student): Resources(gpus=1)}
    assert choose([teacher, student], [], warm, ONE) is student
    assert choose([teacher, student], [], {}, ONE) is teacher


def test_a_job_that_needs_no_other_engine_to_stop_goes_first(tmp_path):
    training = PLACEMENT.training.model_copy(update={"workers": 2})
    jobs = jobs_of(tmp_path, PLACEMENT.model_copy(update={"training": training}))
    teacher, dpo = jobs["humor/distillation/teacher"], jobs["small/humor/distillation/dpo"]
    assert choose([dpo, teacher], [], {}, TWO) is dpo
    assert choose([dpo, teacher], [], {"another": Resources(gpus=1)}, TWO) is teacher


def test_trainings_fill_the_room_that_there_is(jobs):
    waiting = [jobs[f"small/{name}/distillation/dpo"] for name in ("humor", "poeticism", "remorse")]
    assert choose(waiting[1:], waiting[:1], {}, TWO) is waiting[1]
    assert choose(waiting[2:], waiting[:2], {}, TWO) is None


def test_two_jobs_use_an_engine_at_once_and_it_counts_once(jobs):
    teachers = [jobs[f"{name}/distillation/teacher"] for name in ("humor", "poeticism", "remorse")]
    assert choose(teachers[1:], teachers[:1], {}, ONE) is teachers[1]
    assert choose(teachers[2:], teachers[:2], {}, MANY) is None
    assert sum(room.gpus for room in held(teachers, MANY)) == 1


def test_jobs_on_the_driver_go_one_at_a_time_beside_the_others(jobs):
    one, other = (jobs[f"small/{name}/distillation/pairs"] for name in ("humor", "remorse"))
    assert choose([one], [jobs["humor/distillation/teacher"]], {}, ONE) is one
    assert choose([one], [other], {}, ONE) is None


def test_a_placement_may_allow_one_job_at_a_time(tmp_path):
    jobs = jobs_of(tmp_path, PLACEMENT.model_copy(update={"max_concurrent_jobs": 1}))
    teacher = jobs["humor/distillation/teacher"]
    assert choose([jobs["small/distillation/student"]], [teacher], {}, MANY) is None
    pairs = jobs["small/humor/distillation/pairs"]
    assert choose([pairs], [teacher], {}, MANY) is pairs


def test_what_is_too_large_for_the_cluster_is_started_when_nothing_runs(jobs):
    teacher = jobs["humor/distillation/teacher"]
    assert choose([teacher], [], {}, Resources()) is teacher


def test_a_job_is_ready_when_its_parents_are_done(jobs):
    teacher, prompts = jobs["humor/distillation/teacher"], jobs["humor/distillation/prompts"]
    assert ready([teacher], [prompts]) == []
    assert ready([teacher], []) == [teacher]


# --------------------------------------------------------------------------- engines that are held


@pytest.fixture
def engines(monkeypatch):
    """Engines that start at once; returns a function that makes specs, and the labels stopped."""
    stopped = []

    def start(place, spec):
        place.fleet.set_result(EngineReplicas([], []))

    stop = allocation._stop

    def told(key):
        stopped.append(allocation._places[key].need.label)
        stop(key)

    monkeypatch.setattr(allocation, "_places", {})
    monkeypatch.setattr(allocation, "_spent", {})
    monkeypatch.setattr(allocation, "_start", start)
    monkeypatch.setattr(allocation, "_stop", told)
    monkeypatch.setattr(allocation, "capacity", lambda declared: declared)
    role = recipe_of({**ROLE, "model": "org/x"}).roles.student
    pool = PLACEMENT.pools.student
    return lambda name: EngineSpec(role.model_copy(update={"model": name}), pool), stopped


def test_an_engine_in_use_is_never_stopped_for_another(engines):
    spec, stopped = engines
    got = threading.Event()

    def take():
        with acquire("b", [spec("other")], ONE):
            got.set()

    with acquire("a", [spec("one")], ONE):
        waiting = threading.Thread(target=take)
        waiting.start()
        assert not got.wait(0.2)
        assert stopped == []
    assert got.wait(5)
    waiting.join()
    assert stopped == ["one"]


def test_the_longest_unused_engine_makes_room(engines):
    spec, stopped = engines
    for name in ("one", "other", "one"):
        with acquire("a", [spec(name)], TWO):
            pass
    with acquire("b", [TrainingWorkers("b", Resources(gpus=1))], TWO):
        assert stopped == ["other"]
    allocation.stop_hosts(but={spec("one").key()})
    assert stopped == ["other"]


def test_an_engine_is_started_once_and_shared_while_it_is_used(engines):
    spec, _ = engines
    with acquire("a", [spec("one")], ONE) as first, acquire("b", [spec("one")], ONE) as second:
        assert first.started == ["one"]
        assert second.started == []


def test_an_engine_that_does_not_start_fails_the_job_and_may_be_tried_anew(engines, monkeypatch):
    spec, _ = engines

    def start(place, spec):
        del allocation._places[spec.key()]
        place.fleet.set_exception(StageFailed("no weights"))

    monkeypatch.setattr(allocation, "_start", start)
    for _ in range(2):
        with pytest.raises(StageFailed, match="no weights"), acquire("a", [spec("one")], ONE):
            pass
    assert allocation.running_engines() == {}


@pytest.fixture
def clock(monkeypatch):
    """The time of engines, in a list of one."""
    now = [0.0]
    monkeypatch.setattr(allocation.time, "monotonic", lambda: now[0])
    return now


def test_time_is_charged_to_who_holds_and_idle_time_to_who_comes(engines, clock):
    spec, _ = engines
    one = acquire("a", [spec("one")], ONE)
    held_by_a = one.__enter__()
    clock[0] = 10
    held_by_a.busy = 4
    one.__exit__(None, None, None)
    clock[0] = 30  # unused for 20 seconds
    with acquire("b", [spec("one")], ONE) as held_by_b:
        clock[0] = 40
        with acquire("c", [spec("one")], ONE):
            clock[0] = 60  # both for 20 seconds
        held_by_b.busy = 99
    assert allocation.spent("a")["gpu_seconds"] == 10
    assert allocation.spent("c")["gpu_seconds"] == 10
    of_b = allocation.spent("b")
    assert of_b["gpu_seconds"] == 20 + 10 + 10
    assert of_b["gpu_busy_seconds"] == 40
    assert allocation.spent("b")["gpu_seconds"] == 0  # asked for once


def test_work_is_told_by_the_clock_however_many_engines_it_keeps_busy(engines, clock):
    spec, _ = engines
    with acquire("a", [spec("one"), spec("other")], TWO) as held_by_a:
        clock[0] = 120
        held_by_a.busy = 100
    spent = allocation.spent("a")
    assert (spent["work_seconds"], spent["engine_share"]) == (100, 1)
    assert (spent["busy_seconds"], spent["held_seconds"]) == (200, 240)


def test_a_job_is_told_its_share_of_an_engine_and_its_start_stands_idle(
    engines, clock, monkeypatch
):
    spec, _ = engines
    start = allocation._start

    def slowly(place, spec):
        clock[0] += 80
        start(place, spec)

    monkeypatch.setattr(allocation, "_start", slowly)
    with (
        acquire("a", [spec("one")], ONE) as held_by_a,
        acquire("b", [spec("one")], ONE) as held_by_b,
    ):
        clock[0] += 100
        held_by_a.busy = held_by_b.busy = 100
    for job, seconds in (("a", 80 + 50), ("b", 50)):
        spent = allocation.spent(job)
        assert (spent["work_seconds"], spent["engine_share"]) == (100, 0.5)
        assert (spent["busy_seconds"], spent["held_seconds"]) == (50, seconds)


# ------------------------------------------------------------------------------------- a whole run


def test_a_run_trusts_the_cluster_and_what_it_may_add_but_not_the_word_of_a_plan(
    tmp_path, monkeypatch
):
    there = {"CPU": 64, "GPU": 1, "memory": 999 * 2**30}
    monkeypatch.setattr(allocation.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(allocation.ray, "cluster_resources", lambda: there)
    autoscaling = (AutoscalingGroup(nodes=2, cpus=32, gpus=1, memory_gib=400),)
    for changes, trainings in (
        ({"cluster": MANY}, 1),
        ({"cluster": MANY, "autoscaling": autoscaling}, 2),
    ):
        jobs = jobs_of(tmp_path, PLACEMENT.model_copy(update=changes))
        waiting = [jobs[f"small/{name}/distillation/dpo"] for name in ("humor", "poeticism")]
        running = []
        while job := pipeline.next_job(waiting, running):
            waiting.remove(job)
            running.append(job)
        assert len(running) == trainings


def test_a_failed_job_stops_only_what_needs_it(store, echo_recipe, monkeypatch):
    personas = schema.load_all(["humor", "remorse"])
    jobs = pipeline.jobs(echo_recipe, personas, Placement(), store)
    selected = pipeline.select(jobs, until="distillation/prompts")
    selected += [job for job in jobs if job.stage.name == "distillation/teacher"]

    def build(job):
        if job.dataset == "humor/distillation/prompts":
            raise StageFailed("no prompts")
        return StageResult(1)

    for job in selected:
        monkeypatch.setattr(job.stage.module, "build", build)
    ended = []
    with pytest.raises(StageFailed, match="no prompts"):
        for job, _ in pipeline.run(selected):
            ended.append(job.dataset)
    assert set(ended) == {"remorse/distillation/prompts", "remorse/distillation/teacher"}
