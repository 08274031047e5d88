"""Progress of running stages: a live line, counters for the manifest, and metrics for Ray.

Ray's nodes export the metrics to Prometheus as `ray_opencharacter_rows_total` and so on, each with
a `dataset` tag.
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

from opencharacter.config.roles import Limits
from opencharacter.errors import OpenCharacterError
from opencharacter.text.statistics import TextBaseline, exceeded_limit, measure

console = Console(emoji=False)
"""Where runs print."""

SECONDS_BETWEEN_LINES = 15
"""Seconds between progress lines if the output is not a terminal."""
LIVE_STATISTICS = ("refusals", "distinct_2", "self_bleu", "repeated_openings", "exaggeration")
"""Text statistics in the progress line of a stage."""

SECONDS_BETWEEN_REPORTS = 0.5
"""Seconds for which an actor collects its counts before it sends them."""
SECONDS_BETWEEN_MEASURES = 10
"""Seconds between measurements of the most recent texts."""
SECONDS_BETWEEN_EXPORTS = 10
"""Ray's interval for exporting a process's metrics to its node."""
RECENT_TEXTS = 1000
"""Texts that are measured."""
TEXTS_PER_REPORT = 20
"""Texts that an actor sends with its counts."""

METRICS = {
    "finished": "rows",
    "dropped": "dropped_rows",
    "tokens_out": "tokens",
    "gpu_seconds": "gpu_seconds",
}
"""Counts that become metrics, with the metric's name after `opencharacter_`."""
_actor_numbers = itertools.count(1)


@ray.remote(num_cpus=0)
class ProgressCounters:
    """An actor that collects the counts of a stage's other actors; the driver polls it.

    Args:
        dataset: the dataset that is made.
        gpus: number of GPUs that the stage holds.
    """

    def __init__(self, dataset: str, gpus: float):
        self.sums: Counter[str] = Counter()
        self.texts: deque[str] = deque(maxlen=RECENT_TEXTS)
        self.report_times: list[float] = []
        self.metrics = {name: dataset_metric(metric, dataset) for name, metric in METRICS.items()}
        self.gpus, self.last_read = gpus, time.monotonic()

    def add(self, counts: dict[str, float], texts: list[str]) -> None:
        """Add counts and a sample of texts."""
        self.sums.update(counts)
        self.texts.extend(texts)
        self._record_time()
        self._export(counts)

    def set(self, **values: float) -> None:
        """Replace counts by values."""
        self.sums = Counter({**self.sums, **values})
        self._record_time()

    def _record_time(self) -> None:
        self.report_times = [*self.report_times[:1], time.monotonic()]

    def span(self) -> float:
        """Return the seconds from the first report to the last."""
        return self.report_times[-1] - self.report_times[0] if self.report_times else 0.0

    def read(self) -> dict[str, float]:
        """Return the sums, and export the GPU-seconds since the last call."""
        now = time.monotonic()
        self._export({"gpu_seconds": self.gpus * (now - self.last_read)})
        self.last_read = now
        return dict(self.sums)

    def recent(self) -> list[str]:
        """Return a sample of the most recent texts."""
        return list(self.texts)

    @ray.method(max_task_retries=0)
    def end(self) -> None:
        """Exit once the last metrics are exported; Ray would keep the process for much longer."""
        time.sleep(SECONDS_BETWEEN_EXPORTS)
        ray.actor.exit_actor()

    def _export(self, counts: dict[str, float]) -> None:
        for name in self.metrics.keys() & counts.keys():
            if counts[name] > 0:
                self.metrics[name].inc(counts[name])


def dataset_metric(name: str, dataset: str) -> metrics.Counter:
    """Create a metric that is tagged with a dataset."""
    metric = metrics.Counter(
        f"opencharacter_{name}", "Counted for each dataset.", tag_keys=("dataset",)
    )
    return metric.set_default_tags({"dataset": dataset})


def actor_name(label: str) -> str:
    """Return an actor's name for Ray's dashboard.

    It is numbered, because Ray frees a name only when the driver that used it has ended.
    """
    return f"{label} #{next(_actor_numbers)}"


def start_counters(dataset: str, gpus: float) -> Any:
    """Start counters on the driver's node, so that losing another node does not lose them.

    The affinity is hard, because Ray treats a soft one only as a preference. If their process is
    lost, the counters restart from 0: lost counts are no reason to stop a run.

    Args:
        dataset: the dataset that is made.
        gpus: number of GPUs that the stage holds.

    Returns:
        Handle of a `ProgressCounters` actor.
    """
    affinity = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options: Any = {"scheduling_strategy": affinity, "name": actor_name(f"progress of {dataset}")}
    restarts = {"max_restarts": -1, "max_task_retries": -1}
    return ProgressCounters.options(**options, **restarts).remote(dataset, gpus)


def active_seconds(counters: Any) -> float:
    """Return the seconds between the first and the last report of a stage's actors."""
    seconds: Any = ray.get(counters.span.remote())
    return seconds


class ProgressReporter:
    """An actor's side of the counters, which sends counts twice a second and not for every row.

    Args:
        counters: handle of a `ProgressCounters` actor.
    """

    def __init__(self, counters: Any):
        self.counters = counters
        self.counts: Counter[str] = Counter()
        self.texts: list[str] = []
        self.scheduled = False

    def add(self, texts: Iterable[str] = (), **counts: float) -> None:
        """Add counts and texts. Must be called within a running event loop."""
        self.counts.update(counts)  # pyright: ignore[reportArgumentType, reportCallIssue]
        if len(self.texts) < TEXTS_PER_REPORT:
            self.texts.extend(texts)
        if not self.scheduled:
            self.scheduled = True
            asyncio.get_running_loop().call_later(SECONDS_BETWEEN_REPORTS, self.send)

    def send(self) -> None:
        """Send what has been collected."""
        self.counters.add.remote(dict(self.counts), self.texts)
        self.counts, self.texts, self.scheduled = Counter(), [], False


