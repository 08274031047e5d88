"""Progress lines of jobs that run concurrently."""

import io
import time

from rich.console import Console

from opencharacter.runtime import progress
from opencharacter.runtime.progress import ProgressLine


def test_progress_lines_of_concurrent_jobs_are_redrawn_together_and_removed_at_the_end():
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=60)
    with (
        ProgressLine(console, "b/dpo", lambda: "step 3/9"),
        ProgressLine(console, "a/teacher", lambda: "1/5 rows"),
    ):
        while "step 3/9" not in screen.getvalue() or "1/5 rows" not in screen.getvalue():
            time.sleep(0.1)
        console.print("done a/prompts")
        drawn = screen.getvalue().rsplit("done a/prompts")[-1]
    assert "a/teacher" in drawn  # redrawn below the printed line
    assert drawn.index("a/teacher") < drawn.index("b/dpo")
    assert ProgressLine.shown == {}
    assert ProgressLine.live is None
    assert screen.getvalue().rstrip("\r").endswith("\x1b[?25h")  # the cursor is back


def test_without_a_terminal_whole_lines_are_printed_and_nothing_is_redrawn(monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    screen = io.StringIO()
    with ProgressLine(Console(file=screen), "a/teacher", lambda: "1/5 rows"):
        while not screen.getvalue():
            time.sleep(0.1)
    assert set(screen.getvalue().split("\n")) == {"a/teacher 1/5 rows", ""}
    assert ProgressLine.shown == {}


def test_without_a_terminal_no_line_is_printed_before_its_time(monkeypatch):
    polled = []
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 3600)
    screen = io.StringIO()
    with ProgressLine(Console(file=screen), "a/teacher", lambda: polled.append(1) or "1/5 rows"):
        while len(polled) < 2:
            time.sleep(0.1)
    assert screen.getvalue() == ""
