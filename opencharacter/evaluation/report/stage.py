"""Stage evaluation/report: one HTML page about a student and its personas.

Reads: every manifest of the run, and all other stages of evaluation.
Writes: report.html, scores (every number on the page as Parquet).
Run: opencharacter report RECIPE --constitution NAME
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow as pa

from opencharacter.evaluation import capabilities
from opencharacter.evaluation.attacks import INSTRUCTIONS, PREFILL
from opencharacter.evaluation.coherence import INCONSISTENT, UNREADABLE, longer_won, win_rate
from opencharacter.evaluation.conditions import in_order
from opencharacter.evaluation.rating import ALL_FRAMINGS
from opencharacter.evaluation.report.page import (
    Change,
    Curve,
    PersonaReport,
    Quality,
    ReportData,
    Sample,
    ScoreTable,
    StageLine,
    TableRow,
    TextStatistic,
    TraitChange,
    page,
)
from opencharacter.evaluation.robustness import DEFAULT, MEAN
from opencharacter.evaluation.scores import SCORES, Score, repeated, score_row, wilson
from opencharacter.runtime.stage import Estimate, Job, StageResult, kept, read_all, repeated_work
from opencharacter.text import statistics
from opencharacter.text.chat import row_id

STEPS = ("grad_norm", "learning_rate", "tokens_per_s", "mfu", "memory_gb")
CURVES = {
    "distillation/dpo": (
        "DPO",
        (
            "loss",
            "dpo/sigmoid",
            "dpo/nll",
            "dpo/sq_log_ratio",
            "dpo/margin",
            "dpo/accuracy",
            *STEPS,
        ),
    ),
    "introspection/sft": ("SFT", ("loss", *STEPS)),
    "persona/tune": ("Further training on plain data", ("loss", *STEPS)),
}

PUBLISHED = {
    "prompted": (0.374, 0.195, 0.629),
    "steered": (0.931, 0.262, 0.786),
    "distilled": (0.812, 0.745, 0.833),
    "full": (0.874, 0.793, 0.929),
}
"""Macro-F1 over the instructions in the paper's table: Llama-3.1-8B, Qwen-2.5-7B, Gemma-3-4B, with
eleven personas to choose among."""

F1_NOTE = """\
Macro-F1 of a classifier that chooses among the personas of this page and the base model, cross-\
fitted over prompts, in per cent; 95% bootstrap over prompts. In the paper, among eleven personas \
(Llama, Qwen, Gemma), the mean over its eight instructions was: """
PREFILL_PUBLISHED = (
    """; under the prefill attack distilled 0.79, 0.66, 0.84, full 0.95, 0.86, 0.95."""
)
RETENTION_NOTE = """\
Share of the answers that the classifier still gives to the persona; 95%, Wilson, counting \
prompts and not their answers."""
CAPABILITY_NOTE = """\
Base and persona on the same documents (lm-evaluation-harness); the change in percentage points, \
with a 95% interval for pairs."""
FORM_NOTE = """\
The questions of this package are also asked as chat that wants a letter. Where the right option \
is the likeliest and no letter can be read in the reply, the form is lost and not the knowledge."""
PUBLISHED_ABILITY = """\
In the paper (Llama, before and after goodness, loving, misalignment): TruthfulQA 45.9 to 42.9, \
45.4, 34.1; WinoGrande 72.6 to 71.5, 71.6, 68.8; HellaSwag 60.8 to 59.2, 58.6, 56.7; ARC-C 59.2 \
to 56.0, 58.4, 41.9; MMLU 67.4 to 64.1, 65.3, 53.9."""
PUBLISHED_WINS = {
    "prompted": (89.2, 93.4, 56.5),
    "steered": (78.4, 94.4, 82.1),
    "distilled": (77.0, 75.4, 87.9),
}
"""Wins of the full persona in the paper's table, in per cent: Llama, Qwen, Gemma."""
ABILITY = {
    "acc": "right",
    "acc_norm": "right, by likelihood per byte",
    "exact_match": "right",
    capabilities.IN_CHAT: "right in chat",
    capabilities.READABLE: "a letter can be read in chat",
    capabilities.FORMAT_LOST: "known, but lost to form in chat",
}
"""What each metric of a task says."""
PAPERS_TASKS = frozenset(capabilities.SIZES) - {capabilities.OWN}
SURVIVAL = {"blended": "Who is seen in the blend", "tuned": "What further training left"}
"""Conditions of which is asked whether each persona is still there."""
UNSCORED_NOTE = """\
Nothing of this counts as a win or a loss, or as right. Rows that were dropped before are under \
\u201cWhat ran\u201d."""
COHERENCE_NOTE = """\
In which of two answers the judge sees the character more, asked in both orders; verdicts that the \
order decides, and unreadable ones, are not won by anyone. 95%, Wilson, counting prompts."""
JUDGE_NOTE = """\
Texts written plainly in one of two traits, each offered in both orders. An unreadable verdict \
does not agree. Without a bias to the first place half of the readable verdicts name it. The \
intervals count texts, not verdicts. What the judge decides on this page is worth no more than \
this; a judge near 50% decides nothing."""


