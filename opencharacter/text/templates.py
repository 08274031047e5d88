"""Chat templates: adapting them to a role, rendering prompts, and tokenizing conversations.

Training, generation and serving must give a model the same tokens. Therefore a template is adapted
once, when its tokenizer is loaded, and everything else renders the adapted template:

- A role that does not think renders with `enable_thinking = false` where the template knows it, and
  its prompts open the final channel where the template has channels (gpt-oss).
- Dates are the recipe's `date_string`, never the current day.
- A system message that the template rejects or drops is put before the first user message.

Control tokens inside the text of a message are text: a quoted `<|im_end|>` ends no turn.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from opencharacter.config.roles import DATE_STRING, Role
from opencharacter.errors import UserError
from opencharacter.text.chat import (
    EMPTY_THOUGHT,
    THINK_CLOSE,
    THINK_OPEN,
    Message,
    assistant,
    system,
    user,
)

PRIVATE_USE = range(0xE000, 0xF900)
"""Unicode's private-use characters, which stand for other text while a template is rendered."""

ADAPTED = "{#- Adapted by opencharacter. -#}"
THINKING_OFF = (
    "{%- if enable_thinking is not defined %}{%- set enable_thinking = false %}{%- endif %}"
)
SYSTEM_IN_USER_TURN = """\
{%- if messages and messages[0]['role'] == 'system' %}
{%- set system_text = messages[0]['content'] %}
{%- if messages | length > 1 and messages[1]['role'] == 'user' %}
{%- set system_text = system_text ~ '\\n\\n' ~ messages[1]['content'] %}
{%- set messages = [{'role': 'user', 'content': system_text}] + messages[2:] %}
{%- else %}
{%- set messages = [{'role': 'user', 'content': system_text}] + messages[1:] %}
{%- endif %}
{%- endif %}"""
CHANNEL = "<|channel|>"
"""Begins the name of the part of a turn, such as `analysis` or `final`, in the harmony format."""
ANSWER_OPENED = "{#- The prompt opens the answer. -#}"
END_OF_PRELUDE = "{{- '' }}"
"""Protects whitespace at the beginning of a template, which Jinja removes after a block."""


# ------------------------------------------------------------------------------------ adaptation


def load_tokenizer(path: Path, role: Role) -> Any:
    """Load a role's tokenizer with its chat template adapted to the role.

    Python code from the model's repository runs only if the role trusts it.
    """
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=role.trust_remote_code)
    adapt_template(tokenizer, role)
    return tokenizer


def adapted_template(path: Path, role: Role) -> str | None:
    """Return the source of a role's adapted chat template; None if the model's own needs nothing.

    Args:
        path: directory of the model.
        role: the model.
    """
    source = template_source(load_tokenizer(path, role))
    return source if source and source.startswith(ADAPTED) else None


def adapt_template(tokenizer: Any, role: Role) -> None:
    """Adapt a tokenizer's chat template to a role; a template that needs nothing stays as it is."""
    source = role.chat_template or template_source(tokenizer)
    if source is None or source.startswith(ADAPTED):
        return
    prelude = fixed_date(source, role.date_string or DATE_STRING)
    if "enable_thinking" in source and not role.thinks:
        prelude = THINKING_OFF + prelude
    tokenizer.chat_template = adapted_source(source, prelude)
    if not accepts_system(tokenizer):
        tokenizer.chat_template = adapted_source(source, prelude + SYSTEM_IN_USER_TURN)
    if CHANNEL in source and not role.thinks:
        open_answer(tokenizer)


def open_answer(tokenizer: Any) -> None:
    """Let the generation prompt of a chat template open the channel of the answer.

    Otherwise a model such as gpt-oss chooses the channel and may open one for its thought.
    """
    source, lead = template_source(tokenizer) or "", answer_lead(tokenizer)
    if CHANNEL not in lead:
        return
    opened = f"{{% if add_generation_prompt %}}{{{{ {json.dumps(lead)} }}}}{{% endif %}}"
    source = source.removeprefix(ADAPTED).removesuffix("\n")
    tokenizer.chat_template = f"{ADAPTED}{source}{ANSWER_OPENED}{opened}"


