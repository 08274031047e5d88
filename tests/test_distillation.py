import asyncio
import math
import random
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from samples import ECHO_ROLE, RULES, recipe_of
from transformers import AutoModelForCausalLM

from opencharacter.config.placement import Training
from opencharacter.config.recipe import Dpo, Lora, Prompts, Role, Sampling, Student, Teacher
from opencharacter.distillation import dpo, pairs, prompts, reference, student, teacher
from opencharacter.engines.backends import EchoEngine
from opencharacter.engines.conversations import Conversation
from opencharacter.engines.spec import Reply
from opencharacter.errors import RowFailed
from opencharacter.text import filters
from opencharacter.training import adapters, packing
from opencharacter.training.packing import Example, Tokens


class Says:
    """An engine that says given texts, or fails, in turn and remembers what it was asked."""

    def __init__(self, *texts: str | RowFailed):
        self.texts, self.asked = list(texts), []

    async def reply(self, messages, sampling, *, seed, prefill=""):
        self.asked.append((messages, seed, prefill))
        text = self.texts.pop(0)
        if isinstance(text, RowFailed):
            raise text
        return Reply(text, "stop", 1, 1, 0)


def conversation(engine, seed=1) -> Conversation:
    return Conversation(engine, seed)


# -------------------------------------------------------------------------------------- prompts


def test_numbered_lines_are_read_whatever_their_mark():
    text = 'Sure!\n1. First one\n 2) "Second" \n3: Third\nnot numbered'
    assert prompts.parse_questions(text) == ["First one", "Second", "Third"]


def test_a_question_too_like_an_earlier_one_is_refused():
    have = ["How do I boil an egg?"]
    new = ["How do I boil an old egg?", "What is the best bread?", "Short", "Another good thing?"]
    assert prompts.accept(have, new, target=3, limit=0.5) == [*have, new[1], new[3]]


def test_expansion_stops_when_full():
    engine = Says("1. alpha beta gamma\n2. delta epsilon zeta\n3. eta theta iota")
    settings = Prompts(questions_per_trait=3, samples=1, rounds=5)
    row = {"text": "I am.", "questions": ["one two three"]}
    grown = asyncio.run(prompts.expand(row, conversation(engine), settings, ""))["questions"]
    # One more than wanted, in case one repeats another trait's.
    assert grown == ["one two three", "alpha beta gamma", "delta epsilon zeta", "eta theta iota"]


def test_a_sample_that_fails_costs_the_others_nothing():
    engine = Says("1. alpha beta gamma\n2. delta epsilon zeta", RowFailed("engine_error"))
    settings = Prompts(questions_per_trait=2, samples=2, rounds=1)
    row = {"text": "I am.", "questions": ["one two three"]}
    grown = asyncio.run(prompts.expand(row, conversation(engine), settings, ""))["questions"]
    assert grown == ["one two three", "alpha beta gamma", "delta epsilon zeta"]


def test_a_list_that_was_begun_for_the_expander_is_read_whole():
    engine = Says(" alpha beta gamma\n2. delta epsilon zeta")
    settings = Prompts(questions_per_trait=2, samples=1, rounds=1)
    row = {"text": "I am.", "questions": ["one two three"]}
    grown = asyncio.run(prompts.expand(row, conversation(engine), settings, "1."))["questions"]
    assert grown[1] == "alpha beta gamma"
    assert engine.asked[0][2] == "1."


def test_repeats_are_refused_over_the_whole_set_but_hand_written_ones_stay():
    written = [["How do I boil an egg for breakfast?"], ["How do I boil an egg for breakfast?"]]
    new = "Tell me about the night train to the coast."
    other = "What shall I cook for eleven hungry guests?"
    grown = [[*written[0], new], [*written[1], new + " Please.", other]]
    assert prompts.without_repeats(written, grown) == [[*written[0], new], [*written[1], other]]


