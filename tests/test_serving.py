"""The server over HTTP with the echo engine: clients, refusals, limits, what nobody may do."""

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import canary
import httpx
import openai
import psutil
import pytest
import server as servers
import yaml
from openai import OpenAI
from ray.serve.schema import ServeDeploySchema
from samples import ECHO_ROLE, cli, recipe_of

from opencharacter.config.placement import Placement, Serving
from opencharacter.config.recipe import Sampling
from opencharacter.errors import UserError
from opencharacter.runtime.store import Store
from opencharacter.serving import application, chat_page, ingress, lifecycle, protocol
from opencharacter.serving.catalogue import Catalogue

HELLO = [{"role": "user", "content": "hello there"}]
BODY = {"model": "echo", "messages": HELLO}
LIMITS = {"serving": {"max_body_bytes": 100_000, "max_tokens": 100, "max_requests_per_key": 2}}


def adapter(tmp_path, byte: bytes = b"w"):
    """The files of an adapter that nothing will load."""
    folder = tmp_path / "adapter"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text('{"r": 8}')
    (folder / "adapter_model.safetensors").write_bytes(byte)
    return folder


@pytest.fixture(scope="module")
def echo(tmp_path_factory):
    """A server with a key, small limits, and two personas of one of which only DPO is done."""
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
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def refusal(answer: httpx.Response) -> dict:
    """The error of an answer, whose shape is OpenAI's."""
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    return error


# ------------------------------------------------------------------------------------ clients


def test_all_that_can_be_asked_for_is_listed(echo):
    listed = {model.id: model for model in echo.client().models.list()}
    assert set(listed) == {"echo", "judge", "echo:poeticism", "echo:humor:dpo"}
    persona = listed["echo:poeticism"].model_dump()
    assert persona["root"].startswith(f"echo:poeticism@{persona['fingerprint']}.")
    assert echo.client().models.retrieve("echo:poeticism").id == "echo:poeticism"


def test_the_official_client_gets_an_answer_whole_and_in_pieces(echo):
    client = echo.client()
    whole = client.chat.completions.create(model="echo:poeticism", messages=HELLO)
    assert whole.choices[0].message.content.endswith(": hello there")
    assert whole.model.startswith("echo:poeticism@")
    stream = client.chat.completions.create(
        model="echo", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    pieces = [c.choices[0].delta.content for c in chunks if c.choices]
    assert "".join(pieces) == "echo: hello there"
    assert len(pieces) == 3
    assert chunks[-1].usage.completion_tokens == 3


def test_usage_comes_to_those_who_ask_for_it_alone(echo):
    chunks = list(echo.client().chat.completions.create(**BODY, stream=True))
    assert all(chunk.choices for chunk in chunks)


def test_a_revision_can_be_asked_for_by_its_full_name(echo):
    client = echo.client()
    root = client.models.retrieve("echo:poeticism").model_dump()["root"]
    assert client.chat.completions.create(model=root, messages=HELLO).model == root
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="echo:poeticism@0", messages=HELLO)


def test_the_terminal_talks_to_a_server(echo, tmp_path):
    typed = ["hello", "/model echo:poeticism", "who?", "/system be brief", "and now?"]
    typed += ["/save kept.json", "/save kept.json", "/model nobody", "/reset", "/what", "/quit"]
    told = cli(
        "chat", echo.url, cwd=tmp_path, typed="\n".join(typed), OPENCHARACTER_API_KEY=servers.KEY
    )
    assert told.returncode == 0, told.stdout
    assert "echo: hello" in told.stdout
    assert "echo:poeticism@" in told.stdout
    assert "not saved: File exists" in told.stdout
    assert told.stdout.count("/save FILE.json") == 2
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert [message["role"] for message in kept["messages"]] == ["system", "user", "assistant"]


