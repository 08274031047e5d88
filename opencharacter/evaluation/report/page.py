"""The report as one HTML page: no network, everything escaped, whole without its script.

The script only searches the samples; the browser runs it because its hash is in the page's policy.

`page(report)` is a pure function of the dataclasses below; `report.py` fills them.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections import Counter
from dataclasses import dataclass, field
from html import escape

from opencharacter.evaluation.scores import Score


@dataclass(frozen=True)
class StageLine:
    """What one stage did, from its manifest."""

    dataset: str
    rows: int
    dropped: dict[str, int]
    seconds: float
    tokens_out: int
    redone: int
    versions: dict[str, str] = field(default_factory=dict)
    """Of the packages that it ran on."""


@dataclass(frozen=True)
class Curve:
    """One metric of one training: points are (step, value)."""

    training: str
    metric: str
    points: list[tuple[float, float]]


@dataclass(frozen=True)
class Sample:
    """A held-out prompt with two answers."""

    prompt: str
    base: str
    persona: str


@dataclass(frozen=True)
class TraitChange:
    """A trait's Bradley-Terry rating in base and persona, in Elo points, and the difference."""

    trait: str
    base: Score
    persona: Score
    change: Score
    significant: bool
    """Under the recipe's false-discovery rate."""


@dataclass(frozen=True)
class Change(Score):
    """A difference of two shares, -1 .. 1."""


@dataclass(frozen=True)
class TableRow:
    """A row of a table of shares; a cell is None where there is nothing to score."""

    name: str
    cells: list[Score | None]


@dataclass(frozen=True)
class ScoreTable:
    """A section of the page that is a table of shares of 0 .. 1 with their intervals."""

    title: str
    notes: list[str]
    caption: str
    columns: list[str]
    lines: list[TableRow]
    empty: str = "Nothing was scored."
    """Said where there are no lines."""


@dataclass(frozen=True)
class TextStatistic:
    """A property of a set of texts, and the range in which the recipe wants it (inf: no limit)."""

    name: str
    value: float
    least: float = 0.0
    most: float = math.inf

    @property
    def within(self) -> bool:
        return self.least <= self.value <= self.most


@dataclass(frozen=True)
class Quality:
    """The signatures of one dataset's texts."""

    dataset: str
    texts: int
    text_statistics: list[TextStatistic]


@dataclass(frozen=True)
class PersonaReport:
    """All that is known of one persona."""

    name: str
    description: str
    assertions: list[str]
    discriminability: Score
    """Share of held-out answers that a classifier attributes rightly, mean over base and persona;
    0.5 is chance."""
    stages: list[StageLine] = field(default_factory=list)
    quality: list[Quality] = field(default_factory=list)
    meanings: dict[str, str] = field(default_factory=dict)
    """What each signature says."""
    curves: list[Curve] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    traits: list[TraitChange] = field(default_factory=list)
    """Those that are shown, the largest rise first."""
    traits_in_all: int = 0
    tables: list[ScoreTable] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ReportData:
    """One page: a student and its personas."""

    student: str
    recipe: str
    made: str
    personas: list[PersonaReport]
    versions: dict[str, str] = field(default_factory=dict)