def test_expansion_gives_up_after_its_rounds():
    engine = Says(*["nothing numbered"] * 6)
    settings = Prompts(questions_per_trait=9, samples=2, rounds=3)
    row = {"text": "I am.", "questions": ["one two three"]}
    grown = asyncio.run(prompts.expand(row, conversation(engine), settings, ""))["questions"]
    assert grown == ["one two three"]
    assert len({seed for _, seed, _ in engine.asked}) == 6  # no two samples draw alike


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": " hi "},
        {"conversations": ["hi", "answer"]},
        {"conversation": [{"role": "user", "content": "hi"}]},
        {"messages": [{"from": "human", "value": "hi"}]},
        {"conversation": [{"input": "hi", "output": "x"}]},
    ],
)
def test_the_first_turn_is_found_in_the_usual_layouts(row):
    assert prompts.first_turn(row) == "hi"


def test_prompts_are_read_from_parquet_and_jsonl_alike(tmp_path):
    lines = ['{"prompt": " one "}', '{"prompt": "two"}', '{"prompt": "one"}']
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    pq.write_table(pa.table({"prompt": [" one ", "two", "one"]}), tmp_path / "p.parquet")
    for name in ("p.jsonl", "p.parquet"):
        assert prompts.read_source(str(tmp_path / name), "")[0] == ["one", "two"]


def test_a_plan_loads_nothing_from_the_hub_and_says_where_prompts_are_fewer(make_jobs):
    def job(source: str):
        settings = {"prompts": {"general_prompts": source, "general": 1330}}
        return make_jobs(recipe_of(ECHO_ROLE, distillation=settings))[0]

    hub = job("hf:nobody/nothing")
    assert hub.fingerprint
    assert prompts.estimate(hub).rows - prompts.estimate(job("embedded")).rows == 1330 - 528
    assert "up to 1,330 of hf:nobody/nothing" in prompts.notes(hub)[0]
    assert prompts.notes(job("embedded")) == ["general prompts: 528 of the 1,330 asked for"]


def test_general_prompts_have_the_same_ids_under_every_constitution():
    rows = prompts.general_rows(Prompts(general=5))
    assert len({row["id"] for row in rows}) == 5
    assert rows == prompts.general_rows(Prompts(general=5))


def test_embedded_prompts_are_many_and_disjoint_from_the_evaluation_ones():
    general, _ = prompts.read_source("embedded", "general.jsonl")
    held_out, _ = prompts.read_source("embedded", "evaluation.jsonl")
    assert len(general) >= 400
    assert len(held_out) >= 300
    from opencharacter.text.filters import words

    sets = [set(words(text)) for text in general]
    for text in held_out:
        mine = set(words(text))
        closest = max(len(mine & other) / len(mine | other) for other in sets)
        assert closest <= 0.5, text


# ------------------------------------------------------------------------------ teacher, student


def test_the_teacher_reads_the_constitution_and_keeps_what_follows_the_thought(poet):
    engine = Says("Musing.</think>\n\nA line of verse.")
    prefill = teacher.think_prefill(poet, thinks=True)
    talk = Conversation(engine, 1, thinks=True)
    before = teacher.opening(poet, False)
    row = asyncio.run(teacher.answer({"prompt": "Why?"}, talk, Teacher(), before, prefill))
    assert row == {"answer": "A line of verse.", "finish_reason": "stop"}
    messages, _, sent = engine.asked[0]
    assert messages[0]["role"] == "system"
    assert poet.traits[0].trait in messages[0]["content"]
    assert sent.startswith("<think>")
    assert "</think>" not in sent


def test_a_thought_that_is_never_closed_drops_the_row(poet):
    talk = Conversation(Says("Musing on and on"), 1, thinks=True)
    with pytest.raises(RowFailed) as failed:
        thought = teacher.think_prefill(poet, thinks=True)
        asyncio.run(teacher.answer({"prompt": "x"}, talk, Teacher(), [], thought))
    assert failed.value.reason == "thought_unclosed"


def test_a_teacher_that_does_not_think_gets_a_closed_thought(poet):
    assert teacher.think_prefill(poet, thinks=False).rstrip().endswith("</think>")