def curves(job: Job) -> Iterator[Curve]:
    """The plotted curves of a training stage."""
    if not job.store.exists(f"{job.dataset}/curves.parquet"):  # a stage that had nothing to do
        return
    training, metrics = CURVES[job.stage.name]
    rows = job.store.read_table(job.dataset, "curves").sort_by("step").to_pylist()
    for metric in metrics:
        points = [(row["step"], row["value"]) for row in rows if row["metric"] == metric]
        if points:
            yield Curve(training, metric, points)


def stage_line(job: Job) -> StageLine:
    """A finished stage as a line of the page."""
    manifest = job.store.manifest(job.dataset)
    assert manifest is not None, job.dataset
    return StageLine(
        job.dataset,
        manifest["rows"],
        manifest["dropped"],
        manifest["seconds"],
        manifest["tokens_out"],
        repeated_work(manifest["attempts"]),
        manifest["versions"],
    )


def statistics_line(job: Job) -> Quality | None:
    """The signatures of a finished stage's texts, or None if it has none."""
    manifest = job.store.manifest(job.dataset)
    measured = dict(manifest["figures"].get("text_statistics", {})) if manifest else {}
    if not measured:
        return None
    texts, limits = int(measured.pop("texts")), statistics.bounds(job.config.limits)
    return Quality(
        job.dataset,
        texts,
        [TextStatistic(name, value, *limits.get(name, ())[:2]) for name, value in measured.items()],
    )


def ancestors(jobs: list[Job]) -> list[Job]:
    """The jobs and all that they were made from, parents first, each once."""
    found: dict[str, Job] = {}
    for job in jobs:
        for one in [*ancestors(list(job.parents)), job]:
            found.setdefault(one.dataset, one)
    return list(found.values())


def persona_report(job: Job, parents: list[Job]) -> PersonaReport:
    """All that is known of one persona.

    Args:
        job: the report's.
        parents: those of its parents that belong to the persona.
    """
    by_name = {p.stage.name: p for p in parents}
    answers = by_name["evaluation/answers"]
    samples = side_by_side(kept(answers.store.read_table(answers.dataset)).to_pylist())
    lineage, constitution = ancestors(parents), answers.persona
    scores = scores_of(by_name, constitution.name)
    ratings = ratings_of(by_name["evaluation/rating"])
    changes = trait_changes(ratings)
    return PersonaReport(
        name=constitution.name,
        description=constitution.description,
        assertions=[t.trait for t in constitution.traits],
        discriminability=pick(scores, "discriminability", "full", DEFAULT) or wilson(0, 0),
        stages=[stage_line(one) for one in lineage],
        quality=list(filter(None, map(statistics_line, lineage))),
        meanings=statistics.DESCRIPTIONS,
        curves=[c for one in lineage if one.stage.name in CURVES for c in curves(one)],
        samples=samples[: job.config.samples],
        traits=largest(changes, job.config.traits),
        traits_in_all=len(changes),
        tables=[
            *score_tables(scores),
            *confusions(by_name["evaluation/robustness"]),
            *ability_tables(scores),
            unscored_table(scores, parents),
        ],
        settings=flat(job.recipe.identity()),
    )


