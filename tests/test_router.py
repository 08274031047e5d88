"""Which requests reach the same replica of a server."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from opencharacter.config.placement import Pool
from opencharacter.serving.router import ConversationRouter, request_text, router_options
from opencharacter.text.chat import assistant, system, user

CHAT = [system("Be brief."), user("Hello?")]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("chat", {"model": "m", "messages": CHAT}), "Be brief.\nHello?"),
        (("completions", {"model": "m", "prompt": "Once"}), "Once"),
        (("responses", {"model": "m", "input": "Hello?"}), "Hello?"),
        (("student", "m", CHAT, "sampling"), "Be brief.\nHello?"),
        (("chat", {"messages": [{"role": "user", "content": [{"text": "Hi"}]}]}), "Hi"),
        ((), None),
        (("chat", {"model": "m"}), None),
        (("chat", {"messages": [{"role": "assistant", "content": None}]}), None),
    ],
)
def test_the_text_of_a_request_is_that_of_its_conversation(arguments, text):
    assert request_text(arguments) == text


def test_the_text_of_a_later_turn_begins_with_that_of_the_earlier_one():
    later = [*CHAT, assistant("Hi."), user("Bye.")]
    text = request_text(("chat", {"messages": CHAT}))
    assert text
    assert (request_text(("chat", {"messages": later})) or "").startswith(text)


def test_only_deployments_of_several_replicas_route_by_prefixes():
    assert router_options(Pool()) == {}
    for pool in (Pool(replicas=2, max_num_seqs=64), Pool(max_replicas=2, max_num_seqs=64)):
        config = router_options(pool)["request_router_config"]
        assert config.get_request_router_class() is ConversationRouter
        assert config.request_router_kwargs["imbalanced_threshold"] == 16


def test_the_benchmark_compares_cached_shares_and_seconds(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import routing

    def run(cached: int, seconds: float) -> dict:
        turn = {"turn_p50": seconds, "turn_p95": 2 * seconds}
        return {"cached_tokens": cached, "prompt_tokens": 200, **turn}

    series = {"opencharacter": [run(150, 4.0)], routing.DEFAULT: [run(100, 6.0)]}
    found = routing.figures(series, {}, {})
    medians = {name: figure["median"] for name, figure in found.items()}
    assert (medians["cached_share"], medians["default_cached_share"]) == (0.75, 0.5)
    assert (medians["turn_p95_s"], medians["default_turn_p95_s"]) == (8, 12)
    assert medians["ratio_turn_p50"] == 1.5


@pytest.mark.slow
def test_two_replicas_of_a_server_find_the_earlier_turns_in_their_caches(tmp_path):
    command = [sys.executable, str(Path(__file__).with_name("routed_replicas.py"))]
    ran = subprocess.run([*command, str(tmp_path / "shares")], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    shares = json.loads((tmp_path / "shares").read_text())
    best = 16 / 25  # everything but the first message and two in each turn
    assert 0.5 < shares["routed"] <= best  # below the best if a replica was busy for a moment
    assert shares["default"] < shares["routed"]