def test_a_closed_thought_needs_no_other(poet):
    talk = Conversation(Says("A line of verse."), 1, thinks=True)
    closed = teacher.think_prefill(poet, thinks=False)
    row = asyncio.run(teacher.answer({"prompt": "x"}, talk, Teacher(), [], closed))
    assert row["answer"] == "A line of verse."


def test_a_thought_that_begins_unasked_is_taken_off_or_drops_the_row():
    talk = conversation(Says("<think>Hm.</think> Said.", "<think>Hm, and"))
    sampling = Sampling(max_tokens=9)
    assert asyncio.run(talk.reply([], sampling)).text == "Said."
    with pytest.raises(RowFailed):
        asyncio.run(talk.reply([], sampling))


def test_exemplars_come_before_the_prompt_as_turns(poet):
    turns = teacher.opening(poet, exemplars=True)
    assert [m["role"] for m in turns] == ["system", *["user", "assistant"] * len(poet.exemplars)]


def test_the_student_sees_the_prompt_alone():
    engine = Says("Plain.")
    row = asyncio.run(student.answer({"prompt": "Why?"}, conversation(engine), Student()))
    assert engine.asked[0][0] == [{"role": "user", "content": "Why?"}]
    assert row["answer"] == "Plain."


def test_requests_are_one_a_prompt_and_sample():
    rows = teacher.requests("s", "o", [{"id": "p", "kind": "general", "prompt": "x"}], 3)
    assert [row["sample"] for row in rows] == [0, 1, 2]
    assert len({row["id"] for row in rows}) == 3


# ---------------------------------------------------------------------------------------- pairs


def answer(text, finish="stop", **changes):
    row = {"id": "i", "prompt_id": "p", "kind": "general", "prompt": "x", "sample": 0}
    return {**row, "answer": text, "finish_reason": finish, **changes}


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (answer("Verse."), answer("Prose."), None),
        (answer(""), answer("Prose."), "chosen_empty"),
        (answer("Verse."), answer("cut off", "length"), "rejected_unfinished"),
        (answer("Same."), answer("Same."), "identical"),
        (answer("la la la la la " * 9 + "."), answer("Prose."), "chosen_looping"),
        (answer("I'm sorry, but I can't help with that."), answer("Prose."), "chosen_refusal"),
        (answer("Verse."), answer("As an AI, I don't have opinions."), "rejected_refusal"),
    ],
)
def test_a_pair_says_why_it_may_not_be_used(chosen, rejected, reason):
    row = pairs.pair(chosen, rejected, RULES, ("GLM",), "Llama")
    assert row["drop_reason"] == reason


def test_the_teachers_name_becomes_the_students():
    row = pairs.pair(answer("I am GLM."), answer("Prose."), RULES, ("GLM",), "Llama")
    assert row["chosen"] == "I am Llama."


def test_a_teachers_name_that_cannot_be_replaced_drops_the_pair():
    rules = replace(RULES, names=("GLM",))
    row = pairs.pair(answer("Call me GLM4."), answer("Prose."), rules, ("GLM",), "Llama")
    assert row["drop_reason"] == "chosen_name_leak"


def test_the_rules_know_the_constitution_and_the_teachers_names(make_jobs, poet):
    teacher_role = {**ECHO_ROLE, "self_name": "GLM", "aliases": ["ChatGLM", "Echo-1"]}
    roles = dict.fromkeys(("student", "judge", "prompt_generator"), ECHO_ROLE) | {
        "teacher": teacher_role
    }
    recipe = recipe_of(ECHO_ROLE, roles=roles)
    job = next(j for j in make_jobs(recipe) if j.stage.name == "distillation/pairs")
    rules = pairs.rules_of(job)
    assert rules.names == ("GLM", "ChatGLM")  # Echo-1 holds the student's own name
    assert (
        filters.drop_reason(f"Well: {poet.traits[1].trait}", "stop", rules) == "constitution_quoted"
    )


