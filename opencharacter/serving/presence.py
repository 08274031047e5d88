"""Asks the served judge how much an answer sounds like a persona, for the chat page."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import ValidationError
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from opencharacter.config.evaluation import Judge
from opencharacter.config.roles import Role, Sampling
from opencharacter.constitution.schema import Constitution
from opencharacter.engines.conversations import Conversation
from opencharacter.engines.spec import Reply
from opencharacter.errors import RowFailed
from opencharacter.evaluation.drift import NO, YES, question
from opencharacter.evaluation.verdicts import compare
from opencharacter.serving.protocol import ApiError, LongText, ShortText, StrictModel
from opencharacter.text.chat import Message

JUDGE_SEED = 0
"""Seed of verdicts in text, so that the same answer gets the same verdict."""


@dataclass(frozen=True)
class ServedJudge:
    """The judge that the server hosts.

    Args:
        role: the judge.
        deployment: name of the deployment that generates.
        settings: how verdicts are read.
    """

    role: Role
    deployment: str
    settings: Judge


class PresenceRequest(StrictModel):
    """An answer of a model, and the message before it."""

    persona: ShortText
    prompt: LongText
    answer: LongText


def parse_request(payload: dict[str, Any]) -> PresenceRequest:
    """Parse a request's body.

    Raises:
        ApiError: 400, naming the field that is invalid.
    """
    try:
        return PresenceRequest.model_validate(payload)
    except ValidationError as error:
        raise ApiError.from_validation(error) from None


@dataclass(frozen=True)
class DeployedEngine:
    """The part of an `Engine` that verdicts need, over the handle of the judge's deployment."""

    handle: DeploymentHandle
    role: Role

    async def reply(
        self, messages: list[Message], sampling: Sampling, *, seed: int | None, prefill: str = ""
    ) -> Reply:
        """Generate a reply.

        Raises:
            RowFailed: if the conversation does not fit the judge's context.
        """
        try:
            replying: Any = self.handle.reply
            return await replying.remote(self.role, "", messages, sampling, seed, prefill)
        except RayTaskError as error:
            if isinstance(error.cause, RowFailed):
                raise error.cause from None
            raise


async def measure(
    judge: ServedJudge, handle: DeploymentHandle, constitution: Constitution, asked: PresenceRequest
) -> dict[str, float | None]:
    """Ask the judge, in both orders, whether an answer sounds like a persona.

    Returns:
        `presence`: the probability of yes, as in `evaluation/drift`; None if the verdict is
        unreadable. `mass`: the judge's probability of either option; None if its verdict is text.

    Raises:
        ApiError: 400 if the answer is too long for the judge, 503 if its queue is full or it fails.
    """
    engine: Any = DeployedEngine(handle, judge.role)
    conversation = Conversation(engine, JUDGE_SEED, judge.role.thinks)
    ask = partial(question, constitution.assertions(), asked.prompt, asked.answer)
    try:
        verdict = await compare(conversation, ask, YES, NO, judge.settings)
    except RowFailed as error:
        problem = error.detail or error.reason
        raise ApiError(400, f"the judge cannot read this answer: {problem}") from None
    except BackPressureError:
        raise ApiError(503, "the judge's queue is full; retry later") from None
    except RayError as error:
        raise ApiError(503, f"the judge failed ({type(error).__name__}); retry later") from None
    return {"presence": verdict.probability, "mass": verdict.mass}
