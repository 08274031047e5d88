"""Stage evaluation/judge: tests the judge on gold items, texts whose trait is known.

Every gold text clearly shows one of two traits, which the judge is offered in both orders. A judge
that names the right trait too rarely would add noise to all later results, so the stage fails and
prints its confusion table. An unreadable verdict counts as wrong.

Where verdicts are log-probabilities, the two orders are averaged into the verdict that later stages
use, and the agreement counts these. A reliability table says how often verdicts of each confidence
are right.

Reads: the gold items. Writes: judge, item, swapped, prompt, answer, shown, other, verdict, chosen
(in this order alone), probability (of the first trait) and mass (null if the verdict is text).
Run: opencharacter run RECIPE --constitution NAME --only evaluation/judge
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Sequence
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
from opencharacter.evaluation import judge_statistics, verdicts
from opencharacter.evaluation.report.sections import ScoreTable, Section, unscored
from opencharacter.evaluation.scores import Score, clustered_proportion, score_row, wilson
from opencharacter.runtime.stage import TOKEN_COLUMNS, Estimate, Job, ResourceRequest, StageResult
from opencharacter.text.chat import Message, fill, row_id, system, user

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
    pa.field("probability", pa.float64()),
    pa.field("mass", pa.float64()),
]


# --------------------------------------------------------------------------------- asking a judge


def messages(row: Row) -> list[Message]:
    """The judge's question about one answer and two traits."""
    fields = {name: row[name] for name in ("prompt", "answer", "first", "second")}
    return [system(SYSTEM), user(fill(QUESTION, **fields))]


