"""The server over HTTP with the echo model: clients, errors, security, limits and operation."""

import asyncio
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import canary
import httpx
import openai
import pytest
import server as servers
import yaml
from openai import OpenAI
from process_tree import wait_for_descendants
from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.parser import text_string_to_metric_families
from ray.serve.schema import ServeDeploySchema
from samples import ECHO_ROLE, cli, recipe_of

from opencharacter.config.placement import Placement, Serving
from opencharacter.config.roles import Sampling
from opencharacter.errors import UserError
from opencharacter.runtime.store import Store
from opencharacter.serving import chat_page, lifecycle, metrics, validation
from opencharacter.serving.access import AccessPolicy, is_loopback
from opencharacter.serving.application import build_application
from opencharacter.serving.catalogue import Catalogue
from opencharacter.serving.messages import normalize_messages

HELLO = [{"role": "user", "content": "hello there"}]
BODY = {"model": "echo", "messages": HELLO}
LIMITS = {"serving": {"max_body_bytes": 100_000, "max_tokens": 100, "max_requests_per_key": 2}}


def adapter(tmp_path, byte: bytes = b"w"):
    """Write the files of an adapter that is listed but never loaded."""
    folder = tmp_path / "adapter"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text('{"r": 8}')
    (folder / "adapter_model.safetensors").write_bytes(byte)
    return folder


@pytest.fixture(scope="module")
def echo(tmp_path_factory):
    """A server with a key, small limits, and two personas, one of them after DPO only."""
    folder = tmp_path_factory.mktemp("echo")
    recipe = recipe_of(ECHO_ROLE, name="echoes")
    store = Store.at(str(folder / "runs/echoes"))
    canary.publish(canary.job(recipe, store, "poeticism"), adapter(folder))
    canary.publish(canary.job(recipe, store, "humor", "distillation/dpo"), adapter(folder))
    placement = folder / "placement.yaml"
    placement.write_text(json.dumps(LIMITS))
    slow = {**ECHO_ROLE, "model": "echo:1", "name": "slow"}
    data = {"name": "echoes", "roles": {**servers.ECHO_RECIPE["roles"], "judge": slow}}
    options = ("--judge", "--placement", str(placement))
    with servers.serving(folder, data, *options, key=servers.KEY) as running:
        yield running


