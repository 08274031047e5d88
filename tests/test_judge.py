"""The judge's gate: a judge with a known fault is caught, and its fault is named."""

import asyncio
import math
import random
from types import SimpleNamespace

import answering
import pytest
from samples import ECHO_ROLE, TINY

from opencharacter.config.evaluation import Judge as JudgeConfig
from opencharacter.config.recipe import Recipe
from opencharacter.config.roles import Sampling
from opencharacter.distillation import prompts
from opencharacter.engines.conversations import Conversation
from opencharacter.engines.spec import Reply
from opencharacter.errors import RowFailed, StageFailed
from opencharacter.evaluation import judge, judge_statistics, preferences
from opencharacter.text.chat import EMPTY_THOUGHT, THINK_CLOSE, THINK_OPEN


class Synthetic:
    """A judge with known rates of errors, position bias and unreadable verdicts."""

    def __init__(self, error=0.0, first=0.0, mumbles=0.0, seed=0):
        self.error, self.first, self.mumbles = error, first, mumbles
        self.draw = random.Random(seed)
        self.prefills = set()
        self.right = {(i["prompt"], i["answer"]): i["shown"] for i in judge.gold()}

    async def reply(self, messages, sampling, *, seed, prefill=""):
        self.prefills.add(prefill)
        request = messages[-1]["content"]
        shown = next(
            s for (p, a), s in self.right.items() if f"\n{p}\n" in request and f"\n{a}\n" in request
        )
        offered = request.rpartition("show more: ")[2].partition("?")[0].split(" or ")
        verdict = shown
        if self.draw.random() < self.first:
            verdict = offered[0]
        elif self.draw.random() < self.error:
            verdict = next(trait for trait in offered if trait != shown)
        elif self.draw.random() < self.mumbles:
            verdict = "both"
        return Reply(verdict.capitalize() + ".", "stop", 1, 1, 0)


def verdicts(engine, thinks=False, items=None, thinking_budget=0):
    sampling = Sampling(max_tokens=16)
    requests = judge.requests("synthetic", items or judge.gold())

    async def ask(row):
        return row | await judge.name_trait(
            row,
            Conversation(engine, 1, thinks),
            sampling,
            JudgeConfig(thinking_budget=thinking_budget),
        )

    return [asyncio.run(ask(row)) for row in requests]


def test_gold_items_are_balanced_and_do_not_name_their_trait():
    items = judge.gold()
    assert len(items) >= 100
    assert len({item["answer"] for item in items}) == len(items)
    for item in items:
        assert {item["shown"], item["other"]} <= set(preferences.all_traits())
        words = item["answer"].lower().split()
        assert item["shown"] not in words
        assert item["other"] not in words
    shown = [item["shown"] for item in items]
    assert {shown.count(trait) for trait in set(shown)} == {4}


def test_a_perfect_judge_passes_the_gate():
    rows = verdicts(Synthetic())
    judge.check_agreement("good", rows, minimum=0.99)
    results = judge.figures(rows)
    assert results["agreement"]["value"] == results["consistency"]["value"] == 1
    assert results["first_named"]["value"] == 0.5


def test_an_inaccurate_judge_is_refused_with_its_confusion_table():
    rows = verdicts(Synthetic(error=0.4, seed=3))
    assert judge.agreement(rows).value == pytest.approx(0.6, abs=0.1)  # 3 standard errors
    with pytest.raises(StageFailed, match="limit 80%") as refused:
        judge.check_agreement("noisy", rows, minimum=0.8)
    right = judge.confusion(rows)["poetic"]
    line = f"poetic: {right['right']} right, {right['wrong']} wrong, 0 unreadable"
    assert line in str(refused.value)
    judge.check_agreement("noisy", rows, minimum=None)


def test_position_bias_of_a_judge_is_measured_and_refused():
    rows = verdicts(Synthetic(first=0.6, seed=4))  # right in 0.4 + 0.6 / 2 = 0.7
    with pytest.raises(StageFailed):
        judge.check_agreement("biased", rows, minimum=0.8)
    results = judge.figures(rows)
    assert results["first_named"]["low"] < 0.8 < results["first_named"]["high"]
    assert results["consistency"]["value"] < 0.75