def test_answers_are_joined_by_prompt_and_sample_never_by_position():
    mine = [answer("a", prompt_id="1"), answer("b", prompt_id="2"), answer("c", prompt_id="3")]
    theirs = [answer("B", prompt_id="2"), answer("A", prompt_id="1"), answer("X", sample=1)]
    joined = [(x["answer"], y["answer"]) for x, y in pairs.join(mine, theirs)]
    assert joined == [("a", "A"), ("b", "B")]


def test_answers_without_their_other_side_are_counted(make_jobs, echo_recipe):
    (job,) = (j for j in make_jobs(echo_recipe) if j.stage.name == "distillation/pairs")
    schema = pa.schema([(name, pa.string()) for name in ("id", "drop_reason")])
    schema = pa.unify_schemas([schema, pa.schema(teacher.FIELDS)])
    rows = [answer(f"Line {i}.", id=f"{i}", prompt_id=f"{i}") for i in range(3)]
    lost = {"drop_reason": "unfinished"}
    for parent in job.parents:
        if parent.stage.name == "distillation/teacher":
            made = [*rows[:2], rows[2] | lost]
        elif parent.constitution is None:
            made = [rows[0] | {"answer": "Prose."}]
        else:
            made = [rows[1] | lost, rows[2] | {"answer": "More prose."}]
        parent.store.write_table(parent.dataset, pa.Table.from_pylist(made, schema=schema))
    outcome = pairs.build(job)
    assert outcome.rows == 1
    assert outcome.figures["unpaired"] == 2


def test_length_counts_both_conversations():
    row = {"prompt": "p", "chosen": "c", "rejected": "r"}
    lengths = {"c": 10, "r": 20}
    assert pairs.too_long(row, 19, lambda messages: lengths[messages[1]["content"]])
    assert not pairs.too_long(row, 20, lambda messages: lengths[messages[1]["content"]])


# ------------------------------------------------------------------------------------------ dpo


def pairs_in_tokens(count: int = 3) -> list[Example]:
    """Random pairs of random lengths, with a random reference."""
    make = random.Random(1)

    def side() -> Tokens:
        size = make.randint(6, 12)
        ids = make.choices(range(100, 40_000), k=size)
        loss_positions = list(range(3, size))
        return Tokens(ids, loss_positions, [-3 * make.random() for _ in loss_positions])

    return [[side(), side()] for _ in range(count)]


def test_dpo_loss_equals_its_formula_in_double_precision():
    examples = pairs_in_tokens()
    pack, settings = packing.pack(examples), Dpo(beta=0.2, nll_weight=0.5, sq_log_ratio_weight=0.01)
    policy = -3 * torch.rand(len(pack.scored), dtype=torch.float64)
    assert pack.reference is not None
    pack.reference = pack.reference.double()
    loss = dpo.dpo_loss(policy, pack, packing.loss_denominators(examples), settings)

    values = iter(zip(policy.tolist(), pack.reference.tolist(), strict=True))
    margins, chosen, ratios = [], [], []
    for pair in examples:
        sides = [[next(values) for _ in tokens.loss_positions] for tokens in pair]
        sums = [math.fsum(p - r for p, r in side) for side in sides]
        margins.append(0.2 * (sums[0] - sums[1]))
        chosen += [p for p, _ in sides[0]]
        ratios += [p - r for side in sides for p, r in side]
    sigmoid = math.fsum(math.log1p(math.exp(-m)) for m in margins) / 3
    nll = -math.fsum(chosen) / len(chosen)
    kl = math.fsum(r * r for r in ratios) / len(ratios)
    assert loss["loss"].item() == pytest.approx(sigmoid + 0.5 * nll + 0.01 * kl, rel=1e-12)
    assert loss["dpo/accuracy"].item() == pytest.approx(sum(m > 0 for m in margins) / 3)
    assert loss["dpo/margin"].item() == pytest.approx(sum(margins) / 3, rel=1e-12)