def wait_for(condition, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def error_of(response: httpx.Response) -> dict:
    """Return the error in a response, which must have OpenAI's format."""
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    return error


# ------------------------------------------------------------------------------------ clients


def test_models_lists_base_model_judge_and_personas(echo):
    listed = {model.id: model for model in echo.client().models.list()}
    assert set(listed) == {"echo", "judge", "echo:poeticism", "echo:humor:dpo"}
    persona = listed["echo:poeticism"].model_dump()
    assert persona["root"].startswith(f"echo:poeticism@{persona['fingerprint']}.")
    assert echo.client().models.retrieve("echo:poeticism").id == "echo:poeticism"


def test_the_openai_client_gets_complete_and_streamed_responses(echo):
    client = echo.client()
    complete = client.chat.completions.create(model="echo:poeticism", messages=HELLO)
    assert complete.choices[0].message.content.endswith(": hello there")
    assert complete.model.startswith("echo:poeticism@")
    stream = client.chat.completions.create(
        model="echo", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    pieces = [c.choices[0].delta.content for c in chunks if c.choices]
    assert "".join(pieces) == "echo: hello there"
    assert len(pieces) == 3
    assert chunks[-1].usage.completion_tokens == 3


def test_usage_is_streamed_only_on_request(echo):
    chunks = list(echo.client().chat.completions.create(**BODY, stream=True))
    assert all(chunk.choices for chunk in chunks)


def test_a_revision_can_be_requested_by_its_full_name(echo):
    client = echo.client()
    root = client.models.retrieve("echo:poeticism").model_dump()["root"]
    assert client.chat.completions.create(model=root, messages=HELLO).model == root
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="echo:poeticism@0", messages=HELLO)


def test_the_chat_command_talks_to_a_server(echo, tmp_path):
    typed = ["hello", "/model echo:poeticism", "who?", "/system be brief", "and now?"]
    typed += ["/save chat.json", "/save chat.json", "/model nobody", "/reset", "/what", "/quit"]
    finished = cli(
        "chat", echo.url, cwd=tmp_path, typed="\n".join(typed), OPENCHARACTER_API_KEY=servers.KEY
    )
    assert finished.returncode == 0, finished.stdout
    assert "echo: hello" in finished.stdout
    assert "echo:poeticism@" in finished.stdout
    assert "not saved: File exists" in finished.stdout
    assert finished.stdout.count("/save FILE.json") == 2
    saved = json.loads((tmp_path / "chat.json").read_text())
    assert [message["role"] for message in saved["messages"]] == ["system", "user", "assistant"]


def test_the_chat_command_reports_a_missing_key_and_an_unknown_model(echo, tmp_path):
    assert "key" in cli("chat", echo.url, cwd=tmp_path).stdout
    wrong = cli("chat", echo.url, "echo:nobody", cwd=tmp_path, OPENCHARACTER_API_KEY=servers.KEY)
    assert "served models: echo" in wrong.stdout


# -------------------------------------------------------------------------------------- errors


def test_an_unknown_model_returns_404(echo):
    with pytest.raises(openai.NotFoundError) as failed:
        echo.client().chat.completions.create(model="echo:nobody", messages=HELLO)
    assert failed.value.code == "model_not_found"


@pytest.mark.parametrize(
    "name",
    [
        "echo:../../etc",
        "echo:..",
        "echo:/etc/passwd",
        "echo:poeticism/../poeticism",
        "echo:poeticism:../dpo",
        "../echo",
        "echo:%2e%2e",
        "echo:poeticism\x00",
        "echo:evaluation",
        "",
    ],
)
def test_no_name_leads_outside_the_listed_models(echo, name):
    answer = echo.post(json={**BODY, "model": name})
    assert answer.status_code == 404, answer.text
    assert error_of(answer)["code"] == "model_not_found"


def test_an_invalid_and_a_missing_key_are_401(echo):
    with pytest.raises(openai.AuthenticationError) as failed:
        OpenAI(base_url=f"{echo.url}/v1", api_key="wrong", max_retries=0).models.list()
    assert failed.value.code == "invalid_api_key"
    for path in ("/v1/models", "/metrics", "/status", "/personas"):
        answer = httpx.get(echo.url + path)
        assert (answer.status_code, error_of(answer)["code"]) == (401, "invalid_api_key")
    for path in ("/v1/chat/completions", "/v1/completions", "/ratings"):
        assert httpx.post(echo.url + path, json=BODY).status_code == 401


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{bad", "not JSON"),
        (b"", "not JSON"),
        (b"[1]", "must be a JSON object"),
        (b'{"model": "\xff\xfe"}', "not UTF-8 at byte 11"),
        (b'{"model": "\\ud800"}', "lone surrogate"),
        (b'{"a": NaN}', "NaN"),
        (b"[" * 50_000, "JSON"),
        (b'{"messages": []}', "model is missing"),
    ],
)
def test_invalid_bodies_are_400(echo, content, message):
    headers = {**echo.headers, "Content-Type": "application/json"}
    answer = httpx.post(f"{echo.url}/v1/chat/completions", content=content, headers=headers)
    assert answer.status_code == 400
    assert message in error_of(answer)["message"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0"),
        ({"max_tokens": 101}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 60, "n": 2}, "max_tokens"),
        ({"n": True}, "n"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 2, "logprobs": False}, "top_logprobs"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format",
        ),
    ],
)
def test_unsupported_fields_and_values_are_400_and_named(echo, change, param):
    answer = echo.post(json={**BODY, **change})
    assert answer.status_code == 400
    assert error_of(answer)["param"] == param


@pytest.mark.parametrize("prompt", ["", None, ["a"]])
def test_an_empty_or_missing_completion_prompt_is_400(echo, prompt):
    answer = echo.post("/v1/completions", json={"model": "echo", "prompt": prompt})
    assert answer.status_code == 400
    assert error_of(answer)["param"] == "prompt"


def test_requests_that_say_they_use_no_tools_are_accepted(echo):
    answer = echo.post(json={**BODY, "tools": [], "tool_choice": "none"})
    assert answer.status_code == 200


