"""Verdicts of a judge on a choice of two options, which it sees in both orders.

Small judges often name the first option, or always say yes, whatever they read; their text then
decides nothing. The probability of each option as the first token of the reply still differs from
text to text, so it is used where the engine has log-probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from opencharacter.config.evaluation import Judge
from opencharacter.engines.conversations import Conversation
from opencharacter.engines.spec import FirstToken, Reply
from opencharacter.evaluation import judge
from opencharacter.text.chat import EMPTY_THOUGHT, Message

Question = Callable[[str, str], list[Message]]
"""Builds the judge's messages with two options in the given order."""

MIN_MASS = 0.01
"""Share of probability on both options below which a verdict is unreadable."""
QUOTES = " \t\n\"'\u201c\u2018*`("
"""Characters that may precede an option in the judge's first token."""


@dataclass(frozen=True)
class Verdict:
    """A judge's verdict on two options.

    Args:
        probability: probability of the first option, averaged over both orders; None if the verdict
            is unreadable in an order.
        mass: mean share of probability on the options; None if the verdict is text.
    """

    probability: float | None
    mass: float | None = None


async def compare(
    conversation: Conversation, question: Question, first: str, second: str, settings: Judge
) -> Verdict:
    """Ask a judge to choose between two options, in both orders.

    With log-probabilities this is one decoding step per order. The log-odds of the options are
    averaged over the orders: if the judge's liking for the option that is named first adds a
    constant to the log-odds, it cancels exactly. From text, the probability is the share of orders
    in which the judge names `first`: 0, 0.5 or 1.

    Args:
        conversation: the conversation with the judge.
        question: builds the judge's messages.
        first: an option in lower case, whose first letter differs from that of the other one.
        second: the other option.
        settings: how verdicts are read and sampled.

    Raises:
        RowFailed: if the engine fails, or the think block is not closed within the budget.
    """
    options = (first, second)
    thinks_first = conversation.thinks and settings.thinking_budget > 0
    if settings.verdicts == "log_probability" and not thinks_first:
        prefill = EMPTY_THOUGHT if conversation.thinks else ""
        replies: list[Reply] = []
        for order in (options, options[::-1]):
            replies.append(await conversation.reply(question(*order), FirstToken(), prefill))
            if not replies[-1].first_tokens:
                return await compare_texts(conversation, question, first, second, settings)
        return average([option_shares(reply.first_tokens, options) for reply in replies])
    return await compare_texts(conversation, question, first, second, settings)


async def compare_texts(
    conversation: Conversation, question: Question, first: str, second: str, settings: Judge
) -> Verdict:
    """Ask for the verdict in both orders and read it from the judge's text."""
    chosen = []
    for options in ((first, second), (second, first)):
        text = await judge.ask(
            conversation, question(*options), settings.sampling, settings.thinking_budget
        )
        chosen.append(judge.read_verdict(text, first, second))
    if None in chosen:
        return Verdict(None)
    return Verdict(chosen.count(first) / len(chosen))


def option_shares(
    first_tokens: Sequence[tuple[str, float]], options: tuple[str, str]
) -> tuple[float, float]:
    """The probabilities that a reply begins with either option.

    All tokens that begin one option and not the other count, in any spelling: `Yes`, ` yes`, `"Y`.

    Args:
        first_tokens: tokens with their log-probabilities; those that are left out are less likely.
        options: in lower case.
    """
    shares = [0.0, 0.0]
    for token, log_prob in first_tokens:
        text = token.lstrip(QUOTES).rstrip().lower().rstrip(".,!\"'*`")
        begins = [bool(text) and option.startswith(text) for option in options]
        if begins[0] != begins[1]:
            shares[begins.index(True)] += math.exp(log_prob)
    return shares[0], shares[1]


def average(orders: Sequence[tuple[float, float]]) -> Verdict:
    """Average the log-odds of two options over the orders in which the judge saw them.

    An option whose tokens are not listed at all counts as `MIN_MASS` of the other's probability.

    Args:
        orders: in each order, the probabilities of the options.
    """
    mass = sum(map(sum, orders)) / len(orders)
    if min(map(sum, orders)) < MIN_MASS:
        return Verdict(None, mass)
    log_odds = [
        math.log(max(one, MIN_MASS * two) / max(two, MIN_MASS * one)) for one, two in orders
    ]
    return Verdict(1 / (1 + math.exp(-sum(log_odds) / len(log_odds))), mass)
