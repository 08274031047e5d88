"""A role behind an OpenAI-compatible URL, against a server of the test's own."""

import asyncio

import answering
import pytest

from opencharacter.chat import user
from opencharacter.config import Pool, Role, Sampling
from opencharacter.engine import EngineSpec, start
from opencharacter.errors import RowFailed

ANSWER = {
    "id": "1",
    "object": "chat.completion",
    "created": 0,
    "model": "teacher",
    "choices": [
        {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Aye."}}
    ],
    "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9},
}


@pytest.fixture
def server():
    """Answers with the status codes of `replies` in turn, then 200; keeps what it was asked."""

    def reply(asked):
        server.asked.append(asked)
        code = server.replies.pop(0) if server.replies else 200
        return code, ANSWER if code == 200 else {"error": {"message": "no"}}

    server = answering.serve(reply)
    server.asked, server.replies = [], []
    yield server
    server.shutdown()


def ask(server, **sampling):
    url = f"http://127.0.0.1:{server.server_port}/v1"
    role = Role(model="teacher", name="teacher", called="T", endpoint=url)

    async def once():
        engine = start(EngineSpec(role, Pool()))
        return await engine.reply([user("Hm?")], Sampling(max_tokens=5, **sampling), seed=3)

    return asyncio.run(once())


def test_an_endpoint_answers_with_text_and_tokens(server):
    reply = ask(server)
    assert (reply.text, reply.tokens_in, reply.tokens_out) == ("Aye.", 7, 2)
    asked = server.asked[0]
    assert (asked["seed"], asked["max_tokens"], asked["repetition_penalty"]) == (3, 5, 1.1)


def test_a_penalty_of_one_is_not_sent(server):
    ask(server, repetition_penalty=1.0)
    assert "repetition_penalty" not in server.asked[0]


def test_a_busy_endpoint_is_asked_again(server):
    server.replies = [429, 503]
    assert ask(server).text == "Aye."
    assert len(server.asked) == 3


def test_a_refused_request_drops_its_row(server):
    server.replies = [400]
    with pytest.raises(RowFailed) as failed:
        ask(server)
    assert failed.value.reason == "engine_error"
