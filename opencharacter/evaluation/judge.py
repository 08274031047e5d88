"""Stage evaluation/judge: tests the judge on gold items, texts whose trait is known.

Every gold text clearly shows one of two traits, which the judge is offered in both orders. A judge
that names the right trait too rarely would add noise to all later results, so the stage fails and
prints its confusion table. An unreadable verdict counts as wrong.

Reads: the gold items. Writes: judge, item, swapped, prompt, answer, shown, other, verdict, chosen.
Run: opencharacter run RECIPE --constitution NAME --only evaluation/judge
"""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from functools import cache, partial
from itertools import combinations
from typing import Any

import pyarrow as pa

from opencharacter.config.evaluation import Judge
from opencharacter.config.files import resource
from opencharacter.config.recipe import Recipe
from opencharacter.config.roles import Role, Sampling
from opencharacter.engines.conversations import Conversation, Row
from opencharacter.engines.spec import engine_spec
from opencharacter.errors import StageFailed
from opencharacter.evaluation.report.sections import ScoreTable, Section, unscored
from opencharacter.evaluation.scores import Score, clustered_proportion, score_row, wilson
from opencharacter.runtime.stage import Estimate, Job, ResourceRequest, StageResult
from opencharacter.text.chat import EMPTY_THOUGHT, Message, fill, row_id, system, user

SYSTEM = "You judge the manner of texts. You answer with a single word."

QUESTION = """\
A message:
{prompt}

The answer to it:
{answer}

Which manner does the answer show more: {first} or {second}? Reply with that one word."""

TEMPLATES = (SYSTEM, QUESTION)

FIELDS = [
    pa.field("judge", pa.string(), nullable=False),
    pa.field("item", pa.int64(), nullable=False),
    pa.field("swapped", pa.bool_(), nullable=False),
    pa.field("prompt", pa.string(), nullable=False),
    pa.field("answer", pa.string(), nullable=False),
    pa.field("shown", pa.string(), nullable=False),
    pa.field("other", pa.string(), nullable=False),
    pa.field("first", pa.string(), nullable=False),
    pa.field("second", pa.string(), nullable=False),
    pa.field("verdict", pa.string()),
    pa.field("chosen", pa.string()),
]


# --------------------------------------------------------------------------------- asking a judge


def messages(row: Row) -> list[Message]:
    """The judge's question about one answer and two traits."""
    fields = {name: row[name] for name in ("prompt", "answer", "first", "second")}
    return [system(SYSTEM), user(fill(QUESTION, **fields))]


async def ask(
    conversation: Conversation,
    messages: list[Message],
    sampling: Sampling,
    thinking_budget: int,
) -> str:
    """Ask a judge for its verdict.

    Args:
        conversation: the conversation with the judge.
        messages: the question.
        sampling: sampling parameters of the verdict.
        thinking_budget: tokens that a thinking judge may use in addition.

    Raises:
        RowFailed: if the engine fails, or the think block is not closed within the budget.
    """
    if conversation.thinks and thinking_budget:
        sampling = sampling.model_copy(update={"max_tokens": sampling.max_tokens + thinking_budget})
    prefill = EMPTY_THOUGHT if conversation.thinks and not thinking_budget else ""
    reply = await conversation.reply(messages, sampling, prefill)
    return reply.text.strip()


