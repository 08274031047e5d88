"""The sections of the report: what a stage's `report(job)` returns and the template renders.

A section names its place on the page. Sections of one place keep the order of the stages. Sections
with the same title are merged: tables gain rows and columns, training curves gain trainings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self, get_args

from opencharacter.evaluation.scores import Score
from opencharacter.runtime.stage import Job

Place = Literal["headline", "samples", "results", "reliability", "training", "run"]
PLACES: tuple[Place, ...] = get_args(Place)
"""The order of the page."""

OPTIMIZER_METRICS = ("grad_norm", "learning_rate", "tokens_per_s", "mfu", "memory_gb")
"""Metrics that every training records."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A titled part of the page.

    Args:
        title: the heading; sections with the same title are merged.
        place: where on the page the section belongs.
        persona: the persona that the section is about; empty for all personas of the page.
        findings: sentences below the heading: what was found, no more than the intervals allow.
        reading: one sentence that says how to read the content.
        notes: paragraphs about the method, below the content.
        empty: the sentence that replaces the content if there is none.
    """

    kind: ClassVar[str]
    """The macro of the template that renders the section."""
    title: str
    place: Place = "results"
    persona: str = ""
    findings: tuple[str, ...] = ()
    reading: str = ""
    notes: tuple[str, ...] = ()
    empty: str = "Nothing was measured."

    def merge(self, other: Any) -> Self:
        """Return one section with the content of both, which have the same title."""
        raise TypeError(f"the report has two sections with the title {self.title!r}")


@dataclass(frozen=True, kw_only=True)
class Headline(Section):
    """One score in large type.

    Args:
        score: the score.
        verdict: a sentence that says no more than the score's interval allows.
    """

    kind: ClassVar[str] = "headline"
    place: Place = "headline"
    score: Score
    verdict: str


@dataclass(frozen=True)
class Sample:
    """A held-out prompt with the answers of the base model and the persona."""

    prompt: str
    base: str
    persona: str


@dataclass(frozen=True, kw_only=True)
class Samples(Section):
    """Pairs of answers, with a search field."""

    kind: ClassVar[str] = "samples"
    place: Place = "samples"
    empty: str = "There are no samples."
    samples: list[Sample]


@dataclass(frozen=True)
class Change(Score):
    """A difference of two proportions, -1 .. 1."""


@dataclass(frozen=True)
class Trend(Change):
    """A change of a proportion over the turns of conversations, whose scored turns `n` counts."""


@dataclass(frozen=True)
class Distance(Score):
    """A difference in standard deviations (SD); `n` counts prompts."""


@dataclass(frozen=True)
class EloRating(Score):
    """A rating in Elo points; `n` counts games."""


@dataclass(frozen=True)
class RatingChange(Score):
    """A difference of two ratings in Elo points; `n` counts games."""


Cells = dict[str, Score | None]
"""The scores of a table row by column; None or absent where there is nothing to score."""


@dataclass(frozen=True, kw_only=True)
class ScoreTable(Section):
    """A table of proportions (0 .. 1), changes of proportions or distances, with their intervals.

    Args:
        caption: says what the cells are.
        columns: the columns' names.
        rows: the cells of each row, by the row's name.
        remarks: what was found, a few words below the name of a row, by the row's name.
        descriptions: what a row is, below its name, by the row's name.
    """

    kind: ClassVar[str] = "score_table"
    caption: str
    columns: list[str]
    rows: dict[str, Cells]
    remarks: dict[str, str] = field(default_factory=dict)
    descriptions: dict[str, str] = field(default_factory=dict)

    def merge(self, other: Any) -> Self:
        """Return this table with the rows, columns and notes of another one."""
        names = [*self.rows, *other.rows]
        return replace(
            self,
            columns=list(dict.fromkeys([*self.columns, *other.columns])),
            rows={name: self.rows.get(name, {}) | other.rows.get(name, {}) for name in names},
            remarks=self.remarks | other.remarks,
            descriptions=self.descriptions | other.descriptions,
            findings=tuple(dict.fromkeys([*self.findings, *other.findings])),
            notes=tuple(dict.fromkeys([*self.notes, *other.notes])),
        )


CONDITIONS = {
    "base": "the untrained student",
    "prompted": "the constitution as system prompt, no training",
    "steered": "steering vectors, no training",
    "distilled": "after DPO",
    "full": "after DPO and introspection: the persona",
    "blended": "a weighted sum of personas",
    "tuned": "the persona after further training",
}
"""What each condition is."""


def comparison(persona: str, columns: list[str], rows: dict[str, Cells]) -> ScoreTable:
    """Columns for the table that compares conditions, one row per condition."""
    return ScoreTable(
        title="How do the conditions compare?",
        persona=persona,
        reading="each row is one way to give the student the character, each column one measure.",
        notes=("All conditions got the same prompts. The sections below explain the measures.",),
        caption="The main figure of each measure by condition, with 95% intervals",
        columns=columns,
        rows=rows,
        descriptions={name: CONDITIONS[name] for name in rows if name in CONDITIONS},
    )


def unscored(rows: dict[str, Score], persona: str = "") -> ScoreTable:
    """Rows for the table of what could not be scored: proportions of what was requested."""
    return ScoreTable(
        title="What could not be scored?",
        place="reliability",
        persona=persona,
        reading="the lower the better; a high share means that a figure counts few items.",
        notes=(
            "An unscored item counts neither as a win nor as a loss, neither as correct nor as "
            "incorrect. Rows that a stage dropped earlier are listed under “Stages”.",
        ),
        caption="Proportion of the requested items that could not be scored",
        columns=["Unscored"],
        rows={name: {"Unscored": score} for name, score in rows.items()},
    )


@dataclass(frozen=True)
class TraitChange:
    """A trait's Bradley-Terry rating in base and persona, in Elo points, and the difference.

    Args:
        trait: the trait.
        base: its rating for the base model.
        persona: its rating for the persona.
        change: the difference of both.
        significant: whether the change is significant at the recipe's false-discovery rate.
    """

    trait: str
    base: Score
    persona: Score
    change: Score
    significant: bool


@dataclass(frozen=True, kw_only=True)
class TraitRatings(Section):
    """Ratings of traits before and after training.

    Args:
        traits: the traits that are shown, the largest rise first.
        total: number of traits that were rated.
    """

    kind: ClassVar[str] = "trait_ratings"
    empty: str = "No traits were rated."
    traits: list[TraitChange]
    total: int


@dataclass(frozen=True)
class Curve:
    """One metric of a training: points are (step, value)."""

    metric: str
    points: list[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class TrainingCurves(Section):
    """Curves by training."""

    kind: ClassVar[str] = "training_curves"
    title: str = "Training"
    place: Place = "training"
    empty: str = "No training curves were recorded."
    trainings: dict[str, list[Curve]]

    def merge(self, other: Any) -> Self:
        """Return this section with the trainings of another one."""
        return replace(self, trainings=self.trainings | other.trainings)


@dataclass(frozen=True, kw_only=True)
class TurnCurves(Section):
    """Proportions (0 .. 1) by the turn of a conversation.

    Args:
        curves: for each heading and condition, the points (turn, score).
    """

    kind: ClassVar[str] = "turn_curves"
    curves: dict[str, dict[str, list[tuple[int, Score]]]]


def training_curves(job: Job, training: str, metrics: tuple[str, ...]) -> list[Section]:
    """Read the curves of a training stage from storage.

    Args:
        job: the stage's job.
        training: the heading of its curves.
        metrics: the loss and its components; the optimizer's metrics are added.

    Returns:
        One section, or none if the stage had nothing to train.
    """
    if not job.store.exists(f"{job.dataset}/curves.parquet"):
        return []
    rows = job.store.read_table(job.dataset, "curves").sort_by("step").to_pylist()
    points = {
        metric: [(row["step"], row["value"]) for row in rows if row["metric"] == metric]
        for metric in (*metrics, *OPTIMIZER_METRICS)
    }
    curves = [Curve(metric, series) for metric, series in points.items() if series]
    return [TrainingCurves(trainings={training: curves})] if curves else []


@dataclass(frozen=True)
class TextStatistic:
    """A property of a set of texts, and the recipe's limits for it (inf: no limit)."""

    name: str
    value: float
    minimum: float = 0.0
    maximum: float = math.inf

    @property
    def within_limits(self) -> bool:
        return self.minimum <= self.value <= self.maximum


