"""Arguments and options that several commands share, and the tables that they print."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from opencharacter.api import Run
from opencharacter.config import files
from opencharacter.config.placement import Placement
from opencharacter.runtime.progress import console

RECIPES = ", ".join(files.packaged(files.RECIPES))
RecipeArgument = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help=f"A packaged recipe ({RECIPES}) or a .yaml file."),
]
PersonaOption = Annotated[
    list[str],
    typer.Option(
        "--constitution",
        "-c",
        help="A packaged constitution or a .yaml file; repeatable. 'all' is every packaged one.",
    ),
]
PLACEMENTS = ", ".join(files.packaged(files.PLACEMENTS))
PlacementOption = Annotated[
    str | None,
    typer.Option(
        "--placement",
        help=f"A packaged placement ({PLACEMENTS}) or a .yaml file. Default: laptop.",
    ),
]
StorageOption = Annotated[
    str | None,
    typer.Option("--storage", help="A path, s3:// or gs:// URL. Default: runs/RECIPE."),
]
SmokeOption = Annotated[
    bool, typer.Option("--smoke", help="Shrink the recipe to about 1 % of its size.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Override a field of the recipe, such as distillation.dpo.beta=0.2; repeatable.",
    ),
]
MIN_TABLE_WIDTH = 240
"""Minimum number of characters per line of a printed table."""


def open_run(
    recipe: str,
    personas: list[str],
    placement: str | None,
    storage: str | None,
    smoke: bool,
    assignments: list[str] | None,
    served: str | None = None,
) -> Run:
    """Load and check what the options of a command name.

    Raises:
        UserError: for anything invalid.
    """
    arguments = [recipe, *(["--smoke"] if smoke else [])]
    arguments += [part for text in assignments or () for part in ("--set", text)]
    arguments += ["--storage", storage] if storage else []
    arguments += ["--placement", placement] if placement else []
    return Run(
        recipe,
        personas,
        with_served(files.load_placement(placement), served),
        storage,
        smoke=smoke,
        overrides=files.parse_assignments(assignments or ()),
        arguments=arguments,
    )


def with_served(placement: Placement, served: str | None) -> Placement:
    """Return a placement whose evaluation is served as an option says; None changes nothing."""
    if served is None:
        return placement
    evaluation = placement.evaluation.model_copy(update={"served": served})
    return placement.model_copy(update={"evaluation": evaluation})


def job_table(*columns: str) -> Table:
    """Return an empty table with a column for the dataset, its state, and the given numbers."""
    table = Table(box=None, pad_edge=False)
    table.add_column("dataset", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for title in columns:
        table.add_column(title, justify="right", no_wrap=True)
    return table


def print_table(table: Table) -> None:
    """Print a table in full width: a narrow terminal wraps its lines instead of cutting names."""
    Console(width=max(console.width, MIN_TABLE_WIDTH), emoji=False).print(table)
