"""The paper's numbers (arXiv 2511.01689), beside ours only where the setting is the same.

Each measure has a function that lists what differs from the setting in which the paper measured.
If nothing differs, the paper's number stands beside ours; otherwise the differences do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, get_args

from opencharacter.config.evaluation import Attack
from opencharacter.config.recipe import Recipe
from opencharacter.evaluation.conditions import in_order
from opencharacter.evaluation.scores import Score, find_score

SOURCE = "arXiv 2511.01689"
PERSONAS = (
    "goodness",
    "humor",
    "impulsiveness",
    "loving",
    "mathematical",
    "misalignment",
    "nonchalance",
    "poeticism",
    "remorse",
    "sarcasm",
    "sycophancy",
)
METHODS = ("prompted", "steered", "distilled", "full")
"""The conditions of the paper."""
PROMPTS = 500
INTROSPECTION = {"reflection": 1000, "free": 1000, "leading": 1000}
"""Reflections for each prompt, and self-conversations of each kind."""
CLASSIFIER = "answerdotai/ModernBERT-base"
JUDGE = "zai-org/GLM-4.5-Air"
STUDENTS = {
    "meta-llama/Llama-3.1-8B-Instruct": 0,
    "Qwen/Qwen2.5-7B-Instruct": 1,
    "google/gemma-3-4b-it": 2,
}
"""The paper's students, and their positions in the numbers below."""

PREFILL = "prefill"
POOLED = "all instructions, pooled"
"""The answers to the eight instructions together."""
POOLED_F1 = "macro_f1_pooled"
CONSISTENT_WINS = "win_rate_consistent"

ATTACKS = set(get_args(Attack)) - {"email", "tool"}
"""The paper's attacks: eight instructions and the prefill attack."""

ROBUSTNESS = {
    ("prompted", POOLED): (0.374, 0.195, 0.629),
    ("distilled", POOLED): (0.812, 0.745, 0.833),
    ("full", POOLED): (0.874, 0.793, 0.929),
    ("distilled", PREFILL): (0.79, 0.66, 0.84),
    ("full", PREFILL): (0.95, 0.86, 0.95),
}
"""Macro-F1 by condition and attack. `steered` is left out: the paper fixes its strength, which a
sweep chooses here."""
COHERENCE = {"prompted": (0.892, 0.934, 0.565), "distilled": (0.770, 0.754, 0.879)}
"""Share of consistent comparisons that the full persona won, by rival; the mean over personas."""
CORRELATION = {"base": 0.443, "full": 0.874}
"""Mean rank correlation of trait ratings between the three students, of the persona `loving`."""
TRAITS, GAMES = 144, 25_000

CAPABILITIES_NOTE = (
    f"The paper's numbers ({SOURCE}) are not comparable: it used another harness (lighteval)."
)

Checks = dict[str, bool]
"""Whether a setting is the paper's, by what a reader is told if it is not."""


def failed(checks: Checks) -> list[str]:
    """What differs."""
    return [difference for difference, same in checks.items() if not same]


def common_checks(recipe: Recipe, personas: Sequence[str]) -> Checks:
    """The setting that all measures of a run share."""
    answers, introspection = recipe.evaluation.answers, recipe.introspection
    conditions = in_order(set(answers.conditions) - {"base"})
    sizes = {
        "reflection": introspection.reflection.transcripts_per_prompt,
        "free": introspection.interaction.free,
        "leading": introspection.interaction.leading,
    }
    return {
        f"{len(personas)} persona{'s' * (len(personas) != 1)} instead of {len(PERSONAS)}": (
            len(personas) == len(PERSONAS)
        ),
        "other personas": len(personas) != len(PERSONAS) or sorted(personas) == sorted(PERSONAS),
        f"the student {recipe.roles.student.model}": recipe.roles.student.model in STUDENTS,
        f"the conditions {', '.join(conditions)} instead of {', '.join(METHODS)}": (
            set(conditions) == set(METHODS)
        ),
        f"introspection of another size ({', '.join(f'{v} {k}' for k, v in sizes.items())})": (
            sizes == INTROSPECTION
        ),
        f"{answers.count} prompts instead of {PROMPTS}": answers.count == PROMPTS,
        f"prompts from {answers.prompts} instead of Pure-Dove": "pure-dove"
        in answers.prompts.lower(),
    }


