"""The command line: registers the commands, and turns errors into one line and an exit code."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape

from opencharacter import cache
from opencharacter.api import MERGE
from opencharacter.cli import constitution
from opencharacter.cli.chat import chat
from opencharacter.cli.compare import compare
from opencharacter.cli.evaluate import evaluate
from opencharacter.cli.options import (
    RecipeArgument,
    SetOption,
    SmokeOption,
    StorageOption,
    open_run,
)
from opencharacter.cli.plan import plan
from opencharacter.cli.run import report, run
from opencharacter.cli.serve import serving
from opencharacter.cli.start import demo, init
from opencharacter.cli.status import status
from opencharacter.errors import OpenCharacterError, UserError, one_line_message
from opencharacter.runtime.progress import console
from opencharacter.runtime.store import explain_write_errors

os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # the commands report errors themselves
os.environ.setdefault("RAY_SERVE_USE_GRPC_BY_DEFAULT", "1")  # halves the cost of a streamed chunk
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def print_version(requested: bool) -> None:
    """Print the version and exit."""
    from opencharacter import __version__

    if requested:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Character training for chat models: from a constitution to a served LoRA persona."""


def export(
    recipe: RecipeArgument,
    persona: Annotated[
        str, typer.Argument(help="Name of a trained persona, or its constitution's .yaml file.")
    ],
    to: Annotated[
        str, typer.Option(help="A new folder, or hub:NAME for a (private) Hugging Face repository.")
    ],
    form: Annotated[
        Literal["adapter", "merged"],
        typer.Option(help="The LoRA adapter, or full weights with the adapter merged in."),
    ] = "adapter",
    what: Annotated[
        Literal["persona", "pairs", "transcripts", "evaluation"],
        typer.Option(help="The persona, or its training data or evaluation as a dataset."),
    ] = "persona",
    storage: StorageOption = None,
    set_: SetOption = None,
    smoke: SmokeOption = False,
) -> None:
    """Export a trained persona for PEFT or transformers, or its data for `datasets` and TRL."""
    from opencharacter.persona import export as exporter
    from opencharacter.persona.export_data import export_data

    requested = open_run(recipe, [persona], None, storage, smoke, set_)
    if what != "persona":
        console.print(export_data(requested.jobs, to, what), soft_wrap=True)
        return
    requested.finished_job(MERGE, requested.constitutions[0].name)
    console.print(exporter.export(requested.jobs, to, form), soft_wrap=True)


def merge(
    adapters: Annotated[
        list[str],
        typer.Argument(metavar="DIR[:WEIGHT]...", help="Adapters and their weights (default 1)."),
    ],
    to: Annotated[Path, typer.Option(help="Folder of the new adapter; must not exist.")],
    base: Annotated[
        str | None,
        typer.Option(help="Base model to record. Needed if the adapters name it differently."),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Reduce the rank by SVD. Default: exact sum.")
    ] = None,
    peft_linear: Annotated[
        bool,
        typer.Option("--peft-linear", help="Add the LoRA factors like PEFT's linear: not exact."),
    ] = False,
) -> None:
    """Merge LoRA adapters of one base model into a weighted sum. Weights may be negative."""
    from opencharacter.persona import merge as stage

    if to.exists():
        raise UserError(f"--to {to}: it exists already; choose another folder")
    with explain_write_errors(str(to)), cache.atomic_directory(to) as scratch:
        weighted = [stage.parse_weighted_adapter(text) for text in adapters]
        result = stage.merge(weighted, scratch, base, rank, peft_linear)
    console.print(
        f"{to}: rank {result['rank']} (stored as {result['padded_to']}), relative error "
        f"{result['relative_error']:.2%}",
        soft_wrap=True,
    )


for command in (demo, init, run, plan, status, report, chat, evaluate, export, merge, compare):
    app.command()(command)
app.add_typer(serving, name="serve")
app.add_typer(constitution.app, name="constitution")


def main() -> None:
    """Run the command line. Exit code 2: invalid input; exit code 1: a stage failed."""
    try:
        app(standalone_mode=True)
    except OpenCharacterError as error:
        invalid = isinstance(error, UserError)
        label = "error" if invalid else "failed"
        message = escape(one_line_message(error))
        console.print(f"[red]{label}:[/] {message}", soft_wrap=True, highlight=False)
        sys.exit(2 if invalid else 1)
