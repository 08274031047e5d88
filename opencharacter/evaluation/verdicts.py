"""Verdicts of a judge on a choice of two options, which it sees in both orders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from opencharacter.config.evaluation import Judge
from opencharacter.engines.conversations import Conversation
from opencharacter.evaluation import judge
from opencharacter.text.chat import Message

Question = Callable[[str, str], list[Message]]
"""Builds the judge's messages with two options in the given order."""


@dataclass(frozen=True)
class Verdict:
    """A judge's verdict on two options.

    Args:
        probability: probability of the first option, averaged over both orders; None if the verdict
            is unreadable in an order.
        mass: mean share of probability on readable options; None if the verdict is text.
    """

    probability: float | None
    mass: float | None = None


async def compare(
    conversation: Conversation, question: Question, first: str, second: str, settings: Judge
) -> Verdict:
    """Ask a judge to choose between two options, in both orders.

    The probability is the share of orders in which the judge names `first`: 0, 0.5 or 1.

    Args:
        conversation: the conversation with the judge.
        question: builds the judge's messages.
        first: an option, a word in lower case.
        second: the other option.
        settings: how verdicts are sampled.

    Raises:
        RowFailed: if the engine fails, or the think block is not closed within the budget.
    """
    chosen = []
    for options in ((first, second), (second, first)):
        text = await judge.ask(
            conversation, question(*options), settings.sampling, settings.thinking_budget
        )
        chosen.append(judge.read_verdict(text, first, second))
    if None in chosen:
        return Verdict(None)
    return Verdict(chosen.count(first) / len(chosen))
