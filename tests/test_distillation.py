import asyncio
import json
import math
import random
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from samples import ECHO_ROLE, RULES, recipe_of
from transformers import AutoModelForCausalLM

from opencharacter.config.placement import Placement, Training
from opencharacter.config.recipe import Dpo, Lora, Prompts, Student, Teacher
from opencharacter.config.roles import Role, Sampling
from opencharacter.distillation import dpo, pairs, prompts, reference, sources, student, teacher
from opencharacter.engines.backends import EchoEngine
from opencharacter.engines.conversations import Conversation
from opencharacter.engines.spec import Reply
from opencharacter.errors import RowFailed, UserError
from opencharacter.text import filters
from opencharacter.training import adapters, packing
from opencharacter.training.packing import Example, Tokens


class ScriptedEngine:
    """An engine that returns given texts, or raises given errors, in turn and records its calls."""

    def __init__(self, *texts: str | RowFailed):
        self.texts, self.calls = list(texts), []

    async def reply(self, messages, sampling, *, seed, prefill=""):
        self.calls.append((messages, seed, prefill))
        text = self.texts.pop(0)
        if isinstance(text, RowFailed):
            raise text
        return Reply(text, "stop", 1, 1, 0)


def conversation(engine, seed=1) -> Conversation:
    return Conversation(engine, seed)


def expanded(engine, config: Prompts, prefill: str = "") -> list[str]:
    """The questions of a trait that had one, after its expansion."""
    row = {"text": "I am.", "questions": ["one two three"]}
    result = prompts.expand_questions(row, conversation(engine), config, prefill)
    return asyncio.run(result)["questions"]


# -------------------------------------------------------------------------------------- prompts


def test_numbered_lines_are_parsed_with_any_list_marker():
    text = 'Sure!\n1. First one\n 2) "Second" \n3: Third\nnot numbered'
    assert prompts.parse_questions(text) == ["First one", "Second", "Third"]


def test_a_near_duplicate_question_is_rejected():
    have = ["How do I boil an egg?"]
    new = ["How do I boil an old egg?", "What is the best bread?", "Short", "Another good thing?"]
    assert prompts.add_new_questions(have, new, target=3, max_overlap=0.5) == [
        *have,
        new[1],
        new[3],
    ]


def test_expansion_stops_at_its_target():
    engine = ScriptedEngine("1. alpha beta gamma\n2. delta epsilon zeta\n3. eta theta iota")
    config = Prompts(questions_per_trait=3, samples=1, rounds=5)
    questions = expanded(engine, config)
    # One more than the target, in case one repeats another trait's question.
    assert questions == [
        "one two three",
        "alpha beta gamma",
        "delta epsilon zeta",
        "eta theta iota",
    ]


def test_a_failed_sample_does_not_affect_the_others():
    engine = ScriptedEngine("1. alpha beta gamma\n2. delta epsilon zeta", RowFailed("engine_error"))
    config = Prompts(questions_per_trait=2, samples=2, rounds=1)
    questions = expanded(engine, config)
    assert questions == ["one two three", "alpha beta gamma", "delta epsilon zeta"]


def test_the_prefilled_start_of_a_list_is_parsed_with_its_continuation():
    engine = ScriptedEngine(" alpha beta gamma\n2. delta epsilon zeta")
    config = Prompts(questions_per_trait=2, samples=1, rounds=1)
    questions = expanded(engine, config, prefill="1.")
    assert questions[1] == "alpha beta gamma"
    assert engine.calls[0][2] == "1."


def test_generated_duplicates_are_rejected_across_traits_and_handwritten_questions_stay():
    written = [["How do I boil an egg for breakfast?"], ["How do I boil an egg for breakfast?"]]
    new = "Tell me about the night train to the coast."
    other = "What shall I cook for eleven hungry guests?"
    expanded = [[*written[0], new], [*written[1], new + " Please.", other]]
    assert prompts.drop_repeated(written, expanded) == [[*written[0], new], [*written[1], other]]


def test_expansion_stops_after_its_maximum_rounds():
    engine = ScriptedEngine(*["nothing numbered"] * 6)
    config = Prompts(questions_per_trait=9, samples=2, rounds=3)
    questions = expanded(engine, config)
    assert questions == ["one two three"]
    assert len({seed for _, seed, _ in engine.calls}) == 6  # every sample has its own seed


