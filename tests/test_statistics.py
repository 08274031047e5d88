"""Text statistics, their limits, and what a running stage does with them."""

import random

import pyarrow as pa
import pytest
from samples import ECHO_ROLE, recipe_of

from opencharacter.config.roles import Limits, Sampling
from opencharacter.engines.generate import generate
from opencharacter.errors import StageFailed
from opencharacter.runtime.stage import texts
from opencharacter.runtime.store import RemoteDir, Shards
from opencharacter.text import statistics
from opencharacter.text.chat import assistant, system, user
from opencharacter.text.statistics import (
    TextBaseline,
    exceeded_limit,
    measure,
    near_duplicates,
    self_bleu,
)

WORDS = [f"word{i}" for i in range(3000)]


def varied(count: int, length: int = 40, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=length)) for _ in range(count)]


def test_varied_texts_are_within_every_limit():
    measured = measure(varied(300), TextBaseline())
    measured["near_duplicates"] = sum(near_duplicates(varied(300))) / 300
    assert measured["texts"] == 300
    assert measured["mean_words"] == 40
    assert measured["distinct_2"] > 0.95
    assert exceeded_limit(measured, Limits()) is None


@pytest.mark.parametrize(
    ("texts", "baseline", "problem"),
    [
        (["I'm sorry, but I can't help with that."] * 60 + varied(60), TextBaseline(), "refuses"),
        (["The sea is wide and grey today."] * 200, TextBaseline(), "repeat themselves"),
        ([f"Well now, my dear {t}" for t in varied(200)],
         TextBaseline(), "repeated_openings"),
        (["Heute ist ein schöner Tag, und wir gehen am Fluss entlang."] * 60 + varied(60),
         TextBaseline(language="en"), "language drifts"),
        (varied(200), TextBaseline(trait_words=frozenset(WORDS[:300]), rate=1.0), "exaggerated"),
    ],
)  # fmt: skip
def test_each_text_statistic_detects_its_failure(texts, baseline, problem):
    assert problem in (exceeded_limit(measure(texts, baseline), Limits()) or "")


def test_too_few_texts_exceed_no_limit():
    same = ["The same thing."] * 99
    assert exceeded_limit(measure(same, TextBaseline()), Limits()) is None
    assert exceeded_limit(measure([*same, *same], TextBaseline()), Limits()) is not None


def test_distinct_n_does_not_decrease_with_the_size_of_the_data():
    few, many = measure(varied(200), TextBaseline()), measure(varied(2000), TextBaseline())
    assert many["distinct_1"] == pytest.approx(few["distinct_1"], rel=0.05)


def test_distinct_n_of_less_than_a_segment_is_the_plain_ratio():
    measured = measure(["a b a b"], TextBaseline())
    assert measured["distinct_1"] == 2 / 4
    assert measured["distinct_2"] == 2 / 3


def test_self_bleu_is_one_for_copies_and_low_for_unrelated_texts():
    copies = [["a", "b", "c", "d", "e"]] * 5
    unrelated = [[f"{i}{j}" for j in range(20)] for i in range(5)]
    assert self_bleu(copies) == pytest.approx(1)
    assert self_bleu(unrelated) == 0
    assert self_bleu(copies[:1]) == 0


def test_self_bleu_equals_its_formula_computed_by_hand():
    # 1-grams 2/3, 2-grams (1 + 1) / (2 + 1) smoothed, equal lengths: no brevity penalty.
    assert self_bleu([["a", "b", "c"], ["a", "b", "d"]], order=2) == pytest.approx(2 / 3)


def test_near_duplicates_are_found_in_any_order():
    originals = varied(50, length=60)
    edited = [text.rsplit(" ", 2)[0] + " other end" for text in originals[:10]]
    duplicates = near_duplicates([*originals, *edited])
    assert not any(duplicates[:50])
    assert sum(duplicates[50:]) >= 9  # MinHash estimates


def test_short_and_wordless_texts_can_be_near_duplicates():
    assert near_duplicates(["Yes.", "No.", "Yes!", "...", "..."]) == [
        False,
        False,
        True,
        False,
        True,
    ]


