"""The command line. Thin: it parses, prints, and turns errors into one line and an exit code."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape

from opencharacter import models, pipeline
from opencharacter.cli import constitution
from opencharacter.cli.chat import chat
from opencharacter.cli.options import Names, PlacementFile, RecipeName, Run, Smoke, Storage
from opencharacter.cli.plan import plan
from opencharacter.cli.serve import serving
from opencharacter.cli.status import status
from opencharacter.errors import OpenCharacterError, UserError, one_line_message
from opencharacter.planning.preflight import check_stages, check_training, require_models
from opencharacter.runtime.progress import console, duration
from opencharacter.runtime.stage import Job, repeated_work
from opencharacter.runtime.store import explain_write_errors

os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what matters is told by our own lines
os.environ.setdefault("RAY_SERVE_USE_GRPC_BY_DEFAULT", "1")  # a streamed piece costs half as much
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(constitution.app, name="constitution")


def tell_version(wanted: bool) -> None:
    """Print the version and end."""
    from opencharacter import __version__

    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=tell_version, is_eager=True, help="Print it and exit."),
    ] = False,
) -> None:
    """Character training for chat models: from a constitution to a served LoRA persona."""


@app.command()
def run(
    recipe: RecipeName,
    names: Names,
    placement: PlacementFile = None,
    storage: Storage = None,
    only: Annotated[str | None, typer.Option(help="Run this stage alone.")] = None,
    until: Annotated[str | None, typer.Option(help="Run up to this stage.")] = None,
    rebuild: Annotated[
        str | None,
        typer.Option(help="Replace this stage and all that follows from it."),
    ] = None,
    smoke: Smoke = False,
) -> None:
    """Run what is missing, resume what is unfinished, leave what is done."""
    from opencharacter.runtime import cluster

    asked = Run(recipe, names, placement, storage, smoke)
    if only and until:
        raise UserError("--only and --until exclude each other; give one")
    selected = pipeline.select(asked.jobs, only, until)
    pipeline.check(selected, rebuild)
    require_models(selected)
    check_training(selected)
    check_stages(selected, rebuild)
    asked.store.check_writable()
    if all(job.state()[0] == "done" for job in selected) and not rebuild:
        console.print("nothing to do: every stage is done")
        return
    cluster.connect(asked.placement, asked.recipe)
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # now, for Ray has set its own
        for job, manifest in pipeline.run(selected, rebuild):
            tell_job(job, manifest)
    except KeyboardInterrupt:
        console.show_cursor()
        console.print("interrupted; the same command goes on from here")
        sys.stdout.flush()
        os._exit(130)  # jobs run on threads of their own, which would outlive Ray for a moment
    tell_report(asked)


def tell_job(job: Job, manifest: dict[str, Any]) -> None:
    """Say that a job is done."""
    console.print(summary(job, manifest), soft_wrap=True)
    for trait, count in manifest["figures"].get("short", {}).items():
        wanted = job.config.questions_per_trait
        console.print(f"  {count} of {wanted} questions: {escape(trait)}", soft_wrap=True)


def summary(job: Job, manifest: dict[str, Any]) -> str:
    """The line that ends a stage."""
    parts = [f"[green]done[/] {job.dataset}"]
    if manifest["rows"]:
        parts.append(f"{manifest['rows']:,} rows")
    if manifest["dropped"]:
        reasons = ", ".join(f"{n} {reason}" for reason, n in manifest["dropped"].items())
        parts.append(f"dropped {reasons}")
    if manifest["tokens_out"]:
        rate = manifest["tokens_out"] / max(manifest["seconds"], 1e-3)
        parts.append(f"{manifest['tokens_out']:,} tokens ({rate:,.0f}/s)")
    if manifest["cached_tokens"]:
        parts.append(f"{manifest['cached_tokens'] / manifest['tokens_in']:.0%} of prompts cached")
    for name in ("loss", "dpo/margin", "dpo/accuracy"):
        if name in manifest["figures"]:
            parts.append(f"{name} {manifest['figures'][name]:.3f}")
    again = repeated_work(manifest["attempts"])
    if again:
        parts.append(f"{again} redone")
    return " · ".join([*parts, duration(manifest["seconds"])])


def tell_report(asked: Run) -> None:
    report = asked.jobs[-1]
    if report.state()[0] == "done":
        where = report.store.address(report.dataset, "report.html")
        console.print(f"report: {where}", soft_wrap=True)


@app.command()
def report(
    recipe: RecipeName,
    names: Names,
    storage: Storage = None,
    smoke: Smoke = False,
) -> None:
    """Write the HTML report again from what storage holds, and say where it is."""
    asked = Run(recipe, names, None, storage, smoke)
    derived = [job for job in asked.jobs if job.stage.disposable]
    for _ in pipeline.run(derived, rebuild="evaluation/report"):
        pass
    tell_report(asked)


@app.command()
def compare(
    ratings: Annotated[list[str], typer.Argument(metavar="DIR DIR...")],
    condition: Annotated[str, typer.Option(help="As in the recipe's conditions.")] = "full",
) -> None:
    """Rank correlation of trait ratings: folders STUDENT/PERSONA/evaluation/rating."""
    from opencharacter.evaluation import rating

    for one, two, score in rating.between(ratings, condition):
        said = "too few traits"
        if score.value is not None:
            said = f"{score.value:.3f}, 95 % interval {score.low:.3f} to {score.high:.3f}"
        console.print(f"{one} {two}: {said}, {score.n} traits", soft_wrap=True, highlight=False)


@app.command()
def export(
    recipe: RecipeName,
    persona: Annotated[str, typer.Argument(help="A trained constitution's name or .yaml file.")],
    to: Annotated[str, typer.Option(help="A new folder, or hub:NAME (made private if new).")],
    form: Annotated[
        Literal["adapter", "merged"], typer.Option(help="The adapter, or whole weights with it.")
    ] = "adapter",
    storage: Storage = None,
    smoke: Smoke = False,
) -> None:
    """Write a finished persona with its model card, for PEFT or for transformers."""
    from opencharacter.persona import export as exporting

    asked = Run(recipe, [persona], None, storage, smoke)
    asked.check_trained(persona)
    console.print(exporting.export(asked.jobs, to, form), soft_wrap=True)


@app.command()
def merge(
    adapters: Annotated[list[str], typer.Argument(metavar="DIR[:WEIGHT]...")],
    to: Annotated[Path, typer.Option(help="Folder of the new adapter; it must not exist.")],
    rank: Annotated[int | None, typer.Option(min=1, help="Reduce to this rank, by SVD.")] = None,
    peft_linear: Annotated[
        bool, typer.Option("--peft-linear", help="Add the factors, as PEFT does: not exact.")
    ] = False,
) -> None:
    """Blend LoRA adapters of one base model: an exact weighted sum; weights may be negative."""
    from opencharacter.persona import merge as stage

    if to.exists():
        raise UserError(f"--to {to}: it exists already; choose another folder")
    with explain_write_errors(str(to)), models.atomic_directory(to) as scratch:
        weighted = [stage.parse_weighted_adapter(text) for text in adapters]
        made = stage.merge(weighted, scratch, rank=rank, peft_linear=peft_linear)
    console.print(
        f"{to}: rank {made['rank']} (stored as {made['padded_to']}), "
        f"{made['relative_error']:.2%} off the exact sum",
        soft_wrap=True,
    )


for command in (plan, status, chat):
    app.command()(command)
app.add_typer(serving, name="serve")


def main() -> None:
    """Entry point: a user's error is one line and exit code 2, a failed stage exit code 1."""
    try:
        app(standalone_mode=True)
    except UserError as error:
        said = escape(one_line_message(error))
        console.print(f"[red]error:[/] {said}", soft_wrap=True, highlight=False)
        sys.exit(2)
    except OpenCharacterError as error:
        said = escape(one_line_message(error))
        console.print(f"[red]failed:[/] {said}", soft_wrap=True, highlight=False)
        sys.exit(1)
