"""The chat page in a real browser: Debian's chromium (`apt-get install chromium`), Playwright."""

import json
from pathlib import Path

import canary
import pyarrow.dataset as ds
import pytest
import server as servers
from samples import ECHO_ROLE, recipe_of

from opencharacter.runtime.store import Store
from opencharacter.serving.chat_page import RATINGS_DATASET

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def storage(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def server(storage):
    recipe = recipe_of(ECHO_ROLE, name="echoes")
    store = Store.at(str(storage / "runs/echoes"))
    files = storage / "adapter"
    files.mkdir()
    (files / "adapter_config.json").write_text("{}")
    for persona, stage in (("poeticism", "persona/merge"), ("humor", "distillation/dpo")):
        canary.publish(canary.job(recipe, store, persona, stage), files)
    slow = {**ECHO_ROLE, "model": "echo:0.5"}
    data = {"name": "echoes", "roles": dict.fromkeys(servers.ECHO_RECIPE["roles"], slow)}
    for path in Path(store.url).rglob("manifest.json"):
        path.write_text(path.read_text().replace('"model": "echo:"', '"model": "echo:0.5"'))
    with servers.serving(storage, data, key=servers.KEY) as running:
        yield running


@pytest.fixture
def page(browser, server):
    """The chat page with its key entered; fails on console errors and requests to other hosts."""
    context = browser.new_context(viewport={"width": 1100, "height": 900}, accept_downloads=True)
    page = context.new_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: message.type == "error" and errors.append(message.text))
    page.on("dialog", lambda dialog: errors.append(dialog.message))
    page.on(
        "request",
        lambda r: r.url.startswith((server.url, "data:", "blob:")) or errors.append(r.url),
    )
    page.goto(server.url)
    page.get_by_label("API key of this server").fill(servers.KEY)
    page.get_by_role("button", name="Use key").click()
    page.locator("#model-0 option").first.wait_for(state="attached")
    page.get_by_label("API key of this server").wait_for(state="hidden")
    yield page
    context.close()
    assert errors == []


def send(page, text: str) -> None:
    page.get_by_label("Message to both models").fill(text)
    page.keyboard.press("Enter")
    page.get_by_text("Both models have finished.").wait_for()


def logs(page) -> list[str]:
    return [page.get_by_label(f"{side} conversation").inner_text() for side in ("Left", "Right")]


def test_two_models_answer_side_by_side_and_can_be_rated(page, storage):
    page.get_by_label("Left model").select_option("echo")
    page.get_by_label("Right model").select_option("echo:poeticism")
    page.get_by_label("Message to both models").fill("one two three four five six seven")
    page.keyboard.press("Enter")
    lengths = set()
    while page.get_by_text("Both models have finished.").count() == 0:
        lengths.add(tuple(len(log) for log in logs(page)))
    assert len({left for left, _ in lengths}) > 3  # streamed
    assert len({right for _, right in lengths}) > 3
    left, right = logs(page)
    assert "echo: one two" in left
    assert "echo:poeticism@" in right
    page.get_by_role("button", name="Right is more in character").click()
    page.get_by_text("rating has been saved").wait_for()
    page.reload()
    page.locator("#model-1 option").first.wait_for(state="attached")
    assert logs(page) == [left, right]
    assert page.get_by_label("Right model").input_value() == "echo:poeticism"
    (row,) = ds.dataset(storage / "runs/echoes/echo" / RATINGS_DATASET).to_table().to_pylist()
    assert (row["verdict"], row["persona"]) == ("second", "humor")
    assert row["conversations"][1]["model"].startswith("echo:poeticism@")
    assert servers.KEY not in json.dumps(row, default=str)


INTERRUPT = """(change) => {
    const log = document.querySelector(".log");
    new MutationObserver((_, observer) => {
        if (!log.textContent.includes("echo: word")) return;
        observer.disconnect();
        if (change === "start over") return document.getElementById("reset").click();
        document.getElementById("model-1").value = "echo";
        document.getElementById("model-1").dispatchEvent(new Event("change"));
    }).observe(log, { subtree: true, childList: true });
}"""


@pytest.mark.parametrize("change", ["start over", "another model"])
def test_a_conversation_left_during_generation_does_not_reappear(page, change):
    send(page, "the first question")
    page.evaluate(INTERRUPT, change)
    page.get_by_label("Message to both models").fill("word " * 40)
    page.keyboard.press("Enter")
    page.get_by_text("Stopped.").wait_for()
    assert logs(page) == ["", ""]
    assert page.locator(".rate:enabled").count() == 0
    with page.expect_request("**/chat/completions") as request:
        send(page, "the second question")
    contents = [message["content"] for message in request.value.post_data_json["messages"]]
    assert contents == ["the second question"]


def test_model_output_is_shown_as_text_and_never_executed(page):
    send(page, HOSTILE)
    for log in logs(page):
        assert log.count(HOSTILE) == 2
    assert page.locator(".log script, .log img").count() == 0


def test_the_prompted_base_and_the_dpo_adapter_can_be_selected(page):
    names = page.locator("#model-0 option").all_inner_texts()
    assert "echo with poeticism as system prompt" in names
    assert "echo:humor (DPO only)" in names


def test_the_constitution_can_be_read(page):
    page.get_by_label("Persona", exact=True).select_option("poeticism")
    page.get_by_text("Constitution of this persona").click()
    assert page.locator("#traits li").count() >= 8


def test_conversations_can_be_exported(page, tmp_path):
    send(page, "hello")
    with page.expect_download() as download:
        page.get_by_role("button", name="Export conversations").click()
    download.value.save_as(tmp_path / "out.json")
    exported = json.loads((tmp_path / "out.json").read_text())
    assert [len(side["messages"]) for side in exported["conversations"]] == [2, 2]


def test_every_control_has_a_name_and_is_reachable_by_keyboard(page):
    send(page, "hello")
    unnamed = """() => [...document.querySelectorAll("select, textarea, input, button")]
        .filter(e => !(e.labels?.length || e.textContent.trim())).map(e => e.outerHTML)"""
    assert page.evaluate(unnamed) == []
    page.locator("#export").focus()
    reached = set()
    for _ in range(14):
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.className"))
        page.keyboard.press("Tab")
    assert {
        "export",
        "reset",
        "model-0",
        "model-1",
        "log",
        "text",
        "send",
        "persona",
        "rate",
    } <= reached
    assert page.locator("[aria-live=polite], [role=log]").count() == 3


def test_both_models_fit_a_phone_screen_without_horizontal_scrolling(page):
    page.set_viewport_size({"width": 360, "height": 740})
    send(page, "W" * 200)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    boxes = [page.get_by_label(f"{side} conversation").bounding_box() for side in ("Left", "Right")]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["width"] > 150