def test_unparseable_verdicts_lower_the_agreement_and_are_counted_separately_from_wrong_ones():
    rows = verdicts(Synthetic(mumbles=0.3, seed=5))
    results = judge.agreement(rows)
    assert results.unscored == sum(row["chosen"] is None for row in rows) > 40
    assert all(not n["wrong"] for n in judge.confusion(rows).values())
    with pytest.raises(StageFailed):
        judge.check_agreement("mumbling", rows, minimum=0.8)


def test_judging_a_text_in_both_orders_does_not_narrow_the_interval():
    texts = [{"shown": "warm", "other": "blunt", "first": "warm", "item": n} for n in range(26)]
    judged = [row | {"chosen": "warm" if n % 2 else "blunt"} for n, row in enumerate(texts)]
    for both, of_one in (
        (judge.agreement(judged * 2), judge.agreement(judged)),
        (judge.first_named(judged * 2, "item"), judge.first_named(judged, "item")),
    ):
        assert (both.value, both.n, of_one.n) == (0.5, 52, 26)
        assert (both.low, both.high) == (of_one.low, of_one.high)


def test_length_bias_shows_as_a_difference_between_the_two_halves():
    rows = verdicts(Synthetic())
    longest = {row["answer"] for row in sorted(rows, key=lambda r: -len(r["answer"]))[:100]}
    spoiled = [row | {"chosen": row["other"]} if row["answer"] in longest else row for row in rows]
    halves = judge.by_length(spoiled)
    assert halves["shorter"].value > 0.95
    assert halves["longer"].value < 0.1


class Thinking(Synthetic):
    """Thinks for so many tokens before it says anything, unless its thought is closed already."""

    tokens = 500

    async def reply(self, messages, sampling, *, seed, prefill=""):
        verdict = await super().reply(messages, sampling, seed=seed, prefill=prefill)
        if prefill:
            return verdict
        room = sampling.max_tokens - self.tokens
        text = f"{THINK_OPEN}poetic or blunt?" + (
            f"{THINK_CLOSE}\n{verdict.text}" if room > 0 else ""
        )
        return Reply(text, "stop", 1, 1, 0)


def test_a_thinking_judge_gets_a_thinking_budget_before_its_verdict():
    engine = Thinking()
    rows = verdicts(engine, thinks=True, items=judge.gold()[:4], thinking_budget=1024)
    assert engine.prefills == {""}
    assert judge.agreement(rows).value == 1


def test_unclosed_thinking_is_not_a_verdict():
    with pytest.raises(RowFailed) as failed:
        verdicts(Thinking(), thinks=True, items=judge.gold()[:1], thinking_budget=100)
    assert failed.value.reason == "thought_unclosed"


def test_without_a_thinking_budget_the_think_block_is_prefilled_closed():
    engine = Thinking()
    assert judge.agreement(verdicts(engine, thinks=True, items=judge.gold()[:2])).value == 1
    assert engine.prefills == {EMPTY_THOUGHT}
    plain = Synthetic()
    verdicts(plain, items=judge.gold()[:1], thinking_budget=1024)
    assert plain.prefills == {""}


def test_a_plan_counts_the_thinking_tokens_of_a_judge(make_jobs):
    def tokens(**judge_changes):
        roles = dict.fromkeys(("teacher", "student", "prompt_generator"), ECHO_ROLE)
        recipe = Recipe.model_validate(
            {**TINY, "roles": roles | {"judge": ECHO_ROLE | judge_changes}}
        )
        (job,) = (j for j in make_jobs(recipe) if j.stage.name == "evaluation/judge")
        return judge.estimate(job).tokens_out

    assert tokens(thinks=True) > 50 * tokens()


# ---------------------------------------------------------------------- two judges, two families


@pytest.fixture
def family():
    """A family of judges as a server: `make(answer)` starts one and gives its role."""
    servers = []

    def make(name, answer, **role):
        server = verdict_server(answer)
        servers.append(server)
        url = f"http://127.0.0.1:{server.server_port}/v1"
        return {**ECHO_ROLE, "name": name, "model": name, "endpoint": url, **role}

    yield make
    for server in servers:
        server.shutdown()


