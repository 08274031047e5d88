"""Whose mistake it is that the engine does not answer a request."""

import asyncio
import json
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.exceptions import EngineGenerateError

from opencharacter.serving import refusals

CONSTRAINED = SimpleNamespace(structured_outputs=SimpleNamespace(json='{"type": "null"}'))
FREE = SimpleNamespace(structured_outputs=None)


def outputs(*reasons: str | None):
    """Return an engine's `generate` whose outputs end for these reasons, and what it was given."""
    given: dict = {"closed": False}

    async def generate(prompt, sampling, request_id, **kwargs):
        given.update(prompt=prompt, sampling=sampling, request_id=request_id, **kwargs)
        try:
            for reason in reasons:
                yield SimpleNamespace(outputs=[SimpleNamespace(finish_reason=reason)])
        finally:
            given["closed"] = True

    return generate, given


def collect(generate, sampling) -> list[str | None]:
    async def run():
        stream = refusals.generate(generate, "hello", sampling, "id", priority=3)
        return [output.outputs[0].finish_reason async for output in stream]

    return asyncio.run(run())


@pytest.mark.parametrize("sampling", [CONSTRAINED, FREE])
def test_outputs_and_arguments_pass_unchanged(sampling):
    generate, given = outputs(None, None, "stop")
    assert collect(generate, sampling) == [None, None, "stop"]
    assert given == {
        "prompt": "hello", "sampling": sampling, "request_id": "id", "priority": 3, "closed": True
    }  # fmt: skip


def test_a_schema_reaches_the_engine_as_text_because_its_integers_may_be_large():
    schema = {"type": "boolean", "minItems": 10**30}
    sampling = SimpleNamespace(structured_outputs=SimpleNamespace(json=schema))
    generate, given = outputs("stop")
    collect(generate, sampling)
    assert json.loads(given["sampling"].structured_outputs.json) == schema


def test_a_schema_that_no_text_fits_is_the_clients_error_and_ends_its_other_choices():
    generate, given = outputs(None, "error", None)
    with pytest.raises(VLLMValidationError, match="no text fits the JSON schema") as refused:
        collect(generate, CONSTRAINED)
    assert given["closed"]
    assert refusals.to_error_body(refused.value).status == 400


def test_a_failure_without_a_schema_is_the_servers():
    generate, _ = outputs(None, "error")
    assert collect(generate, FREE) == [None, "error"]  # which vLLM reports as its own error


def test_only_what_vllm_rejects_is_the_clients_error():
    rejected, failed = EngineGenerateError(), EngineGenerateError()
    rejected.__cause__, failed.__cause__ = VLLMValidationError("too long"), KeyError("block")
    assert refusals.to_error_body(rejected).status == 400
    assert refusals.to_error_body(failed).status == 503
    assert refusals.to_error_body(failed).message == "the model failed (KeyError); retry later"


def test_messages_of_the_compiler_lose_their_lines_of_source_code():
    message = 'a grammar: [15:52:04] /project/cpp/converter.cc:4944: Unsupported type "x"\n'
    assert refusals.refusal(message, None).message == 'a grammar: Unsupported type "x"'


def test_error_events_of_a_stream_are_recognized():
    event = 'data: {"error": {"message": "no", "type": "T", "param": null, "code": %d}}\n\n'
    assert refusals.from_event(event % 400) == (400, "no", None, None)
    failed = refusals.from_event(event % 500)
    assert failed is not None
    assert failed[:2] == (503, "the model failed; retry later")
    assert refusals.from_event('data: {"choices": [{"text": "{\\"error\\": 1}"}]}\n\n') is None
    assert refusals.from_event("data: [DONE]\n\n") is None
    assert refusals.from_event(object()) is None
