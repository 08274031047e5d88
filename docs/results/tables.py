"""Writes the tables and figures of docs/results from the storage of a run.

A page holds text written by hand. The script replaces what stands between `<!-- table: NAME -->`
and `<!-- /table -->`, and leaves the rest as it is; a page that another folder lacks begins as a
copy of the one here. The script reads manifests, and the tables of the evaluation stages; what the
storage lacks is named in the place of its table.

Run: python docs/results/tables.py STORAGE RECIPE [--out docs/results] [--pages PAGE ...]
     [--speed SPEEDS] [--device NAME]
"""

from __future__ import annotations

import argparse
import html
import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import figures
from character_tables import CHARACTER_TABLES
from further_tables import FURTHER_TABLES
from stored import BASE, FULL, StoredRun, grid, joined, missing, open_run, wall_seconds

from opencharacter.errors import UserError
from opencharacter.evaluation.report.formatting import duration
from opencharacter.planning import simulation
from opencharacter.planning.speeds import load_speeds
from opencharacter.runtime.attempts import repeated_work
from opencharacter.runtime.manifests import HeldTime, held_time
from opencharacter.runtime.stage import Job
from opencharacter.text.chat import row_id

HERE = Path(__file__).parent
PAGES = ("eleven-personas.md", "answers.md")
MARKER = re.compile(r"(<!-- table: (?P<name>[^>]+?) -->\n).*?(<!-- /table -->)", re.DOTALL)
TABLE = '<table class="docutils">'
ANSWERS = 20
DIGITS = 8
"""Digits of a digest that are shown."""


# ---------------------------------------------------------------------------------------- the run


def digest(manifests: Iterable[dict[str, Any]]) -> str:
    """A digest of the fingerprints of several datasets."""
    return row_id(*sorted(manifest["fingerprint"] for manifest in manifests))[:DIGITS]


def percent_of(held: HeldTime) -> str:
    """The idle share of held time."""
    return "-" if held.idle_share is None else f"{held.idle_share:.0%}"


def run_tables(run: StoredRun, speed: str | None = None, device: str | None = None) -> str:
    """What was run, how long it took, and the forecast if speeds are given.

    Args:
        run: the run.
        speed: source of the speeds for a forecast, as in `opencharacter plan`.
        device: name of the machine.
    """
    manifests = list(run.manifests.values())
    on_gpu = [manifest for manifest in manifests if manifest["gpu_seconds"]]
    newest = max(on_gpu or manifests, key=lambda manifest: manifest["finished"])
    versions = ", ".join(f"{name} {version}" for name, version in newest["versions"].items())
    models = {name: role.model for name, role in run.recipe.roles if hasattr(role, "model")}
    repeated = sum(repeated_work(manifest["attempts"]) for manifest in manifests)
    facts = [
        ["recipe", run.recipe.name],
        ["models", "; ".join(f"{name} {model}" for name, model in models.items())],
        ["personas", ", ".join(persona.name for persona in run.personas)],
        ["device", device or "not given"],
        ["versions", versions],
        ["finished", newest["finished"]],
        ["datasets", f"{len(manifests)}, digest {digest(manifests)}"],
        ["rows or steps repeated after an interruption", f"{repeated:,}"],
    ]
    held, seconds = held_time(manifests), wall_seconds(manifests)
    what = "GPU-hours" if held.on_gpu else "hours of engines and workers"
    header = ["", "measured"]
    measured = [
        ["time with a stage under way", duration(seconds)],
        [what, f"{held.held / 3600:.2f}"],
        ["idle share", percent_of(held)],
    ]
    if speed:
        planned = simulation.plan(run.jobs, load_speeds(speed))
        totals = simulation.totals(planned)
        header.append("forecast of `plan`")
        measured[0].append(duration(simulation.wall_seconds(planned)))
        measured[1].append(f"{totals.gpu_hours:.2f}")
        measured[2].append(f"{totals.idle:.0%}")
    return joined(grid(["", ""], facts), grid(header, measured), unfinished(run))


def unfinished(run: StoredRun) -> str:
    """A sentence that counts the datasets without a manifest, by stage."""
    planned = Counter(job.stage.name for job in run.jobs)
    absent = Counter(job.stage.name for job in run.jobs if job.dataset not in run.manifests)
    counts = [f"{name} ({n} of {planned[name]} datasets)" for name, n in absent.items()]
    return f"Not finished: {', '.join(counts)}." if counts else ""


