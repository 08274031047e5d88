"""Stage evaluation/judge: is the judge fit to judge? Texts whose trait is known, in both orders.

Every gold text shows one of two traits plainly. A judge that names the right one too seldom would
make noise of all that follows, so it is refused, with the table of its mistakes. An unreadable
verdict does not agree.

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

from opencharacter.config.files import resource
from opencharacter.config.recipe import Judge, Recipe, Role, Sampling
from opencharacter.engines.conversations import Conversation, Row
from opencharacter.engines.spec import engine_spec
from opencharacter.errors import StageFailed
from opencharacter.evaluation.scores import Score, repeated, wilson
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
    talk: Conversation, messages: list[Message], sampling: Sampling, thinking_budget: int
) -> str:
    """A judge's verdict, in the tokens of `sampling`; one that thinks has `thinking_budget` more.

    Raises:
        RowFailed: also if a thought did not end in time.
    """
    if talk.thinks and thinking_budget:
        sampling = sampling.model_copy(update={"max_tokens": sampling.max_tokens + thinking_budget})
    closed = EMPTY_THOUGHT if talk.thinks and not thinking_budget else ""
    reply = await talk.reply(messages, sampling, closed)
    return reply.text.strip()


def verdict_tokens(recipe: Recipe) -> int:
    """That `plan` expects of a verdict, a thought before it included."""
    return 4 + (recipe.evaluation.judge.thinking_budget // 3 if recipe.roles.judge.thinks else 0)


def read_verdict(text: str, first: str, second: str) -> str | None:
    """The one trait that a verdict names; None if it names both or neither."""
    said = set(re.findall(r"[a-z]+", text.lower()))
    named = [trait for trait in (first, second) if trait in said]
    return named[0] if len(named) == 1 else None


async def name_trait(row: Row, talk: Conversation, sampling: Sampling, thinking_budget: int) -> Row:
    """Ask the judge for the trait; what it says that is neither is a missing verdict."""
    verdict = await ask(talk, messages(row), sampling, thinking_budget)
    return {"verdict": verdict, "chosen": read_verdict(verdict, row["first"], row["second"])}


# -------------------------------------------------------------------------------------- gold items


@cache
def gold() -> tuple[dict[str, str], ...]:
    """The packaged items: prompt, answer, the trait that it shows, and the other one."""
    path = resource("prompts", "gold.jsonl")
    assert path is not None
    return tuple(map(json.loads, path.read_text(encoding="utf-8").splitlines()))


def requests(judge: str, items: Sequence[dict[str, str]]) -> list[Row]:
    """Each item twice: the trait that it shows is offered first, and second."""
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
    """So many items, spread evenly over all of them."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


# ---------------------------------------------------------------------------------------- figures


def agreement(rows: list[Row]) -> Score:
    """Share of all verdicts that are right; an unreadable one is not."""
    hits = [row["chosen"] == row["shown"] for row in rows]
    unread = sum(row["chosen"] is None for row in rows)
    return repeated(hits, (row["item"] for row in rows), unread)


def first_named(rows: list[Row], unit: str) -> Score:
    """Share of readable verdicts for the trait that was offered first; without bias one half.

    Args:
        rows: the verdicts.
        unit: the column that says of what they are.
    """
    read = [row for row in rows if row["chosen"] is not None]
    hits = [row["chosen"] == row["first"] for row in read]
    return repeated(hits, (row[unit] for row in read), len(rows) - len(read))


def consistency(rows: list[Row]) -> Score:
    """Share of items with both orders readable on which the two verdicts are the same."""
    said: dict[int, list[str | None]] = {}
    for row in rows:
        said.setdefault(row["item"], []).append(row["chosen"])
    both = [pair for pair in said.values() if len(pair) == 2 and None not in pair]
    return wilson(sum(a == b for a, b in both), len(both), len(said) - len(both))


def by_length(rows: list[Row]) -> dict[str, Score]:
    """Agreement on the shorter and on the longer half of the texts: a bias to length parts them."""
    middle = statistics.median(len(row["answer"]) for row in rows)
    halves = {
        "shorter": [row for row in rows if len(row["answer"]) <= middle],
        "longer": [row for row in rows if len(row["answer"]) > middle],
    }
    return {name: agreement(half) for name, half in halves.items()}


def confusion(rows: list[Row]) -> dict[str, dict[str, int]]:
    """For each trait shown how often it was named, its counterpart was, or neither."""
    table: dict[str, Counter[str]] = {}
    for row in rows:
        what = "unreadable" if row["chosen"] is None else "right"
        wrong = row["chosen"] == row["other"]
        table.setdefault(row["shown"], Counter())["wrong" if wrong else what] += 1
    kinds = ("right", "wrong", "unreadable")
    return {trait: {kind: table[trait][kind] for kind in kinds} for trait in sorted(table)}


