"""What starts next, and engines that several jobs hold at once; no Ray, no engine."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest
from samples import recipe_of

from opencharacter import pipeline
from opencharacter.config import placement as placements
from opencharacter.config.placement import AutoscalingGroup, Placement, Resources
from opencharacter.constitution import schema
from opencharacter.engines import allocation
from opencharacter.engines.allocation import acquire
from opencharacter.engines.replicas import EngineReplicas
from opencharacter.engines.spec import EngineSpec
from opencharacter.engines.weights import WeightsDiffer
from opencharacter.errors import StageFailed
from opencharacter.runtime.schedule import choose, held_resources, ready, swap_sources
from opencharacter.runtime.stage import ResourceRequest, StageResult, TrainingWorkers
from opencharacter.runtime.store import RemoteDir, Store

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
    roles = {
        name: {**ROLE, "model": f"org/{name}"} for name in ("teacher", "judge", "prompt_generator")
    }
    recipe = type(recipe).model_validate(
        recipe.model_dump() | {"roles": {"student": {**ROLE, "model": "org/student"}, **roles}}
    )
    personas = schema.load_all(["humor", "poeticism", "remorse"])
    jobs = pipeline.jobs(recipe, personas, placement, Store(str(folder)))
    return {job.dataset: job for job in jobs}


def request(job) -> ResourceRequest:
    """The only engine of a job."""
    ((request,),) = job.resource_requests
    return request


def key(job) -> str:
    return request(job).key()


def test_a_job_whose_engine_is_running_starts_before_an_earlier_stage(jobs):
    teacher, student = jobs["humor/distillation/teacher"], jobs["small/distillation/student"]
    warm = {key(student): request(student)}
    assert choose([teacher, student], [], warm, ONE) is student
    assert choose([teacher, student], [], {}, ONE) is teacher


def test_a_job_that_stops_no_engine_starts_first(tmp_path):
    training = PLACEMENT.training.model_copy(update={"workers": 2})
    jobs = jobs_of(tmp_path, PLACEMENT.model_copy(update={"training": training}))
    teacher, dpo = jobs["humor/distillation/teacher"], jobs["small/humor/distillation/dpo"]
    assert choose([dpo, teacher], [], {}, TWO) is dpo
    assert choose([dpo, teacher], [], {"another": request(teacher)}, TWO) is teacher


def test_a_job_that_a_swap_serves_starts_before_one_that_starts_an_engine(jobs):
    teacher, student = jobs["humor/distillation/teacher"], jobs["small/distillation/student"]
    distilled = jobs["small/humor/introspection/interaction"]
    idle = {key(distilled): request(distilled)}
    assert choose([teacher, distilled], [], {key(student): request(student)}, TWO) is distilled
    assert choose([distilled, student], [], {key(student): request(student)}, TWO) is student
    assert choose([teacher, student], [], idle, TWO) is student
    assert choose([teacher, student], [], {}, TWO) is teacher


def test_the_weights_of_an_engine_in_use_are_not_replaced(jobs):
    student = jobs["small/distillation/student"]
    distilled = jobs["small/humor/introspection/interaction"]
    running = {key(student): request(student)}
    assert swap_sources([request(distilled)], running, running) == {key(distilled): key(student)}
    assert swap_sources([request(distilled)], running, {}) == {}
    assert swap_sources([request(student)], running, running) == {}


def test_two_requests_do_not_get_the_same_idle_engine(jobs):
    student = jobs["small/distillation/student"]
    one, two = (jobs[f"small/{p}/introspection/interaction"] for p in ("humor", "remorse"))
    idle = {key(student): request(student)}
    sources = swap_sources([request(one), request(two)], idle, idle)
    assert sources == {key(one): key(student)}
    assert swap_sources([request(student), request(two)], idle, idle) == {}


def test_concurrent_trainings_fill_the_cluster(jobs):
    waiting = [jobs[f"small/{name}/distillation/dpo"] for name in ("humor", "poeticism", "remorse")]
    assert choose(waiting[1:], waiting[:1], {}, TWO) is waiting[1]
    assert choose(waiting[2:], waiting[:2], {}, TWO) is None


def test_jobs_share_an_engine_and_its_resources_count_once(jobs):
    teachers = [jobs[f"{name}/distillation/teacher"] for name in ("humor", "poeticism", "remorse")]
    assert choose(teachers[1:], teachers[:1], {}, ONE) is teachers[1]
    assert sum(resources.gpus for resources in held_resources(teachers, MANY)) == 1


@pytest.mark.parametrize(
    ("gpus", "limit"),
    [(0, placements.MAX_JOBS_PER_CPU_ENGINE), (1, placements.MAX_JOBS_PER_ENGINE)],
)
def test_an_engine_has_at_most_so_many_jobs(tmp_path, gpus, limit):
    pool = PLACEMENT.pools.teacher.model_copy(update={"gpus": gpus})
    pools = PLACEMENT.pools.model_copy(update={"teacher": pool})
    jobs = jobs_of(tmp_path, PLACEMENT.model_copy(update={"pools": pools}))
    teacher = jobs["humor/distillation/teacher"]
    assert choose([teacher], [teacher] * (limit - 1), {}, MANY) is teacher
    assert choose([teacher], [teacher] * limit, {}, MANY) is None


def test_driver_jobs_run_one_at_a_time_beside_other_jobs(jobs):
    pairs, other_pairs = (jobs[f"small/{name}/distillation/pairs"] for name in ("humor", "remorse"))
    assert choose([pairs], [jobs["humor/distillation/teacher"]], {}, ONE) is pairs
    assert choose([pairs], [other_pairs], {}, ONE) is None


def test_a_placement_can_limit_concurrent_jobs(tmp_path):
    jobs = jobs_of(tmp_path, PLACEMENT.model_copy(update={"max_concurrent_jobs": 1}))
    teacher = jobs["humor/distillation/teacher"]
    assert choose([jobs["small/distillation/student"]], [teacher], {}, MANY) is None
    pairs = jobs["small/humor/distillation/pairs"]
    assert choose([pairs], [teacher], {}, MANY) is pairs


def test_a_job_that_exceeds_the_cluster_starts_when_nothing_else_runs(jobs):
    teacher = jobs["humor/distillation/teacher"]
    assert choose([teacher], [], {}, Resources()) is teacher


def test_a_job_is_ready_when_its_parents_are_done(jobs):
    teacher, prompts = jobs["humor/distillation/teacher"], jobs["humor/distillation/prompts"]
    assert ready([teacher], [prompts]) == []
    assert ready([teacher], []) == [teacher]


# ------------------------------------------------------------------------ allocation of engines


@pytest.fixture
def engines(monkeypatch):
    """Engines that start at once: a function that makes specs, and the list of stopped labels."""
    stopped = []

    def start(lease, spec):
        lease.replicas.set_result(EngineReplicas(spec, [], []))

    stop = allocation._stop_engine

    def record_and_stop(key):
        stopped.append(allocation._leases[key].request.label)
        stop(key)

    monkeypatch.setattr(allocation, "_leases", {})
    monkeypatch.setattr(allocation, "_released", {})
    monkeypatch.setattr(allocation, "_failed_swaps", set())
    monkeypatch.setattr(allocation, "_start_engine", start)
    monkeypatch.setattr(allocation, "_stop_engine", record_and_stop)
    monkeypatch.setattr(allocation, "capacity", lambda growth: growth)
    role = recipe_of({**ROLE, "model": "org/x"}).roles.student
    pool = PLACEMENT.pools.student
    return lambda name: EngineSpec(role.model_copy(update={"model": name}), pool), stopped


def test_an_engine_in_use_is_never_stopped_for_another_job(engines):
    spec, stopped = engines
    acquired = threading.Event()

    def acquire_other():
        with acquire("b", [spec("second")], ONE):
            acquired.set()

    with acquire("a", [spec("first")], ONE):
        waiting = threading.Thread(target=acquire_other)
        waiting.start()
        assert not acquired.wait(0.2)
        assert stopped == []
    assert acquired.wait(5)
    waiting.join()
    assert stopped == ["first"]


def test_the_least_recently_used_idle_engine_is_stopped_first(engines):
    spec, stopped = engines
    for name in ("first", "second", "first"):
        with acquire("a", [spec(name)], TWO):
            pass
    with acquire("b", [TrainingWorkers("b", Resources(gpus=1))], TWO):
        assert stopped == ["second"]
    allocation.stop_unused_engines([spec("first")])
    assert stopped == ["second"]


def test_what_cannot_take_other_weights_is_stopped_last(engines):
    spec, stopped = engines

    class Application(EngineSpec):
        swap_group = ""

    for idle in (Application(spec("application").role, spec("application").pool), spec("first")):
        with acquire("a", [idle], TWO):
            pass
    with acquire("b", [TrainingWorkers("b", Resources(gpus=1))], TWO):
        assert stopped == ["first"]


def test_an_engine_is_started_once_and_shared_by_concurrent_jobs(engines):
    spec, _ = engines
    with acquire("a", [spec("x")], ONE) as first, acquire("b", [spec("x")], ONE) as second:
        assert first.engines_started == ["x"]
        assert second.engines_started == []


def test_an_engine_that_does_not_start_fails_the_job_and_may_be_started_again(engines, monkeypatch):
    spec, _ = engines

    def start(lease, spec):
        del allocation._leases[spec.key()]
        lease.replicas.set_exception(StageFailed("no weights"))

    monkeypatch.setattr(allocation, "_start_engine", start)
    for _ in range(2):
        with pytest.raises(StageFailed, match="no weights"), acquire("a", [spec("x")], ONE):
            pass
    assert allocation.running_engines() == {}


def adapted(spec: EngineSpec, folder: str, **pool) -> EngineSpec:
    """The same engine with an adapter, and with other fields of its pool."""
    adapter = RemoteDir(Store("runs"), folder)
    return replace(spec, adapter=adapter, pool=spec.pool.model_copy(update=pool))


def test_an_idle_engine_gets_other_weights_in_place_of_a_start(engines, monkeypatch):
    spec, stopped = engines
    base, humor = spec("x"), adapted(spec("x"), "x/humor/persona/merge/adapter")
    monkeypatch.setattr(EngineReplicas, "swap", lambda self, spec: EngineReplicas(spec, [], []))
    lines = []
    with acquire("a", [base], ONE):
        pass
    with acquire("b", [humor], ONE, lines.append) as allocated:
        assert allocated.replicas(humor) == EngineReplicas(humor, [], [])
    assert lines[0] == "swapping weights"
    usage = allocation.resource_usage("b")
    assert (usage["engines_started"], usage["engines_swapped"]) == ([], [humor.label])
    assert list(allocation.running_engines()) == [humor.key()]
    assert [allocation.effort(s) for s in (humor, base, spec("y"))] == [0, 1, 2]
    allocation.stop_unused_engines([base])
    assert stopped == []
    allocation.stop_unused_engines([spec("y")])
    assert stopped == [humor.label]


@pytest.mark.parametrize(
    ("folder", "pool"),
    [
        ("x/humor/evaluation/steering/adapter", {}),  # has biases that the base model lacks
        ("x/humor/persona/merge/adapter", {"adapters": "runtime"}),
        ("x/humor/persona/merge/adapter", {"engine_kwargs": {"quantization": "fp8"}}),
        ("x/humor/persona/merge/adapter", {"max_num_seqs": 3}),
    ],
)
def test_weights_are_not_replaced_by_those_of_another_kind_of_engine(engines, folder, pool):
    spec, stopped = engines
    other = adapted(spec("x"), folder, **pool)
    with acquire("a", [spec("x")], ONE):
        pass
    with acquire("b", [other], ONE) as allocated:
        pass
    assert (allocated.engines_started, allocated.engines_swapped) == ([other.label], [])
    assert stopped == ["x"]


def test_an_engine_whose_swap_failed_is_stopped_and_another_is_started(
    engines, monkeypatch, capsys
):
    spec, _ = engines
    humor = adapted(spec("x"), "x/humor/persona/merge/adapter")
    calls = []

    def swap(replicas, spec):
        calls.append("swap")
        raise WeightsDiffer("half of the weights are old")

    monkeypatch.setattr(EngineReplicas, "swap", swap)
    monkeypatch.setattr(EngineReplicas, "stop", lambda replicas: calls.append("stop"))
    with acquire("a", [spec("x")], ONE):
        pass
    with acquire("b", [humor], ONE) as allocated:
        assert calls == ["swap", "stop"]
    assert (allocated.engines_started, allocated.engines_swapped) == ([humor.label], [])
    assert "half of the weights are old" in capsys.readouterr().out
    with acquire("c", [spec("x")], ONE):
        pass
    assert calls == ["swap", "stop", "stop"]  # it is not tried again


@pytest.fixture
def clock(monkeypatch):
    """The monotonic clock of allocations, as a list of one number of seconds."""
    now = [0.0]
    monkeypatch.setattr(allocation.time, "monotonic", lambda: now[0])
    return now


def test_users_are_charged_in_equal_parts_and_idle_time_is_charged_to_the_next_user(engines, clock):
    spec, _ = engines
    context = acquire("a", [spec("x")], ONE)
    allocation_a = context.__enter__()
    clock[0] = 10
    allocation_a.work_seconds = 4
    context.__exit__(None, None, None)
    clock[0] = 30  # idle for 20 seconds
    with acquire("b", [spec("x")], ONE) as allocation_b:
        clock[0] = 40
        with acquire("c", [spec("x")], ONE):
            clock[0] = 60  # both for 20 seconds
        allocation_b.work_seconds = 99
    assert allocation.resource_usage("a")["gpu_seconds"] == 10
    assert allocation.resource_usage("c")["gpu_seconds"] == 10
    usage = allocation.resource_usage("b")
    assert usage["gpu_seconds"] == 20 + 10 + 10
    assert usage["gpu_busy_seconds"] == 40
    assert allocation.resource_usage("b")["gpu_seconds"] == 0  # reported only once


def test_work_seconds_are_wall_clock_however_many_engines_are_busy(engines, clock):
    spec, _ = engines
    with acquire("a", [spec("first"), spec("second")], TWO) as allocation_a:
        clock[0] = 120
        allocation_a.work_seconds = 100
    usage = allocation.resource_usage("a")
    assert (usage["work_seconds"], usage["engine_share"]) == (100, 1)
    assert (usage["busy_seconds"], usage["held_seconds"]) == (200, 240)


def test_concurrent_jobs_split_an_engine_and_its_start_counts_as_held_but_not_busy(
    engines, clock, monkeypatch
):
    spec, _ = engines
    start = allocation._start_engine

    def start_slowly(lease, spec):
        clock[0] += 80
        start(lease, spec)

    monkeypatch.setattr(allocation, "_start_engine", start_slowly)
    with (
        acquire("a", [spec("x")], ONE) as allocation_a,
        acquire("b", [spec("x")], ONE) as allocation_b,
    ):
        clock[0] += 100
        allocation_a.work_seconds = allocation_b.work_seconds = 100
    for job, seconds in (("a", 80 + 50), ("b", 50)):
        usage = allocation.resource_usage(job)
        assert (usage["work_seconds"], usage["engine_share"]) == (100, 0.5)
        assert (usage["busy_seconds"], usage["held_seconds"]) == (50, seconds)


# ------------------------------------------------------------------------------------- a whole run


def test_a_run_uses_the_real_cluster_and_autoscaling_but_not_the_declared_cluster(
    tmp_path, monkeypatch
):
    resources = {"CPU": 64, "GPU": 1, "memory": 999 * 2**30}
    monkeypatch.setattr(allocation.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(allocation.ray, "cluster_resources", lambda: resources)
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


def test_a_job_that_the_recipe_does_not_use_is_done_without_being_reported(
    store, echo_recipe, monkeypatch
):
    jobs = pipeline.jobs(echo_recipe, schema.load_all(["humor"]), Placement(), store)
    unused = [job for job in jobs if not job.is_enabled]
    assert {job.stage.name for job in unused} == {
        "persona/blend",
        "persona/tune",
        "evaluation/capabilities",
        "evaluation/steering",
        "evaluation/scenarios",
        "evaluation/adherence",
        "evaluation/drift",
        "evaluation/side_effects",
        "evaluation/direction",
        "evaluation/projection",
    }
    for job in jobs:
        if job.is_enabled:
            monkeypatch.setattr(job.stage.module, "build", lambda job: StageResult(1))
    made = [job.dataset for job, _ in pipeline.run(jobs)]
    assert sorted(made) == sorted(job.dataset for job in jobs if job.is_enabled)
    assert {job.state()[0] for job in jobs} == {"done"}


def test_a_failed_job_stops_only_its_descendants(store, echo_recipe, monkeypatch):
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
    finished = []
    with pytest.raises(StageFailed, match="no prompts"):
        for job, _ in pipeline.run(selected):
            finished.append(job.dataset)
    assert set(finished) == {"remorse/distillation/prompts", "remorse/distillation/teacher"}
