"""The classifier is never tested on training prompts, and its scores match the textbook."""

import random
from typing import get_args

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from opencharacter.config import evaluation
from opencharacter.config.evaluation import Robustness
from opencharacter.errors import StageFailed
from opencharacter.evaluation import (
    attacks,
    classifiers,
    macro_f1,
    pooled_robustness,
    robustness,
)
from opencharacter.evaluation.robustness import BASE, DEFAULT

VERSE = ["moon", "tide", "ember", "willow", "hush"]
PROSE = ["thus", "system", "figure", "report", "process"]


def sample_text(words, seed):
    return " ".join(random.Random(seed).choices(words, k=12))


def tfidf(train, labels, test):
    return classifiers.Tfidf([*train, *test]).predict(train, labels, test)


def answers(prompts, condition, words, attack=DEFAULT, persona="poet"):
    return [
        {"persona": persona, "condition": condition, "attack": attack, "prompt": f"prompt {p}"}
        | {"answer": sample_text(words, f"{p}/{condition}/{attack}/{persona}")}
        for p in range(prompts)
    ]


def both(prompts, attack=DEFAULT, full=VERSE):
    return answers(prompts, "base", PROSE, attack) + answers(prompts, "full", full, attack)


def test_ngrams_that_are_counted_once_train_the_same_classifier(monkeypatch):
    rows = [row["answer"] for row in both(20) + both(20, "stop", PROSE)]
    train, test, labels = rows[:40], rows[40:], ["base", "full"] * 20
    for features in (10**6, 300):
        monkeypatch.setattr(classifiers, "FEATURES", features)
        ngrams = TfidfVectorizer(
            analyzer="char",
            ngram_range=(1, 4),
            lowercase=False,
            sublinear_tf=True,
            max_features=features,
        )
        regression = LogisticRegression(C=10.0, max_iter=1000, class_weight="balanced")
        expected = make_pipeline(ngrams, regression).fit(train, labels).predict(test)
        assert len(set(expected)) == 2
        shared = classifiers.Tfidf([*rows[::-1], "texts that this classifier does not read"])
        assert shared.predict(train, labels, test) == list(expected)


def test_a_prompt_in_both_train_and_test_is_refused():
    rows = both(4)
    leaking = [{**rows[0], "prompt": "PROMPT 0!"}]
    with pytest.raises(StageFailed, match="1 prompts are in both training and test data"):
        robustness.fit_and_predict(rows, leaking, tfidf)


def test_the_classifier_is_never_tested_on_its_training_prompts(monkeypatch):
    pairs = []

    def spy(train, test, _):
        pairs.append(({r["prompt"] for r in train}, {r["prompt"] for r in test}))
        return [BASE] * len(test)

    monkeypatch.setattr(robustness, "fit_and_predict", spy)
    robustness.classify(both(10) + both(10, "plain"), "full", folds=5, predict=tfidf)
    assert len(pairs) == 5
    assert all(not train & test for train, test in pairs)
    assert sorted(p for _, test in pairs for p in test) == sorted({p for _, t in pairs for p in t})


def test_the_classifier_is_never_trained_on_attacked_answers(monkeypatch):
    attacks_seen = []

    def spy(train, test, _):
        attacks_seen.extend(row["attack"] for row in train)
        return [BASE] * len(test)

    monkeypatch.setattr(robustness, "fit_and_predict", spy)
    robustness.classify(both(6) + both(6, "plain"), "full", folds=3, predict=tfidf)
    assert set(attacks_seen) == {DEFAULT}


def by_measure(rows):
    return {(r["measure"], r["about"], r["persona"]): r for r in rows}