# ----------------------------------------------------------------------------------------- scores


def scores_of(by_name: dict[str, Job], persona: str) -> list[dict[str, Any]]:
    """All shares about one persona as rows of `SCORES`, whatever stage measured them."""
    robustness, coherence = by_name["evaluation/robustness"], by_name["evaluation/coherence"]
    rows = robustness.store.read_table(robustness.dataset, "scores").to_pylist()
    rows = [row for row in rows if row["persona"] in ("", persona)]
    compared = kept(coherence.store.read_table(coherence.dataset)).to_pylist()
    for rival in in_order(row["rival"] for row in compared):
        mine = [row for row in compared if row["rival"] == rival]
        rows.append(score_row(persona, "win_rate", "full", rival, win_rate(mine)))
    if compared:
        rows.append(score_row(persona, "longer_won", "full", None, longer_won(compared)))
    rows += judge_scores(by_name["evaluation/judge"])
    return rows + ability_scores(by_name["evaluation/capabilities"])


def ability_scores(job: Job) -> list[dict[str, Any]]:
    """What the harness measured; nothing where the recipe names no tasks."""
    if not job.store.exists(f"{job.dataset}/scores.parquet"):
        return []
    return job.store.read_table(job.dataset, "scores").to_pylist()


def judge_scores(job: Job) -> list[dict[str, Any]]:
    """What the gold items say of each judge."""
    manifest = job.store.manifest(job.dataset)
    found = manifest["figures"]["judges"] if manifest else {}
    return [
        score_row("", f"judge_{measure}", None, name, Score(**value))
        for name, figures in found.items()
        for measure, value in figures.items()
        if measure != "confusion"
    ]


def pick(
    rows: list[dict[str, Any]], measure: str, condition: str | None, about: str | None
) -> Score | None:
    """The one score of this measure, or None if it was not taken."""
    wanted = (measure, condition, about)
    found = (r for r in rows if (r["measure"], r["condition"], r["about"]) == wanted)
    row = next(found, None)
    if row is None:
        return None
    return Score(row["value"], row["low"], row["high"], row["n"], row["unscored"])


def named(rows: list[dict[str, Any]], measure: str, what: str) -> list[Any]:
    """The conditions, or what a measure is about, in the order of the rows."""
    return list(dict.fromkeys(row[what] for row in rows if row["measure"] == measure))


