"""Roles served by an OpenAI-compatible endpoint, tested against a local server."""

import asyncio

import answering
import pytest

from opencharacter.config.placement import Pool
from opencharacter.config.roles import Role, Sampling
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
    """Responds with the statuses in `statuses` in turn, then 200; records the requests."""

    def respond(request):
        server.requests.append(request)
        status = server.statuses.pop(0) if server.statuses else 200
        bodies = {200: ANSWER, 299: ANSWER | {"choices": None}}
        return status, bodies.get(status, {"error": {"message": "no"}})

    server = answering.serve(respond)
    server.requests, server.statuses = [], []
    yield server
    server.shutdown()


def request_reply(server, prefill="", date_string=None, **sampling):
    url = f"http://127.0.0.1:{server.server_port}/v1"
    names = {"model": "teacher", "name": "teacher", "self_name": "T"}
    role = Role(**names, endpoint=url, date_string=date_string)

    async def send():
        engine = start(EngineSpec(role, Pool()))
        parameters = Sampling(max_tokens=5, **sampling)
        return await engine.reply([user("Hm?")], parameters, seed=3, prefill=prefill)

    return asyncio.run(send())


def test_an_endpoint_returns_text_and_token_counts(server):
    reply = request_reply(server)
    assert (reply.text, reply.tokens_in, reply.tokens_out) == ("Aye.", 7, 2)
    request = server.requests[0]
    assert (request["seed"], request["max_tokens"], request["repetition_penalty"]) == (3, 5, 1.1)


def test_a_penalty_of_one_is_not_sent(server):
    request_reply(server, repetition_penalty=1.0)
    assert "repetition_penalty" not in server.requests[0]


def test_rate_limits_and_server_errors_are_retried(server):
    server.statuses = [429, 503]
    assert request_reply(server).text == "Aye."
    assert len(server.requests) == 3


@pytest.mark.parametrize("status", [400, 422, 299])
def test_a_rejected_request_drops_its_row(server, status):
    server.statuses = [status]
    with pytest.raises(RowFailed) as failed:
        request_reply(server)
    assert failed.value.reason == "engine_error"


@pytest.mark.parametrize("status", [401, 403, 404])
def test_an_unavailable_server_fails_the_stage_instead_of_dropping_rows(server, status):
    server.statuses = [status]
    with pytest.raises(StageFailed, match=r"teacher at http.*is unavailable"):
        request_reply(server)


def test_disabled_thinking_is_requested_by_the_template_argument(server):
    """The server renders its own chat template, which may not accept an empty think block."""
    request_reply(server, prefill=EMPTY_THOUGHT)
    assert server.requests[0]["chat_template_kwargs"] == {"enable_thinking": False}
    assert server.requests[0]["messages"] == [user("Hm?")]


def test_tasks_share_the_request_limit_of_an_endpoint():
    role = Role(model="m", name="m", self_name="M", endpoint="http://x/v1", endpoint_concurrency=64)
    assert EngineSpec(role, Pool()).shared_by(10).role.endpoint_concurrency == 7


def test_the_address_of_an_endpoint_is_not_part_of_the_model_identity():
    here = Role(model="m", name="m", self_name="M", endpoint="http://10.0.0.1:8000/v1")
    there = here.model_copy(update={"endpoint": "http://10.0.0.2:8000/v1"})
    assert here.identity() == there.identity()


@pytest.mark.parametrize("url", ["http://me:secret@x/v1", "x:8000/v1", "file:///x"])
def test_endpoint_urls_need_a_scheme_and_no_credentials(url):
    with pytest.raises(ValueError, match="endpoint") as refused:
        Role(model="m", name="m", self_name="M", endpoint=url)
    assert "api_key_env" in str(refused.value) or "http://" in str(refused.value)


def test_a_date_is_sent_as_an_argument_of_the_chat_template(server):
    request_reply(server)
    assert "chat_template_kwargs" not in server.requests[0]
    request_reply(server, date_string="01 Mar 2025")
    request_reply(server, EMPTY_THOUGHT, date_string="01 Mar 2025")
    dated = {"date_string": "01 Mar 2025"}
    assert server.requests[1]["chat_template_kwargs"] == dated
    assert server.requests[2]["chat_template_kwargs"] == {**dated, "enable_thinking": False}
