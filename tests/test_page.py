"""The report page: safe whatever the models wrote, honest about its figures, whole in itself."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from opencharacter.evaluation.report.page import (
    Change,
    Curve,
    PersonaReport,
    Quality,
    ReportData,
    Sample,
    ScoreTable,
    StageLine,
    TableRow,
    TextStatistic,
    TraitChange,
    element,
    page,
    verdict,
)
from opencharacter.evaluation.scores import Score

HOSTILE = "<script>alert(1)</script> \"a\" 'b' & <b onclick=x>\n" + "W" * 300
UNSCORED = Score(None, None, None, 0, unscored=4)
APART = Score(0.931, 0.88, 0.96, 240, unscored=3)
RATED = Score(1003.2, 960, 1046.4, 80, unscored=2)
FELL = Change(-0.031, -0.05, -0.012, 500, unscored=1)
FALLING = [(float(step), 1 / step) for step in range(1, 201)]

PERSONA = PersonaReport(
    name="poetic",
    description="Speaks in verse.",
    assertions=["I speak in images."],
    discriminability=APART,
    stages=[
        StageLine("poetic/teacher", 12_000, {"unfinished": 800, "looping": 2}, 3725, 4_812_345, 9),
        StageLine("poetic/dpo", 100, {"looping": 3}, 59.6, 0, 0),
    ],
    quality=[
        Quality("poetic/teacher", 900, [TextStatistic("self_bleu", 0.2, 0, 0.9)]),
        Quality(
            "poetic/transcripts",
            1200,
            [TextStatistic("self_bleu", 0.95, 0, 0.9), TextStatistic("mean_words", 64.2)],
        ),
    ],
    meanings={"self_bleu": "how alike"},
    curves=[Curve("DPO", "loss", FALLING), Curve("SFT", "loss", FALLING)],
    samples=[Sample("The wind?", "It is air.", "O wind,\n  my wind")],
    traits=[TraitChange("warm", RATED, RATED, Score(120, 40, 200, 80), significant=True)],
    traits_in_all=144,
    tables=[
        ScoreTable(
            "Held?", ["How."], "By attack", ["full", "Change"], [TableRow("plain", [APART, FELL])]
        )
    ],
    settings={"seed": "1"},
)


def render(*personas: PersonaReport) -> str:
    versions = {"torch": "2.11"}
    return page(
        ReportData("SmolLM2", "recipes/laptop.yaml", "2026-01-02", list(personas), versions)
    )


class Outline(HTMLParser):
    """Collects tags and attributes, and fails on one that closes what is not open."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "wbr", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def saying(text: str) -> str:
    """A page on which every text is this one."""
    persona = PersonaReport(
        name=text,
        description=text,
        assertions=[text],
        discriminability=APART,
        stages=[StageLine(text, 5, {text: 2}, 1, 1, 0)],
        curves=[Curve(text, text, FALLING)],
        samples=[Sample(text, text, text)],
        traits=[TraitChange(text, RATED, UNSCORED, UNSCORED, significant=False)],
        tables=[ScoreTable(text, [text], text, [text], [TableRow(text, [APART, UNSCORED, None])])],
        settings={text: text},
    )
    return page(ReportData(text, text, text, [persona, persona], {text: text}))


def test_text_from_data_is_escaped():
    hostile, plain = Outline(saying(HOSTILE)), Outline(saying("plain/text"))
    assert hostile.open == []
    assert hostile.seen == plain.seen
    assert [name for name, _ in hostile.attributes] == [name for name, _ in plain.attributes]
    assert Outline(element("p", title=HOSTILE)).attributes == [("title", HOSTILE)]


def test_the_report_of_a_persona_without_data_is_complete():
    text = render(PersonaReport("new", "", [], UNSCORED))
    assert Outline(text).open == []
    assert "Nothing was scored." in text
    assert "No traits were rated." in text
    assert "None" not in text


@pytest.mark.parametrize(
    ("score", "sentence"),
    [
        (Score(0.6, 0.501, 0.7, 90), "It can be told apart"),
        (Score(0.6, 0.5, 0.7, 90), "It cannot be told from chance at this size"),
        (Score(0.6, None, None, 90), "It cannot be told from chance at this size"),
        (UNSCORED, "Nothing was scored"),
    ],
)
def test_the_headline_claims_no_more_than_its_interval_supports(score: Score, sentence: str):
    assert verdict(score).startswith(sentence)
    assert verdict(score) in render(replace(PERSONA, discriminability=score))


def test_the_report_makes_no_network_request_and_has_only_the_search_script():
    text = render(PERSONA, PERSONA)
    outline = Outline(text)
    assert not re.search(r"https?://|@import|url\(", text)
    assert not {"link", "img", "iframe"} & set(outline.seen)
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    hashed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f'script-src &#x27;sha256-{hashed}&#x27;"' in text or f"'sha256-{hashed}'\"" in text
    assert not re.search(r"innerHTML|eval|document.write", script)
    targets = [value for name, value in outline.attributes if name in ("href", "src")]
    assert targets == ["#persona-1", "#persona-2"]


def test_a_text_statistic_beyond_its_limit_is_marked_in_words():
    shown = render(PERSONA)
    assert shown.count("beyond its limit") == 1
    assert "limit 0.9" in shown
    assert "how alike" in shown
    assert "No texts were measured." in render(replace(PERSONA, quality=[]))


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
def test_a_constant_curve_is_drawn(points: list[tuple[float, float]]):
    text = render(replace(PERSONA, curves=[Curve("DPO", "loss", points)]))
    assert Outline(text).open == []
    assert not re.search(r"\b(nan|inf)\b", text)


def test_every_chart_has_a_text_alternative():
    drawings = re.findall(r"<svg.*?</svg>", render(PERSONA), re.DOTALL)
    assert len(drawings) == 8
    for drawing in drawings:
        assert re.match(r'<svg role="img"[^>]*><title>[^<]+</title><desc>[^<]+</desc>', drawing)
    assert "first 1, last 0.005, min 0.005, max 1; points: 200, steps 1 to 200." in drawings[3]


def test_numbers_are_formatted_and_stage_totals_add_up():
    text = re.sub(r"<[^>]+>", " ", render(PERSONA))
    assert "93.1%" in text
    assert "95% interval: 88.0% to 96.0%; n = 240, 3 unscored." in text
    assert "24 of" not in text
    assert "1 of 144 traits" in text
    assert re.search(r"1,003 +960 to 1,046 +n = 80, 2 unscored", text)
    assert re.search(r"\+120 \* +40 to 200", text)
    assert re.search(r"\u22123\.1.*\u22125\.0 to \u22121\.2 +n = 500 pairs, 1 unpaired", text)
    totals = re.sub(r"\s+", " ", text[text.index("Total") :])
    assert totals.startswith(
        "Total 12,100 11,295 unfinished 800, looping 5 1 h 3 m 5 s 4,812,345 9"
    )


def test_line_breaks_in_answers_are_kept():
    assert ">O wind,\n  my wind</blockquote>" in render(PERSONA)