CSS = """
:root {
  color-scheme: light dark;
  --paper: #fdfdfc; --raised: #f4f5f5; --rule: #d5d9dc;
  --ink: #1b1f23; --quiet: #586069; --accent: #0a5f8f;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --raised: #1d2125; --rule: #3a4148;
    --ink: #e4e7ea; --quiet: #a2abb3; --accent: #7cc4ee;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 2.5rem 1.25rem 5rem; max-width: 70rem;
  background: var(--paper); color: var(--ink);
  font: 1rem/1.65 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  overflow-wrap: anywhere;
}
h1, h2, h3, h4 { line-height: 1.3; text-wrap: balance; }
h1 { margin: 0 0 .25rem; font-size: 1.9rem; font-weight: 650; }
h2 { margin: 4rem 0 .5rem; padding-top: 1.25rem; border-top: 2px solid var(--accent);
  font-size: 1.6rem; }
h3 { margin: 3rem 0 .75rem; font-size: 1.2rem; }
h4 { margin: 1.75rem 0 .6rem; font-size: 1rem; }
nav h2 { margin: 2rem 0 .5rem; padding: 0; border: 0; font-size: 1.2rem; }
p { margin: .5rem 0; max-width: 44rem; text-wrap: pretty; }
a { color: var(--accent); text-underline-offset: .2em; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 3px; }
.quiet, caption, figcaption, summary { color: var(--quiet); font-size: .9rem; }
.prose, .verse, h4 { white-space: pre-wrap; }
.missing { color: var(--quiet); font-style: italic; }
.big { margin: 0; color: var(--accent); font-size: clamp(2.5rem, 12vw, 3.5rem);
  font-weight: 650; line-height: 1.15; font-variant-numeric: tabular-nums; }
.verdict { font-size: 1.15rem; }
summary { width: fit-content; padding: .25rem 0; cursor: pointer; }
details ul { margin: .5rem 0; padding-left: 1.25rem; max-width: 44rem; }
dl { display: grid; grid-template-columns: minmax(10rem, auto) 1fr; gap: .35rem 1.5rem;
  margin: .75rem 0; font-size: .9rem; }
dt { color: var(--quiet); }
dd { margin: 0; white-space: pre-wrap; font-family: ui-monospace, Menlo, Consolas, monospace; }
figure { margin: 0; min-width: 0; }
.base { color: var(--quiet); }
.persona { color: var(--accent); }

.search { display: flex; flex-wrap: wrap; align-items: baseline; gap: .25rem .75rem;
  margin: 1rem 0; }
.search input { flex: 1 1 12rem; max-width: 24rem; padding: .5rem .7rem; font: inherit;
  color: inherit; background: var(--raised); border: 1px solid var(--quiet);
  border-radius: .3rem; }
.search output { min-height: 1.65em; }
[hidden] { display: none !important; }
.sample { margin: 1.25rem 0 2.25rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr));
  gap: 1rem; }
.pair figure { padding: .9rem 1.1rem 1.1rem; background: var(--raised); border-radius: .3rem;
  border-left: 3px solid var(--rule); }
.pair figure.of-persona { border-left-color: var(--accent); }
.pair figcaption { margin-bottom: .35rem; font-weight: 600; }
.verse { margin: 0; }

.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 16rem), 1fr));
  gap: 1.5rem 2rem; }
.charts figcaption { display: flex; flex-wrap: wrap; justify-content: space-between;
  gap: 0 1rem; }
.charts small { flex-basis: 100%; font-size: .8rem; }
.charts b { color: var(--ink); font-variant-numeric: tabular-nums; }
svg { display: block; }
.charts svg { width: 100%; height: auto; }
svg text { fill: var(--quiet); font-size: 10px; font-variant-numeric: tabular-nums; }
.axis, .chance { fill: none; stroke: var(--rule); }
.chance { stroke: var(--quiet); stroke-dasharray: 3 3; }
.line { fill: none; stroke: var(--accent); stroke-width: 1.5; stroke-linejoin: round; }
.end, .mark { fill: currentColor; }
.end { color: var(--accent); }
.whisker { stroke: currentColor; stroke-width: 2; }

.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; line-height: 1.5;
  font-variant-numeric: tabular-nums; }
/* A table may be wider than the screen; its caption should be readable without scrolling. */
caption { max-width: calc(100vw - 2.5rem); padding-bottom: .5rem; text-align: left; }
th, td { padding: .5rem 1.25rem .5rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--rule); }
th:last-child, td:last-child { padding-right: 0; }
thead th { border-bottom-color: var(--quiet); font-weight: 600; vertical-align: bottom; }
tbody th { min-width: 9.5rem; font-weight: 500; }
tfoot th, tfoot td { border-top: 1px solid var(--quiet); border-bottom: 0; font-weight: 600; }
td small { display: block; color: var(--quiet); font-size: .8rem; white-space: nowrap; }
.stages td, .stages thead th:not(:first-child) { text-align: right; white-space: nowrap; }
.stages td.reasons, .stages thead th:nth-child(4) { text-align: left; }
.stages tbody th, .stages td.reasons { min-width: 12rem; white-space: normal; }
.quality td, .shares td { white-space: nowrap; }
.shares { width: auto; }
.quality thead th { min-width: 4.5rem; }
.bar { fill: none; stroke: var(--accent); stroke-width: 4; }
.tick { fill: none; stroke: var(--ink); stroke-width: 1.5; }
.traits { width: auto; }
.traits th:not(:last-child), .traits td:not(:last-child) { padding-right: 2.25rem; }
.scale { display: grid; grid-template-columns: repeat(3, 1fr); width: 212px; color: var(--quiet);
  font-size: .8rem; font-weight: 400; }
.scale :nth-child(2) { text-align: center; }
.scale :nth-child(3) { text-align: right; }

@media (max-width: 40rem) {
  body { padding-top: 1.5rem; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .6rem; }
}
@media print {
  :root { --paper: #fff; font-size: 10pt; }
  body { max-width: none; padding: 0; }
  h2, h3, h4, caption { break-after: avoid; }
  .sample, .charts figure, tr { break-inside: avoid; }
  .search { display: none; }
  .sample[hidden] { display: block !important; } /* a search narrows the screen, not the paper */
  .scroll { overflow: visible; }
  tfoot { display: table-row-group; } /* or the totals would stand below every page */
}
"""

