"""Stage evaluation/coherence: in whose answer does the character come through more naturally?

The judge reads the constitution and two answers to the same prompt, the trained persona's and
another condition's, in both orders. Only a verdict that both orders give alike is a win for anyone;
the others are counted as inconsistent.

Reads: evaluation/answers, evaluation/judge. Writes: prompt, rival, answer, rival_answer, verdicts,
winner.
Run: opencharacter run RECIPE --constitution NAME --only evaluation/coherence
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pyarrow as pa

from opencharacter.config.recipe import Coherence, Sampling
from opencharacter.engines.conversations import Conversation, Row
from opencharacter.engines.spec import engine_spec
from opencharacter.evaluation import judge
from opencharacter.evaluation.scores import Score, repeated
from opencharacter.runtime.stage import Estimate, Job, ResourceRequest, StageResult, kept
from opencharacter.text.chat import Message, fill, row_id, system, user

SYSTEM = "You compare two answers. You reply with one letter, A or B."

QUESTION = """\
A character, in its own words:
{assertions}

A message:
{prompt}

Answer A:
{first}

Answer B:
{second}

In which answer does this character come through more clearly and more naturally? Reply with A \
or B."""

TEMPLATES = (SYSTEM, QUESTION)

FULL = "full"
INCONSISTENT, UNREADABLE = "inconsistent", "unreadable"

FIELDS = [
    pa.field("prompt", pa.string(), nullable=False),
    pa.field("rival", pa.string(), nullable=False),
    pa.field("answer", pa.string(), nullable=False),
    pa.field("rival_answer", pa.string(), nullable=False),
    pa.field("verdicts", pa.list_(pa.string())),
    pa.field("winner", pa.string()),
]


def messages(assertions: str, prompt: str, first: str, second: str) -> list[Message]:
    """The judge's question about two answers."""
    asked = fill(QUESTION, assertions=assertions, prompt=prompt, first=first, second=second)
    return [system(SYSTEM), user(asked)]


def read_letter(text: str) -> str | None:
    """The letter that a verdict names; None if it names both or neither."""
    named = set(re.findall(r"\b[AB]\b", text))
    return named.pop() if len(named) == 1 else None


def winner(full_first: str | None, full_second: str | None, rival: str) -> str:
    """Who won, from the letters said with the persona's answer first and second.

    Returns:
        `full`, the rival, `inconsistent` or `unreadable`.
    """
    if full_first is None or full_second is None:
        return UNREADABLE
    won = (full_first == "A", full_second == "B")
    return {(True, True): FULL, (False, False): rival}.get(won, INCONSISTENT)


async def compare(
    row: Row, talk: Conversation, assertions: str, sampling: Sampling, thinking_budget: int
) -> Row:
    """Ask the judge in both orders."""
    said = []
    for first, second in (
        (row["answer"], row["rival_answer"]),
        (row["rival_answer"], row["answer"]),
    ):
        asked = messages(assertions, row["prompt"], first, second)
        said.append(await judge.ask(talk, asked, sampling, thinking_budget))
    letters = [read_letter(text) for text in said]
    return {"verdicts": said, "winner": winner(letters[0], letters[1], row["rival"])}


def requests(job: Job, answers: list[Row]) -> list[Row]:
    """The persona's answer beside each other condition's, on the first prompts by their hash."""
    said = {(row["prompt"], row["condition"]): row["answer"] for row in answers if row["answer"]}
    prompts = sorted({prompt for prompt, condition in said if condition == FULL}, key=row_id)
    rivals = [c for c in job.recipe.evaluation.answers.conditions if c != FULL]
    return [
        {
            "id": row_id(job.stage.name, job.scope, prompt, rival),
            "prompt": prompt,
            "rival": rival,
            "answer": said[prompt, FULL],
            "rival_answer": said[prompt, rival],
        }
        for prompt in prompts[: job.config.prompts]
        for rival in rivals
        if (prompt, rival) in said
    ]


def win_rate(rows: list[Row]) -> Score:
    """Share of the decided comparisons that the persona won; the undecided are unscored."""
    decided = [row for row in rows if row["winner"] not in (INCONSISTENT, UNREADABLE)]
    wins = [row["winner"] == FULL for row in decided]
    return repeated(wins, (row["prompt"] for row in decided), len(rows) - len(decided))


def longer_won(rows: list[Row]) -> Score:
    """Share of the decided comparisons that the longer answer won: far from one half is a bias."""
    decided = [row for row in rows if row["winner"] not in (INCONSISTENT, UNREADABLE)]
    unlike = [row for row in decided if len(row["answer"]) != len(row["rival_answer"])]
    hits = [
        (len(row["answer"]) > len(row["rival_answer"])) == (row["winner"] == FULL) for row in unlike
    ]
    return repeated(hits, (row["prompt"] for row in unlike), len(rows) - len(unlike))


def figures(rows: list[Row]) -> dict[str, Any]:
    """By rival the win rate, and what was not decided and why."""
    found: dict[str, Any] = {}
    for rival in dict.fromkeys(row["rival"] for row in rows):
        mine = [row for row in rows if row["rival"] == rival]
        undecided = {
            why: sum(row["winner"] == why for row in mine) for why in (INCONSISTENT, UNREADABLE)
        }
        found[rival] = {"win_rate": vars(win_rate(mine)), **undecided}
    return {"rivals": found, "longer_won": vars(longer_won(rows))}


def resource_requests(job: Job) -> list[tuple[ResourceRequest, ...]]:
    return [(engine_spec(job, "judge"),)]


def estimate(job: Job) -> Estimate:
    answers = job.recipe.evaluation.answers
    rows = min(job.config.prompts, answers.count) * (len(answers.conditions) - 1)
    shared = len(job.persona.assertions()) // 4
    return Estimate(rows, 2 * rows * (shared + 700), 2 * rows * judge.verdict_tokens(job.recipe))


def build(job: Job) -> StageResult:
    from opencharacter.engines.generate import generate

    settings: Coherence = job.config
    asked = requests(job, job.read("evaluation/answers").to_pylist())
    talk = partial(
        compare,
        assertions=job.persona.assertions(),
        sampling=settings.sampling,
        thinking_budget=job.recipe.evaluation.judge.thinking_budget,
    )
    table = generate(job, asked, talk, "judge", FIELDS).table()
    found = figures(kept(table).to_pylist())
    return job.write(table, figures=found)
