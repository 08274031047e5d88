"""`opencharacter evaluate`: measures any model or adapter as if it were a trained persona."""

from __future__ import annotations

from typing import Annotated

import typer

from opencharacter.api import Run
from opencharacter.cli.options import (
    RECIPES,
    PersonaOption,
    PlacementOption,
    SetOption,
    SmokeOption,
)
from opencharacter.cli.run import run_jobs
from opencharacter.cli.start import print_plain
from opencharacter.config import files
from opencharacter.evaluation import subject as subjects


def evaluate(
    subject: Annotated[
        str,
        typer.Argument(
            metavar="URL_OR_MODEL_OR_ADAPTER",
            help="A URL of an OpenAI-compatible server (ending in /v1), a model's folder or "
            "Hugging Face id, or an adapter's folder in PEFT's layout.",
        ),
    ],
    constitution: PersonaOption,
    recipe: Annotated[
        str,
        typer.Option(help=f"The recipe with base, judge and sizes ({RECIPES}) or a .yaml file."),
    ] = "demo",
    model: Annotated[
        str | None, typer.Option(help="Name of the model at the URL, if it serves several.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The untrained model. Default: the recipe's student.")
    ] = None,
    placement: PlacementOption = None,
    storage: Annotated[
        str | None,
        typer.Option(help="A path, s3:// or gs:// URL. Default: runs/evaluate/NAME."),
    ] = None,
    set_: SetOption = None,
    smoke: SmokeOption = False,
) -> None:
    """Measure a model or adapter against a constitution and write the report."""
    loaded = files.load_recipe(recipe, smoke, files.parse_assignments(set_ or ()))
    given = subjects.parse_subject(subject, loaded.roles.student, model)
    subjects.require_available(given)
    storage = storage or f"runs/evaluate/{given.name}"
    measured = subjects.evaluation_recipe(loaded, given, base)
    requested = Run(measured, constitution, placement, storage)
    student = measured.roles.student
    if trained_on := subjects.other_base(given, student):
        print_plain(
            f"note: the adapter names {trained_on} as its base and is measured on {student.model}; "
            "if these are different weights, choose its base with --base"
        )
    subjects.leave_out_training(requested.jobs)
    run_jobs(requested, requested.select())