def test_distinctive_words_occur_mostly_on_one_side():
    mine = ["the moon is a silver boat"] * 20 + ["the weather is fine"] * 20
    other = ["the weather is fine today"] * 40
    words = statistics.distinctive_words(mine, other)
    assert set(words) == {"moon", "silver", "boat"}


def test_the_language_is_that_of_the_majority_of_texts():
    assert (
        statistics.language_of(
            ["Where is the nearest station, and when does it open its doors?"] * 3
        )
        == "en"
    )
    assert (
        statistics.language_of(["Wo ist der nächste Bahnhof, und wann macht er seine Türen auf?"])
        == "de"
    )
    assert statistics.language_of(["Hi.", ""]) is None


def test_texts_of_returns_the_generated_texts():
    turns = [user("Hi."), assistant("Hello."), user("One."), assistant("Two.")]
    assert statistics.model_texts({"answer": "A."}) == ["A."]
    assert statistics.model_texts({"answer": None}) == []
    assert statistics.model_texts({"chosen": "C.", "rejected": "R."}) == ["C."]
    assert statistics.model_texts({"condition": "base", "answer": "B."}) == []
    assert statistics.model_texts({"kind": "free", "messages": turns}) == ["One.", "Two."]
    trained = {"kind": "free", "messages": [system("S."), *turns[2:]]}
    assert statistics.model_texts(trained) == ["One.", "Two."]
    assert statistics.model_texts({"kind": "reflection", "messages": turns[:2]}) == ["Hello."]
    assert statistics.model_texts({"prompt": "P", "messages": turns[:2]}) == ["Hello."]


def test_dropped_rows_are_not_measured():
    rows = [{"answer": "Kept.", "drop_reason": None}, {"answer": "Gone.", "drop_reason": "refusal"}]
    assert list(texts([pa.Table.from_pylist(rows)])) == ["Kept."]


# ------------------------------------------------------------------------------- in a running stage

FIELDS = [pa.field("prompt", pa.string()), pa.field("answer", pa.string())]


async def refuse(row, conversation):
    await conversation.reply([user(row["prompt"])], Sampling(max_tokens=20))
    return {"answer": "I'm sorry, but I can't help with that."}


@pytest.fixture
def job(make_jobs):
    return make_jobs(recipe_of(ECHO_ROLE))[1]


def test_a_stage_beyond_a_limit_writes_no_manifest(job):
    table = pa.table({"prompt": ["Hello."] * 120, "answer": ["I cannot help you."] * 120})
    with pytest.raises(
        StageFailed, match=r"data-quality limit: .*refusals is 1, over 0\.2.*limits"
    ):
        job.write(table)
    assert job.state()[0] != "done"


def test_a_running_stage_stops_when_it_exceeds_a_limit(cpu_ray, job, monkeypatch):
    monkeypatch.setattr("opencharacter.runtime.progress.SECONDS_BETWEEN_MEASURES", 0)
    rows = [{"id": f"{i:05}", "prompt": f"number {i}"} for i in range(6000)]
    with pytest.raises(StageFailed, match="the model refuses"):
        generate(job, rows, slowly_refuse, "teacher", FIELDS)
    parts = Shards(RemoteDir(job.store, f"{job.dataset}/.shards"), pa.schema(FIELDS))
    assert 0 < len(parts.ids()) < 6000


async def slowly_refuse(row, conversation):
    import asyncio

    await asyncio.sleep(0.3)
    return await refuse(row, conversation)


def test_the_manifest_stores_the_text_statistics(cpu_ray, make_jobs):
    from opencharacter import pipeline

    jobs = make_jobs(recipe_of(ECHO_ROLE))
    done = {job.stage.name: manifest for job, manifest in pipeline.run(jobs[:5])}
    assert done["distillation/teacher"]["figures"]["text_statistics"]["texts"] > 0
    pairs = done["distillation/pairs"]["figures"]
    assert {"refusals", "distinct_2", "near_duplicates"} <= pairs["text_statistics"].keys()
    assert isinstance(pairs["trait_words"], list)
