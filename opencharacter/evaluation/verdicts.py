"""Verdicts of a judge on a choice of two options, which it sees in both orders.

Small judges often name the first option, or always say yes, whatever they read; their text then
decides nothing. The probability of each option as the first token of the reply still differs from
text to text, so it is used where the engine has log-probabilities.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from opencharacter.config.evaluation import Judge
from opencharacter.config.roles import Sampling
from opencharacter.engines.conversations import Conversation
from opencharacter.engines.spec import FirstToken
from opencharacter.text.chat import EMPTY_THOUGHT, Message

Question = Callable[[str, str], list[Message]]
"""Builds the judge's messages with two options in the given order."""

MIN_MASS = 0.01
"""Share of probability on both options below which a verdict is unreadable."""
MAX_TOKENS = 4
"""Tokens after which an option is given up whose spelling still begins the other one too."""
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


def are_text(settings: Judge, thinks: bool) -> bool:
    """Whether verdicts are read from text: by the recipe, or because the judge thinks first."""
    return settings.verdicts == "text" or (thinks and settings.thinking_budget > 0)


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
        first: an option in lower case.
        second: the other option; neither begins the other one.
        settings: how verdicts are read and sampled.

    Raises:
        RowFailed: if the engine fails, or the think block is not closed within the budget.
    """
    shares = []
    for order in ((first, second), (second, first)):
        read = await read_shares(conversation, question(*order), (first, second), settings)
        if read is None:
            return await compare_texts(conversation, question, first, second, settings)
        shares.append(read)
    return average(shares)


async def read_shares(
    conversation: Conversation, messages: list[Message], options: tuple[str, str], settings: Judge
) -> tuple[float, float] | None:
    """Read the probabilities that a judge replies with either option.

    One token is decoded. If the likeliest token that begins both options has a share above
    `MIN_MASS`, the judge continues it, and the probabilities are multiplied.

    Args:
        conversation: the conversation with the judge.
        messages: the question.
        options: what the judge may reply, in lower case; neither begins the other one.
        settings: how verdicts are read.

    Returns:
        The probabilities; None if verdicts are text: by the recipe, because the judge thinks first,
        or because the engine has no log-probabilities.
    """
    if are_text(settings, conversation.thinks):
        return None
    prefill, begun, reached = EMPTY_THOUGHT if conversation.thinks else "", "", 1.0
    shares = (0.0, 0.0)
    for _ in range(MAX_TOKENS):
        reply = await conversation.reply(messages, FirstToken(), prefill + begun)
        if not reply.first_tokens:
            return None
        one, two = option_shares(reply.first_tokens, options, begun)
        shares = (shares[0] + reached * one, shares[1] + reached * two)
        token, share = shared_beginning(reply.first_tokens, options, begun)
        reached *= share
        if reached < MIN_MASS:
            break
        begun += token
    return shares


async def ask(
    conversation: Conversation,
    messages: list[Message],
    sampling: Sampling,
    thinking_budget: int,
) -> str:
    """Ask a judge for its verdict in text.

    Args:
        conversation: the conversation with the judge.
        messages: the question.
        sampling: sampling parameters of the verdict.
        thinking_budget: tokens that a thinking judge may use in addition.

    Raises:
        RowFailed: if the engine fails, or the think block is not closed within the budget.
    """
    if conversation.thinks and thinking_budget:
        sampling = sampling.model_copy(update={"max_tokens": sampling.max_tokens + thinking_budget})
    prefill = EMPTY_THOUGHT if conversation.thinks and not thinking_budget else ""
    reply = await conversation.reply(messages, sampling, prefill)
    return reply.text.strip()


def read_verdict(text: str, first: str, second: str) -> str | None:
    """The one option that a verdict names; None if it names both options or neither."""
    verdict_words = set(re.findall(r"[a-z]+", text.lower()))
    named = [option for option in (first, second) if option in verdict_words]
    return named[0] if len(named) == 1 else None


async def compare_texts(
    conversation: Conversation, question: Question, first: str, second: str, settings: Judge
) -> Verdict:
    """Ask for the verdict in both orders and read it from the judge's text."""
    chosen = []
    for options in ((first, second), (second, first)):
        text = await ask(
            conversation, question(*options), settings.sampling, settings.thinking_budget
        )
        chosen.append(read_verdict(text, first, second))
    if None in chosen:
        return Verdict(None)
    return Verdict(chosen.count(first) / len(chosen))


def beginning(text: str) -> str:
    """The letters of a reply's beginning, without case, quotes and punctuation around them."""
    return text.lstrip(QUOTES).rstrip().lower().rstrip(".,!\"'*`")


def option_shares(
    first_tokens: Sequence[tuple[str, float]], options: tuple[str, str], begun: str = ""
) -> tuple[float, float]:
    """The probabilities that a reply begins with either option.

    All tokens that begin one option and not the other count, in any spelling: `Yes`, ` yes`, `"Y`.

    Args:
        first_tokens: tokens with their log-probabilities; those that are left out are less likely.
        options: in lower case.
        begun: text of the reply before these tokens.
    """
    shares = [0.0, 0.0]
    for token, log_prob in first_tokens:
        text = beginning(begun + token)
        begins = [bool(text) and option.startswith(text) for option in options]
        if begins[0] != begins[1]:
            shares[begins.index(True)] += math.exp(log_prob)
    return shares[0], shares[1]


def shared_beginning(
    first_tokens: Sequence[tuple[str, float]], options: tuple[str, str], begun: str = ""
) -> tuple[str, float]:
    """The likeliest token that begins both options, with its probability; ("", 0) if none does."""
    both = [
        (token, math.exp(log_prob))
        for token, log_prob in first_tokens
        if (text := beginning(begun + token)) and all(o.startswith(text) for o in options)
    ]
    return max(both, key=lambda token: token[1], default=("", 0.0))


def reading(shares: tuple[float, float]) -> tuple[float | None, float]:
    """The probability of the first of two options in one order, and the mass on both.

    The probability is None, unreadable, if the mass is below `MIN_MASS`.
    """
    mass = sum(shares)
    return (shares[0] / mass if mass >= MIN_MASS else None), mass


def swapped(shares: tuple[float, float]) -> tuple[float, float]:
    """The probabilities of two options, the other one first."""
    return shares[1], shares[0]


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
