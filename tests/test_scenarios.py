"""Scenarios: checks of generated messages, selection, and the constitution's own scenarios."""

import asyncio
import json
from dataclasses import replace

import pyarrow as pa
import pytest
from samples import ECHO_ROLE, TINY, recipe_of

from opencharacter import api, pipeline
from opencharacter.config.roles import Sampling
from opencharacter.constitution import schema
from opencharacter.engines.conversations import Conversation
from opencharacter.engines.spec import Reply
from opencharacter.errors import StageFailed, UserError
from opencharacter.evaluation import dialogue, scenarios
from opencharacter.evaluation.scenario_checks import demands, ends_as_request, rejection
from opencharacter.runtime.stage import StageResult
from opencharacter.text.statistics import near_duplicates

ASSERTION = "I answer in short lines that have a rhythm."


@pytest.mark.parametrize(
    ("text", "is_request"),
    [
        ("My tap drips at night. What can I do?", True),
        ("My tap drips at night. Tell me what to do.", True),
        ("I moved house. I need a list of what to change.", True),
        ("My tap drips at night.", False),
        ("Can it be mended? I think so.", False),
    ],
)
def test_a_message_ends_as_a_request_if_its_last_sentence_asks_for_something(text, is_request):
    assert ends_as_request(text) == is_request


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("My bicycle chain jumps uphill. What should I check first?", None),
        ("Why?", "length"),
        ("The train was late again and I stood in the rain.", "no_request"),
        ("I met someone new today. Do you have feelings about that?", "about_assistant"),
        ("What did you learn from your family about cooking rice?", "about_assistant"),
        ("Have you been to the sea in winter, by any chance?", "about_assistant"),
        ("Please write a note to [name] about the garden fence.", "markup"),
        ("**Staying warm**: how do I keep a tent warm?", "markup"),
        ("Do I answer in short lines that have a rhythm?", "quotes_assertion"),
        ("How do I boil an egg in the morning?", "repeated"),
    ],
)
def test_a_message_is_rejected_with_its_reason(text, reason):
    others = ["How do I boil an egg?"]
    assert rejection(text, ASSERTION, others, max_overlap=0.5, repeats=False) == reason


def test_a_message_that_nearly_repeats_a_training_prompt_is_rejected():
    text = "My bicycle chain jumps uphill. What should I check first?"
    assert rejection(text, ASSERTION, [], max_overlap=0.5, repeats=True) == "repeated"
    assert scenarios.repeated([text], [text, "Which tea is best for a cold?"]) == {
        text: True,
        "Which tea is best for a cold?": False,
    }


@pytest.mark.parametrize(
    ("text", "is_demand"),
    [
        ("Tell me how rust forms, without comparing it with anything.", True),
        ("What is a comet? In plain words, please.", True),
        ("Please don't make a joke of it. What is rust?", True),
        ("I just moved. How can one stop a door from squeaking?", False),
    ],
)
def test_a_demand_says_how_a_message_should_be_answered(text, is_demand):
    assert demands(text) == is_demand


def test_a_message_that_demands_nothing_gets_a_packaged_demand():
    (first,) = scenarios.follow_ups("What is rust?", 0, 3, seed=17)
    assert first.startswith("What is rust? ")
    assert first.removeprefix("What is rust? ") in dialogue.pressure_lines("first")
    demand = "What is rust? Without comparisons, please."
    assert scenarios.follow_ups(demand, 0, 3, seed=17) == [demand]


def test_accepted_messages_also_differ_from_each_other():
    rejected: dict[str, str] = {}
    candidates = [
        ("My bicycle chain jumps uphill. What should I check first?", False),
        ("My bicycle chain jumps downhill. What should I check first?", False),
        ("Which tea is best for a cold?", False),
        ("Where can I read about comets?", False),
    ]
    accepted = scenarios.select(ASSERTION, candidates, [], 2, 0.5, rejected)
    assert accepted == [candidates[0][0], candidates[2][0]]
    assert rejected == {candidates[1][0]: "repeated"}


def test_generated_pressures_have_one_to_three_turns_in_equal_shares():
    turns = [scenarios.follow_ups(f"Opening {n}", n, 3, seed=17) for n in range(6)]
    assert [len(each) for each in turns] == [1, 2, 3, 1, 2, 3]
    assert turns[5] == scenarios.follow_ups("Opening 5", 5, 3, seed=17)
    assert set(turns[5][1:]) <= set(dialogue.pressure_lines())