IMAGE = {"type": "image_url", "image_url": {"url": "x"}}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": " hi "},
        {"prompt": None, "messages": [{"role": "user", "content": "hi"}]},
        {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]},
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]},
        {"messages": [{"role": "user", "content": ["hi"]}]},
        {"conversations": ["hi", "answer"]},
        {"conversations": [{"from": "system", "value": "s"}, {"from": "Human", "value": "hi"}]},
        {"conversation": [{"role": "user", "content": "hi"}]},
        {"conversation": [{"input": "hi", "output": "x"}]},
    ],
)
def test_the_first_user_turn_is_read_from_common_dataset_layouts(row):
    assert sources.first_user_turn(row) == "hi"


@pytest.mark.parametrize(
    "row",
    [
        {"text": "hi"},
        {"prompt": 3},
        {"prompt": []},
        {"messages": [{"role": "system", "content": "s"}]},
        {"messages": [{"role": "assistant", "content": "hello"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}, IMAGE]}]},
        {"messages": [{"role": "user", "content": ""}, {"role": "user", "content": "later"}]},
    ],
)
def test_a_row_without_a_user_turn_in_text_has_no_prompt(row):
    assert sources.first_user_turn(row) == ""


def test_prompts_are_read_from_parquet_and_jsonl(tmp_path):
    lines = ['{"prompt": " one "}', '{"prompt": "two"}', '{"prompt": "one"}']
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    pq.write_table(pa.table({"prompt": [" one ", "two", "one"]}), tmp_path / "p.parquet")
    for name in ("p.jsonl", "p.parquet"):
        assert sources.read_source(str(tmp_path / name), "").prompts == ["one", "two"]


def prompt_file(folder, *lines):
    (folder / "p.jsonl").write_bytes(b"\n".join(line.encode() for line in lines))
    return str(folder / "p.jsonl")


def test_lines_of_a_prompt_file_end_only_at_a_line_feed(tmp_path):
    texts = ["one\u2028two", "one\x85two", "one\x0btwo"]
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts[:2]]
    lines.append(json.dumps({"prompt": texts[2]}) + "\r")
    assert sources.read_source(prompt_file(tmp_path, *lines), "").prompts == texts


def test_a_file_of_prompts_may_be_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    prompt_file(tmp_path, '{"prompt": "one"}')
    assert sources.read_source("~/p.jsonl", "").prompts == ["one"]


def test_rows_without_a_prompt_are_skipped_and_counted(tmp_path, make_jobs):
    file = prompt_file(tmp_path, '{"prompt": "one"}', '{"text": "x"}', "3", "", '{"prompt": " "}')
    source = sources.read_source(file, "")
    assert (source.prompts, source.skipped) == (["one"], 3)
    settings = {"prompts": {"general_prompts": file, "general": 1, "questions_per_trait": 1}}
    job = make_jobs(recipe_of(ECHO_ROLE, distillation=settings))[0]
    assert prompts.notes(job) == [f"general prompts: {file} has 3 rows without a prompt (skipped)"]
    assert prompts.build(job).figures["skipped_rows"] == 3


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        (['{"text": "x", "label": 1}'], r"none of the 1 rows .*fields: 'text', 'label'"),
        ([""], "contains no rows"),
        (['{"prompt": "one"}', '{"prompt": "half \\ud83d"}'], "line 2: .*lone surrogate"),
        (['{"prompt": "one"}', "", "{"], "line 3: not valid JSON"),
    ],
)
def test_an_unusable_prompt_file_is_refused_at_plan(lines, error, tmp_path, make_jobs):
    settings = {"prompts": {"general_prompts": prompt_file(tmp_path, *lines)}}
    with pytest.raises(UserError, match=error):
        _ = make_jobs(recipe_of(ECHO_ROLE, distillation=settings))[0].fingerprint


def test_a_prompt_file_that_is_not_text_is_refused_with_its_line(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b'{"prompt": "one"}\n{"prompt": "\xff"}\n')
    with pytest.raises(UserError, match="line 2: not valid UTF-8"):
        sources.read_source(str(tmp_path / "p.jsonl"), "")