def test_the_terminal_says_what_is_wrong_with_a_server(echo, tmp_path):
    assert "key" in cli("chat", echo.url, cwd=tmp_path).stdout
    wrong = cli("chat", echo.url, "echo:nobody", cwd=tmp_path, OPENCHARACTER_API_KEY=servers.KEY)
    assert "served ones: echo" in wrong.stdout


# ----------------------------------------------------------------------------------- refusals


def test_unknown_models_are_404(echo):
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
def test_names_lead_nowhere_but_to_listed_models(echo, name):
    answer = echo.post(json={**BODY, "model": name})
    assert answer.status_code == 404, answer.text
    assert refusal(answer)["code"] == "model_not_found"


def test_a_wrong_key_and_none_are_401(echo):
    with pytest.raises(openai.AuthenticationError) as failed:
        OpenAI(base_url=f"{echo.url}/v1", api_key="wrong", max_retries=0).models.list()
    assert failed.value.code == "invalid_api_key"
    for path in ("/v1/models", "/metrics", "/status", "/personas"):
        answer = httpx.get(echo.url + path)
        assert (answer.status_code, refusal(answer)["code"]) == (401, "invalid_api_key")
    for path in ("/v1/chat/completions", "/v1/completions", "/ratings"):
        assert httpx.post(echo.url + path, json=BODY).status_code == 401


@pytest.mark.parametrize(
    ("content", "said"),
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
def test_bodies_that_are_no_requests_are_400(echo, content, said):
    headers = {**echo.headers, "Content-Type": "application/json"}
    answer = httpx.post(f"{echo.url}/v1/chat/completions", content=content, headers=headers)
    assert answer.status_code == 400
    assert said in refusal(answer)["message"]


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
    ],
)
def test_fields_beyond_what_is_allowed_are_400_and_named(echo, change, param):
    answer = echo.post(json={**BODY, **change})
    assert answer.status_code == 400
    assert refusal(answer)["param"] == param


def test_other_content_paths_and_methods_are_refused_in_the_same_shape(echo):
    answers = [
        (echo.post(content=b"a=b"), 415),
        (echo.get("/v2/models"), 404),
        (echo.get("/v1/chat/completions"), 405),
    ]
    for answer, status in answers:
        assert answer.status_code == status
        refusal(answer)


def test_ten_megabytes_are_413_and_are_not_read_to_the_end(echo):
    with pytest.raises(openai.APIStatusError) as failed:
        content = [{"role": "user", "content": "x" * 10_000_000}]
        echo.client().chat.completions.create(model="echo", messages=content)
    assert failed.value.status_code == 413


def test_a_body_without_a_length_is_counted_as_it_comes(echo):
    def chunks():
        for _ in range(100):
            yield b" " * 10_000

    headers = {**echo.headers, "Content-Type": "application/json"}
    answer = httpx.post(f"{echo.url}/v1/chat/completions", content=chunks(), headers=headers)
    assert answer.status_code == 413


# ----------------------------------------------------------------------------------- security


def test_headers_choose_no_model_and_no_second_key_counts(echo):
    smuggled = {"serve_multiplexed_model_id": "echo:../../x", "Serve-Multiplexed-Model-Id": "x"}
    headers = {**echo.headers, **smuggled}
    answer = httpx.post(f"{echo.url}/v1/chat/completions", json=BODY, headers=headers)
    assert answer.json()["model"] == "echo"
    twice = [("Authorization", "Bearer no"), *echo.headers.items()]
    assert httpx.get(f"{echo.url}/v1/models", headers=twice).status_code == 401


