"""What a run will take: wall time, GPU-hours and money, from measured speeds.

The same `schedule.choose` that starts a run's jobs starts them here, on a clock of its own
(`simulate`). A pass over an engine takes its start (if the engine does not run yet), a while beside
its rows, and its tokens over the speed of one replica and the number of replicas; a training its
start and its tokens over the speed of one worker and the number of workers. Jobs that use an engine
at once share its speed. Reading prompts is in the measured speed of generation.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

from pydantic import Field, NonNegativeFloat, PositiveFloat, ValidationError

from opencharacter.config.base import Config
from opencharacter.config.files import explain, read_yaml
from opencharacter.config.placement import Placement, Resources, fits
from opencharacter.config.recipe import Recipe
from opencharacter.engines.spec import EngineSpec
from opencharacter.errors import UserError
from opencharacter.runtime.schedule import choose, keys, least, most, phases, ready, workers
from opencharacter.runtime.stage import Estimate, Job, TrainingWorkers
from opencharacter.runtime.store import MANIFEST, Store

INSTANT = 1e-9


class Speeds(Config):
    """Measured on the hardware of the placement, with the recipe's models."""

    teacher: PositiveFloat
    """Generated tokens per second of one replica."""
    student: PositiveFloat
    judge: PositiveFloat
    prompt_generator: PositiveFloat
    training: PositiveFloat
    """Trained tokens per second of one worker."""
    reading: PositiveFloat
    """Tokens per second of which one worker reads the log-probabilities."""
    stages: dict[str, PositiveFloat] = Field(default={})
    """Generated tokens per second of stages that are unlike their role, by their name."""
    engine_start: NonNegativeFloat
    """Seconds until an engine answers."""
    pass_start: NonNegativeFloat
    """Seconds that a pass over an engine takes beside its rows: processes, files."""
    training_start: NonNegativeFloat
    """Seconds that a training, or reading the reference, takes beside its tokens."""
    other: NonNegativeFloat
    """Seconds of a job that runs no model."""


class Cost(NamedTuple):
    """Of one job."""

    fixed: float
    """Seconds beside its tokens, without the start of engines."""
    work: float
    """Seconds of its tokens, if nobody shares its engines."""
    gpus: float
    """Held meanwhile."""
    judging: bool = False
    """Whether the judge, and not the student beside it, is what it waits for."""


# ------------------------------------------------------------------------------------------ speeds


def load_speeds(where: str) -> Speeds:
    """Speeds of a YAML file, of the result of benchmarks/personas.py, or of a storage with runs.

    Raises:
        UserError: naming the field that is missing or wrong.
    """
    path = Path(where)
    if not path.is_file():
        return measured(where)
    data = read_yaml("speeds", path)
    if "figures" in data:
        data = {k: v["median"] for k, v in data["figures"].items() if k in Speeds.model_fields}
    try:
        return Speeds.model_validate(data)
    except ValidationError as error:
        raise explain("speeds", path, error) from None


def measured(where: str) -> Speeds:
    """Speeds of the finished jobs in a storage; a role that did nothing has the student's.

    Raises:
        UserError: if none has generated, or none has trained.
    """
    store = Store.at(where)
    found = [store.manifest(dataset) or {} for dataset in datasets(store, "")]
    made = [m for m in found if m["tokens_out"] and m["busy_seconds"]]
    by_role: dict[str, list[dict[str, Any]]] = {}
    for manifest in made:
        by_role.setdefault(role_of(manifest), []).append(manifest)
    trained = [m for m in found if "tokens_per_s" in m["figures"]]
    read = [m for m in found if "tokens_read" in m["figures"] and m["busy_seconds"]]
    if "student" not in by_role or not trained or not read:
        raise UserError(
            f"--speed {where}: no file, and no storage in which a student has answered and was "
            "trained; run the recipe once, or with --smoke, or write the file"
        )
    speeds = {role: rate(manifests, role) for role, manifests in by_role.items()}
    starts = [m for m in found if m["engines_started"]]
    return Speeds(
        **{role: speeds.get(role, speeds["student"]) for role in ROLES},
        training=median(m["figures"]["tokens_per_s"] / workers_of(m) for m in trained),
        reading=sum(m["figures"]["tokens_read"] for m in read)
        / sum(worked(m) * workers_of(m) for m in read),
        stages={name: rate(of, role_of(of[0])) for name, of in by_stage(made).items()},
        engine_start=sum(m["starting_seconds"] for m in starts)
        / max(1, sum(len(m["engines_started"]) for m in starts)),
        pass_start=median(map(aside, made)),
        training_start=median(map(aside, [*trained, *read])),
        other=mean([m["seconds"] for m in found if not m["held_seconds"]] or [0.0]),
    )


