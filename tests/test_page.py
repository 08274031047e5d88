"""The report's page: it escapes what models wrote, loads nothing, and shows figures honestly."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from opencharacter.evaluation.report.charts import element
from opencharacter.evaluation.report.rendering import DOCS, OTHER_DOCS, docs_link, render
from opencharacter.evaluation.report.sections import (
    Change,
    Curve,
    DataQuality,
    DatasetStatistics,
    Headline,
    PersonaReport,
    ReportData,
    Sample,
    Samples,
    ScoreTable,
    Section,
    Settings,
    Stages,
    StageSummary,
    TextStatistic,
    TrainingCurves,
    TraitChange,
    TraitRatings,
    arrange,
)
from opencharacter.evaluation.robustness import verdict
from opencharacter.evaluation.scores import Score

HOSTILE = "<script>alert(1)</script> \"a\" 'b' & <b onclick=x>\n" + "W" * 300
UNSCORED = Score(None, None, None, 0, unscored=4)
DISTINCT = Score(0.931, 0.88, 0.96, 240, unscored=3)
RATED = Score(1003.2, 960, 1046.4, 80, unscored=2)
FELL = Change(-0.031, -0.05, -0.012, 500, unscored=1)
FALLING = [(float(step), 1 / step) for step in range(1, 201)]


def headline(score: Score) -> Headline:
    return Headline(title="Distinguished?", score=score, verdict=verdict(score))


def quality(*datasets: DatasetStatistics) -> DataQuality:
    return DataQuality(datasets=list(datasets), descriptions={"self_bleu": "how similar"})


def curves(training: str, metric: str, points: list[tuple[float, float]]) -> TrainingCurves:
    return TrainingCurves(trainings={training: [Curve(metric, points)]})


SECTIONS: list[Section] = [
    headline(DISTINCT),
    Samples(title="Samples", samples=[Sample("The wind?", "It is air.", "O wind,\n  my wind")]),
    TraitRatings(
        title="Traits",
        traits=[TraitChange("warm", RATED, RATED, Score(120, 40, 200, 80), significant=True)],
        total=144,
    ),
    ScoreTable(
        title="Robustness",
        findings=("It holds.",),
        reading="higher is better.",
        notes=("How.",),
        caption="By attack",
        columns=["full", "Change"],
        rows={"plain": {"full": DISTINCT, "Change": FELL}},
        descriptions={"plain": "asks for plain words"},
    ),
    curves("DPO", "loss", FALLING),
    curves("SFT", "loss", FALLING),
    quality(
        DatasetStatistics("poetic/teacher", 900, [TextStatistic("self_bleu", 0.2, 0, 0.9)]),
        DatasetStatistics(
            "poetic/transcripts",
            1200,
            [TextStatistic("self_bleu", 0.95, 0, 0.9), TextStatistic("mean_words", 64.2)],
        ),
    ),
    Stages(
        stages=[
            StageSummary(
                "poetic/teacher", 12_000, {"unfinished": 800, "looping": 2}, 3725, 4_812_345, 9
            ),
            StageSummary("poetic/dpo", 100, {"looping": 3}, 59.6, 0, 0),
        ]
    ),
    Settings(values={"seed": "1"}),
]
PERSONA = PersonaReport("poetic", "Speaks in verse.", ["I speak in images."], arrange(SECTIONS))


def page(*personas: PersonaReport) -> str:
    report = ReportData("SmolLM2", "laptop", "2026-01-02", list(personas), {"torch": "2.11"})
    return render(report)


def with_section(section: Section) -> str:
    """The page of one persona with one section."""
    return page(PersonaReport("poetic", "", [], [section]))


class Outline(HTMLParser):
    """Collects tags and attributes; fails if an end tag does not match."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "wbr", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page_of(text: str) -> str:
    """A page on which every text is the same."""
    sections: list[Section] = [
        replace(headline(DISTINCT), title=text + "1", verdict=text, notes=(text,)),
        Samples(title=text + "2", samples=[Sample(text, text, text)]),
        TraitRatings(
            title=text + "3",
            traits=[TraitChange(text, RATED, UNSCORED, UNSCORED, significant=False)],
            total=1,
        ),
        ScoreTable(
            title=text + "4",
            notes=(text,),
            caption=text,
            columns=[text, "second", "third"],
            rows={text: {text: DISTINCT, "second": UNSCORED, "third": None}},
        ),
        curves(text, text, FALLING),
        DataQuality(
            datasets=[DatasetStatistics(text, 1, [TextStatistic(text, 0.5)])],
            descriptions={text: text},
        ),
        Stages(stages=[StageSummary(text, 5, {text: 2}, 1, 1, 0)]),
        Settings(values={text: text}),
    ]
    persona = PersonaReport(text, text, [text], sections)
    return render(ReportData(text, text, text, [persona, persona], {text: text}))


