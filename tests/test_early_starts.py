"""Engines that start before a job needs them, and those of a job that start side by side."""

import threading
import time
from dataclasses import replace

import pytest
from samples import recipe_of
from test_schedule import MANY, ONE, PLACEMENT, ROLE, TWO, adapted, engines, jobs, jobs_of, request

from opencharacter.config.placement import Pool, Resources
from opencharacter.engines import allocation
from opencharacter.engines.allocation import acquire, kept_from_swaps, start_early
from opencharacter.engines.early import engine_to_start
from opencharacter.engines.leases import covered_seconds
from opencharacter.engines.replicas import EngineReplicas
from opencharacter.errors import StageFailed
from opencharacter.runtime.schedule import phases
from opencharacter.runtime.stage import TrainingWorkers
from opencharacter.runtime.threads import run_side_by_side

__all__ = ["engines", "jobs"]
FOUR = Resources(cpus=64, gpus=4, memory_gib=999)
ANSWERS, DPO = "small/humor/evaluation/answers", "small/humor/distillation/dpo"


def chosen(waiting, running, engines, available):
    """The label of the engine that starts early, and whether it is a spare."""
    spec = engine_to_start(waiting, running, engines, available)
    return spec and (spec.label, spec.key() in engines)


def test_an_engine_starts_while_another_job_runs_and_there_is_room_for_the_training_to_come(jobs):
    teacher, student = jobs["humor/distillation/teacher"], jobs["small/distillation/student"]
    dpo = jobs[DPO]
    running = {request(teacher).key(): request(teacher)}
    assert chosen([student], [teacher], running, TWO) == ("org/student", False)
    assert chosen([student], [teacher], running, ONE) is None
    assert chosen([student, dpo], [teacher], running, TWO) is None
    assert chosen([student], [teacher, dpo], running, TWO) is None
    both = running | {request(student).key(): request(student)}
    assert chosen([student, teacher], [], both, MANY) is None


def test_an_engine_that_sleeps_during_training_does_not_start_then(tmp_path):
    pools = {role: {"gpus": 1, "sleep_for_training": True} for role in ("teacher", "student")}
    placement = PLACEMENT.model_copy(update={"pools": PLACEMENT.pools.model_validate(pools)})
    jobs = jobs_of(tmp_path, placement)
    student, dpo = jobs["small/distillation/student"], jobs[DPO]
    assert chosen([student], [], {}, MANY) == ("org/student", False)
    assert chosen([student], [dpo], {}, MANY) is None


def test_an_engine_whose_adapter_is_not_trained_yet_starts_as_a_spare(jobs):
    dpo, reflection = jobs[DPO], jobs["small/humor/introspection/reflection"]
    student = request(jobs["small/distillation/student"])
    base = {student.key(): student}
    assert chosen([reflection], [dpo], {}, MANY) == ("org/student", False)
    assert chosen([reflection], [dpo], base, MANY) is None  # no other job needs the base model
    waiting = [jobs["small/distillation/student"], reflection]
    assert chosen(waiting, [dpo], base, MANY) == ("org/student", True)
    assert chosen(waiting, [dpo], {**base, "spare": student}, MANY) is None
    assert chosen(waiting, [], base, MANY) == (request(reflection).label, False)


def test_an_engine_with_steering_vectors_starts_once_they_are_there(make_jobs):
    conditions = ["base", "prompted", "steered", "distilled", "full"]
    compared = {"answers": {"count": 4, "conditions": conditions}}
    recipe = recipe_of({**ROLE, "model": "org/student"}, evaluation=compared)
    jobs = {job.stage.name: job for job in make_jobs(recipe, PLACEMENT)}
    steering, answers = jobs["evaluation/steering"], jobs["evaluation/answers"]
    ((base, steered, *trained),) = answers.resource_requests
    running = {spec.key(): spec for spec in (base, *trained)}
    assert "steering" in steered.label
    assert chosen([answers], [steering], running, MANY) is None
    assert chosen([answers], [], running, MANY) == (steered.label, False)


def test_conditions_answer_at_once_if_they_fit_and_else_take_turns_with_the_judge(jobs):
    answers, played = jobs[ANSWERS], jobs["small/humor/evaluation/preferences"]
    assert len(answers.resource_requests) == len(phases(answers, MANY)) == 1
    assert [len(phase) for phase in phases(answers, ONE)] == [1] * len(phases(answers, MANY)[0])
    (at_once,) = phases(played, FOUR)
    judge = at_once[-1]
    assert judge.role_name == "judge"
    assert phases(played, TWO) == [(student, judge) for student in at_once[:-1]]
    assert phases(played, ONE) == [(spec,) for spec in at_once]


def test_a_job_gets_an_engine_that_was_started_early_and_reports_its_start(engines):
    spec, stopped = engines
    start_early(spec("x"))
    with acquire("a", [spec("x")], ONE) as allocated:
        assert allocated.engines_started == ["x"]
    usage = allocation.resource_usage("a")
    assert usage["engines_started"] == ["x"]
    assert stopped == []


