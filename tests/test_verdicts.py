"""Verdicts of a judge between two options, in both orders."""

import asyncio
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from opencharacter.config.evaluation import Judge
from opencharacter.engines import backends
from opencharacter.engines.conversations import Conversation
from opencharacter.engines.spec import FirstToken, Reply
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
    verdict = verdict_of(engine, verdicts="text")
    assert verdict.probability == probability
    assert verdict.mass is None
    assert engine.asked == ["yes or no?", "no or yes?"]


class FirstTokens(Engine):
    """Gives the log-probabilities of the first token, in the order of the questions."""

    def __init__(self, *shares, text="Yes"):
        super().__init__(*[text] * len(shares) * 2)
        self.shares = list(shares)

    async def reply(self, messages, sampling, *, seed, prefill=""):
        reply = await super().reply(messages, sampling, seed=seed, prefill=prefill)
        if not isinstance(sampling, FirstToken):
            return reply
        listed = tuple((token, math.log(share)) for token, share in self.shares.pop(0).items())
        return replace(reply, first_tokens=listed)


def verdict_of(engine, **settings):
    asking = verdicts.compare(
        Conversation(engine, 1, settings.pop("thinks", False)),
        question,
        "yes",
        "no",
        Judge(**settings),
    )
    return asyncio.run(asking)


def test_a_verdict_is_read_from_the_probabilities_of_the_first_token():
    engine = FirstTokens({"Yes": 0.5, " yes": 0.25, "No": 0.25}, {'"Yes': 0.75, "no": 0.25})
    verdict = verdict_of(engine)
    assert verdict.probability == pytest.approx(0.75)
    assert verdict.mass == pytest.approx(1)
    assert engine.asked == ["yes or no?", "no or yes?"]


def test_a_constant_liking_for_the_first_option_cancels():
    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    truth, bias = 0.4, 2.5
    shares = [sigmoid(truth + bias), sigmoid(truth - bias)]
    engine = FirstTokens(*({"Yes": share, "No": 1 - share} for share in shares))
    assert verdict_of(engine).probability == pytest.approx(sigmoid(truth))


def test_a_judge_that_always_says_yes_in_text_still_decides_by_probability():
    likely, unlikely = {"Yes": 0.9, "No": 0.1}, {"Yes": 0.7, "No": 0.3}
    assert verdict_of(Engine("Yes", "Yes"), verdicts="text").probability == 1
    difference = (
        verdict_of(FirstTokens(likely, likely)).probability
        - verdict_of(FirstTokens(unlikely, unlikely)).probability
    )
    assert difference == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("tokens", "shares"),
    [
        ({"Yes": 0.5, "No.": 0.25}, (0.5, 0.25)),
        ({" YES": 0.5, "Not": 0.25, "**no": 0.125}, (0.5, 0.125)),
        ({"y": 0.5, "\n": 0.25, "maybe": 0.125}, (0.5, 0)),
    ],
)
def test_all_spellings_of_an_option_count_and_other_words_do_not(tokens, shares):
    listed = [(token, math.log(share)) for token, share in tokens.items()]
    assert verdicts.option_shares(listed, ("yes", "no")) == pytest.approx(shares)


def test_a_token_that_begins_both_options_counts_for_neither():
    assert verdicts.option_shares([("p", 0.0)], ("plain", "poetic")) == (0, 0)
    assert verdicts.option_shares([("po", 0.0)], ("plain", "poetic")) == (0, 1)


def test_a_verdict_without_mass_on_the_options_is_unreadable():
    verdict = verdict_of(FirstTokens({"Yes": 0.9, "No": 0.1}, {"The": 1.0}))
    assert verdict.probability is None
    assert verdict.mass == pytest.approx(0.5)


def test_an_option_that_is_not_listed_does_not_decide_a_verdict_alone():
    verdict = verdict_of(FirstTokens({"Yes": 1.0}, {"Yes": 0.5, "No": 0.5}))
    assert verdict.probability == pytest.approx(10 / 11)


def test_a_judge_that_thinks_is_asked_for_text():
    engine = FirstTokens(text="<think>Hm.</think> no")
    engine.texts = ["<think>Hm.</think> no"] * 2
    verdict = verdict_of(engine, thinks=True, thinking_budget=64)
    assert (verdict.probability, verdict.mass) == (0, None)


def test_an_engine_without_log_probabilities_is_asked_again_for_text():
    engine = Engine("Yes", "Yes.", "No.")
    assert verdict_of(engine).probability == 0.5
    assert engine.asked == ["yes or no?", "yes or no?", "no or yes?"]


def test_options_with_the_same_first_token_are_told_apart_by_the_next_one():
    class Spelled(Engine):
        async def reply(self, messages, sampling, *, seed, prefill=""):
            self.asked.append(prefill)
            listed = {"": {"Po": 0.8, "plain": 0.1}, "Po": {"etic": 0.75, "lite": 0.25}}[prefill]
            tokens = tuple((token, math.log(share)) for token, share in listed.items())
            return Reply("Po", "length", 1, 1, 0, first_tokens=tokens)

    engine = Spelled()
    asking = verdicts.read_shares(Conversation(engine, 1), [], ("poetic", "polite"), Judge())
    assert asyncio.run(asking) == pytest.approx((0.6, 0.2))
    assert engine.asked == ["", "Po"]


def test_how_verdicts_are_read_keeps_earlier_tests_of_the_judge_valid():
    assert "verdicts" not in Judge(verdicts="text").identity()
    assert Judge().identity()["verdicts"] == "log_probability"


def test_first_tokens_are_requested_only_for_verdicts_and_sorted_by_probability():
    listed = {7: SimpleNamespace(decoded_token="no", logprob=-2.0)}
    listed |= {9: SimpleNamespace(decoded_token="Yes", logprob=-0.5)}
    assert backends.first_tokens([listed]) == (("Yes", -0.5), ("no", -2.0))
    assert backends.first_tokens(None) == ()
    assert backends.log_prob_options(FirstToken()) == {"logprobs": True, "top_logprobs": 20}
    assert backends.log_prob_options(Judge().sampling) == {}