def adapted_source(source: str, prelude: str) -> str:
    """Return a template that begins with Jinja statements; the template itself without any."""
    return f"{ADAPTED}{prelude}{END_OF_PRELUDE}{source}" if prelude else source


def template_source(tokenizer: Any) -> str | None:
    """Return the Jinja source of a tokenizer's chat template, or None if it has none."""
    try:
        return tokenizer.get_chat_template()
    except ValueError:
        return None


def fixed_date(source: str, date: str) -> str:
    """Return Jinja statements that fix the date in a template; none if it mentions no date.

    Args:
        source: the template.
        date: the date, usually as `%d %b %Y`. A date in this format is converted to the formats
            that the template asks for; any other text is used as it is.
    """
    statements = ""
    if "date_string" in source:
        statements = "{%- if date_string is not defined %}{%- set date_string = "
        statements += f"{json.dumps(date)} %}}{{%- endif %}}"
    if "strftime_now" in source:
        cases = "".join(
            f"{{%- if format == {json.dumps(form)} -%}}{text}{{%- endif -%}}"
            for form, text in date_forms(source, date).items()
        )
        known = json.dumps(list(date_forms(source, date)))
        statements += f"{{%- macro strftime_now(format) -%}}{cases}"
        statements += f"{{%- if format not in {known} -%}}{date}{{%- endif -%}}{{%- endmacro %}}"
    return statements


def date_forms(source: str, date: str) -> dict[str, str]:
    """Return the date in each format with which a template calls `strftime_now`."""
    try:
        day = datetime.strptime(date, "%d %b %Y")
    except ValueError:
        return {}
    calls = re.findall(r"strftime_now\(\s*(['\"])(.*?)\1", source)
    return {form: day.strftime(form) for _, form in calls}


def accepts_system(tokenizer: Any) -> bool:
    """Whether a chat template renders system messages."""
    try:
        return "SYSTEM" in render(tokenizer, [system("SYSTEM"), user("USER")], True)
    except UserError:
        return False


# -------------------------------------------------------------------------------------- rendering


def render(tokenizer: Any, messages: list[Message], generation_prompt: bool, **options: Any) -> str:
    """Render a conversation with a tokenizer's chat template.

    Args:
        tokenizer: a tokenizer from `load_tokenizer`.
        messages: the conversation.
        generation_prompt: whether to end with the beginning of an assistant turn.
        options: further variables of the template.

    Raises:
        UserError: if the tokenizer has no template, or the template rejects the conversation.
    """
    from jinja2 import TemplateError

    name = tokenizer.name_or_path
    if template_source(tokenizer) is None:
        raise UserError(
            f"{name} has no chat template; choose a model that was trained for chat, or set "
            "`chat_template` of the role"
        )
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generation_prompt, **options
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(
            f"the chat template of {name} rejects a conversation of the roles {roles} ({error}); "
            "choose another model, or set `chat_template` of the role"
        ) from None


def prompt(tokenizer: Any, messages: list[Message], prefill: str = "") -> str:
    """Render a conversation as the text that a model continues.

    The prefill is appended unchanged to the template's generation prompt. If it were rendered as an
    assistant turn, the templates of reasoning models would move, close or drop its thought.
    `EMPTY_THOUGHT` is replaced by the template's own way of answering without thinking, if it has
    one. If special tokens begin an answer, such as those of a channel, they precede the prefill.

    Args:
        tokenizer: a tokenizer from `load_tokenizer`.
        messages: the conversation, ending with a user turn.
        prefill: beginning of the reply.
    """
    opened = ANSWER_OPENED in (template_source(tokenizer) or "")
    if not prefill or (opened and prefill == EMPTY_THOUGHT):
        return render(tokenizer, messages, True)
    lead = answer_lead(tokenizer)
    if special_tokens(tokenizer).search(lead) and THINK_OPEN not in lead:
        text = render(tokenizer, messages, True) + lead
        return text if prefill == EMPTY_THOUGHT else text + prefill
    if not prefill.startswith(THINK_OPEN):
        return render(tokenizer, messages, True) + prefill
    options = {}
    if "enable_thinking" in (template_source(tokenizer) or ""):
        options["enable_thinking"] = prefill != EMPTY_THOUGHT
    text = render(tokenizer, messages, True, **options)
    if options and prefill == EMPTY_THOUGHT:
        return text
    if text.rstrip().endswith(THINK_OPEN):
        return text + prefill.removeprefix(THINK_OPEN).lstrip()
    return text + thought_lead(tokenizer, options) + prefill


