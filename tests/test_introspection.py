import asyncio
import copy

import pytest
from samples import ECHO_ROLE, RULES, TINY, recipe_of

from opencharacter.config.recipe import Recipe
from opencharacter.config.roles import Sampling
from opencharacter.engines.conversations import Conversation
from opencharacter.engines.spec import Reply
from opencharacter.errors import RowFailed
from opencharacter.introspection import interaction, reflection, sft, transcripts
from opencharacter.text.chat import EMPTY_THOUGHT, assistant, system, user

SAMPLING = Sampling(max_tokens=50)
SYSTEM_MESSAGES = {
    kind: interaction.generation_system("1. I am.", kind) for kind in ("free", "leading")
}


class NumberedEngine:
    """An engine that replies `reply 1.`, `reply 2.`, ... and records the messages of each call."""

    def __init__(self, finish: str = "stop"):
        self.calls, self.finish = [], finish

    async def reply(self, messages, sampling, *, seed, prefill=""):
        self.calls.append(messages)
        return Reply(f"reply {len(self.calls)}.", self.finish, 1, 1, 0)


def interact(engine, turns=4, kind="free"):
    row = {"id": "x", "kind": kind}
    conversation = Conversation(engine, 1)
    return asyncio.run(
        interaction.run_self_conversation(
            row, conversation, SYSTEM_MESSAGES, turns, SAMPLING, seed=3, prefill=""
        )
    )


def test_a_self_conversation_is_complete_and_ends_with_the_assistant():
    messages = interact(NumberedEngine())["messages"]
    assert [m["content"] for m in messages[2:]] == [f"reply {i}." for i in range(1, 5)]
    assert messages[-1]["role"] == "assistant"
    assert transcripts.structure_error(messages) is None