def test_a_dataset_of_the_hub_gives_its_first_user_turns(monkeypatch):
    rows = [
        {"prompt": [{"role": "user", "content": "one"}], "chosen": []},
        {"prompt": [{"role": "system", "content": "s"}], "chosen": []},
    ]
    monkeypatch.setattr(sources, "load_hub_rows", lambda name: rows)
    source = sources.read_source("hf:a/b", "")
    assert (source.prompts, source.skipped) == (["one"], 1)
    monkeypatch.setattr(sources, "load_hub_rows", lambda name: [{"text": "one"}])
    with pytest.raises(UserError, match=r"hf:a/b: none of the 1 rows .*'text'"):
        sources.read_source("hf:a/b", "")


def test_a_plan_downloads_nothing_and_reports_missing_prompts(make_jobs):
    def job(source: str):
        settings = {"prompts": {"general_prompts": source, "general": 1330}}
        return make_jobs(recipe_of(ECHO_ROLE, distillation=settings))[0]

    hub = job("hf:nobody/nothing")
    assert hub.fingerprint
    assert prompts.estimate(hub).rows - prompts.estimate(job("embedded")).rows == 1330 - 528
    assert "up to 1,330 from hf:nobody/nothing" in prompts.notes(hub)[0]
    assert prompts.notes(job("embedded")) == [
        "general prompts: embedded has only 528 of the 1,330 requested"
    ]


def test_general_prompts_have_the_same_ids_for_every_constitution():
    rows = prompts.general_rows(Prompts(general=5))
    assert len({row["id"] for row in rows}) == 5
    assert rows == prompts.general_rows(Prompts(general=5))


def test_packaged_training_and_evaluation_prompts_are_disjoint():
    general = sources.read_source("embedded", "general.jsonl").prompts
    held_out = sources.read_source("embedded", "evaluation.jsonl").prompts
    assert len(general) >= 400
    assert len(held_out) >= 300
    from opencharacter.text.filters import words

    sets = [set(words(text)) for text in general]
    for text in held_out:
        mine = set(words(text))
        closest = max(len(mine & other) / len(mine | other) for other in sets)
        assert closest <= 0.5, text


# ------------------------------------------------------------------------------ teacher, student


def teacher_answer(engine, prefill, context=()):
    """Run the teacher's row function with a model that thinks."""
    replies = Conversation(engine, 1, thinks=True)
    row = {"prompt": "Why?"}
    result = teacher.answer_in_character(row, replies, Teacher(), list(context), prefill)
    return asyncio.run(result)


def test_the_teacher_sees_the_constitution_and_its_thinking_is_removed(poet):
    engine = ScriptedEngine("Musing.</think>\n\nA line of verse.")
    prefill = teacher.think_prefill(poet, thinks=True)
    row = teacher_answer(engine, prefill, teacher.context_messages(poet, False))
    assert row == {"answer": "A line of verse.", "finish_reason": "stop"}
    messages, _, sent = engine.calls[0]
    assert messages[0]["role"] == "system"
    assert poet.traits[0].trait in messages[0]["content"]
    assert sent.startswith("<think>")
    assert "</think>" not in sent


def test_unclosed_thinking_drops_the_row(poet):
    with pytest.raises(RowFailed) as failed:
        prefill = teacher.think_prefill(poet, thinks=True)
        teacher_answer(ScriptedEngine("Musing on and on"), prefill)
    assert failed.value.reason == "thought_unclosed"


def test_a_teacher_without_thinking_gets_a_closed_think_block(poet):
    assert teacher.think_prefill(poet, thinks=False).rstrip().endswith("</think>")


def test_a_closed_think_block_is_not_closed_again(poet):
    prefill = teacher.think_prefill(poet, thinks=False)
    row = teacher_answer(ScriptedEngine("A line of verse."), prefill)
    assert row["answer"] == "A line of verse."


def test_an_unrequested_think_block_is_removed_or_drops_the_row():
    replies = conversation(ScriptedEngine("<think>Hm.</think> Said.", "<think>Hm, and"))
    sampling = Sampling(max_tokens=9)
    assert asyncio.run(replies.reply([], sampling)).text == "Said."
    with pytest.raises(RowFailed):
        asyncio.run(replies.reply([], sampling))


