"""Stage evaluation/coherence: which answer expresses the character more naturally?

The judge compares two answers to the same prompt, the trained persona's and another condition's,
given the constitution. It sees both orders. By the paper's criterion, a comparison is a win only if
both orders give the same verdict; otherwise it is inconsistent and dropped. Where verdicts are
log-probabilities, `winner` is decided by their average over both orders instead, so that a constant
liking for one letter cancels, and the paper's criterion stands beside it.

Reads: evaluation/answers, evaluation/judge. Writes: prompt, rival, answer, rival_answer, verdicts,
winner, probability (of the persona's answer) and mass (null if the verdicts are text).
Run: opencharacter run RECIPE --constitution NAME --only evaluation/coherence
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pyarrow as pa

from opencharacter.config.evaluation import Coherence, Judge
from opencharacter.config.roles import Sampling
from opencharacter.engines.conversations import Conversation, Row
from opencharacter.engines.spec import engine_spec
from opencharacter.evaluation import judge, paper, verdicts
from opencharacter.evaluation.conditions import in_order, kept_rows
from opencharacter.evaluation.report.sections import (
    Cells,
    ScoreTable,
    Section,
    comparison,
    unscored,
)
from opencharacter.evaluation.scores import Score, clustered_proportion, score_row, wilson
from opencharacter.runtime.stage import Estimate, Job, ResourceRequest, StageResult, without_dropped
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
UNDECIDED = INCONSISTENT, UNREADABLE = "inconsistent", "unreadable"

FIELDS = [
    pa.field("prompt", pa.string(), nullable=False),
    pa.field("rival", pa.string(), nullable=False),
    pa.field("answer", pa.string(), nullable=False),
    pa.field("rival_answer", pa.string(), nullable=False),
    pa.field("verdicts", pa.list_(pa.string())),
    pa.field("winner", pa.string()),
    pa.field("probability", pa.float64()),
    pa.field("mass", pa.float64()),
]
LETTERS = ("a", "b")


def messages(assertions: str, prompt: str, first: str, second: str) -> list[Message]:
    """The judge's question about two answers."""
    question = fill(QUESTION, assertions=assertions, prompt=prompt, first=first, second=second)
    return [system(SYSTEM), user(question)]


def read_letter(text: str) -> str | None:
    """The letter that a verdict names; None if it names both letters or neither."""
    named = set(re.findall(r"\b[AB]\b", text))
    return named.pop() if len(named) == 1 else None


def winner(persona_first: str | None, persona_second: str | None, rival: str) -> str:
    """The winner of a comparison, from the letters chosen in both orders.

    Args:
        persona_first: the letter chosen when the persona's answer was answer A.
        persona_second: the letter chosen when it was answer B.
        rival: the other condition.

    Returns:
        `full`, the rival, `inconsistent` or `unreadable`.
    """
    if persona_first is None or persona_second is None:
        return UNREADABLE
    wins = (persona_first == "A", persona_second == "B")
    return {(True, True): FULL, (False, False): rival}.get(wins, INCONSISTENT)


def averaged_winner(probability: float | None, rival: str) -> str:
    """The winner of a comparison, from the probability of the persona averaged over both orders."""
    if probability is None:
        return UNREADABLE
    if probability == 0.5:
        return INCONSISTENT
    return FULL if probability > 0.5 else rival


async def compare(
    row: Row, conversation: Conversation, assertions: str, sampling: Sampling, settings: Judge
) -> Row:
    """Ask the judge in both orders."""
    answers = (row["answer"], row["rival_answer"])
    questions = [messages(assertions, row["prompt"], *order) for order in (answers, answers[::-1])]
    shares = []
    for question in questions:
        read = await verdicts.read_shares(conversation, question, LETTERS, settings)
        if read is None:
            return await compare_texts(row, conversation, questions, sampling, settings)
        shares.append(read)
    verdict = verdicts.average([shares[0], verdicts.swapped(shares[1])])
    readings = [verdicts.reading(share)[0] for share in shares]
    return {
        "verdicts": [None if p is None else "AB"[p < 0.5] for p in readings],
        "winner": averaged_winner(verdict.probability, row["rival"]),
        "probability": verdict.probability,
        "mass": verdict.mass,
    }


async def compare_texts(
    row: Row,
    conversation: Conversation,
    questions: list[list[Message]],
    sampling: Sampling,
    settings: Judge,
) -> Row:
    """Ask for verdicts in text, first with the persona's answer as A, then as B."""
    budget = settings.thinking_budget
    texts = [await verdicts.ask(conversation, q, sampling, budget) for q in questions]
    letters = [read_letter(text) for text in texts]
    return {"verdicts": texts, "winner": winner(letters[0], letters[1], row["rival"])}


def requests(job: Job, answers: list[Row]) -> list[Row]:
    """One comparison per prompt and rival condition, on the first prompts by their hash."""
    texts = {(row["prompt"], row["condition"]): row["answer"] for row in answers if row["answer"]}
    prompts = sorted({prompt for prompt, condition in texts if condition == FULL}, key=row_id)
    rivals = [c for c in job.recipe.evaluation.answers.conditions if c != FULL]
    return [
        {
            "id": row_id(job.stage.name, job.scope, prompt, rival),
            "prompt": prompt,
            "rival": rival,
            "answer": texts[prompt, FULL],
            "rival_answer": texts[prompt, rival],
        }
        for prompt in prompts[: job.config.prompts]
        for rival in rivals
        if (prompt, rival) in texts
    ]


