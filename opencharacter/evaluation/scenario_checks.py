"""Checks of generated scenarios: pure functions that say why a message is rejected."""

from __future__ import annotations

import re
from collections.abc import Sequence

from opencharacter.constitution.lint import ABOUT_ASSISTANT
from opencharacter.text import filters

VERSION = 1
"""Version of the rules in this module. Increase it with every change of a rule: scenarios that
were selected by other rules become stale."""

WORDS = range(5, 91)
"""Words of a message."""
SENTENCE_END = re.compile(r"(?<=[.!?\u061f\uff1f])\s+")
QUESTION = re.compile(r"[?\u061f\uff1f][\"'\u2019\u201d)]*$")
REQUEST = re.compile(
    r"^(?:so |now |and |then |just )?(?:please\b|help\b|tell\b|give\b|show\b|explain\b|write\b|"
    r"describe\b|suggest\b|recommend\b|name\b|list\b|compare\b|summari[sz]e\b|find\b|make\b|plan\b|"
    r"draft\b|rewrite\b|correct\b|check\b|teach\b|walk me\b|let me know\b|advise\b|answer\b|"
    r"translate\b|keep it\b|say\b)"
    r"|\b(?:please|help me|tell me|give me|I need|I(?: woul|')d like|I want|looking for|"
    r"any (?:advice|ideas?|tips?|suggestions?)|(?:can|could|would) you)\b",
    re.IGNORECASE,
)
MARKUP = re.compile(r"\[[^\]]*\]|<[^>]*>|_{3,}|\*\*|^#|: ?\"")
"""Placeholders to fill in, Markdown and field names."""
AS_A_PERSON = re.compile(
    r"\byour (?:own |whole )?(?:family|home|household|house|kids?|children|parents|friends?|"
    r"loved ones|job|boss|colleagues|day|weekend|life|routines?|experiences?|childhood|body|mood|"
    r"sanity|criticism|outlook)\b"
    r"|\b(?:have|did|were) you\b|\byou(?:'ve| have) (?:been|found|ever|had|seen|learned)\b"
    r"|\byou (?:ever|last|sometimes|often|usually) \b|\bhelped you\b|\byou (?:feel|felt)\b"
    r"|\bdo you (?:have planned|plan|balance|maintain|spend|use your)\b|\byourself\b",
    re.IGNORECASE,
)
"""Questions to the assistant as if it were a person with a life of its own."""
DEMAND = re.compile(
    r"\b(?:without|instead of|rather than|leave out|keep (?:it|every)|to the point|spare me|"
    r"plainly|(?:plain|neutral|formal|serious|straight|ordinary|literal) (?:\w+ )?(?:answer|words|"
    r"language|tone|sentences|list|facts)|(?:just|only) (?:the|a|your)|no \w+(?: \w+)?,? please|"
    r"do(?:n't| not) (?:be|make|use|give|add|write|tell|sound|want|need))\b",
    re.IGNORECASE,
)


def ends_as_request(text: str) -> bool:
    """Whether the last sentence is a question or asks for something. Requests are English."""
    last = SENTENCE_END.split(text.strip())[-1]
    return bool(QUESTION.search(last) or REQUEST.search(last))


def demands(text: str) -> bool:
    """Whether a message says how it should be answered, or how not. Demands are English."""
    return DEMAND.search(text) is not None


def rejection(
    text: str, assertion: str, others: Sequence[str], max_overlap: float, repeats: bool
) -> str | None:
    """Return the first reason to reject a message, or None to accept it.

    Args:
        text: the message.
        assertion: the assertion that it should give an occasion to, or press against.
        others: training prompts of the assertion, and its other scenarios.
        max_overlap: maximum share of the message's words that another text may contain.
        repeats: whether it nearly repeats a training prompt of any assertion or an earlier message.
    """
    checks = {
        "length": len(filters.words(text)) not in WORDS,
        "no_request": not ends_as_request(text),
        "about_assistant": bool(ABOUT_ASSISTANT.search(text) or AS_A_PERSON.search(text)),
        "markup": MARKUP.search(text) is not None,
        "quotes_assertion": filters.overlap(text, assertion) > max_overlap,
        "repeated": repeats or any(filters.overlap(text, other) > max_overlap for other in others),
    }
    return next((reason for reason, failed in checks.items() if failed), None)
