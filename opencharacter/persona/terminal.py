"""Talking to a persona in a terminal, with an engine in this process."""

from __future__ import annotations

import asyncio
import sys

from opencharacter import engine
from opencharacter.chat import Message, assistant, strip_think, user
from opencharacter.config import Placement, Recipe
from opencharacter.errors import RowFailed, UserError
from opencharacter.progress import console
from opencharacter.stage import Job
from opencharacter.store import Folder


async def talk(jobs: list[Job], recipe: Recipe, placement: Placement) -> None:
    """Read lines, stream answers; `jobs` are those of one persona, or of none for the base model.

    Raises:
        UserError: if the persona is not trained yet.
    """
    merges = [job for job in jobs if job.stage.name == "persona/merge"]
    folded = merged(merges[0]) if merges else None
    spec = engine.EngineSpec(recipe.roles.student, placement.pools.student, folded)
    console.print(f"starting {merges[0].scope if merges else recipe.roles.student.name} ...")
    running = engine.start(spec)
    console.print("type a message; /reset starts over, /quit leaves")
    try:
        await converse(running, recipe)
    finally:
        running.close()


def merged(job: Job) -> Folder:
    """The adapter of a finished merge."""
    state = job.state()[0]
    if state != "done":
        command = f"opencharacter run {job.recipe.name} --constitution {job.persona.name}"
        raise UserError(f"persona {job.scope!r} is {state} in {job.store.url}; run: {command}")
    return job.adapter


async def converse(running: engine.Engine, recipe: Recipe) -> None:
    """The loop: one line in, one streamed answer out, until the input ends."""
    sampling = recipe.evaluation.answers.sampling
    history: list[Message] = []
    while True:
        line = await asyncio.to_thread(ask)
        if line is None or line == "/quit":
            return
        if line == "/reset":
            history = []
            continue
        if not line:
            continue
        history.append(user(line))
        said = ""
        try:
            async for piece in running.stream(history, sampling):
                said += piece
                console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
            history.append(assistant(strip_think(said) or said))
        except RowFailed as failed:
            console.print(f"({failed.detail or failed.reason}; /reset starts over)", end="")
            history.pop()
        console.print()


def ask() -> str | None:
    """One line from the person, None at the end of input."""
    sys.stdout.write("\n> ")
    sys.stdout.flush()
    line = sys.stdin.readline()
    return line.strip() if line else None