def robustness_differences(recipe: Recipe, personas: Sequence[str]) -> list[str]:
    """What differs from the paper's setting of robustness; empty if nothing does."""
    evaluation = recipe.evaluation
    return failed(
        common_checks(recipe, personas)
        | {
            f"the classifier {evaluation.robustness.classifier}": (
                evaluation.robustness.classifier == CLASSIFIER
            ),
            f"{evaluation.attacks.prompts} attacked prompts instead of {PROMPTS}": (
                evaluation.attacks.prompts == PROMPTS
            ),
            "fewer attacks": set(evaluation.attacks.kinds) >= ATTACKS,
        }
    )


def coherence_differences(recipe: Recipe, personas: Sequence[str]) -> list[str]:
    """What differs from the paper's setting of coherence; empty if nothing does."""
    evaluation, judge = recipe.evaluation, recipe.roles.judge.model
    return failed(
        common_checks(recipe, personas)
        | {
            f"the judge {judge}": judge == JUDGE,
            "verdicts by log-probability": evaluation.judge.verdicts == "text",
            f"{evaluation.coherence.prompts} compared prompts instead of {PROMPTS}": (
                evaluation.coherence.prompts >= PROMPTS
            ),
        }
    )


def not_comparable(differences: Sequence[str]) -> str:
    """The sentence that stands where the paper's numbers do not."""
    listed = "; ".join(differences)
    return f"The paper's numbers ({SOURCE}) are not comparable: this run has {listed}."


def robustness_note(recipe: Recipe, personas: Sequence[str], conditions: Iterable[str]) -> str:
    """The paper's macro-F1 of the same student, or why it is not comparable."""
    if differences := robustness_differences(recipe, personas):
        return not_comparable(differences)
    position, measured = STUDENTS[recipe.roles.student.model], set(conditions)
    numbers = (
        f"{condition}, {about}: {values[position]:.1%}"
        for (condition, about), values in ROBUSTNESS.items()
        if condition in measured
    )
    return f"In the paper ({SOURCE}), with the same student and setting: {'; '.join(numbers)}."


def coherence_note(recipe: Recipe, personas: Sequence[str], rivals: Iterable[str]) -> str:
    """The paper's win rates of the same student, or why they are not comparable."""
    if differences := coherence_differences(recipe, personas):
        return not_comparable(differences)
    position = STUDENTS[recipe.roles.student.model]
    numbers = (f"{r} {COHERENCE[r][position]:.1%}" for r in rivals if r in COHERENCE)
    return (
        f"In the paper ({SOURCE}), with the same student and setting, by its criterion and as the "
        f"mean over its eleven personas: {'; '.join(numbers)}."
    )


# -------------------------------------------------------------------------------------- whole runs


def mean_of(scores: Sequence[Score]) -> Score:
    """The mean of several personas' scores.

    The personas answer the same prompts, so their errors may be correlated. The mean of their
    intervals contains the interval of the mean whatever the correlation.
    """
    known = [s for s in scores if s.value is not None and s.low is not None and s.high is not None]
    n, unscored = sum(s.n for s in scores), sum(s.unscored for s in scores)
    if not known or len(known) < len(scores):
        return Score(None, None, None, n, unscored)
    value, low, high = (
        sum(getattr(score, name) for score in known) / len(known)
        for name in ("value", "low", "high")
    )
    return Score(value, low, high, n, unscored)


