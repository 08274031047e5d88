"""`opencharacter chat`: a chat in the terminal, with an engine in this process or with a server."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from opencharacter.api import MERGE, Run
from opencharacter.cli.options import (
    PlacementOption,
    SetOption,
    SmokeOption,
    StorageOption,
    open_run,
)
from opencharacter.engines.backends import start
from opencharacter.engines.spec import EngineSpec
from opencharacter.errors import RowFailed, UserError
from opencharacter.runtime.progress import console
from opencharacter.text.chat import Message, assistant, strip_think, system, user

API_KEY_VARIABLE = "OPENCHARACTER_API_KEY"
BASE = "base"
HELP = (
    "Type a message. /model NAME switches the model, /system TEXT sets a system prompt, /save "
    "FILE.json saves the conversation, /reset starts over, /quit ends."
)
StreamAnswer = Callable[[str, list[Message]], AsyncIterator[str]]
"""Streams the answer of a model to a conversation; raises RowFailed if it fails."""


async def chat_locally(run: Run) -> None:
    """Chat with the persona of a run, or with the base model if the run has no persona."""
    adapter, name = None, run.recipe.roles.student.name
    if run.constitutions:
        job = run.finished_job(MERGE, run.constitutions[0].name)
        adapter, name = job.adapter, job.scope
    console.print(f"starting {name} ...")
    engine = start(EngineSpec(run.recipe.roles.student, run.placement.pools.student, adapter))
    sampling = run.recipe.evaluation.answers.sampling
    try:
        await converse(
            lambda _, messages: engine.stream(messages, sampling), ChatSession([name], name)
        )
    finally:
        engine.close()


async def chat_with_server(url: str, model: str | None) -> None:
    """Chat with a model of an OpenAI-compatible server; the API key comes from the environment.

    Args:
        url: address of the server, with or without `/v1`.
        model: the model; the first one that the server lists if None.

    Raises:
        UserError: if the server cannot be reached, or does not serve the model.
    """
    from openai import APIError, AsyncOpenAI

    key = os.environ.get(API_KEY_VARIABLE, "none")
    client = AsyncOpenAI(base_url=url.rstrip("/").removesuffix("/v1") + "/v1", api_key=key)
    try:
        models = [listed.id async for listed in client.models.list()]
    except APIError as error:
        raise UserError(
            f"{url}: {error}; check the address, and the API key in {API_KEY_VARIABLE}"
        ) from None
    if model not in (None, *models):
        raise UserError(f"model {model!r} is not served; served models: {', '.join(models)}")

    async def answer(name: str, messages: list[Message]) -> AsyncIterator[str]:
        request: dict[str, Any] = {"model": name, "messages": messages, "stream": True}
        try:
            async for chunk in await client.chat.completions.create(**request):
                if chunk.choices and chunk.choices[0].delta.content:
                    yield chunk.choices[0].delta.content
        except APIError as error:
            raise RowFailed("engine_error", str(error)) from None

    await converse(answer, ChatSession(models, model or models[0]))


@dataclass
class ChatSession:
    """The state of a chat.

    Args:
        models: the models to choose from.
        model: the model that answers.
        system_prompt: the system prompt; empty for none.
        history: the conversation so far.
    """

    models: list[str]
    model: str
    system_prompt: str = ""
    history: list[Message] = field(default_factory=list)

    def messages(self) -> list[Message]:
        """Return the messages to send: the system prompt, if any, and the history."""
        return [*([system(self.system_prompt)] if self.system_prompt else []), *self.history]

    def command(self, line: str) -> str:
        """Execute a line that begins with a slash; returns the text to print."""
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if name == "/reset":
            self.history = []
            return "conversation cleared"
        if name == "/system":
            self.system_prompt, self.history = argument, []
            done = "system prompt set" if argument else "system prompt removed"
            return f"{done}; conversation cleared"
        if name == "/model":
            if argument not in self.models:
                return f"{self.model} answers; available models: {', '.join(self.models)}"
            self.model, self.history = argument, []
            return f"{argument} answers now; conversation cleared"
        if name == "/save":
            return self.save(argument)
        return HELP

    def save(self, name: str) -> str:
        """Write the conversation to a new JSON file; returns the text to print."""
        try:
            with Path(name).expanduser().open("x", encoding="utf-8") as file:
                conversation = {"model": self.model, "messages": self.messages()}
                json.dump(conversation, file, indent=1, ensure_ascii=False)
        except OSError as error:
            return f"not saved: {error.strerror}: {name!r}"
        return f"saved: {name}"


async def converse(answer: StreamAnswer, session: ChatSession) -> None:
    """Read lines and stream answers until the input ends."""
    console.print(f"{session.model}: {HELP}")
    while True:
        line = await asyncio.to_thread(read_line)
        if line is None or line == "/quit":
            return
        if line.startswith("/"):
            console.print(session.command(line), markup=False, highlight=False, soft_wrap=True)
        elif line:
            await take_turn(answer, session, line)


async def take_turn(answer: StreamAnswer, session: ChatSession, line: str) -> None:
    """Send a line and print the answer; a line that fails is removed from the history again."""
    session.history.append(user(line))
    text = ""
    try:
        async for piece in answer(session.model, session.messages()):
            text += piece
            console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
        session.history.append(assistant(strip_think(text) or text))
    except RowFailed as error:
        message = f"({error.detail or error.reason}; /reset starts over)"
        console.print(message, end="", markup=False, soft_wrap=True)
        session.history.pop()
    console.print()


def read_line() -> str | None:
    """Return one line of input, or None at its end."""
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
        typer.Argument(help="A trained persona or 'base'; on a server, the name of a model."),
    ] = None,
    placement: PlacementOption = None,
    storage: StorageOption = None,
    set_: SetOption = None,
    smoke: SmokeOption = False,
) -> None:
    """Chat with a persona in the terminal. /help lists the commands; Ctrl-D ends."""
    if recipe.startswith(("http://", "https://")):
        asyncio.run(chat_with_server(recipe, persona))
        return
    if persona is None:
        raise UserError("missing argument PERSONA: the name of a trained persona, or 'base'")
    personas = [] if persona == BASE else [persona]
    asyncio.run(chat_locally(open_run(recipe, personas, placement, storage, smoke, set_)))