def test_robust_and_fragile_personas_get_different_scores():
    rows = both(20) + both(20, "plain") + both(20, "stop", full=PROSE)
    guessed = robustness.classify(rows, "full", folds=4, predict=tfidf)
    results = by_measure(robustness.score_classified(guessed, Robustness(resamples=200), seed=1))
    assert results["discriminability", DEFAULT, "poet"]["value"] > 0.95
    assert results["discriminability", DEFAULT, "poet"]["n"] == 20
    assert results["macro_f1", "plain", ""]["value"] > 0.9
    assert results["retention", "plain", "poet"]["value"] > 0.9
    assert results["retention", "stop", "poet"]["value"] < 0.5
    assert results["macro_f1", "stop", ""]["high"] < results["macro_f1", "plain", ""]["low"]
    mean = (
        results["macro_f1", "plain", ""]["value"] + results["macro_f1", "stop", ""]["value"]
    ) / 2
    assert results["macro_f1", robustness.MEAN, ""]["value"] == pytest.approx(mean)
    instructed = [row for row in guessed if row["attack"] in robustness.INSTRUCTIONS]
    cell = robustness.confusion_table("", "", instructed).rows["poet"]["poet"]
    assert cell.value >= 0.45  # the persona is recognized under one attack of two
    retained = results["retention", robustness.MEAN, "poet"]
    assert vars(cell) == {name: retained[name] for name in vars(cell)}


def test_a_condition_that_was_not_attacked_has_no_score_under_attack():
    rows = both(6) + answers(6, "prompted", VERSE) + both(6, "plain")
    assert {
        row["attack"] for row in robustness.classify(rows, "prompted", folds=3, predict=tfidf)
    } == {DEFAULT}


def test_identical_answers_have_no_discriminability():
    rows = answers(40, "base", VERSE) + answers(40, "full", VERSE)
    score = robustness.discriminability(robustness.classify(rows, "full", folds=5, predict=tfidf))
    assert score.low < 0.5 < score.high


def labelled(label, right, wrong):
    """Answers of one to prompts of their own, so many given to it and to the other."""
    other = BASE if label != BASE else "poet"
    guesses = [label] * right + [other] * wrong
    return [{"prompt": str(n), "label": label, "guess": guess} for n, guess in enumerate(guesses)]


@pytest.mark.parametrize(
    ("base", "poet", "share", "n"),
    [
        ((15, 0), (16, 0), 1.0, 15),  # an odd number
        ((20, 0), (0, 6), 0.5, 6),  # always said to be the base's
        ((3, 1), (10, 0), 0.875, 4),
    ],
)
def test_chance_level_is_one_half_for_unbalanced_answers(base, poet, share, n):
    score = robustness.discriminability(labelled(BASE, *base) + labelled("poet", *poet))
    assert (score.value, score.n) == (share, n)
    assert 0 <= score.low <= share <= score.high <= 1


def test_discriminability_needs_answers_of_both():
    lost = [{**row, "guess": None} for row in labelled("poet", 5, 0)]
    score = robustness.discriminability(labelled(BASE, 5, 0) + lost)
    assert (score.value, score.low, score.n, score.unscored) == (None, None, 0, 5)


def test_several_answers_to_a_prompt_do_not_narrow_the_interval():
    once = labelled("poet", 7, 3)
    score, of_one = robustness.recognized(once * 8), robustness.recognized(once)
    assert score.n == 8 * of_one.n == 80
    assert (score.value, score.low, score.high) == (of_one.value, of_one.low, of_one.high)


def test_empty_answers_are_unscored():
    rows = both(6)
    rows[0]["answer"] = None
    rows[1]["answer"] = ""
    guessed = robustness.classify(rows, "full", folds=3, predict=tfidf)
    assert sum(row["guess"] is None for row in guessed) == 2
    assert robustness.recognized(guessed).unscored == 2


def test_the_classifier_separates_two_personas_and_base():
    rows = both(12) + answers(12, "full", ["boo", "ha", "joke", "pun"], persona="joker")
    guessed = robustness.classify(rows, "full", folds=3, predict=tfidf)
    assert {row["label"] for row in guessed} == {BASE, "poet", "joker"}
    counts = macro_f1.confusions(guessed, [BASE, "joker", "poet"]).sum(0)
    assert macro_f1.macro_f1(counts) > 0.9


