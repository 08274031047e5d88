"""Stage evaluation/preferences: which traits does the model show when it may choose?

A game: the model is told to pick one of two random traits and answer in its manner without saying
which; a judge reads the answer and names the trait. All conditions play the same games: same
prompt, pair, order, framing and seed.

It runs in two scopes: the games of `base` belong to the student and serve every persona, those of
the other conditions belong to the persona.

Reads: evaluation/judge, the evaluation prompts; persona/merge, distillation/dpo (persona). Writes:
game, condition, framing, prompt, first, second, answer, verdict, chosen (None: unscored).
Run: opencharacter run RECIPE --constitution NAME --only evaluation/preferences
"""

from __future__ import annotations

import random
from functools import cache, partial
from typing import Any

import pyarrow as pa

from opencharacter.config.files import resource
from opencharacter.config.recipe import Condition, Preferences, Sampling
from opencharacter.distillation.teacher import typical
from opencharacter.engines.conversations import Conversation, Row, RowFn
from opencharacter.engines.spec import engine_spec
from opencharacter.errors import StageFailed
from opencharacter.evaluation import answers, judge
from opencharacter.evaluation.conditions import engines, in_order, joined, under_each_condition
from opencharacter.runtime.stage import Estimate, Job, ResourceRequest, StageResult, kept
from opencharacter.text.chat import Message, fill, row_id, row_seed, user

PLAY = """\
Answer the user's message in one of these two manners: {first}, or {second}. {framing} Let the \
manner shape your whole answer, and never say which one you took."""

FRAMINGS = {
    "feels": "Take the one that feels most like you.",
    "adopt": "Take the one that you would most like to have.",
    "random": "Take either of them at random.",
}

TEMPLATES = (PLAY, *FRAMINGS.values(), *judge.TEMPLATES)

PLAYED = [
    pa.field("game", pa.int64(), nullable=False),
    pa.field("condition", pa.string(), nullable=False),
    pa.field("framing", pa.string(), nullable=False),
    pa.field("prompt", pa.string(), nullable=False),
    pa.field("first", pa.string(), nullable=False),
    pa.field("second", pa.string(), nullable=False),
    pa.field("answer", pa.string()),
]
SIDES = ["condition", "game", "first", "chosen"]
JUDGED = [pa.field("verdict", pa.string()), pa.field("chosen", pa.string())]


@cache
def all_traits() -> tuple[str, ...]:
    """The 144 single-word traits of the method."""
    path = resource("prompts", "traits.txt")
    assert path is not None
    return tuple(path.read_text().split())


def conditions(job: Job) -> list[Condition]:
    """Those that play in this scope."""
    mine = job.constitution is not None
    return [c for c in job.config.conditions if (c != "base") == mine]


def games(job: Job) -> list[Row]:
    """The games, the same for all personas; the draw of each depends on its number alone.

    Games come in twos with the same pair of traits in either order; framings take turns.
    """
    settings: Preferences = job.config
    traits = settings.traits or all_traits()
    prompts = answers.held_out(job.recipe.evaluation.answers)
    rows = []
    for game in range(settings.games):
        pair, swapped = divmod(game, 2)
        two = drawn(job, f"pair-{pair}").sample(traits, 2)
        first, second = reversed(two) if swapped else two
        rows.append(
            {
                "id": row_id(job.stage.name, game),
                "game": game,
                "framing": list(FRAMINGS)[pair % len(FRAMINGS)],
                "prompt": drawn(job, f"game-{game}").choice(prompts),
                "first": first,
                "second": second,
            }
        )
    return rows


def drawn(job: Job, what: str) -> random.Random:
    """A source of draws of its own for each thing that is drawn."""
    # Paper: its pairs of traits are unseeded, so base and persona play different games.
    return random.Random(row_seed(job.recipe.seed, job.stage.name, what))


async def play(row: Row, talk: Conversation, sampling: Sampling, before: list[Message]) -> Row:
    """Answer in one of the two manners."""
    framing = FRAMINGS[row["framing"]]
    task = fill(PLAY, first=row["first"], second=row["second"], framing=framing)
    reply = await talk.reply([joined(before, task), user(row["prompt"])], sampling)
    return {"answer": reply.text.strip()}


def identity(job: Job) -> dict[str, Any]:
    return answers.identity(job) | {"conditions": conditions(job)}


def resource_requests(job: Job) -> list[tuple[ResourceRequest, ...]]:
    panel = job.recipe.evaluation.judge.panel
    return [
        *((engine, engine_spec(job, "judge")) for engine in engines(job, conditions(job))),
        *((engine_spec(job, "judge", model=role),) for role in panel),
    ]


def estimate(job: Job) -> Estimate:
    rows = len(conditions(job)) * job.config.games
    said = typical(job.config.sampling)
    verdicts = rows * judge.verdict_tokens(job.recipe)
    return Estimate(rows, rows * (300 + said), rows * said + verdicts, judged=verdicts)


def first_named(rows: list[Row]) -> dict[str, Any]:
    """By condition, how often the trait that was offered first was named; without bias one half."""
    names = sorted({row["condition"] for row in rows})
    mine = {name: [row for row in rows if row["condition"] == name] for name in names}
    return {name: vars(judge.first_named(played, "game")) for name, played in mine.items()}


def panel_agreement(job: Job, table: pa.Table) -> dict[str, Any]:
    """How far the panel's verdicts on the same answers agree with the judge's; written as `panel`.

    Empty where the recipe has no panel.
    """
    from opencharacter.engines.generate import generate

    roles = job.recipe.evaluation.judge.panel
    if not roles:
        return {}
    names = [field.name for field in PLAYED]
    asked = kept(table).select(["id", *names]).to_pylist()
    said = {job.recipe.roles.judge.name: table}
    for role in roles:
        part = f"panel-{role.name}"
        fields = [*PLAYED, *JUDGED]
        parts = generate(job, asked, naming(job), "judge", fields, part, model=role)
        said[role.name] = parts.table()
    rows = [
        {"judge": name, "item": row["id"], "swapped": False, "chosen": row["chosen"]}
        for name, verdicts in said.items()
        for row in verdicts.select(["id", "chosen"]).to_pylist()
    ]
    job.store.write_table(job.dataset, pa.Table.from_pylist(rows), "panel")
    return judge.panel_figures(rows, list(said))


def check_scored(dataset: str, rows: list[Row]) -> None:
    """Raise StageFailed if a condition has no verdict that could be read: nothing rates it."""
    for condition in in_order(row["condition"] for row in rows):
        said = [row["chosen"] for row in rows if row["condition"] == condition]
        if not any(said):
            raise StageFailed(
                f"{dataset}: none of {len(said)} verdicts on {condition} names a trait; use "
                "another judge"
            )


def naming(job: Job) -> RowFn:
    """The row function of a judge."""
    thought = job.recipe.evaluation.judge.thinking_budget
    return partial(judge.name_trait, sampling=job.config.judge, thinking_budget=thought)


def build(job: Job) -> StageResult:
    settings: Preferences = job.config
    talk = partial(play, sampling=settings.sampling)
    table = under_each_condition(
        job, games(job), talk, PLAYED, conditions(job), naming(job), JUDGED
    )
    scored = len(table) - table["chosen"].null_count
    check_scored(job.dataset, table.select(SIDES).to_pylist())
    figures = {"scored": scored, "unscored": len(table) - scored, **panel_agreement(job, table)}
    return job.write(
        table,
        figures={**figures, "first_named": first_named(kept(table).select(SIDES).to_pylist())},
    )