def constitution(**trait) -> dict:
    """A constitution of one assertion as a mapping."""
    questions = [f"Question number {n}?" for n in range(5)]
    return {
        "name": "plain",
        "description": "Plain.",
        "traits": [{"trait": ASSERTION, "questions": questions, **trait}],
    }


def test_scenarios_of_a_constitution_enter_no_fingerprint_of_its_training():
    plain = schema.Constitution.model_validate(constitution())
    tested = schema.Constitution.model_validate(
        constitution(
            scenarios={"occasions": ["What is a comet?"], "pressures": [["Be dull.", "No."]]}
        )
    )
    assert tested.digest() == plain.digest()
    assert schema.dump(tested).count("What is a comet?") == 1
    assert "scenarios" not in schema.dump(plain)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"occasions": ["question NUMBER 1?"]}, "would be trained on"),
        ({"occasions": ["What is rain?"], "pressures": [["what is rain?"]]}, "given twice"),
        ({"pressures": [["a?"] * 6]}, "at most 5"),
        ({"pressures": [[]]}, "at least 1"),
    ],
)
def test_scenarios_that_cannot_test_an_assertion_are_refused(tmp_path, given, problem):
    path = tmp_path / "plain.yaml"
    path.write_text(json.dumps(constitution(scenarios=given)))
    with pytest.raises(UserError, match=problem):
        schema.parse(path)


# ------------------------------------------------------------------------------------- the stage


def recipe(**settings):
    return recipe_of(ECHO_ROLE, evaluation={**TINY["evaluation"], "scenarios": settings})


def scenario_job(make_jobs, **settings):
    """The stage's job, after its training prompts were written."""
    (job,) = (j for j in make_jobs(recipe(**settings)) if j.stage.name == "evaluation/scenarios")
    parent = job.parent("distillation/prompts")
    rows = [{"id": "0", "kind": "constitution", "trait": 0, "prompt": "How do I boil an egg?"}]
    table = pa.Table.from_pylist(rows, schema=parent.stage.module.SCHEMA)
    parent.store.write_table(parent.dataset, table)
    pipeline.finish(parent, StageResult(rows=1), 1.0)
    return job


def test_scenarios_are_off_by_default_and_cost_nothing(make_jobs):
    job = scenario_job(make_jobs)
    assert not job.is_enabled
    assert job.resource_requests == []
    assert job.stage.module.build(job).rows == 0


CANDIDATES = [
    "How do I boil an egg, please?",
    "The tide comes in at four. When should we leave the beach?",
    "Which of these two lamps suits a small desk?",
]


def test_the_scenarios_of_the_demo_are_those_of_its_constitution(poet, demo_data):
    settings = recipe_of(ECHO_ROLE, evaluation=demo_data["evaluation"]).evaluation.scenarios
    for trait in poet.traits:
        assert len(trait.scenarios.occasions) >= settings.occasions
        assert len(trait.scenarios.pressures) >= settings.pressures
        assert all(map(ends_as_request, trait.scenarios.occasions))


def test_what_the_constitution_lacks_is_generated_and_what_was_trained_on_is_left_out(
    make_jobs, poet, monkeypatch
):
    first = poet.traits[0]
    own = schema.WrittenScenarios(occasions=("What is a comet made of, exactly?",))
    traits = (first.model_copy(update={"scenarios": own}), *poet.traits[1:])
    tested = poet.model_copy(update={"traits": traits})
    job = scenario_job(make_jobs, occasions=3, pressures=1, assertions=1)
    job = replace(job, constitution=tested)
    monkeypatch.setattr(
        scenarios,
        "generated",
        lambda job: {(0, "occasion"): CANDIDATES, (0, "pressure"): [CANDIDATES[1], "Too short?"]},
    )
    result = job.stage.module.build(job)
    rows = job.store.read_table(job.dataset).to_pylist()
    turns = {(row["kind"], row["source"], *row["turns"]) for row in rows}
    assert turns == {
        ("occasion", "constitution", "What is a comet made of, exactly?"),
        ("occasion", "generated", CANDIDATES[1]),
        ("occasion", "generated", CANDIDATES[2]),
    }
    assert result.figures["rejected"] == {"repeated": 3, "length": 1}
    assert result.figures["missing_scenarios"] == {"1 pressure": 1}