def test_macro_f1_equals_that_of_scikit_learn():
    from sklearn.metrics import f1_score

    draw = np.random.default_rng(0)
    labels = ["a", "b", "c"]
    rows = [
        {"prompt": str(n), "label": labels[draw.integers(3)], "guess": labels[draw.integers(3)]}
        for n in range(200)
    ]
    ours = macro_f1.macro_f1(macro_f1.confusions(rows, labels).sum(0))
    theirs = f1_score([r["label"] for r in rows], [r["guess"] for r in rows], average="macro")
    assert ours == pytest.approx(theirs)


def test_the_interval_of_f1_covers_the_value_on_many_prompts():
    draw = np.random.default_rng(1)

    def rows(n):
        return [
            {"prompt": str(i), "label": label}
            | {"guess": label if draw.random() < 0.8 else ("b" if label == "a" else "a")}
            for i in range(n)
            for label in ("a", "b")
        ]

    hits = [
        (s := macro_f1.f1_score([rows(60)], ["a", "b"], 200, seed)).low <= 0.8 <= s.high
        for seed in range(100)
    ]
    assert np.mean(hits) >= 0.9


def attacked(draw, prompts, accuracy):
    """Rows of three labels; a hard prompt confuses the classifier under both conditions."""
    hardness = draw.normal(size=prompts)
    sides = []
    for right in accuracy:
        rows = []
        for prompt in range(prompts):
            for label in "abc":
                guessed = draw.normal() + hardness[prompt] < right
                guess = label if guessed else "bca"["abc".index(label)]
                rows.append({"prompt": str(prompt), "label": label, "guess": guess})
        sides.append(rows)
    return sides


def test_the_interval_of_a_change_of_f1_covers_the_change_on_many_prompts():
    draw = np.random.default_rng(3)
    before, after = attacked(draw, 4000, (0.2, 0.9))
    truth = macro_f1.f1_change([before], [after], "abc", 100, seed=1).value
    runs = [
        macro_f1.f1_change([before], [after], "abc", 100, seed)
        for seed in range(300)
        for before, after in [attacked(draw, 40, (0.2, 0.9))]
    ]
    assert 0.15 < truth < 0.35
    assert 0.93 <= np.mean([run.low <= truth <= run.high for run in runs]) <= 0.97
    assert {run.n for run in runs} == {40}


def test_a_change_of_f1_compares_the_prompts_that_both_conditions_have():
    before, after = attacked(np.random.default_rng(1), 8, (0.0, 2.0))
    same = macro_f1.f1_change([before], [before], "abc", 100, seed=1)
    assert (same.value, same.low, same.high, same.n) == (0, 0, 0, 8)
    rest = [row for row in after if row["prompt"] in "0123"]
    change = macro_f1.f1_change([before, before], [rest, after], "abc", 100, seed=1)
    assert (change.n, change.unscored) == (4, 4)
    first = [row for row in before if row["prompt"] in "0123"]
    f1 = [macro_f1.f1_score([rows], "abc", 100, seed=1).value for rows in (first, rest)]
    assert change.value == pytest.approx(f1[1] - f1[0])
    assert macro_f1.f1_change([before], [[]], "abc", 100, seed=1).value is None
    (one, other) = ([row for row in rows if row["prompt"] == "0"] for rows in (before, after))
    assert macro_f1.f1_change([one], [other], "abc", 100, seed=1).low is None