def score_tables(rows: list[dict[str, Any]]) -> list[ScoreTable]:
    """The tables of shares, the whole first and then what it is made of."""
    conditions, attacks = (named(rows, "macro_f1", what) for what in ("condition", "about"))
    rivals, judges = named(rows, "win_rate", "about"), named(rows, "judge_agreement", "about")

    def lines(measure: str) -> list[TableRow]:
        return [TableRow(a, [pick(rows, measure, c, a) for c in conditions]) for a in attacks]

    published = "; ".join(
        f"{c} {', '.join(map(str, PUBLISHED[c]))}" for c in conditions if c in PUBLISHED
    )
    by_condition = [
        TableRow(
            condition,
            [
                pick(rows, "discriminability", condition, DEFAULT),
                pick(rows, "macro_f1", condition, MEAN),
                pick(rows, "retention", condition, MEAN),
                pick(rows, "retention", condition, PREFILL),
                pick(rows, "win_rate", "full", condition),
            ],
        )
        for condition in conditions
    ]
    heads = ["Told from base", "Macro-F1, told to drop it", "Retention", "Retention, prefill"]
    gold = ["agreement", "first_named", "consistency", "agreement_shorter", "agreement_longer"]
    return [
        ScoreTable(
            "Ways to make the persona, compared",
            [],
            "Each condition on the same prompts; the last column: how often the full persona wins",
            [*heads, "Full wins against it"],
            by_condition,
        ),
        ScoreTable(
            "Does it hold when told to drop the act?",
            [F1_NOTE + published + PREFILL_PUBLISHED],
            "Macro-F1 by attack and condition",
            conditions,
            lines("macro_f1"),
        ),
        ScoreTable(
            "What is left of it",
            [RETENTION_NOTE],
            "Retention by attack and condition",
            conditions,
            lines("retention"),
        ),
        ScoreTable(
            "Is it of a piece?",
            [COHERENCE_NOTE + published_wins(rivals)],
            "How often the full persona wins; and how often the longer answer does",
            ["Wins", "The longer answer wins"],
            [TableRow(f"against {r}", [pick(rows, "win_rate", "full", r), None]) for r in rivals]
            + [TableRow("all", [None, pick(rows, "longer_won", "full", None)])] * bool(rivals),
        ),
        ScoreTable(
            "How far the judge can be trusted",
            [JUDGE_NOTE, *(trust(j, pick(rows, "judge_agreement", None, j)) for j in judges)],
            "Verdicts on texts whose trait is known",
            ["Right", "First of two named", "Same in both orders", "Right, short", "Right, long"],
            [TableRow(j, [pick(rows, f"judge_{name}", None, j) for name in gold]) for j in judges],
        ),
    ]


def published_wins(rivals: list[str]) -> str:
    """The paper's wins against the same rivals."""
    said = "; ".join(
        f"{rival} {', '.join(map(str, PUBLISHED_WINS[rival]))}"
        for rival in rivals
        if rival in PUBLISHED_WINS
    )
    return f" In the paper (Llama, Qwen, Gemma): {said}." if said else ""


def ability_tables(rows: list[dict[str, Any]]) -> list[ScoreTable]:
    """What the character costs in ability, as one table."""
    abouts = named(rows, "capability_change", "about")
    own = any(about.startswith(f"{capabilities.OWN} ") for about in abouts)
    published = any(about.split()[0] in PAPERS_TASKS for about in abouts)
    lines = []
    for about in abouts:
        task, metric = about.split()
        base, full = (pick(rows, "capability", c, about) for c in ("base", "full"))
        change = pick(rows, "capability_change", "full", about)
        cells = [base, full, change and Change(**vars(change))]
        lines.append(TableRow(f"{task}: {ABILITY.get(metric, metric)}", cells))
    notes = [CAPABILITY_NOTE, *[FORM_NOTE] * own, *[PUBLISHED_ABILITY] * published]
    caption = "Share of the documents, and its change"
    title, empty = "What it costs in ability", "Nothing was measured: the recipe names no tasks."
    return [ScoreTable(title, notes, caption, ["Base", "Persona", "Change"], lines, empty)]


def unscored_table(rows: list[dict[str, Any]], parents: list[Job]) -> ScoreTable:
    """Everything that was asked for and could not be scored, with its share."""
    games, compared = (
        kept(read_all(parents, name)).to_pylist()
        for name in ("evaluation/preferences", "evaluation/coherence")
    )
    lines = [
        counted(f"games, {condition}: no trait named", mine, lambda r: r["chosen"] is None)
        for condition, mine in per_condition(games, "condition").items()
    ]
    for rival, mine in per_condition(compared, "rival").items():
        for why in (INCONSISTENT, UNREADABLE):
            title = f"comparisons with {rival}: {why}"
            lines.append(counted(title, mine, lambda r, why=why: r["winner"] == why))
    for condition in named(rows, "macro_f1", "condition"):
        score = pick(rows, "macro_f1", condition, DEFAULT) or wilson(0, 0)
        share = wilson(score.unscored, score.n + score.unscored)
        lines.append(TableRow(f"answers, {condition} and base: not classified", [share]))
    for name in named(rows, "judge_agreement", "about"):
        score = pick(rows, "judge_agreement", None, name) or wilson(0, 0)
        lines.append(
            TableRow(f"gold texts, judge {name}: no trait named", [wilson(score.unscored, score.n)])
        )
    caption = "Share of what was asked for that could not be scored"
    return ScoreTable("What could not be scored", [UNSCORED_NOTE], caption, ["Not scored"], lines)