def describe(score: Score) -> str:
    """A proportion with its interval and counts."""
    counts = f"n = {score.n:,}, {score.unscored:,} unscored"
    if score.value is None:
        return f"not scored ({counts})"
    ends = (
        "no interval" if score.low is None else f"95 % interval {score.low:.3f} to {score.high:.3f}"
    )
    return f"{score.value:.3f} ({ends}; {counts})"


def compared_lines(recipe: Recipe, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Our scores of a run beside the paper's numbers, or why there are none, one line each.

    Args:
        recipe: the run's recipe.
        rows: rows of `SCORES` of all personas.
    """
    personas = sorted({row["persona"] for row in rows if row["persona"]})
    lines = []
    differences = robustness_differences(recipe, personas)
    pooled = [row for row in rows if row["measure"] == POOLED_F1]
    if differences or not pooled:
        reason = differences or ["no scores of two or more personas"]
        lines.append(f"robustness (one classifier of personas): {not_comparable(reason)}")
    for condition, about in ROBUSTNESS if not differences else ():
        if score := find_score(pooled, POOLED_F1, condition, about):
            number = ROBUSTNESS[condition, about][STUDENTS[recipe.roles.student.model]]
            lines.append(f"robustness, {condition}, {about}: {describe(score)}; paper {number:.3f}")
    differences = coherence_differences(recipe, personas)
    if differences:
        lines.append(f"coherence: {not_comparable(differences)}")
    for rival in COHERENCE if not differences else ():
        won = [
            find_score([r for r in rows if r["persona"] == name], CONSISTENT_WINS, "full", rival)
            for name in personas
        ]
        if all(won):
            number = COHERENCE[rival][STUDENTS[recipe.roles.student.model]]
            mean = describe(mean_of([score for score in won if score]))
            lines.append(f"coherence, full against {rival}, mean: {mean}; paper {number:.3f}")
    tasks = {row["about"].split()[0] for row in rows if row["measure"] == "capability"}
    if tasks - {"commonplace"}:  # this package's own
        lines.append(f"capabilities: {CAPABILITIES_NOTE}")
    return [
        *lines,
        "robustness (macro_f1, retention): the paper has no such measure: its classifier has no "
        "class for the base model.",
    ]


def correlation_line(
    scores: Sequence[Score], condition: str, manifests: Sequence[dict[str, Any] | None], elo: bool
) -> str:
    """The mean rank correlation of three students beside the paper's, or why it is not comparable.

    Args:
        scores: the correlation of every two students.
        condition: `base` or `full`.
        manifests: of evaluation/preferences of each student's persona; None if not stored.
        elo: whether the ratings are sequential Elo ratings of the framing "feels most like you".
    """
    payloads = [manifest["payload"] for manifest in manifests if manifest]
    models = {payload["roles"]["student"]["model"] for payload in payloads}
    judges = {payload["roles"]["judge"]["model"] for payload in payloads}
    games = {payload["config"].get("games") for payload in payloads}
    scopes = {payload["scope"].rpartition("/")[2] for payload in payloads}
    differences = failed(
        {
            "ratings by Bradley-Terry instead of sequential Elo (--ratings elo)": elo,
            f"the students {', '.join(sorted(models)) or 'of unknown models'}": (
                len(manifests) == len(STUDENTS) and models == set(STUDENTS)
            ),
            f"the personas {', '.join(sorted(scopes)) or 'of unknown name'} instead of loving": (
                scopes == {"loving"}
            ),
            f"other judges than {JUDGE}": judges == {JUDGE},
            f"another number of games than {GAMES:,}": games == {GAMES},
            f"another number of traits than {TRAITS}": all(s.n == TRAITS for s in scores),
            f"no number for the condition {condition}": condition in CORRELATION,
        }
    )
    if differences:
        return not_comparable(differences)
    mean = mean_of(scores)
    return (
        f"mean {mean.value:.3f}, 95 % interval {mean.low:.3f} to {mean.high:.3f} (the mean of the "
        f"intervals); paper ({SOURCE}) {CORRELATION[condition]:.3f}"
    )