@dataclass(frozen=True)
class DatasetStatistics:
    """The text statistics of one dataset.

    Args:
        dataset: the dataset's path.
        texts: number of texts that were measured.
        statistics: the statistics.
    """

    dataset: str
    texts: int
    statistics: list[TextStatistic]

    def find(self, name: str) -> TextStatistic | None:
        """The statistic of a name; None if the dataset has none."""
        return next((s for s in self.statistics if s.name == name), None)


@dataclass(frozen=True, kw_only=True)
class DataQuality(Section):
    """The text statistics of all datasets.

    Args:
        datasets: one row each.
        descriptions: what each statistic measures.
    """

    kind: ClassVar[str] = "data_quality"
    title: str = "Data quality"
    place: Place = "run"
    empty: str = "No texts were measured."
    datasets: list[DatasetStatistics]
    descriptions: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The names of all statistics."""
        return list(dict.fromkeys(s.name for d in self.datasets for s in d.statistics))

    def largest(self, name: str) -> float:
        """The largest value of a statistic in any dataset."""
        return max(s.value for d in self.datasets for s in d.statistics if s.name == name)


@dataclass(frozen=True)
class StageSummary:
    """What one stage did, from its manifest.

    Args:
        dataset: the dataset's path.
        rows: rows in all, dropped ones included.
        dropped: dropped rows by reason.
        seconds: wall-clock time.
        tokens_out: generated tokens.
        redone: rows or steps that were repeated after an interruption.
    """

    dataset: str
    rows: int
    dropped: dict[str, int]
    seconds: float
    tokens_out: int
    redone: int


@dataclass(frozen=True, kw_only=True)
class Stages(Section):
    """All stages that contributed to the persona."""

    kind: ClassVar[str] = "stages"
    title: str = "Stages"
    place: Place = "run"
    empty: str = "No stage has run."
    stages: list[StageSummary]


@dataclass(frozen=True, kw_only=True)
class Settings(Section):
    """The recipe's fields by their dotted names."""

    kind: ClassVar[str] = "settings"
    title: str = "Settings"
    place: Place = "run"
    empty: str = "No settings were recorded."
    values: dict[str, str]