def test_a_page_elsewhere_cannot_use_a_name_that_leads_here(echo):
    for name in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil:1"):
        answer = httpx.get(f"{echo.url}/v1/models", headers={**echo.headers, "Host": name})
        assert answer.status_code == 403
    allowed = httpx.get(f"{echo.url}/v1/models", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in allowed.headers


def test_two_lengths_are_not_two_requests(echo):
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


def test_a_thousand_connections_do_not_keep_others_out(echo):
    at = urlsplit(echo.url)
    opened = [socket.create_connection((at.hostname, at.port)) for _ in range(1000)]
    try:
        assert echo.client().models.list().data
    finally:
        for connection in opened:
            connection.close()
    for _ in range(1000):
        socket.create_connection((at.hostname, at.port)).close()
    assert echo.get("/health").status_code == 200


def test_a_key_has_so_many_requests_under_way_and_no_more(echo):
    slow = {"model": "judge", "messages": HELLO}
    with ThreadPoolExecutor(2) as pool:
        held = [pool.submit(echo.post, json=slow) for _ in range(2)]
        wait_for(lambda: "requests_waiting 2.0" in echo.get("/metrics").text)
        refused = echo.post(json=BODY)
        assert (refused.status_code, refusal(refused)["type"]) == (429, "rate_limit_error")
        assert [future.result().status_code for future in held] == [200, 200]
    assert echo.post(json=BODY).status_code == 200


def test_a_client_that_leaves_gives_its_seat_back(echo):
    slow = {"model": "judge", "messages": HELLO, "stream": True}
    for _ in range(3):
        with httpx.stream(
            "POST", f"{echo.url}/v1/chat/completions", json=slow, headers=echo.headers
        ) as answer:
            assert answer.status_code == 200
            next(answer.iter_lines())
    wait_for(lambda: "requests_under_way 1.0" in echo.get("/metrics").text)
    assert echo.post(json=BODY).status_code == 200


def test_keys_are_in_no_log(echo, tmp_path):
    echo.client().chat.completions.create(**BODY)
    written = Path("/tmp/ray/session_latest/logs/serve").glob("*.log")
    assert not any(servers.KEY in path.read_text(errors="replace") for path in written)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "can be reached from elsewhere"),
        (["--host", "::"], "can be reached from elsewhere"),
        (["--keys", "none.txt"], "No such file"),
        (["-c", "nobody"], "is unknown"),
    ],
)
def test_a_server_that_should_not_start_says_why(tmp_path, write_yaml, arguments, said):
    recipe = write_yaml("echoes.yaml", servers.ECHO_RECIPE)
    answer = cli("serve", recipe, *arguments, cwd=tmp_path)
    assert answer.returncode == 2
    assert said in answer.stdout


def test_a_short_key_is_refused(monkeypatch):
    monkeypatch.setenv(lifecycle.KEYS, "short")
    with pytest.raises(UserError, match="shorter than 16"):
        lifecycle.read_keys(None)


def test_only_addresses_of_this_machine_are_loopback():
    assert all(map(ingress.is_loopback, ("127.0.0.1", "127.8.8.8", "::1", "localhost")))
    others = ("0.0.0.0", "::", "10.0.0.1", "example.org", "127.0.0.1.example.org", "")
    assert not any(map(ingress.is_loopback, others))


def test_code_that_comes_with_weights_is_never_run():
    role = {**ECHO_ROLE, "trust_remote_code": True}
    recipe = recipe_of(role)
    with pytest.raises(UserError, match="trust_remote_code"):
        application.application(recipe, Placement(), Store("/x"), [], ingress.AccessPolicy())


# --------------------------------------------------------------------------------- a cluster


def test_the_rayservice_has_the_config_that_the_command_prints(tmp_path):
    text = (Path(__file__).parent.parent / "clusters/kuberay/rayservice.yaml").read_text()
    inside = yaml.safe_load(text)["spec"]["serveConfigV2"]
    (line,) = (part for part in text.splitlines() if "opencharacter serve config" in part)
    printed = cli(*line.partition("opencharacter ")[2].split(), cwd=tmp_path)
    assert yaml.safe_load(printed.stdout) == yaml.safe_load(inside)
    schema = ServeDeploySchema.model_validate(yaml.safe_load(inside))
    assert schema.applications[0].import_path == "opencharacter.persona.running:build"


