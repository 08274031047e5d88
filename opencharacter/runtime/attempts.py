"""The record of attempts beside an unfinished dataset, from which repeated work is counted."""

from __future__ import annotations

import datetime
import threading
from typing import Any

from opencharacter.runtime.stage import Job
from opencharacter.runtime.store import ATTEMPTS, FORMAT_VERSION, SHARDS

_writing = threading.Lock()
"""Held while the record of a stage is changed, of which several parts may be under way."""


class AttemptLog:
    """Records in storage how far each attempt at a stage has come.

    Progress is counted in rows for generation and in optimizer steps for training.

    Args:
        job: the job that is attempted.
        kept: rows or steps that earlier attempts finished.
        part: name of the part, for a stage that generates more than once.
    """

    def __init__(self, job: Job, kept: int, part: str = ""):
        self.job, self.kept = job, kept
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.attempt: dict[str, Any] = {"at": now, "part": part, "kept": kept, "reached": kept}
        with _writing:
            history = job.store.attempts(job.dataset)
            self.number = len(history)
            self._write([*history, self.attempt])

    def touch(self) -> None:
        """Record that this attempt is alive, although it has not progressed."""
        self.note(self.attempt["reached"])

    def note(self, reached: int, kept: int | None = None, **shown: int) -> None:
        """Write the progress of this attempt.

        Args:
            reached: rows started so far, those of earlier attempts included; or the last step.
            kept: rows or steps that this attempt did not have to repeat, if only known now.
            shown: `done` and `total`, the finished rows or steps and all of them, for `status`.
        """
        self.kept = self.kept if kept is None else kept
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.attempt |= {"reached": reached, "kept": self.kept, "updated": now, **shown}
        with _writing:
            history = self.job.store.attempts(self.job.dataset)
            self._write([*history[: self.number], self.attempt, *history[self.number + 1 :]])

    def _write(self, history: list[dict[str, Any]]) -> None:
        self.job.store.write_json(
            f"{self.job.dataset}/{SHARDS}/{ATTEMPTS}",
            {
                "format_version": FORMAT_VERSION,
                "fingerprint": self.job.fingerprint,
                "payload": self.job.payload,
                "attempts": history,
            },
        )


def repeated_work(history: list[dict[str, Any]]) -> int:
    """Count the rows or steps that one attempt had started and the next one started again."""
    previous: dict[str, dict[str, Any]] = {}
    repeated = 0
    for attempt in history:
        before = previous.get(attempt["part"])
        repeated += max(0, before["reached"] - attempt["kept"]) if before else 0
        previous[attempt["part"]] = attempt
    return repeated
