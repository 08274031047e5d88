"""`opencharacter compare`: ratings of several personas, and a run beside the paper."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from opencharacter.errors import UserError
from opencharacter.evaluation.scores import Score
from opencharacter.runtime.progress import console
from opencharacter.runtime.store import Store

REPORT, RATING = "evaluation/report", "evaluation/rating"


def compare(
    folders: Annotated[
        list[str],
        typer.Argument(
            metavar="DIR DIR...",
            help="Folders STUDENT/PERSONA/evaluation/rating, or STUDENT/evaluation/report.",
        ),
    ],
    condition: Annotated[str, typer.Option(help="A condition of the recipes.")] = "full",
    ratings: Annotated[
        Literal["bradley-terry", "elo"],
        typer.Option(help="Ratings of all games, or the paper's: Elo of the framing feels."),
    ] = "bradley-terry",
) -> None:
    """Compare trait ratings by their rank correlation, or a report with the paper's numbers."""
    reports = [folder for folder in folders if is_folder_of(folder, REPORT)]
    for folder in reports:
        print_lines(paper_lines(folder))
    if rated := [folder for folder in folders if folder not in reports]:
        print_lines(rating_lines(rated, condition, ratings == "elo"))


def is_folder_of(folder: str, stage: str) -> bool:
    """Whether a folder is the dataset of a stage, by its name."""
    return folder.rstrip("/").endswith(stage)


def store_of(folder: str, stage: str) -> Store:
    """The storage of a student or persona whose folder of a stage is given."""
    return Store.at(folder.rstrip("/").removesuffix(stage).rstrip("/") or ".")


def print_lines(lines: list[str]) -> None:
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def paper_lines(folder: str) -> list[str]:
    """The lines about the paper of a finished report.

    Raises:
        UserError: if there is no report, or it is of an earlier version.
    """
    manifest = store_of(folder, REPORT).manifest(REPORT)
    if manifest is None:
        raise UserError(f"{folder} has no finished report; finish the run first")
    lines = manifest["figures"].get("paper")
    if lines is None:
        raise UserError(
            f"{folder} is the report of an earlier version; write it again with `opencharacter "
            "report`"
        )
    return lines


def rating_lines(folders: list[str], condition: str, elo: bool) -> list[str]:
    """The rank correlation of every two ratings, and of three beside the paper's."""
    from opencharacter.evaluation import paper, rank_correlation

    compared = rank_correlation.compare_folders(folders, condition, elo)
    lines = [
        f"{first} {second}: {describe(score)}, {score.n} traits"
        for first, second, score in compared
    ]
    if len(folders) != len(paper.STUDENTS):
        return lines
    manifests = [store_of(folder, RATING).manifest("evaluation/preferences") for folder in folders]
    scores = [score for _, _, score in compared]
    return [*lines, paper.correlation_line(scores, condition, manifests, elo)]


def describe(score: Score) -> str:
    """A rank correlation with its interval."""
    if score.value is None:
        return "too few traits"
    return f"{score.value:.3f}, 95 % interval {score.low:.3f} to {score.high:.3f}"
