"""Chats through HTTP: this package's server and vLLM's own, with the same engine and adapters.

Every client sends its next chat when the last one has ended; all answers are streamed and of one
length. `opencharacter` and `vllm_server` serve one adapter; the series `adapters_11` is the first
with eleven in rotation. `soak` is the embedded model on a CPU for as long as `soak_seconds`, with
three adapters each of which says one word for ever, so that an answer tells which one gave it; in
the middle the engine is killed. Requests that were under way then are counted apart from those that
fail otherwise.

Run: python benchmarks/serving.py --out benchmarks/results                 on a GPU host
     python benchmarks/serving.py --out benchmarks/results --ways soak --limit 1200
     python benchmarks/serving.py --out /tmp/results --tiny
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import harness
import psutil
from harness import LLAMA_8B, SUBJECT, TINY_LLAMA, Figures, Machine, Run, Series, Settings
from merge import linear_layers, write_adapter

from opencharacter import lora, models
from opencharacter.config import files
from opencharacter.config.files import resource_names
from opencharacter.config.recipe import Recipe
from opencharacter.runtime.store import Store

sys.path.append(str(harness.FOLDER.parent / "tests"))
import canary  # the tests' server and recognisable adapters
import server as servers

SETTINGS: Settings = {
    "repeats": 3,
    "clients": 256,
    "chats": 1024,
    "prompt_tokens": 200,
    "answer_tokens": 200,
    "rank": 64,
    "context": 2048,
    "shape": LLAMA_8B,
    "pool": {"gpus": 1, "max_num_seqs": 256, "engine_kwargs": {"load_format": "dummy"}},
    "serving": {
        "ingress_replicas": 4,
        "max_adapters": 16,
        "max_loras": 12,
        "max_requests_per_key": 1000,
        "max_queued_requests": 1000,
    },
    "soak_seconds": 600,
    "soak_clients": 16,
    "environment": {},
}
TINY: Settings = {
    "repeats": 1,
    "clients": 4,
    "chats": 16,
    "prompt_tokens": 20,
    "answer_tokens": 16,
    "rank": 8,
    "shape": TINY_LLAMA,
    "pool": {"max_num_seqs": 8, "memory_gib": 2, "engine_kwargs": {"load_format": "dummy"}},
    "soak_seconds": 30,
    "soak_clients": 4,
}
PERSONAS = [name for name in resource_names("constitutions", "*.yaml") if name != "template"][:11]
STUDENT = "student"


# ------------------------------------------------------------------------------------------- load


async def chat(session: aiohttp.ClientSession, body: dict[str, Any]) -> dict[str, Any]:
    """One streamed chat: text, tokens, seconds to the first piece; or `failed`, saying why."""
    began, first, said, tokens = time.monotonic(), None, "", 0
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    try:
        async with session.post("/v1/chat/completions", json=body) as answer:
            if answer.status != 200:
                return {"failed": f"{answer.status} {await answer.text()}", "began": began}
            async for line in answer.content:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    return {"failed": event["error"]["message"], "began": began}
                if event["choices"]:
                    piece = event["choices"][0]["delta"].get("content") or ""
                    first = first or (time.monotonic() if piece else None)
                    said += piece
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    except aiohttp.ClientError as error:
        return {"failed": repr(error), "began": began}
    ttft = (first or time.monotonic()) - began
    return {"text": said, "tokens": tokens, "ttft": ttft, "began": began}


async def load(url: str, bodies: Iterator[dict[str, Any]], clients: int) -> list[dict[str, Any]]:
    """Send all bodies, as many at once as there are clients."""
    done: list[dict[str, Any]] = []
    limits = aiohttp.TCPConnector(limit=0)
    forever = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(url, connector=limits, timeout=forever) as session:

        async def client() -> None:
            for body in bodies:
                answer = {**await chat(session, body), "ended": time.monotonic()}
                done.append({**answer, "model": body["model"]})

        await asyncio.gather(*(client() for _ in range(clients)))
    return done


def bodies(settings: Settings, names: list[str], repeat: int) -> Iterator[dict[str, Any]]:
    """Chats of one length with models in rotation; no two share more than a few first tokens."""
    for n in range(settings["chats"]):
        first = 100 + (n * 7919 + repeat * 104_729) % 3000
        words = " ".join(f"w{(first + i) % 3900}" for i in range(settings["prompt_tokens"]))
        yield {
            "model": names[n % len(names)],
            "messages": [{"role": "user", "content": words}],
            "max_tokens": settings["answer_tokens"],
            "min_tokens": settings["answer_tokens"],
            "ignore_eos": True,
        }


def measured(url: str, settings: Settings, series: str, names: list[str], repeat: int) -> Run:
    """A run of one series: all chats once, after a few that warm the server up."""
    warm = [
        body for body, _ in zip(bodies(settings, names, -1), range(2 * len(names)), strict=False)
    ]
    asyncio.run(load(url, iter(warm), settings["clients"]))
    began = time.monotonic()
    done = asyncio.run(load(url, bodies(settings, names, repeat), settings["clients"]))
    seconds = time.monotonic() - began
    failed = [each["failed"] for each in done if "failed" in each]
    assert not failed, failed[:3]
    waits = statistics.quantiles([each["ttft"] * 1000 for each in done], n=100)
    return {
        "series": series,
        "seconds": seconds,
        "tokens": sum(each["tokens"] for each in done),
        "ttft_p50_ms": waits[49],
        "ttft_p95_ms": waits[94],
    }


# ---------------------------------------------------------------------------------------- servers


def recipe_data(settings: Settings) -> dict[str, Any]:
    """A recipe whose student is the shape of the benchmark."""
    folder = str(harness.model_folder(settings["shape"]))
    role = {"model": folder, "name": STUDENT, "self_name": "S"}
    role["max_model_len"] = settings["context"]
    sampling = {"max_tokens": settings["answer_tokens"], "repetition_penalty": 1.0, "top_p": 1.0}
    lora = {"lora": {"rank": settings["rank"]}}
    return {
        "name": "serving",
        "roles": dict.fromkeys(("teacher", "student", "judge", "prompt_generator"), role),
        "distillation": {"dpo": lora},
        "introspection": {"sft": lora},
        "persona": {"merge": {"rank": settings["rank"]}},
        "evaluation": {"answers": {"sampling": sampling}},
    }


def placement_data(settings: Settings) -> dict[str, Any]:
    """Where the student runs, and what the server allows."""
    return {
        "name": "serving",
        "pools": {"student": settings["pool"]},
        "training": {"cpus": 1},
        "serving": settings["serving"],
    }


def adapter(folder: Path, settings: Settings) -> Path:
    """An adapter of all linear layers that hardly changes the model, as vLLM wants its settings."""
    write_adapter(folder, settings, seed=1)
    names = sorted({name.rpartition(".")[2] for name in linear_layers(settings["shape"])})
    made = {"peft_type": "LORA", "r": settings["rank"], "lora_alpha": settings["rank"] * 1e-4}
    made |= {"target_modules": names, "bias": "none"}
    (folder / lora.ADAPTER_CONFIG).write_text(json.dumps(made))
    return folder


def run_ours(settings: Settings) -> Iterator[Run]:
    """This package's server, with one adapter and with eleven."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files = adapter(folder / "adapter", settings)
        data, store = recipe_data(settings), Store.at(str(folder / "storage"))
        made = Recipe.model_validate(data)
        for persona in PERSONAS:
            canary.publish(canary.job(made, store, persona), files)
        (folder / "placement.yaml").write_text(json.dumps(placement_data(settings)))
        options = ("--placement", str(folder / "placement.yaml"), "--storage", store.url)
        names = [f"{STUDENT}:{persona}" for persona in PERSONAS]
        with servers.serving(folder, data, *options) as running:
            for repeat in range(settings["repeats"]):
                yield measured(running.url, settings, SUBJECT, names[:1], repeat)
                yield measured(running.url, settings, "adapters_11", names, repeat)