def test_each_side_sees_its_own_turns_as_assistant_turns():
    engine = NumberedEngine()
    interact(engine)
    for messages in engine.calls:
        roles = [m["role"] for m in messages]
        assert roles[0] == "system"
        assert roles[-1] == "user"
        assert roles[1:] == ["user", "assistant"] * (len(roles) // 2 - 1) + ["user"]
    third = [m["content"] for m in engine.calls[2]]
    assert third[2:] == ["reply 1.", "reply 2."]


def test_each_turn_of_a_side_extends_its_previous_prompt():
    engine = NumberedEngine()
    interact(engine, turns=6)
    for earlier, later in zip(engine.calls, engine.calls[2:], strict=False):
        assert later[: len(earlier)] == earlier


def test_the_system_prompt_depends_on_the_kind_of_conversation():
    for kind, guidance in interaction.GUIDANCE.items():
        engine = NumberedEngine()
        interact(engine, kind=kind)
        assert guidance in engine.calls[0][0]["content"]


@pytest.mark.parametrize("finish", ["length", "content_filter", "abort"])
def test_a_reply_that_was_cut_off_drops_the_conversation(finish):
    with pytest.raises(RowFailed, match=finish) as failed:
        interact(NumberedEngine(finish=finish))
    assert failed.value.reason == "unfinished"


def test_greetings_depend_only_on_the_row_id():
    assert interaction.draw_greetings(1, "a", "free") == interaction.draw_greetings(1, "a", "free")
    drawn = {interaction.draw_greetings(1, str(i), "leading") for i in range(50)}
    assert len(drawn) > 30
    assert any(set(pair) & set(interaction.SAME_GREETINGS) for pair in drawn)
    free = {g for i in range(50) for g in interaction.draw_greetings(1, str(i), "free")}
    assert free <= set(interaction.GREETINGS)


def test_a_reflection_is_stored_without_its_system_prompt():
    system_message = reflection.generation_system("1. I am.")
    engine = NumberedEngine()
    result = reflect(engine, [reflection.PROMPTS[0]], system_message)
    assert engine.calls[0][0] == system_message
    assert [m["role"] for m in result["messages"]] == ["user", "assistant"]


def reflect(engine, prompts, system_message=SYSTEM_MESSAGES["free"]):
    return asyncio.run(
        reflection.write_reflection(
            {"prompt": prompts[0]},
            Conversation(engine, 1),
            select_turns=lambda row: prompts,
            system_message=system_message,
            sampling=SAMPLING,
            prefill="",
        )
    )


def test_a_transcript_of_several_turns_answers_each_prompt_after_the_ones_before():
    engine = NumberedEngine()
    result = reflect(engine, ["One?", "Two?"])
    texts = ["One?", "reply 1.", "Two?", "reply 2."]
    assert [m["content"] for m in result["messages"]] == texts
    assert [m["content"] for m in engine.calls[1][1:]] == texts[:3]
    assert result["finish_reason"] == "stop"


def test_a_transcript_ends_with_a_reply_that_was_cut_off_and_is_dropped():
    result = reflect(NumberedEngine(finish="length"), ["One?", "Two?"])
    assert len(result["messages"]) == 2
    made = transcripts.make_transcript({"id": "x", **result}, "reflection", RULES)
    assert made["drop_reason"] == "unfinished"


def test_the_prompts_of_a_transcript_are_drawn_by_its_id():
    pool = [f"{n}?" for n in range(9)]
    row = {"id": "a", "prompt": "3?"}
    drawn = reflection.turns_of(row, pool, 4, seed=1)
    assert drawn[0] == "3?"
    assert len(set(drawn)) == 4
    assert drawn == reflection.turns_of(row, pool, 4, seed=1)
    assert drawn != reflection.turns_of({**row, "id": "b"}, pool, 4, seed=1)
    assert reflection.turns_of(row, pool, 1, seed=1) == ["3?"]
    assert len(reflection.turns_of(row, pool, 99, seed=1)) == 9


def test_there_are_ten_reflective_prompts():
    assert len(set(reflection.PROMPTS)) == 10


def row(*messages, finish="stop"):
    return {"id": "r", "messages": list(messages), "finish_reason": finish}


def test_a_self_conversation_is_trained_on_without_greetings_and_traits():
    generated = interact(NumberedEngine())
    transcript = transcripts.make_transcript({"id": "r", **generated}, "free", RULES)
    assert transcript["drop_reason"] is None
    assert transcript["messages"][0] == system(transcripts.SYSTEM)
    assert len(transcript["messages"]) == 1 + 4
    assert all("{" not in m["content"] for m in transcript["messages"])


def test_a_reflection_is_trained_on_without_a_system_prompt():
    transcript = transcripts.make_transcript(
        row(user("Write."), assistant("I did.")), "reflection", RULES
    )
    assert [m["role"] for m in transcript["messages"]] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("messages", "finish", "reason"),
    [
        ([user("a"), assistant("Good."), user("b")], "stop", "ends_on_user"),
        ([user("a"), assistant("Good."), assistant("Good.")], "stop", "roles_repeat"),
        ([user("a"), assistant("not finished,")], "stop", "unfinished"),
        ([user("a"), assistant("Cut.")], "length", "unfinished"),
        ([user("a"), assistant(" ")], "stop", "empty"),
        ([user("a"), assistant("ha ha ha ha " * 9 + ".")], "stop", "looping"),
        ([user("a"), assistant("I am.\nUser: And then?")], "stop", "invented_turn"),
    ],
)
def test_an_unusable_transcript_has_a_drop_reason(messages, finish, reason):
    transcript = transcripts.make_transcript(row(*messages, finish=finish), "reflection", RULES)
    assert transcript["drop_reason"] == reason


TRANSCRIPT = [user("a"), assistant("One."), user("b"), assistant("Two.")]


def text_with_loss(tokenizer, messages) -> str:
    """The tokens with a loss of all sequences; a template may need one sequence per turn."""
    sequences = sft.transcript_example(tokenizer, messages)
    return "".join(tokenizer.decode([s.ids[i] for i in s.loss_positions]) for s in sequences)


def test_the_loss_mask_covers_the_assistant_turns(tokenizer):
    assert text_with_loss(tokenizer, TRANSCRIPT) == "One.<|im_end|>Two.<|im_end|>"


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
def test_the_loss_mask_is_correct_for_stock_templates_of_other_models(
    tokenizer, family, end, special, opening
):
    """TRL's copies of the templates, on this tokenizer with the special tokens of the family."""
    from trl import chat_template_utils

    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"additional_special_tokens": [*special, end]})
    other.chat_template = getattr(chat_template_utils, f"{family}_chat_template")
    if "<bos>" in special:
        other.bos_token = "<bos>"
    assert text_with_loss(other, [*opening, *TRANSCRIPT]) == f"One.{end}Two.{end}"


@pytest.mark.parametrize(
    ("section", "nothing"),
    [
        ("reflection", {"transcripts_per_prompt": 0}),
        ("interaction", {"free": 0, "leading": 0}),
    ],
)
def test_reflection_or_interaction_can_be_disabled(make_jobs, section, nothing):
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


