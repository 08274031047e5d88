"""The server with the embedded model: adapters by name, retraining, mixed load, a killed engine.

Each persona is an adapter that repeats one word, which identifies the adapter that responded.
"""

import time
from concurrent.futures import ThreadPoolExecutor

import canary
import openai
import pytest
import server as servers
from process_tree import wait_for_descendants

from opencharacter import models
from opencharacter.config import files
from opencharacter.config.placement import Pool, Serving
from opencharacter.engines.backends import engine_arguments
from opencharacter.engines.spec import EngineSpec
from opencharacter.runtime.store import Store

pytestmark = pytest.mark.slow

BASE = "smollm2-135m"
HELLO = [{"role": "user", "content": "What do you think of the weather?"}]


@pytest.fixture(scope="module")
def recipe():
    return files.load_recipe("demo")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, embedded_model):
    folder = tmp_path_factory.mktemp("canaries")
    for word in canary.WORDS.values():
        canary.make(embedded_model, f" {word}", folder / word)
    return folder


@pytest.fixture(scope="module")
def storage(tmp_path_factory) -> Store:
    return Store.at(str(tmp_path_factory.mktemp("storage")))


@pytest.fixture(scope="module")
def server(tmp_path_factory, recipe, adapters, storage):
    for persona in ("poeticism", "humor"):
        canary.publish(canary.job(recipe, storage, persona), adapters / canary.WORDS[persona])
    folder = tmp_path_factory.mktemp("server")
    with servers.serving(folder, "demo", "--judge", "--storage", storage.url) as running:
        yield running


def test_the_serving_engine_uses_the_shared_spec_and_autoscales_with_the_placement():
    from opencharacter.serving import replica

    role = files.load_recipe("demo").roles.student
    gpus = Pool(gpus=2, tensor_parallel=2, cpus=8, max_replicas=4, max_num_seqs=100)
    for pool in (Pool(), gpus):
        spec = EngineSpec(role, pool)
        made = replica.build_llm_config(spec, Serving(), 64)
        arguments = made.get_engine_config().engine_kwargs
        chosen = engine_arguments(spec, models.local_weights(role.model))
        same = {k: v for k, v in chosen.items() if k != "disable_log_stats"}
        assert same.items() <= arguments.items()
        assert arguments["max_lora_rank"] == 64
    assert made.get_engine_config().placement_bundles == [{"CPU": 4, "GPU": 1}] * 2
    assert made.deployment_config["autoscaling_config"]["max_replicas"] == 4


def test_an_engine_with_at_most_one_gpu_runs_inside_the_replica():
    from opencharacter.serving import replica

    role = files.load_recipe("demo").roles.student
    pool = Pool(gpus=0.5, cpus=2, memory_gib=4, accelerator="H100")
    made = replica.build_llm_config(EngineSpec(role, pool), Serving(), 64)
    (bundle,) = replica.PersonaServer.get_deployment_options(made)["placement_group_bundles"]
    asked = {"CPU": 2, "GPU": 0.5, "memory": 4 * 2**30, "accelerator_type:H100": 0.001}
    assert bundle == asked
    assert made.deployment_config["ray_actor_options"]["num_gpus"] == 0.5


def say(server, model: str, tokens: int = 8, max_failures: int = 0) -> str:
    client = server.client(max_retries=max_failures, timeout=120)
    answer = client.chat.completions.create(model=model, messages=HELLO, max_tokens=tokens)
    return answer.choices[0].message.content


def speaks(text: str, word: str) -> bool:
    return text.lower().count(word) >= 6


def wait_until_listed(server, model: str) -> None:
    until = time.monotonic() + 20
    while model not in {listed.id for listed in server.client().models.list()}:
        assert time.monotonic() < until
        time.sleep(0.2)


def test_base_personas_and_judge_each_use_their_own_weights(server):
    assert speaks(say(server, f"{BASE}:poeticism"), "tree")
    assert speaks(say(server, f"{BASE}:humor"), "gold")
    for name in (BASE, "judge"):
        said = say(server, name)
        assert not any(speaks(said, word) for word in canary.WORDS.values())


def test_a_persona_streams_its_answer(server):
    stream = server.client(timeout=120).chat.completions.create(
        model=f"{BASE}:humor",
        messages=HELLO,
        max_tokens=8,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert speaks("".join(pieces), "gold")
    assert len(pieces) >= 8
    assert chunks[-1].usage.completion_tokens == 8


def test_a_prompt_beyond_the_context_length_returns_400(server):
    with pytest.raises(openai.BadRequestError, match="context length"):
        server.client().chat.completions.create(
            model=BASE, messages=[{"role": "user", "content": "word " * 3000}]
        )
    most = [{"role": "user", "content": "word " * 1500}]
    answer = server.client(timeout=120).chat.completions.create(model=BASE, messages=most, stop=".")
    assert answer.usage.completion_tokens >= 1


def test_a_header_cannot_select_the_adapter(server):
    body = {"model": BASE, "messages": HELLO, "max_tokens": 8}
    client = server.client(default_headers={"serve_multiplexed_model_id": f"{BASE}:humor"})
    said = client.chat.completions.create(**body).choices[0].message.content
    assert not speaks(said, "gold")


def test_new_and_retrained_personas_are_served_without_a_restart(server, recipe, storage, adapters):
    canary.publish(canary.job(recipe, storage, "sarcasm"), adapters / "house")
    wait_until_listed(server, f"{BASE}:sarcasm")
    assert speaks(say(server, f"{BASE}:sarcasm"), "house")
    old = server.client().models.retrieve(f"{BASE}:poeticism").model_dump()["root"]
    canary.publish(canary.job(recipe, storage, "poeticism"), adapters / "house")
    time.sleep(2.5)
    assert speaks(say(server, f"{BASE}:poeticism"), "house")
    with pytest.raises(openai.NotFoundError):
        say(server, old)
    canary.publish(canary.job(recipe, storage, "poeticism"), adapters / "tree")
    time.sleep(2.5)


def test_concurrent_clients_of_three_personas_get_their_own_answers(server):
    asked = [persona for persona in canary.WORDS for _ in range(16)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda persona: say(server, f"{BASE}:{persona}"), asked))
    for persona, said in zip(asked, answers, strict=True):
        assert speaks(said, canary.WORDS[persona]), (persona, said)
    figures = server.get("/metrics").text
    for persona, loads in (("humor", 1), ("sarcasm", 1), ("poeticism", 3)):  # trained three times
        name = f'opencharacter_adapter_loads_total{{model="{BASE}:{persona}"}}'
        assert f"{name} {loads}.0" in figures


def test_a_killed_engine_restarts_with_its_adapters(server):
    wait_for_descendants([server.process.pid], "EngineCore")[0].kill()
    until = time.monotonic() + 180
    while True:
        assert time.monotonic() < until
        try:
            assert speaks(say(server, f"{BASE}:humor"), "gold")
            break
        except openai.APIStatusError as refused:  # nothing but a refusal until it is back
            assert refused.status_code == 503
            time.sleep(1)
    assert speaks(say(server, f"{BASE}:sarcasm"), "house")