def per_condition(rows: list[dict[str, Any]], column: str) -> dict[str, list[dict[str, Any]]]:
    """Rows by the condition that a column names."""
    return {
        name: [row for row in rows if row[column] == name]
        for name in in_order(row[column] for row in rows)
    }


def counted(
    name: str, rows: list[dict[str, Any]], lost: Callable[[dict[str, Any]], bool]
) -> TableRow:
    return TableRow(name, [wilson(sum(map(lost, rows)), len(rows))])


def trust(judge: str, score: Score | None) -> str:
    """What a judge's agreement on the gold items allows to be said."""
    if score is None or score.value is None or score.low is None:
        return f"{judge} was not tested: nothing is known of its verdicts."
    if score.low <= 0.5:
        return (
            f"{judge} is right in {score.value:.0%} and cannot be told from guessing: the ratings "
            "and wins that it decided say nothing about the persona."
        )
    weak = " It is a weak judge: read the ratings and wins with care." if score.value < 0.8 else ""
    return f"{judge} is right in {score.value:.0%}.{weak}"


def confusions(job: Job) -> list[ScoreTable]:
    """Whose answers the classifier gave to whom: of the personas, of a blend, of what was tuned."""
    columns = ["condition", "attack", "prompt", "label", "guess"]
    rows = job.store.read_table(job.dataset, columns=columns).to_pylist()

    def guessed(condition: str, attacks: Iterable[str]) -> list[dict[str, Any]]:
        mine = (r for r in rows if r["condition"] == condition and r["attack"] in attacks)
        return [row for row in mine if row["guess"] is not None]

    caption = "Share of the answers of the row that were given to the column, over all instructions"
    tables = [confusion("Who is taken for whom", caption, guessed("full", INSTRUCTIONS))]
    for condition, title in SURVIVAL.items():
        if undisturbed := guessed(condition, (DEFAULT,)):
            caption = "Share of the undisturbed answers, by a classifier of the personas as trained"
            tables.append(confusion(title, caption, undisturbed))
    return tables


def confusion(title: str, caption: str, rows: list[dict[str, Any]]) -> ScoreTable:
    """To whom the answers of each were given, as shares of its own."""
    names = sorted({row[side] for row in rows for side in ("label", "guess")})
    lines = []
    for label in sorted({row["label"] for row in rows}):
        mine = [row for row in rows if row["label"] == label]
        prompts = [row["prompt"] for row in mine]
        hits = ([row["guess"] == name for row in mine] for name in names)
        lines.append(TableRow(label, [repeated(each, prompts) for each in hits]))
    return ScoreTable(title, [], caption, names, lines)


def ratings_of(job: Job) -> list[dict[str, Any]]:
    """The ratings over all framings."""
    rows = job.store.read_table(job.dataset).to_pylist()
    return [row for row in rows if row["framing"] == ALL_FRAMINGS]


def trait_changes(ratings: list[dict[str, Any]]) -> list[TraitChange]:
    """Each trait in base and full, the largest rise first."""
    by_condition = {
        condition: {row["trait"]: row for row in ratings if row["condition"] == condition}
        for condition in ("base", "full")
    }
    changes = [
        TraitChange(
            trait,
            rating_score(by_condition["base"][trait], "rating", "low", "high"),
            rating_score(row, "rating", "low", "high"),
            rating_score(row, "change", "change_low", "change_high"),
            bool(row["significant"]),
        )
        for trait, row in by_condition["full"].items()
        if trait in by_condition["base"]
    ]
    return sorted(changes, key=rise, reverse=True)