def verdict_tokens(recipe: Recipe, judge: Role | None = None) -> int:
    """Tokens that `plan` expects of a verdict in one order, including the judge's thinking.

    Args:
        recipe: says how verdicts are read; `plan` assumes engines with log-probabilities.
        judge: one of the panel; the recipe's judge if None.
    """
    settings, role = recipe.evaluation.judge, judge or recipe.roles.judge
    if not verdicts.are_text(settings, role.thinks):
        return 1
    return 4 + (settings.thinking_budget // 3 if role.thinks else 0)


def orders(recipe: Recipe, judge: Role) -> int:
    """In how many orders `name_trait_in_both_orders` asks a judge."""
    return 1 if verdicts.are_text(recipe.evaluation.judge, judge.thinks) else 2


async def name_trait(
    row: Row, conversation: Conversation, sampling: Sampling, settings: Judge
) -> Row:
    """Ask the judge for the trait, in the row's order of the traits.

    `chosen` is None if the verdict is unreadable.

    Args:
        row: prompt, answer, first and second trait.
        conversation: the conversation with the judge.
        sampling: sampling parameters of a verdict in text.
        settings: how verdicts are read.
    """
    traits = (row["first"], row["second"])
    shares = await verdicts.read_shares(conversation, messages(row), traits, settings)
    if shares is None:
        text = await verdicts.ask(conversation, messages(row), sampling, settings.thinking_budget)
        return {"verdict": text, "chosen": verdicts.read_verdict(text, *traits)}
    probability, mass = verdicts.reading(shares)
    return {"chosen": likelier(probability, traits), "probability": probability, "mass": mass}


def likelier(probability: float | None, traits: tuple[str, str]) -> str | None:
    """The likelier of two traits; None if the verdict is unreadable or a tie."""
    if probability is None or probability == 0.5:
        return None
    return traits[probability < 0.5]


async def name_trait_in_both_orders(
    row: Row, conversation: Conversation, sampling: Sampling, settings: Judge
) -> Row:
    """Ask the judge for the trait in both orders and average its log-odds.

    Verdicts in text are asked for in the row's order alone: each pair of traits is played in both
    orders, so that a liking for one order cancels over the games.
    """
    swapped = row | {"first": row["second"], "second": row["first"]}
    one = await name_trait(row, conversation, sampling, settings)
    if "mass" not in one:
        return one
    two = await name_trait(swapped, conversation, sampling, settings)
    verdict = verdicts.average([oriented(one), verdicts.swapped(oriented(two))])
    chosen = likelier(verdict.probability, (row["first"], row["second"]))
    return {"chosen": chosen, "probability": verdict.probability, "mass": verdict.mass}


def oriented(row: Row) -> tuple[float, float]:
    """The probabilities of the first and the second trait of one verdict."""
    share = 0.5 if row["probability"] is None else row["probability"]
    return share * row["mass"], (1 - share) * row["mass"]


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


def averaged(rows: list[Row]) -> list[Row]:
    """One row per item with the verdict averaged over both orders, as later stages use it.

    Verdicts in text are returned as they are. `probability` is that of the trait shown.
    """
    pairs: dict[int, list[Row]] = {}
    for row in rows:
        if row.get("mass") is not None:
            pairs.setdefault(row["item"], []).append(row)
    result = [row for row in rows if row.get("mass") is None]
    for pair in pairs.values():
        first_is_shown = [row["first"] == row["shown"] for row in pair]
        shares = [oriented(row) for row in pair]
        verdict = verdicts.average(
            [
                share if right else verdicts.swapped(share)
                for share, right in zip(shares, first_is_shown, strict=True)
            ]
        )
        traits = (pair[0]["shown"], pair[0]["other"])
        chosen = likelier(verdict.probability, traits)
        result.append(pair[0] | {"chosen": chosen, "probability": verdict.probability})
    return result


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


def decided(rows: list[Row]) -> Score:
    """Share of items whose verdict does not depend on the order of the traits.

    In text, both orders name the same trait. An average of log-odds decides unless it is a tie.
    """
    verdict = averaged(rows)
    if any(row.get("mass") is not None for row in verdict):
        return wilson(sum(row["chosen"] is not None for row in verdict), len(verdict))
    items = len({row["item"] for row in rows})
    same = consistency(rows)
    return wilson(round((same.value or 0) * same.n), items)


def figures(rows: list[Row]) -> dict[str, Any]:
    """The scores, the confusion table and the calibration of one judge, as JSON values."""
    verdict = averaged(rows)
    measured = {
        "agreement": agreement(verdict),
        "agreement_one_order": agreement(rows),
        "first_named": first_named(rows, "item"),
        "consistency": consistency(rows),
        "decided": decided(rows),
        **{f"agreement_{name}": score for name, score in by_length(verdict).items()},
    }
    masses = [row["mass"] for row in rows if row.get("mass") is not None]
    return {name: vars(score) for name, score in measured.items()} | {
        "confusion": confusion(verdict),
        "calibration": judge_statistics.calibration(verdict),
        "unreadable_mass": 1 - statistics.mean(masses) if masses else None,
        "tokens_per_verdict": tokens_per_verdict(rows),
    }


def tokens_per_verdict(rows: list[Row]) -> dict[str, float]:
    """Mean tokens of one question: read, of which cached, and written."""
    counted = [row for row in rows if row.get("tokens_in")]
    return {
        column: statistics.mean(row[column] for row in counted)
        for column in TOKEN_COLUMNS
        if counted
    }


def panel_figures(rows: list[Row], judges: Sequence[str]) -> dict[str, Any]:
    """Agreement among several judges on the same items: pairwise kappa, and alpha of all."""
    chosen = {(row["judge"], row["item"], row["swapped"]): row["chosen"] for row in rows}
    questions = sorted({(row["item"], row["swapped"]) for row in rows})
    named = {name: [chosen.get((name, *question)) for question in questions] for name in judges}
    pairs = combinations(judges, 2)
    return {
        "kappa": {f"{a} {b}": judge_statistics.kappa(named[a], named[b]) for a, b in pairs},
        "alpha": judge_statistics.alpha(zip(*named.values(), strict=True)),
    }


# ------------------------------------------------------------------------------------------- gate


def check_agreement(name: str, rows: list[Row], minimum: float | None) -> None:
    """Raise StageFailed, with the confusion table, if a judge agrees too rarely.

    Args:
        name: the judge's name.
        rows: its verdicts on gold items.
        minimum: minimum share of right verdicts; None accepts every judge.
    """
    verdict = averaged(rows)
    score = agreement(verdict)
    if minimum is None or (score.value or 0) >= minimum:
        return
    lines = [
        f"  {trait}: {n['right']} right, {n['wrong']} wrong, {n['unreadable']} unreadable"
        for trait, n in confusion(verdict).items()
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
    judges, rows = panel(job), 2 * min(job.config.gold_items, len(gold()))
    tokens = sum(verdict_tokens(job.recipe, role) for role in judges)
    return Estimate(rows * len(judges), 150 * rows * len(judges), rows * tokens)


def build(job: Job) -> StageResult:
    from opencharacter.engines.generate import generate

    settings: Judge = job.config
    items = spread(gold(), settings.gold_items)
    judge_fn = partial(name_trait, sampling=settings.sampling, settings=settings)
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
unreadable verdict counts as wrong, and is shown as unscored. Where verdicts are \
log-probabilities, the first column counts averages over both orders, as the other results on this \
page do, so that a constant liking for the first trait cancels. Without position bias, half of the \
readable verdicts name the first trait. The intervals count texts, not verdicts. Every result on \
this page that the judge decided is only as reliable as this table says; a judge near 50% is \
guessing."""

CALIBRATION_NOTE = """\
How often verdicts of each confidence are right, averaged over both orders, with 95% Wilson \
intervals."""

COLUMNS = {
    "Right": "agreement",
    "Decided": "decided",
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
        name: {measure: Score(**value) for measure, value in measured.items() if is_score(value)}
        for name, measured in judges.items()
    }


def is_score(value: Any) -> bool:
    """Whether a figure of the manifest is a score."""
    return isinstance(value, dict) and value.keys() == Score.__dataclass_fields__.keys()


def calibration_rows(job: Job) -> dict[str, dict[str, Score | None]]:
    """By judge, the share of right verdicts of each confidence; judges with such verdicts only."""
    manifest = job.store.manifest(job.dataset)
    judges = manifest["figures"]["judges"] if manifest else {}
    return {
        name: {confidence: Score(**score) for confidence, score in calibrated["bins"].items()}
        for name, measured in judges.items()
        if (calibrated := measured.get("calibration"))
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
    calibrated = calibration_rows(job)
    columns = [c for c, measure in COLUMNS.items() if any(measure in m for m in judges.values())]
    return [
        ScoreTable(
            title="How reliable is the judge?",
            place="reliability",
            findings=tuple(trust),
            reading="the first column is how often the judge is right; near 50% it is guessing.",
            notes=(NOTE,),
            caption="Verdicts on gold texts, whose trait is known",
            columns=columns,
            rows={
                name: {column: measured.get(COLUMNS[column]) for column in columns}
                for name, measured in judges.items()
            },
        ),
        *(
            [
                ScoreTable(
                    title="Is the judge as sure as it should be? (calibration)",
                    place="reliability",
                    reading="a calibrated judge's shares lie within the limits of their columns.",
                    notes=(CALIBRATION_NOTE,),
                    caption="Right verdicts on gold texts by the judge's confidence",
                    columns=list(next(iter(calibrated.values()))),
                    rows=calibrated,
                )
            ]
            if calibrated
            else []
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
