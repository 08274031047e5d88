"""The linter of constitutions: advice on style. A finding is worth a look, not always a fault.

The linter checks wording only and runs no model. It recognizes some English patterns, and misses
what is expressed in other words. Its thresholds are part of the advice, so they are here and not in
a recipe.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Set
from itertools import combinations
from typing import NamedTuple

from opencharacter.constitution.schema import Constitution, Trait, comparable
from opencharacter.text import filters

TRAITS = range(8, 17)
"""Recommended number of traits: fewer leave gaps, more blur in a system prompt."""

EXEMPLARS = range(3, 7)
"""Recommended number of exemplars, if there are any: fewer show too little variety, more fill the
context of a small teacher."""

LONG = 35
"""Number of words from which a question is long; each trait should have a long one."""

SHORT = 10
"""Number of words up to which a question is short; each trait should have a short one."""

SIMILAR_TRAITS = 0.6
"""Share of common content words from which two traits state nearly the same."""

SIMILAR_QUESTIONS = 0.7
"""Share of common content words from which two questions are nearly the same."""

OPPOSED_TRAITS = 0.5
"""Share of common content words from which two traits may contradict each other, if one of them is
negated or they contain antonyms."""

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
"""Questions about the assistant itself. Many other questions use `you`: what to do, or what it
thinks of something, and the `you` that means anyone."""


class Finding(NamedTuple):
    """A finding of the linter.

    Args:
        where: the field, counted from 0, for example `traits[3].questions[2]`.
        message: what was found, and what would be better.
    """

    where: str
    message: str


class ContentWords(NamedTuple):
    """The words of a text that carry its meaning, and whether the text is negated."""

    words: frozenset[str]
    negated: bool


def lint(constitution: Constitution) -> list[Finding]:
    """Return all findings: first on the whole constitution, then trait by trait."""
    traits = constitution.traits
    questions = [*located_questions(constitution), *located_occasions(constitution)]
    return [
        *lint_counts(constitution),
        *(f for i, trait in enumerate(traits) for f in lint_trait(f"traits[{i}]", trait)),
        *similar_traits([t.trait for t in traits]),
        *(f for where, text in questions for f in lint_question(where, text, constitution.name)),
        *similar_questions(questions),
    ]


def located_questions(constitution: Constitution) -> list[tuple[str, str]]:
    """Return each question with its field."""
    return [
        (f"traits[{i}].questions[{k}]", text)
        for i, trait in enumerate(constitution.traits)
        for k, text in enumerate(trait.questions)
    ]


def located_occasions(constitution: Constitution) -> list[tuple[str, str]]:
    """Return each occasion among the scenarios with its field."""
    return [
        (f"traits[{i}].scenarios.occasions[{k}]", text)
        for i, trait in enumerate(constitution.traits)
        for k, text in enumerate(trait.scenarios.occasions)
    ]


def lint_counts(constitution: Constitution) -> Iterator[Finding]:
    """Check the number of traits and exemplars; having no exemplars is fine."""
    checks = {
        "traits": (len(constitution.traits), TRAITS),
        "exemplars": (len(constitution.exemplars), EXEMPLARS),
    }
    for where, (count, recommended) in checks.items():
        if count not in recommended and (count or where == "traits"):
            yield Finding(where, f"{count}; {recommended[0]} to {recommended[-1]} work best")


def lint_trait(where: str, trait: Trait) -> Iterator[Finding]:
    """Check that a trait is in the first person, and that its questions vary in length."""
    spoken = FIRST_PERSON.intersection(word_list(trait.trait))
    if not spoken or OTHER_PERSON.match(trait.trait.strip()):
        yield Finding(where, "not in the first person; begin with I or My")
    lengths = [len(filters.words(text)) for text in trait.questions]
    if max(lengths) < LONG:
        yield Finding(f"{where}.questions", f"no long one; let one have {LONG} words or more")
    if min(lengths) > SHORT:
        yield Finding(f"{where}.questions", f"no short one; let one have {SHORT} words or fewer")


def similar_traits(traits: list[str]) -> Iterator[Finding]:
    """Find pairs of traits that state nearly the same, or that may contradict each other."""
    analyzed = [content_words(text) for text in traits]
    for (i, a), (k, b) in combinations(enumerate(analyzed), 2):
        where, earlier = f"traits[{k}]", f"traits[{i}]"
        if may_contradict(a, b):
            yield Finding(
                where, f"may contradict {earlier}; reconcile them, or say when each holds"
            )
        elif overlap(a.words, b.words) >= SIMILAR_TRAITS:
            yield Finding(
                where, f"states nearly the same as {earlier}; join them, or make them distinct"
            )


def may_contradict(a: ContentWords, b: ContentWords) -> bool:
    """Return whether two texts may contradict each other.

    They do if they have content words in common and one of them is negated, or if they contain
    antonyms beside common words; both together cancel out. This misses most contradictions, which
    use other words, and also flags intended exceptions.
    """
    antonyms = [
        pair
        for pair in map(set, ANTONYMS)
        if pair <= a.words ^ b.words and len(pair & a.words) == 1
    ]
    apart = set().union(*antonyms)
    opposite = (len(antonyms) + (a.negated != b.negated)) % 2 == 1
    return opposite and overlap(a.words - apart, b.words - apart) >= OPPOSED_TRAITS


def lint_question(where: str, text: str, name: str) -> Iterator[Finding]:
    """Check that a question lets the character show instead of asking for it."""
    match = ABOUT_ASSISTANT.search(QUOTED.sub("", text.replace("\u2019", "'")))
    if match:
        yield Finding(
            where, f"asks about the assistant ({match.group(0)!r}); ask about something else"
        )
    stems = tuple(stem(part) for part in re.split(r"[._-]", name) if len(part) >= 5)
    named = [word for word in filters.words(text) if stems and word.startswith(stems)]
    if named:
        yield Finding(where, f"names the character ({named[0]!r}); let it show without asking")


def stem(word: str) -> str:
    """Return what a noun and its adjective have in common: `sarca` of sarcasm and sarcastic."""
    return word[: max(5, len(word) - 4)]


def similar_questions(questions: list[tuple[str, str]]) -> Iterator[Finding]:
    """Find pairs of questions that are the same or nearly so, anywhere in the constitution."""
    analyzed = [(where, text, content_words(text).words) for where, text in questions]
    for (first, text, a), (second, other, b) in combinations(analyzed, 2):
        if comparable(text) == comparable(other):
            yield Finding(second, f"the same as {first}, where alone it counts; replace one")
        elif overlap(a, b) >= SIMILAR_QUESTIONS:
            yield Finding(second, f"nearly the same as {first}; replace one")


def word_list(text: str) -> list[str]:
    """Return a text's words in lower case, with straight apostrophes."""
    return filters.words(text.replace("\u2019", "'"))


def content_words(text: str) -> ContentWords:
    """Return the words that carry meaning, without plural endings, and whether they are negated."""
    words = word_list(text)
    negations = [word for word in words if word in NEGATIONS or word.endswith("n't")]
    kept = {
        word.rstrip("s") for word in words if word not in FUNCTION_WORDS and word not in negations
    }
    return ContentWords(frozenset(kept), len(negations) % 2 == 1)


def overlap(a: Set[str], b: Set[str]) -> float:
    """Return the share of common words, 0 to 1, relative to the text with more words."""
    return len(a & b) / max(len(a), len(b), 1)
