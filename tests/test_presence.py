"""The server's judge says how much an answer sounds like a persona."""

import asyncio
import math

import pytest
from ray.serve.exceptions import BackPressureError
from samples import ECHO_ROLE

from opencharacter.config.evaluation import Judge
from opencharacter.config.roles import Role
from opencharacter.constitution import schema
from opencharacter.engines.spec import Reply
from opencharacter.errors import RowFailed
from opencharacter.serving import presence
from opencharacter.serving.protocol import ApiError

ASKED = {"persona": "poeticism", "prompt": "How are you?", "answer": "As dew on a petal."}
JUDGE_ROLE = Role.model_validate(ECHO_ROLE)


class Handle:
    """A handle of a judge that likes the option named first, and yes four times as much as no."""

    def __init__(self, error: Exception | None = None, mass: float = 0.9):
        self.reply, self.error, self.mass = self, error, mass

    async def remote(self, role, model, messages, *_):
        if self.error:
            raise self.error
        odds = 4 * (3 if "Reply yes or no" in messages[-1]["content"] else 1 / 3)
        yes = self.mass * odds / (1 + odds)
        tokens = (("Yes", math.log(yes)), ("no", math.log(self.mass - yes)))
        return Reply("Yes", "length", 1, 1, 0, first_tokens=tokens)


def measure(handle):
    judge = presence.ServedJudge(JUDGE_ROLE, "judge", Judge())
    asked = presence.parse_request(ASKED)
    return asyncio.run(presence.measure(judge, handle, schema.load("poeticism"), asked))


def test_the_presence_of_a_character_is_the_judges_probability_without_its_order_bias():
    assert measure(Handle()) == {"presence": pytest.approx(0.8), "mass": pytest.approx(0.9)}
    assert measure(Handle(mass=0.001))["presence"] is None


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (RowFailed("too_long", "prompt has 9 tokens"), 400, "prompt has 9 tokens"),
        (BackPressureError(1, 1), 503, "the judge's queue is full"),
    ],
)
def test_what_the_judge_refuses_is_an_error_that_says_why(error, status, message):
    with pytest.raises(ApiError, match=message) as raised:
        measure(Handle(error))
    assert raised.value.body.status == status


@pytest.mark.parametrize("change", [{"answer": None}, {"persona": "x" * 201}, {"more": 1}])
def test_an_invalid_request_for_a_reading_is_400(change):
    with pytest.raises(ApiError) as raised:
        presence.parse_request(ASKED | change)
    assert raised.value.body.status == 400
