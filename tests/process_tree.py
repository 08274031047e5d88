"""The processes below another one, any of which may end while a test looks at them."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterable

import psutil

LOOKS = 3
"""How often processes are listed: one that runs was missing from a list now and then."""


def descendants(pids: Iterable[int], *titles: str) -> list[psutil.Process]:
    """Return the processes below some others that have one of the titles, or all.

    A title is a part of a process's name or command line.
    """
    ancestors, found = [psutil.Process(pid) for pid in pids], {}
    for look in range(LOOKS):
        time.sleep(0.05 * (look > 0))
        for process in (p for one in ancestors for p in one.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                line = process.name() + " ".join(process.cmdline())
                if not titles or any(title in line for title in titles):
                    found[process.pid] = process
    return [process for process in found.values() if process.is_running()]


def wait_for_descendants(pids: Iterable[int], title: str, count: int = 1) -> list[psutil.Process]:
    """Return the processes with a title below some others, once there are at least `count`."""
    ancestors, deadline = [*pids], time.monotonic() + 20
    while len(found := descendants(ancestors, title)) < count:
        assert time.monotonic() < deadline, (
            title,
            [process.info for process in psutil.process_iter(["pid", "ppid", "cmdline"])],
        )
    return found


def kill_tree(process: subprocess.Popen) -> None:
    """Kill a process and all processes below it."""
    for each in [*descendants([process.pid]), process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()
