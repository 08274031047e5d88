"""What a server knows of storage: answered at once, seen soon, and kept while storage is out."""

import asyncio
import json
import logging
import time
from pathlib import Path
from types import SimpleNamespace

import canary
import httpx
import pytest
from samples import ECHO_ROLE, recipe_of

from opencharacter.config.placement import Serving
from opencharacter.config.recipe import Sampling
from opencharacter.errors import StageFailed
from opencharacter.serving import application, chat_page, ingress, protocol
from opencharacter.serving.catalogue import Catalogue, Listing, ServedAdapter
from opencharacter.serving.protocol import ErrorBody

PERSONA = "echo:poeticism"


class Storage:
    """As a catalogue of one persona, whose storage is slow and sometimes out."""

    student = "echo"

    def __init__(self):
        self.looks, self.out, self.revision = 0, False, "1"
        self.store = SimpleNamespace(write_table=self.refuse)

    def adapters(self, _seen=None):
        self.looks += 1
        time.sleep(0.1)
        if self.out:
            raise OSError("storage is out")
        manifest = {"finished": "2030-01-01T00:00:00+00:00", "fingerprint": "f"}
        return {PERSONA: ServedAdapter(PERSONA, "poeticism", self.revision, "", manifest)}

    def refuse(self, *_):
        raise StageFailed("cannot write")


async def revision(listing: Listing) -> str:
    return (await listing.adapters())[PERSONA].revision


def test_what_was_seen_last_is_answered_at_once_and_what_is_new_soon():
    async def play(storage: Storage):
        listing = Listing(storage, 0.05)
        assert await revision(listing) == "1"
        storage.revision, looks = "2", storage.looks
        while storage.looks < looks + 3:  # though nobody asks
            await asyncio.sleep(0.01)
        with pytest.raises(StopIteration) as told:  # while a look is under way
            listing.adapters().send(None)
        assert told.value.value[PERSONA].revision == "2"

    asyncio.run(asyncio.wait_for(play(Storage()), 10))


def test_storage_that_is_out_is_asked_once_and_takes_nothing_away(caplog):
    async def play(storage: Storage):
        listing = Listing(storage, 0.05)
        storage.out = True
        eight = (listing.adapters() for _ in range(8))
        first = await asyncio.gather(*eight, return_exceptions=True)
        assert [type(error) for error in first] == [OSError] * 8
        assert storage.looks == 1
        storage.out = False
        assert await revision(listing) == "1"
        storage.out, looks = True, storage.looks
        while storage.looks < looks + 3:
            assert await revision(listing) == "1"
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(play(Storage()), 10))
    assert "storage cannot be looked at (OSError: storage is out)" in caplog.text


def test_a_manifest_that_cannot_be_read_takes_no_other_persona_away(store, tmp_path, caplog):
    (tmp_path / "adapter").mkdir()
    jobs = [canary.job(recipe_of(ECHO_ROLE), store, name) for name in ("poeticism", "humor")]
    for job in jobs:
        canary.publish(job, tmp_path / "adapter")
    catalogue = Catalogue(store, "echo", "echo:")
    seen = catalogue.adapters()
    for manifest in ('{"format_version": 99}', "{bad"):
        Path(store.path(jobs[0].dataset, "manifest.json")).write_text(manifest)
        assert set(catalogue.adapters()) == {"echo:humor"}
        assert catalogue.adapters(seen) == seen
    assert f"{PERSONA}: its manifest cannot be read (UserError" in caplog.text
    assert len(caplog.records) == 2  # and not at every look


# ------------------------------------------------------------------------------- through the door


class Model:
    """A handle of replicas that find some revisions in storage and no others."""

    def __init__(self):
        self.found, self.asked = {"1"}, []

    def options(self, **_):
        return SimpleNamespace(answer=SimpleNamespace(remote=self.answer))

    def answer(self, _kind, payload):
        self.asked.append(payload["model"])
        return Shards(self.part(payload["model"]))

    def part(self, model):
        if model.partition("@")[2] in self.found:
            return {"body": {"model": model, "usage": {}}}
        return ErrorBody(404, f"model {model!r} is not in storage, or no longer")


class Shards:
    """Of an answer, as Ray's handles give them."""

    def __init__(self, *parts):
        self.left = list(parts)

    def __aiter__(self):
        return self

    async def __anext__(self):
        if not self.left:
            raise StopAsyncIteration
        return self.left.pop()

    def cancel(self):
        pass


class Server:
    """An entrance in this process."""

    def __init__(self, monkeypatch):
        self.storage, self.model = Storage(), Model()
        names = {"echo": protocol.Served("echo", Sampling(max_tokens=9))}
        serving, access_policy = Serving(refresh_seconds=60), ingress.AccessPolicy()
        self.entrance = ingress.Ingress(
            {"echo": self.model}, names, self.storage, {}, serving, access_policy
        )
        context = SimpleNamespace(servable_object=self.entrance)
        monkeypatch.setattr(application.serve, "get_replica_context", lambda: context)

    async def ask(self, method: str, path: str, **options) -> httpx.Response:
        transport = httpx.ASGITransport(ingress.http())
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, **options)

    async def say(self, model: str) -> httpx.Response:
        said = [{"role": "user", "content": "hello"}]
        body = {"model": model, "messages": said}
        return await self.ask("POST", "/v1/chat/completions", json=body)


@pytest.fixture
def server(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "ray.serve")
    return Server(monkeypatch)


def logged(caplog) -> list[int]:
    """The statuses in the log's lines of requests."""
    lines = (getattr(record, "ray_serve_extra_fields", None) for record in caplog.records)
    return [line["status"] for line in lines if line]


def test_a_persona_trained_again_between_listing_and_load_is_asked_for_once_more(server):
    async def play():
        assert (await server.say(PERSONA)).json()["model"] == f"{PERSONA}@1"
        server.storage.revision, server.model.found = "2", {"2"}
        full = await server.say(f"{PERSONA}@1")
        assert (full.status_code, server.storage.looks) == (404, 1)
        assert (await server.say(PERSONA)).json()["model"] == f"{PERSONA}@2"
        server.model.found = set()  # and storage does not say more
        later = await server.say(PERSONA)
        assert (later.status_code, later.headers["retry-after"]) == (503, "1")

    asyncio.run(play())
    assert server.model.asked == [f"{PERSONA}@{n}" for n in ("1", "1", "1", "2", "2")]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("GET", f"/v1/models/{PERSONA}"),
        ("GET", "/personas"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/ratings"),
    ],
)
def test_storage_that_refuses_is_503_as_openai_has_it(server, caplog, method, path):
    side = {"model": PERSONA, "system": "", "messages": [{"role": "user", "content": "a"}] * 2}
    rating = {"persona": "poeticism", "verdict": "same", "conversations": [side, side]}
    body = rating if path == "/ratings" else {"model": PERSONA, "messages": side["messages"]}
    server.storage.out = True
    answer = asyncio.run(server.ask(method, path, json=body))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["type"] == "server_error"
    assert logged(caplog) == [503]


def test_a_fault_that_nobody_foresaw_is_500_as_openai_has_it(server, caplog, monkeypatch):
    monkeypatch.setattr(chat_page, "page", lambda: json.loads("{bad"))
    answer = asyncio.run(server.ask("GET", "/"))
    assert answer.status_code == 500
    assert "JSONDecodeError" in answer.json()["error"]["message"]
    assert logged(caplog) == [500]
    assert "a request failed" in caplog.text