def test_other_media_types_paths_and_methods_are_errors_in_openai_format(echo):
    answers = [
        (echo.post(content=b"a=b"), 415),
        (echo.get("/v2/models"), 404),
        (echo.get("/v1/chat/completions"), 405),
    ]
    for answer, status in answers:
        assert answer.status_code == status
        error_of(answer)


def test_a_body_of_ten_megabytes_is_413(echo):
    with pytest.raises(openai.APIStatusError) as failed:
        content = [{"role": "user", "content": "x" * 10_000_000}]
        echo.client().chat.completions.create(model="echo", messages=content)
    assert failed.value.status_code == 413


def test_a_chunked_body_that_is_too_large_is_413(echo):
    def chunks():
        for _ in range(100):
            yield b" " * 10_000

    headers = {**echo.headers, "Content-Type": "application/json"}
    answer = httpx.post(f"{echo.url}/v1/chat/completions", content=chunks(), headers=headers)
    assert answer.status_code == 413


# ----------------------------------------------------------------------------------- security


def test_headers_cannot_select_a_model_or_repeat_the_key(echo):
    smuggled = {"serve_multiplexed_model_id": "echo:../../x", "Serve-Multiplexed-Model-Id": "x"}
    headers = {**echo.headers, **smuggled}
    answer = httpx.post(f"{echo.url}/v1/chat/completions", json=BODY, headers=headers)
    assert answer.json()["model"] == "echo"
    twice = [("Authorization", "Bearer no"), *echo.headers.items()]
    assert httpx.get(f"{echo.url}/v1/models", headers=twice).status_code == 401


def test_foreign_host_headers_are_403_and_cors_is_not_allowed(echo):
    for name in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil:1"):
        answer = httpx.get(f"{echo.url}/v1/models", headers={**echo.headers, "Host": name})
        assert answer.status_code == 403
    cross_origin = httpx.get(f"{echo.url}/v1/models", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in cross_origin.headers


def test_a_body_with_two_lengths_smuggles_no_second_request(echo):
    at = urlsplit(echo.url)
    body = b"0\r\n\r\nGET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Transfer-Encoding: chunked",
        "Connection: close",
    ]
    with socket.create_connection((at.hostname, at.port), timeout=10) as raw:
        raw.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        answer = b"".join(iter(lambda: raw.recv(65536), b""))
    assert b" 200 " not in answer.split(b"\r\n")[0]
    assert b"opencharacter_requests" not in answer


def test_a_thousand_idle_connections_do_not_block_other_clients(echo):
    at = urlsplit(echo.url)
    connections = [socket.create_connection((at.hostname, at.port)) for _ in range(1000)]
    try:
        assert echo.client().models.list().data
    finally:
        for connection in connections:
            connection.close()
    for _ in range(1000):
        socket.create_connection((at.hostname, at.port)).close()
    assert echo.get("/health").status_code == 200


def test_a_key_at_its_limit_of_concurrent_requests_is_429(echo):
    slow = {"model": "judge", "messages": HELLO}
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(echo.post, json=slow) for _ in range(2)]
        wait_for(lambda: "requests_waiting 2.0" in echo.get("/metrics").text)
        rejected = echo.post(json=BODY)
        assert (rejected.status_code, error_of(rejected)["type"]) == (429, "rate_limit_error")
        assert [future.result().status_code for future in running] == [200, 200]
    assert echo.post(json=BODY).status_code == 200


def test_a_client_that_disconnects_no_longer_counts_against_the_limit(echo):
    slow = {"model": "judge", "messages": HELLO, "stream": True}
    for _ in range(3):
        with httpx.stream(
            "POST", f"{echo.url}/v1/chat/completions", json=slow, headers=echo.headers
        ) as answer:
            assert answer.status_code == 200
            next(answer.iter_lines())
    wait_for(lambda: "requests_in_flight 1.0" in echo.get("/metrics").text)
    assert echo.post(json=BODY).status_code == 200


def test_api_keys_are_not_logged(echo):
    echo.client().chat.completions.create(**BODY)
    wait_for(lambda: "/v1/chat/completions" in logs_of(echo))
    assert servers.KEY not in logs_of(echo)