def figures(rows: list[Row]) -> dict[str, Any]:
    """All that the gold items say of one judge, as JSON values."""
    scores = {
        "agreement": agreement(rows),
        "first_named": first_named(rows, "item"),
        "consistency": consistency(rows),
        **{f"agreement_{name}": score for name, score in by_length(rows).items()},
    }
    return {name: vars(score) for name, score in scores.items()} | {"confusion": confusion(rows)}


def kappa(a: Sequence[Hashable | None], b: Sequence[Hashable | None]) -> float | None:
    """Cohen's kappa of two judges over what both could judge; None if that is nothing."""
    from sklearn.metrics import cohen_kappa_score

    both = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    if not both:
        return None
    left, right = zip(*both, strict=True)
    return 1.0 if left == right else float(cohen_kappa_score(left, right))


def alpha(units: Iterable[Sequence[Hashable | None]]) -> float | None:
    """Krippendorff's alpha for names: agreement of any number of judges, some verdicts missing.

    1 - observed / expected disagreement, from the coincidences of values within units
    (Krippendorff, 2011, "Computing Krippendorff's alpha-reliability").

    Args:
        units: for each thing judged, every judge's value or None.
    """
    weights: Counter[Hashable] = Counter()
    differing = 0.0
    for unit in units:
        values = Counter(value for value in unit if value is not None)
        n = values.total()
        if n < 2:
            continue
        weights.update(values)
        differing += sum(
            k * m for (a, k) in values.items() for (b, m) in values.items() if a != b
        ) / (n - 1)
    n = weights.total()
    expected = sum(k * (n - k) for k in weights.values())
    if not expected:
        return None if not n else 1.0
    return 1 - (n - 1) * differing / expected


def panel_figures(rows: list[Row], judges: Sequence[str]) -> dict[str, Any]:
    """Agreement among several judges on the same items: pairwise kappa, and alpha of all."""
    said = {(row["judge"], row["item"], row["swapped"]): row["chosen"] for row in rows}
    asked = sorted({(row["item"], row["swapped"]) for row in rows})
    verdicts = {name: [said.get((name, *one)) for one in asked] for name in judges}
    pairs = combinations(judges, 2)
    return {
        "kappa": {f"{a} {b}": kappa(verdicts[a], verdicts[b]) for a, b in pairs},
        "alpha": alpha(zip(*verdicts.values(), strict=True)),
    }


# ------------------------------------------------------------------------------------------- gate


def refuse(name: str, rows: list[Row], least: float | None) -> None:
    """Raise StageFailed, with the confusion table, for a judge that agrees too seldom.

    Args:
        name: the judge's.
        rows: its verdicts on gold items.
        least: share of verdicts that must be right; None accepts any judge.
    """
    found = agreement(rows)
    if least is None or (found.value or 0) >= least:
        return
    lines = [
        f"  {trait}: {n['right']} right, {n['wrong']} wrong, {n['unreadable']} unreadable"
        for trait, n in confusion(rows).items()
    ]
    raise StageFailed(
        f"judge {name} named the right trait in {found.value:.0%} of {found.n} verdicts on texts "
        f"whose trait is plain (limit {least:.0%}; it named the first of two in "
        f"{first_named(rows, 'item').value or 0:.0%}); use another judge or lower min_agreement. "
        "Texts by the trait that they show:\n" + "\n".join(lines)
    )


def panel(job: Job) -> list[Role]:
    """All judges: the recipe's, then those that are only compared with it."""
    return [job.recipe.roles.judge, *job.config.panel]


def identity(job: Job) -> dict[str, Any]:
    return {"gold": row_id(*(sorted(item.items()) for item in gold()))}


def resource_requests(job: Job) -> list[tuple[ResourceRequest, ...]]:
    return [(engine_spec(job, "judge", model=role),) for role in panel(job)]


def estimate(job: Job) -> Estimate:
    rows = 2 * min(job.config.items, len(gold())) * len(panel(job))
    return Estimate(rows, 150 * rows, verdict_tokens(job.recipe) * rows)


def build(job: Job) -> StageResult:
    from opencharacter.engines.generate import generate

    settings: Judge = job.config
    items = spread(gold(), settings.items)
    talk = partial(name_trait, sampling=settings.sampling, thinking_budget=settings.thinking_budget)
    tables, by_judge = [], {}
    for role in panel(job):
        asked = requests(role.name, items)
        parts = generate(job, asked, talk, "judge", FIELDS, part=role.name, model=role)
        tables.append(parts.table())
        by_judge[role.name] = tables[-1].to_pylist()
        refuse(role.name, by_judge[role.name], settings.min_agreement)
    found: dict[str, Any] = {"judges": {name: figures(rows) for name, rows in by_judge.items()}}
    if len(by_judge) > 1:
        rows = [row for rows in by_judge.values() for row in rows]
        found |= panel_figures(rows, list(by_judge))
    table = pa.concat_tables(tables).sort_by("id")
    return job.write(table, figures=found)