def stage_table(run: StoredRun) -> str:
    """Rows, tokens and times of each stage, over all personas, with a digest of its manifests."""
    stages: dict[str, list[dict[str, Any]]] = {}
    for job in run.jobs:
        if job.dataset in run.manifests:
            stages.setdefault(job.stage.name, []).append(run.manifests[job.dataset])
    rows = []
    for name, manifests in stages.items():
        held = held_time(manifests)
        dropped = sum(sum(manifest["dropped"].values()) for manifest in manifests)
        rows.append(
            [
                name,
                str(len(manifests)),
                f"{sum(manifest['rows'] for manifest in manifests):,}",
                f"{dropped:,}",
                f"{sum(manifest['tokens_out'] for manifest in manifests):,}",
                duration(wall_seconds(manifests)),
                f"{held.held / 60:.1f}",
                percent_of(held),
                digest(manifests),
            ]
        )
    what = "GPU-minutes" if held_time(list(run.manifests.values())).on_gpu else "minutes held"
    header = ["stage", "datasets", "rows", "dropped", "tokens generated", "time", what, "idle"]
    return grid([*header, "digest"], rows)


# ---------------------------------------------------------------------------------------- answers


def answer_tables(run: StoredRun, count: int = ANSWERS) -> str:
    """The first answers of base by id, beside those of each full persona, as HTML tables.

    A persona's answer is missing where it was trained on the prompt.

    Args:
        run: the run.
        count: number of prompts.
    """
    jobs = run.finished("evaluation/answers")
    if not (student := jobs.pop("", None)):
        return missing(run, "evaluation/answers")
    base = sorted(rows_of(student, BASE), key=lambda row: row["id"])[:count]
    parts = [missing(run, "evaluation/answers")]
    for name, job in jobs.items():
        full = {row["prompt"]: row for row in rows_of(job, FULL)}
        lines = [
            html_row("td", row["prompt"], shown_text(row), shown_text(full.get(row["prompt"])))
            for row in base
        ]
        table = "\n".join([TABLE, html_row("th", "prompt", BASE, FULL), *lines, "</table>"])
        parts.append(f"## {name}\n\n{table}")
    return joined(*parts)


def rows_of(job: Job, condition: str) -> list[dict[str, Any]]:
    """The rows of a condition, dropped ones included."""
    rows = job.store.read_table(job.dataset).to_pylist()
    return [row for row in rows if row["condition"] == condition]


def shown_text(row: dict[str, Any] | None) -> str:
    """An answer, or why there is none."""
    if row is None:
        return "(not asked: a training prompt)"
    reason = row.get("drop_reason")
    return f"(dropped: {reason}) {row['answer'] or ''}" if reason else row["answer"]


def html_row(tag: str, *texts: str) -> str:
    """A row of an HTML table, on one line."""
    cells = (f"<{tag}>{html_text(text)}</{tag}>" for text in texts)
    return f"<tr valign=top>{''.join(cells)}</tr>"


def html_text(text: str) -> str:
    """A text of a model, escaped, with its line breaks."""
    lines = (" ".join(line.split()) for line in text.strip().splitlines())
    printable = ("".join(c for c in line if c.isprintable()) for line in lines)
    return "<br>".join(html.escape(line, quote=False) for line in printable)


# ------------------------------------------------------------------------------------------ pages


def fill(page: str, contents: dict[str, str]) -> str:
    """Replace what stands between the markers of a page.

    Raises:
        UserError: if the page names a table that does not exist.
    """

    def content(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in contents:
            raise UserError(f"table {name!r} is unknown; tables: {', '.join(contents)}")
        return f"{match[1]}\n{contents[name]}\n\n{match[3]}"

    return MARKER.sub(content, page)


def write(
    run: StoredRun,
    out: Path,
    pages: Iterable[str] = PAGES,
    speed: str | None = None,
    device: str | None = None,
) -> None:
    """Write the figures, and the tables into the pages of a folder."""
    tables = FURTHER_TABLES | CHARACTER_TABLES
    contents = {
        "run": run_tables(run, speed, device),
        "stages": stage_table(run),
        **{name: function(run) for name, function in tables.items()},
        "answers": answer_tables(run),
    }
    for page in pages:
        path = out / page
        source = path if path.exists() else HERE / page
        path.write_text(fill(source.read_text(encoding="utf-8"), contents), encoding="utf-8")
    (out / "drift.svg").write_text(figures.drift_figure(run) + "\n", encoding="utf-8")
    (out / "adherence.svg").write_text(figures.adherence_figure(run) + "\n", encoding="utf-8")


def main() -> None:
    """Read the command line, and write the pages."""
    parser = argparse.ArgumentParser(description="Write the tables and figures of docs/results.")
    parser.add_argument("storage", help="path or URL of the storage")
    parser.add_argument("recipe", help="a recipe with the student's name")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--pages", nargs="+", default=PAGES, help="the pages to write")
    parser.add_argument("--speed", help="speeds for a forecast, as in `opencharacter plan`")
    parser.add_argument("--device", help="name of the machine")
    arguments = parser.parse_args()
    try:
        run = open_run(arguments.storage, arguments.recipe)
        write(run, arguments.out, arguments.pages, arguments.speed, arguments.device)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
