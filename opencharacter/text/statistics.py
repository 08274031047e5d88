"""Statistics of a set of texts, which show when generated data is not fit for training.

A teacher that refuses, a model that repeats itself and a persona that has become a caricature each
show in a statistic long before they show in a score. Stages that generate measure a sample of their
texts while they run and at their end; stages that make training data measure all texts. A statistic
that exceeds one of the recipe's `limits` stops the run.

Every statistic takes one pass over the texts. Memory does not grow with their number, except for
3 kB per text in the MinHash index.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from opencharacter.config.roles import Limits
from opencharacter.text import filters

VERSION = 1
"""Version of the rules in this module that decide which rows are kept: `near_duplicates`.

Increase it with every change of such a rule: datasets that were made by other rules become stale.
"""

SEGMENT = 5000
"""N-grams per segment of distinct-n. A fixed size keeps it from falling as the data grows."""
OPENING = 4
"""Words of an opening."""
OPENING_TEXTS = 20_000
"""Texts whose openings are counted."""
BLEU_TEXTS = 128
"""Texts that self-BLEU compares with one another."""
BLEU_WORDS = 100
"""Words of each of these texts."""
LANGUAGE_TEXTS = 1000
"""Texts whose language is detected."""
LANGUAGE_PROMPTS = 200
"""Prompts whose language is detected."""
LANGUAGE_LETTERS = 40
"""Letters that a text needs for its language to be detected."""
SHINGLE = 3
"""Words of a shingle."""
DUPLICATE = 0.7
"""Estimated Jaccard similarity of their shingles from which two texts are near-duplicates."""
PERMUTATIONS = 128
"""Permutations of MinHash."""
MAX_TRAIT_WORDS = 50
"""Greatest number of trait words."""
MIN_WORD_COUNT = 5
"""Occurrences that a trait word needs in all texts."""
MIN_Z_SCORE = 1.96
"""Z-score that a trait word needs."""

DESCRIPTIONS = {
    "refusals": "share of texts that begin with a refusal",
    "distinct_1": f"share of different words in {SEGMENT:,}",
    "distinct_2": f"share of different word pairs in {SEGMENT:,}",
    "self_bleu": "mean BLEU-4 of a text against the others in a sample; 1 if all are the same",
    "repeated_openings": f"share of texts with the most frequent first {OPENING} words",
    "mean_words": "words per text",
    "off_language": "share of texts in another language than the prompts",
    "trait_words": "words that distinguish the teacher from the student, per 100 words",
    "near_duplicates": "share of texts that nearly repeat an earlier one",
    "exaggeration": "rate of trait words, as a multiple of the teacher's",
}
"""What each statistic measures, as the report shows it."""


def model_texts(row: dict[str, Any]) -> list[str]:
    """Return the texts that the model wrote in a row of any stage.

    That is an answer, the chosen answer of a pair, or the turns of a transcript. In a conversation
    of the model with itself both sides count, but not the two greetings.
    """
    if row.get("condition") == "base":
        return []  # the base model wrote it, not the persona
    turns = row.get("messages")
    if turns is None:
        text = row.get("chosen") or row.get("answer")
        return [text] if text else []
    if "prompt" in row or row["kind"] == "reflection":
        return [m["content"] for m in turns if m["role"] == "assistant"]
    start = 1 if turns[0]["role"] == "system" else 2  # skip the system prompt or the greetings
    return [m["content"] for m in turns[start:]]


def distinctive_words(texts: Iterable[str], others: Iterable[str]) -> list[str]:
    """Return the words that distinguish some texts from others, the most distinctive first.

    Words are ranked by the z-score of their log-odds ratio, with the words of both sets as prior
    (Monroe, Colaresi and Quinn, 2008, doi:10.1093/pan/mpn018, eqs. 15, 18, 22). Stop words are left
    out.

    Args:
        texts: for a persona, the teacher's answers.
        others: the student's answers to the same prompts.

    Returns:
        At most `MAX_TRAIT_WORDS` words.
    """
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    a, b = (Counter(w for text in side for w in filters.words(text)) for side in (texts, others))
    prior = a + b
    total_a, total_b = a.total() + prior.total(), b.total() + prior.total()
    scores = {}
    for word, n in prior.items():
        if word not in ENGLISH_STOP_WORDS and n >= MIN_WORD_COUNT:
            in_a, in_b = a[word] + n, b[word] + n
            odds = math.log(in_a / (total_a - in_a)) - math.log(in_b / (total_b - in_b))
            scores[word] = odds / math.sqrt(1 / in_a + 1 / in_b)
    ranked = sorted(scores, key=lambda word: (-scores[word], word))
    return [word for word in ranked if scores[word] > MIN_Z_SCORE][:MAX_TRAIT_WORDS]


@dataclass(frozen=True)
class TextBaseline:
    """What texts are compared with.

    Args:
        language: ISO 639 code of the language that they should have, or None.
        trait_words: the persona's `distinctive_words`.
        rate: the teacher's trait words per 100 words, or None.
    """

    language: str | None = None
    trait_words: frozenset[str] = frozenset()
    rate: float | None = None


def language_of(texts: Iterable[str]) -> str | None:
    """Return the most frequent language of some texts (ISO 639), or None if all are too short."""
    codes = Counter(code for text in texts if (code := language(text)))
    return codes.most_common(1)[0][0] if codes else None


def language(text: str) -> str | None:
    """Detect a text's language with py3langid; None if the text is too short."""
    import py3langid

    if sum(map(str.isalpha, text)) < LANGUAGE_LETTERS:
        return None
    return str(py3langid.classify(text)[0])


