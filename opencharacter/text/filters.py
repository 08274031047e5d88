"""Why an answer may not be trained on: pure functions that return a `drop_reason` or None."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass

WORDS = re.compile(r"\w+(?:['\u2019]\w+)?")
SENTENCE = re.compile(r".*[.!?\u2026](?:[\"'\u201d\u2019)\]*]+)?(?=\s|$)", re.DOTALL)

NOT = (
    r"(?:can(?:no|['\u2019])t|can not|won['\u2019]t|will not|am not able to|['\u2019]m not able to)"
)
UNABLE = rf"(?:{NOT}|am unable to|['\u2019]m unable to|must decline to|have to decline)"
HELP = (
    r"(?:help(?! but)|assist|provide|fulfil|comply|do that|answer|discuss|engage|continue|create|"
    r"write|generate|support|share|offer|give|take part|role-?play|pretend|act as|adopt)"
)
REFUSAL = re.compile(
    rf"\bI(?: really| just)? ?{UNABLE}(?: \w+){{0,2}}? ?{HELP}\b"
    r"|\bas an? (?:AI|artificial intelligence|(?:large )?language model)\b[^.]{0,60}"
    r"\bI (?:do not|don['\u2019]t|cannot|can['\u2019]t|am not|lack)\b"
    r"|\b(?:against|violates?) (?:my|our|the) (?:guidelines|programming|policy|policies)\b"
    r"|\bI(?:['\u2019]m| am) (?:really |so |very )?sorry,? (?:but )?I(?: |['\u2019]m )"
    r"(?:can|won|will not|am unable|unable|not able|have to decline|must decline)",
    re.IGNORECASE,
)
REFUSAL_WITHIN = 250
"""Characters from the beginning in which a refusal is one: later it is a caveat."""

THOUGHT = re.compile(
    r"</?(?:think|thinking|thought|reasoning|analysis|scratchpad)>"
    r"|<\|(?:channel|thought|reasoning)[^|]*\|>"
    r"|\A\W*(?:okay|ok|alright|hmm|so|first)?[,.]?\s*(?:the|this) user"
    r"(?:['\u2019]s (?:asking|message|question|request)| is asking| asks| wants| just)\b"
    r"|\A\W*(?:I need to|I should|I must|let me)(?: now)? "
    r"(?:respond|reply|answer)(?: to (?:this|the user))?(?: as| in character| in the voice)\b"
    r"|\b(?:system prompt|my instructions say)\b"
    r"|\bI(?:['\u2019]ve| have) been (?:told|instructed) to\b",
    re.IGNORECASE,
)

TURN = re.compile(
    r"^\W{0,3}(?:user|human|assistant|system|ai|me|you|instance [ab12])\W{0,2}:\W{0,2}\s"
    r"|<\|?(?:im_start|im_end|start_header_id|eot_id|start_of_turn|end_of_turn|user|assistant)\|?>"
    r"|\[/?INST\]|^#{2,3} ?(?:instruction|response|user|assistant)\b",
    re.IGNORECASE | re.MULTILINE,
)


def words(text: str) -> list[str]:
    """Lower-case words."""
    return WORDS.findall(text.lower())


@dataclass(frozen=True)
class AnswerRules:
    """What an answer may not do.

    Args:
        max_repeated: see `repeated_share`.
        quotable: word runs of the constitution, see `runs`.
        quoted_words: length of those runs.
        names: whose appearance gives the teacher away, after replacement.
    """

    max_repeated: float
    quotable: frozenset[tuple[str, ...]]
    quoted_words: int
    names: tuple[str, ...] = ()


def drop_reason(text: str, finish_reason: str, rules: AnswerRules) -> str | None:
    """The first reason not to train on an answer, or None."""
    if not text.strip():
        return "empty"
    if finish_reason == "length" or not ends_in_punctuation(text):
        return "unfinished"
    checks = {
        "reasoning_leak": leaks_reasoning(text),
        "refusal": is_refusal(text),
        "invented_turn": invents_turn(text),
        "name_leak": mentions(text, rules.names),
        "constitution_quoted": not rules.quotable.isdisjoint(word_ngrams(text, rules.quoted_words)),
        "looping": repeated_share(text) > rules.max_repeated,
    }
    return next((reason for reason, found in checks.items() if found), None)


def is_refusal(text: str) -> bool:
    """Whether an answer begins by declining: it then teaches to refuse, not a character."""
    return REFUSAL.search(text[:REFUSAL_WITHIN]) is not None


def leaks_reasoning(text: str) -> bool:
    """Whether a think block, or talk about the task instead of an answer to it, is in a text."""
    return THOUGHT.search(text) is not None


def invents_turn(text: str) -> bool:
    """Whether a text goes on to speak for the other side, or holds a template's control tokens."""
    return TURN.search(text) is not None


def mentions(text: str, names: tuple[str, ...]) -> bool:
    """Whether a name is in a text as a word or the beginning of one (`GLM` in `GLM4`)."""
    if not names:
        return False
    return re.search(rf"\b(?:{'|'.join(map(re.escape, names))})", text, re.IGNORECASE) is not None


def word_ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    """All runs of n consecutive words."""
    tokens = words(text)
    return {tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}


def foreign_names(names: tuple[str, ...], own: tuple[str, ...]) -> tuple[str, ...]:
    """The names that are not part of any of the speaker's own."""
    mine = [name.lower() for name in own]
    return tuple(n for n in names if not any(n.lower() in m or m in n.lower() for m in mine))


def ends_in_punctuation(text: str) -> bool:
    """Whether the last character is Unicode punctuation (any category P)."""
    last = text.rstrip()[-1:]
    return bool(last) and unicodedata.category(last).startswith("P")


def repeated_share(text: str, n: int = 4) -> float:
    """Share of a text's n-word sequences that have stood in it before, 0 .. 1."""
    tokens = words(text)
    grams = Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
    return 1 - len(grams) / grams.total() if grams else 0.0


def whole_sentences(text: str) -> str:
    """The text up to the end of its last whole sentence; empty if there is none."""
    match = SENTENCE.match(text.strip())
    return match.group(0) if match else ""


def overlap(a: str, b: str) -> float:
    """Share of `a`'s distinct words that `b` has too, 0 .. 1 (0 for an empty `a`)."""
    mine, other = set(words(a)), set(words(b))
    return len(mine & other) / len(mine) if mine else 0.0


def replace_names(text: str, names: tuple[str, ...], by: str) -> str:
    """Replace whole-word mentions of any of the names, as names are written."""
    if not names:
        return text
    longest_first = sorted({s for name in names for s in spellings(name)}, key=len, reverse=True)
    pattern = r"\b(?:" + "|".join(map(re.escape, longest_first)) + r")\b"
    return re.sub(pattern, lambda _: by, text)


def spellings(name: str) -> set[str]:
    """How a name is written: capitalised, or in capitals. In small letters it may be a word."""
    return {name.capitalize(), name.upper()} | ({name} - {name.lower()})
