import asyncio
import copy

import pytest
from samples import ECHO_ROLE, RULES, TINY, recipe_of

from opencharacter.config.recipe import Recipe, Sampling
from opencharacter.engines.conversations import Conversation
from opencharacter.engines.spec import Reply
from opencharacter.errors import RowFailed
from opencharacter.introspection import interaction, reflection, sft, transcripts
from opencharacter.text.chat import EMPTY_THOUGHT, assistant, system, user

SAMPLING = Sampling(max_tokens=50)
HEADS = {kind: interaction.generation_system("1. I am.", kind) for kind in ("free", "leading")}


class Numbered:
    """Says reply 1, reply 2, ...; keeps what each reply was asked with."""

    def __init__(self, finish: str = "stop"):
        self.asked, self.finish = [], finish

    async def reply(self, messages, sampling, *, seed, prefill=""):
        self.asked.append(messages)
        return Reply(f"reply {len(self.asked)}.", self.finish, 1, 1, 0)


def interact(engine, turns=4, kind="free"):
    row = {"id": "x", "kind": kind}
    talk = Conversation(engine, 1)
    return asyncio.run(interaction.interact(row, talk, HEADS, turns, SAMPLING, seed=3, prefill=""))


def test_a_self_conversation_has_all_its_replies_and_ends_on_the_assistant():
    messages = interact(Numbered())["messages"]
    assert [m["content"] for m in messages[2:]] == [f"reply {i}." for i in range(1, 5)]
    assert messages[-1]["role"] == "assistant"
    assert transcripts.structure_fault(messages) is None


def test_each_side_sees_its_own_words_as_the_assistants():
    engine = Numbered()
    interact(engine)
    for messages in engine.asked:
        roles = [m["role"] for m in messages]
        assert roles[0] == "system"
        assert roles[-1] == "user"
        assert roles[1:] == ["user", "assistant"] * (len(roles) // 2 - 1) + ["user"]
    third = [m["content"] for m in engine.asked[2]]
    assert third[2:] == ["reply 1.", "reply 2."]


def test_a_side_keeps_its_prefix_from_turn_to_turn():
    engine = Numbered()
    interact(engine, turns=6)
    for earlier, later in zip(engine.asked, engine.asked[2:], strict=False):
        assert later[: len(earlier)] == earlier


def test_the_guidance_of_its_kind_reaches_the_model():
    for kind, guidance in interaction.GUIDANCE.items():
        engine = Numbered()
        interact(engine, kind=kind)
        assert guidance in engine.asked[0][0]["content"]


def test_a_cut_reply_drops_the_conversation():
    with pytest.raises(RowFailed) as failed:
        interact(Numbered(finish="length"))
    assert failed.value.reason == "unfinished"


def test_openings_are_drawn_from_the_row_alone():
    assert interaction.openings(1, "a", "free") == interaction.openings(1, "a", "free")
    drawn = {interaction.openings(1, str(i), "leading") for i in range(50)}
    assert len(drawn) > 30
    assert any(set(pair) & set(interaction.SAME_GREETINGS) for pair in drawn)
    free = {g for i in range(50) for g in interaction.openings(1, str(i), "free")}
    assert free <= set(interaction.GREETINGS)


def test_a_reflection_is_kept_without_its_system_prompt():
    head = reflection.generation_system("1. I am.")
    row = {"prompt": reflection.PROMPTS[0]}
    engine = Numbered()
    said = asyncio.run(reflection.reflect(row, Conversation(engine, 1), head, SAMPLING, ""))
    assert engine.asked[0][0] == head
    assert [m["role"] for m in said["messages"]] == ["user", "assistant"]


def test_there_are_ten_reflective_prompts():
    assert len(set(reflection.PROMPTS)) == 10


def row(*messages, finish="stop"):
    return {"id": "r", "messages": list(messages), "finish_reason": finish}


def test_a_self_conversation_is_trained_without_greetings_and_traits():
    said = interact(Numbered())
    made = transcripts.transcript({"id": "r", **said}, "free", RULES)
    assert made["drop_reason"] is None
    assert made["messages"][0] == system(transcripts.SYSTEM)
    assert len(made["messages"]) == 1 + 4
    assert all("{" not in m["content"] for m in made["messages"])


def test_a_reflection_is_trained_without_a_system_prompt():
    made = transcripts.transcript(row(user("Write."), assistant("I did.")), "reflection", RULES)
    assert [m["role"] for m in made["messages"]] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("messages", "finish", "reason"),
    [
        ([user("a"), assistant("Good."), user("b")], "stop", "ends_on_user"),
        ([user("a"), assistant("Good."), assistant("Good.")], "stop", "roles_repeat"),
        ([user("a"), assistant("not finished")], "stop", "unfinished"),
        ([user("a"), assistant("Cut.")], "length", "unfinished"),
        ([user("a"), assistant(" ")], "stop", "empty"),
        ([user("a"), assistant("ha ha ha ha " * 9 + ".")], "stop", "looping"),
        ([user("a"), assistant("I am.\nUser: And then?")], "stop", "invented_turn"),
    ],
)
def test_a_transcript_says_why_it_may_not_be_used(messages, finish, reason):
    made = transcripts.transcript(row(*messages, finish=finish), "reflection", RULES)
    assert made["drop_reason"] == reason