class Distinct:
    """Distinct-n (Li et al., arXiv 1510.03055), averaged over segments of equal size."""

    def __init__(self):
        self.seen: set[Any] = set()
        self.count = 0
        self.shares: list[float] = []

    def add(self, grams: Iterable[Any]) -> None:
        for gram in grams:
            self.seen.add(gram)
            self.count += 1
            if self.count == SEGMENT:
                self.shares.append(len(self.seen) / SEGMENT)
                self.seen, self.count = set(), 0

    def share(self) -> float:
        """Return the mean over complete segments; of the incomplete one if there is no other."""
        if self.shares:
            return sum(self.shares) / len(self.shares)
        return len(self.seen) / self.count if self.count else 0.0


def measure(texts: Iterable[str], baseline: TextBaseline) -> dict[str, float]:
    """Compute the statistics of a set of texts; see `DESCRIPTIONS`.

    Args:
        texts: in any order; iterated once.
        baseline: what they are compared with. Statistics without a baseline are left out.

    Returns:
        The statistics by name, and the number of `texts`.
    """
    count = total = refusals = trait_words = detected = off_language = 0
    distinct_1, distinct_2 = Distinct(), Distinct()
    openings: Counter[tuple[str, ...]] = Counter()
    sample: deque[list[str]] = deque(maxlen=BLEU_TEXTS)
    for text in texts:
        tokens = filters.words(text)
        count += 1
        total += len(tokens)
        refusals += filters.is_refusal(text)
        trait_words += sum(map(baseline.trait_words.__contains__, tokens))
        distinct_1.add(tokens)
        distinct_2.add(pairwise(tokens))
        if count <= OPENING_TEXTS:
            openings[tuple(tokens[:OPENING])] += 1
        sample.append(tokens[:BLEU_WORDS])
        if baseline.language and detected < LANGUAGE_TEXTS and (code := language(text)):
            detected += 1
            off_language += code != baseline.language
    most_frequent = openings.most_common(1)[0][1] if openings else 0
    statistics = {
        "texts": count,
        "mean_words": total / max(count, 1),
        "refusals": refusals / max(count, 1),
        "distinct_1": distinct_1.share(),
        "distinct_2": distinct_2.share(),
        "self_bleu": self_bleu(list(sample)),
        "repeated_openings": most_frequent / openings.total() if most_frequent > 1 else 0.0,
    }
    if baseline.language:
        statistics["off_language"] = off_language / max(detected, 1)
    if baseline.trait_words:
        statistics["trait_words"] = 100 * trait_words / max(total, 1)
        if baseline.rate:
            statistics["exaggeration"] = statistics["trait_words"] / baseline.rate
    return statistics


