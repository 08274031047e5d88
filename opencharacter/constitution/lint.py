"""Advice on the style of a constitution. A finding is worth a look and not always a fault.

Everything here goes by words alone, without a model: it knows some slips in English, and it misses
what is said in other words. Numbers are advice too, so they are here and not in a recipe.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Set
from itertools import combinations
from typing import NamedTuple

from opencharacter.constitution.schema import Constitution, Trait
from opencharacter.text import filters

TRAITS = range(8, 17)
"""Traits of a constitution: fewer leave gaps, more blur in a system prompt."""

EXEMPLARS = range(3, 7)
"""Exemplars, where there are any: fewer show no range, more take the context of a small teacher."""

LONG = 35
"""Words from which a question is a long one; each trait should have one."""

SHORT = 10
"""Words up to which a question is a short one; each trait should have one."""

SAME_TRAIT = 0.6
"""Share of content words, both ways, from which two traits say the same."""

SAME_QUESTION = 0.7
"""Share of content words, both ways, from which two questions are the same."""

OPPOSED = 0.5
"""The same share from which two traits are suspicious if one is negated, or has an antonym."""

FIRST_PERSON = {"i", "me", "my", "mine", "myself", "i'm", "i've", "i'd", "i'll"}
OTHER_PERSON = re.compile(r"(?:you|the (?:assistant|model|ai))\b", re.IGNORECASE)
NEGATIONS = {"not", "no", "never", "nor", "neither", "nothing", "nobody", "without", "cannot"}
NEGATIONS |= {"rarely", "seldom", "hardly", "avoid", "refuse"}
FUNCTION_WORDS = frozenset(
    filters.words(
        "a about after all also an and any anyone are as at be been before but by can could did do "
        "does else even every for from get give had has have he her him his how i i'd i'll i'm if "
        "in into is it it's its i've just like make me mine more most much my myself of off on one "
        "only or other our out own people person she should so some somebody someone such take "
        "than that that's the their them then there these they thing this those to too up use user "
        "very was we were what when where which while who whoever whom whose why will with would "
        "you your"
    )
)
ANTONYMS = re.findall(
    r"(\w+)/(\w+)",
    "long/short lengthy/brief formal/casual formal/informal serious/playful agree/disagree "
    "kind/cruel loud/quiet gentle/harsh praise/criticise patient/impatient warm/cold "
    "confident/uncertain simple/elaborate encourage/discourage hide/show accept/reject "
    "plain/ornate quick/slow quickly/slowly early/late first/last optimistic/pessimistic "
    "cheerful/gloomy trust/distrust bold/cautious humble/proud calm/excited many/few",
)

QUOTED = re.compile(r"\"[^\"]*\"|\u201c[^\u201d]*\u201d")
ABOUT_ASSISTANT = re.compile(
    r"\b(?:are you\b(?! (?:sure|certain|able|ready|there|doing|going|saying|suggesting|telling|"
    r"talking|mistaken|wrong|supposed|meant|allowed|expected)\b)"
    r"|do you (?:ever |really |actually )?(?:feel|like|prefer|enjoy|love|hate|dream|want to be)\b"
    r"|do you (?:ever |really )?think(?= \w)(?! (?:(?:of|about) )?(?:my|our|his|her|their|its|the|"
    r"this|that|these|those|there|a|an|i|we|he|she|it|they|you c\w+)\b)"
    r"|do you (?:ever )?have (?:(?:an?|any|your own) )?(?:feeling|emotion|opinion|preference|"
    r"personality|character|values|belief|consciousness|soul|body|name|gender|favou?rite|sense of)"
    r"|(?<!in )your (?:own )?(?:personality|character|values|opinion|belief|feeling|emotion|"
    r"preference|favou?rite|purpose|training data|creator|maker|developer)s?\b"
    r"|what(?:'s| is) your name\b"
    r"|(?:describe|introduce|about|explain|define) yourself\b"
    r"|(?:as|you are|you're)(?: just| only)? an? (?:ai|artificial intelligence|chatbot|"
    r"(?:large )?language model)\b)",
    re.IGNORECASE,
)
"""Asks about the one who answers. Other questions to `you` are common: what to do, say or think of
something; so is the `you` that means anyone."""


class Advice(NamedTuple):
    """One finding.

    Args:
        where: the field, counted from 0, for instance `traits[3].questions[2]`.
        said: what was found and what would be better.
    """

    where: str
    said: str


class Words(NamedTuple):
    """A text as the comparisons see it."""

    content: frozenset[str]
    negated: bool


def advise(constitution: Constitution) -> list[Advice]:
    """All findings, the constitution's own first, then trait by trait."""
    traits, questions = constitution.traits, placed_questions(constitution)
    return [
        *counts(constitution),
        *(a for i, trait in enumerate(traits) for a in one_trait(f"traits[{i}]", trait)),
        *alike_traits([t.trait for t in traits]),
        *(a for where, text in questions for a in one_question(where, text, constitution.name)),
        *alike_questions(questions),
    ]