def verdict_server(answer):
    """An OpenAI-compatible server that says `answer(first trait, second trait, text)`."""

    def reply(request):
        text = request["messages"][-1]["content"]
        first, second = text.rpartition("show more: ")[2].partition("?")[0].split(" or ")
        return 200, answering.completion(answer(first, second, text))

    return answering.serve(reply)


SHOWN = {item["answer"]: item["shown"] for item in judge.gold()}


def knows(first, second, text):
    """Right on gold texts; elsewhere the trait that comes first in the alphabet."""
    return next((trait for answer, trait in SHOWN.items() if answer in text), min(first, second))


def thinks_and_knows(first, second, text):
    """The same after a thought, but for games with an `e` in the first trait."""
    verdict = knows(first, second, text)
    is_gold = any(answer in text for answer in SHOWN)
    verdict = verdict if is_gold or "e" not in first else max(first, second)
    return f"{THINK_OPEN}Hm, {first}? {second}?{THINK_CLOSE}{verdict}"


def test_a_panel_of_two_judges_passes_the_gate_and_is_compared_on_every_game(
    cpu_ray, make_jobs, family, monkeypatch
):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    one = family("plain-judge", knows)
    other = family("thinking-judge", thinks_and_knows, thinks=True)
    roles = dict.fromkeys(("teacher", "student", "prompt_generator"), ECHO_ROLE) | {"judge": one}
    evaluation = {
        "judge": {"gold_items": 8, "panel": [other]},
        "answers": {"conditions": ["base", "full"], "count": 2},
        "attacks": {"conditions": ["base", "full"]},
        "preferences": {"games": 20, "conditions": ["base", "full"]},
    }
    recipe = Recipe.model_validate({**TINY, "roles": roles, "evaluation": evaluation})
    jobs = {j.stage.name: j for j in make_jobs(recipe)}
    prompts.build(jobs["distillation/prompts"])  # games leave out what was trained on
    gate = judge.build(jobs["evaluation/judge"]).figures
    assert set(gate["judges"]) == {"plain-judge", "thinking-judge"}
    assert all(results["agreement"]["value"] == 1 for results in gate["judges"].values())
    assert gate["alpha"] == gate["kappa"]["plain-judge thinking-judge"] == 1
    games = preferences.build(jobs["evaluation/preferences"])  # the persona's: of `full` alone
    assert games.figures["scored"] == 20
    assert -1 < games.figures["kappa"]["plain-judge thinking-judge"] < 1
    job = jobs["evaluation/preferences"]
    panel = job.store.read_table(job.dataset, "panel").to_pylist()
    assert len(panel) == 2 * 20
    assert {row["judge"] for row in panel} == set(gate["judges"])
    assert all(row["chosen"] for row in panel)


def test_a_panel_judge_that_fails_the_gate_is_refused_by_name(
    cpu_ray, make_jobs, family, monkeypatch
):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    roles = dict.fromkeys(("teacher", "student", "prompt_generator"), ECHO_ROLE)
    first = family("always-first", lambda first, *_: first)
    evaluation = {"judge": {"gold_items": 8, "panel": [first]}}
    recipe = Recipe.model_validate(
        {**TINY, "roles": roles | {"judge": family("good", knows)}, "evaluation": evaluation}
    )
    (job,) = (j for j in make_jobs(recipe) if j.stage.name == "evaluation/judge")
    with pytest.raises(StageFailed, match="judge always-first named the right trait in 50%"):
        judge.build(job)


def test_kappa_and_alpha_equal_known_values():
    assert judge_statistics.kappa("aabb", "aabb") == 1
    assert judge_statistics.kappa("aabb", "abab") == pytest.approx(0)
    assert judge_statistics.kappa([None], ["a"]) is None
    # Krippendorff's worked example of four observers, 12 units and missing values: 0.743.
    observers = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
        [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
    ]
    assert judge_statistics.alpha(zip(*observers, strict=True)) == pytest.approx(0.743, abs=5e-4)