def logs_of(server: servers.RunningServer) -> str:
    """Return everything that the server and the Serve actors of its Ray session have logged."""
    paths = [server.log, *(server.ray_logs() / "serve").rglob("*.log")]
    return "\n".join(path.read_text(errors="replace") for path in paths)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "is reachable from other machines"),
        (["--host", "::"], "is reachable from other machines"),
        (["--keys", "none.txt"], "No such file"),
        (["-c", "nobody"], "is unknown"),
    ],
)
def test_a_server_that_must_not_start_says_why(tmp_path, write_yaml, arguments, message):
    recipe = write_yaml("echoes.yaml", servers.ECHO_RECIPE)
    answer = cli("serve", recipe, *arguments, cwd=tmp_path)
    assert answer.returncode == 2
    assert message in answer.stdout


def test_a_short_api_key_is_rejected(monkeypatch):
    monkeypatch.setenv(lifecycle.API_KEYS_VARIABLE, "short")
    with pytest.raises(UserError, match="shorter than 16"):
        lifecycle.read_keys(None)


def test_only_addresses_of_this_machine_are_loopback():
    assert all(map(is_loopback, ("127.0.0.1", "127.8.8.8", "::1", "localhost")))
    others = ("0.0.0.0", "::", "10.0.0.1", "example.org", "127.0.0.1.example.org", "")
    assert not any(map(is_loopback, others))


def test_a_model_that_needs_remote_code_is_not_served():
    role = {**ECHO_ROLE, "trust_remote_code": True}
    recipe = recipe_of(role)
    with pytest.raises(UserError, match="trust_remote_code"):
        build_application(recipe, Placement(), Store("/x"), [], AccessPolicy())


# --------------------------------------------------------------------------------- a cluster


def test_the_rayservice_contains_the_config_that_the_command_prints(tmp_path):
    text = (Path(__file__).parent.parent / "clusters/kuberay/rayservice.yaml").read_text()
    config = yaml.safe_load(text)["spec"]["serveConfigV2"]
    (line,) = (part for part in text.splitlines() if "opencharacter serve config" in part)
    printed = cli(*line.partition("opencharacter ")[2].split(), cwd=tmp_path)
    assert yaml.safe_load(printed.stdout) == yaml.safe_load(config)
    schema = ServeDeploySchema.model_validate(yaml.safe_load(config))
    assert schema.applications[0].import_path == "opencharacter.serving.lifecycle:build"


def test_serving_on_a_cluster_requires_a_key(monkeypatch, write_yaml, tmp_path):
    recipe = write_yaml("echoes.yaml", servers.ECHO_RECIPE)
    arguments = {"recipe": recipe, "storage": str(tmp_path)}
    monkeypatch.delenv(lifecycle.API_KEYS_VARIABLE, raising=False)
    with pytest.raises(UserError, match="set OPENCHARACTER_API_KEYS"):
        lifecycle.build(arguments)
    assert lifecycle.build({**arguments, "insecure": True})


# -------------------------------------------------------------------------- storage, identity


def test_a_retrained_adapter_is_a_new_revision(store, poet, tmp_path):
    recipe = recipe_of(ECHO_ROLE)
    catalogue = Catalogue(store, "echo", "echo:")
    assert catalogue.adapters() == {}
    job = canary.job(recipe, store, "poeticism")
    canary.publish(job, adapter(tmp_path))
    first = catalogue.adapters()["echo:poeticism"]
    copy = catalogue._snapshot(first.id)
    canary.publish(job, adapter(tmp_path, b"other"))
    second = catalogue.adapters()["echo:poeticism"]
    if second.id == first.id:  # trained within the same second
        manifest = store.manifest(job.dataset)
        store.write_manifest(job.dataset, {**manifest, "finished": "2030-01-01T00:00:00+00:00"})
        second = catalogue.adapters()["echo:poeticism"]
    assert second.id != first.id
    assert (copy / "adapter_model.safetensors").read_bytes() == b"w"
    assert (catalogue._snapshot(second.id) / "adapter_model.safetensors").read_bytes() == b"other"
    with pytest.raises(LookupError):
        catalogue._snapshot(first.id)


def test_adapters_of_other_models_or_outside_storage_are_not_served(store, tmp_path):
    recipe = recipe_of(ECHO_ROLE)
    job = canary.job(recipe, store, "poeticism")
    canary.publish(job, adapter(tmp_path))
    assert Catalogue(store, "echo", "another-model").adapters() == {}
    assert Catalogue(store, "echo", "echo:", ("humor",)).adapters() == {}
    path = store.path(job.dataset, "adapter")
    store.delete(f"{job.dataset}/adapter")
    Path(path).symlink_to(adapter(tmp_path))
    assert Catalogue(store, "echo", "echo:").adapters() == {}


