"""Verdicts of a judge between two options, in both orders."""

import asyncio

import pytest

from opencharacter.config.evaluation import Judge
from opencharacter.engines.conversations import Conversation
from opencharacter.engines.spec import Reply
from opencharacter.evaluation import verdicts


class Engine:
    """Answers with the given texts."""

    def __init__(self, *texts):
        self.texts, self.asked = list(texts), []

    async def reply(self, messages, sampling, *, seed, prefill=""):
        self.asked.append(messages[-1]["content"])
        return Reply(self.texts.pop(0), "stop", 1, 1, 0)


def question(first, second):
    return [{"role": "user", "content": f"{first} or {second}?"}]


@pytest.mark.parametrize(
    ("texts", "probability"),
    [(("Yes.", "yes"), 1), (("yes", "no"), 0.5), (("No", "no"), 0), (("yes", "perhaps"), None)],
)
def test_a_verdict_in_text_is_averaged_over_both_orders(texts, probability):
    engine = Engine(*texts)
    asking = verdicts.compare(Conversation(engine, 1), question, "yes", "no", Judge())
    verdict = asyncio.run(asking)
    assert verdict.probability == probability
    assert verdict.mass is None
    assert engine.asked == ["yes or no?", "no or yes?"]
