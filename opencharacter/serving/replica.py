"""One model on `ray.serve.llm`, with its adapters: the only file that touches Ray's LLM internals.

What is internal is `DiskMultiplexConfig`, the value that a loader of adapters must return, and
`VLLMEngine`, which `ReplicaEngine` corrects. All else is Ray's public interface, the same in ray
2.58 (vLLM 0.26) and 2.60 (vLLM 0.29). Importing this module imports vLLM, so it is imported where a
model is served and nowhere else.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import defaultdict
from collections.abc import AsyncIterator
from itertools import groupby
from typing import Any

from fastapi import HTTPException
from pydantic import ValidationError
from ray.llm._internal.serve.core.configs.llm_config import DiskMultiplexConfig
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from ray.serve.deployment import Application
from ray.serve.llm import LLMConfig, build_llm_deployment
from ray.serve.llm.deployment import LLMServer
from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest
from vllm.platforms import current_platform
from vllm.v1.engine.exceptions import EngineDeadError

from opencharacter import models
from opencharacter.config.placement import Serving
from opencharacter.engines.backends import engine_arguments, environment
from opencharacter.engines.spec import EngineSpec
from opencharacter.runtime.cluster import card
from opencharacter.serving.catalogue import Catalogue
from opencharacter.serving.protocol import ErrorBody, ResponsePart, paced

REQUEST_TYPES = {"chat": ChatCompletionRequest, "completions": CompletionRequest}


def deployment(
    spec: EngineSpec, serving: Serving, catalogue: Catalogue | None, max_rank: int
) -> Application:
    """A role's model as a Serve deployment.

    Args:
        spec: the model and where it runs.
        serving: limits.
        catalogue: where its adapters are; None for a model without any.
        max_rank: of the adapters.
    """
    bind = {"catalogue": catalogue, "max_rank": max_rank, "rate": serving.max_chunks_per_second}
    return build_llm_deployment(
        llm_config(spec, serving, max_rank if catalogue else None),
        deployment_cls=PersonaServer,
        name_prefix="",
        bind_kwargs=bind,
    )


def llm_config(spec: EngineSpec, serving: Serving, max_rank: int | None) -> LLMConfig:
    """The same engine as everywhere in this package, as Ray configures it."""
    pool, role = spec.pool, spec.role
    arguments = {k: v for k, v in engine_arguments(spec).items() if k != "disable_log_stats"}
    # What a request gets that does not say, less where the context leaves less.
    arguments["override_generation_config"] = {"max_new_tokens": serving.max_tokens}
    lora = {
        "enable_lora": True,
        "max_lora_rank": max_rank,
        "max_loras": min(serving.max_loras, serving.max_adapters),
        "max_cpu_loras": serving.max_adapters,
    }
    source = role.model if models.is_hub(role.model) else str(models.resolve(role.model))
    return LLMConfig(
        model_loading_config={"model_id": role.name, "model_source": source},
        engine_kwargs=arguments | (lora if max_rank else {}),
        experimental_configs={"stream_batching_interval_ms": 0},  # `paced` does it
        lora_config={"max_num_adapters_per_replica": serving.max_adapters} if max_rank else None,
        placement_group_config={"bundles": bundles(spec)},
        runtime_env={"env_vars": environment(spec)},
        deployment_config={
            **replicas(spec),
            "ray_actor_options": {
                "num_cpus": 0,
                "num_gpus": 0 if shards(spec) else pool.gpus,
                "memory": int(pool.memory_gib * 2**30),
            },
            "max_ongoing_requests": pool.max_num_seqs,
            "max_queued_requests": serving.max_queued_requests,
            "health_check_period_s": 2,
            "health_check_timeout_s": 30,
            "graceful_shutdown_timeout_s": serving.drain_seconds,
            "graceful_shutdown_wait_loop_s": 0.5,
        },
    )


def shards(spec: EngineSpec) -> int:
    """Processes beside the replica that hold a part of the model: none where one GPU holds it."""
    ways = spec.pool.tensor_parallel
    return ways if spec.pool.gpus and ways > 1 else 0


def bundles(spec: EngineSpec) -> list[dict[str, float]]:
    """What Ray reserves beside the replica itself: one bundle a shard, or one of CPUs."""
    pool, ways = spec.pool, shards(spec)
    if not ways:
        return [{"CPU": pool.cpus} | card(pool)]
    return [{"CPU": pool.cpus / ways, "GPU": pool.gpus / ways} | card(pool)] * ways


def replicas(spec: EngineSpec) -> dict[str, Any]:
    """A fixed number, or as many as the load asks for where the placement lets it grow."""
    pool = spec.pool
    if pool.most_replicas == pool.replicas:
        return {"num_replicas": pool.replicas}
    return {
        "autoscaling_config": {
            "min_replicas": pool.replicas,
            "max_replicas": pool.most_replicas,
            "target_ongoing_requests": max(1, pool.max_num_seqs * 3 // 4),
        }
    }


class AdapterLoader:
    """What Ray asks for an adapter that a replica has not loaded yet."""

    def __init__(self, catalogue: Catalogue, max_rank: int):
        self.catalogue, self.max_rank = catalogue, max_rank
        self.untold: set[str] = set()
        """Loaded, and no answer has said so yet."""

    async def load_model_from_config(
        self, lora_model_id: str, llm_config: LLMConfig
    ) -> DiskMultiplexConfig:
        """Have the files of exactly this revision on this node.

        Raises:
            HTTPException: 404 where storage does not hold it, 400 where this engine cannot run it.
        """
        try:
            folder = await self.catalogue.snapshot(lora_model_id)
        except LookupError as error:
            raise HTTPException(404, str(error)) from None
        rank = json.loads((folder / "adapter_config.json").read_text())["r"]
        if rank > self.max_rank:
            raise HTTPException(
                400,
                f"{lora_model_id} has rank {rank}, this server was started for {self.max_rank}; "
                "start it again from the recipe that trained it",
            )
        self.untold.add(lora_model_id)
        return DiskMultiplexConfig(
            model_id=lora_model_id,
            local_path=str(folder),
            max_total_tokens=None,
            lora_assigned_int_id=0,  # nobody reads it: vLLM numbers them itself
        )


class ReplicaEngine(VLLMEngine):
    """An engine that runs in its replica where one GPU is enough.

    Ray runs every engine that has a GPU through vLLM's distributed executor, where each step is a
    message to another process. That is for engines of several GPUs.
    """

    def _prepare_engine_config(self, callback_ctx: Any) -> tuple[Any, Any, Any]:
        arguments, frontend, config = super()._prepare_engine_config(callback_ctx)
        if config.parallel_config.world_size == 1 and not current_platform.is_cpu():
            config.parallel_config.distributed_executor_backend = "uni"
        return arguments, frontend, config


class PersonaServer(LLMServer):
    """A replica: one engine, answering with the base model or any of its adapters.

    Args:
        llm_config: the engine.
        catalogue: where its adapters are; None for a model without any.
        max_rank: of the adapters.
        rate: messages of all streams that leave in a second.
    """

    async def __init__(
        self,
        llm_config: LLMConfig,
        *,
        catalogue: Catalogue | None = None,
        max_rank: int = 0,
        rate: int = 1,
    ):
        self.rate, self.streams = rate, 0
        self.loader = AdapterLoader(catalogue, max_rank) if catalogue else None
        self.loading: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        await super().__init__(
            llm_config,
            engine_cls=ReplicaEngine,
            model_downloader=lambda **_: self.loader,  # type: ignore
        )
        await self.warm_up(llm_config.model_id)

    async def warm_up(self, model: str) -> None:
        """Make one token before anybody waits for one: the first takes seconds."""
        hello = {"model": model, "messages": [{"role": "user", "content": "Hello"}]}
        async for _ in self.answer("chat", hello | {"max_tokens": 1}):
            pass

    async def ready(self) -> bool:
        """Whether the engine is alive; raises where it is not."""
        await self.check_health()
        return True

    async def answer(self, kind: str, payload: dict[str, Any]) -> AsyncIterator[ResponsePart]:
        """Answer one request in parts (see `wire.Part`).

        A replica whose engine died ends at once, before a health check finds out: what would have
        come to it then waits for the next one.

        Args:
            kind: `chat` or `completions`.
            payload: the body, its `model` the one that this deployment knows.
        """
        try:
            async for part in self.parts(kind, payload):
                yield part
        except EngineDeadError:
            os._exit(1)

    async def parts(self, kind: str, payload: dict[str, Any]) -> AsyncIterator[ResponsePart]:
        """The same, but for an engine that died."""
        try:
            request = REQUEST_TYPES[kind].model_validate(payload)
            async with self.loading[payload["model"]]:  # two first requests would load it twice
                stream = await getattr(self, kind)(request)
        except ValidationError as error:
            first = error.errors()[0]
            yield ErrorBody(400, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
            return
        except HTTPException as error:
            yield ErrorBody(error.status_code, str(error.detail))
            return
        if self.loader and payload["model"] in self.loader.untold:
            self.loader.untold.remove(payload["model"])
            yield {"loaded": payload["model"]}
        self.streams += 1
        try:
            async for items in paced(stream, lambda: self.streams / self.rate):
                for part in joined(items):
                    yield part_of(part)
        finally:
            self.streams -= 1


def joined(items: list[Any]) -> list[Any]:
    """What leaves together: events as one text, all else by itself."""
    flat = [part for item in items for part in (item if isinstance(item, list) else [item])]
    kinds = groupby(flat, key=lambda part: isinstance(part, str))
    return [part for text, run in kinds for part in (["".join(run)] if text else run)]


def part_of(item: Any) -> ResponsePart:
    """What Ray's server gives, as a part of the answer."""
    if isinstance(item, str):
        return item
    if hasattr(item, "error"):
        return ErrorBody(int(item.error.code), item.error.message, param=item.error.param)
    return {"body": item.model_dump(mode="json", exclude_none=True)}