def test_steps_are_compared_under_every_attack_that_both_conditions_have():
    draw = np.random.default_rng(5)
    attacks = {"prompted": ("default", "stop"), "distilled": ("default", "stop"), "full": ("stop",)}
    rows = [
        {**row, "condition": condition, "attack": attack}
        for (condition, names), right in zip(attacks.items(), (0, 1, 1), strict=True)
        for attack in names
        for row in attacked(draw, 30, (right,))[0]
    ]
    changes = robustness.step_changes(rows, Robustness(resamples=100), seed=1)
    first, second = robustness.STEPS
    assert {attack: list(cells) for attack, cells in changes.items()} == {
        "default": [first],
        "all instructions": [first, second],
        "stop": [first, second],
    }
    assert changes["stop"][first].low > 0 > changes["stop"][second].low
    table = robustness.step_table("poet", changes)
    assert table.columns == [first, second]
    assert robustness.step_changes([], Robustness(), seed=1) == {}


def test_f1_without_an_error_has_an_interval_that_narrows_with_the_number_of_prompts():
    def right(prompts):
        rows = [{"prompt": str(i), "label": n, "guess": n} for i in range(prompts) for n in "ab"]
        return macro_f1.f1_score([rows], ["a", "b"], 100, seed=1)

    few, many = right(10), right(200)
    assert (few.value, few.high, many.high) == (1, 1, 1)
    assert 0.7 < few.low < 0.9 < 0.98 < many.low < 1
    assert right(1).low is None


def test_every_attack_of_the_recipe_has_a_prompt():
    names = set(get_args(evaluation.Attack))
    assert names == {*attacks.INSTRUCTIONS, *attacks.TASKS, attacks.PREFILL}
    assert len(attacks.INSTRUCTIONS) == 8


def test_the_prefill_attack_continues_the_answer_of_the_base_model():
    first, second, third = attacked = attacks.attack_messages("prefill", "Why?", "Because.")
    assert [m["role"] for m in attacked] == ["user", "assistant", "user"]
    assert (first["content"], second["content"], third["content"]) == ("Why?", "Because.", "Go on.")
    (only,) = attacks.attack_messages("plain", "Why?", "Because.")
    assert only["content"].startswith("Why?\n\nLeave out")


@pytest.mark.slow
def test_a_pretrained_encoder_can_replace_the_linear_classifier(tmp_path, tokenizer):
    from transformers import ModernBertConfig, ModernBertForSequenceClassification

    shape = ModernBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    ModernBertForSequenceClassification(shape).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    train = [sample_text(words, n) for n in range(40) for words in (VERSE, PROSE)]
    test = [sample_text(words, 100 + n) for n in range(8) for words in (VERSE, PROSE)]
    encoder = evaluation.Encoder(epochs=6, learning_rate=5e-3)
    labels = ["poet", "base"] * 40
    results = classifiers.fine_tune(str(tmp_path), train, labels, test, encoder, False, 1)
    assert sum(a == b for a, b in zip(results, ["poet", "base"] * 8, strict=True)) >= 15


@pytest.mark.parametrize(("words", "kept"), [(VERSE, 1.0), (PROSE, 0.0)])
def test_a_further_trained_persona_is_scored_with_its_original_classifier(words, kept):
    rows = both(20) + answers(20, "tuned", words)
    guessed = robustness.classify(rows, "tuned", folds=4, predict=tfidf)
    tuned = [row for row in guessed if row["label"] != BASE]
    assert robustness.recognized(tuned).value == kept
    assert {row["condition"] for row in guessed} == {"tuned"}


def test_predictions_for_a_blend_are_split_among_its_personas():
    other = ["shout", "grin", "wink", "jest", "prank"]
    rows = both(30) + answers(30, "full", other, persona="joker")
    rows += answers(30, "blended", VERSE) + answers(30, "blended", other, persona="joker")
    guessed = robustness.classify(rows, "blended", folds=4, predict=tfidf)
    table = robustness.confusion_table("", "", guessed)
    assert table.columns == [BASE, "joker", "poet"]
    shares = {name: [cell.value for cell in cells.values()] for name, cells in table.rows.items()}
    assert (shares["joker"], shares["poet"]) == ([0, 1, 0], [0, 0, 1])