SCRIPT = """
for (const search of document.querySelectorAll(".search")) {
  const [input, said] = [search.querySelector("input"), search.querySelector("output")];
  const samples = [...search.parentElement.querySelectorAll(".sample")];
  const texts = samples.map(sample => sample.textContent.toLowerCase());
  const find = () => {
    const words = input.value.toLowerCase().split(/\\s+/).filter(Boolean);
    const found = texts.map(text => words.every(word => text.includes(word)));
    samples.forEach((sample, i) => { sample.hidden = !found[i]; });
    const count = found.filter(Boolean).length;
    said.textContent = words.length ? `${count} of ${samples.length} shown` : "";
  };
  input.addEventListener("input", find);
  search.hidden = false;
  find();
}
"""
"""Shows the samples that hold every word typed; without it the page is the same but for that."""


def digest(script: str) -> str:
    """How a policy names a script that may run."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


# A second lock beside escaping: even markup that slipped through could load and run nothing.
POLICY = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest(SCRIPT)}'"

GLYPHS = {"base": "\u25cf", "persona": "\u25c6"}
"""Disc and diamond, the shapes of `mark`: who is who does not hang on colour."""

CLASSIFIER = """\
A text classifier, cross-fitted over prompts that neither model saw in training, guesses which \
of the two wrote an answer; 50% is chance."""

RATED = """\
Bradley-Terry ratings of the same games, in Elo points about a mean of 1,000, with 95% intervals \
from a bootstrap over games, wider where few games of a trait were won or lost. A star marks \
changes that hold under control of the share of false discoveries. An unreadable verdict counts as \
unscored, never as a win or loss."""

Range = tuple[float, float]

CHART = (280, 130)
PLOT_X = (72.0, 276.0)
PLOT_Y = (106.0, 10.0)
"""Where the least and the greatest value of a curve stand; SVG counts downwards."""

BAR = (64, 8)

SHARE_BAR = (96, 12)
CHANGE_REACH = 0.3
"""Change that fills its bar, to each side: the same for all, so that rows can be compared."""

STRIP = (212, 36)
STRIP_X = (8.0, 204.0)
STRIP_Y = {"base": 11.0, "persona": 25.0}


def page(report: ReportData) -> str:
    """One HTML document that needs nothing beside itself."""
    title = f"{report.student}: character report"
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    made = "; ".join(filter(None, (f"Recipe {report.recipe}", report.made, versions)))
    personas = [persona_section(persona, n) for n, persona in enumerate(report.personas, 1)]
    body = element(
        "body",
        element("header", element("h1", escape(title)), element("p", escape(made), class_="quiet")),
        contents(report.personas),
        element("main", *personas) if personas else element("main", missing("No personas.")),
        element("script", SCRIPT),
    )
    return f"<!DOCTYPE html>\n{element('html', head(title), body, lang='en')}\n"


# ------------------------------------------------------------------------------------- frame


def element(tag: str, *content: str, **attributes: str) -> str:
    """An element around markup; attribute values are escaped here, text by the caller.

    Attributes are named as in Python: `class_`, `aria_label`.
    """
    names = [name.rstrip("_").replace("_", "-") for name in attributes]
    pairs = zip(names, attributes.values(), strict=True)
    said = "".join(f' {name}="{escape(value)}"' for name, value in pairs)
    return f"<{tag}{said}>{''.join(content)}</{tag}>"


def head(title: str) -> str:
    return element(
        "head",
        '\n<meta charset="utf-8">\n',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n',
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
        element("title", escape(title)),
        element("style", CSS),
    )


def contents(personas: list[PersonaReport]) -> str:
    """Links to the personas, where there are several."""
    if len(personas) < 2:
        return ""
    links = [
        element("a", escape(persona.name), href=f"#persona-{number}")
        for number, persona in enumerate(personas, 1)
    ]
    listed = element("ol", *(element("li", link) for link in links))
    title = element("h2", "Personas", id="personas")
    return "\n" + element("nav", title, listed, aria_labelledby="personas")


def persona_section(persona: PersonaReport, number: int) -> str:
    # The anchor is a number because a name may hold characters that an id may not.
    return "\n" + element(
        "section",
        element("h2", escape(persona.name)),
        element("p", escape(persona.description), class_="prose"),
        assertions(persona.assertions),
        headline(persona.discriminability),
        side_by_side(persona.samples, number),
        trait_changes(persona.traits, persona.traits_in_all),
        *map(score_table, persona.tables),
        training(persona.curves),
        data_quality(persona.quality, persona.meanings),
        ran(persona.stages),
        settings(persona.settings),
        id=f"persona-{number}",
    )


def section(title: str, *content: str) -> str:
    return "\n" + element("section", element("h3", escape(title)), *content)


def missing(said: str) -> str:
    return element("p", escape(said), class_="missing")


def assertions(said: list[str]) -> str:
    if not said:
        return missing("No assertions.")
    summary = element("summary", f"Assertions ({len(said):,})")
    items = (element("li", escape(text), class_="prose") for text in said)
    return element("details", summary, element("ul", *items))


def settings(values: dict[str, str]) -> str:
    if not values:
        return section("Settings", missing("No settings were recorded."))
    summary = element("summary", f"All settings ({len(values):,})")
    pairs = (element("dt", escape(k)) + element("dd", escape(v)) for k, v in values.items())
    return section("Settings", element("details", summary, element("dl", *pairs)))


# ----------------------------------------------------------------------------------- figures


def percent(share: float | None) -> str:
    return "not scored" if share is None else f"{share:.1%}"


def support(score: Score) -> tuple[str, str]:
    """The interval, and how many stand behind it."""
    interval = "no interval"
    if score.low is not None and score.high is not None:
        interval = f"{percent(score.low)} to {percent(score.high)}"
    return interval, f"n = {score.n:,}, {score.unscored:,} unscored"


def number(value: float) -> str:
    """Four significant digits, yet every digit of a whole part below a billion."""
    if 1000 <= abs(value) < 1e9 or (value == int(value) and abs(value) < 1e9):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    said = [f"{n:,} {unit}" for n, unit in ((hours, "h"), (minutes, "m"), (rest, "s")) if n]
    return " ".join(said) or "0 s"


def who(name: str) -> str:
    """The label of base or persona, with its shape."""
    glyph = element("span", GLYPHS[name], class_=name, aria_hidden="true")
    return f"{glyph} {name.capitalize()}"


# ---------------------------------------------------------------------------------- headline


def headline(score: Score) -> str:
    interval, counted = support(score)
    known = interval if score.low is None else f"95% interval: {interval}"
    return section(
        "Can the persona be told from the base model?",
        element("p", percent(score.value).capitalize(), class_="big"),
        element("p", verdict(score), class_="verdict"),
        element("p", f"{known}; {counted}.".capitalize()),
        element("p", CLASSIFIER, class_="quiet"),
    )


def verdict(score: Score) -> str:
    """What the interval allows to be said, and no more."""
    if score.value is None:
        return "Nothing was scored."
    if score.low is not None and score.low > 0.5:
        return "It can be told apart: the whole interval lies above chance."
    return "It cannot be told from chance at this size: the interval is not wholly above 50%."


# ----------------------------------------------------------------------------------- samples


def side_by_side(samples: list[Sample], number: int) -> str:
    if not samples:
        return section("Side by side", missing("There are no samples."))
    return section("Side by side", search(number), *map(sample_pair, samples))


def search(number: int) -> str:
    """A field that narrows the samples of a persona; hidden where no script runs."""
    field = f"search-{number}"
    label = element("label", "Search prompts and answers", for_=field)
    # An input has no end tag.
    box = f'<input type="search" id="{field}" autocomplete="off" spellcheck="false">'
    said = element("output", for_=field, class_="quiet", aria_live="polite")
    return element("div", label, box, said, class_="search", role="search", hidden="")


def sample_pair(sample: Sample) -> str:
    answers = []
    for name, text in (("base", sample.base), ("persona", sample.persona)):
        verse = element("blockquote", escape(text), class_="verse", dir="auto")
        shown = verse if text.strip() else missing("An empty answer.")
        label = element("figcaption", who(name))
        answers.append(element("figure", label, shown, class_=f"of-{name}"))
    prompt = element("h4", escape(sample.prompt), dir="auto")
    pair = element("div", *answers, class_="pair")
    return "\n" + element("article", prompt, pair, class_="sample")


# ---------------------------------------------------------------------------------- training


def training(curves: list[Curve]) -> str:
    groups: dict[str, list[str]] = {}
    for curve in curves:
        groups.setdefault(curve.training, []).append(chart(curve))
    shown = (
        element("h4", escape(name)) + element("div", *charts, class_="charts")
        for name, charts in groups.items()
    )
    return section("Training", "".join(shown) or missing("No training curves were recorded."))


def chart(curve: Curve) -> str:
    """A curve with its name and last value; values that are not finite have no place on it."""
    points = [point for point in curve.points if all(map(math.isfinite, point))]
    lost = len(curve.points) - len(points)
    caption = element(
        "figcaption",
        element("span", escape(curve.metric)),
        element("b", number(points[-1][1]) if points else "no value"),
        element("small", f"{lost:,} not finite, left out") if lost else "",
    )
    plot = line_plot(f"{curve.training}: {curve.metric}", points) if points else ""
    return "\n" + element("figure", caption, plot)


def line_plot(title: str, points: list[tuple[float, float]]) -> str:
    steps, values = zip(*points, strict=True)
    across, up = (min(steps), max(steps)), (min(values), max(values))
    ends = {"first": values[0], "last": values[-1], "min": up[0], "max": up[1]}
    said = ", ".join(f"{name} {number(value)}" for name, value in ends.items())
    span = f"{number(across[0])} to {number(across[1])}"
    placed = [(place(x, across, PLOT_X), place(y, up, PLOT_Y)) for x, y in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
    x, y = placed[-1]
    return svg(
        title,
        f"{said}; points: {len(points):,}, steps {span}.",
        CHART,
        axes(across, up),
        element("polyline", points=path, class_="line"),
        element("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r="2.5", class_="end"),
    )


def place(value: float, among: Range, onto: Range) -> float:
    """Map a value linearly from one range to another; a range of one point lies in the middle."""
    low, high = among
    share = (value - low) / (high - low) if high > low else 0.5
    return onto[0] + share * (onto[1] - onto[0])


def axes(across: Range, up: Range) -> str:
    """Two lines, each labelled with its least and greatest value, once if they are one."""
    (left, right), (bottom, top) = PLOT_X, PLOT_Y
    drawn = [element("path", d=f"M{left - 6} {top}V{bottom + 6}H{right}", class_="axis")]
    for value in sorted(set(up)):
        y = f"{place(value, up, PLOT_Y) + 3.5:.1f}"
        drawn.append(element("text", number(value), x=f"{left - 10}", y=y, text_anchor="end"))
    ends = sorted(set(across))
    anchors = ("start", "end") if len(ends) == 2 else ("middle",)
    for step, anchor in zip(ends, anchors, strict=True):
        x = f"{place(step, across, PLOT_X):.1f}"
        drawn.append(element("text", number(step), x=x, y=f"{bottom + 20}", text_anchor=anchor))
    return "".join(drawn)


def svg(title: str, description: str, size: tuple[int, int], *content: str) -> str:
    """A drawing with its alternative in words; title and description are text."""
    width, height = size
    words = element("title", escape(title)) + element("desc", escape(description))
    box = {"viewBox": f"0 0 {width} {height}", "width": str(width), "height": str(height)}
    return element("svg", words, *content, role="img", **box)


# ------------------------------------------------------------------------------------ tables


def table(kind: str, caption: str, columns: list[str], rows: list[str], foot: str = "") -> str:
    """A table in a box of its own to scroll in; the caption is text, the rest markup."""
    heads = element("tr", *(element("th", column, scope="col") for column in columns))
    drawn = element(
        "table",
        element("caption", escape(caption)),
        element("thead", heads),
        element("tbody", *rows),
        element("tfoot", foot) if foot else "",
        class_=kind,
    )
    # The box takes the focus so that it can be scrolled without a mouse.
    return element("div", drawn, class_="scroll", tabindex="0", role="group", aria_label=caption)


def row(name: str, *cells: str) -> str:
    # A dataset is a path; it should break after a slash rather than within a word.
    name = escape(name).replace("/", "/<wbr>")
    return "\n" + element("tr", element("th", name, scope="row"), *cells)


def trait_changes(traits: list[TraitChange], in_all: int) -> str:
    title = "Which traits it shows when it may choose"
    if not traits:
        return section(title, missing("No traits were rated."))
    ends = [end for t in traits for s in (t.base, t.persona) for end in (s.low, s.high)]
    known = [end for end in ends if end is not None]
    among = (min(known, default=0.0), max(known, default=1.0))
    middle = number(round(sum(among) / 2))
    scale = element(
        "span",
        *(
            element("span", end)
            for end in (number(round(among[0])), middle, number(round(among[1])))
        ),
        class_="scale",
    )
    columns = ["Trait", who("base"), who("persona"), "Change", f"Rating, with 95% interval{scale}"]
    caption = f"The largest rises and falls: {len(traits):,} of {in_all:,} traits"
    shown = table("traits", caption, columns, [trait_row(trait, among) for trait in traits])
    return section(title, element("p", RATED, class_="quiet"), shown)


def rating_notes(score: Score) -> tuple[str, str]:
    """The interval in points, and how many games stand behind it."""
    interval = "no interval"
    if score.low is not None and score.high is not None:
        interval = f"{score.low:,.0f} to {score.high:,.0f}"
    return interval, f"n = {score.n:,}, {score.unscored:,} unscored"


def trait_row(trait: TraitChange, among: Range) -> str:
    cells = []
    for score in (trait.base, trait.persona):
        notes = (element("small", note) for note in rating_notes(score))
        value = "not rated" if score.value is None else f"{score.value:,.0f}"
        cells.append(element("td", value, *notes))
    moved = "not rated" if trait.change.value is None else f"{trait.change.value:+,.0f}"
    star = " *" if trait.significant else ""
    interval = element("small", rating_notes(trait.change)[0])
    cells.append(element("td", moved + star, interval))
    return row(trait.trait, *cells, element("td", rating_plot(trait, among)))


def rating_plot(trait: TraitChange, among: Range) -> str:
    scores = {"base": trait.base, "persona": trait.persona}
    said = [
        f"{name} {'not rated' if s.value is None else format(s.value, ',.0f')} "
        f"({rating_notes(s)[0]})"
        for name, s in scores.items()
    ]
    (left, right), height = STRIP_X, STRIP[1]
    return svg(
        f"{trait.trait}: rating, base and persona",
        "; ".join(said) + ". The dashed line is the middle of the scale.",
        STRIP,
        element("path", d=f"M{left} {height - 1}H{right}", class_="axis"),
        element("path", d=f"M{(left + right) / 2} 0V{height}", class_="chance"),
        *(mark(name, score, among) for name, score in scores.items()),
    )


def mark(name: str, score: Score, among: Range) -> str:
    """An estimate as a disc (base) or diamond (persona) on its interval."""
    if score.value is None:
        return ""
    x, y = place(score.value, among, STRIP_X), STRIP_Y[name]
    shape = f"M{x - 4:.1f} {y}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z"
    if name == "persona":
        shape = f"M{x - 5:.1f} {y}l5 -5l5 5l-5 5z"
    drawn = element("path", d=shape, class_="mark")
    if score.low is not None and score.high is not None:
        low, high = (place(end, among, STRIP_X) for end in (score.low, score.high))
        drawn = element("path", d=f"M{low:.1f} {y}H{high:.1f}", class_="whisker") + drawn
    return element("g", drawn, class_=name)


def score_table(shown: ScoreTable) -> str:
    if not shown.lines:
        return section(shown.title, missing(shown.empty))
    columns = ["", *map(escape, shown.columns)]
    rows = [row(line.name, *map(score_cell, line.cells)) for line in shown.lines]
    notes = (element("p", escape(note), class_="quiet") for note in shown.notes)
    return section(shown.title, *notes, table("shares", shown.caption, columns, rows))


def score_cell(score: Score | None) -> str:
    """A share over its bar and interval, and how many stand behind it."""
    if score is None:
        return element("td", "")
    if isinstance(score, Change):
        return change_cell(score)
    notes = (element("small", note) for note in support(score))
    return element("td", percent(score.value), score_bar(score), *notes)


def change_cell(change: Change) -> str:
    """A change in percentage points over its bar, which begins in the middle."""
    if change.value is None or change.low is None or change.high is None:
        return element("td", "not compared")
    interval = f"{points(change.low)} to {points(change.high)}"
    counted = f"n = {change.n:,} pairs, {change.unscored:,} unpaired"
    notes = (element("small", note) for note in (interval, counted))
    return element("td", points(change.value), change_bar(change, interval), *notes)


def points(share: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{100 * share:+.1f}".replace("-", "\u2212")


def change_bar(change: Change, interval: str) -> str:
    width, height = SHARE_BAR
    ends = (-CHANGE_REACH, CHANGE_REACH)
    at, low, high = (
        min(max(place(x or 0, ends, (0, width)), 0), width)
        for x in (change.value, change.low, change.high)
    )
    middle, line = width / 2, height / 2
    return svg(
        f"change of {points(change.value or 0)} points",
        f"{interval}; the dashed line is no change.",
        SHARE_BAR,
        element("path", d=f"M0 {line}H{width}", class_="axis"),
        element("path", d=f"M{middle} {line}H{at:.1f}", class_="bar"),
        element("path", d=f"M{low:.1f} {line}H{high:.1f}", class_="tick"),
        element("path", d=f"M{middle} 0V{height}", class_="chance"),
    )


def score_bar(score: Score) -> str:
    """A share as a bar of 0 .. 100 %, its interval as a whisker."""
    if score.value is None:
        return ""
    width, height = SHARE_BAR
    drawn = [
        element("path", d=f"M0 {height / 2}H{width}", class_="axis"),
        element("path", d=f"M0 {height / 2}H{width * score.value:.1f}", class_="bar"),
    ]
    if score.low is not None and score.high is not None:
        low, high = width * score.low, width * score.high
        ends = (
            f"M{low:.1f} 2V{height - 2}M{low:.1f} {height / 2}H{high:.1f}M{high:.1f} 2V{height - 2}"
        )
        drawn.append(element("path", d=ends, class_="tick"))
    return svg(percent(score.value), support(score)[0], SHARE_BAR, *drawn)


def data_quality(lines: list[Quality], meanings: dict[str, str]) -> str:
    """A row a dataset and a column a signature, each with the range that the recipe allows."""
    title = "Data quality"
    if not lines:
        return section(title, missing("No texts were measured."))
    names = list(dict.fromkeys(s.name for line in lines for s in line.text_statistics))
    columns = ["Dataset", "Texts", *(escape(spoken(name)) for name in names)]
    caption = "Signatures of the texts; the bar's tick is the recipe's limit"
    greatest = {
        name: max(s.value for line in lines for s in line.text_statistics if s.name == name)
        for name in names
    }
    rows = [quality_row(line, names, greatest) for line in lines]
    said = (
        element("dt", escape(spoken(k))) + element("dd", escape(v)) for k, v in meanings.items()
    )
    glossary = element("details", element("summary", "What they say"), element("dl", *said))
    return section(title, table("quality", caption, columns, rows), glossary)


def spoken(name: str) -> str:
    """`self_bleu` -> `Self bleu`."""
    return name.replace("_", " ").capitalize()


def quality_row(line: Quality, names: list[str], greatest: dict[str, float]) -> str:
    found = {s.name: s for s in line.text_statistics}
    cells = (signature_cell(found.get(name), greatest[name]) for name in names)
    return row(line.dataset, element("td", f"{line.texts:,}"), *cells)


def signature_cell(signature: TextStatistic | None, greatest: float) -> str:
    """The number over its bar; one that is beyond its limit says so in words too."""
    if signature is None:
        return element("td", "")
    beyond = "" if signature.within else element("small", "beyond its limit")
    return element("td", number(signature.value), signature_bar(signature, greatest), beyond)


def signature_bar(signature: TextStatistic, greatest: float) -> str:
    limits = [end for end in (signature.least, signature.most) if 0 < end < math.inf]
    full = max([1.0 if greatest <= 1 else greatest, *limits])
    width, height = BAR
    said = [f"limit {number(end)}" for end in limits] or ["no limit"]
    ticks = (f"M{width * end / full:.1f} 0V{height}" for end in limits)
    return svg(
        f"{spoken(signature.name)} {number(signature.value)}",
        ", ".join(said),
        BAR,
        element("path", d=f"M0 {height / 2}H{width}", class_="axis"),
        element("path", d=f"M0 {height / 2}H{width * signature.value / full:.1f}", class_="bar"),
        *(element("path", d=tick, class_="tick") for tick in ticks),
    )


def ran(stages: list[StageLine]) -> str:
    if not stages:
        return section("What ran", missing("No stage has run."))
    columns = ["Dataset", "Rows", "Kept", "Dropped", "Time", "Tokens generated", "Redone"]
    caption = "Rows made, kept and dropped; redone: begun again after an interruption"
    rows, foot = [stage_row(stage) for stage in stages], stage_row(total(stages))
    return section("What ran", table("stages", caption, columns, rows, foot))


def stage_row(stage: StageLine) -> str:
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in stage.dropped.items())
    return row(
        stage.dataset,
        element("td", f"{stage.rows:,}"),
        element("td", f"{stage.rows - sum(stage.dropped.values()):,}"),
        element("td", escape(reasons) or "none", class_="reasons"),
        element("td", duration(stage.seconds)),
        element("td", f"{stage.tokens_out:,}"),
        element("td", f"{stage.redone:,}"),
    )


def total(stages: list[StageLine]) -> StageLine:
    return StageLine(
        dataset="Total",
        rows=sum(stage.rows for stage in stages),
        dropped=dict(sum((Counter(stage.dropped) for stage in stages), Counter())),
        seconds=sum(stage.seconds for stage in stages),
        tokens_out=sum(stage.tokens_out for stage in stages),
        redone=sum(stage.redone for stage in stages),
    )