def test_exemplars_are_turns_before_the_prompt(poet):
    turns = teacher.context_messages(poet, exemplars=True)
    assert [m["role"] for m in turns] == ["system", *["user", "assistant"] * len(poet.exemplars)]


def test_the_student_sees_only_the_prompt():
    engine = ScriptedEngine("Plain.")
    row = asyncio.run(student.answer_prompt({"prompt": "Why?"}, conversation(engine), Student()))
    assert engine.calls[0][0] == [{"role": "user", "content": "Why?"}]
    assert row["answer"] == "Plain."


def test_each_prompt_and_sample_is_one_request():
    rows = teacher.make_requests("s", "o", [{"id": "p", "kind": "general", "prompt": "x"}], 3)
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
def test_an_unusable_pair_has_a_drop_reason(chosen, rejected, reason):
    row = pairs.make_pair(chosen, rejected, RULES, ("GLM",), "Llama")
    assert row["drop_reason"] == reason


def test_the_name_of_the_teacher_is_replaced_by_that_of_the_student():
    row = pairs.make_pair(answer("I am GLM."), answer("Prose."), RULES, ("GLM",), "Llama")
    assert row["chosen"] == "I am Llama."


def test_a_teacher_name_that_cannot_be_replaced_drops_the_pair():
    rules = replace(RULES, names=("GLM",))
    row = pairs.make_pair(answer("Call me GLM4."), answer("Prose."), rules, ("GLM",), "Llama")
    assert row["drop_reason"] == "chosen_name_leak"


def test_the_filter_rules_include_the_constitution_and_the_teacher_names(make_jobs, poet):
    teacher_role = {**ECHO_ROLE, "self_name": "GLM", "aliases": ["ChatGLM", "Echo-1"]}
    roles = dict.fromkeys(("student", "judge", "prompt_generator"), ECHO_ROLE) | {
        "teacher": teacher_role
    }
    recipe = recipe_of(ECHO_ROLE, roles=roles)
    job = next(j for j in make_jobs(recipe) if j.stage.name == "distillation/pairs")
    rules = pairs.answer_rules(job)
    assert rules.names == ("GLM", "ChatGLM")  # Echo-1 contains the student's own name
    assert (
        filters.drop_reason(f"Well: {poet.traits[1].trait}", "stop", rules) == "constitution_quoted"
    )


def test_answers_are_joined_by_prompt_and_sample_and_not_by_position():
    chosen = [answer("a", prompt_id="1"), answer("b", prompt_id="2"), answer("c", prompt_id="3")]
    rejected = [answer("B", prompt_id="2"), answer("A", prompt_id="1"), answer("X", sample=1)]
    matches = [(x["answer"], y["answer"]) for x, y in pairs.match_answers(chosen, rejected)]
    assert matches == [("a", "A"), ("b", "B")]


def test_answers_without_a_counterpart_are_counted(make_jobs, echo_recipe):
    (job,) = (j for j in make_jobs(echo_recipe) if j.stage.name == "distillation/pairs")
    schema = pa.schema([(name, pa.string()) for name in ("id", "drop_reason")])
    schema = pa.unify_schemas([schema, pa.schema(teacher.FIELDS)])
    rows = [answer(f"Line {i}.", id=f"{i}", prompt_id=f"{i}") for i in range(3)]
    dropped = {"drop_reason": "unfinished"}
    for parent in job.parents:
        if parent.stage.name == "distillation/teacher":
            answers = [*rows[:2], rows[2] | dropped]
        elif parent.constitution is None:
            answers = [rows[0] | {"answer": "Prose."}]
        else:
            answers = [rows[1] | dropped, rows[2] | {"answer": "More prose."}]
        parent.store.write_table(parent.dataset, pa.Table.from_pylist(answers, schema=schema))
    outcome = pairs.build(job)
    assert outcome.rows == 1
    assert outcome.figures["unpaired"] == 2


def test_pair_length_counts_both_conversations():
    row = {"prompt": "p", "chosen": "c", "rejected": "r"}
    lengths = {"c": 10, "r": 20}
    assert pairs.exceeds_max_tokens(row, 19, lambda messages: lengths[messages[1]["content"]])
    assert not pairs.exceeds_max_tokens(row, 20, lambda messages: lengths[messages[1]["content"]])