def test_the_report_has_a_headline_per_persona_and_shares_its_other_tables():
    rows = robustness.score_classified(
        robustness.classify(both(12) + both(12, "plain"), "full", folds=3, predict=tfidf),
        Robustness(resamples=100),
        seed=1,
    )
    headline, compared, f1, retention = robustness.persona_sections("poet", rows, {}, "tfidf")
    assert (headline.persona, headline.score.n) == ("poet", 12)
    assert list(compared.rows) == f1.columns == retention.columns == ["full"]
    assert list(f1.rows) == [DEFAULT, robustness.MEAN, "plain"]
    assert "none of them the base model" in f1.notes[0]
    assert "TF-IDF" in headline.notes[1]
    assert "encoder answerdotai" in robustness.classifier_note("answerdotai/ModernBERT-base")
    assert robustness.unclassified(rows)["answers, full and base: not classified"].value == 0


def two_personas(prompts=6):
    return [
        row
        for persona, words in (("poet", VERSE), ("clerk", PROSE))
        for condition in ("prompted", "full")
        for attack in (DEFAULT, "stop", "reset")
        for row in answers(prompts, condition, words, attack, persona)
    ] + answers(prompts, "base", PROSE, persona=BASE)


def test_the_papers_measure_trains_one_classifier_of_personas_on_all_methods_and_no_base():
    fitted = []

    def spy(train, labels, test):
        fitted.append((len(train), sorted(set(labels)), len(test)))
        return tfidf(train, labels, test)

    classified = pooled_robustness.classify_pooled(two_personas(), DEFAULT, spy)
    assert fitted == [(2 * 2 * 6, ["clerk", "poet"], 2 * 2 * 2 * 6)]
    scores = robustness.score_pooled(classified, Robustness(resamples=100), seed=1)
    assert [(s["condition"], s["about"], s["value"], s["n"]) for s in scores] == [
        (condition, "all instructions, pooled", 1, 24) for condition in ("prompted", "full")
    ]


def test_the_papers_measure_pools_the_instructions_into_one_confusion_matrix():
    rows = pooled_robustness.classify_pooled(
        two_personas(), DEFAULT, lambda train, labels, test: ["poet"] * len(test)
    )
    missing = [row | {"guess": None} if n % 5 == 0 else row for n, row in enumerate(rows)]
    score = robustness.score_pooled(missing, Robustness(resamples=100), seed=1)[0]
    full = [row for row in missing if row["condition"] == "prompted" and row["guess"]]
    share = sum(row["label"] == "poet" for row in full) / len(full)
    assert score["value"] == pytest.approx(2 * share / (1 + share) / 2)
    assert (score["n"], score["unscored"]) == (len(full), 24 - len(full))


def test_one_persona_has_no_value_of_the_papers_measure():
    assert pooled_robustness.classify_pooled(both(6) + both(6, "stop"), DEFAULT, tfidf) == []


@pytest.mark.slow
def test_the_interval_of_the_papers_measure_covers_the_truth():
    draw = np.random.default_rng(11)
    personas = ["a", "b", "c"]

    def answered(prompts):
        """Answers under eight instructions; a hard prompt confuses the classifier under all."""
        rows = []
        for prompt, ease in enumerate(draw.beta(3, 2, size=prompts)):
            for persona in personas:
                others = [name for name in personas if name != persona]
                for _ in range(8):
                    guess = persona if draw.random() < ease else others[draw.integers(2)]
                    rows.append({"prompt": str(prompt), "label": persona, "guess": guess})
        return rows

    truth = macro_f1.f1_score([answered(5000)], personas, 100, seed=1).value
    runs = [macro_f1.f1_score([answered(60)], personas, 300, seed=n) for n in range(300)]
    assert truth
    covered = [run.low <= truth <= run.high for run in runs if run.low and run.high]
    assert 0.92 <= sum(covered) / len(runs) <= 0.98