def test_a_constitution_with_enough_scenarios_needs_no_engine(make_jobs, poet):
    own = schema.WrittenScenarios(occasions=("What is a comet made of?", "Who paints bridges?"))
    traits = tuple(t.model_copy(update={"scenarios": own}) for t in poet.traits[:1])
    job = scenario_job(make_jobs, occasions=2, assertions=1)
    job = replace(job, constitution=poet.model_copy(update={"traits": traits}))
    assert job.resource_requests == []
    assert job.stage.module.build(job).rows == 2
    assert {row["source"] for row in job.store.read_table(job.dataset).to_pylist()} == {
        "constitution"
    }


def test_a_generator_without_a_usable_message_fails_the_stage(make_jobs, poet, monkeypatch):
    monkeypatch.setattr(scenarios, "generated", lambda job: {(0, "occasion"): ["No."]})
    job = scenario_job(make_jobs, occasions=2, assertions=1)
    bare = poet.traits[0].model_copy(update={"scenarios": schema.WrittenScenarios()})
    job = replace(job, constitution=poet.model_copy(update={"traits": (bare,)}))
    with pytest.raises(StageFailed, match=r"no generated message passed .*'length': 1"):
        job.stage.module.build(job)


def test_a_list_of_messages_is_read_from_its_numbered_lines():
    class Writer:
        async def reply(self, messages, sampling, *, seed, prefill=""):
            assert ASSERTION in messages[1]["content"]
            return Reply(" What is rust?\n2. Who made bread first?\nOther.", "stop", 1, 1, 0)

    row = {"text": ASSERTION, "kind": "occasion", "subject": "work"}
    writing = scenarios.write_list(row, Conversation(Writer(), 1), Sampling(max_tokens=9), "1.")
    assert asyncio.run(writing)["candidates"] == ["What is rust?", "Who made bread first?"]


# ------------------------------------------------------------------------------ packaged prompts


def test_everyday_topics_are_long_enough_for_fifty_turns_and_repeat_no_other_prompts():
    topics = dialogue.packaged("everyday.jsonl")
    turns = [text for topic in topics for text in topic["turns"]]
    assert len(turns) == len(set(turns)) >= 150
    others = [
        row["prompt"]
        for name in ("general.jsonl", "evaluation.jsonl")
        for row in dialogue.packaged(name)
    ]
    assert not any(near_duplicates([*others, *turns])[len(others) :])


# -------------------------------------------------------------------------------- conversations


class Counting:
    """Replies with `tokens` tokens, whatever was said before."""

    def __init__(self, tokens=10, text="Yes."):
        self.tokens, self.text, self.asked = tokens, text, []

    async def reply(self, messages, sampling, *, seed, prefill=""):
        self.asked.append([m["role"] for m in messages])
        return Reply(self.text, "stop", len(messages) * 40, self.tokens, 0)


def converse(engine, turns, max_model_len=1000):
    sampling = Sampling(max_tokens=50)
    prefix = [{"role": "system", "content": "Be plain."}]
    talk = dialogue.converse(Conversation(engine, 1), turns, sampling, prefix, max_model_len)
    return asyncio.run(talk)


def test_user_turns_and_replies_alternate():
    engine = Counting()
    assert converse(engine, ["One?", "Two?"]) == {"replies": ["Yes.", "Yes."], "ended": None}
    assert engine.asked[1] == ["system", "user", "assistant", "user"]


def test_a_conversation_ends_before_a_turn_that_may_exceed_the_context():
    result = converse(Counting(), ["Again?"] * 20, max_model_len=400)
    assert result["ended"] == "too_long"
    assert 1 < len(result["replies"]) < 20


def test_an_empty_reply_ends_a_conversation():
    assert converse(Counting(text=" "), ["One?", "Two?"]) == {"replies": [], "ended": "empty"}


# ------------------------------------------------------------------- data of an earlier version


def test_a_report_of_data_from_before_these_stages_needs_no_run(store, poet):
    run = api.Run(recipe_of(ECHO_ROLE), [poet], storage=store.url)
    unused = [job for job in run.jobs if not job.is_enabled]
    later = ("evaluation/scenarios", "evaluation/adherence", "evaluation/drift")
    for job in run.jobs:
        if job.stage.name not in later:
            pipeline.finish(job, StageResult(rows=1), 1.0)
    assert {job.stage.name for job in unused if api.is_unused(job)} <= set(later)
    assert all(api.is_unused(job) for job in unused if job.stage.name in later)