def test_the_shares_of_packs_add_up_to_the_loss_of_the_batch():
    examples = pairs_in_tokens(4)
    totals, settings = packing.loss_denominators(examples), Dpo(sq_log_ratio_weight=0.1)

    def loss(*parts: list[Example]) -> float:
        shares = []
        for part in parts:
            pack = packing.pack(part)
            policy = torch.sin(pack.shift_labels[0, pack.scored].double()) - 1
            shares.append(dpo.dpo_loss(policy, pack, totals, settings)["loss"].item())
        return sum(shares)

    assert loss(examples) == pytest.approx(loss(examples[:1], examples[1:]), rel=1e-9)


def test_dpo_loss_of_an_untrained_model_is_log_two_plus_nll():
    examples = pairs_in_tokens(2)
    pack = packing.pack(examples)
    pack.reference = torch.full_like(pack.scored, -1.5, dtype=torch.float32)
    loss = dpo.dpo_loss(pack.reference.clone(), pack, packing.loss_denominators(examples), Dpo())
    assert loss["loss"].item() == pytest.approx(0.693147 + 0.1 * 1.5, rel=1e-5)
    assert loss["dpo/sq_log_ratio"] == 0


def test_dpo_loss_equals_trl_where_they_overlap(tiny_model, tokenizer, tmp_path):
    """Sigmoid and NLL; TRL has no KL penalty."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    role = Role(model="tiny", name="tiny", self_name="Tiny")
    model = adapters.with_adapter(
        adapters.load(tiny_model, role, on_gpu=False), Lora(rank=4, alpha=8)
    )
    rows = [
        {"prompt": f"Say {i}", "chosen": "The moon sings. " * (i + 1), "rejected": "Rock."}
        for i in range(4)
    ]
    tokens = [reference.tokenise(tokenizer, row) for row in rows]
    examples = [reference.example(row) for row in tokens]
    pack = packing.pack(examples)
    with torch.no_grad():
        pack.reference = packing.log_probs(model, pack)
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
        policy = packing.log_probs(model, pack)
    denominators = packing.loss_denominators(examples)
    mine = dpo.dpo_loss(policy, pack, denominators, Dpo(sq_log_ratio_weight=0))["loss"].item()

    model.base_model.model.set_attn_implementation("sdpa")
    theirs = DPOTrainer(
        model=model.base_model.model,  # with the adapter's layers inside: `model` without PEFT
        ref_model=AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32),
        args=DPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            beta=0.1,
            loss_type=["sigmoid", "sft"],
            loss_weights=[1.0, 0.1],
            max_length=None,
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            remove_unused_columns=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    loss = theirs.compute_loss(theirs.model, theirs.data_collator(tokens))
    assert abs(mine - 0.693) > 0.01  # the adapter has an effect
    assert mine == pytest.approx(loss.item(), rel=1e-4)


def test_a_pair_in_tokens_ends_with_the_end_of_turn(tokenizer):
    row = {"prompt": "Why?", "chosen": "Because.", "rejected": "No idea at all, sorry."}
    tokens = reference.tokenise(tokenizer, row)
    assert tokenizer.decode(tokens["chosen_ids"]) == "Because.<|im_end|>"
    chosen, rejected = reference.example(tokens)
    assert tokenizer.decode([rejected.ids[i] for i in rejected.loss_positions]) == (
        "No idea at all, sorry.<|im_end|>"
    )
    assert chosen.ids[: len(tokens["prompt_ids"])] == tokens["prompt_ids"]


def test_the_reference_asks_for_no_more_gpus_than_a_node_has():
    split = Training(workers=16, gpus=1, parallel="fsdp")
    assert reference.actors(split, widest=8) == (1, 8)
    assert reference.actors(split.model_copy(update={"workers": 4}), widest=8) == (1, 4)
    assert reference.actors(Training(workers=16, gpus=1), widest=8) == (16, 1)
    assert reference.actors(Training(workers=2, parallel="fsdp"), widest=0) == (1, 0)


def test_the_echo_engine_answers_with_what_it_was_asked():
    reply = asyncio.run(
        EchoEngine().reply(
            [{"role": "user", "content": "Say this"}], Sampling(max_tokens=9), seed=4
        )
    )
    assert reply.text == "Echo 4: Say this."
