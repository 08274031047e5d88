"""The report in a browser: the search narrows the samples, and printing shows them all."""

from dataclasses import replace

import pytest
from test_page import HOSTILE, PERSONA

from opencharacter.evaluation.report.rendering import render
from opencharacter.evaluation.report.sections import ReportData, Sample, Samples

pytestmark = pytest.mark.slow

SAMPLES = [
    Sample("The wind?", "It is air.", "O wind,\n  my wind"),
    Sample("The sea?", "Salt water.", "The tide is a slow breath"),
    Sample("A question", HOSTILE, "A breath of wind on the sea"),
]
LABEL = "Search prompts and answers"


@pytest.fixture
def open_report(browser, tmp_path):
    """Opens a report of two personas from a file; fails on an error or a network request."""
    persona = replace(PERSONA, sections=[Samples(title="Samples", samples=SAMPLES)])
    path = tmp_path / "report.html"
    text = render(ReportData("Tiny", "tiny", "today", [persona, persona]))
    path.write_text(text, encoding="utf-8")
    contexts, errors = [], []

    def open_page(width=1100, scripts=True):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, java_script_enabled=scripts
        )
        contexts.append(context)
        opened = context.new_page()
        opened.on("pageerror", lambda error: errors.append(str(error)))
        opened.on(
            "console", lambda message: message.type == "error" and errors.append(message.text)
        )
        opened.on("dialog", lambda dialog: errors.append(dialog.message))
        opened.on("request", lambda r: r.url.startswith("file:") or errors.append(r.url))
        opened.goto(path.as_uri())
        return opened

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []


def visible(opened, persona=1):
    samples = opened.locator(f"#persona-{persona} .sample")
    return [n for n in range(samples.count()) if samples.nth(n).is_visible()]


def test_the_search_keeps_samples_with_every_typed_word_and_shows_their_number(open_report):
    opened = open_report()
    box = opened.get_by_label(LABEL).first
    assert visible(opened) == [0, 1, 2]
    box.fill("WIND  sea")
    assert visible(opened) == [2]
    assert visible(opened, persona=2) == [0, 1, 2]
    assert opened.get_by_role("status").first.inner_text() == "1 of 3 shown"
    box.fill("nothing like it")
    assert visible(opened) == []
    assert opened.get_by_role("status").first.inner_text() == "0 of 3 shown"
    box.fill("")
    assert visible(opened) == [0, 1, 2]
    assert opened.get_by_role("status").first.inner_text() == ""


def test_the_search_field_is_labelled_and_reachable_by_keyboard(open_report):
    opened = open_report()
    for _ in range(40):
        opened.keyboard.press("Tab")
        if opened.evaluate("document.activeElement.type") == "search":
            break
    opened.keyboard.type("tide")
    assert visible(opened) == [1]
    assert opened.get_by_role("search").count() == 2
    assert opened.get_by_role("searchbox", name=LABEL).count() == 2


def test_a_printed_report_shows_every_sample_and_no_search_field(open_report):
    opened = open_report()
    opened.get_by_label(LABEL).first.fill("tide")
    opened.emulate_media(media="print")
    assert visible(opened) == [0, 1, 2]
    assert not opened.get_by_label(LABEL).first.is_visible()


def test_without_javascript_the_report_is_complete_and_has_no_search_field(open_report):
    opened = open_report(scripts=False)
    assert visible(opened) == [0, 1, 2]
    assert not opened.locator(".search").first.is_visible()


def test_the_report_fits_a_phone_screen_without_horizontal_scrolling(open_report):
    opened = open_report(width=380)
    opened.get_by_label(LABEL).first.fill("wind")
    assert opened.evaluate("document.documentElement.scrollWidth") <= 380


def test_a_narrow_screen_shows_scores_without_scrolling_sideways(browser, tmp_path):
    path = tmp_path / "report.html"
    text = render(ReportData("Tiny", "tiny", "today", [PERSONA]))
    path.write_text(text, encoding="utf-8")
    opened = browser.new_page(viewport={"width": 400, "height": 900})
    opened.goto(path.as_uri())
    for element in ("document.documentElement", "document.querySelector('.scroll:has(.cards)')"):
        assert opened.evaluate(f"{element}.scrollWidth <= {element}.clientWidth")
    cell = opened.locator("td[data-column='Change']").first
    assert "Change" in cell.evaluate("e => getComputedStyle(e, '::before').content")
    opened.close()
