"""What a running stage tells: one live line, and the figures that the manifest keeps."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from rich.console import Console

console = Console()
"""Where runs are told."""

SECONDS_BETWEEN_LINES = 15
"""Where the output is not a terminal."""


@ray.remote(num_cpus=0)
class Counters:
    """Collects what the stage's actors report; the driver polls it."""

    def __init__(self):
        self.sums: dict[str, float] = {}

    def add(self, **numbers: float) -> None:
        for name, number in numbers.items():
            self.sums[name] = self.sums.get(name, 0) + number

    def set(self, **numbers: float) -> None:
        self.sums |= numbers

    def read(self) -> dict[str, float]:
        return dict(self.sums)


def duration(seconds: float) -> str:
    """`75` -> `1m15s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


class Line:
    """The live line of one stage: redrawn on a terminal, every few seconds elsewhere.

    Args:
        console: where to write.
        title: stage and scope.
        poll: returns the line's text, or None while there is nothing to say; called once a second.
    """

    def __init__(self, console: Console, title: str, poll: Callable[[], str | None]):
        self.console, self.title, self.poll = console, title, poll
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._loop, daemon=True)

    def __enter__(self) -> Line:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()

    def _loop(self) -> None:
        said = time.monotonic()
        live = self.console.is_terminal
        while not self.stop.wait(1):
            text = self.poll()
            if text and live:
                self.console.print(f"\r[cyan]{self.title}[/] {text}\x1b[K", end="", soft_wrap=True)
            elif text and time.monotonic() - said >= SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                self.console.print(f"{self.title} {text}", soft_wrap=True)
        if live:
            self.console.print("\r\x1b[K", end="")


class Meter:
    """Turns the counters of a generating stage into its line: rows, rows/s, tokens/s, time left.

    Args:
        counters: handle of a `Counters` actor.
        total: rows of the stage.
        attempts: told at each poll how far this attempt has come.
    """

    def __init__(self, counters: Any, total: int, attempts: Any):
        self.counters, self.total, self.attempts = counters, total, attempts
        self.began: float | None = None

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
            f"{int(sums.get('dropped', 0))} dropped, {eta} left"
        )


class StepMeter:
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
        return (
            f"step {step}/{int(sums['steps'])}, loss {sums.get('loss', float('nan')):.3f}, "
            f"{duration(eta)} left"
        )
