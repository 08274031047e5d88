import asyncio
import math

import pytest

from opencharacter.config.evaluation import Judge as JudgeConfig
from opencharacter.config.roles import Sampling
from opencharacter.engines.conversations import Conversation
from opencharacter.engines.spec import Reply
from opencharacter.evaluation import coherence

ROW = {"prompt": "p", "rival": "base", "answer": "verse, long", "rival_answer": "prose"}


@pytest.mark.parametrize(
    ("text", "letter"),
    [("A", "A"), ("Answer B.", "B"), ("A or B", None), ("neither", None), ("a", None)],
)
def test_a_verdict_is_parsed_from_one_letter(text, letter):
    assert coherence.read_letter(text) == letter


@pytest.mark.parametrize(
    ("first", "second", "won"),
    [
        ("A", "B", "full"),
        ("B", "A", "base"),
        ("A", "A", "inconsistent"),
        ("B", "B", "inconsistent"),
        (None, "B", "unreadable"),
    ],
)
def test_a_game_is_won_only_if_both_orders_agree(first, second, won):
    assert coherence.winner(first, second, "base") == won


class Judge:
    """Prefers verse, or always the same letter."""

    def __init__(self, always=None):
        self.always = always

    async def reply(self, messages, sampling, **_):
        asked = messages[-1]["content"]
        verse_first = asked.index("verse") < asked.index("prose")
        return Reply(self.always or ("A" if verse_first else "B"), "stop", 1, 1, 0)


@pytest.mark.parametrize(("always", "won"), [(None, "full"), ("A", "inconsistent")])
def test_the_judge_sees_both_orders(always, won):
    conversation = Conversation(Judge(always), 1)
    comparison = coherence.compare(
        ROW, conversation, "1. I rhyme.", Sampling(max_tokens=4), JudgeConfig(thinking_budget=0)
    )
    judged = asyncio.run(comparison)
    assert judged["winner"] == won
    assert len(judged["verdicts"]) == 2


def test_log_probabilities_decide_what_the_letters_leave_to_the_order():
    class Biased(Judge):
        """Likes A, and a little less if that is not the verse."""

        async def reply(self, messages, sampling, **_):
            asked = messages[-1]["content"]
            share = 0.9 if asked.index("verse") < asked.index("prose") else 0.7
            tokens = (("A", math.log(share)), ("B", math.log(1 - share)))
            return Reply("A", "length", 1, 1, 0, first_tokens=tokens)

    judged = asyncio.run(
        coherence.compare(
            ROW, Conversation(Biased(), 1), "1. I rhyme.", Sampling(max_tokens=4), JudgeConfig()
        )
    )
    assert judged["verdicts"] == ["A", "A"]
    assert judged["winner"] == "full"
    odds = math.sqrt(0.9 / 0.1 * 0.3 / 0.7)
    assert judged["probability"] == pytest.approx(odds / (1 + odds))
    results = coherence.figures([{**ROW, **judged}])["rivals"]["base"]
    assert results["win_rate"]["n"] == 1
    assert (results["win_rate_consistent"]["n"], results["win_rate_consistent"]["unscored"]) == (
        0,
        1,
    )


LETTERS = {"full": ["A", "B"], "base": ["B", "A"], "inconsistent": ["A", "A"]}


def rows(**winners):
    names = [name for name, count in winners.items() for _ in range(count)]
    return [
        {**ROW, "prompt": str(n), "winner": name, "verdicts": LETTERS.get(name, ["A", "?"])}
        for n, name in enumerate(names)
    ]


def test_ties_are_counted_and_win_for_neither_side():
    results = coherence.figures(rows(full=6, base=2, inconsistent=5, unreadable=1))
    rival = results["rivals"]["base"]
    assert (rival["inconsistent"], rival["unreadable"]) == (5, 1)
    assert (rival["win_rate"]["value"], rival["win_rate"]["n"]) == (0.75, 8)
    assert rival["win_rate"]["unscored"] == 6
    assert rival["win_rate_consistent"] == rival["win_rate"]  # verdicts in text
    assert results["longer_won"]["value"] == 0.75  # the persona's answer is the longer one


def test_comparing_one_answer_with_several_rivals_does_not_narrow_the_interval():
    one = rows(full=6, base=2)
    three = [{**row, "rival": rival} for row in one for rival in ("base", "prompted", "steered")]
    score, of_one = coherence.longer_won(three), coherence.longer_won(one)
    assert (score.n, of_one.n) == (24, 8)
    assert (score.value, score.low, score.high) == (of_one.value, of_one.low, of_one.high)
