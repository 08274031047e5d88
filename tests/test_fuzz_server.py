"""The server under random requests: no 5xx, no replica that ends, and steady memory.

`FUZZ_SECONDS` sets the duration for each server, 60 by default.
"""

import json
import os
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import canary
import httpx
import psutil
import pytest
import server as servers
from bad_requests import BAD_REQUESTS, ENGINE_BAD_REQUESTS, PATHS, VALID
from client_requests import CLIENT_REQUESTS
from fuzz import Fuzzer, FuzzRequest
from process_tree import descendants

from opencharacter.config import files
from opencharacter.runtime.store import Store

pytestmark = pytest.mark.slow

SECONDS = float(os.environ.get("FUZZ_SECONDS", "60"))
CLIENTS = 6
MAX_GROWTH = 0.15
"""Memory at the end as a multiple of that after a third of the requests, minus one."""


def serve_echo(folder, _):
    return servers.serving(folder, servers.ECHO_RECIPE, key=servers.KEY), ["echo"]


def serve_engine(folder, embedded_model):
    """Serve the embedded model and a persona, with tools."""
    template = folder / "tools.jinja"
    template.write_text(TOOL_TEMPLATE)
    store = Store.at(str(folder / "runs"))
    canary.make(embedded_model, " tree", folder / "adapter")
    canary.publish(canary.job(files.load_recipe("demo"), store, "poeticism"), folder / "adapter")
    role = {"tool_parser": "hermes", "chat_template": str(template)}
    options = [text for k, v in role.items() for text in ("--set", f"roles.student.{k}={v}")]
    running = servers.serving(folder, "demo", "--storage", store.url, *options, key=servers.KEY)
    return running, ["smollm2-135m", "smollm2-135m:poeticism"]


TOOL_TEMPLATE = """\
{% if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] or '' }}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.mark.timeout(SECONDS + 600)
@pytest.mark.parametrize("serve", [serve_echo, serve_engine])
def test_random_requests_get_no_server_error_and_leave_the_server_as_it_was(
    serve, tmp_path, embedded_model
):
    context, models = serve(tmp_path, embedded_model)
    with context as server:
        tools = serve is serve_engine
        check_bad_requests(server, models[0], tools)
        if tools:
            check_bad_streams(server, models[0])
        check_client_requests(server, models[0], tools)
        before = replicas(server)
        statuses, memory = fuzz(server, models)
        print(f"{serve.__name__}: {sum(statuses.values())} requests, {dict(statuses)}, MB {memory}")
        assert max(statuses) < 500, statuses
        assert statuses[200] > 0.05 * sum(statuses.values())
        assert replicas(server) == before
        assert memory[-1] < memory[0] * (1 + MAX_GROWTH), memory
        body = {"model": models[0], **VALID["chat"], "max_tokens": 4}
        assert server.post(json=body).status_code == 200


def check_bad_requests(server: servers.RunningServer, model: str, tools: bool) -> None:
    """Send every request of the table that JSON can express."""
    requests = BAD_REQUESTS | ENGINE_BAD_REQUESTS if tools else BAD_REQUESTS
    for case, (kind, changes, expected) in requests.items():
        if "inf" in repr(changes) or (tools and "tool" in case + expected):
            continue
        answer = server.post(PATHS[kind], json={"model": model} | VALID[kind] | changes)
        assert answer.status_code == 400, (case, answer.text)
        assert re.search(expected, answer.json()["error"]["message"]), (case, answer.text)


def check_bad_streams(server: servers.RunningServer, model: str) -> None:
    """Send the requests that only an engine can refuse, for streamed responses."""
    for case, (kind, changes, expected) in ENGINE_BAD_REQUESTS.items():
        body = {"model": model, "stream": True} | VALID[kind] | changes
        answer = server.post(PATHS[kind], json=body)
        assert re.search(expected, answer.text), (case, answer.text)
        assert '"type":"invalid_request_error"' in answer.text, (case, answer.text)
        assert answer.status_code in (200, 400), (case, answer.text)


def check_client_requests(server: servers.RunningServer, model: str, tools: bool) -> None:
    """Send the recorded requests of clients."""
    for client, requests in CLIENT_REQUESTS.items():
        for kind, body in requests:
            if "tools" in body and not tools:
                continue
            answer = server.post(PATHS[kind], json={"model": model} | body)
            assert answer.status_code == 200, (client, answer.text)
            assert answer.text


def replicas(server: servers.RunningServer) -> set[int]:
    """Return the process ids of the ingress, the models and their engines."""
    return {p.pid for p in descendants([server.process.pid], "ServeReplica", "EngineCore")}


def memory_mb(server: servers.RunningServer) -> int:
    """Return the memory of the ingress, the models and their engines in MB."""
    return sum(psutil.Process(pid).memory_info().rss for pid in replicas(server)) // 2**20


def fuzz(server: servers.RunningServer, models: list[str]) -> tuple[Counter[int], list[int]]:
    """Send random requests from concurrent clients.

    Returns:
        The number of responses by status, and the memory after each third of the time in MB.
    """
    statuses: Counter[int] = Counter()
    started, memory = time.monotonic(), []

    def run_client(seed: int) -> None:
        fuzzer = Fuzzer(seed, models)
        with httpx.Client(base_url=server.url, headers=server.headers, timeout=300) as client:
            while time.monotonic() < started + SECONDS:
                request = fuzzer.request()
                status = send(client, request)
                statuses[status] += 1
                assert status < 500, request

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(run_client, seed) for seed in range(CLIENTS)]
        for third in (1, 2, 3):
            time.sleep(max(0, started + SECONDS * third / 3 - time.monotonic()))
            memory.append(memory_mb(server))
        for client in clients:
            client.result()
    return statuses, memory


def send(client: httpx.Client, request: FuzzRequest) -> int:
    """Send a request and return the status; an error within a stream counts as its status."""
    headers = {"Content-Type": request.content_type}
    with client.stream("POST", request.path, content=request.content, headers=headers) as answer:
        if request.leave:
            return answer.status_code
        text = answer.read().decode()
    if answer.status_code != 200:
        assert json.loads(text)["error"]["message"], text
    if '"error":{"message"' in text and text.startswith(("data:", "event:")):
        assert '"type":"server_error"' not in text, (request, text)
        return 400
    return answer.status_code
