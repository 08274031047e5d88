"""`opencharacter run` and `opencharacter report`."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from typing import Annotated, Any

import typer
from rich.markup import escape

from opencharacter.api import Run, execute, is_done
from opencharacter.cli.options import (
    PersonaOption,
    PlacementOption,
    RecipeArgument,
    SetOption,
    SmokeOption,
    StorageOption,
    open_run,
)
from opencharacter.runtime.attempts import repeated_work
from opencharacter.runtime.progress import console, duration
from opencharacter.runtime.stage import Job

SUMMARY_FIGURES = ("loss", "dpo/margin", "dpo/accuracy", "eval_loss", "eval_dpo/margin")
SECONDS_BETWEEN_PAGES = 10
"""Seconds after which `report --watch` writes the page of an unfinished run again."""


def run(
    recipe: RecipeArgument,
    constitution: PersonaOption,
    placement: PlacementOption = None,
    storage: StorageOption = None,
    set_: SetOption = None,
    only: Annotated[str | None, typer.Option(help="Run only this stage.")] = None,
    until: Annotated[str | None, typer.Option(help="Run the stages up to this one.")] = None,
    rebuild: Annotated[
        str | None,
        typer.Option(help="Replace the results of this stage and of all that depend on it."),
    ] = None,
    smoke: SmokeOption = False,
    served: Annotated[
        str | None,
        typer.Option(
            metavar="own|NAME|URL",
            help="Evaluate through Ray Serve: `own` deploys an application for this run; the name "
            "of an application of the cluster, or the URL of a server, joins one.",
        ),
    ] = None,
) -> None:
    """Run all stages that are missing. Interrupted stages resume where they stopped."""
    requested = open_run(recipe, constitution, placement, storage, smoke, set_, served)
    selected = requested.select(only, until, rebuild)
    if is_done(selected, rebuild):
        console.print("nothing to do: every stage is done")
        return
    run_jobs(requested, selected, rebuild)


def run_jobs(requested: Run, selected: list[Job], rebuild: str | None = None) -> None:
    """Run jobs, print each when it ends, and print where the report is; Ctrl-C ends the process."""
    try:
        for job, manifest in execute(requested, selected, rebuild, on_connected=stop_on_sigterm):
            print_job(job, manifest)
    except KeyboardInterrupt:
        console.show_cursor()
        console.print("interrupted; run the same command again to resume")
        sys.stdout.flush()
        os._exit(130)  # the threads of running jobs would keep the process alive
    print_report_address(requested)


def stop_on_sigterm() -> None:
    """Handle SIGTERM like Ctrl-C. Ray installs its own handler when it starts."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def print_job(job: Job, manifest: dict[str, Any]) -> None:
    """Print that a job is done, and the traits with too few questions or scenarios."""
    console.print(summary(job, manifest), soft_wrap=True)
    for trait, count in manifest["figures"].get("incomplete_traits", {}).items():
        target = job.config.questions_per_trait
        console.print(f"  {count} of {target} questions: {escape(trait)}", soft_wrap=True)
    for assertion, count in manifest["figures"].get("missing_scenarios", {}).items():
        console.print(f"  {count} scenarios too few: assertion {assertion}", soft_wrap=True)


def summary(job: Job, manifest: dict[str, Any]) -> str:
    """Return the line that reports a finished job."""
    parts = [f"[green]done[/] {job.dataset}"]
    if manifest["rows"]:
        parts.append(f"{manifest['rows']:,} rows")
    if manifest["dropped"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in manifest["dropped"].items())
        parts.append(f"dropped {reasons}")
    if manifest["tokens_out"]:
        rate = manifest["tokens_out"] / max(manifest["seconds"], 1e-3)
        parts.append(f"{manifest['tokens_out']:,} tokens ({rate:,.0f}/s)")
    if manifest["cached_tokens"]:
        share = manifest["cached_tokens"] / manifest["tokens_in"]
        parts.append(f"{share:.0%} of prompt tokens cached")
    for name in SUMMARY_FIGURES:
        if name in manifest["figures"]:
            parts.append(f"{name} {manifest['figures'][name]:.3f}")
    if repeated := repeated_work(manifest["attempts"]):
        parts.append(f"{repeated} repeated")
    return " · ".join([*parts, duration(manifest["seconds"])])


def print_report_address(run: Run) -> None:
    """Print where the report is, if it is done."""
    if address := run.report_address():
        console.print(f"report: {address}", soft_wrap=True)


def report(
    recipe: RecipeArgument,
    constitution: PersonaOption,
    storage: StorageOption = None,
    set_: SetOption = None,
    smoke: SmokeOption = False,
    watch: Annotated[
        bool,
        typer.Option("--watch", help="Write the page of a running run again until it is done."),
    ] = False,
) -> None:
    """Render the HTML report from the data in storage, also that of an unfinished run."""
    requested = open_run(recipe, constitution, None, storage, smoke, set_)
    if watch:
        with contextlib.suppress(KeyboardInterrupt):
            watch_report(requested)
        return
    if not requested.is_evaluated():
        address = requested.write_provisional_report()
        console.print(f"the run is not finished; report so far: {address}", soft_wrap=True)
        return
    requested.rebuild_report()
    print_report_address(requested)


def watch_report(run: Run) -> None:
    """Write the page of a run every few seconds until the run has written its report."""
    shown = ""
    while run.report_address() is None:
        address = run.write_provisional_report(SECONDS_BETWEEN_PAGES)
        if address != shown:
            console.print(f"report so far, which reloads itself: {address}", soft_wrap=True)
            shown = address
        time.sleep(SECONDS_BETWEEN_PAGES)
    print_report_address(run)
