"""The Inspect tasks, run against a local OpenAI-compatible server; skipped without inspect-ai."""

import math

import answering as servers
import pytest

pytest.importorskip("inspect_ai")
pytest.importorskip("openai")

from inspect_ai import eval as run_inspect
from inspect_ai.model import ChatMessageAssistant, ChatMessageUser

from opencharacter.integrations import inspect_tasks


def test_a_grade_that_is_neither_yes_nor_no_is_missing():
    assert inspect_tasks.read_grade("Yes.") == 1
    assert inspect_tasks.read_grade("no, never") == 0
    assert math.isnan(inspect_tasks.read_grade("yes or no"))
    assert math.isnan(inspect_tasks.read_grade("perhaps"))


def test_the_auditor_sees_the_conversation_from_the_other_side():
    assert inspect_tasks.swapped(ChatMessageUser(content="Hello")).role == "assistant"
    assert inspect_tasks.swapped(ChatMessageAssistant(content="Hi")).role == "user"


@pytest.mark.parametrize("name, turns", [("adherence", 1), ("audit", 2)])
def test_both_tasks_run_against_a_server(monkeypatch, tmp_path, name, turns):
    monkeypatch.setenv(f"{name.upper()}_API_KEY", "loopback-key")

    grades = iter(["yes", "No.", "perhaps"])

    def reply(request):
        asks_grader = request.get("max_tokens", 99) == 16
        return 200, servers.completion(next(grades) if asks_grader else "The sea sings.")

    server = servers.serve(reply)
    url = f"http://127.0.0.1:{server.server_port}/v1"
    monkeypatch.setenv(f"{name.upper()}_BASE_URL", url)
    made = getattr(inspect_tasks, name)("poeticism", count=3, max_tokens=20)
    if name == "audit":
        made = inspect_tasks.audit("poeticism", count=3, turns=2, max_tokens=20)
    try:
        (log,) = run_inspect(
            made, model=f"openai-api/{name}/m", log_dir=str(tmp_path), display="none"
        )
    finally:
        server.shutdown()
    assert log.status == "success", log.error
    assert log.results is not None and log.samples is not None
    (scored,) = log.results.scores
    assert scored.metrics["shown"].value == 0.5
    assert scored.metrics["low"].value == 0 and scored.metrics["high"].value == 1
    assert (scored.metrics["graded"].value, scored.unscored_samples) == (2, 1)
    spoken = [m.role for m in log.samples[0].messages]
    assert spoken == ["user", "assistant"] * turns