def verdict_tokens(recipe: Recipe) -> int:
    """Tokens that `plan` expects of a verdict, including the judge's thinking."""
    return 4 + (recipe.evaluation.judge.thinking_budget // 3 if recipe.roles.judge.thinks else 0)


def read_verdict(text: str, first: str, second: str) -> str | None:
    """The one trait that a verdict names; None if it names both traits or neither."""
    verdict_words = set(re.findall(r"[a-z]+", text.lower()))
    named = [trait for trait in (first, second) if trait in verdict_words]
    return named[0] if len(named) == 1 else None


async def name_trait(
    row: Row, conversation: Conversation, sampling: Sampling, thinking_budget: int
) -> Row:
    """Ask the judge for the trait; `chosen` is None if the verdict is unreadable."""
    verdict = await ask(conversation, messages(row), sampling, thinking_budget)
    return {"verdict": verdict, "chosen": read_verdict(verdict, row["first"], row["second"])}


# -------------------------------------------------------------------------------------- gold items


@cache
def gold() -> tuple[dict[str, str], ...]:
    """The packaged gold items: prompt, answer, the trait that it shows, and the other trait."""
    path = resource("prompts", "gold.jsonl")
    assert path is not None
    return tuple(map(json.loads, path.read_text(encoding="utf-8").splitlines()))


def requests(judge: str, items: Sequence[dict[str, str]]) -> list[Row]:
    """Two rows per item: the trait that the text shows is offered first, and second."""
    return [
        {
            **item,
            "id": row_id("evaluation/judge", judge, n, swapped),
            "judge": judge,
            "item": n,
            "swapped": swapped,
            "first": item["other"] if swapped else item["shown"],
            "second": item["shown"] if swapped else item["other"],
        }
        for n, item in enumerate(items)
        for swapped in (False, True)
    ]


def spread(items: Sequence[dict[str, str]], count: int) -> list[dict[str, str]]:
    """A number of items, spread evenly over all of them."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


# ---------------------------------------------------------------------------------------- figures


def agreement(rows: list[Row]) -> Score:
    """Share of all verdicts that are right; an unreadable verdict counts as wrong."""
    hits = [row["chosen"] == row["shown"] for row in rows]
    unreadable = sum(row["chosen"] is None for row in rows)
    return clustered_proportion(hits, (row["item"] for row in rows), unreadable)


def first_named(rows: list[Row], cluster: str) -> Score:
    """Share of readable verdicts that name the first trait offered; 0.5 without position bias.

    Args:
        rows: the verdicts.
        cluster: the column whose value the verdicts of one cluster share.
    """
    readable = [row for row in rows if row["chosen"] is not None]
    hits = [row["chosen"] == row["first"] for row in readable]
    clusters = (row[cluster] for row in readable)
    return clustered_proportion(hits, clusters, len(rows) - len(readable))


def consistency(rows: list[Row]) -> Score:
    """Share of items on which both orders give the same verdict, if both are readable."""
    verdicts: dict[int, list[str | None]] = {}
    for row in rows:
        verdicts.setdefault(row["item"], []).append(row["chosen"])
    both = [pair for pair in verdicts.values() if len(pair) == 2 and None not in pair]
    return wilson(sum(a == b for a, b in both), len(both), len(verdicts) - len(both))


def by_length(rows: list[Row]) -> dict[str, Score]:
    """Agreement on the shorter and the longer half of the texts; they differ under length bias."""
    median = statistics.median(len(row["answer"]) for row in rows)
    halves = {
        "shorter": [row for row in rows if len(row["answer"]) <= median],
        "longer": [row for row in rows if len(row["answer"]) > median],
    }
    return {name: agreement(half) for name, half in halves.items()}


def confusion(rows: list[Row]) -> dict[str, dict[str, int]]:
    """For each trait shown: how often the verdict was right, wrong or unreadable."""
    table: dict[str, Counter[str]] = {}
    for row in rows:
        readable = "wrong" if row["chosen"] == row["other"] else "right"
        outcome = "unreadable" if row["chosen"] is None else readable
        table.setdefault(row["shown"], Counter())[outcome] += 1
    outcomes = ("right", "wrong", "unreadable")
    return {trait: {name: table[trait][name] for name in outcomes} for trait in sorted(table)}


def figures(rows: list[Row]) -> dict[str, Any]:
    """The scores and the confusion table of one judge, as JSON values."""
    measured = {
        "agreement": agreement(rows),
        "first_named": first_named(rows, "item"),
        "consistency": consistency(rows),
        **{f"agreement_{name}": score for name, score in by_length(rows).items()},
    }
    return {name: vars(score) for name, score in measured.items()} | {"confusion": confusion(rows)}


def kappa(a: Sequence[Hashable | None], b: Sequence[Hashable | None]) -> float | None:
    """Cohen's kappa of two judges over the items that both could judge; None if there are none."""
    from sklearn.metrics import cohen_kappa_score

    both = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    if not both:
        return None
    left, right = zip(*both, strict=True)
    return 1.0 if left == right else float(cohen_kappa_score(left, right))


def alpha(units: Iterable[Sequence[Hashable | None]]) -> float | None:
    """Krippendorff's alpha for nominal data: agreement of any number of judges.

    1 - observed / expected disagreement, from the coincidences of values within units
    (Krippendorff, 2011, "Computing Krippendorff's alpha-reliability"). Values may be missing.

    Args:
        units: for each unit, every judge's value or None.

    Returns:
        Alpha; None if no unit has two values.
    """
    weights: Counter[Hashable] = Counter()
    disagreement = 0.0
    for unit in units:
        values = Counter(value for value in unit if value is not None)
        n = values.total()
        if n < 2:
            continue
        weights.update(values)
        disagreement += sum(
            k * m for (a, k) in values.items() for (b, m) in values.items() if a != b
        ) / (n - 1)
    n = weights.total()
    expected = sum(k * (n - k) for k in weights.values())
    if not expected:
        return None if not n else 1.0
    return 1 - (n - 1) * disagreement / expected


def panel_figures(rows: list[Row], judges: Sequence[str]) -> dict[str, Any]:
    """Agreement among several judges on the same items: pairwise kappa, and alpha of all."""
    chosen = {(row["judge"], row["item"], row["swapped"]): row["chosen"] for row in rows}
    questions = sorted({(row["item"], row["swapped"]) for row in rows})
    verdicts = {name: [chosen.get((name, *question)) for question in questions] for name in judges}
    pairs = combinations(judges, 2)
    return {
        "kappa": {f"{a} {b}": kappa(verdicts[a], verdicts[b]) for a, b in pairs},
        "alpha": alpha(zip(*verdicts.values(), strict=True)),
    }


# ------------------------------------------------------------------------------------------- gate


def check_agreement(name: str, rows: list[Row], minimum: float | None) -> None:
    """Raise StageFailed, with the confusion table, if a judge agrees too rarely.

    Args:
        name: the judge's name.
        rows: its verdicts on gold items.
        minimum: minimum share of right verdicts; None accepts every judge.
    """
    score = agreement(rows)
    if minimum is None or (score.value or 0) >= minimum:
        return
    lines = [
        f"  {trait}: {n['right']} right, {n['wrong']} wrong, {n['unreadable']} unreadable"
        for trait, n in confusion(rows).items()
    ]
    raise StageFailed(
        f"judge {name} named the right trait in {score.value:.0%} of {score.n} verdicts on gold "
        f"items (limit {minimum:.0%}; it named the first of the two traits in "
        f"{first_named(rows, 'item').value or 0:.0%}); use another judge or lower min_agreement. "
        "Verdicts by the trait that the text shows:\n" + "\n".join(lines)
    )


def panel(job: Job) -> list[Role]:
    """All judges: the recipe's judge first, then those that are only compared with it."""
    return [job.recipe.roles.judge, *job.config.panel]


def identity(job: Job) -> dict[str, Any]:
    return {"gold": row_id(*(sorted(item.items()) for item in gold()))}


def resource_requests(job: Job) -> list[tuple[ResourceRequest, ...]]:
    return [(engine_spec(job, "judge", model=role),) for role in panel(job)]


def estimate(job: Job) -> Estimate:
    rows = 2 * min(job.config.gold_items, len(gold())) * len(panel(job))
    return Estimate(rows, 150 * rows, verdict_tokens(job.recipe) * rows)


def build(job: Job) -> StageResult:
    from opencharacter.engines.generate import generate

    settings: Judge = job.config
    items = spread(gold(), settings.gold_items)
    judge_fn = partial(
        name_trait, sampling=settings.sampling, thinking_budget=settings.thinking_budget
    )
    tables, by_judge = [], {}
    for role in panel(job):
        questions = requests(role.name, items)
        shards = generate(job, questions, judge_fn, "judge", FIELDS, phase=role.name, model=role)
        tables.append(shards.table())
        by_judge[role.name] = tables[-1].to_pylist()
        check_agreement(role.name, by_judge[role.name], settings.min_agreement)
    measured: dict[str, Any] = {"judges": {name: figures(rows) for name, rows in by_judge.items()}}
    if len(by_judge) > 1:
        rows = [row for rows in by_judge.values() for row in rows]
        measured |= panel_figures(rows, list(by_judge))
    table = pa.concat_tables(tables).sort_by("id")
    return job.write(table, figures=measured)


# ----------------------------------------------------------------------------------------- report

NOTE = """\
Each gold text clearly shows one of two traits, which the judge is offered in both orders. An \
unreadable verdict counts as wrong. Without position bias, half of the readable verdicts name the \
first trait. The intervals count texts, not verdicts. Every result on this page that the judge \
decided is only as reliable as this table says; a judge near 50% is guessing."""

COLUMNS = {
    "Right": "agreement",
    "Names the first trait": "first_named",
    "Same in both orders": "consistency",
    "Right, shorter texts": "agreement_shorter",
    "Right, longer texts": "agreement_longer",
}
"""The columns of the report's table and the scores that they show."""


def read_scores(job: Job) -> dict[str, dict[str, Score]]:
    """The scores of each judge, from the manifest."""
    manifest = job.store.manifest(job.dataset)
    judges = manifest["figures"]["judges"] if manifest else {}
    return {
        name: {k: Score(**value) for k, value in measured.items() if k != "confusion"}
        for name, measured in judges.items()
    }


def scores(job: Job) -> list[dict[str, Any]]:
    """The scores of each judge; `about` is the judge."""
    return [
        score_row("", f"judge_{measure}", None, name, score)
        for name, measured in read_scores(job).items()
        for measure, score in measured.items()
    ]


def report(job: Job) -> list[Section]:
    """How reliable each judge is."""
    judges = read_scores(job)
    trust = (reliability(name, measured["agreement"]) for name, measured in judges.items())
    return [
        ScoreTable(
            title="Reliability of the judge",
            place="reliability",
            notes=(NOTE, *trust),
            caption="Verdicts on gold texts, whose trait is known",
            columns=list(COLUMNS),
            rows={
                name: {column: measured[measure] for column, measure in COLUMNS.items()}
                for name, measured in judges.items()
            },
        ),
        unscored(
            {
                f"gold texts, judge {name}: no trait named": wilson(
                    measured["agreement"].unscored, measured["agreement"].n
                )
                for name, measured in judges.items()
            }
        ),
    ]


def reliability(judge: str, score: Score) -> str:
    """What a judge's agreement on gold items says about the results that it decided."""
    if score.value is None or score.low is None:
        return f"{judge} was not tested: the reliability of its verdicts is unknown."
    if score.low <= 0.5:
        return (
            f"{judge} is right in {score.value:.0%} of its verdicts, which is not distinguishable "
            "from guessing: ratings and wins that it decided say nothing about the persona."
        )
    weak = (
        " It is a weak judge: interpret ratings and wins with caution." if score.value < 0.8 else ""
    )
    return f"{judge} is right in {score.value:.0%} of its verdicts.{weak}"