def test_several_judges_are_compared_on_the_same_verdicts():
    rows = [
        {"judge": name, "item": n, "swapped": False, "chosen": verdict}
        for name, texts in (("a", "xxyy"), ("b", "xxyx"), ("c", "xxyy"))
        for n, verdict in enumerate(texts)
    ]
    results = judge.panel_figures(rows, ["a", "b", "c"])
    assert results["kappa"]["a c"] == 1
    assert 0 < results["alpha"] < 1


def test_a_subset_of_gold_items_is_spread_over_all():
    chosen = judge.spread(judge.gold(), 26)
    assert len({item["shown"] for item in chosen}) >= 13
    assert judge.spread(judge.gold(), 10_000) == list(judge.gold())


def test_games_are_balanced_over_order_and_framing(make_jobs, echo_recipe):
    (_, job) = (j for j in make_jobs(echo_recipe) if j.stage.name == "evaluation/preferences")
    job = SimpleNamespace(
        **{name: getattr(job, name) for name in ("recipe", "stage")},
        config=job.config.model_copy(update={"games": 600}),
    )
    rows = preferences.games(job)
    sides = [(row["first"], row["second"]) for row in rows]
    assert all(a == b[::-1] for a, b in zip(sides[::2], sides[1::2], strict=True))
    framings = [row["framing"] for row in rows]
    assert {framings.count(framing) for framing in preferences.FRAMINGS} == {200}


class Biased(Synthetic):
    """Gives log-probabilities: log-odds of 0.5 for the trait shown, and of 3 for the first one."""

    async def reply(self, messages, sampling, *, seed, prefill=""):
        right = (await super().reply(messages, sampling, seed=seed)).text.rstrip(".")
        offered = messages[-1]["content"].rpartition("show more: ")[2].partition("?")[0]
        first, second = offered.split(" or ")
        odds = math.exp(3 + (0.5 if right.lower() == first else -0.5))
        listed = {first: odds / (1 + odds), second: 1 / (1 + odds)}
        listed = {word.removeprefix(prefill): share for word, share in listed.items()}
        tokens = tuple((word, math.log(share)) for word, share in listed.items())
        return Reply(first, "length", 9, 1, 5, first_tokens=tokens)


def test_log_probabilities_averaged_over_both_orders_decide_in_spite_of_a_position_bias():
    rows = verdicts(Biased())
    results = judge.figures(rows)
    assert results["consistency"]["value"] == 0
    assert results["first_named"]["value"] == 1
    assert results["agreement_one_order"]["value"] == 0.5
    assert results["agreement"]["value"] == results["decided"]["value"] == 1
    assert results["agreement"]["n"] == len(judge.gold())
    assert results["unreadable_mass"] == pytest.approx(0)
    judge.check_agreement("biased", rows, minimum=0.99)
    assert results["calibration"]["slope"] is None  # every answer is right
    assert results["calibration"]["log_loss"] == pytest.approx(math.log(1 + math.exp(-0.5)))


def test_text_verdicts_have_no_calibration_and_are_decided_if_both_orders_agree():
    results = judge.figures(verdicts(Synthetic(first=1.0)))
    assert results["calibration"] == {}
    assert results["unreadable_mass"] is None
    assert results["decided"]["value"] == 0


def test_the_slope_finds_how_overconfident_a_judge_is():
    draw = random.Random(1)
    truth = [draw.gauss(0, 2) for _ in range(4000)]
    right = [draw.random() < 1 / (1 + math.exp(-abs(x))) for x in truth]
    stated = [3 * abs(x) * (1 if hit else -1) for x, hit in zip(truth, right, strict=True)]
    assert judge_statistics.best_slope(stated) == pytest.approx(1 / 3, rel=0.1)


def test_a_game_is_decided_by_both_orders_and_stores_how_sure_the_judge_is():
    item = judge.gold()[0]
    row = {**item, "first": item["other"], "second": item["shown"]}
    asking = judge.name_trait_in_both_orders(
        row, Conversation(Biased(), 1), Sampling(max_tokens=4), JudgeConfig()
    )
    judged = asyncio.run(asking)
    assert judged["chosen"] == item["shown"]
    assert judged["probability"] == pytest.approx(1 / (1 + math.exp(0.5)))
    assert judged["mass"] == pytest.approx(1)
