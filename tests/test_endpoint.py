"""A role behind an OpenAI-compatible URL, against a server of the test's own."""

import asyncio

import answering
import pytest

from opencharacter.config.placement import Pool
from opencharacter.config.recipe import Role, Sampling
from opencharacter.engines.backends import start
from opencharacter.engines.spec import EngineSpec
from opencharacter.errors import RowFailed, StageFailed
from opencharacter.text.chat import EMPTY_THOUGHT, user

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
        said = {200: ANSWER, 299: ANSWER | {"choices": None}}
        return code, said.get(code, {"error": {"message": "no"}})

    server = answering.serve(reply)
    server.asked, server.replies = [], []
    yield server
    server.shutdown()


def ask(server, prefill="", **sampling):
    url = f"http://127.0.0.1:{server.server_port}/v1"
    role = Role(model="teacher", name="teacher", self_name="T", endpoint=url)

    async def once():
        engine = start(EngineSpec(role, Pool()))
        drawn = Sampling(max_tokens=5, **sampling)
        return await engine.reply([user("Hm?")], drawn, seed=3, prefill=prefill)

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


@pytest.mark.parametrize("status", [400, 422, 299])
def test_a_refused_request_drops_its_row(server, status):
    server.replies = [status]
    with pytest.raises(RowFailed) as failed:
        ask(server)
    assert failed.value.reason == "engine_error"


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_server_that_cannot_be_had_fails_the_stage_and_not_its_rows(server, status):
    server.replies = [status]
    with pytest.raises(StageFailed, match=r"teacher at http.*cannot be had"):
        ask(server)


def test_a_thought_that_is_closed_at_once_is_asked_for_by_name(server):
    """A server renders its own template, which may hold no empty thought in a reply."""
    ask(server, prefill=EMPTY_THOUGHT)
    assert server.asked[0]["chat_template_kwargs"] == {"enable_thinking": False}
    assert server.asked[0]["messages"] == [user("Hm?")]


def test_tasks_share_the_limit_of_an_endpoint():
    role = Role(model="m", name="m", self_name="M", endpoint="http://x/v1", endpoint_concurrency=64)
    assert EngineSpec(role, Pool()).shared_by(10).role.endpoint_concurrency == 7


def test_where_an_endpoint_is_makes_no_other_model_of_it():
    here = Role(model="m", name="m", self_name="M", endpoint="http://10.0.0.1:8000/v1")
    there = here.model_copy(update={"endpoint": "http://10.0.0.2:8000/v1"})
    assert here.identity() == there.identity()


@pytest.mark.parametrize("url", ["http://me:secret@x/v1", "x:8000/v1", "file:///x"])
def test_an_endpoint_is_an_address_without_a_secret(url):
    with pytest.raises(ValueError, match="endpoint") as refused:
        Role(model="m", name="m", self_name="M", endpoint=url)
    assert "api_key_env" in str(refused.value) or "http://" in str(refused.value)