ROLES = ("teacher", "student", "judge", "prompt_generator")


def datasets(store: Store, under: str) -> Iterator[str]:
    """Finished datasets below a folder."""
    for name in store.folders(under):
        dataset = f"{under}/{name}".lstrip("/")
        if store.exists(dataset, MANIFEST):
            yield dataset
        else:
            yield from datasets(store, dataset)


def role_of(manifest: dict[str, Any]) -> str:
    """Who wrote; older manifests do not say, but whose models the stage depends on."""
    roles = manifest["payload"]["roles"]
    return manifest.get("writer") or ("student" if "student" in roles else next(iter(roles)))


def by_stage(manifests: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Manifests by the name of their stage."""
    found: dict[str, list[dict[str, Any]]] = {}
    for manifest in manifests:
        found.setdefault(manifest["stage"], []).append(manifest)
    return found


def rate(manifests: Sequence[dict[str, Any]], role: str) -> float:
    """Generated tokens per second of one replica that one job has for itself, over several jobs."""
    seconds = sum(
        worked(m) * m.get("engine_share", 1) * m["placement"]["pools"][role]["replicas"]
        for m in manifests
    )
    return sum(m["tokens_out"] for m in manifests) / seconds


def worked(manifest: dict[str, Any]) -> float:
    """Seconds with work under way; older manifests have those of all engines together."""
    return manifest.get("work_seconds", manifest["busy_seconds"])


def workers_of(manifest: dict[str, Any]) -> int:
    return manifest["placement"]["training"]["workers"]


def aside(manifest: dict[str, Any]) -> float:
    """Seconds of a job beside its work and the start of engines, of one of its passes."""
    phases = max(1, manifest["phases"])
    seconds = manifest["seconds"] - manifest["starting_seconds"] - worked(manifest)
    return max(0.0, seconds) / phases


# ------------------------------------------------------------------------------------------ a job


def cost(job: Job, estimate: Estimate, speeds: Speeds, there: Resources) -> Cost:
    """What a job will take by itself.

    Args:
        job: with its placement.
        estimate: of the job.
        speeds: of one replica or worker.
        there: what the cluster has.
    """
    held = phases(job, there)
    gpus = most(held).gpus
    if not held:
        return Cost(speeds.other, 0, 0)
    first = held[0][0]
    if isinstance(first, TrainingWorkers):
        work = estimate.trained / speeds.training + estimate.read / speeds.reading
        return Cost(speeds.training_start, work / first.count, gpus)

    def seconds(role: str, tokens: int, speed: float) -> float:
        return tokens / (speed * getattr(job.placement.pools, role).replicas)

    role, said, fixed = first.role_name, estimate.tokens_out, speeds.pass_start * len(held)
    own = seconds(role, said - estimate.judged, getattr(speeds, role))
    judging = seconds("judge", estimate.judged, speeds.judge)
    together = any(len(one) > 1 for one in held)
    work = max(own, judging) if together else own + judging
    if job.stage.name in speeds.stages:
        work = seconds(role, said, speeds.stages[job.stage.name])
    return Cost(fixed, work, gpus, together and judging > own)


def planning_resources(placement: Placement) -> Resources:
    """What `plan` takes the cluster to have: this machine's, where the placement has no GPU."""
    needed = least(placement)
    said = placement.cluster or (placement.autoscaling_limit if placement.autoscaling else None)
    if said or needed.gpus:
        return said or needed
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cpus = placement.ray_cpus or os.cpu_count() or 1
    return needed | Resources(cpus=cpus, memory_gib=RAYS_SHARE * memory)


RAYS_SHARE = 0.7
"""Of a machine's memory, which Ray gives to what reserves some."""


# ------------------------------------------------------------------------------------------ a run


@dataclass
class PlannedJob:
    """A job on the simulation's clock.

    Args:
        job: what runs.
        began: seconds from the start of the run.
        fixed: seconds left before its work.
        work: seconds of work left, if nobody shares its engines.
        takes: its cost.
        starts: engines that were started for it.
        after: what ended as it began.
        ended: seconds from the start of the run.
        gpu_seconds: held, as in `engine.spent`.
        gpu_busy_seconds: of them with work under way.
    """

    job: Job
    began: float
    fixed: float
    work: float
    takes: Cost
    starts: int
    after: PlannedJob | None
    ended: float = 0
    gpu_seconds: float = 0
    gpu_busy_seconds: float = 0

    def remaining(self, share: float) -> float:
        """Seconds until its work begins, or ends."""
        return self.fixed or self.work / share

    def advance(self, seconds: float, share: float) -> None:
        """Let time pass, at its share of the engines that it uses."""
        self.gpu_seconds += seconds * self.takes.gpus * share
        if self.fixed:
            self.fixed = settled(self.fixed - seconds)
        else:
            self.gpu_busy_seconds += seconds * self.takes.gpus * share
            self.work = settled(self.work - seconds * share)


def settled(seconds: float) -> float:
    """Nothing, where only a rounding error is left."""
    return seconds if seconds > INSTANT else 0.0


@dataclass
class WarmEngines:
    """Engines on the simulation's clock.

    Args:
        start: seconds that one takes to start.
        rooms: of those that run, by key, the one that was asked for last at the end.
        unused: since when nobody has used them.
        starting: until when they start.
    """

    start: float
    rooms: dict[str, Resources] = field(default_factory=dict)
    unused: dict[str, float] = field(default_factory=dict)
    starting: dict[str, float] = field(default_factory=dict)

    def take(
        self, job: Job, running: Sequence[Job], there: Resources, now: float
    ) -> tuple[int, float, float]:
        """Have a job's engines, one after another.

        Returns:
            How many had to start, the seconds until all have started, and the GPU-seconds that
            others had stood unused.
        """
        in_use = {key for other in running for key in keys(other)}
        training = workers([*running, job])
        starts, until, idle = 0, now, 0.0
        for together in phases(job, there):
            for need in (n for n in together if isinstance(n, EngineSpec) and n.has_weights):
                key = need.key()
                if key not in self.rooms:
                    starts, until = starts + 1, until + self.start
                    self.starting[key] = until
                until = max(until, self.starting[key])
                idle += need.resources.gpus * (now - self.unused.pop(key, now))
                self.rooms[key] = self.rooms.pop(key, need.resources)
            self._make_room(in_use | {n.key() for n in together}, training, there)
        return starts, until - now, idle

    def _make_room(self, kept: set[str], training: list[Resources], there: Resources) -> None:
        while not fits([*self.rooms.values(), *training], there):
            going = next((key for key in self.rooms if key not in kept), None)
            if going is None:
                return
            self.drop(going)

    def drop(self, key: str) -> None:
        del self.rooms[key]
        self.unused.pop(key, None)

    def leave(self, unfinished: Iterable[Job], running: Iterable[Job], now: float) -> None:
        """Stop what nothing needs any more, and note what nobody uses now."""
        needed = {key for job in unfinished for key in keys(job)}
        in_use = {key for job in running for key in keys(job)}
        for key in [key for key in self.rooms if key not in needed]:
            self.drop(key)
        for key in self.rooms.keys() - in_use:
            self.unused.setdefault(key, now)


def simulate(
    jobs: Sequence[Job], costs: Mapping[str, Cost], engine_start: float, there: Resources
) -> list[PlannedJob]:
    """The jobs of a run as they end.

    Args:
        jobs: not done, in the table's order.
        costs: by dataset.
        engine_start: seconds.
        there: what the cluster has.
    """
    waiting, running, done = list(jobs), list[PlannedJob](), list[PlannedJob]()
    warm, now = WarmEngines(engine_start), 0.0
    while waiting or running:
        under_way = [one.job for one in running]
        while job := choose(ready(waiting, under_way), under_way, warm.rooms, there):
            waiting.remove(job)
            starts, begin, idle = warm.take(job, under_way, there, now)
            takes, after = costs[job.dataset], done[-1] if done else None
            fixed = takes.fixed + begin
            one = PlannedJob(job, now, fixed, takes.work, takes, starts, after, gpu_seconds=idle)
            running.append(one)
            under_way.append(job)
        shares = sharing(running, there)
        passed = min(map(PlannedJob.remaining, running, shares))
        now += passed
        for one, share in zip(running, shares, strict=True):
            one.advance(passed, share)
        for one in [one for one in running if not one.fixed and not one.work]:
            running.remove(one)
            one.ended = now
            done.append(one)
        left = [one.job for one in running]
        warm.leave([*waiting, *left], left, now)
    return done


def sharing(running: Sequence[PlannedJob], there: Resources) -> list[float]:
    """The share that each job has of the engines that set its pace.

    A job of several passes uses each of them for a part of its time.
    """
    load: dict[str, float] = {}
    paced = [pacing(one, there) for one in running]
    for one, resource_requests in zip(running, paced, strict=True):
        for key in resource_requests:
            load[key] = load.get(key, 0) + (0 if one.fixed else 1 / len(resource_requests))
    return [
        1 / max([1.0, *(load[key] for key in resource_requests)]) for resource_requests in paced
    ]


def pacing(one: PlannedJob, there: Resources) -> list[str]:
    """For each pass the key of the engine that a job waits for; an echo slows nobody down."""
    slowest = -1 if one.takes.judging else 0
    resource_requests = [together[slowest] for together in phases(one.job, there)]
    return [
        need.key()
        for need in resource_requests
        if isinstance(need, EngineSpec) and need.has_weights
    ]


def critical_path(done: Sequence[PlannedJob]) -> list[PlannedJob]:
    """The jobs of which each began as the one before ended, up to the last."""
    path: list[PlannedJob] = []
    at = done[-1] if done else None
    while at:
        path.append(at)
        at = at.after
    return path[::-1]


def plan(jobs: Sequence[Job], speeds: Speeds) -> list[PlannedJob]:
    """What running these jobs will take, job by job as they end."""
    there = planning_resources(jobs[0].placement)
    estimates = {job.dataset: job.stage.module.estimate(job) for job in jobs}
    costs = {job.dataset: cost(job, estimates[job.dataset], speeds, there) for job in jobs}
    return simulate(jobs, costs, speeds.engine_start, there)


class Totals(NamedTuple):
    """Of a run, or of a part of one."""

    hours: float
    """Of all jobs, one after another."""
    gpu_hours: float
    idle: float
    """Share of the GPU-hours without work under way."""


def sums(jobs: Iterable[PlannedJob]) -> Totals:
    """Add up jobs."""
    found = list(jobs)
    held = sum(one.gpu_seconds for one in found)
    idle = 1 - sum(one.gpu_busy_seconds for one in found) / held if held else 0.0
    return Totals(sum(one.ended - one.began for one in found) / 3600, held / 3600, idle)


def wall(done: Sequence[PlannedJob]) -> float:
    """Seconds from the start of a run to its end."""
    return done[-1].ended if done else 0.0


# ------------------------------------------------------------------------------------ a smaller run


class Saving(NamedTuple):
    """A recipe that asks for less, and what that does to its results."""

    what: str
    recipe: Recipe
    effect: str


def smaller(recipe: Recipe) -> Iterator[Saving]:
    """The same recipe with fewer answers, fewer transcripts, fewer games."""
    from opencharacter.evaluation.preferences import all_traits
    from opencharacter.evaluation.rating import half_width

    made, introspection, evaluation = recipe.distillation, recipe.introspection, recipe.evaluation
    k = made.teacher.answers
    if k > 1:
        fewer = {"answers": math.ceil(k / 2)}
        answers = changed(made, teacher=fewer, student=fewer)
        share = 1 - fewer["answers"] / k
        yield Saving(
            f"K {k} -> {fewer['answers']} answers",
            recipe.model_copy(update={"distillation": answers}),
            f"{share:.0%} fewer pairs to learn from",
        )
    own, talks = introspection.reflection, introspection.interaction
    half = changed(
        introspection,
        reflection={"transcripts_per_prompt": math.ceil(own.transcripts_per_prompt / 2)},
        interaction={"free": math.ceil(talks.free / 2), "leading": math.ceil(talks.leading / 2)},
    )
    yield Saving(
        "half the transcripts",
        recipe.model_copy(update={"introspection": half}),
        "as much less to learn from in SFT",
    )
    played = evaluation.preferences
    games = math.ceil(played.games / 2)
    traits, scale = len(played.traits or all_traits()), evaluation.rating.scale
    before, after = (half_width(count, traits, scale) for count in (played.games, games))
    yield Saving(
        f"{played.games:,} -> {games:,} games",
        recipe.model_copy(update={"evaluation": changed(evaluation, preferences={"games": games})}),
        f"ratings +-{before:.0f} -> +-{after:.0f} points",
    )


def changed(group: Any, **sections: dict[str, Any]) -> Any:
    """A group of sections with some of their fields changed."""
    return group.model_copy(
        update={
            name: getattr(group, name).model_copy(update=fields)
            for name, fields in sections.items()
        }
    )
