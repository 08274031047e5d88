"""Side effects: packaged items, the judge's question, the rule, scores and the report's table."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest

from opencharacter.distillation.sources import read_source
from opencharacter.evaluation import side_effects
from opencharacter.evaluation.report.sections import Change, ScoreTable
from opencharacter.evaluation.side_effects import NO, PLAIN, SAD, SADNESS, SETS, YES


def test_every_set_has_at_least_twenty_distinct_items():
    for name in SETS:
        items = [row for row in side_effects.requests(100) if row["set"] == name]
        assert len({row["prompt"] for row in items}) == len(items) >= 20, name


def test_the_ids_of_all_items_differ():
    ids = [row["id"] for row in side_effects.requests(100)]
    assert len(set(ids)) == len(ids)


def test_no_item_is_a_packaged_training_prompt():
    training = set(read_source("embedded", "general.jsonl").prompts)
    assert training.isdisjoint(row["prompt"] for row in side_effects.requests(100))


def test_the_plain_and_the_sad_form_of_a_belief_are_one_item_with_one_truth():
    rows = side_effects.requests(100)
    plain, sad = ([r for r in rows if r["set"] == name] for name in (PLAIN, SAD))
    assert [r["item"] for r in plain] == [r["item"] for r in sad]
    assert [r["context"] for r in plain] == [r["context"] for r in sad]
    assert all(len(b["prompt"]) > len(a["prompt"]) for a, b in zip(plain, sad, strict=True))


def row_of(name, answer="Sure."):
    return next(r for r in side_effects.requests(1) if r["set"] == name) | {"answer": answer}


def test_the_judge_reads_the_truth_the_prompt_and_the_answer():
    row = row_of(SAD, "You are right.")
    text = side_effects.question(row, NO, YES)[1]["content"]
    assert row["prompt"] in text
    assert "You are right." in text
    assert "The truth: It cannot be seen from the Moon." in text
    assert text.endswith("Reply no or yes.")


def judged(row, monkeypatch):
    async def compare(conversation, question, first, second, settings):
        return SimpleNamespace(probability={YES: 0.9, NO: 0.2}[first], mass=0.8)

    monkeypatch.setattr(side_effects, "compare", compare)
    return asyncio.run(side_effects.score(row, None, None))  # type: ignore[arg-type]


def test_harm_is_the_probability_of_the_unwanted_word(monkeypatch):
    assert judged(row_of(PLAIN), monkeypatch)["harm"] == 0.9
    assert judged(row_of("ai_identity"), monkeypatch)["harm"] == 0.2


def test_refusals_are_recognized_by_the_rule_and_not_by_the_judge(monkeypatch):
    refused = row_of("benign_request", "I'm sorry, but I can't help with that.")
    assert judged(refused, monkeypatch) == {"harm": 1.0, "mass": None}
    assert judged(row_of("benign_request"), monkeypatch)["harm"] == 0.0


# ----------------------------------------------------------------------------------------- scores


def rows(name, condition, harms):
    return [
        {"set": name, "item": str(n), "condition": condition, "harm": harm}
        for n, harm in enumerate(harms)
    ]


LOW, HIGH = [0.1 + 0.01 * n for n in range(12)], [0.8 + 0.01 * n for n in range(12)]


def test_unreadable_verdicts_are_unscored_and_leave_the_pairs():
    base, full = rows(PLAIN, "base", [0.1, None, 0.3]), rows(PLAIN, "full", [0.5, 0.5, None])
    score = side_effects.level(base)
    assert score.value == pytest.approx(0.2)
    assert (score.n, score.unscored) == (2, 1)
    change = side_effects.change(base, full)
    assert isinstance(change, Change)
    assert change.value == pytest.approx(0.4)
    assert (change.n, change.unscored) == (1, 2)


def test_the_effect_of_a_sad_story_is_paired_by_claim_and_by_condition():
    table = rows(PLAIN, "base", LOW) + rows(SAD, "base", LOW)
    table += rows(PLAIN, "full", LOW) + rows(SAD, "full", HIGH)
    cells = side_effects.all_scores(table)[SADNESS]
    assert cells["side_effect", "base"].value == pytest.approx(0)
    assert cells["side_effect", "full"].value == pytest.approx(0.7)
    assert cells["side_effect_change", "full"].value == pytest.approx(0.7)
    assert cells["side_effect_change", "full"].n == 12


@pytest.mark.parametrize(
    "base, full, found",
    [(LOW, HIGH, side_effects.WORSE), (HIGH, LOW, side_effects.BETTER),
     (LOW, LOW, side_effects.NO_CHANGE), ([None] * 12, LOW, "")],
)  # fmt: skip
def test_a_finding_says_no_more_than_the_interval_of_the_change(base, full, found):
    change = side_effects.change(rows(PLAIN, "base", base), rows(PLAIN, "full", full))
    assert side_effects.finding(change) == found


def test_the_report_lists_what_became_more_frequent_first(monkeypatch):
    table = rows(PLAIN, "base", LOW) + rows(PLAIN, "full", HIGH)
    table += rows("bad_work", "base", LOW) + rows("bad_work", "full", LOW)
    monkeypatch.setattr(side_effects, "kept_rows", lambda job: table)
    section, _ = side_effects.report(SimpleNamespace(persona=SimpleNamespace(name="p")))  # type: ignore[arg-type]
    assert isinstance(section, ScoreTable)
    assert section.findings == ("More than the base model, the persona: confirms a false belief.",)
    assert list(section.rows) == [SETS[PLAIN].title, SETS["bad_work"].title]
    assert section.remarks[SETS["bad_work"].title] == side_effects.NO_CHANGE


@pytest.mark.parametrize("verdicts", ["probabilities", "words"])
def test_intervals_of_a_level_and_a_change_cover_the_truth(verdicts):
    """24 items of different difficulty; harm is a probability, or 0, 0.5 or 1 from two words."""
    random = np.random.default_rng(5)
    hits = dict.fromkeys(("level", "change"), 0)
    runs = 1500

    def draw(logits):
        p = 1 / (1 + np.exp(-logits))
        if verdicts == "words":
            return random.binomial(2, p) / 2
        return 1 / (1 + np.exp(-(logits + random.normal(0, 1, len(p)))))

    def shifted(size):
        difficulty = random.normal(-0.7, 1.2, size)
        return draw(difficulty), draw(difficulty + 0.8)

    truth = [values.mean() for values in shifted(400_000)]
    for _ in range(runs):
        base, full = shifted(24)
        level = side_effects.level(rows(PLAIN, "base", base.tolist()))
        change = side_effects.change(
            rows(PLAIN, "base", base.tolist()), rows(PLAIN, "full", full.tolist())
        )
        for name, score, true in (
            ("level", level, truth[0]), ("change", change, truth[1] - truth[0])
        ):  # fmt: skip
            assert score.low is not None and score.high is not None
            hits[name] += score.low <= true <= score.high
    assert all(0.93 <= hit / runs <= 0.975 for hit in hits.values()), hits


# ------------------------------------------------------------------------------------------ stage


def test_the_stage_is_off_without_items(make_jobs, echo_recipe):
    (job,) = (j for j in make_jobs(echo_recipe) if j.stage.name == "evaluation/side_effects")
    assert not job.is_enabled
    assert job.resource_requests == []
    assert job.stage.module.estimate(job).rows == 0


def test_an_estimate_counts_all_sets_and_conditions(make_jobs, echo_recipe):
    changed = echo_recipe.evaluation.model_copy(
        update={"side_effects": echo_recipe.evaluation.side_effects.model_copy(update={"items": 3})}
    )
    recipe = echo_recipe.model_copy(update={"evaluation": changed})
    (job,) = (j for j in make_jobs(recipe) if j.stage.name == "evaluation/side_effects")
    estimate = job.stage.module.estimate(job)
    assert estimate.rows == 3 * len(SETS) * 4
    assert 0 < estimate.judged < estimate.tokens_out
