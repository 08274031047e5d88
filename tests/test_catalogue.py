"""What the ingress knows of storage, and how it responds while storage is unavailable."""

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
from opencharacter.config.roles import Sampling
from opencharacter.errors import StageFailed
from opencharacter.serving import chat_page, ingress
from opencharacter.serving.access import AccessPolicy
from opencharacter.serving.catalogue import Catalogue, CatalogueCache, ServedAdapter
from opencharacter.serving.protocol import BaseModelEntry, ErrorBody

PERSONA = "echo:poeticism"


class Storage:
    """Stands for a catalogue of one persona, whose storage is slow and sometimes unavailable."""

    student = "echo"

    def __init__(self):
        self.reads, self.unavailable, self.revision = 0, False, "1"
        self.store = SimpleNamespace(write_table=self.fail_to_write)

    def adapters(self, _previous=None):
        self.reads += 1
        time.sleep(0.1)
        if self.unavailable:
            raise OSError("storage is unavailable")
        manifest = {"finished": "2030-01-01T00:00:00+00:00", "fingerprint": "f"}
        return {PERSONA: ServedAdapter(PERSONA, "poeticism", self.revision, "", manifest)}

    def fail_to_write(self, *_):
        raise StageFailed("cannot write")


async def revision(cache: CatalogueCache) -> str:
    return (await cache.adapters())[PERSONA].revision


def test_the_cache_answers_at_once_and_shows_new_revisions_soon():
    async def play(storage: Storage):
        cache = CatalogueCache(storage, 0.05)
        assert await revision(cache) == "1"
        storage.revision, reads = "2", storage.reads
        while storage.reads < reads + 3:  # without any request
            await asyncio.sleep(0.01)
        with pytest.raises(StopIteration) as returned:  # without waiting for the refresh
            cache.adapters().send(None)
        assert returned.value.value[PERSONA].revision == "2"

    asyncio.run(asyncio.wait_for(play(Storage()), 10))


def test_adapters_keep_serving_while_storage_is_unavailable(caplog):
    async def play(storage: Storage):
        cache = CatalogueCache(storage, 0.05)
        storage.unavailable = True
        eight = (cache.adapters() for _ in range(8))
        first = await asyncio.gather(*eight, return_exceptions=True)
        assert [type(error) for error in first] == [OSError] * 8
        assert storage.reads == 1
        storage.unavailable = False
        assert await revision(cache) == "1"
        storage.unavailable, reads = True, storage.reads
        while storage.reads < reads + 3:
            assert await revision(cache) == "1"
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(play(Storage()), 10))
    assert "cannot list adapters in storage (OSError: storage is unavailable)" in caplog.text


def test_a_broken_manifest_does_not_affect_other_personas(store, tmp_path, caplog):
    (tmp_path / "adapter").mkdir()
    jobs = [canary.job(recipe_of(ECHO_ROLE), store, name) for name in ("poeticism", "humor")]
    for job in jobs:
        canary.publish(job, tmp_path / "adapter")
    catalogue = Catalogue(store, "echo", "echo:")
    previous = catalogue.adapters()
    for manifest in ('{"format_version": 99}', "{bad"):
        Path(store.path(jobs[0].dataset, "manifest.json")).write_text(manifest)
        assert set(catalogue.adapters()) == {"echo:humor"}
        assert catalogue.adapters(previous) == previous
    assert f"cannot read the manifest of {PERSONA} (UserError" in caplog.text
    assert len(caplog.records) == 2  # not one per refresh


def test_an_adapter_of_other_weights_with_the_same_name_is_not_served(store, tmp_path, caplog):
    (tmp_path / "adapter").mkdir()
    job = canary.job(recipe_of(ECHO_ROLE), store, "poeticism")
    canary.publish(job, tmp_path / "adapter")
    manifest = store.manifest(job.dataset)
    files = {"model.safetensors": "9 bytes, sha256 aa"}
    manifest["payload"]["roles"]["student"] |= {"weights": files}
    store.write_manifest(job.dataset, manifest)

    def served(identity):
        return set(Catalogue(store, "echo", "echo:", (), identity).adapters())

    assert served({"weights": files}) == {PERSONA}
    assert served({}) == {PERSONA}  # the files are not on the machine that deploys
    assert caplog.text == ""
    assert served({"weights": {"model.safetensors": "9 bytes, sha256 bb"}}) == set()
    assert served({"weights": files, "revision": "v2"}) == set()
    assert f"{job.dataset} was trained on other weights of echo:" in caplog.text


