"""What a running stage tells: one live line, figures for the manifest, metrics for Ray's dashboard.

Ray's nodes export the metrics for Prometheus as `ray_opencharacter_rows_total` and so on, each with
the dataset that it is of.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import ray
from ray.util import metrics
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from opencharacter.config.recipe import Limits
from opencharacter.errors import OpenCharacterError
from opencharacter.text.statistics import TextBaseline, exceeded_limit, measure

console = Console(emoji=False)
"""Where runs are told."""

SECONDS_BETWEEN_LINES = 15
"""Where the output is not a terminal."""
ON_THE_LINE = ("refusals", "distinct_2", "self_bleu", "repeated_openings", "exaggeration")
"""Signatures that a running stage shows."""


SECONDS_BETWEEN_TALLIES = 0.5
SECONDS_BETWEEN_MEASURES = 10
"""Of the texts that were written last."""
SECONDS_BETWEEN_EXPORTS = 10
"""Ray's, from a process to its node's port."""
RECENT_TEXTS = 1000
TEXTS_PER_TALLY = 20


METRICS = {
    "finished": "rows",
    "dropped": "dropped_rows",
    "tokens_out": "tokens",
    "gpu_seconds": "gpu_seconds",
}
"""What is counted, and Ray's name for it after `opencharacter_`."""
_numbers = itertools.count(1)


@ray.remote(num_cpus=0)
class ProgressCounters:
    """Collects what the stage's actors report; the driver polls it.

    Args:
        dataset: what is made.
        gpus: held meanwhile.
    """

    def __init__(self, dataset: str, gpus: float):
        self.sums: Counter[str] = Counter()
        self.texts: deque[str] = deque(maxlen=RECENT_TEXTS)
        self.told: list[float] = []
        self.metrics = {name: counted(said, dataset) for name, said in METRICS.items()}
        self.gpus, self.since = gpus, time.monotonic()

    def add(self, numbers: dict[str, float], texts: list[str]) -> None:
        self.sums.update(numbers)
        self.texts.extend(texts)
        self._mark()
        self._export(numbers)

    def set(self, **numbers: float) -> None:
        self.sums = Counter({**self.sums, **numbers})
        self._mark()

    def _mark(self) -> None:
        self.told = [*self.told[:1], time.monotonic()]

    def span(self) -> float:
        """Seconds from the first report to the last."""
        return self.told[-1] - self.told[0] if self.told else 0.0

    def read(self) -> dict[str, float]:
        now = time.monotonic()
        self._export({"gpu_seconds": self.gpus * (now - self.since)})
        self.since = now
        return dict(self.sums)

    def recent(self) -> list[str]:
        """A sample of what was written last."""
        return list(self.texts)

    @ray.method(max_task_retries=0)
    def end(self) -> None:
        """Go, once the last numbers are exported; handles alone would keep the process for long."""
        time.sleep(SECONDS_BETWEEN_EXPORTS)
        ray.actor.exit_actor()

    def _export(self, numbers: dict[str, float]) -> None:
        for name in self.metrics.keys() & numbers.keys():
            if numbers[name] > 0:
                self.metrics[name].inc(numbers[name])


def counted(name: str, dataset: str) -> metrics.Counter:
    """A metric of one dataset."""
    made = metrics.Counter(f"opencharacter_{name}", "Of a stage.", tag_keys=("dataset",))
    return made.set_default_tags({"dataset": dataset})


def actor_name(what: str) -> str:
    """A name for the dashboard; numbered, for Ray gives one away only when its owner has ended."""
    return f"{what} #{next(_numbers)}"