# ------------------------------------------------------------------------------------------ dpo


def pairs_in_tokens(count: int = 3) -> list[Example]:
    """Random pairs of random lengths, with a random reference."""
    rng = random.Random(1)

    def side() -> Tokens:
        size = rng.randint(6, 12)
        ids = rng.choices(range(100, 40_000), k=size)
        loss_positions = list(range(3, size))
        return Tokens(ids, loss_positions, [-3 * rng.random() for _ in loss_positions])

    return [[side(), side()] for _ in range(count)]


def test_dpo_loss_equals_its_formula_in_double_precision():
    examples = pairs_in_tokens()
    pack, config = packing.pack(examples), Dpo(beta=0.2, nll_weight=0.5, sq_log_ratio_weight=0.01)
    policy = -3 * torch.rand(len(pack.scored_positions), dtype=torch.float64)
    assert pack.reference is not None
    pack.reference = pack.reference.double()
    loss = dpo.dpo_loss(policy, pack, packing.loss_denominators(examples), config)

    values = iter(zip(policy.tolist(), pack.reference.tolist(), strict=True))
    rewards, chosen, log_ratios = [], [], []
    for pair in examples:
        sides = [[next(values) for _ in tokens.loss_positions] for tokens in pair]
        rewards.append([0.2 * math.fsum(p - r for p, r in side) for side in sides])
        chosen += [p for p, _ in sides[0]]
        log_ratios += [p - r for side in sides for p, r in side]
    margins = [reward[0] - reward[1] for reward in rewards]
    sigmoid = math.fsum(math.log1p(math.exp(-m)) for m in margins) / 3
    nll = -math.fsum(chosen) / len(chosen)
    sq_log_ratio = math.fsum(r * r for r in log_ratios) / len(log_ratios)
    expected = sigmoid + 0.5 * nll + 0.01 * sq_log_ratio
    assert loss["loss"].item() == pytest.approx(expected, rel=1e-12)
    assert loss["dpo/accuracy"].item() == pytest.approx(sum(m > 0 for m in margins) / 3)
    assert loss["dpo/margin"].item() == pytest.approx(sum(margins) / 3, rel=1e-12)
    for side, name in enumerate(("rewards/chosen", "rewards/rejected")):
        mean = sum(reward[side] for reward in rewards) / 3
        assert loss[name].item() == pytest.approx(mean, rel=1e-12)


def test_the_losses_of_packs_sum_to_the_loss_of_the_batch():
    examples = pairs_in_tokens(4)
    denominators, config = packing.loss_denominators(examples), Dpo(sq_log_ratio_weight=0.1)

    def loss(*parts: list[Example]) -> float:
        shares = []
        for part in parts:
            pack = packing.pack(part)
            policy = torch.sin(pack.shift_labels[0, pack.scored_positions].double()) - 1
            shares.append(dpo.dpo_loss(policy, pack, denominators, config)["loss"].item())
        return sum(shares)

    assert loss(examples) == pytest.approx(loss(examples[:1], examples[1:]), rel=1e-9)


def test_dpo_loss_of_an_untrained_model_is_log_two_plus_nll():
    examples = pairs_in_tokens(2)
    pack = packing.pack(examples)
    pack.reference = torch.full_like(pack.scored_positions, -1.5, dtype=torch.float32)
    loss = dpo.dpo_loss(pack.reference.clone(), pack, packing.loss_denominators(examples), Dpo())
    assert loss["loss"].item() == pytest.approx(0.693147 + 0.1 * 1.5, rel=1e-5)
    assert loss["dpo/sq_log_ratio"] == 0


