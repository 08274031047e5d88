"""Token probabilities and the judge's readings on the chat page.

The server's answers are canned, the browser is real.
"""

import json
from urllib.parse import urlsplit

import pytest

from opencharacter.serving import chat_page

CHUNKS = [
    ("Moon", [("Moon", -0.5)]),
    (" rises<b>", [(" rises", -4.0), ("<b>", -0.0001)]),
    (" slowly", None),
    (" é", [(" ", -1.0), ("\ufffd", -1.0)]),  # part of a character: the tokens are not the text
]
ANSWERS = {
    "/health": {"needs_key": False},
    "/v1/models": {
        "data": [{"id": "base"}, {"id": "judge"}, {"id": "base:poet", "parent": "base"}]
    },
    "/personas": {"poet": {"description": "", "traits": [], "system": ""}},
}


def stream(with_probabilities: bool) -> str:
    events = []
    for text, tokens in CHUNKS:
        choice: dict = {"delta": {"content": text}}
        if with_probabilities and tokens:
            choice["logprobs"] = {"content": [{"token": t, "logprob": p} for t, p in tokens]}
        events.append(f"data: {json.dumps({'model': 'base', 'choices': [choice]})}\n\n")
    return "".join([*events, "data: [DONE]\n\n"])


@pytest.fixture
def page(browser):
    page = browser.new_page()
    requests: list[dict] = []
    presences = iter((0.2, 0.7, 0.1, None))
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: message.type == "error" and errors.append(message.text))

    def answer(route):
        path = urlsplit(route.request.url).path
        if path == "/":
            body, kind = chat_page.page(), "text/html; charset=utf-8"
            return route.fulfill(body=body, content_type=kind, headers=chat_page.headers())
        if path.endswith("/completions"):
            requests.append(route.request.post_data_json)
            body = stream("logprobs" in requests[-1])
            return route.fulfill(body=body, content_type="text/event-stream; charset=utf-8")
        if path == "/presence":
            return route.fulfill(json={"presence": next(presences), "mass": 0.9})
        return route.fulfill(json=ANSWERS[path])

    page.route("**/*", answer)
    page.goto("http://chat.test/")
    page.locator("#model-0 option").first.wait_for(state="attached")
    yield page, requests
    page.close()
    assert errors == []


def test_token_probabilities_are_shown_on_request_as_text(page):
    chat, requests = page
    box = chat.get_by_label("Show the probability of each token")
    for number, checked in enumerate((False, True)):
        box.set_checked(checked)
        chat.get_by_label("Message to both models").fill("Sing.")
        chat.keyboard.press("Enter")
        answers = chat.get_by_label("Left conversation").locator("p.assistant")
        answers.nth(number).get_by_text("Moon rises<b> slowly é").wait_for()
        chat.get_by_text("Both models have finished.").wait_for()
    assert [request.get("logprobs") for request in requests] == [None, None, True, True]
    tokens = chat.get_by_label("Left conversation").locator(".token")
    titles = [tokens.nth(i).get_attribute("title") for i in range(tokens.count())]
    assert titles == ["probability 60.7 %", "probability 1.8 %", "probability 100.0 %"]
    assert chat.get_by_label("Left conversation").locator(".unlikely").all_inner_texts() == [
        " rises"
    ]
    assert chat.locator(".log b").count() == 0


def test_the_judges_readings_are_shown_by_turn_and_forgotten_with_the_conversation(page):
    chat, _ = page
    chat.get_by_label("After each answer, ask the judge").check()
    for _ in range(2):
        chat.get_by_label("Message to both models").fill("Sing.")
        chat.keyboard.press("Enter")
        chat.get_by_text("Both models have finished.").wait_for()
    notes = chat.locator(".presence").all_inner_texts()
    assert sorted(notes) == [
        "Sounds like poet: 10 %",
        "Sounds like poet: 20 %",
        "Sounds like poet: 70 %",
        "The judge gave no readable verdict.",
    ]
    labels = [svg.get_attribute("aria-label") for svg in chat.locator("figure svg").all()]
    assert sorted(len(label.split(", ")) for label in labels) == [1, 2]
    chat.reload()
    chat.locator("#model-0 option").first.wait_for(state="attached")
    assert [svg.get_attribute("aria-label") for svg in chat.locator("figure svg").all()] == labels
    chat.get_by_role("button", name="Start over").click()
    assert chat.locator("figure:visible").count() == 0