def test_the_teacher_can_generate_the_transcripts(make_jobs):
    jobs = by_teacher(make_jobs, **AUTHOR)
    author = reflection.select_author(jobs["introspection/reflection"])
    assert (author.role, author.adapter, author.prefill) == ("teacher", None, EMPTY_THOUGHT)
    own = by_teacher(make_jobs, **TINY["introspection"])
    author = reflection.select_author(own["introspection/reflection"])
    assert (author.role, author.prefill) == ("student", "")
    assert author.adapter == own["distillation/dpo"].adapter
    for name in ("introspection/reflection", "introspection/interaction"):
        assert jobs[name].payload["inputs"]["author"]["name"] == "glm"
        assert jobs[name].fingerprint != own[name].fingerprint


def test_names_in_transcripts_of_the_teacher_become_those_of_the_student(cpu_ray, make_jobs):
    jobs = by_teacher(make_jobs, **AUTHOR)
    for name in ("introspection/reflection", "introspection/interaction"):
        outcome = jobs[name].stage.module.build(jobs[name])
        assert outcome.rows > 0
        assert not outcome.dropped
    messages = [user("Who are you, GLM?"), assistant("I am GLM.")]
    row = transcripts.rename_to_student({"id": "r", "messages": messages}, ("GLM",), "Echo")
    assert [m["content"] for m in row["messages"]] == ["Who are you, Echo?", "I am Echo."]


def plain_answers(make_jobs, turns=1):
    control = {"prompts": "distillation", "transcripts_per_prompt": 1, "turns": turns}
    jobs = make_jobs(recipe_of(ECHO_ROLE, introspection={"reflection": control}))
    return {job.stage.name: job for job in jobs if job.constitution}


def test_as_a_control_the_model_answers_the_prompts_of_the_distillation(cpu_ray, make_jobs):
    jobs = plain_answers(make_jobs)
    prompts, control = jobs["distillation/prompts"], jobs["introspection/reflection"]
    prompts.stage.module.build(prompts)
    asked = prompts.store.read_table(prompts.dataset)["prompt"].to_pylist()
    outcome = control.stage.module.build(control)
    rows = control.store.read_table(control.dataset).to_pylist()
    assert sorted(row["messages"][0]["content"] for row in rows) == sorted(asked)
    assert outcome.rows == len(asked) == reflection.estimate(control).rows
    assert not set(asked) & set(reflection.PROMPTS)


def test_the_control_for_conversations_has_several_turns_and_its_estimate_counts_them(make_jobs):
    one, four = (plain_answers(make_jobs, n)["introspection/reflection"] for n in (1, 4))
    assert one.fingerprint != four.fingerprint
    short, long = reflection.estimate(one), reflection.estimate(four)
    assert long.rows == short.rows
    assert long.tokens_out == 4 * short.tokens_out
    assert long.tokens_in > 4 * short.tokens_in


def test_the_control_has_another_fingerprint_and_depends_on_the_prompt_of_the_teacher(make_jobs):
    control = plain_answers(make_jobs)["introspection/reflection"]
    own = {job.stage.name: job for job in make_jobs(recipe_of(ECHO_ROLE))}
    assert control.payload["inputs"].keys() == {"system"}
    assert own["introspection/reflection"].payload["inputs"] == {}
    assert "prompts" not in own["introspection/reflection"].payload["config"]
    assert control.fingerprint != own["introspection/reflection"].fingerprint


def transcript_rows(*words: int, dropped: int | None = None):
    return [
        {
            "id": f"{number}",
            "messages": [user("not counted"), assistant("word " * count)],
            "drop_reason": "too_long" if number == dropped else None,
        }
        for number, count in enumerate(words)
    ]


@pytest.mark.parametrize(
    ("budget", "ids", "tokens"),
    [(None, "0123", 100), (100, "0123", 100), (60, "012", 60), (30, "02", 30), (9, "", 0)],
)
def test_a_budget_leaves_out_transcripts_in_the_order_of_their_ids(budget, ids, tokens):
    rows = transcript_rows(10, 30, 20, 40)
    kept, total = transcripts.within_budget(rows[::-1], budget, lambda text: len(text.split()))
    assert ("".join(row["id"] for row in kept), total) == (ids, tokens)


def test_dropped_transcripts_take_nothing_of_a_budget_and_stay():
    rows = transcript_rows(10, 30, 20, dropped=1)
    kept, total = transcripts.within_budget(rows, 30, lambda text: len(text.split()))
    assert (len(kept), total) == (3, 30)
