"""Engines that sleep while an adapter is trained; the engines are fakes that record calls."""

import threading

import pytest
from samples import ECHO_ROLE, recipe_of

from opencharacter.cli.plan import sleep_note
from opencharacter.config.placement import Placement, Pool, Resources
from opencharacter.engines import allocation
from opencharacter.engines.allocation import acquire
from opencharacter.engines.replicas import EngineReplicas
from opencharacter.engines.spec import EngineSpec
from opencharacter.errors import StageFailed
from opencharacter.runtime import schedule
from opencharacter.runtime.stage import TrainingWorkers

ROOM = Resources(cpus=4, gpus=1, memory_gib=16)
POOL = Pool(gpus=0.2, sleep_for_training=True)
ROLE = recipe_of({**ECHO_ROLE, "model": "a/model"}).roles.student
SPEC = EngineSpec(ROLE, POOL)


class FakeReplicas(EngineReplicas):
    """Records what is done with an engine.

    Args:
        failing: name of the method that fails.
    """

    def __init__(self, failing: str = ""):
        super().__init__(SPEC, [], [])
        object.__setattr__(self, "calls", [])
        object.__setattr__(self, "failing", failing)

    def _record(self, name: str) -> None:
        self.calls.append(name)  # type: ignore
        if name == self.failing:  # type: ignore
            raise StageFailed("no sleep mode here\nand more")

    def sleep(self) -> None:
        self._record("sleep")

    def wake(self) -> None:
        self._record("wake")

    def stop(self) -> None:
        self._record("stop")


@pytest.fixture
def start_fake(monkeypatch):
    """Return a function that makes an idle engine of a fake."""
    monkeypatch.setattr(allocation, "_leases", {})
    monkeypatch.setattr(allocation, "create_actors", lambda spec, count: [])

    def start(replicas: FakeReplicas) -> FakeReplicas:
        lease = allocation.Lease(SPEC, 0.0)
        lease.replicas.set_result(replicas)
        allocation._leases[SPEC.key()] = lease
        return replicas

    return start


def workers(gpus: float = 0.2) -> TrainingWorkers:
    return TrainingWorkers("dpo", Resources(cpus=1, gpus=gpus))


def test_an_engine_sleeps_during_training_and_is_woken_once_by_the_jobs_that_wait(start_fake):
    fake = start_fake(FakeReplicas())
    both_answer = threading.Barrier(2, timeout=20)

    def answer(job: str) -> None:
        with acquire(job, [SPEC], ROOM):
            fake.calls.append("answer")  # type: ignore
            both_answer.wait()

    threads = [threading.Thread(target=answer, args=(job,)) for job in ("a", "b")]
    with acquire("dpo", [workers()], ROOM):
        for thread in threads:
            thread.start()
        threads[0].join(timeout=0.3)
        assert fake.calls == ["sleep"]  # type: ignore
    for thread in threads:
        thread.join(timeout=20)
    assert fake.calls == ["sleep", "wake", "answer", "answer"]  # type: ignore


def test_training_waits_until_the_engine_is_unused(start_fake):
    fake = start_fake(FakeReplicas())

    def train() -> None:
        with acquire("dpo", [workers()], ROOM):
            fake.calls.append("train")  # type: ignore

    thread = threading.Thread(target=train)
    with acquire("answers", [SPEC], ROOM):
        thread.start()
        thread.join(timeout=0.3)
        assert fake.calls == []  # type: ignore
    thread.join(timeout=20)
    assert fake.calls == ["sleep", "train"]  # type: ignore


def test_an_engine_that_cannot_sleep_is_stopped_with_a_line(start_fake, capsys):
    fake = start_fake(FakeReplicas(failing="sleep"))
    with acquire("dpo", [workers()], ROOM):
        assert fake.calls == ["sleep", "stop"]  # type: ignore
        assert allocation.running_engines() == {}
    assert "because it cannot sleep: no sleep mode here\n" in capsys.readouterr().out


def test_an_engine_that_does_not_wake_is_started_again(start_fake, monkeypatch):
    fake, fresh = start_fake(FakeReplicas(failing="wake")), FakeReplicas()
    monkeypatch.setattr(
        allocation, "_start_engine", lambda lease, spec: lease.replicas.set_result(fresh)
    )
    with acquire("dpo", [workers()], ROOM):
        pass
    with acquire("answers", [SPEC], ROOM) as allocated:
        assert allocated.replicas(SPEC) is fresh
    assert fake.calls == ["sleep", "wake", "stop"]  # type: ignore


def test_an_engine_beside_which_training_does_not_fit_is_stopped(start_fake):
    fake = start_fake(FakeReplicas())
    with acquire("dpo", [workers(gpus=1)], ROOM):
        assert fake.calls == ["stop"]  # type: ignore


def test_the_scheduler_does_not_start_training_beside_engines_that_should_sleep(make_jobs):
    recipe = recipe_of({**ECHO_ROLE, "model": "a/model"})
    pools = {"student": {"gpus": 0.2, "sleep_for_training": True}}
    for changed, beside in ((pools, False), ({"student": {"gpus": 0.2}}, True)):
        placement = Placement.model_validate(
            {"pools": changed, "training": {"gpus": 0.2, "cpus": 1}}
        )
        jobs = {job.stage.name: job for job in make_jobs(recipe, placement)}
        answers, dpo = jobs["introspection/interaction"], jobs["distillation/dpo"]
        assert schedule.fits_beside(dpo, [answers], ROOM) is beside
        assert schedule.fits_beside(answers, [dpo], ROOM) is beside


@pytest.mark.parametrize(
    ("pool", "gpus", "note"),
    [
        (POOL, 0.2, ", asleep during training"),
        (POOL, 1, ", stopped for training, because both do not fit"),
        (Pool(sleep_for_training=True), 0, ", stopped if training needs its CPUs"),
        (Pool(gpus=0.2), 0.2, ""),
    ],
)
def test_plan_says_whether_engines_sleep(pool, gpus, note):
    placement = Placement.model_validate(
        {"training": {"gpus": gpus}, "cluster": {"cpus": 4, "gpus": 1, "memory_gib": 16}}
    )
    found = sleep_note(placement, EngineSpec(ROLE, pool))
    assert found.startswith(note)
    assert bool(found) == bool(note)