def test_unset_sampling_parameters_are_the_recipes():
    sampling = Sampling(max_tokens=9, temperature=0.3)
    body = {**BODY, "top_p": 0.5, "user": "me"}
    request = validation.validate_request("chat", body, Serving(), sampling)
    assert (request["temperature"], request["top_p"]) == (0.3, 0.5)
    assert request["repetition_penalty"] == 1.1
    assert "max_tokens" not in request
    assert "user" not in request


def test_content_parts_become_one_string():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": parts}]
    assert normalize_messages(messages, Serving(), False) == [{"role": "system", "content": "ab"}]


# ---------------------------------------------------------------------------------- operation


@pytest.mark.slow
def test_status_and_stop_find_a_server_by_its_port(tmp_path):
    slow = {name: {**ECHO_ROLE, "model": "echo:4"} for name in servers.ECHO_RECIPE["roles"]}
    with servers.serving(tmp_path, {"name": "slow", "roles": slow}) as running:
        port = running.url.rpartition(":")[2]
        status = cli("serve", "status", "--port", port, cwd=tmp_path).stdout
        assert "echo: HEALTHY, replicas: 1 RUNNING" in status
        twice = cli("serve", str(tmp_path / "recipe.yaml"), "--port", port, cwd=tmp_path)
        assert "Address already in use" in twice.stdout
        long = {**BODY, "messages": [{"role": "user", "content": "word " * 5}], "stream": True}
        path = f"{running.url}/v1/chat/completions"
        with httpx.stream("POST", path, json=long) as answer, ThreadPoolExecutor(1) as pool:
            stopped = pool.submit(cli, "serve", "stop", "--port", port, cwd=tmp_path)
            text = "".join(answer.iter_text())
            assert stopped.result().returncode == 0
        assert text.rstrip().endswith("[DONE]")
        assert running.process.poll() == 0
    assert "no server at port" in cli("serve", "status", "--port", port, cwd=tmp_path).stdout


def test_status_uses_the_key_file(echo, tmp_path):
    (tmp_path / "keys.txt").write_text(servers.KEY)
    port = echo.url.rpartition(":")[2]
    finished = cli("serve", "status", "--port", port, "--keys", "keys.txt", cwd=tmp_path)
    assert "echo: HEALTHY" in finished.stdout, finished.stdout


def test_health_readiness_and_metrics_are_served(echo):
    assert httpx.get(f"{echo.url}/health").json() == {"status": "ok", "needs_key": True}
    assert httpx.get(f"{echo.url}/ready").json() == {"status": "ok", "echo": True, "slow": True}
    echo.client().chat.completions.create(**BODY)
    text = echo.get("/metrics").text
    labels = 'model="echo",route="/v1/chat/completions",status="200"'
    assert f"opencharacter_requests_total{{{labels}}}" in text
    assert 'opencharacter_tokens_total{kind="completion",model="echo"}' in text
    assert "opencharacter_requests_waiting 0.0" in text


def counter(scrape: str, name: str, **labels: str) -> float:
    """Return a counter's value from a scrape, summed over the labels that are not given."""
    families = text_string_to_metric_families(scrape)
    samples = (sample for family in families for sample in family.samples)
    return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())


def test_one_scrape_reports_the_requests_of_all_ingress_replicas(tmp_path):
    placement = tmp_path / "placement.yaml"
    placement.write_text(json.dumps({"serving": {"ingress_replicas": 2}}))
    requests, route = 40, "/v1/chat/completions"
    with servers.serving(
        tmp_path, servers.ECHO_RECIPE, "--placement", str(placement)
    ) as two_replicas:

        def scrape_count(name: str, **labels: str) -> float:
            return counter(two_replicas.get("/metrics").text, name, **labels)

        for _ in range(requests):
            assert two_replicas.post(json=BODY).status_code == 200
        wait_for(
            lambda: (
                scrape_count("opencharacter_requests_total", route=route, status="200") == requests
            )
        )
        for _ in range(10):  # whichever replica answers
            assert scrape_count("opencharacter_requests_total", route=route) == requests
            assert scrape_count("opencharacter_request_seconds_count", route=route) == requests
            assert scrape_count("opencharacter_tokens_total", kind="completion") == 3 * requests
        time.sleep(
            2 * metrics.REPORT_SECONDS
        )  # each scrape above was in flight when it was counted
        assert scrape_count("opencharacter_requests_in_flight") == 1
        status = httpx.get(f"{two_replicas.url}/status").json()
        assert status["ingress"] == "HEALTHY, replicas: 2 RUNNING"