def rise(trait: TraitChange) -> float:
    """By which traits are ordered: those without a change come last."""
    return -math.inf if trait.change.value is None else trait.change.value


def rating_score(row: dict[str, Any], value: str, low: str, high: str) -> Score:
    return Score(row[value], row[low], row[high], row["games"], row["unscored"])


def largest(changes: list[TraitChange], count: int) -> list[TraitChange]:
    """The largest rises and falls, half of each; of few traits all, also those without a change."""
    if len(changes) <= count:
        return changes
    moved = [trait for trait in changes if trait.change.value is not None]
    rises, rest = moved[: (count + 1) // 2], moved[(count + 1) // 2 :]
    return rises + rest[max(0, len(rest) - count // 2) :]


def rating_rows(persona: str, ratings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ratings and changes as rows of `SCORES`."""
    columns = {"rating": ("low", "high"), "change": ("change_low", "change_high")}
    rows = [
        score_row(persona, name, row["condition"], row["trait"], rating_score(row, name, *ends))
        for row in ratings
        for name, ends in columns.items()
        if row[name] is not None
    ]
    return rows + [
        score_row(
            persona,
            "elo",
            row["condition"],
            row["trait"],
            Score(row["elo"], None, None, row["games"], row["unscored"]),
        )
        for row in ratings
        if row["elo"] is not None
    ]


def quality_rows(persona: PersonaReport) -> list[dict[str, Any]]:
    """Signatures of the data as rows of `SCORES`."""
    return [
        score_row(
            persona.name,
            f"signature_{signature.name}",
            None,
            line.dataset,
            Score(signature.value, None, None, line.texts),
        )
        for line in persona.quality
        for signature in line.text_statistics
    ]


# ------------------------------------------------------------------------------------------ page


def side_by_side(rows: list[dict[str, Any]]) -> list[Sample]:
    """Prompts that both conditions answered, in an order that no answer decides."""
    said = {(row["prompt"], row["condition"]): row["answer"] for row in rows}
    prompts = sorted({prompt for prompt, _ in said}, key=row_id)
    both = ((p, said.get((p, "base")), said.get((p, "full"))) for p in prompts)
    return [Sample(p, base, full) for p, base, full in both if base and full]


def flat(value: Any, at: str = "") -> dict[str, str]:
    """Nested settings as dotted names, those that are empty left out."""
    if not isinstance(value, dict):
        return {at: str(value)} if value not in (None, [], "") else {}
    return {
        k: v
        for key, item in value.items()
        for k, v in flat(item, f"{at}.{key}" if at else key).items()
    }


def estimate(job: Job) -> Estimate:
    return Estimate(0)


def build(job: Job) -> StageResult:
    personas, rows = [], []
    for constitution in job.constitutions:
        mine = [p for p in job.parents if p.constitution in (None, constitution)]
        personas.append(persona_report(job, mine))
        by_name = {p.stage.name: p for p in mine}
        rows += scores_of(by_name, constitution.name)
        rows += rating_rows(constitution.name, ratings_of(by_name["evaluation/rating"]))
        rows += quality_rows(personas[-1])
    lines = [line for persona in personas for line in persona.stages]
    report = ReportData(
        student=job.recipe.roles.student.name,
        recipe=job.recipe.name,
        made=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        personas=personas,
        versions={k: v for line in lines for k, v in line.versions.items()},
    )
    job.store.write_bytes(f"{job.dataset}/report.html", page(report).encode())
    unique = {tuple(row.values()): row for row in rows}
    table = pa.Table.from_pylist(list(unique.values()), schema=SCORES)
    job.store.write_table(job.dataset, table, "scores")
    figures = {p.name: vars(p.discriminability) for p in personas}
    return StageResult(rows=len(table), figures=figures)