def test_text_from_the_data_never_becomes_markup():
    hostile, plain = Outline(page_of(HOSTILE)), Outline(page_of("plain/text"))
    assert hostile.open == []
    assert hostile.tags == plain.tags
    assert [name for name, _ in hostile.attributes] == [name for name, _ in plain.attributes]
    assert Outline(element("p", title=HOSTILE)).attributes == [("title", HOSTILE)]
    assert Outline(element("p", HOSTILE)).tags == ["p"]


def test_a_persona_without_any_data_still_has_a_complete_page():
    empty: list[Section] = [
        headline(UNSCORED),
        Samples(title="Samples", samples=[]),
        TraitRatings(title="Traits", traits=[], total=0),
        ScoreTable(title="Scores", caption="", columns=[], rows={}),
        TrainingCurves(trainings={}),
        quality(),
        Stages(stages=[]),
        Settings(values={}),
    ]
    text = page(PersonaReport("new", "", [], empty))
    assert Outline(text).open == []
    assert "Nothing was scored." in text
    assert "No interval; n = 0, 4 unscored." in text
    for section in empty[1:]:
        assert section.empty in text
    assert "None" not in text
    assert "No personas." in page()


@pytest.mark.parametrize(
    ("score", "sentence"),
    [
        (Score(0.6, 0.501, 0.7, 90), "Yes: the whole interval lies above chance"),
        (Score(0.6, 0.5, 0.7, 90), "Not shown at this sample size"),
        (Score(0.6, None, None, 90), "Not shown at this sample size"),
        (UNSCORED, "Nothing was scored"),
    ],
)
def test_the_headline_claims_no_more_than_its_interval_allows(score: Score, sentence: str):
    assert verdict(score).startswith(sentence)
    assert verdict(score) in with_section(headline(score))


def test_the_page_loads_nothing_and_runs_no_script_but_its_own():
    text = page(PERSONA, PERSONA)
    outline = Outline(text)
    assert not re.search(r"https?://|@import|url\(", text)
    assert not {"link", "img", "iframe"} & set(outline.tags)
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'\"" in text
    assert not re.search(r"innerHTML|eval|document.write", script)
    targets = [value for name, value in outline.attributes if name in ("href", "src")]
    assert targets == ["#persona-1", "#persona-2"]


def test_a_statistic_beyond_its_limit_says_so_in_words():
    text = page(PERSONA)
    assert text.count("beyond its limit") == 1
    assert "limit 0.9" in text
    assert "how similar" in text


@pytest.mark.parametrize(
    "points",
    [
        [(float(step), 0.1) for step in range(200)],
        [(10.0, 3.5)],
        [(1.0, 2.0), (2.0, math.nan), (3.0, math.inf)],
        [(1.0, math.nan)],
        [],
    ],
    ids=["constant", "single", "partly finite", "never finite", "empty"],
)
def test_a_curve_without_a_range_is_drawn_without_error(points: list[tuple[float, float]]):
    text = with_section(curves("DPO", "loss", points))
    assert Outline(text).open == []
    assert not re.search(r"\b(nan|inf)\b", text)


def test_every_chart_has_a_text_alternative():
    drawings = re.findall(r"<svg.*?</svg>", page(PERSONA), re.DOTALL)
    assert len(drawings) == 8
    for drawing in drawings:
        assert re.match(r'<svg role="img"[^>]*><title>[^<]+</title><desc>[^<]+</desc>', drawing)
    assert "first 1, last 0.005, min 0.005, max 1; points: 200, steps 1 to 200." in drawings[3]