# ---------------------------------------------------------------------------- through the ingress


class Model:
    """Stands for a handle to replicas that find only some revisions in storage."""

    def __init__(self):
        self.revisions, self.requested = {"1"}, []

    def options(self, **_):
        return SimpleNamespace(answer=SimpleNamespace(remote=self.answer))

    def answer(self, _kind, payload):
        self.requested.append(payload["model"])
        return ResponseStream(self.part(payload["model"]))

    def part(self, model):
        if model.partition("@")[2] in self.revisions:
            return {"body": {"model": model, "usage": {}}}
        return ErrorBody(404, f"model {model!r} is not in storage")


class ResponseStream:
    """Stands for the response that a Serve handle streams."""

    def __init__(self, *parts):
        self.remaining = list(parts)

    def __aiter__(self):
        return self

    async def __anext__(self):
        if not self.remaining:
            raise StopAsyncIteration
        return self.remaining.pop()

    def cancel(self):
        pass


class Server:
    """An ingress in this process."""

    def __init__(self, monkeypatch):
        self.storage, self.model = Storage(), Model()
        base_models = {"echo": BaseModelEntry("echo", Sampling(max_tokens=9))}
        serving, access_policy = Serving(refresh_seconds=60), AccessPolicy()
        self.ingress = ingress.Ingress(
            {"echo": self.model}, base_models, self.storage, {}, serving, access_policy
        )
        context = SimpleNamespace(servable_object=self.ingress)
        monkeypatch.setattr(ingress.serve, "get_replica_context", lambda: context)

    async def request(self, method: str, path: str, **options) -> httpx.Response:
        transport = httpx.ASGITransport(ingress.build_http_app())
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, **options)

    async def chat(self, model: str) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": "hello"}]}
        return await self.request("POST", "/v1/chat/completions", json=body)


@pytest.fixture
def server(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "ray.serve")
    return Server(monkeypatch)


def logged_statuses(caplog) -> list[int]:
    """Return the HTTP statuses in the request log."""
    lines = (getattr(record, "ray_serve_extra_fields", None) for record in caplog.records)
    return [line["status"] for line in lines if line]


def test_a_request_is_retried_with_the_new_revision_if_the_persona_was_retrained(server):
    async def play():
        assert (await server.chat(PERSONA)).json()["model"] == f"{PERSONA}@1"
        server.storage.revision, server.model.revisions = "2", {"2"}
        old = await server.chat(f"{PERSONA}@1")
        assert (old.status_code, server.storage.reads) == (404, 1)
        assert (await server.chat(PERSONA)).json()["model"] == f"{PERSONA}@2"
        server.model.revisions = set()  # and storage does not show a newer one
        later = await server.chat(PERSONA)
        assert (later.status_code, later.headers["retry-after"]) == (503, "1")

    asyncio.run(play())
    assert server.model.requested == [f"{PERSONA}@{n}" for n in ("1", "1", "1", "2", "2")]


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
def test_unavailable_storage_is_a_503_in_openai_format(server, caplog, method, path):
    side = {"model": PERSONA, "system": "", "messages": [{"role": "user", "content": "a"}] * 2}
    rating = {"persona": "poeticism", "verdict": "same", "conversations": [side, side]}
    body = rating if path == "/ratings" else {"model": PERSONA, "messages": side["messages"]}
    server.storage.unavailable = True
    answer = asyncio.run(server.request(method, path, json=body))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["type"] == "server_error"
    assert logged_statuses(caplog) == [503]


def test_an_unexpected_exception_is_a_500_in_openai_format(server, caplog, monkeypatch):
    monkeypatch.setattr(chat_page, "page", lambda: json.loads("{bad"))
    answer = asyncio.run(server.request("GET", "/"))
    assert answer.status_code == 500
    assert "JSONDecodeError" in answer.json()["error"]["message"]
    assert logged_statuses(caplog) == [500]
    assert "a request failed" in caplog.text
