"""Options that several commands share, and the run that they describe."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from opencharacter import pipeline
from opencharacter.config import files
from opencharacter.config.placement import Placement
from opencharacter.config.recipe import Recipe
from opencharacter.constitution import schema
from opencharacter.errors import UserError
from opencharacter.runtime.progress import console
from opencharacter.runtime.stage import Job
from opencharacter.runtime.store import Store

RECIPES = ", ".join(files.resource_names("recipes", "*.yaml"))
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help=f"{RECIPES}, or a .yaml file.")]
Names = Annotated[
    list[str],
    typer.Option("--constitution", "-c", help="A persona's name or .yaml file; repeat, or 'all'."),
]
PLACEMENTS = ", ".join(files.resource_names("clusters", "*/placement.yaml"))
PlacementFile = Annotated[
    str | None, typer.Option("--placement", help=f"{PLACEMENTS}, or a .yaml file.")
]
Storage = Annotated[
    str | None, typer.Option("--storage", help="Path, s3:// or gs://; runs/RECIPE if absent.")
]
Smoke = Annotated[bool, typer.Option("--smoke", help="The recipe at about 1 % of its size.")]
WIDE = 240
"""Characters that a table may take."""


class Run:
    """What the options of a command name, loaded and checked."""

    def __init__(
        self,
        recipe: str,
        names: list[str],
        placement: str | None,
        storage: str | None,
        smoke: bool,
    ):
        self.typed = [recipe, *(["--smoke"] if smoke else [])]
        self.typed += ["--storage", storage] if storage else []
        self.typed += ["--placement", placement] if placement else []
        self.recipe: Recipe = files.load_recipe(recipe, smoke)
        self.constitutions = schema.load_all(names)
        self.placement: Placement = files.load_placement(placement)
        retry_seconds = self.placement.storage_retry_seconds
        self.store = Store.at(storage or f"runs/{self.recipe.name}", retry_seconds)
        self.jobs: list[Job] = pipeline.jobs(
            self.recipe, self.constitutions, self.placement, self.store
        )

    def check_trained(self, persona: str) -> None:
        """Refuse a persona that is not there, with the command that trains it."""
        (merge,) = (job for job in self.jobs if job.stage.name == "persona/merge")
        state = merge.state()[0]
        if state != "done":
            command = shlex.join(["opencharacter", "run", *self.typed, "-c", persona])
            raise UserError(
                f"persona {merge.scope!r} is {state} in {self.store.address()}; run: {command}"
            )


def job_table(*numbers: str) -> Table:
    """An empty table: a job's dataset, its state, and columns of numbers."""
    table = Table(box=None, pad_edge=False)
    table.add_column("dataset", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for title in numbers:
        table.add_column(title, justify="right", no_wrap=True)
    return table


def print_whole(table: Table) -> None:
    """Print a table as wide as it is: a narrow terminal wraps lines rather than losing names."""
    Console(width=max(console.width, WIDE), emoji=False).print(table)
