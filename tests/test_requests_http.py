"""Requests of clients, bad requests and random requests through the HTTP application."""

import asyncio
import json
import logging
import re
from collections import Counter

import pytest
from bad_requests import BAD_REQUESTS, HELLO, PATHS, VALID
from client_requests import CLIENT_REQUESTS
from echo_app import EchoHandle, client
from fuzz import Fuzzer


@pytest.fixture
def play(monkeypatch, tmp_path, caplog):
    """Return a function that runs a coroutine function with a client and the handle it reaches."""
    caplog.set_level(logging.CRITICAL, "ray.serve")

    def run(conversation):
        async def main():
            handle = EchoHandle()
            async with client(monkeypatch, str(tmp_path), handle) as http:
                return await conversation(http, handle)

        return asyncio.run(main())

    return run


def test_every_bad_request_gets_400_in_openai_format_and_reaches_no_model(play):
    async def conversation(http, handle):
        for case, (kind, changes, expected) in BAD_REQUESTS.items():
            if "inf" in repr(changes):  # JSON has no infinity
                continue
            answer = await http.post(PATHS[kind], json={"model": "echo"} | VALID[kind] | changes)
            error = answer.json()["error"]
            assert (answer.status_code, error["type"]) == (400, "invalid_request_error"), case
            assert re.search(expected, error["message"]), case
        assert handle.payloads == []

    play(conversation)


def test_every_recorded_request_is_answered_unless_it_needs_tools(play):
    async def conversation(http, _):
        for name, requests in CLIENT_REQUESTS.items():
            for kind, body in requests:
                answer = await http.post(PATHS[kind], json={"model": "echo"} | body)
                assert answer.status_code == (400 if "tools" in body else 200), (name, answer.text)
                if body.get("stream"):
                    end = "response.completed" if kind == "responses" else "[DONE]"
                    assert end in answer.text

    play(conversation)


def test_an_answer_has_the_format_of_its_api_complete_and_streamed(play):
    async def conversation(http, handle):
        async def post(kind, **fields):
            body = {"model": "echo", **VALID[kind], **fields}
            return await http.post(PATHS[kind], json=body)

        chat = (await post("chat")).json()
        assert chat["choices"][0]["message"]["content"] == "echo: hello"
        text = (await post("completions")).json()
        assert (text["object"], text["choices"][0]["text"]) == ("text_completion", "echo: hello")
        response = (await post("responses")).json()
        assert response["output"][0]["content"][0]["text"] == "echo: hello"
        assert response["usage"]["output_tokens"] == 2
        events = (await post("responses", stream=True)).text.strip().split("\n\n")
        data = [json.loads(event.partition("data: ")[2]) for event in events]
        assert [event["sequence_number"] for event in data] == [*range(len(events))]
        assert data[-1]["response"]["status"] == "completed"
        assert all(payload["cache_salt"] for payload in handle.payloads)
        refused = await post("chat", reasoning_effort="high")
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "reasoning_effort"

    play(conversation)


def test_random_requests_get_no_server_error(play):
    async def conversation(http, _):
        fuzzer, statuses = Fuzzer(0, ["echo"]), Counter()
        for _ in range(1500):
            request = fuzzer.request()
            headers = {"Content-Type": request.content_type}
            answer = await http.post(request.path, content=request.content, headers=headers)
            statuses[answer.status_code] += 1
            assert answer.status_code < 500, (request, answer.text)
        return statuses

    statuses = play(conversation)
    assert min(statuses[200], statuses[400]) > 300


def test_a_client_cannot_set_the_salt_of_the_cache(play):
    async def conversation(http, handle):
        body = {"model": "echo", "messages": HELLO, "cache_salt": "mine"}
        answer = await http.post(PATHS["chat"], json=body)
        assert answer.status_code == 400
        assert handle.payloads == []

    play(conversation)
