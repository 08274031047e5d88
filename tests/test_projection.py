"""Directions, positions and distances of training data and answers in the residual stream."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from opencharacter.config.evaluation import Direction
from opencharacter.config.roles import Role
from opencharacter.errors import StageFailed
from opencharacter.evaluation import direction, projection, residual, steering
from opencharacter.evaluation.report import charts, formatting
from opencharacter.evaluation.report.sections import Distance, ScoreTable
from opencharacter.evaluation.steering import last_states
from opencharacter.text.chat import assistant, system, user

POET = [system("You speak in verse about the sea.")]


@pytest.fixture(scope="module")
def loaded(tiny_model):
    return steering.load_student(
        Role(model=str(tiny_model), name="tiny", self_name="Tiny"), on_gpu=False
    )


# --------------------------------------------------------------------------------------- the model


def test_every_layer_has_a_unit_vector_that_points_towards_the_constitution(loaded):
    model, tokenizer = loaded
    prompts = ["What is rain?", "Name a bird.", "Why do we sleep?"]
    directions = residual.find_directions(model, tokenizer, prompts, POET)
    assert directions.shape == (2, 64)
    assert directions.norm(dim=-1).numpy() == pytest.approx([1, 1], rel=1e-5)
    informed = last_states(model, tokenizer, [[*POET, user(p)] for p in prompts])
    plain = last_states(model, tokenizer, [[user(p)] for p in prompts])
    assert all(((informed - plain).sum(0) * directions).sum(-1) > 0)


def test_the_position_of_a_text_is_its_mean_over_the_answer_tokens(loaded):
    model, tokenizer = loaded
    talk = [user("What is rain?"), assistant("Water that falls.")]
    (sequence,) = residual.encode(tokenizer, talk)
    with torch.no_grad():
        hidden = model(torch.tensor([sequence.ids]), output_hidden_states=True).hidden_states
    first, second = (state[0, sequence.loss_positions].mean(0) for state in hidden[1:])
    directions = torch.eye(64)[:2]
    (found,) = residual.project(model, tokenizer, directions, [talk], 500)
    assert found == pytest.approx((float(first[0]), float(second[1])), abs=1e-5)


def test_texts_of_different_lengths_are_read_together_as_they_are_alone(loaded, monkeypatch):
    model, tokenizer = loaded
    talks = [
        [user("What is rain? " * n), assistant("Water that falls. " * (4 - n))] for n in range(1, 4)
    ]
    unread = [user("What is rain? " * 40), assistant("Water.")]
    every = [talks[0], unread, *talks[1:]]
    directions = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    together = residual.project(model, tokenizer, directions, every, 60)
    monkeypatch.setattr(steering, "MAX_BATCH_TOKENS", 1)
    alone = [residual.project(model, tokenizer, directions, [talk], 60)[0] for talk in every]
    assert together[1] is None and alone[1] is None
    for found, wanted in zip(together, alone, strict=True):
        assert found is wanted is None or found == pytest.approx(wanted, abs=1e-4)


def test_the_loss_of_answers_does_not_depend_on_their_batch(loaded, monkeypatch):
    model, tokenizer = loaded
    pairs = [{"prompt": "Why? " * n, "chosen": "Rain falls. " * (5 - n)} for n in range(1, 5)]
    together = steering.answer_nll(model, tokenizer, pairs)
    monkeypatch.setattr(steering, "MAX_BATCH_TOKENS", 4)
    assert steering.answer_nll(model, tokenizer, pairs) == pytest.approx(together, abs=1e-5)


def test_a_text_without_an_answer_token_within_the_limit_is_not_read(loaded):
    model, tokenizer = loaded
    talk = [user("What is rain? " * 20), assistant("Water.")]
    directions = torch.eye(64)[:2]
    for unread in (talk, [user("Hello?")]):
        assert residual.project(model, tokenizer, directions, [unread], 8) == [None]


# ------------------------------------------------------------------------------------- statistics


def positions(values):
    return {str(n): np.atleast_1d(np.asarray(v, float)) for n, v in enumerate(values)}


def test_texts_of_one_prompt_count_once_and_unread_texts_are_counted():
    rows = [
        {"prompt": "a", "positions": [1.0]},
        {"prompt": "a", "positions": [3.0]},
        {"prompt": "b", "positions": [5.0]},
        {"prompt": "c", "positions": None},
    ]
    means, unread = residual.by_prompt(rows)
    assert {prompt: float(v[0]) for prompt, v in means.items()} == {"a": 2, "b": 5}
    assert unread == 1


def test_a_distance_is_in_standard_deviations_of_the_untrained_answers():
    before = positions([0.0, 2.0, 4.0])
    (paired,) = residual.summarize(positions([4.0, 6.0, 8.0]), before)
    assert (paired.value, paired.n, paired.unscored) == (2.0, 3, 0)
    (unpaired,) = residual.summarize({"x": np.array([6.0])}, before, paired=False)
    assert (unpaired.value, unpaired.low, unpaired.n) == (2.0, None, 1)


def test_a_prompt_that_only_one_side_answered_is_unscored():
    before, after = positions([0.0, 2.0, 4.0]), positions([1.0, 3.0, 5.0, 7.0])
    (distance,) = residual.summarize(after, before, unread=2)
    assert (distance.n, distance.unscored) == (3, 3)


def test_the_middle_layers_are_summarized_by_the_mean_of_their_standardized_positions():
    random = np.random.default_rng(0)
    base = positions(random.normal(0, [1, 2, 3, 4, 5], (6, 5)))
    scale = residual.Scale.of(base)
    standardized = scale.standardize(base)["0"]
    assert standardized[:5] == pytest.approx((base["0"] - scale.mean) / scale.spread)
    assert standardized[5] == pytest.approx(standardized[1:4].mean())


def test_a_scale_needs_two_different_answers():
    with pytest.raises(StageFailed, match="at least 2"):
        residual.Scale.of(positions([1.0]))
    with pytest.raises(StageFailed, match="one position"):
        residual.Scale.of(positions([1.0, 1.0]))


@pytest.mark.parametrize("size", [12, 60])
@pytest.mark.parametrize("effect", [0.0, 1.5])
@pytest.mark.parametrize("paired", [True, False])
def test_intervals_of_distances_cover_the_truth(size, effect, paired):
    """Positions of different prompts differ; those of two answers to one prompt are correlated."""
    random = np.random.default_rng(7)
    runs, hits = 1500, 0
    unit = np.sqrt(2.0)
    for _ in range(runs):
        prompt = random.normal(0, 1, size)
        before = positions(prompt + random.normal(0, 1, size))
        level = prompt if paired else random.normal(0, 1, size)
        after = positions(level + effect * unit + random.normal(0, 1, size))
        (distance,) = residual.summarize(after, before, paired=paired)
        assert distance.low is not None and distance.high is not None
        hits += distance.low <= effect <= distance.high
    assert 0.93 <= hits / runs <= 0.975, hits / runs


# ------------------------------------------------------------------------------------------ texts


def pair(prompt, id):
    return {"id": id, "prompt": prompt, "chosen": "Oh, sea!", "rejected": "Water."}


def test_directions_and_pairs_come_from_different_prompts():
    rows = [pair(f"prompt {n}", f"{n}-{sample}") for n in range(10) for sample in range(3)]
    used, pairs = direction.split(rows, Direction(texts=4, prompts=8))
    assert len(used) == 5
    assert len(pairs) == 4
    assert set(used).isdisjoint(row["prompt"] for row in pairs)
    assert len({row["prompt"] for row in pairs}) == 4


def test_both_sides_of_a_pair_are_read_after_the_same_prompt():
    chosen, rejected = direction.texts([pair("Why?", "1")])
    assert chosen["messages"] == [user("Why?"), assistant("Oh, sea!")]
    assert rejected["messages"] == [user("Why?"), assistant("Water.")]
    assert chosen["id"] != rejected["id"]


def test_all_conditions_answer_the_same_prompts():
    rows = [
        {"prompt": f"p{n}", "condition": condition, "answer": "Yes."}
        for condition in ("base", "full")
        for n in range(9)
    ]
    texts = projection.answer_texts(rows, 4)
    by_source = {s: {t["prompt"] for t in texts if t["source"] == s} for s in
                 ("answers/base", "answers/full")}  # fmt: skip
    assert by_source["answers/base"] == by_source["answers/full"]
    assert len(texts) == 8


def test_transcripts_with_the_same_first_user_turn_are_one_prompt():
    rows = [
        {"id": str(n), "kind": kind, "messages": [system("s"), user(first), assistant("a")]}
        for n, (kind, first) in enumerate(
            [("reflection", "same"), ("reflection", "same"), ("reflection", "x"), ("free", "y")]
        )
    ]
    texts = projection.transcript_texts(rows, 2)
    assert [(t["source"], t["prompt"]) for t in texts] == [
        ("transcripts/reflection", "same"),
        ("transcripts/reflection", "same"),
        ("transcripts/free", "y"),
    ]
    assert len({t["id"] for t in texts}) == 3


# ----------------------------------------------------------------------------------------- report


def stored(sources, layers=8, prompts=20):
    random = np.random.default_rng(3)
    return [
        {"source": s, "prompt": str(n), "positions": list(random.normal(shift, 1, layers))}
        for s, shift in sources.items()
        for n in range(prompts)
    ]


def test_a_moved_condition_is_shown_beside_its_adherence():
    rows = stored({"answers/base": 0, "answers/full": 3, "transcripts/free": 3})
    judged = [
        {"scenario": str(n), "trait": 0, "kind": "occasion", "condition": c, "presence": p}
        for c, p in (("base", 0.2), ("full", 0.6))
        for n in range(8)
    ]
    tables = {"adherence": judged, "own": rows}

    def read(dataset, *_):
        found = tables["adherence" if dataset.endswith("adherence") else "own"]
        return SimpleNamespace(to_pylist=lambda: found, schema=SimpleNamespace(names=[]))

    store = SimpleNamespace(read_table=read, manifest=lambda dataset: {})
    job = SimpleNamespace(
        store=store, dataset="own", scope="s/p", persona=SimpleNamespace(name="p")
    )
    moved, beside = projection.report(job)  # type: ignore[arg-type]
    assert isinstance(moved, ScoreTable)
    assert isinstance(beside, ScoreTable)
    assert list(moved.rows) == ["answers: full", "SFT: free transcripts"]
    assert moved.columns == ["Middle layers", "Layer 2", "Layer 4", "Layer 6"]
    distance, change = beside.rows["full"].values()
    assert distance is not None and change is not None
    assert distance.low is not None and distance.low > 1
    assert change.value == pytest.approx(0.4)
    scored = projection.scores(job)  # type: ignore[arg-type]
    assert len(scored) == 2 * 9
    assert {(row["condition"], row["about"]) for row in scored} >= {
        ("full", "answers, middle layers"), (None, "transcripts/free, layer 1"),
    }  # fmt: skip


def test_chosen_answers_are_compared_with_rejected_ones_of_the_same_prompt():
    found = direction.distances(stored({"chosen": 2, "rejected": 0}))
    assert len(found) == 9
    assert all(d.low is not None and d.low > 0 for d in found)
    assert found[-1].value is not None and found[0].value is not None
    assert found[-1].value > found[0].value  # the mean of layers has less noise


def test_a_distance_is_shown_in_standard_deviations():
    distance = Distance(-1.25, -1.5, -1.0, 20, 1)
    assert formatting.value_text(distance) == "\N{MINUS SIGN}1.25 SD"
    assert formatting.interval_text(distance) == "\N{MINUS SIGN}1.50 to \N{MINUS SIGN}1.00"
    assert formatting.sample_size(distance) == "n = 20 prompts, 1 unscored"
    assert "the dashed line is no distance" in charts.score_bar(distance)


@pytest.mark.parametrize("stage", ["evaluation/direction", "evaluation/projection"])
def test_the_stages_are_off_without_texts(make_jobs, echo_recipe, stage):
    (job,) = (j for j in make_jobs(echo_recipe) if j.stage.name == stage)
    assert not job.is_enabled
    assert job.stage.module.estimate(job).rows == 0
