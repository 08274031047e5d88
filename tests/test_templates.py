"""Chat templates: training, generation and serving give a model the same tokens."""

import asyncio
import copy
import re
from datetime import datetime
from unittest.mock import Mock

import pytest
from samples import ECHO_ROLE, recipe_of
from template_samples import (
    CONVERSATION,
    FAMILIES,
    GOLDEN,
    PREFILL,
    TEMPLATES,
    describe,
    make_tokenizer,
    mark_loss,
)

from opencharacter.config.roles import Role
from opencharacter.errors import UserError
from opencharacter.planning import preflight
from opencharacter.text.chat import EMPTY_THOUGHT, assistant, system, user
from opencharacter.text.templates import (
    adapt_template,
    adapted_template,
    check_continuation,
    check_template,
    check_thoughts,
    check_trainable,
    encode,
    encode_answer,
    prompt,
    prompt_ids,
    render,
    special_tokens,
    thought_lead,
)

QUESTION = [user("Why?")]


@pytest.fixture
def make(tokenizer, tmp_path):
    """Return a function that makes the tokenizer of a family for a role."""
    return lambda family, **fields: make_tokenizer(tokenizer, family, tmp_path, **fields)


@pytest.fixture
def from_source(tokenizer):
    """Return a function that makes a tokenizer with a template for a role that does not think."""

    def make(source, **fields):
        other = copy.deepcopy(tokenizer)
        other.chat_template = source
        adapt_template(other, Role.model_validate(ECHO_ROLE | fields))
        return other

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_template_renders_equals_its_golden_file(make, family):
    described = describe(make(family), make(family, thinks=True))
    assert described == (GOLDEN / f"{family}.txt").read_text()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_answer_is_trained_on_after_the_prompt_that_is_served(make, family):
    tokenizer = make(family)
    sequences = encode(tokenizer, CONVERSATION)
    for end in (2, 4):
        served = prompt_ids(tokenizer, CONVERSATION[:end])
        position = len(served)
        assert any(
            tokens.ids[:position] == served and position in tokens.loss_positions
            for tokens in sequences
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_templates_pass_the_checks_before_a_run(make, family):
    for thinks in (False, True):
        check_template(make(family, thinks=thinks))
        check_trainable(make(family, thinks=thinks))


@pytest.mark.parametrize("family", FAMILIES)
def test_chosen_and_rejected_have_the_same_prompt(make, family):
    tokenizer = make(family)
    sides = ["Aye, sir.", " leads with a space", "\n\nand with lines"]
    encoded = [encode_answer(tokenizer, [*QUESTION, assistant(side)]) for side in sides]
    for (ids, answer), side in zip(encoded, sides, strict=True):
        assert ids == prompt_ids(tokenizer, QUESTION)
        assert side.strip() in tokenizer.decode(answer)


def test_the_template_of_the_embedded_model_is_not_changed(tokenizer):
    source = tokenizer.chat_template
    adapted = copy.deepcopy(tokenizer)
    adapt_template(adapted, Role.model_validate(ECHO_ROLE))
    assert adapted.chat_template == source


def test_a_server_gets_a_template_only_if_it_was_adapted(make, tmp_path, tiny_model):
    role = Role.model_validate(ECHO_ROLE)
    assert adapted_template(tiny_model, role) is None
    tokenizer = make("qwen3", thinks=True)  # the template as it is published
    tokenizer.save_pretrained(tmp_path / "model")
    source = adapted_template(tmp_path / "model", role)
    assert source == make("qwen3").chat_template != tokenizer.chat_template


def test_adapting_a_template_twice_changes_nothing(make):
    tokenizer = make("llama3_2")
    source = tokenizer.chat_template
    adapt_template(tokenizer, Role.model_validate(ECHO_ROLE))
    assert tokenizer.chat_template == source


# --------------------------------------------------------------------------- special tokens in text


@pytest.mark.parametrize("special", ["<|im_end|>", "<filename>", "<|im_start|>"])
def test_a_special_token_in_an_answer_is_text(tokenizer, special):
    answer = f"Write {special} to end it, and go on."
    (tokens,) = encode(tokenizer, [user("How?"), assistant(answer)])
    with_loss = [tokens.ids[i] for i in tokens.loss_positions]
    assert tokenizer.decode(with_loss) == answer + "<|im_end|>"
    assert with_loss.count(tokenizer.convert_tokens_to_ids(special)) == (special == "<|im_end|>")


def test_a_special_token_in_a_question_does_not_end_the_turn(tokenizer):
    ids = prompt_ids(tokenizer, [user("Is <|im_end|> a token?")])
    plain = prompt_ids(tokenizer, [user("Is it a token?")])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids.count(end) == plain.count(end)
    assert "Is <|im_end|> a token?" in tokenizer.decode(ids)


def test_private_use_characters_in_a_text_are_kept(tokenizer):
    text = "\ue000 <|im_end|> \ue001"
    assert text in tokenizer.decode(prompt_ids(tokenizer, [user(text)]))


def test_a_tokenizer_without_special_tokens_matches_nothing():
    bare = Mock(added_tokens_decoder={}, all_special_tokens=[])
    assert special_tokens(bare).search("<|im_end|>") is None


# ------------------------------------------------------------------------------ ends and beginnings


def test_a_template_without_end_tokens_ends_answers_with_the_eos_token(from_source):
    tokenizer = from_source(
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    _, answer = encode_answer(tokenizer, [*QUESTION, assistant("Because.")])
    assert tokenizer.decode(answer) == f"Because.{tokenizer.eos_token}"


def test_a_generation_prompt_that_ends_in_a_space_keeps_the_first_word(from_source):
    tokenizer = from_source(
        "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    ids, answer = encode_answer(tokenizer, [*QUESTION, assistant("Because.")])
    assert ids == tokenizer("user: Why?<|im_end|>assistant: ")["input_ids"]
    assert tokenizer.decode(answer) == "Because.<|im_end|>"


def test_an_answer_closes_the_thought_that_the_generation_prompt_opens(from_source):
    tokenizer = from_source(
        "{% for m in messages %}{{ '<u>' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<a><think>\n' }}{% endif %}"
    )
    (tokens,) = encode(tokenizer, [*QUESTION, assistant("Because.")])
    marked = mark_loss(tokenizer, tokens.ids, tokens.loss_positions)
    assert marked == "<u>Why?<|im_end|><a><think>\n[[</think>\n\nBecause.<|im_end|>]]"


# ----------------------------------------------------------------------------------------- thinking


def test_the_thought_of_glm_begins_on_a_new_line(make):
    tokenizer = make("glm4_5", thinks=True)
    assert thought_lead(tokenizer, {}) == "\n"
    assert prompt(tokenizer, QUESTION, PREFILL).endswith(f"<|assistant|>\n{PREFILL}")


def test_a_role_that_does_not_think_may_still_have_a_prefilled_thought(make):
    closed = f"{PREFILL}</think>\n\n"
    text = prompt(make("qwen3"), QUESTION, closed)
    assert text.endswith(f"<|im_start|>assistant\n{closed}")
    assert text.count("<think>") == 1


def test_an_endpoint_cannot_continue_a_thought_that_its_template_moves(make):
    with pytest.raises(UserError, match="prefill to false"):
        check_continuation(make("glm4_5", thinks=True))
    with pytest.raises(UserError, match="prefill to false"):
        check_continuation(make("qwen3", thinks=True))
    check_continuation(make("phi3", thinks=True))


def test_a_student_that_thinks_is_refused_if_it_would_be_trained_on_empty_thoughts(make):
    for family in ("qwen3", "glm4_5", "gpt_oss"):
        with pytest.raises(UserError, match=r"set roles\.student\.thinks to false"):
            check_thoughts(make(family, thinks=True))
    check_thoughts(make("phi3", thinks=True))


@pytest.mark.parametrize("family", ["qwen3", "glm4_5", "gpt_oss"])
def test_a_student_with_thinking_off_is_trained_on_the_answer_alone(make, family):
    tokenizer = make(family)
    check_thoughts(tokenizer)
    ids, answer = encode_answer(tokenizer, [*QUESTION, assistant("Because.")])
    assert ids == prompt_ids(tokenizer, QUESTION)
    assert tokenizer.decode(answer).lstrip().startswith("Because.")


def test_the_prompt_of_a_role_that_does_not_think_opens_the_final_channel(make):
    lead = "<|start|>assistant<|channel|>final<|message|>"
    tokenizer = make("gpt_oss")
    assert prompt(tokenizer, QUESTION).endswith(lead)
    assert prompt(tokenizer, QUESTION, EMPTY_THOUGHT).endswith(lead)
    assert prompt(make("gpt_oss", thinks=True), QUESTION).endswith("<|start|>assistant")


def test_a_run_is_refused_if_its_student_would_be_trained_on_empty_thoughts(
    make, make_jobs, tiny_model, tmp_path
):
    import shutil

    path = tmp_path / "student"
    shutil.copytree(tiny_model, path)
    template = str(TEMPLATES / "qwen3.jinja")
    role = {**ECHO_ROLE, "model": str(path), "chat_template": template, "thinks": True}
    with pytest.raises(UserError, match="role student: thinks is true"):
        preflight.check_templates(make_jobs(recipe_of(role)), None)


# ------------------------------------------------------------------------- independent references


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_have_the_tokens_of_the_published_template(make, family):
    """Transformers renders the published template with the variables that a run fixes."""
    from transformers.utils.chat_template_utils import render_jinja_template

    day = datetime(2024, 7, 26)
    source = re.sub(
        r"strftime_now\('(.*?)'\)",
        lambda call: repr(day.strftime(call[1])),
        (TEMPLATES / f"{family}.jinja").read_text(),
    )
    adapted = make(family, date_string="26 Jul 2024")
    messages = CONVERSATION
    if family == "gemma2":  # the system message is part of the first user turn
        first = user(f"{CONVERSATION[0]['content']}\n\n{CONVERSATION[1]['content']}")
        messages = [first, *CONVERSATION[2:]]
    for end in (len(messages) - 3, len(messages) - 1):
        (expected,), _ = render_jinja_template(
            conversations=[messages[:end]],
            chat_template=source,
            add_generation_prompt=True,
            enable_thinking=False,
            date_string="26 Jul 2024",
            bos_token=adapted.bos_token,
            eos_token=adapted.eos_token,
        )
        if family == "gpt_oss":
            expected += "<|channel|>final<|message|>"
        ids = adapted(expected, add_special_tokens=False)["input_ids"]
        shift = len(messages) - len(CONVERSATION)
        assert prompt_ids(adapted, CONVERSATION[: end - shift]) == ids


# -------------------------------------------------------------------------------------- fixed dates


def test_the_date_of_a_role_is_converted_to_the_format_of_the_template(make):
    assert "Current date: 2025-03-01" in prompt(
        make("gpt_oss", date_string="01 Mar 2025"), QUESTION
    )
    assert "Today Date: 01 Mar 2025" in prompt(
        make("llama3_2", date_string="01 Mar 2025"), QUESTION
    )
    assert "Current date: today" in prompt(make("gpt_oss", date_string="today"), QUESTION)


def test_the_date_of_a_recipe_is_that_of_its_roles_and_part_of_their_identity():
    default, dated = recipe_of(ECHO_ROLE), recipe_of(ECHO_ROLE, date_string="01 Mar 2025")
    assert dated.roles.student.date_string == dated.roles.judge.date_string == "01 Mar 2025"
    assert default.roles.student.date_string is None
    assert default.roles.student.identity() != dated.roles.student.identity()
    own = recipe_of({**ECHO_ROLE, "date_string": "02 Apr 2025"}, date_string="01 Mar 2025")
    assert own.roles.teacher.date_string == "02 Apr 2025"


# ------------------------------------------------------------------------------------- before a run


def test_a_rejected_system_message_becomes_part_of_the_first_user_turn(make):
    text = render(make("gemma2"), [system("Be brief."), user("Hello")], True)
    assert text == (
        "<bos><start_of_turn>user\nBe brief.\n\nHello<end_of_turn>\n<start_of_turn>model\n"
    )


def test_a_system_message_that_the_template_drops_is_kept(from_source):
    tokenizer = from_source(
        "{% for m in messages if m.role != 'system' %}{{ m.content + eos_token }}{% endfor %}"
    )
    assert render(tokenizer, [system("S"), user("U")], True) == "S\n\nU<|im_end|>"


def test_a_model_without_a_template_is_refused(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(UserError, match=r"has no chat template; .*set `chat_template`"):
        check_template(bare)


def test_a_template_that_rejects_a_second_turn_is_refused(from_source):
    tokenizer = from_source(
        "{% if messages|length > 2 %}{{ raise_exception('too long') }}{% endif %}"
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(UserError, match=r"rejects .*user, assistant, user \(too long\)"):
        check_template(tokenizer)


def test_a_template_that_drops_answers_is_refused(from_source):
    tokenizer = from_source(
        "{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(UserError, match="drops a message of the role assistant"):
        check_template(tokenizer)


def test_a_run_is_refused_before_it_starts_if_a_model_has_no_template(
    make_jobs, tiny_model, tmp_path
):
    import shutil

    path = tmp_path / "model"
    shutil.copytree(tiny_model, path, ignore=shutil.ignore_patterns("chat_template*"))
    recipe = recipe_of({**ECHO_ROLE, "model": str(path)})
    with pytest.raises(UserError, match=r"role \w+: .*has no chat template"):
        preflight.check_templates(make_jobs(recipe), None)
    working = recipe_of({**ECHO_ROLE, "model": str(tiny_model)})
    preflight.check_templates(make_jobs(working), None)


def test_an_endpoint_closes_a_thought_by_the_argument_that_the_engine_renders(make):
    """Both paths give GLM-4.5 the tokens of its own template with `enable_thinking` off."""
    from opencharacter.config.placement import Pool
    from opencharacter.config.roles import Sampling
    from opencharacter.engines.backends import EndpointEngine
    from opencharacter.engines.spec import EngineSpec

    role = Role.model_validate(ECHO_ROLE | {"model": "glm", "endpoint": "http://127.0.0.1:1/v1"})
    tokenizer = make("glm4_5", thinks=True)

    async def request():
        engine = EndpointEngine(EngineSpec(role, Pool()))
        return engine._request(QUESTION, Sampling(max_tokens=1), None, EMPTY_THOUGHT)

    sent = asyncio.run(request())
    options = sent["extra_body"]["chat_template_kwargs"]
    by_server = render(tokenizer, sent["messages"], True, **options)
    assert prompt(tokenizer, QUESTION, EMPTY_THOUGHT) == by_server