def duration(seconds: float) -> str:
    """Format seconds, for example 75 as `1m15s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


class ProgressLine:
    """The progress line of one stage: redrawn on a terminal, printed every few seconds elsewhere.

    Args:
        console: where to print.
        title: stage and scope.
        poll: returns the line's text, or None if there is nothing to show; called once a second.
    """

    shown: ClassVar[dict[ProgressLine, Text]] = {}
    """The current text of each line on the terminal."""
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
        """Return the text, or None if polling fails, for instance because storage refuses it."""
        with contextlib.suppress(OpenCharacterError, OSError):
            return self.poll()

    def _loop(self) -> None:
        last_line = time.monotonic()
        while not self.stop.wait(1):
            text = self._text()
            if text and self.console.is_terminal:
                self._show(text)
            elif text and time.monotonic() - last_line >= SECONDS_BETWEEN_LINES:
                last_line = time.monotonic()
                self.console.print(f"{self.title} {text}", soft_wrap=True)

    def _show(self, text: str | None) -> None:
        """Redraw the bottom of the terminal with this line's new text, or without the line."""
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
    """Computes the progress line of a generating stage from its counters.

    If the stage has limits, a sample of its texts is measured as well, and `fault` describes the
    first limit that they exceed.

    Args:
        counters: handle of a `ProgressCounters` actor.
        total: rows of the stage.
        attempts: log in which each poll records the progress.
        limits: limits of the stage, or None.
        baseline: what the texts are compared with.
        live: returns lines about the results so far; None if the stage has none.
    """

    def __init__(
        self,
        counters: Any,
        total: int,
        attempts: Any,
        limits: Limits | None,
        baseline: TextBaseline,
        live: Callable[[], list[str]] | None = None,
    ):
        self.counters, self.total, self.attempts = counters, total, attempts
        self.limits, self.baseline = limits, baseline
        self.start_time: float | None = None
        self.preparation = "waiting for resources"
        self.last_measured = 0.0
        self.statistics = ""
        self.fault: str | None = None
        self.live, self.results, self.last_results = live, "", time.monotonic()

    def prepare(self, preparation: str) -> None:
        """Set what the line shows until the engine runs."""
        self.preparation = preparation

    def begin(self) -> None:
        """Start the clock: the engine runs and the first rows are sent."""
        self.start_time = time.monotonic()

    def __call__(self) -> str:
        """Return the line's text."""
        kept = self.attempts.kept
        if self.start_time is None:
            self.attempts.touch()
            return f"{kept}/{self.total} rows, {self.preparation}"
        sums: Any = ray.get(self.counters.read.remote())
        finished = int(sums.get("finished", 0))
        started = kept + int(sums.get("started", 0))
        self.attempts.note(started, done=kept + finished, total=self.total)
        seconds = max(time.monotonic() - self.start_time, 1e-3)
        remaining = self.total - kept - finished
        eta = duration(remaining * seconds / finished) if finished else "?"
        return (
            f"{kept + finished}/{self.total} rows, {finished / seconds:.1f} rows/s, "
            f"{sums.get('tokens_out', 0) / seconds:.0f} tokens/s, "
            f"{int(sums.get('dropped', 0))} dropped, {eta} left{self._measure()}{self._results()}"
        )

    def _results(self) -> str:
        """Return the part of the line about the results so far, computed every few seconds."""
        now = time.monotonic()
        if self.live and now - self.last_results >= SECONDS_BETWEEN_MEASURES:
            self.last_results = now
            self.results = "".join(f" · {line}" for line in self.live())
        return self.results

    def _measure(self) -> str:
        """Return the part of the line about the texts, measured again every few seconds."""
        now = time.monotonic()
        if self.limits is None or now - self.last_measured < SECONDS_BETWEEN_MEASURES:
            return self.statistics
        texts: Any = ray.get(self.counters.recent.remote())
        if texts:
            self.last_measured = now
            statistics = measure(texts, self.baseline)
            self.fault = exceeded_limit(statistics, self.limits)
            shown = (f"{n} {statistics[n]:.2g}" for n in LIVE_STATISTICS if n in statistics)
            self.statistics = " · " + ", ".join(shown)
        return self.statistics


class TrainingProgress:
    """Computes the progress line of a training stage from its counters.

    Args:
        counters: handle of a `ProgressCounters` actor.
        attempts: log in which each poll records the progress.
    """

    def __init__(self, counters: Any, attempts: Any):
        self.counters, self.attempts = counters, attempts

    def __call__(self) -> str:
        """Return the line's text."""
        sums: Any = ray.get(self.counters.read.remote())
        if "steps" not in sums:  # training has not begun, or the counts of its beginning were lost
            self.attempts.touch()
            return f"step {int(sums['step'])}" if "step" in sums else "starting the trainer"
        step, kept = int(sums["step"]), int(sums["kept"])
        self.attempts.note(step, kept, done=step, total=int(sums["steps"]))
        seconds = (sums["steps"] - step) * sums["seconds"] / max(1, step - kept)
        loss = f"loss {sums['loss']:.3f}, " if "loss" in sums else ""
        eta = duration(seconds) if step > kept else "?"
        return f"step {step}/{int(sums['steps'])}, {loss}{eta} left"