def answer_lead(tokenizer: Any) -> str:
    """Return what a template puts between its generation prompt and the content of an answer."""
    start = render(tokenizer, [user("Q")], True)
    mark = chr(PRIVATE_USE[0])
    turn = render(tokenizer, [user("Q"), assistant(mark)], False)
    return turn.removeprefix(start).partition(mark)[0] if turn.startswith(start) else ""


def thought_lead(tokenizer: Any, options: dict[str, Any]) -> str:
    """Return the whitespace that a template puts between its generation prompt and a thought."""
    question, answer = user("Q"), assistant(f"{THINK_OPEN}\nT\n{THINK_CLOSE}\n\nA")
    start = render(tokenizer, [question], True, **options)
    turn = render(tokenizer, [question, answer], False, **options)
    lead, thought, _ = turn.removeprefix(start).partition(THINK_OPEN)
    return lead if turn.startswith(start) and thought and not lead.strip() else ""


# ---------------------------------------------------------------------------------- special tokens


@functools.lru_cache(maxsize=16)
def special_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Return a pattern that matches the special tokens of a tokenizer, the longest first."""
    added = tokenizer.added_tokens_decoder.values()
    texts = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
    longest_first = sorted(filter(None, texts), key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


@functools.lru_cache(maxsize=16)
def stop_tokens(tokenizer: Any) -> frozenset[str]:
    """Return the tokens that end generation: the tokenizer's and the generation config's."""
    stops = {tokenizer.eos_token}
    path = Path(tokenizer.name_or_path) / "generation_config.json"
    if path.is_file():
        ids = json.loads(path.read_text()).get("eos_token_id")
        ids = ids if isinstance(ids, list) else [ids]
        stops |= set(tokenizer.convert_ids_to_tokens([i for i in ids if i is not None]))
    return frozenset(stops - {None})


def unused_characters(messages: list[Message]) -> Iterator[str]:
    """Yield private-use characters that do not occur in the messages."""
    used = set().union(*(message["content"] for message in messages))
    return (chr(code) for code in PRIVATE_USE if chr(code) not in used)


def protect(tokenizer: Any, messages: list[Message]) -> tuple[list[Message], dict[str, str]]:
    """Replace special tokens in the texts of messages, so that they do not become control tokens.

    Returns:
        The messages, and the special token that each private-use character in them stands for.
    """
    pattern = special_tokens(tokenizer)
    literals = {text for m in messages for text in pattern.findall(m["content"])}
    if not literals:
        return messages, {}
    characters = dict(zip(sorted(literals), unused_characters(messages), strict=False))
    protected = [
        {**m, "content": pattern.sub(lambda match: characters[match[0]], m["content"])}
        for m in messages
    ]
    return protected, {character: literal for literal, character in characters.items()}


def tokenize(tokenizer: Any, text: str, literals: dict[str, str]) -> list[int]:
    """Tokenize rendered text.

    Args:
        tokenizer: a Hugging Face tokenizer.
        text: the rendered text.
        literals: as `protect` returns them.
    """
    ids: list[int] = []
    parts = re.split(f"([{''.join(literals)}])", text) if literals else [text]
    for part in parts:
        literal = literals.get(part)
        if literal is not None:
            arguments = {"add_special_tokens": False, "split_special_tokens": True}
            ids += tokenizer(literal, **arguments)["input_ids"]
        elif part:
            ids += tokenizer(part, add_special_tokens=False)["input_ids"]
    return ids


def prompt_ids(tokenizer: Any, messages: list[Message], prefill: str = "") -> list[int]:
    """Tokenize a conversation as the prompt that a model continues.

    Args:
        tokenizer: a tokenizer from `load_tokenizer`.
        messages: the conversation, ending with a user turn.
        prefill: beginning of the reply.
    """
    messages, literals = protect(tokenizer, messages)
    return tokenize(tokenizer, prompt(tokenizer, messages, prefill), literals)


# ---------------------------------------------------------------------------------- training text


class Encoded(NamedTuple):
    """A tokenized training sequence.

    Args:
        ids: token ids.
        loss_positions: indices into `ids` of the tokens with a loss, ascending.
    """

    ids: list[int]
    loss_positions: list[int]


def completion(tokenizer: Any, messages: list[Message], prompt_text: str) -> str:
    """Return the text that the model should generate as the last, assistant turn.

    It consists of what the template puts between the generation prompt and the content, the
    content, and the tokens that end the turn.

    Args:
        tokenizer: a tokenizer from `load_tokenizer`.
        messages: a conversation that ends with an assistant turn.
        prompt_text: the rendered prompt for that turn.
    """
    *earlier, last = messages
    mark = next(unused_characters(messages))
    before, _, after = render(tokenizer, [*earlier, assistant(mark)], False).rpartition(mark)
    rendered = render(tokenizer, messages, False)
    content = last["content"]
    if rendered.startswith(before) and rendered.endswith(after):
        content = rendered[len(before) : len(rendered) - len(after)]
    if prompt_text.rstrip().endswith(THINK_OPEN):
        lead = f"{THINK_CLOSE}\n\n"
    elif before.startswith(prompt_text):
        lead = before.removeprefix(prompt_text)
    else:  # the template renders the earlier messages differently before an answer
        lead = answer_lead(tokenizer)
    return lead + content + end_of_turn(tokenizer, earlier, mark, after)


def end_of_turn(tokenizer: Any, earlier: list[Message], mark: str, after: str) -> str:
    """Return the text that ends an assistant turn, up to the token that stops generation.

    Args:
        tokenizer: a tokenizer from `load_tokenizer`.
        earlier: the messages before the turn.
        mark: a character that stands for the turn's content.
        after: what the template renders after the content of the last turn.

    Raises:
        UserError: if neither the template nor the tokenizer has an end of turn.
    """
    end = leading_special(tokenizer, after)
    if end is not None:
        return end
    # Templates such as GLM-4's close a turn only by the marker of the next role.
    continued = render(tokenizer, [*earlier, assistant(mark), user("Q")], False)
    marker = leading_special(tokenizer, continued.rpartition(mark)[2])
    if marker is not None and marker.endswith(tuple(stop_tokens(tokenizer))):
        return marker
    if tokenizer.eos_token:
        return tokenizer.eos_token
    raise UserError(
        f"the chat template of {tokenizer.name_or_path} ends assistant turns with no special "
        "token, and the tokenizer has no eos_token; choose another model"
    )


def leading_special(tokenizer: Any, text: str) -> str | None:
    """Return the text up to its first special token, or None if it has none.

    If more special tokens follow immediately and one of them stops generation, the text up to that
    one is returned.
    """
    pattern, stops = special_tokens(tokenizer), stop_tokens(tokenizer)
    match = first = pattern.search(text)
    while match and match[0] not in stops:
        match = pattern.match(text, match.end())
    last = match or first
    return text[: last.end()] if last else None


def encode_turn(
    tokenizer: Any, messages: list[Message], literals: dict[str, str]
) -> tuple[list[int], list[int]]:
    """Tokenize a prompt and its completion so that the prompt has the same tokens as when served.

    Args:
        tokenizer: a tokenizer from `load_tokenizer`.
        messages: a conversation that ends with an assistant turn, from `protect`.
        literals: as `protect` returns them.

    Returns:
        The token ids of the prompt and of the completion.
    """
    text = prompt(tokenizer, messages[:-1])
    answer = completion(tokenizer, messages, text)
    prompt_ids = tokenize(tokenizer, text, literals)
    ids = tokenize(tokenizer, text + answer, literals)
    if ids[: len(prompt_ids)] == prompt_ids:
        return prompt_ids, ids[len(prompt_ids) :]
    return prompt_ids, tokenize(tokenizer, answer, literals)


def encode_answer(tokenizer: Any, messages: list[Message]) -> tuple[list[int], list[int]]:
    """Tokenize a conversation; return the tokens of its prompt and of its last assistant turn."""
    messages, literals = protect(tokenizer, messages)
    return encode_turn(tokenizer, messages, literals)


def encode(tokenizer: Any, messages: list[Message]) -> list[Encoded]:
    """Tokenize a conversation for training; all assistant turns have a loss.

    Each turn is encoded as it is served: its prompt, then what the model should generate. Turns
    form one sequence if each prompt continues the previous turn. If the template renders earlier
    turns differently once later ones follow, each turn is a sequence of its own.

    Args:
        tokenizer: a tokenizer from `load_tokenizer`.
        messages: the conversation.
    """
    messages, literals = protect(tokenizer, messages)
    sequences: list[Encoded] = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt_ids, answer_ids = encode_turn(tokenizer, messages[: i + 1], literals)
        positions = list(range(len(prompt_ids), len(prompt_ids) + len(answer_ids)))
        if sequences and prompt_ids[: len(sequences[-1].ids)] == sequences[-1].ids:
            positions = sequences.pop().loss_positions + positions
        sequences.append(Encoded(prompt_ids + answer_ids, positions))
    if not sequences:
        return []
    last = sequences[-1]
    whole = tokenize(tokenizer, render(tokenizer, messages, False), literals)
    if whole[: len(last.ids)] == last.ids:  # such as the line break after the last turn
        sequences[-1] = Encoded(whole, last.loss_positions)
    return sequences


# ------------------------------------------------------------------------------------------ checks


def check_template(tokenizer: Any) -> None:
    """Render conversations of every kind that a run uses.

    Raises:
        UserError: if the template rejects one of them or drops a message.
    """
    turns = [user("FIRST"), assistant("ANSWER"), user("SECOND")]
    for messages in ([user("FIRST")], [system("SYSTEM"), user("FIRST")], turns):
        for prefill in ("", EMPTY_THOUGHT, f"{THINK_OPEN}\nTHOUGHT"):
            text = prompt(tokenizer, messages, prefill)
            _require_texts(tokenizer, text, messages)


def check_trainable(tokenizer: Any) -> None:
    """Encode a conversation for training.

    Raises:
        UserError: if the template drops the text of an assistant turn.
    """
    turns = [user("FIRST"), assistant("ONE"), user("SECOND"), assistant("TWO")]
    sequences = encode(tokenizer, [system("SYSTEM"), *turns])
    trained = "".join(tokenizer.decode([s.ids[i] for i in s.loss_positions]) for s in sequences)
    _require_texts(tokenizer, trained, [turns[1], turns[3]])


def check_thoughts(tokenizer: Any) -> None:
    """Check that a student that thinks is not trained on thoughts.

    The answers in the training data have no thoughts. Some templates put an empty one before them,
    or a channel that skips the thought, and the student would learn to think no more.

    Args:
        tokenizer: the tokenizer of a student that thinks.

    Raises:
        UserError: if the text that is trained on contains an empty thought.
    """
    _, answer = encode_answer(tokenizer, [user("QUESTION"), assistant("ANSWER")])
    text = tokenizer.decode(answer)
    if THINK_CLOSE in text or CHANNEL in text:
        raise UserError(
            f"thinks is true, but the training data has no thoughts and the chat template of "
            f"{tokenizer.name_or_path} would train on empty ones; set roles.student.thinks to false"
        )


def check_continuation(tokenizer: Any) -> None:
    """Check that a server can continue a prefilled assistant turn that begins with a thought.

    A server renders the prefill as the content of the last message (`continue_final_message`),
    whereas an engine of this package appends it to the generation prompt.

    Raises:
        UserError: if the template changes the prefill.
    """
    prefill = f"{THINK_OPEN}\nTHOUGHT"
    text = render(tokenizer, [user("FIRST"), assistant(prefill)], False)
    if not text.startswith(prompt(tokenizer, [user("FIRST")], prefill)):
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} changes a prefilled thought, so that "
            "an endpoint cannot continue it; set distillation.teacher.prefill to false, or let "
            "this package run the model"
        )


def _require_texts(tokenizer: Any, text: str, messages: list[Message]) -> None:
    for message in messages:
        if message["content"] not in text:
            raise UserError(
                f"the chat template of {tokenizer.name_or_path} drops a message of the role "
                f"{message['role']}; choose another model, or set `chat_template` of the role"
            )