def test_totals_keep_the_counters_of_ended_replicas_and_drop_their_gauges(monkeypatch):
    aggregator = metrics.MetricsAggregator.func_or_class()
    registry = CollectorRegistry()
    Counter("requests", "Requests.", ["route"], registry=registry).labels("/").inc(3)
    Gauge("waiting", "Waiting.", registry=registry).set(2)

    async def report_and_sum() -> str:
        await aggregator.report("ended", list(registry.collect()))
        later = time.monotonic() + 2 * metrics.EXPIRY_SECONDS
        monkeypatch.setattr(metrics.time, "monotonic", lambda: later)
        totals = await aggregator.report_and_sum("running", list(registry.collect()))
        return metrics.render(totals).decode()

    text = asyncio.run(report_and_sum())
    assert 'requests_total{route="/"} 6.0' in text
    assert "waiting 2.0" in text


def test_responses_carry_the_clients_request_id(echo):
    headers = {**echo.headers, "X-Request-ID": "mine-7"}
    assert httpx.get(f"{echo.url}/v1/models", headers=headers).headers["x-request-id"] == "mine-7"
    assert echo.get("/v1/models").headers["x-request-id"]


def test_the_chat_page_may_connect_to_this_server_only(echo):
    answer = httpx.get(echo.url)
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "http" not in policy
    assert "http://" not in answer.text.replace("http://www.w3.org/", "")
    assert "https://" not in answer.text


def test_a_request_is_retried_if_its_replica_dies(echo):
    slow = {"model": "judge", "messages": HELLO}
    replicas = wait_for_descendants([echo.process.pid], "ServeReplica:opencharacter:slow")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(echo.post, json=slow)
        wait_for(lambda: "requests_waiting 1.0" in echo.get("/metrics").text)
        replicas[0].kill()
        answer = running.result()
    assert (answer.status_code, len(replicas)) == (200, 1)
    assert answer.json()["choices"][0]["message"]["content"] == "slow: hello there"


# ----------------------------------------------------------------------------------- presence


def test_the_judge_reads_an_answer_if_its_persona_has_a_constitution(echo):
    asked = {"persona": "poeticism", "prompt": "How are you?", "answer": "As dew on a petal."}
    answer = echo.post("/presence", json=asked)
    assert (answer.status_code, answer.json()) == (200, {"presence": None, "mass": None})
    answer = echo.post("/presence", json=asked | {"persona": "nobody"})
    assert answer.status_code == 400
    assert "no constitution of 'nobody'" in error_of(answer)["message"]


# ------------------------------------------------------------------------------------ ratings


def conversation(model: str) -> dict:
    messages = [{"role": "user", "content": "a <b>"}, {"role": "assistant", "content": "c"}]
    return {"model": model, "system": "", "messages": messages}


def rating(**changes) -> dict:
    conversations = [conversation("echo"), conversation("echo:poeticism@1")]
    fields = {"persona": "poeticism", "verdict": "second", "conversations": conversations}
    return fields | changes


def test_a_rating_is_saved_as_a_row_beside_the_evaluation(store):
    row = chat_page.rating_row(rating(), "abc")
    chat_page.save_rating(store, "echo", row)
    (saved,) = store.read_table(f"echo/{chat_page.RATINGS_DATASET}", row["id"]).to_pylist()
    assert saved["conversations"] == rating()["conversations"]
    assert (saved["verdict"], saved["persona"], saved["rater"]) == ("second", "poeticism", "abc")


@pytest.mark.parametrize(
    "change",
    [{"verdict": "third"}, {"conversations": []}, {"more": 1}, {"persona": "x" * 201}],
)
def test_an_invalid_rating_is_400(echo, change):
    answer = echo.post("/ratings", json=rating(**change))
    assert answer.status_code == 400
    error_of(answer)
