"""Lines of jobs that run at once."""

import io
import time

from rich.console import Console

from opencharacter.runtime.progress import ProgressLine


def test_lines_of_several_jobs_are_redrawn_together_and_go():
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
        time.sleep(1.5)
    assert "a/teacher" in drawn  # drawn again below what was said
    assert drawn.index("a/teacher") < drawn.index("b/dpo")
    assert ProgressLine.shown == {}
    assert ProgressLine.live is None
    assert screen.getvalue().rstrip("\r").endswith("\x1b[?25h")  # the cursor is back


def test_elsewhere_than_on_a_terminal_nothing_is_redrawn():
    screen = io.StringIO()
    with ProgressLine(Console(file=screen), "a/teacher", lambda: "1/5 rows"):
        time.sleep(1.2)
    assert screen.getvalue() == ""