def test_a_cluster_is_not_served_without_a_key(monkeypatch, write_yaml, tmp_path):
    recipe = write_yaml("echoes.yaml", servers.ECHO_RECIPE)
    asked = {"recipe": recipe, "storage": str(tmp_path)}
    monkeypatch.delenv(lifecycle.KEYS, raising=False)
    with pytest.raises(UserError, match="set OPENCHARACTER_API_KEYS"):
        lifecycle.build(asked)
    assert lifecycle.build({**asked, "insecure": True})


# -------------------------------------------------------------------------- storage, identity


def test_an_adapter_trained_again_is_another(store, poet, tmp_path):
    recipe = recipe_of(ECHO_ROLE)
    catalogue = Catalogue(store, "echo", "echo:")
    assert catalogue.adapters() == {}
    job = canary.job(recipe, store, "poeticism")
    canary.publish(job, adapter(tmp_path))
    first = catalogue.adapters()["echo:poeticism"]
    kept = catalogue._snapshot(first.id)
    canary.publish(job, adapter(tmp_path, b"other"))
    second = catalogue.adapters()["echo:poeticism"]
    if second.id == first.id:  # trained within the same second
        manifest = store.manifest(job.dataset)
        store.write_manifest(job.dataset, {**manifest, "finished": "2030-01-01T00:00:00+00:00"})
        second = catalogue.adapters()["echo:poeticism"]
    assert second.id != first.id
    assert (kept / "adapter_model.safetensors").read_bytes() == b"w"
    assert (catalogue._snapshot(second.id) / "adapter_model.safetensors").read_bytes() == b"other"
    with pytest.raises(LookupError):
        catalogue._snapshot(first.id)


def test_only_adapters_of_this_model_and_inside_storage_are_served(store, tmp_path):
    recipe = recipe_of(ECHO_ROLE)
    job = canary.job(recipe, store, "poeticism")
    canary.publish(job, adapter(tmp_path))
    assert Catalogue(store, "echo", "another-model").adapters() == {}
    assert Catalogue(store, "echo", "echo:", ("humor",)).adapters() == {}
    inside = store.path(job.dataset, "adapter")
    store.delete(f"{job.dataset}/adapter")
    Path(inside).symlink_to(adapter(tmp_path))
    assert Catalogue(store, "echo", "echo:").adapters() == {}


def test_what_a_request_does_not_say_is_the_recipes():
    sampling = Sampling(max_tokens=9, temperature=0.3)
    made = protocol.checked("chat", {**BODY, "top_p": 0.5, "user": "me"}, Serving(), sampling)
    assert (made["temperature"], made["top_p"], made["repetition_penalty"]) == (0.3, 0.5, 1.1)
    assert "max_tokens" not in made
    assert "user" not in made


def test_content_in_parts_is_one_text():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    found = [{"role": "developer", "content": parts}]
    assert protocol.messages(found) == [{"role": "system", "content": "ab"}]


# ---------------------------------------------------------------------------------- operation


@pytest.mark.slow
def test_a_server_is_looked_at_and_stopped_by_its_port(tmp_path):
    slow = {name: {**ECHO_ROLE, "model": "echo:4"} for name in servers.ECHO_RECIPE["roles"]}
    with servers.serving(tmp_path, {"name": "slow", "roles": slow}) as running:
        port = running.url.rpartition(":")[2]
        status = cli("serve", "status", "--port", port, cwd=tmp_path).stdout
        assert "echo: HEALTHY, replicas: 1 RUNNING" in status
        twice = cli("serve", str(tmp_path / "recipe.yaml"), "--port", port, cwd=tmp_path)
        assert "Address already in use" in twice.stdout
        long = {**BODY, "messages": [{"role": "user", "content": "word " * 5}], "stream": True}
        path = f"{lifecycle.url}/v1/chat/completions"
        with httpx.stream("POST", path, json=long) as answer, ThreadPoolExecutor(1) as pool:
            stopped = pool.submit(cli, "serve", "stop", "--port", port, cwd=tmp_path)
            text = "".join(answer.iter_text())
            assert stopped.result().returncode == 0
        assert text.rstrip().endswith("[DONE]")
        assert lifecycle.process.poll() == 0
    assert "nothing is served" in cli("serve", "status", "--port", port, cwd=tmp_path).stdout


