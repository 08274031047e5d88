"""`opencharacter serve`: start, configure, inspect and stop a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from typer.core import TyperGroup

from opencharacter.cli.options import (
    PlacementOption,
    RecipeArgument,
    SetOption,
    SmokeOption,
    StorageOption,
    open_run,
)
from opencharacter.config import files
from opencharacter.constitution import schema
from opencharacter.runtime.progress import console


class ServeGroup(TyperGroup):
    """Makes `serve RECIPE` short for `serve start RECIPE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert `start` if no subcommand is named."""
        has_command = args and (args[0] in self.commands or args[0] in ("-h", "--help"))
        return super().parse_args(ctx, args if has_command else ["start", *args])


serving = typer.Typer(
    cls=ServeGroup,
    no_args_is_help=True,
    help="Serve personas over HTTP. `serve RECIPE` is short for `serve start RECIPE`.",
)
PortOption = Annotated[int, typer.Option(min=1, max=65535, help="Port of the server.")]
ServedPersonas = Annotated[
    list[str] | None,
    typer.Option(
        "--constitution",
        "-c",
        help="A persona to serve; repeatable. Default: all trained personas in storage.",
    ),
]
KeysOption = Annotated[
    Path | None,
    typer.Option(
        help="File with one API key per line. Default: the variable OPENCHARACTER_API_KEYS."
    ),
]
JudgeOption = Annotated[bool, typer.Option("--judge", help="Serve the judge too.")]


@serving.command("start")
def start(
    recipe: RecipeArgument,
    constitution: ServedPersonas = None,
    judge: JudgeOption = False,
    placement: PlacementOption = None,
    storage: StorageOption = None,
    set_: SetOption = None,
    smoke: SmokeOption = False,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: PortOption = 8000,
    keys: KeysOption = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Accept requests without an API key.")
    ] = False,
) -> None:
    """Serve the base model and personas until Ctrl-C: an OpenAI-compatible API and a chat page."""
    from opencharacter.serving import lifecycle

    run = open_run(recipe, constitution or [], placement, storage, smoke, set_)
    address = lifecycle.Address(host, port)
    accepted = lifecycle.read_keys(keys)
    lifecycle.check_address(address, accepted, insecure)
    lifecycle.require_models(run.recipe, judge)
    lifecycle.serve_until_stopped(
        run.recipe, run.placement, run.store, run.constitutions, address, accepted, judge
    )


@serving.command("config")
def config(
    recipe: RecipeArgument,
    storage: Annotated[
        str, typer.Option(help="Storage that all nodes can reach: a shared path, s3:// or gs://.")
    ],
    constitution: ServedPersonas = None,
    judge: JudgeOption = False,
    placement: PlacementOption = None,
    set_: SetOption = None,
    smoke: SmokeOption = False,
) -> None:
    """Print the Ray Serve config of a server, for `serve deploy` or a KubeRay RayService."""
    from opencharacter.serving import lifecycle

    overrides = files.parse_assignments(set_ or ())
    check_names(recipe, constitution or [], placement, overrides)
    options = lifecycle.ServeOptions(
        recipe=recipe,
        storage=storage,
        constitutions=tuple(constitution or ()),
        judge=judge,
        placement=placement,
        smoke=smoke,
        overrides=overrides,
    )
    typer.echo(yaml.safe_dump(lifecycle.serve_config(options), sort_keys=False), nl=False)


def check_names(
    recipe: str, personas: list[str], placement: str | None, overrides: dict[str, Any]
) -> None:
    """Check everything that is packaged. Files are on the cluster's nodes, perhaps not here."""
    schema.load_all([name for name in personas if not files.is_path(name)])
    if not files.is_path(recipe):
        files.load_recipe(recipe, overrides=overrides)
    if placement and not files.is_path(placement):
        files.load_placement(placement)


@serving.command("status")
def status(port: PortOption = 8000, keys: KeysOption = None) -> None:
    """Show the state of the server at a port of this machine."""
    from opencharacter.serving import lifecycle

    for line in lifecycle.status(port, next(iter(lifecycle.read_keys(keys)), None)):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


@serving.command("stop")
def stop(port: PortOption = 8000) -> None:
    """Stop the server at a port of this machine, after its running requests."""
    from opencharacter.serving import lifecycle

    lifecycle.stop(port)
    console.print("stopped")