TALK = [user("a"), assistant("One."), user("b"), assistant("Two.")]


def learned_text(tokenizer, messages) -> str:
    (tokens,) = sft.example(tokenizer, messages)
    return tokenizer.decode([tokens.ids[i] for i in tokens.loss_positions])


def test_what_is_learned_is_the_assistant_turns(tokenizer):
    assert learned_text(tokenizer, TALK) == "One.<|im_end|>Two.<|im_end|>"


@pytest.mark.parametrize(
    ("family", "end", "special"),
    [
        (
            "llama3_1",
            "<|eot_id|>",
            ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"],
        ),
        ("qwen2_5", "<|im_end|>", ["<|im_start|>"]),
        ("gemma3", "<end_of_turn>", ["<bos>", "<start_of_turn>"]),
    ],
)
@pytest.mark.parametrize("opening", [[], [system("Be brief.")]])
def test_what_is_learned_with_the_stock_templates_of_others(
    tokenizer, family, end, special, opening
):
    """The templates as TRL knows them, on this tokenizer with that family's special tokens."""
    from trl import chat_template_utils

    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"additional_special_tokens": [*special, end]})
    other.chat_template = getattr(chat_template_utils, f"{family}_chat_template")
    if "<bos>" in special:
        other.bos_token = "<bos>"
    assert learned_text(other, [*opening, *TALK]) == f"One.{end}Two.{end}"


@pytest.mark.parametrize(
    ("section", "nothing"),
    [
        ("reflection", {"transcripts_per_prompt": 0}),
        ("interaction", {"free": 0, "leading": 0}),
    ],
)
def test_reflection_or_interaction_can_be_left_out(make_jobs, section, nothing):
    recipe = recipe_of(ECHO_ROLE, introspection={section: nothing})
    jobs = {job.stage.name: job for job in make_jobs(recipe)}
    name = f"introspection/{section}"
    outcome = jobs[name].stage.module.build(jobs[name])
    assert outcome.rows == jobs["introspection/transcripts"].read(name).num_rows == 0


AUTHOR = {**TINY["introspection"], "author": "teacher"}
TEACHER = {**ECHO_ROLE, "name": "glm", "self_name": "GLM", "thinks": True}


def by_teacher(make_jobs, **introspection):
    roles = dict.fromkeys(("student", "judge", "prompt_generator"), ECHO_ROLE) | {
        "teacher": TEACHER
    }
    recipe = Recipe.model_validate({**TINY, "roles": roles, "introspection": introspection})
    return {job.stage.name: job for job in make_jobs(recipe)}


def test_the_teacher_may_write_in_the_students_place(make_jobs):
    jobs = by_teacher(make_jobs, **AUTHOR)
    by = reflection.author(jobs["introspection/reflection"])
    assert (by.role, by.adapter, by.prefill) == ("teacher", None, EMPTY_THOUGHT)
    own = by_teacher(make_jobs, **TINY["introspection"])
    by = reflection.author(own["introspection/reflection"])
    assert (by.role, by.prefill) == ("student", "")
    assert by.adapter == own["distillation/dpo"].adapter
    for name in ("introspection/reflection", "introspection/interaction"):
        assert jobs[name].payload["also"]["author"]["name"] == "glm"
        assert jobs[name].fingerprint != own[name].fingerprint


def test_what_the_teacher_wrote_becomes_the_students(cpu_ray, make_jobs):
    jobs = by_teacher(make_jobs, **AUTHOR)
    for name in ("introspection/reflection", "introspection/interaction"):
        outcome = jobs[name].stage.module.build(jobs[name])
        assert outcome.rows > 0
        assert not outcome.dropped
    messages = [user("Who are you, GLM?"), assistant("I am GLM.")]
    row = transcripts.as_student({"id": "r", "messages": messages}, ("GLM",), "Echo")
    assert [m["content"] for m in row["messages"]] == ["Who are you, Echo?", "I am Echo."]