def self_bleu(sample: list[list[str]], order: int = 4) -> float:
    """Compute the mean BLEU of each text against all others (Zhu et al., arXiv 1802.01886).

    The count of an n-gram is clipped to its greatest count in any other text. Precisions for n > 1
    are smoothed by one, so that short texts do not all score 0.

    Args:
        sample: texts as lists of words; the run time is linear in their number.
        order: length of the longest n-gram.

    Returns:
        The mean, in [0, 1].
    """
    sample = [tokens for tokens in sample if tokens]
    if len(sample) < 2:
        return 0.0
    logs = [0.0] * len(sample)
    for n in range(1, order + 1):
        grams = [Counter(zip(*(tokens[i:] for i in range(n)), strict=False)) for tokens in sample]
        best: dict[Any, tuple[int, int]] = {}  # the two largest counts of each n-gram
        for counted in grams:
            for gram, times in counted.items():
                first, second = best.get(gram, (0, 0))
                best[gram] = (max(first, times), max(second, min(first, times)))
        smooth = int(n > 1)
        for i, counted in enumerate(grams):
            # If this text has the largest count itself, the others have the second largest.
            hits = sum(min(k, best[gram][k == best[gram][0]]) for gram, k in counted.items())
            share = (hits + smooth) / (counted.total() + smooth) if counted else float(smooth)
            logs[i] += math.log(share) / order if share else -math.inf
    lengths = [len(tokens) for tokens in sample]
    return sum(
        math.exp(log + brevity(n, lengths[:i] + lengths[i + 1 :]))
        for i, (log, n) in enumerate(zip(logs, lengths, strict=True))
    ) / len(sample)


def brevity(length: int, references: list[int]) -> float:
    """Return the logarithm of BLEU's brevity penalty for the reference closest in length."""
    closest = min(references, key=lambda n: (abs(n - length), n))
    return min(0.0, 1 - closest / length)


def near_duplicates(texts: Iterable[str]) -> list[bool]:
    """Say for each text whether it nearly repeats an earlier one, estimated by MinHash and LSH."""
    from rensa import RMinHashDeduplicator

    index = RMinHashDeduplicator(threshold=DUPLICATE, num_perm=PERMUTATIONS, use_lsh=True)
    added = index.add_pairs((str(i), shingles(text)) for i, text in enumerate(texts))
    return [not new for new in added]


def shingles(text: str) -> list[str]:
    """Return a text's word n-grams; its words if there are too few, itself if there are none."""
    tokens = filters.words(text)
    ngrams = zip(*(tokens[i:] for i in range(SHINGLE)), strict=False)
    return list(map(" ".join, ngrams)) or tokens or [text]


def exceeded_limit(statistics: dict[str, float], limits: Limits) -> str | None:
    """Describe the first statistic that exceeds its limit; None if all are within their limits.

    Args:
        statistics: of `measure`. Fewer than `limits.min_texts` texts are not judged.
        limits: of the stage's config.
    """
    if statistics["texts"] < limits.min_texts:
        return None
    for name, (least, most, problem) in allowed_ranges(limits).items():
        value = statistics.get(name)
        if value is not None and not least <= value <= most:
            side = f"over {most:g}" if value > most else f"under {least:g}"
            return f"{problem}: {name} is {value:.3g}, {side} ({DESCRIPTIONS[name]})"
    return None


def allowed_ranges(limits: Limits) -> dict[str, tuple[float, float, str]]:
    """Return the least and greatest value of each limited statistic, and the problem beyond it."""
    inf = math.inf
    return {
        "refusals": (0, limits.max_refusals, "the model refuses"),
        "off_language": (0, limits.max_off_language, "the language drifts"),
        "repeated_openings": (0, limits.max_repeated_openings, "the texts repeat themselves"),
        "distinct_2": (limits.min_distinct_2, inf, "the texts repeat themselves"),
        "self_bleu": (0, limits.max_self_bleu, "the texts repeat themselves"),
        "near_duplicates": (0, limits.max_near_duplicates, "the texts repeat themselves"),
        "exaggeration": (0, limits.max_exaggeration, "the character is exaggerated"),
    }
