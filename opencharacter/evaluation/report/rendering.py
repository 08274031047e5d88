"""Renders the report as one self-contained HTML page.

The page loads nothing: its style sheet and its script are inlined. All text is escaped, and the
page's content security policy allows no script but its own, which it names by its hash.
"""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from opencharacter.evaluation.report import charts, formatting
from opencharacter.evaluation.report.sections import Change, ReportData, StageSummary

FOLDER = Path(__file__).parent

DOCS = {
    "Training": "training#curves",
    "Data quality": "data#text-statistics-and-limits",
    "Stages": "reference/stages",
    "Settings": "reference/recipe",
    "Which traits does the model prefer after training?": "evaluation#preferences-and-ratings",
    "Which traits does the model prefer so far? (provisional)": (
        "evaluation#preferences-and-ratings"
    ),
    "Do the preferences depend on how the model is asked?": "evaluation#preferences-and-ratings",
    "Can a classifier distinguish the persona from the base model?": "evaluation#robustness",
    "Do attacks hide the character from a classifier? (macro-F1)": "evaluation#robustness",
    "How many of the persona's answers are recognized under attack? (retention)": (
        "evaluation#robustness"
    ),
    "Can one classifier tell the personas apart under attack? (the paper's measure)": (
        "evaluation#robustness"
    ),
    "Which answers express the character more naturally? (coherence)": "evaluation#coherence",
    "Does the persona show its assertions?": "evaluation#adherence-is-each-assertion-shown",
    "How much does the character change over ten turns?": (
        "evaluation#drift-does-the-character-last"
    ),
    "Does the character last over a conversation?": "evaluation#drift-does-the-character-last",
    "Which side effects came with the character?": (
        "evaluation#side-effects-which-harm-came-with-the-character"
    ),
    "Do data and answers lie along the constitution's direction?": (
        "evaluation#along-the-constitutions-direction"
    ),
    "Does the direction agree with the judge?": "evaluation#along-the-constitutions-direction",
    "How reliable is the judge?": "evaluation#judge",
    "Is the judge as sure as it should be? (calibration)": "evaluation#judge",
    "Which abilities changed?": "evaluation#capabilities",
}
"""Page and heading of the documentation about a section, by its title."""
OTHER_DOCS = "evaluation"
"""Page about the other sections."""


def render(report: ReportData) -> str:
    """Return the page as HTML."""
    style, script = (Markup(read_asset(name)) for name in ("report.css", "report.js"))
    template = environment().get_template("template.html.j2")
    return template.render(report=report, style=style, script=script, policy=policy(script))


@cache
def environment() -> Environment:
    """The template's environment, with autoescape on and the formats and charts as filters."""
    made = Environment(
        loader=FileSystemLoader(FOLDER, encoding="utf-8"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    made.filters |= {
        "percent": formatting.percent,
        "points": formatting.points,
        "number": formatting.number,
        "duration": formatting.duration,
        "label": formatting.label,
        "breakable": breakable,
        "total": total,
    }
    made.tests["change"] = lambda score: isinstance(score, Change)
    made.globals |= {"charts": charts, "formatting": formatting}
    made.globals |= {"docs_page": docs_page, "docs_link": docs_link}
    return made


@cache
def read_asset(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def policy(script: str) -> Markup:
    """The content security policy: a second protection besides escaping."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Markup(f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'")


def docs_page(title: str) -> str:
    """Return the page and the heading of the documentation about a section of the report."""
    return DOCS.get(title, OTHER_DOCS)


def docs_link(title: str, base: str) -> str:
    """Return the address of the documentation about a section.

    Args:
        title: of the section.
        base: address of the documentation.
    """
    name, _, heading = docs_page(title).partition("#")
    return f"{base.rstrip('/')}/{name}.html{'#' if heading else ''}{heading}"


def breakable(name: str) -> Markup:
    """Allow line breaks after the slashes of a dataset's path."""
    return escape(name).replace("/", Markup("/<wbr>"))


def total(stages: list[StageSummary]) -> StageSummary:
    """The sums of all stages."""
    return StageSummary(
        dataset="Total",
        rows=sum(stage.rows for stage in stages),
        dropped=dict(sum((Counter(stage.dropped) for stage in stages), Counter())),
        seconds=sum(stage.seconds for stage in stages),
        tokens_out=sum(stage.tokens_out for stage in stages),
        redone=sum(stage.redone for stage in stages),
    )