def start_counters(dataset: str, gpus: float) -> Any:
    """Counters on the driver's own node: they go when it goes, not with another.

    A soft affinity would not keep them there: Ray takes it for no more than a wish. Where their
    process alone is lost they count on from 0; a figure is no reason to stop the work.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options: Any = {"scheduling_strategy": here, "name": actor_name(f"progress of {dataset}")}
    again = {"max_restarts": -1, "max_task_retries": -1}
    return ProgressCounters.options(**options, **again).remote(dataset, gpus)


def active_seconds(counters: Any) -> float:
    """Seconds in which work was under way, as its actors or workers reported it."""
    seconds: Any = ray.get(counters.span.remote())
    return seconds


class ProgressReporter:
    """An actor's side of the counters: what it adds leaves it twice a second, not at each row.

    Args:
        counters: handle of a `Counters` actor.
    """

    def __init__(self, counters: Any):
        self.counters = counters
        self.numbers: Counter[str] = Counter()
        self.texts: list[str] = []
        self.due = False

    def add(self, texts: Iterable[str] = (), **numbers: float) -> None:
        """Count; within a running event loop."""
        self.numbers.update(numbers)  # pyright: ignore[reportArgumentType, reportCallIssue]
        if len(self.texts) < TEXTS_PER_TALLY:
            self.texts.extend(texts)
        if not self.due:
            self.due = True
            asyncio.get_running_loop().call_later(SECONDS_BETWEEN_TALLIES, self.send)

    def send(self) -> None:
        self.counters.add.remote(dict(self.numbers), self.texts)
        self.numbers, self.texts, self.due = Counter(), [], False


def duration(seconds: float) -> str:
    """`75` -> `1m15s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


class ProgressLine:
    """The live line of one stage: redrawn on a terminal, said every few seconds elsewhere.

    Args:
        console: where to write.
        title: stage and scope.
        poll: returns the line's text, or None while there is nothing to say; called once a second.
    """

    shown: ClassVar[dict[ProgressLine, Text]] = {}
    """Of all that run, on a terminal."""
    live: ClassVar[Live | None] = None
    lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, console: Console, title: str, poll: Callable[[], str | None]):
        self.console, self.title, self.poll = console, title, poll
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._loop, daemon=True)

    def __enter__(self) -> ProgressLine:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        self._show(None)

    def _text(self) -> str | None:
        """The text, or None: what storage refuses to note is no reason to stop, or to say so."""
        with contextlib.suppress(OpenCharacterError, OSError):
            return self.poll()

    def _loop(self) -> None:
        said = time.monotonic()
        while not self.stop.wait(1):
            text = self._text()
            if text and self.console.is_terminal:
                self._show(text)
            elif text and time.monotonic() - said >= SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                self.console.print(f"{self.title} {text}", soft_wrap=True)

    def _show(self, text: str | None) -> None:
        """Redraw the foot of a terminal with this line's text, or without it."""
        with ProgressLine.lock:
            ProgressLine.shown.pop(self, None)
            if text:
                ProgressLine.shown[self] = Text.assemble(
                    (self.title, "cyan"), " ", text, no_wrap=True
                )
            if ProgressLine.shown and ProgressLine.live is None:
                ProgressLine.live = Live(console=self.console, auto_refresh=False, transient=True)
                ProgressLine.live.start()
            if ProgressLine.live:
                ordered = sorted(ProgressLine.shown, key=lambda line: line.title)
                ProgressLine.live.update(
                    Group(*(ProgressLine.shown[line] for line in ordered)), refresh=True
                )
            if ProgressLine.live and not ProgressLine.shown:
                ProgressLine.live.stop()
                ProgressLine.live = None


class GenerationProgress:
    """Turns the counters of a generating stage into its line: rows, rows/s, tokens/s, time left.

    Where the stage has limits, a sample of its texts is measured too; `fault` says which
    limit they are beyond.

    Args:
        counters: handle of a `Counters` actor.
        total: rows of the stage.
        attempts: told at each poll how far this attempt has come.
        limits: of the stage, or None.
        expected: what its texts are held against.
    """

    def __init__(
        self,
        counters: Any,
        total: int,
        attempts: Any,
        limits: Limits | None,
        baseline: TextBaseline,
    ):
        self.counters, self.total, self.attempts = counters, total, attempts
        self.limits, self.baseline = limits, baseline
        self.began: float | None = None
        self.measured_at = 0.0
        self.said = ""
        self.fault: str | None = None

    def begin(self) -> None:
        """From now on rows are under way."""
        self.began = time.monotonic()

    def __call__(self) -> str:
        kept = self.attempts.kept
        if self.began is None:
            return f"{kept}/{self.total} rows, starting the engine"
        sums: Any = ray.get(self.counters.read.remote())
        finished = int(sums.get("finished", 0))
        self.attempts.note(kept + int(sums.get("started", 0)))
        seconds = max(time.monotonic() - self.began, 1e-3)
        left = self.total - kept - finished
        eta = duration(left * seconds / finished) if finished else "?"
        return (
            f"{kept + finished}/{self.total} rows, {finished / seconds:.1f} rows/s, "
            f"{sums.get('tokens_out', 0) / seconds:.0f} tokens/s, "
            f"{int(sums.get('dropped', 0))} dropped, {eta} left{self._text_statistics()}"
        )

    def _text_statistics(self) -> str:
        """The part of the line about the texts, measured anew from time to time."""
        now = time.monotonic()
        if self.limits is None or now - self.measured_at < SECONDS_BETWEEN_MEASURES:
            return self.said
        texts: Any = ray.get(self.counters.recent.remote())
        if texts:
            self.measured_at = now
            measured = measure(texts, self.baseline)
            self.fault = exceeded_limit(measured, self.limits)
            shown = (f"{name} {measured[name]:.2g}" for name in ON_THE_LINE if name in measured)
            self.said = " · " + ", ".join(shown)
        return self.said


class TrainingProgress:
    """Turns the counters of a training stage into its line: step, loss, tokens/s, time left."""

    def __init__(self, counters: Any, attempts: Any):
        self.counters, self.attempts = counters, attempts

    def __call__(self) -> str:
        sums: Any = ray.get(self.counters.read.remote())
        if "step" not in sums:
            return "starting the trainer"
        step, kept = int(sums["step"]), int(sums["kept"])
        self.attempts.note(step, kept)
        eta = (sums["steps"] - step) * sums["seconds"] / max(1, step - kept)
        loss = f"loss {sums['loss']:.3f}, " if "loss" in sums else ""
        left = duration(eta) if step > kept else "?"
        return f"step {step}/{int(sums['steps'])}, {loss}{left} left"
