"""Chat templates in the formats of published models, and what a run renders with them.

The templates in tests/templates follow the documented formats of the models that they are named
after. After an intended change of the rendering: python tests/template_samples.py
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

from samples import ECHO_ROLE

from opencharacter import models
from opencharacter.config.roles import Role
from opencharacter.text.chat import EMPTY_THOUGHT, assistant, system, user
from opencharacter.text.templates import adapt_template, encode, prompt

TEMPLATES = Path(__file__).parent / "templates"
GOLDEN = Path(__file__).parent / "golden" / "templates"


class Family(NamedTuple):
    """What a template needs besides its source.

    Args:
        special: the special tokens that it renders.
        eos: the tokenizer's eos_token.
        stops: further tokens that the model's generation config stops at.
        bos: the tokenizer's bos_token.
    """

    special: tuple[str, ...]
    eos: str
    stops: tuple[str, ...] = ()
    bos: str = "<s>"


COMMAND_TURNS = ("<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|START_RESPONSE|>")
FAMILIES = {
    "chatml": Family(("<|im_start|>",), "<|im_end|>", ("<|endoftext|>",)),
    "granite3": Family(("<|start_of_role|>", "<|end_of_role|>"), "<|end_of_text|>"),
    "olmo2": Family((), "<|endoftext|>", bos="<|endoftext|>"),  # role markers are plain text
    "smollm3": Family(("<|im_start|>",), "<|im_end|>"),
    "qwen3": Family(("<|im_start|>",), "<|im_end|>", ("<|endoftext|>",)),
    "glm4_5": Family(
        ("[gMASK]", "<sop>", "<|system|>", "<|assistant|>"), "<|endoftext|>", ("<|user|>",)
    ),
    "llama3_2": Family(
        ("<|start_header_id|>", "<|end_header_id|>"), "<|eot_id|>", bos="<|begin_of_text|>"
    ),
    "mistral": Family(("[INST]", "[/INST]"), "</s>"),
    "phi3": Family(("<|system|>", "<|user|>", "<|assistant|>"), "<|endoftext|>", ("<|end|>",)),
    "gemma2": Family(("<start_of_turn>",), "<eos>", ("<end_of_turn>",), "<bos>"),
    "gemma3": Family(("<start_of_turn>",), "<eos>", ("<end_of_turn>",), "<bos>"),
    "gpt_oss": Family(("<|start|>", "<|channel|>", "<|message|>", "<|end|>"), "<|return|>"),
    "command_a": Family(
        ("<|START_OF_TURN_TOKEN|>", *COMMAND_TURNS, "<|END_RESPONSE|>"),
        "<|END_OF_TURN_TOKEN|>",
        bos="<BOS_TOKEN>",
    ),
}

CONVERSATION = [
    system("Be brief."),
    user("Hello"),
    assistant("First answer."),
    user("And?"),
    assistant("Second one."),
]
PREFILL = "<think>\nI answer as myself.\n"


def make_tokenizer(base: Any, family: str, folder: Path, **fields: Any) -> Any:
    """Return a tokenizer with the template and special tokens of a family, adapted to a role.

    Args:
        base: the tokenizer that provides the vocabulary.
        family: a key of `FAMILIES`.
        folder: an empty folder for the generation config.
        fields: fields of the role, such as `thinks`.
    """
    tokenizer, settings = copy.deepcopy(base), FAMILIES[family]
    special = [*settings.special, *settings.stops]
    tokenizer.add_special_tokens(
        {
            "eos_token": settings.eos,
            "bos_token": settings.bos,
            "additional_special_tokens": special,
        }
    )
    stops = tokenizer.convert_tokens_to_ids([settings.eos, *settings.stops])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    tokenizer.name_or_path = str(folder)
    tokenizer.chat_template = (TEMPLATES / f"{family}.jinja").read_text()
    adapt_template(tokenizer, Role.model_validate(ECHO_ROLE | fields))
    return tokenizer


def describe(tokenizer: Any, thinking: Any) -> str:
    """Render what a run renders, one paragraph each; `[[` and `]]` enclose tokens with a loss.

    Args:
        tokenizer: the tokenizer of a role that does not think.
        thinking: the tokenizer of a role that thinks.
    """
    texts = {
        "prompt": prompt(tokenizer, CONVERSATION[:2]),
        "second prompt": prompt(tokenizer, CONVERSATION[:4]),
        "thinking": prompt(thinking, CONVERSATION[:2]),
        "thinking, thought closed": prompt(thinking, CONVERSATION[:2], EMPTY_THOUGHT),
        "thinking, prefilled": prompt(thinking, CONVERSATION[:2], PREFILL),
    }
    for number, tokens in enumerate(encode(tokenizer, CONVERSATION), 1):
        texts[f"training sequence {number}"] = mark_loss(tokenizer, *tokens[:2])
    return "".join(f"== {title}\n{text}\n" for title, text in texts.items())


def mark_loss(tokenizer: Any, ids: list[int], loss_positions: list[int]) -> str:
    """Decode token ids, with `[[` and `]]` around runs of tokens with a loss."""
    text, inside, positions = "", False, set(loss_positions)
    for position in range(len(ids) + 1):
        if (position in positions) != inside:
            text += "]]" if inside else "[["
            inside = not inside
        text += tokenizer.decode(ids[position : position + 1])
    return text


if __name__ == "__main__":
    import tempfile

    from transformers import AutoTokenizer

    vocabulary = AutoTokenizer.from_pretrained(models.resolve("embedded:smollm2-135m"))
    for name in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            plain, thinking = (
                make_tokenizer(vocabulary, name, Path(folder), thinks=thinks)
                for thinks in (False, True)
            )
            (GOLDEN / f"{name}.txt").write_text(describe(plain, thinking))
