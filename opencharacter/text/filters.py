"""Filters for training data: pure functions that say why an answer must be dropped."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass

VERSION = 2
"""Version of the rules in this module that decide which answers are kept and how they are edited.

Increase it with every change of such a rule: datasets that were made by other rules become stale.
"""

WORDS = re.compile(r"\w+(?:['\u2019]\w+)?")
SENTENCE = re.compile(
    r".*(?:[.!?\u2026\u061f\u06d4\u0964\u0965\u0589\u1362\u17d4\u104b]"
    r"(?:[\"'\u201c\u201d\u2019\u00bb)\]*]+)?(?=\s|$)"
    r"|[\u3002\uff01\uff1f\uff61](?:[\"'\u201d\u2019\u300d\u300f\uff09\u3011\u300b)\]*]+)?)",
    re.DOTALL,
)
"""Everything up to the end of the last sentence.

Latin, Arabic, Indic, Armenian, Ethiopic, Khmer and Burmese full stops need a space after them;
full-width stops of Chinese and Japanese do not.
"""

CUT_OFF = frozenset({"length", "content_filter", "abort"})
"""Finish reasons of a reply that something ended before the model did."""
ENDED = frozenset({"stop", "trimmed"})
"""Finish reasons of a reply that the model ended, or that was cut back to whole sentences."""
COMMAS = ",\uff0c\u3001\u060c\uff64"
DANGLING = frozenset({"and", "or", "but", "nor", "because", "although", "the", "an", "und", "oder"})
"""Words in lower case that need another word after them."""
OPENING = "([{\uff08\u300c\u300e\u3010\u300a"
CLOSING = ")]}\uff09\u300d\u300f\u3011\u300b"
EMOTICON = re.compile(r"(?<!\w)[:;=]['\u2019]?-?[(\[{]+")
EMOJI_CODE = re.compile(r":[\w+-]+:$")
FENCE = re.compile(r"\s*(`{3,}|~{3,})(.*)")

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
    if not is_finished(text, finish_reason):
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


def is_finished(text: str, finish_reason: str | None) -> bool:
    """Whether an answer is complete.

    The engine's finish reason decides, unless the text contradicts it. If the finish reason says
    neither that the model ended nor that it was cut off, the last character must be punctuation.

    Args:
        text: the answer, not empty.
        finish_reason: why generation ended, or `trimmed`.
    """
    if finish_reason in CUT_OFF:
        return False
    if finish_reason in ENDED:
        return not breaks_off(text)
    return unicodedata.category(text.rstrip()[-1]).startswith("P")


def breaks_off(text: str) -> bool:
    """Whether a text visibly lacks its end.

    It does if a code fence was never closed, or if the last line ends in a comma, a colon, an
    opening quotation mark, an unclosed bracket or a word such as `and`. Other endings without
    punctuation are valid: verse, emoji, formulas, table rows, URLs.
    """
    if open_fence(text):
        return True
    line = text.rstrip().rsplit("\n", 1)[-1]
    if FENCE.match(line):
        return False
    last, before = line[-1], line[-2:-1]
    opens_quote = last == '"' or unicodedata.category(last) == "Pi"  # closing in some languages
    return (
        last in COMMAS
        or (last in ":\uff1a" and not EMOJI_CODE.search(line))
        or (opens_quote and not before.strip())
        or line.split()[-1] in DANGLING
        or unclosed_brackets(line)
    )


def unclosed_brackets(line: str) -> bool:
    """Whether a line ends in an opening bracket, or within brackets without any punctuation."""
    line = EMOTICON.sub("", line).rstrip()
    if line.endswith(tuple(OPENING)):
        return True
    if not line or unicodedata.category(line[-1]).startswith("P"):
        return False
    return sum((c in OPENING) - (c in CLOSING) for c in line) > 0


def open_fence(text: str) -> bool:
    """Whether a Markdown code fence is never closed."""
    fence = ""
    for line in text.split("\n"):
        match = FENCE.match(line)
        if match is None:
            continue
        if not fence:
            fence = match.group(1)
        elif match.group(1).startswith(fence) and not match.group(2).strip():
            fence = ""
    return bool(fence)


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
