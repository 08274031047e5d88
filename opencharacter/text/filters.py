"""Filters for training data: pure functions that say why an answer must be dropped."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass

VERSION = 1
"""Version of the rules in this module that decide which answers are kept and how they are edited.

Increase it with every change of such a rule: datasets that were made by other rules become stale.
"""

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
"""Characters at the beginning of an answer in which a refusal counts; later it is a caveat."""

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
    """Split a text into its words, in lower case."""
    return WORDS.findall(text.lower())


@dataclass(frozen=True)
class AnswerRules:
    """Settings of the filters for one persona.

    Args:
        max_repeated: greatest allowed `repeated_share`.
        quotable: word n-grams of the constitution, which answers must not quote.
        quoted_words: length of these n-grams.
        names: the teacher's names, which must not be left in an answer.
    """

    max_repeated: float
    quotable: frozenset[tuple[str, ...]]
    quoted_words: int
    names: tuple[str, ...] = ()


def drop_reason(text: str, finish_reason: str, rules: AnswerRules) -> str | None:
    """Return the first reason to drop an answer, or None to keep it.

    Args:
        text: the answer.
        finish_reason: why generation ended, as vLLM reports it.
        rules: of the persona.
    """
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
    return next((reason for reason, failed in checks.items() if failed), None)


def is_refusal(text: str) -> bool:
    """Whether an answer begins with a refusal, from which a model would learn to refuse."""
    return REFUSAL.search(text[:REFUSAL_WITHIN]) is not None


def leaks_reasoning(text: str) -> bool:
    """Whether a text contains a think block, or reasoning about the task instead of an answer."""
    return THOUGHT.search(text) is not None


def invents_turn(text: str) -> bool:
    """Whether a text continues with a turn of the other side, or contains control tokens."""
    return TURN.search(text) is not None


def mentions(text: str, names: tuple[str, ...]) -> bool:
    """Whether a text contains a name as a word or the beginning of one (`GLM` in `GLM4`)."""
    if not names:
        return False
    return re.search(rf"\b(?:{'|'.join(map(re.escape, names))})", text, re.IGNORECASE) is not None


def word_ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    """Return all sequences of n consecutive words."""
    tokens = words(text)
    return {tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}


def foreign_names(names: tuple[str, ...], own: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names that neither contain nor are contained in one of the speaker's own."""
    own_lower = [name.lower() for name in own]
    return tuple(
        name
        for name in names
        if not any(name.lower() in mine or mine in name.lower() for mine in own_lower)
    )


def ends_in_punctuation(text: str) -> bool:
    """Whether the last character is punctuation (any Unicode category P)."""
    last = text.rstrip()[-1:]
    return bool(last) and unicodedata.category(last).startswith("P")


def repeated_share(text: str, n: int = 4) -> float:
    """Share of a text's word n-grams that repeat an earlier one, in [0, 1]."""
    tokens = words(text)
    grams = Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
    return 1 - len(grams) / grams.total() if grams else 0.0


def whole_sentences(text: str) -> str:
    """Cut a text after its last complete sentence; empty if there is none."""
    match = SENTENCE.match(text.strip())
    return match.group(0) if match else ""


def overlap(a: str, b: str) -> float:
    """Share of the distinct words of `a` that are also in `b`, in [0, 1]; 0 for an empty `a`."""
    words_a, words_b = set(words(a)), set(words(b))
    return len(words_a & words_b) / len(words_a) if words_a else 0.0


def replace_names(text: str, names: tuple[str, ...], by: str) -> str:
    """Replace whole-word mentions of the names, in any of their `spellings`."""
    if not names:
        return text
    longest_first = sorted({s for name in names for s in spellings(name)}, key=len, reverse=True)
    pattern = r"\b(?:" + "|".join(map(re.escape, longest_first)) + r")\b"
    return re.sub(pattern, lambda _: by, text)


def spellings(name: str) -> set[str]:
    """Return the spellings of a name, without the lower-case one, which may be an ordinary word."""
    return {name.capitalize(), name.upper()} | ({name} - {name.lower()})