def placed_questions(constitution: Constitution) -> list[tuple[str, str]]:
    return [
        (f"traits[{i}].questions[{k}]", text)
        for i, trait in enumerate(constitution.traits)
        for k, text in enumerate(trait.questions)
    ]


def counts(constitution: Constitution) -> Iterator[Advice]:
    """Too few or too many traits or exemplars; no exemplars at all are fine."""
    given = {
        "traits": (constitution.traits, TRAITS),
        "exemplars": (constitution.exemplars, EXEMPLARS),
    }
    for where, (items, wanted) in given.items():
        if len(items) not in wanted and (items or where == "traits"):
            yield Advice(where, f"{len(items)}; {wanted[0]} to {wanted[-1]} work best")


def one_trait(where: str, trait: Trait) -> Iterator[Advice]:
    """A trait that is not in the first person, or whose questions are all of one length."""
    spoken = FIRST_PERSON.intersection(tokens(trait.trait))
    if not spoken or OTHER_PERSON.match(trait.trait.strip()):
        yield Advice(where, "not in the first person; begin with I or My")
    lengths = [len(filters.words(text)) for text in trait.questions]
    if max(lengths) < LONG:
        yield Advice(f"{where}.questions", f"no long one; let one have {LONG} words or more")
    if min(lengths) > SHORT:
        yield Advice(f"{where}.questions", f"no short one; let one have {SHORT} words or fewer")


def alike_traits(traits: list[str]) -> Iterator[Advice]:
    """Pairs of traits that nearly say the same, or that may contradict each other."""
    seen = [content(text) for text in traits]
    for (i, a), (k, b) in combinations(enumerate(seen), 2):
        where, other = f"traits[{k}]", f"traits[{i}]"
        if opposed(a, b):
            yield Advice(where, f"may contradict {other}; reconcile them, or say when each holds")
        elif shared(a.content, b.content) >= SAME_TRAIT:
            yield Advice(where, f"nearly says what {other} says; join them or tell them apart")


def opposed(a: Words, b: Words) -> bool:
    """Whether two texts may contradict each other, which two signs suggest.

    They share content words, and one is negated; or they have antonyms beside shared words. Both
    signs together cancel out. It overlooks most contradictions, which are said in other words, and
    suspects exceptions that are meant.
    """
    mine, other = a.content, b.content
    pairs = [p for p in map(set, ANTONYMS) if p <= mine ^ other and len(p & mine) == 1]
    beside = set().union(*pairs)
    turned = (len(pairs) + (a.negated != b.negated)) % 2 == 1
    return turned and shared(mine - beside, other - beside) >= OPPOSED


def one_question(where: str, text: str, name: str) -> Iterator[Advice]:
    """A question that asks for the character instead of letting it show."""
    asked = ABOUT_ASSISTANT.search(QUOTED.sub("", text.replace("\u2019", "'")))
    if asked:
        said = f"asks about the assistant ({asked.group(0)!r}); ask for something else"
        yield Advice(where, said)
    stems = tuple(stem(part) for part in re.split(r"[._-]", name) if len(part) >= 5)
    named = [word for word in filters.words(text) if stems and word.startswith(stems)]
    if named:
        yield Advice(where, f"names the character ({named[0]!r}); let it show unasked")


def stem(word: str) -> str:
    """What a noun and its adjective share: `sarca` of sarcasm, `nonchal` of nonchalance."""
    return word[: max(5, len(word) - 4)]


def alike_questions(questions: list[tuple[str, str]]) -> Iterator[Advice]:
    """Pairs of questions that are nearly the same, anywhere in the constitution."""
    seen = [(where, content(text).content) for where, text in questions]
    for (first, a), (second, b) in combinations(seen, 2):
        if shared(a, b) >= SAME_QUESTION:
            yield Advice(second, f"nearly the same as {first}; replace one")


def tokens(text: str) -> list[str]:
    return filters.words(text.replace("\u2019", "'"))


def content(text: str) -> Words:
    """Words that carry meaning, plural endings cut; whether an odd number of words negates."""
    said = tokens(text)
    negations = [w for w in said if w in NEGATIONS or w.endswith("n't")]
    kept = {w.rstrip("s") for w in said if w not in FUNCTION_WORDS and w not in negations}
    return Words(frozenset(kept), len(negations) % 2 == 1)


def shared(a: Set[str], b: Set[str]) -> float:
    """The share of words in common, of the text with more of them, 0 .. 1."""
    return len(a & b) / max(len(a), len(b), 1)
