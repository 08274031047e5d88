"""Why an answer may not be trained on: pure functions that return a `drop_reason` or None."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

WORDS = re.compile(r"\w+(?:'\w+)?")
SENTENCE = re.compile(r".*[.!?\u2026](?:[\"'\u201d\u2019)\]*]+)?(?=\s|$)", re.DOTALL)


def words(text: str) -> list[str]:
    """Lower-case words."""
    return WORDS.findall(text.lower())


def fault(text: str, finish_reason: str, max_repeated: float) -> str | None:
    """The first reason not to use an answer: empty, unfinished or looping."""
    if not text.strip():
        return "empty"
    if finish_reason == "length" or not ends_in_punctuation(text):
        return "unfinished"
    return "looping" if repeated_share(text) > max_repeated else None


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
    """Replace whole-word mentions of any of the names, whatever their case."""
    if not names:
        return text
    longest_first = sorted(names, key=len, reverse=True)
    pattern = r"\b(?:" + "|".join(map(re.escape, longest_first)) + r")\b"
    return re.sub(pattern, lambda _: by, text, flags=re.IGNORECASE)
