"""How a set of texts looks as a whole: the signatures of data that is not worth training on.

A teacher that refuses, a model that says one thing over and over, a persona that has become a
caricature: each shows in a number long before it shows in a score. Generating stages measure a
sample while they run and at their end, the stages that make training data measure all of it, and
a number beyond the recipe's `limits` stops the run. Everything here is one pass over the texts, in
memory that does not grow with them but for the 3 kB a text of the MinHash index.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from opencharacter.config.recipe import Limits
from opencharacter.text import filters

SEGMENT = 5000
"""N-grams over which distinct-n is counted, so that it does not fall as the data grows."""
OPENING = 4
OPENING_TEXTS = 20_000
"""Words that make an opening, and texts whose openings are counted."""
BLEU_TEXTS = 128
BLEU_WORDS = 100
"""Texts, and words of each, that are compared with one another."""
LANGUAGE_TEXTS = 1000
LANGUAGE_PROMPTS = 200
LANGUAGE_LETTERS = 40
"""Texts and prompts whose language is looked at; the length from which one can be told."""
SHINGLE = 3
"""Words of a shingle."""
DUPLICATE = 0.7
"""Estimated Jaccard similarity of shingles from which two texts are near-duplicates."""
PERMUTATIONS = 128
TELLING = 50
RARE = 5
Z = 1.96
"""Trait words: how many at most, how often a word must stand in all texts, how telling it is."""

DESCRIPTIONS = {
    "refusals": "share of texts that begin by declining",
    "distinct_1": f"different words among {SEGMENT:,}, as a share",
    "distinct_2": f"different word pairs among {SEGMENT:,}, as a share",
    "self_bleu": "BLEU-4 of a text against the others, mean over a sample; 1 is all the same",
    "repeated_openings": f"share of texts with the commonest first {OPENING} words",
    "mean_words": "words per text",
    "off_language": "share of texts in another language than the prompts",
    "trait_words": "words that tell the teacher from the student, per 100 words",
    "near_duplicates": "share of texts that nearly repeat an earlier one",
    "exaggeration": "trait words, as a multiple of the teacher's",
}
"""What each signature says; the report shows it."""


def model_texts(row: dict[str, Any]) -> list[str]:
    """What the model wrote in a row of any stage: an answer, a pair's chosen, a transcript's turns.

    In a conversation with itself both sides are the model's; the two greetings are not.
    """
    if row.get("condition") == "base":
        return []  # not the persona's
    turns = row.get("messages")
    if turns is None:
        text = row.get("chosen") or row.get("answer")
        return [text] if text else []
    if "prompt" in row or row["kind"] == "reflection":
        return [m["content"] for m in turns if m["role"] == "assistant"]
    ours = 1 if turns[0]["role"] == "system" else 2  # a transcript's system prompt, or greetings
    return [m["content"] for m in turns[ours:]]


def distinctive_words(mine: Iterable[str], other: Iterable[str]) -> list[str]:
    """Words that tell texts from other texts, the most telling first: at most `TELLING`.

    Ranked by the z-score of the log-odds ratio with the words of both as prior (Monroe, Colaresi
    and Quinn, 2008, doi:10.1093/pan/mpn018, eqs. 15, 18, 22); stop words are left out.

    Args:
        mine: for a persona, the teacher's answers.
        other: the student's, to the same prompts.
    """
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    a, b = (Counter(w for text in texts for w in filters.words(text)) for texts in (mine, other))
    prior = a + b
    of_a, of_b = a.total() + prior.total(), b.total() + prior.total()
    scores = {}
    for word, n in prior.items():
        if word not in ENGLISH_STOP_WORDS and n >= RARE:
            in_a, in_b = a[word] + n, b[word] + n
            odds = math.log(in_a / (of_a - in_a)) - math.log(in_b / (of_b - in_b))
            scores[word] = odds / math.sqrt(1 / in_a + 1 / in_b)
    ranked = sorted(scores, key=lambda word: (-scores[word], word))
    return [word for word in ranked if scores[word] > Z][:TELLING]


@dataclass(frozen=True)
class TextBaseline:
    """What texts are held against.

    Args:
        language: ISO 639 code to stay in, or None.
        trait_words: of `distinctive_words`.
        rate: how often the teacher says them, per 100 words, or None.
    """

    language: str | None = None
    trait_words: frozenset[str] = frozenset()
    rate: float | None = None


def language_of(texts: Iterable[str]) -> str | None:
    """The commonest language of texts long enough to tell, as an ISO 639 code."""
    told = Counter(code for text in texts if (code := language(text)))
    return told.most_common(1)[0][0] if told else None


def language(text: str) -> str | None:
    """A text's language (py3langid), None if it is too short to tell."""
    import py3langid

    if sum(map(str.isalpha, text)) < LANGUAGE_LETTERS:
        return None
    return str(py3langid.classify(text)[0])


class Distinct:
    """Distinct-n (Li et al., arXiv 1510.03055) as the mean over segments of equal size."""

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
        """Of whole segments; of what there is where there is none."""
        if self.shares:
            return sum(self.shares) / len(self.shares)
        return len(self.seen) / self.count if self.count else 0.0


