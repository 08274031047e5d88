"""Talking to a persona in a terminal: with an engine in this process, or with a server."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from opencharacter.cli.options import PlacementFile, Run, Smoke, Storage
from opencharacter.config.placement import Placement
from opencharacter.config.recipe import Recipe
from opencharacter.engines.backends import start
from opencharacter.engines.spec import EngineSpec
from opencharacter.errors import RowFailed, UserError
from opencharacter.persona.merge import merged
from opencharacter.runtime.progress import console
from opencharacter.runtime.stage import Job
from opencharacter.text.chat import Message, assistant, strip_think, system, user

KEY = "OPENCHARACTER_API_KEY"
HELP = (
    "type a message; /model NAME changes who answers, /system TEXT sets a system prompt, "
    "/save FILE.json keeps the conversation, /reset starts over, /quit leaves"
)
Answer = Callable[[str, list[Message]], AsyncIterator[str]]
"""Answers a conversation piece by piece, in the voice of a model; raises RowFailed if it cannot."""


async def talk(jobs: list[Job], recipe: Recipe, placement: Placement) -> None:
    """Read lines, stream answers; `jobs` are those of one persona, or of none for the base model.

    Raises:
        UserError: if the persona is not trained yet.
    """
    merges = [job for job in jobs if job.stage.name == "persona/merge"]
    adapter = merged(merges[0]) if merges else None
    spec = EngineSpec(recipe.roles.student, placement.pools.student, adapter)
    name = merges[0].scope if merges else recipe.roles.student.name
    console.print(f"starting {name} ...")
    running = start(spec)
    sampling = recipe.evaluation.answers.sampling
    try:
        await converse(
            lambda _, messages: running.stream(messages, sampling), ChatSession([name], name)
        )
    finally:
        running.close()


async def talk_to_server(url: str, model: str | None) -> None:
    """The same with a server of OpenAI's kind, its key in the environment.

    Args:
        url: of the server, with or without `/v1`.
        model: who answers; the first that is listed if None.

    Raises:
        UserError: if the server cannot be reached, or does not have the model.
    """
    from openai import APIError, AsyncOpenAI

    key = os.environ.get(KEY, "none")
    client = AsyncOpenAI(base_url=url.rstrip("/").removesuffix("/v1") + "/v1", api_key=key)
    try:
        models = [listed.id async for listed in client.models.list()]
    except APIError as error:
        raise UserError(f"{url}: {error}; is it the server's address, and its key {KEY}?") from None
    if model not in (None, *models):
        raise UserError(f"model {model!r} is not served; served ones: {', '.join(models)}")

    async def answer(name: str, messages: list[Message]) -> AsyncIterator[str]:
        try:
            asked: dict = {"model": name, "messages": messages, "stream": True}
            async for chunk in await client.chat.completions.create(**asked):
                if chunk.choices and chunk.choices[0].delta.content:
                    yield chunk.choices[0].delta.content
        except APIError as error:
            raise RowFailed("engine_error", str(error)) from None

    await converse(answer, ChatSession(models, model or models[0]))


@dataclass
class ChatSession:
    """What a conversation is about to be sent with.

    Args:
        models: names that may be chosen.
        model: who answers.
        prompt: the system prompt, empty for none.
        said: the conversation so far.
    """

    models: list[str]
    model: str
    prompt: str = ""
    said: list[Message] = field(default_factory=list)

    def messages(self) -> list[Message]:
        return [*([system(self.prompt)] if self.prompt else []), *self.said]

    def command(self, line: str) -> str:
        """Do what a line with a slash asks for; returns what to tell the person."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/reset":
            self.said = []
            return "starting over"
        if name == "/system":
            self.prompt, self.said = rest, []
            return "system prompt set; starting over" if rest else "no system prompt"
        if name == "/model":
            if rest not in self.models:
                return f"{self.model} answers; there are: {', '.join(self.models)}"
            self.model, self.said = rest, []
            return f"{rest} answers; starting over"
        if name == "/save":
            return self.save(rest)
        return HELP

    def save(self, name: str) -> str:
        """Write the conversation as JSON; an existing file is left alone."""
        try:
            with Path(name).expanduser().open("x", encoding="utf-8") as file:
                kept = {"model": self.model, "messages": self.messages()}
                json.dump(kept, file, indent=1, ensure_ascii=False)
        except OSError as error:
            return f"not saved: {error.strerror}: {name!r}"
        return f"saved: {name}"


async def converse(answer: Answer, talk: ChatSession) -> None:
    """The loop: one line in, one streamed answer out, until the input ends."""
    console.print(f"{talk.model}: {HELP}")
    while True:
        line = await asyncio.to_thread(ask)
        if line is None or line == "/quit":
            return
        if line.startswith("/"):
            console.print(talk.command(line), markup=False, highlight=False, soft_wrap=True)
        elif line:
            await turn(answer, talk, line)


async def turn(answer: Answer, talk: ChatSession, line: str) -> None:
    """Say a line and print what comes back; a line that failed is as if never said."""
    talk.said.append(user(line))
    heard = ""
    try:
        async for piece in answer(talk.model, talk.messages()):
            heard += piece
            console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
        talk.said.append(assistant(strip_think(heard) or heard))
    except RowFailed as failed:
        told = f"({failed.detail or failed.reason}; /reset starts over)"
        console.print(told, end="", markup=False, soft_wrap=True)
        talk.said.pop()
    console.print()


def ask() -> str | None:
    """One line from the person, None at the end of input."""
    sys.stdout.write("\n> ")
    sys.stdout.flush()
    line = sys.stdin.readline()
    return line.strip() if line else None


def chat(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE|URL", help="A recipe, or the address of a server.")
    ],
    persona: Annotated[
        str | None,
        typer.Argument(help="A trained constitution's name or 'base'; of a server, a model."),
    ] = None,
    placement: PlacementFile = None,
    storage: Storage = None,
    smoke: Smoke = False,
) -> None:
    """Talk to a persona in the terminal. /help says what else can be typed; Ctrl-D leaves."""
    if recipe.startswith(("http://", "https://")):
        asyncio.run(talk_to_server(recipe, persona))
        return
    if persona is None:
        raise UserError("chat needs a persona's name, or 'base'")
    names = [] if persona == "base" else [persona]
    asked = Run(recipe, names, placement, storage, smoke)
    if names:
        asked.check_trained(persona)
    asyncio.run(talk(asked.jobs, asked.recipe, asked.placement))