def test_figures_are_readable_and_stages_are_summed():
    text = re.sub(r"<[^>]+>", " ", page(PERSONA))
    assert "93.1%" in text
    assert "95% interval: 88.0% to 96.0%; n = 240, 3 unscored." in text
    assert "1 of 144 traits" in text
    assert re.search(r"1,003 +960 to 1,046 +n = 80, 2 unscored", text)
    assert re.search(r"\+120 \* +40 to 200", text)
    assert re.search(
        r"\u22123\.1 points.*\u22125\.0 to \u22121\.2 +n = 500 pairs, 1 unpaired", text
    )
    totals = re.sub(r"\s+", " ", text[text.index("Total") :])
    assert totals.startswith(
        "Total 12,100 11,295 unfinished 800, looping 5 1 h 3 m 5 s 4,812,345 9"
    )


def test_a_section_says_what_was_found_before_how_it_was_measured():
    text = page(PERSONA)
    order = ["Robustness", "It holds.", "higher is better.", "asks for plain words", "How.</p>"]
    assert sorted(order, key=text.index) == order


def test_a_change_without_an_interval_is_left_out_and_says_how_many_items_there_were():
    one = Change(0.5, None, None, 1, unscored=7)
    text = with_section(ScoreTable(title="t", caption="c", columns=["d"], rows={"r": {"d": one}}))
    assert "too few to measure<small>n = 1 pairs, 7 unpaired</small>" in text


def test_line_breaks_of_answers_are_kept():
    assert ">O wind,\n  my wind</blockquote>" in page(PERSONA)


def table(title: str, row: str, column: str, **fields: str) -> ScoreTable:
    rows = {row: {column: DISTINCT}}
    return ScoreTable(title=title, caption="c", columns=[column], rows=rows, **fields)


def test_sections_with_the_same_title_are_merged():
    (merged,) = arrange([table("t", "base", "a"), table("t", "full", "a"), table("t", "full", "b")])
    assert isinstance(merged, ScoreTable)
    assert merged.columns == ["a", "b"]
    assert {name: list(cells) for name, cells in merged.rows.items()} == {
        "base": ["a"],
        "full": ["a", "b"],
    }
    trainings = [section for section in PERSONA.sections if isinstance(section, TrainingCurves)]
    assert [list(section.trainings) for section in trainings] == [["DPO", "SFT"]]
    with pytest.raises(TypeError, match="two sections with the title 'Distinguished\\?'"):
        arrange([headline(DISTINCT), headline(UNSCORED)])


def test_sections_are_ordered_by_place_and_then_as_given():
    sections = [
        Settings(values={}),
        table("judge", "a", "b", place="reliability"),
        table("second", "a", "b"),
        table("third", "a", "b"),
        headline(DISTINCT),
    ]
    assert [section.title for section in arrange(sections)] == [
        "Distinguished?",
        "second",
        "third",
        "judge",
        "Settings",
    ]


def generated(page: str) -> str:
    """The text of a page that is generated when the documentation is built."""
    path = Path(__file__).parents[1] / "docs" / "_ext" / "reference.py"
    spec = importlib.util.spec_from_file_location("reference", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.pages()[page.removeprefix("reference/")]


def heading_anchors(page: str) -> set[str]:
    """The anchors of the headings of a page of the documentation."""
    docs = Path(__file__).parents[1] / "docs"
    text = generated(page) if page.startswith("reference/") else (docs / f"{page}.md").read_text()
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings} | {""}


def test_every_section_names_a_heading_that_the_documentation_has():
    for target in (*DOCS.values(), OTHER_DOCS):
        page_name, _, heading = target.partition("#")
        assert heading in heading_anchors(page_name), target


def test_sections_link_to_the_documentation_where_it_is_published():
    assert docs_link("Stages", "https://h/docs/") == "https://h/docs/reference/stages.html"
    assert docs_link("?", "https://h") == "https://h/evaluation.html"
    report = ReportData("smol", "demo", "now", [PERSONA], docs_url="https://h/<d>")
    outline = Outline(render(report))
    links = [value for name, value in outline.attributes if name == "href"]
    assert "https://h/<d>/training.html#curves" in links
    assert len(links) == len({section.title for section in PERSONA.sections})
    assert "docs/training.md" in page(PERSONA)