@dataclass(frozen=True)
class PersonaReport:
    """The sections about one persona, in the order of the page."""

    name: str
    description: str
    assertions: list[str]
    sections: list[Section] = field(default_factory=list)


@dataclass(frozen=True)
class ReportData:
    """One page: a student and its personas.

    Args:
        student: the student's name.
        recipe: the recipe's name.
        created: when the page was made.
        personas: the personas.
        versions: versions of the packages that the stages ran with.
        docs_url: address of the documentation; empty if it is not published.
        finished: number of finished datasets, if there are unfinished ones.
        unfinished: the datasets that are not finished, in the order of the pipeline.
        refresh_seconds: seconds after which a browser loads the page again; 0 for never.
    """

    student: str
    recipe: str
    created: str
    personas: list[PersonaReport]
    versions: dict[str, str] = field(default_factory=dict)
    docs_url: str = ""
    finished: int = 0
    unfinished: list[str] = field(default_factory=list)
    refresh_seconds: int = 0

    @property
    def provenance(self) -> str:
        """The line below the page's heading."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return "; ".join(filter(None, (f"Recipe {self.recipe}", self.created, versions)))


def arrange(sections: list[Section]) -> list[Section]:
    """Merge sections with the same title and order them by their place on the page."""
    merged: dict[str, Section] = {}
    for section in sections:
        present = merged.get(section.title)
        merged[section.title] = present.merge(section) if present else section
    return sorted(merged.values(), key=lambda section: PLACES.index(section.place))
