"""What passes between the entrance and a replica."""

import asyncio

import pytest

from opencharacter.serving.protocol import event, events, is_usage, paced


async def numbers(*waits: float, fault: Exception | None = None):
    for number, seconds in enumerate(waits):
        await asyncio.sleep(seconds)
        yield number
    if fault:
        raise fault


async def collected(stream, interval: float) -> list[list[int]]:
    return [items async for items in paced(stream, lambda: interval)]


def test_the_first_item_leaves_at_once_and_the_others_together():
    assert asyncio.run(collected(numbers(0, *[0.01] * 9), 0.5)) == [[0], [*range(1, 10)]]


def test_an_interval_of_nothing_keeps_items_apart_and_in_order():
    found = asyncio.run(collected(numbers(0, 0.02, 0.02, 0.02), 0))
    assert found == [[0], [1], [2], [3]]


def test_an_empty_stream_has_no_list():
    assert asyncio.run(collected(numbers(), 1)) == []


def test_what_a_stream_raises_comes_after_what_it_said():
    async def until_the_fault():
        found = []
        with pytest.raises(ValueError, match="lost"):
            async for items in paced(numbers(0, 0, 0, fault=ValueError("lost")), lambda: 0.01):
                found += items
        return found

    assert asyncio.run(until_the_fault()) == [0, 1, 2]


def test_a_slow_reader_loses_nothing():
    async def read_slowly():
        found = []
        async for items in paced(numbers(*[0.002] * 50), lambda: 0.001):
            await asyncio.sleep(0.01)
            found += items
        return found

    assert asyncio.run(read_slowly()) == [*range(50)]


def test_a_stream_that_is_left_is_closed():
    closed = asyncio.Event()

    async def forever():
        try:
            while True:
                yield 0
                await asyncio.sleep(0.001)
        finally:
            closed.set()

    async def leave():
        stream = paced(forever(), lambda: 0.001)
        await anext(stream)
        await stream.aclose()
        await asyncio.wait_for(closed.wait(), 1)

    asyncio.run(leave())


def test_events_of_one_text_are_told_apart():
    said = [
        event({"choices": [{"delta": {"content": 'a "choices":[] b\n\n'}}]}),
        "data: [DONE]\n\n",
    ]
    usage = event({"choices": [], "usage": {"prompt_tokens": 1}})
    found = events(said[0] + usage + said[1])
    assert found == [said[0], usage, said[1]]
    assert [*filter(is_usage, found)] == [usage]
