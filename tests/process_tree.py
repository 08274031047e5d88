"""The processes below another one, any of which may end while a test looks at them."""

from __future__ import annotations

import contextlib
import os
import subprocess

import psutil


def descendants(pid: int | None = None, *titles: str) -> list[psutil.Process]:
    """Return the processes below one (this one by default) that have one of the titles, or all.

    A title is a part of a process's name or command line.
    """
    found = []
    for process in psutil.Process(pid or os.getpid()).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            line = process.name() + " ".join(process.cmdline())
            if not titles or any(title in line for title in titles):
                found.append(process)
    return found


def kill_tree(process: subprocess.Popen) -> None:
    """Kill a process and all processes below it."""
    for child in [*descendants(process.pid), psutil.Process(process.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait()