def run_vllm(settings: Settings) -> Iterator[Run]:
    """VLLM's own server, with the arguments that Ray passes on for ours."""
    from opencharacter.config.placement import Placement
    from opencharacter.engines.backends import environment
    from opencharacter.engines.spec import EngineSpec
    from opencharacter.serving import replica

    role = Recipe.model_validate(recipe_data(settings)).roles.student
    placement = Placement.model_validate(placement_data(settings))
    spec = EngineSpec(role, placement.pools.student)
    rank = lora.allowed_rank(settings["rank"])
    arguments = replica.build_llm_config(spec, placement.serving, rank).engine_kwargs
    with tempfile.TemporaryDirectory() as scratch:
        files = adapter(Path(scratch) / "adapter", settings)
        port = servers.free_port()
        command = [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            role.model,
        ]
        command += ["--served-model-name", STUDENT, "--host", "127.0.0.1", "--port", str(port)]
        command += ["--lora-modules", f"adapter={files}", *flags(arguments)]
        with process(command, environment(spec), f"http://127.0.0.1:{port}") as url:
            for repeat in range(settings["repeats"]):
                yield measured(url, settings, "vllm_server", ["adapter"], repeat)


def flags(arguments: dict[str, Any]) -> list[str]:
    """Engine arguments as vLLM's command line has them."""
    made = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            made.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            text = json.dumps(value) if isinstance(value, dict) else str(value)
            made += [f"--{flag}", text]
    return made


@contextlib.contextmanager
def process(command: list[str], environment: dict[str, str], url: str) -> Iterator[str]:
    """A server that answers at `/health` while the block runs."""
    started = subprocess.Popen(command, env={**os.environ, **environment})
    try:
        until = time.monotonic() + 300
        while subprocess.run(["curl", "-sf", f"{url}/health"], capture_output=True).returncode:
            assert started.poll() is None and time.monotonic() < until
            time.sleep(0.5)
        yield url
    finally:
        started.send_signal(signal.SIGTERM)
        started.wait(timeout=60)


