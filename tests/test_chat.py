import asyncio
import copy
import json

import pytest
from samples import ECHO_ROLE

from opencharacter import models
from opencharacter.config.roles import Role
from opencharacter.errors import OpenCharacterError
from opencharacter.text import chat, templates
from opencharacter.text.chat import assistant, fill, row_id, row_seed, system, user
from opencharacter.text.templates import encode, encode_answer, load_tokenizer


def test_fill_replaces_each_placeholder():
    assert fill("a {x} b {y}", x=1, y="two") == "a 1 b two"


@pytest.mark.parametrize("fields", [{}, {"x": 1, "z": 2}, {"x": 1, "y": 2, "z": 3}])
def test_fill_refuses_missing_and_extra_fields(fields):
    with pytest.raises(OpenCharacterError, match="template fields"):
        fill("{x} {y}", **fields)


def test_fill_leaves_braces_in_values_alone():
    assert fill("{x}", x="{not a field}") == "{not a field}"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("thoughts</think>\n\nanswer", "answer"),
        ("<think>a</think>b</think> c", "c"),
        ("never closed", None),
        ("closed</think>", ""),
    ],
)
def test_the_think_block_is_stripped_up_to_the_last_closing_tag(text, left):
    assert chat.strip_think(text) == left


def test_ids_are_stable_and_depend_on_every_part():
    assert row_id("a", 1) == row_id("a", 1) == "2657442bb4a48d62"
    assert len({row_id("a", 1), row_id("a", 2), row_id("b", 1), row_id("a1")}) == 4


def test_seeds_fit_in_31_bits_and_differ():
    seeds = {row_seed(17, "stage", str(i)) for i in range(1000)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**31 for seed in seeds)


CONVERSATION = [
    system("Be brief."),
    user("Hello"),
    assistant("First answer."),
    user("And?"),
    assistant("Second one."),
]


def test_the_loss_covers_assistant_turns_and_their_end_tokens_only(tokenizer):
    (tokens,) = encode(tokenizer, CONVERSATION)
    with_loss = tokenizer.decode([tokens.ids[i] for i in tokens.loss_positions])
    assert with_loss == "First answer.<|im_end|>Second one.<|im_end|>"
    positions = set(tokens.loss_positions)
    ignored = tokenizer.decode([x for i, x in enumerate(tokens.ids) if i not in positions])
    assert "answer" not in ignored
    assert ignored.count("<|im_start|>assistant\n") == 2


def test_tokens_equal_those_of_the_stock_template(tokenizer):
    (tokens,) = encode(tokenizer, CONVERSATION)
    stock = tokenizer.apply_chat_template(CONVERSATION, tokenize=True, return_dict=False)
    assert tokens.ids == list(stock)


def test_a_prompt_ends_where_the_loss_mask_begins(tokenizer):
    prompt, answer = encode_answer(tokenizer, [user("Why?"), assistant("Because.")])
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(answer) == "Because.<|im_end|>"


def test_a_template_that_rewrites_earlier_turns_gives_one_sequence_per_turn(tokenizer):
    fickle = copy.deepcopy(tokenizer)
    fickle.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}(gone)"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    first, second = encode(fickle, CONVERSATION)
    assert fickle.decode(first.ids) == "Be brief.HelloFirst answer.<|im_end|>"
    assert fickle.decode(second.ids) == "Be brief.Hello(gone)And?Second one.<|im_end|>"


def test_a_truncated_reply_is_trimmed_to_whole_sentences_only_if_configured():
    from opencharacter.config.roles import Sampling
    from opencharacter.engines.conversations import Conversation
    from opencharacter.engines.spec import Reply

    class Cut:
        async def reply(self, messages, sampling, **_):
            return Reply("One. Two is not", "length", 1, 2, 0)

    talk = Conversation(Cut(), seed=1)  # type: ignore[arg-type]
    trimmed = asyncio.run(talk.reply([user("x")], Sampling(max_tokens=4, trim=True)))
    plain = asyncio.run(talk.reply([user("x")], Sampling(max_tokens=4)))
    assert (trimmed.text, trimmed.finish_reason) == ("One.", "trimmed")
    assert (plain.text, plain.finish_reason) == ("One. Two is not", "length")
    assert talk.tokens_out == 4


THINKING = """\
{%- for m in messages %}
{%- if m.role == 'assistant' %}{{ '<a>' }}
{%- if '</think>' in m.content %}{{ '<think></think>' + m.content.split('</think>')[-1] }}
{%- else %}{{ '<think></think>' + m.content }}{% endif %}
{%- else %}{{ '<u>' + m.content }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<a>OPENED' }}{% endif %}"""
"""As models that think have it: a reply's own thought is taken out, or an empty one put in."""


@pytest.mark.parametrize(
    ("opened", "prefill", "text"),
    [
        ("", "<think>\nI am", "<u>Hi<a><think>\nI am"),
        ("", chat.EMPTY_THOUGHT, "<u>Hi<a><think>\n\n</think>\n\n"),
        ("<think>\n", "<think>\nI am", "<u>Hi<a><think>\nI am"),
        ("", "1.", "<u>Hi<a>1."),
    ],
)
def test_a_prefill_is_rendered_verbatim_with_any_thinking_template(
    tokenizer, opened, prefill, text
):
    thinking = copy.copy(tokenizer)
    thinking.chat_template = THINKING.replace("OPENED", opened)
    assert templates.prompt(thinking, [user("Hi")], prefill) == text


OWN_TOKENIZER = """
from transformers import PreTrainedTokenizerFast

class Own(PreTrainedTokenizerFast):
    pass
"""


def test_remote_code_of_a_tokenizer_runs_only_if_its_role_trusts_it(
    tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "own"))
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "own_tokenizer.py").write_text(OWN_TOKENIZER)
    settings = tmp_path / "tokenizer_config.json"
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own_tokenizer.Own"]}}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | own))
    role = Role.model_validate(ECHO_ROLE | {"trust_remote_code": True})
    assert type(load_tokenizer(tmp_path, role)).__name__ == "Own"
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_tokenizer(tmp_path, role.model_copy(update={"trust_remote_code": False}))


def test_python_files_are_downloaded_with_the_weights(monkeypatch, tmp_path):
    import huggingface_hub

    asked = []

    def download(model, revision, allow_patterns):
        asked.extend(allow_patterns)
        return tmp_path

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    models.resolve("org/model")
    assert "*.py" in asked