def decided(rows: list[Row]) -> list[Row]:
    """The comparisons that have a winner."""
    return [row for row in rows if row["winner"] not in (INCONSISTENT, UNREADABLE)]


def win_rate(rows: list[Row]) -> Score:
    """Share of the decided comparisons that the persona won; undecided ones are unscored."""
    scored = decided(rows)
    wins = [row["winner"] == FULL for row in scored]
    return clustered_proportion(wins, (row["prompt"] for row in scored), len(rows) - len(scored))


def consistent_win_rate(rows: list[Row]) -> Score:
    """The win rate by the paper's criterion: pairs whose two orders disagree are dropped."""
    return win_rate([row | {"winner": consistent_winner(row)} for row in rows])


def consistent_winner(row: Row) -> str:
    """The winner by the paper's criterion."""
    letters = [read_letter(text) if text else None for text in row.get("verdicts") or (None, None)]
    return winner(letters[0], letters[1], row["rival"])


def longer_won(rows: list[Row]) -> Score:
    """Share of the decided comparisons that the longer answer won; 0.5 without length bias."""
    scored = [row for row in decided(rows) if len(row["answer"]) != len(row["rival_answer"])]
    hits = [
        (len(row["answer"]) > len(row["rival_answer"])) == (row["winner"] == FULL) for row in scored
    ]
    return clustered_proportion(hits, (row["prompt"] for row in scored), len(rows) - len(scored))


def by_rival(rows: list[Row]) -> dict[str, list[Row]]:
    """The comparisons with each rival condition, in the order of the conditions."""
    rivals = in_order(row["rival"] for row in rows)
    return {rival: [row for row in rows if row["rival"] == rival] for rival in rivals}


def figures(rows: list[Row]) -> dict[str, Any]:
    """Win rate and undecided comparisons by rival, for the manifest."""
    rivals = {
        rival: {
            "win_rate": vars(win_rate(compared)),
            paper.CONSISTENT_WINS: vars(consistent_win_rate(compared)),
        }
        | {why: sum(row["winner"] == why for row in compared) for why in UNDECIDED}
        for rival, compared in by_rival(rows).items()
    }
    return {"rivals": rivals, "longer_won": vars(longer_won(rows))}


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
    compare_fn = partial(
        compare,
        assertions=job.persona.assertions(),
        sampling=settings.sampling,
        settings=job.recipe.evaluation.judge,
    )
    rows = requests(job, job.read("evaluation/answers").to_pylist())
    table = generate(job, rows, compare_fn, "judge", FIELDS).table()
    return job.write(table, figures=figures(without_dropped(table).to_pylist()))


# ----------------------------------------------------------------------------------------- report

READING = """\
above 50% the judge prefers the full persona; the last column is far from 50% if it judges by \
length."""
NOTE = """\
The judge chooses which of two answers expresses the character more, and sees both orders. Where \
verdicts are log-probabilities, their average over both orders decides. By the paper's criterion, \
a comparison whose verdict depends on the order has no winner and is dropped. 95% Wilson \
intervals, counting prompts."""


def scores(job: Job) -> list[dict[str, Any]]:
    """Win rates against each rival, and the judge's preference for longer answers."""
    rows, persona = kept_rows(job), job.persona.name
    scored = [
        score_row(persona, "win_rate", FULL, rival, win_rate(compared))
        for rival, compared in by_rival(rows).items()
    ]
    scored += [
        score_row(persona, paper.CONSISTENT_WINS, FULL, rival, consistent_win_rate(compared))
        for rival, compared in by_rival(rows).items()
    ]
    return scored + (
        [score_row(persona, "longer_won", FULL, None, longer_won(rows))] if rows else []
    )


def report(job: Job) -> list[Section]:
    """Win rates against each rival, and the comparisons without a winner."""
    rows, persona = kept_rows(job), job.persona.name
    rivals = by_rival(rows)
    personas = [constitution.name for constitution in job.constitutions]
    wins = {rival: win_rate(compared) for rival, compared in rivals.items()}
    rates: dict[str, Cells] = {
        f"against {rival}": {
            "Wins": score,
            "Wins, both orders agree (the paper's criterion)": consistent_win_rate(rivals[rival]),
        }
        for rival, score in wins.items()
    }
    if rows:
        rates["all comparisons"] = {"The longer answer wins": longer_won(rows)}
    trained = {rival: score for rival, score in wins.items() if rival != "base"}
    column = "Full persona wins against it"
    return [
        comparison(persona, [column], {rival: {column: s} for rival, s in trained.items()}),
        ScoreTable(
            title="Which answers express the character more naturally? (coherence)",
            reading=READING,
            notes=(NOTE, paper.coherence_note(job.recipe, personas, rivals)),
            caption="How often the full persona wins, and how often the longer answer wins",
            columns=[
                "Wins",
                "Wins, both orders agree (the paper's criterion)",
                "The longer answer wins",
            ],
            rows=rates,
        ),
        unscored(
            {
                f"comparisons with {rival}: {why}": wilson(
                    sum(row["winner"] == why for row in compared), len(compared)
                )
                for rival, compared in rivals.items()
                for why in UNDECIDED
            }
        ),
    ]