def test_a_spare_gets_the_weights_of_the_next_job_and_a_needed_engine_keeps_its_own(
    engines, monkeypatch
):
    spec, stopped = engines
    humor = adapted(spec("x"), "x/humor/persona/merge/adapter")
    monkeypatch.setattr(EngineReplicas, "swap", lambda self, spec: EngineReplicas(spec, [], []))
    with acquire("a", [spec("x")], TWO):
        pass
    start_early(spec("x"))
    while not all(lease.is_idle for lease in allocation._leases.values()):
        time.sleep(0.01)
    allocation.stop_unused_engines([spec("x"), humor])
    with acquire("b", [humor], TWO) as allocated:
        pass
    assert (allocated.engines_swapped, allocated.engines_started) == ([humor.label], ["x"])
    assert set(allocation.running_engines()) == {spec("x").key(), humor.key()}
    assert stopped == []


def test_an_engine_that_a_job_is_about_to_use_is_not_given_other_weights(engines):
    spec, _ = engines
    humor = adapted(spec("x"), "x/humor/persona/merge/adapter")
    with acquire("a", [spec("x")], TWO):
        pass
    with kept_from_swaps([spec("x")]), acquire("b", [humor], TWO) as allocated:
        assert allocated.engines_swapped == []
    assert allocation.effort(spec("x")) == 0


def test_an_engine_that_is_starting_is_neither_stopped_nor_given_other_weights(
    engines, monkeypatch
):
    spec, stopped = engines
    start, may_start = allocation._start_engine, threading.Event()

    def start_when_allowed(lease, spec):
        may_start.wait(5)
        start(lease, spec)

    monkeypatch.setattr(allocation, "_start_engine", start_when_allowed)
    start_early(spec("x"))
    acquired = threading.Event()

    def train():
        with acquire("b", [TrainingWorkers("b", Resources(gpus=1))], ONE):
            acquired.set()

    training = threading.Thread(target=train)
    training.start()
    assert not acquired.wait(0.2)
    may_start.set()
    assert acquired.wait(5)
    training.join()
    assert stopped == ["x"]


def test_an_early_start_that_fails_is_not_repeated(engines, monkeypatch):
    spec, _ = engines

    def fail(lease, spec):
        raise StageFailed("no memory")

    monkeypatch.setattr(allocation, "_failed_early", set())
    monkeypatch.setattr(allocation, "_start_engine", fail)
    assert allocation.may_start_early()
    start_early(spec("x"))
    while allocation.may_start_early():
        time.sleep(0.01)


def test_the_engines_of_a_phase_start_side_by_side(engines, monkeypatch):
    spec, _ = engines
    start, both = allocation._start_engine, threading.Barrier(2, timeout=5)

    def start_together(lease, spec):
        both.wait()
        start(lease, spec)

    monkeypatch.setattr(allocation, "_start_engine", start_together)
    with acquire("a", [spec("first"), spec("second")], TWO) as allocated:
        assert sorted(allocated.engines_started) == ["first", "second"]


def test_engines_that_measure_the_memory_of_a_shared_gpu_start_one_after_another():
    shared = Pool(gpus=0.5)
    fixed = replace_engine_kwargs(shared, kv_cache_memory_bytes=6_000_000_000)
    assert [allocation.shares_gpu(pool) for pool in (shared, fixed, Pool(gpus=1), Pool())] == [
        True,
        False,
        False,
        False,
    ]


def replace_engine_kwargs(pool: Pool, **engine_kwargs) -> Pool:
    return pool.model_copy(update={"engine_kwargs": engine_kwargs})


def test_time_that_overlaps_counts_once():
    assert covered_seconds([]) == 0
    assert covered_seconds([(5, 9), (0, 3), (1, 2), (8, 10)]) == 3 + 5


def test_waiting_counts_only_where_no_other_part_of_the_job_works(engines, monkeypatch):
    spec, _ = engines
    now = [0.0]
    monkeypatch.setattr(allocation.time, "monotonic", lambda: now[0])
    start, seconds = allocation._start_engine, iter((10, 40))

    def start_slowly(lease, spec):
        now[0] += next(seconds)
        start(lease, spec)

    monkeypatch.setattr(allocation, "_start_engine", start_slowly)
    with acquire("a", [spec("first")], TWO) as first:
        with acquire("a", [spec("second")], TWO) as second:
            now[0] = 70
            second.work_seconds = 20
        first.work_seconds = 45  # from 25 to 70
    usage = allocation.resource_usage("a")
    assert usage["work_seconds"] == 45
    assert usage["starting_seconds"] == 10 + (25 - 10)
    assert usage["engine_start_seconds"] == 10 + 40
    assert usage["engine_share"] == pytest.approx((45 + 20) / 45, abs=1e-4)


def test_functions_run_side_by_side_and_the_first_error_is_raised_at_the_end():
    both = threading.Barrier(2, timeout=5)
    assert run_side_by_side([lambda: both.wait() >= 0, lambda: both.wait() >= 0]) == [True, True]
    assert run_side_by_side([lambda: 1]) == [1]
    assert run_side_by_side([]) == []
    ended = threading.Event()

    def fail():
        raise StageFailed("first")

    with pytest.raises(StageFailed, match="first"):
        run_side_by_side([fail, ended.set])
    assert ended.is_set()


def test_a_placement_without_room_starts_nothing_early(tmp_path):
    jobs = jobs_of(tmp_path, PLACEMENT.model_copy(update={"training": PLACEMENT.training}))
    waiting = list(jobs.values())
    assert engine_to_start(waiting, [], {}, Resources()) is None
    spec = engine_to_start(waiting, [], {}, TWO)
    assert spec is not None
    assert replace(spec, adapter=None) == spec