# ------------------------------------------------------------------------------------------- soak


def run_soak(settings: Settings) -> Iterator[Run]:
    """Three canaries under load; the engine is killed in the middle."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, base = Path(scratch), models.embedded("smollm2-135m")
        recipe, store = files.load_recipe("demo"), Store.at(str(folder / "storage"))
        for persona, word in canary.WORDS.items():
            canary.make(base, f" {word}", folder / word)
            canary.publish(canary.job(recipe, store, persona), folder / word)
        with servers.serving(folder, "demo", "--storage", store.url) as running:
            yield asyncio.run(soak(running, recipe.roles.student.name, settings))


async def soak(running: servers.RunningServer, student: str, settings: Settings) -> Run:
    """Load for so many seconds, with a kill half-way, and what came of it."""
    seconds = settings["soak_seconds"]
    began = time.monotonic()

    likeliest = {"max_tokens": 12, "temperature": 0, "repetition_penalty": 1}  # its word, for ever

    def endless() -> Iterator[dict[str, Any]]:
        while time.monotonic() < began + seconds:
            for persona in canary.WORDS:
                said = [{"role": "user", "content": f"What about {time.monotonic():.3f}?"}]
                yield {"model": f"{student}:{persona}", "messages": said, **likeliest}

    async def disturb() -> dict[str, float]:
        await asyncio.sleep(seconds * 0.4)
        memory = memory_of(running.process.pid)
        await asyncio.sleep(seconds * 0.1)
        killed = time.monotonic()
        kill_engine(running.process.pid)
        return {"killed": killed, "memory_before": memory}

    disturbed, done = await asyncio.gather(
        disturb(), load(running.url, endless(), settings["soak_clients"])
    )
    killed = disturbed["killed"]
    failed = [each for each in done if "failed" in each]
    good = [each for each in done if "failed" not in each]
    back = min((e["ended"] for e in good if e["ended"] > killed + 1), default=time.monotonic())
    lost = [each for each in failed if each["began"] <= killed <= each["ended"]]
    mixed = [each for each in good if not is_own(each)]
    assert not mixed, mixed[:3]
    return {
        "series": "soak",
        "seconds": seconds,
        "tokens": sum(each["tokens"] for each in good),
        "requests": len(done),
        "failed": len(failed) - len(lost),
        "failed_in_flight": len(lost),
        "mixed_up": len(mixed),
        "seconds_without_answer": back - killed,
        "memory": memory_of(running.process.pid) / disturbed["memory_before"],
        "reasons": sorted({each["failed"][:200] for each in failed}),
    }


def is_own(each: dict[str, Any]) -> bool:
    """Whether an answer is the one of the adapter that was asked."""
    counts = {word: each["text"].lower().count(word) for word in canary.WORDS.values()}
    own = canary.WORDS[each["model"].partition(":")[2]]
    return counts.pop(own) >= 6 and not any(counts.values())


def kill_engine(server: int) -> None:
    """SIGKILL the process of the engine below a server."""
    for below in psutil.Process(server).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "EngineCore" in " ".join([below.name(), *below.cmdline()]):
                below.kill()
                return
    raise AssertionError("no engine found to kill")


def memory_of(server: int) -> float:
    """Bytes that a server and all processes below it hold for themselves."""
    total = 0
    for below in psutil.Process(server).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            total += below.memory_full_info().uss
    return float(total)


# ---------------------------------------------------------------------------------------- figures


def figures(series: Series, settings: Settings, machine: Machine) -> Figures:
    """Ratios, waits of both servers, and the soak."""
    found = harness.ratios(
        series,
        {
            "ratio_to_vllm_server": (SUBJECT, "vllm_server"),
            "adapters_11_to_1": ("adapters_11", SUBJECT),
        },
    )
    for name, prefix in ((SUBJECT, ""), ("vllm_server", "vllm_")):
        runs = series.get(name, [])
        if runs:
            found[f"{prefix}tokens_per_s"] = harness.figure(harness.speeds(runs))
        for wait in ("ttft_p50_ms", "ttft_p95_ms") if runs else ():
            found[f"{prefix}{wait}"] = harness.figure([run[wait] for run in runs])
    kinds = ("requests", "failed", "failed_in_flight", "mixed_up", "memory")
    for kind in (*kinds, "seconds_without_answer") if "soak" in series else ():
        found[f"soak_{kind}"] = harness.figure([run[kind] for run in series["soak"]])
    return found


BENCHMARK = harness.Benchmark(
    name="serving",
    script=Path(__file__).resolve(),
    settings=SETTINGS,
    tiny=TINY,
    ways={SUBJECT: run_ours, "vllm_server": run_vllm, "soak": run_soak},
    figures=figures,
)

if __name__ == "__main__":
    harness.main(BENCHMARK, __doc__ or "")
