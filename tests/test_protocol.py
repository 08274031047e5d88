"""The streams between the ingress and a replica, and what the ingress reports about requests."""

import asyncio

import pytest

from opencharacter.serving.protocol import coalesce, format_event, has_usage, split_events


async def numbers(*delays: float, error: Exception | None = None):
    """Yield 0, 1, 2, ... after a delay each, then raise the error, if any."""
    for number, seconds in enumerate(delays):
        await asyncio.sleep(seconds)
        yield number
    if error:
        raise error


async def collect_batches(stream, interval: float) -> list[list[int]]:
    return [batch async for batch in coalesce(stream, lambda: interval)]


def test_the_first_item_is_yielded_at_once_and_the_others_in_one_batch():
    assert asyncio.run(collect_batches(numbers(0, *[0.01] * 9), 0.5)) == [[0], [*range(1, 10)]]


def test_an_interval_of_zero_keeps_items_apart_and_in_order():
    batches = asyncio.run(collect_batches(numbers(0, 0.02, 0.02, 0.02), 0))
    assert batches == [[0], [1], [2], [3]]


def test_an_empty_stream_yields_no_batch():
    assert asyncio.run(collect_batches(numbers(), 1)) == []


def test_an_exception_of_the_stream_is_raised_after_its_items():
    async def read_until_the_error():
        items = []
        with pytest.raises(ValueError, match="lost"):
            async for batch in coalesce(numbers(0, 0, 0, error=ValueError("lost")), lambda: 0.01):
                items += batch
        return items

    assert asyncio.run(read_until_the_error()) == [0, 1, 2]


def test_a_slow_reader_loses_no_item():
    async def read_slowly():
        items = []
        async for batch in coalesce(numbers(*[0.002] * 50), lambda: 0.001):
            await asyncio.sleep(0.01)
            items += batch
        return items

    assert asyncio.run(read_slowly()) == [*range(50)]


def test_a_stream_whose_reader_leaves_is_closed():
    closed = asyncio.Event()

    async def endless():
        try:
            while True:
                yield 0
                await asyncio.sleep(0.001)
        finally:
            closed.set()

    async def leave():
        stream = coalesce(endless(), lambda: 0.001)
        await anext(stream)
        await stream.aclose()
        await asyncio.wait_for(closed.wait(), 1)

    asyncio.run(leave())


def test_a_string_is_split_into_its_events_and_usage_is_recognised():
    content = format_event({"choices": [{"delta": {"content": 'a "choices":[] b\n\n'}}]})
    usage = format_event({"choices": [], "usage": {"prompt_tokens": 1}})
    done = "data: [DONE]\n\n"
    events = split_events(content + usage + done)
    assert events == [content, usage, done]
    assert [*filter(has_usage, events)] == [usage]