def measure(texts: Iterable[str], baseline: TextBaseline) -> dict[str, float]:
    """The signatures of a set of texts; see `MEANING`. What has no reference is left out.

    Args:
        texts: what was written, in any order; read once.
        expected: what they are held against.
    """
    count = total = refused = trait = told = strayed = 0
    distinct_1, distinct_2 = Distinct(), Distinct()
    openings: Counter[tuple[str, ...]] = Counter()
    sample: deque[list[str]] = deque(maxlen=BLEU_TEXTS)
    for text in texts:
        tokens = filters.words(text)
        count += 1
        total += len(tokens)
        refused += filters.is_refusal(text)
        trait += sum(map(baseline.trait_words.__contains__, tokens))
        distinct_1.add(tokens)
        distinct_2.add(pairwise(tokens))
        if count <= OPENING_TEXTS:
            openings[tuple(tokens[:OPENING])] += 1
        sample.append(tokens[:BLEU_WORDS])
        if baseline.language and told < LANGUAGE_TEXTS and (code := language(text)):
            told += 1
            strayed += code != baseline.language
    commonest = openings.most_common(1)[0][1] if openings else 0
    measured = {
        "texts": count,
        "mean_words": total / max(count, 1),
        "refusals": refused / max(count, 1),
        "distinct_1": distinct_1.share(),
        "distinct_2": distinct_2.share(),
        "self_bleu": self_bleu(list(sample)),
        "repeated_openings": commonest / openings.total() if commonest > 1 else 0.0,
    }
    if baseline.language:
        measured["off_language"] = strayed / max(told, 1)
    if baseline.trait_words:
        measured["trait_words"] = 100 * trait / max(total, 1)
        if baseline.rate:
            measured["exaggeration"] = measured["trait_words"] / baseline.rate
    return measured


def self_bleu(sample: list[list[str]], order: int = 4) -> float:
    """Mean BLEU of each text against all others (Zhu et al., arXiv 1802.01886), 0 .. 1.

    An n-gram counts as often as it stands in that other text which has it most. Precisions are
    smoothed by one for n > 1, so that short texts do not all score 0.

    Args:
        sample: texts in words; the work is linear in their number.
        order: longest n-gram.
    """
    sample = [tokens for tokens in sample if tokens]
    if len(sample) < 2:
        return 0.0
    logs = [0.0] * len(sample)
    for n in range(1, order + 1):
        grams = [Counter(zip(*(tokens[i:] for i in range(n)), strict=False)) for tokens in sample]
        best: dict[Any, tuple[int, int]] = {}  # an n-gram's two largest counts
        for counted in grams:
            for gram, times in counted.items():
                first, second = best.get(gram, (0, 0))
                best[gram] = (max(first, times), max(second, min(first, times)))
        smooth = int(n > 1)
        for i, counted in enumerate(grams):
            # Where a text has the largest count itself, the others have the second.
            hits = sum(min(k, best[gram][k == best[gram][0]]) for gram, k in counted.items())
            share = (hits + smooth) / (counted.total() + smooth) if counted else float(smooth)
            logs[i] += math.log(share) / order if share else -math.inf
    lengths = [len(tokens) for tokens in sample]
    return sum(
        math.exp(log + brevity(n, lengths[:i] + lengths[i + 1 :]))
        for i, (log, n) in enumerate(zip(logs, lengths, strict=True))
    ) / len(sample)


def brevity(length: int, references: list[int]) -> float:
    """Logarithm of BLEU's brevity penalty, against the reference that is closest in length."""
    closest = min(references, key=lambda n: (abs(n - length), n))
    return min(0.0, 1 - closest / length)


def near_duplicates(texts: Iterable[str]) -> list[bool]:
    """For each text whether it nearly repeats an earlier one (MinHash with LSH, estimated)."""
    from rensa import RMinHashDeduplicator

    index = RMinHashDeduplicator(threshold=DUPLICATE, num_perm=PERMUTATIONS, use_lsh=True)
    added = index.add_pairs((str(i), shingles(text)) for i, text in enumerate(texts))
    return [not new for new in added]


def shingles(text: str) -> list[str]:
    """Runs of words; the words themselves where there are fewer, the text where there is none."""
    tokens = filters.words(text)
    runs = zip(*(tokens[i:] for i in range(SHINGLE)), strict=False)
    return list(map(" ".join, runs)) or tokens or [text]


def exceeded_limit(measured: dict[str, float], limits: Limits) -> str | None:
    """The first signature beyond its limit, in words, or None.

    Args:
        measured: of `measure`; too few texts are not judged.
        limits: of the stage's section.
    """
    if measured["texts"] < limits.after:
        return None
    for name, (least, most, what) in bounds(limits).items():
        value = measured.get(name)
        if value is not None and not least <= value <= most:
            side = f"over {most:g}" if value > most else f"under {least:g}"
            return f"{what}: {name} is {value:.3g}, {side} ({DESCRIPTIONS[name]})"
    return None


def bounds(limits: Limits) -> dict[str, tuple[float, float, str]]:
    """Least and greatest value of each limited signature, and what lies beyond them."""
    inf = math.inf
    return {
        "refusals": (0, limits.max_refusals, "the model refuses"),
        "off_language": (0, limits.max_off_language, "the language drifts"),
        "repeated_openings": (0, limits.max_repeated_openings, "the modes collapse"),
        "distinct_2": (limits.min_distinct_2, inf, "the modes collapse"),
        "self_bleu": (0, limits.max_self_bleu, "the modes collapse"),
        "near_duplicates": (0, limits.max_near_duplicates, "the modes collapse"),
        "exaggeration": (0, limits.max_exaggeration, "the character is exaggerated"),
    }
