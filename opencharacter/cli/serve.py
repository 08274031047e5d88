"""`opencharacter serve`: start, inspect, configure and stop a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from opencharacter.cli.options import PlacementFile, RecipeName, Run, Smoke, Storage
from opencharacter.config import files
from opencharacter.constitution import schema
from opencharacter.runtime.progress import console


class ServeGroup(TyperGroup):
    """`serve RECIPE` is short for `serve start RECIPE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `start` where no subcommand is named."""
        named = args and (args[0] in self.commands or args[0] == "--help")
        return super().parse_args(ctx, args if named else ["start", *args])


serving = typer.Typer(cls=ServeGroup, no_args_is_help=True, help="Serve personas: serve RECIPE.")
Port = Annotated[int, typer.Option(min=1, max=65535, help="Of the server.")]
Personas = Annotated[
    list[str] | None,
    typer.Option("--constitution", "-c", help="Personas; all that storage holds if absent."),
]
Keys = Annotated[
    Path | None, typer.Option(help="File of API keys, one a line; or set OPENCHARACTER_API_KEYS.")
]
Judged = Annotated[bool, typer.Option("--judge", help="Serve the judge too.")]


@serving.command("start")
def serve(
    recipe: RecipeName,
    names: Personas = None,
    judge: Judged = False,
    placement: PlacementFile = None,
    storage: Storage = None,
    smoke: Smoke = False,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Port = 8000,
    keys: Keys = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Let anyone in who can reach the address.")
    ] = False,
) -> None:
    """Serve base model and personas over HTTP until Ctrl-C: OpenAI's interface and a chat page."""
    from opencharacter.serving import lifecycle

    asked = Run(recipe, names or [], placement, storage, smoke)
    address = lifecycle.Address(host, port)
    accepted = lifecycle.read_keys(keys)
    lifecycle.check_address(address, accepted, insecure)
    lifecycle.require_models(asked.recipe, judge)
    lifecycle.serve_until_stopped(
        asked.recipe, asked.placement, asked.store, asked.constitutions, address, accepted, judge
    )


@serving.command("config")
def serve_config(
    recipe: RecipeName,
    storage: Annotated[str, typer.Option(help="Storage that the cluster's nodes see.")],
    names: Personas = None,
    judge: Judged = False,
    placement: PlacementFile = None,
    smoke: Smoke = False,
) -> None:
    """Print the same server as a Serve config: for `serve deploy`, or a RayService."""
    import yaml

    from opencharacter.serving import lifecycle

    check_packaged(recipe, names or [], placement)
    asked = lifecycle.ServeOptions(
        recipe=recipe,
        storage=storage,
        constitutions=tuple(names or ()),
        judge=judge,
        placement=placement,
        smoke=smoke,
    )
    typer.echo(yaml.safe_dump(lifecycle.serve_config(asked), sort_keys=False), nl=False)


def check_packaged(recipe: str, names: list[str], placement: str | None) -> None:
    """Refuse names that are not packaged; files need only be on the cluster's nodes."""
    schema.load_all([name for name in names if not files.is_path(name)])
    if not files.is_path(recipe):
        files.load_recipe(recipe)
    if placement and not files.is_path(placement):
        files.load_placement(placement)


@serving.command("status")
def serve_status(port: Port = 8000, keys: Keys = None) -> None:
    """Say what the server at a port is doing."""
    from opencharacter.serving import lifecycle

    for line in lifecycle.status(port, next(iter(lifecycle.read_keys(keys)), None)):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


@serving.command("stop")
def serve_stop(port: Port = 8000) -> None:
    """Stop the server at a port: answers under way are finished first."""
    from opencharacter.serving import lifecycle

    lifecycle.stop(port)
    console.print("stopped")