def test_a_server_with_keys_is_looked_at_with_the_same_file(echo, tmp_path):
    (tmp_path / "keys.txt").write_text(servers.KEY)
    port = echo.url.rpartition(":")[2]
    told = cli("serve", "status", "--port", port, "--keys", "keys.txt", cwd=tmp_path)
    assert "echo: HEALTHY" in told.stdout, told.stdout


def test_health_readiness_and_metrics(echo):
    assert httpx.get(f"{echo.url}/health").json() == {"status": "ok", "needs_key": True}
    assert httpx.get(f"{echo.url}/ready").json() == {"status": "ok", "echo": True, "slow": True}
    echo.client().chat.completions.create(**BODY)
    figures = echo.get("/metrics").text
    counted = 'opencharacter_requests_total{model="echo",route="/v1/chat/completions",status="200"}'
    assert counted in figures
    assert 'opencharacter_tokens_total{kind="completion",model="echo"}' in figures
    assert "opencharacter_requests_waiting 0.0" in figures


def test_answers_carry_the_id_that_the_client_gave(echo):
    headers = {**echo.headers, "X-Request-ID": "mine-7"}
    assert httpx.get(f"{echo.url}/v1/models", headers=headers).headers["x-request-id"] == "mine-7"
    assert echo.get("/v1/models").headers["x-request-id"]


def test_the_page_asks_nobody_but_this_server(echo):
    answer = httpx.get(echo.url)
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "http" not in policy
    assert "http://" not in answer.text.replace("http://www.w3.org/", "")
    assert "https://" not in answer.text


def test_a_request_whose_replica_is_lost_is_asked_again(echo):
    slow = {"model": "judge", "messages": HELLO}
    replicas = [
        process
        for process in psutil.Process(echo.process.pid).children(recursive=True)
        if "ServeReplica:opencharacter:slow" in " ".join(process.cmdline())
    ]
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(echo.post, json=slow)
        wait_for(lambda: "requests_waiting 1.0" in echo.get("/metrics").text)
        replicas[0].kill()
        answer = held.result()
    assert (answer.status_code, len(replicas)) == (200, 1)
    assert answer.json()["choices"][0]["message"]["content"] == "slow: hello there"


# ------------------------------------------------------------------------------------ ratings


def side(model: str) -> dict:
    said = [{"role": "user", "content": "a <b>"}, {"role": "assistant", "content": "c"}]
    return {"model": model, "system": "", "messages": said}


def rating(**changes) -> dict:
    sides = [side("echo"), side("echo:poeticism@1")]
    return {"persona": "poeticism", "verdict": "second", "conversations": sides, **changes}


def test_a_rating_is_a_row_beside_the_evaluation(store):
    row = chat_page.rating(rating(), "abc")
    chat_page.keep(store, "echo", row)
    (kept,) = store.read_table(f"echo/{chat_page.RATINGS}", row["id"]).to_pylist()
    assert kept["conversations"] == rating()["conversations"]
    assert (kept["verdict"], kept["persona"], kept["rater"]) == ("second", "poeticism", "abc")


@pytest.mark.parametrize(
    "change",
    [{"verdict": "third"}, {"conversations": []}, {"more": 1}, {"persona": "x" * 201}],
)
def test_a_rating_that_is_none_is_refused(echo, change):
    answer = echo.post("/ratings", json=rating(**change))
    assert answer.status_code == 400
    refusal(answer)