def test_dpo_loss_and_rewards_equal_those_of_trl(tiny_model, tokenizer, tmp_path):
    """The sigmoid and NLL terms and the rewards; TRL has no penalty on the squared log-ratio."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    role = Role(model="tiny", name="tiny", self_name="Tiny")
    model = adapters.add_lora(adapters.load(tiny_model, role, on_gpu=False), Lora(rank=4, alpha=8))
    rows = [
        {"prompt": f"Say {i}", "chosen": "The moon sings. " * (i + 1), "rejected": "Rock."}
        for i in range(4)
    ]
    tokens = [reference.tokenize(tokenizer, row) for row in rows]
    examples = [reference.pair_example(row) for row in tokens]
    pack = packing.pack(examples)
    with torch.no_grad():
        pack.reference = packing.log_probs(model, pack)
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
        policy = packing.log_probs(model, pack)
    denominators = packing.loss_denominators(examples)
    metrics = dpo.dpo_loss(policy, pack, denominators, Dpo(sq_log_ratio_weight=0))

    model.base_model.model.set_attn_implementation("sdpa")
    trl_trainer = DPOTrainer(
        model=model.base_model.model,  # contains the adapter's layers but is no PEFT model
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
    trl_loss = trl_trainer.compute_loss(trl_trainer.model, trl_trainer.data_collator(tokens))
    loss = metrics["loss"].item()
    assert abs(loss - 0.693) > 0.01  # the adapter has an effect
    assert loss == pytest.approx(trl_loss.item(), rel=1e-4)
    mode = "train" if trl_trainer.model.training else "eval"
    trl_metrics: dict[str, list[float]] = trl_trainer._metrics[mode]
    assert trl_metrics["rewards/chosen"][0] != 0
    for name in ("rewards/chosen", "rewards/rejected"):
        assert metrics[name].item() == pytest.approx(trl_metrics[name][0], rel=1e-3, abs=1e-5)
    margin = trl_metrics["rewards/margins"][0]
    assert metrics["dpo/margin"].item() == pytest.approx(margin, rel=1e-3, abs=1e-5)
    assert metrics["dpo/accuracy"].item() == trl_metrics["rewards/accuracies"][0]


def test_a_tokenized_pair_ends_with_the_end_of_turn_token(tokenizer):
    row = {"prompt": "Why?", "chosen": "Because.", "rejected": "No idea at all, sorry."}
    tokens = reference.tokenize(tokenizer, row)
    assert tokenizer.decode(tokens["chosen_ids"]) == "Because.<|im_end|>"
    chosen, rejected = reference.pair_example(tokens)
    assert tokenizer.decode([rejected.ids[i] for i in rejected.loss_positions]) == (
        "No idea at all, sorry.<|im_end|>"
    )
    assert chosen.ids[: len(tokens["prompt_ids"])] == tokens["prompt_ids"]


def test_the_reference_requests_no_more_gpus_than_a_node_has():
    fsdp = Training(workers=16, gpus=1, strategy="fsdp")
    assert reference.actor_layout(fsdp, max_gpus_per_node=8) == (1, 8)
    assert reference.actor_layout(fsdp.model_copy(update={"workers": 4}), max_gpus_per_node=8) == (
        1,
        4,
    )
    assert reference.actor_layout(Training(workers=16, gpus=1), max_gpus_per_node=8) == (16, 1)
    assert reference.actor_layout(Training(workers=2, strategy="fsdp"), max_gpus_per_node=0) == (
        1,
        0,
    )


def test_the_echo_engine_repeats_its_prompt():
    reply = asyncio.run(
        EchoEngine().reply(
            [{"role": "user", "content": "Say this"}], Sampling(max_tokens=9), seed=4
        )
    )
    assert reply.text == "Echo 4: Say this."


class BlockSize:
    """Takes the place of the reference model; returns the size of each block."""

    def __init__(self, *_):
        pass

    def __call__(self, table):
        return pa.table({"size": [len(table)]})


def test_each_actor_of_the_reference_model_gets_its_pairs_in_one_block(
    cpu_ray, make_jobs, monkeypatch
):
    monkeypatch.setattr(reference, "ReferenceModel", BlockSize)
    table = pa.table({"id": [f"{n}" for n in range(301)]})

    def rows(gpus):
        placement = {"training": {"workers": 2, "cpus": 0.5, "gpus": gpus}}
        jobs = make_jobs(recipe_of(ECHO_ROLE), Placement.model_validate(placement))
        (job,) = (job for job in jobs if job.stage.name == "distillation/reference")
        return reference.reference_rows(job, table, counters=None)

    assert sorted(row["size"] for row in rows(0).take_all()) == [150, 151]
    rows(0.2)  # is not run, but Ray Data checks the arguments of functions that need a GPU
