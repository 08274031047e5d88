"""A model replica on `ray.serve.llm`; with `router`, the only module that touches Ray's internals.

Internal to Ray are `DiskMultiplexConfig`, which an adapter loader must return, `VLLMEngine`, of
which `ReplicaEngine` extends how it configures and starts vLLM, and `_app_state` and
`_run_request`, which give access to vLLM's implementation of the Responses API. Everything else is
Ray's public API, identical in Ray 2.58 (vLLM 0.26) and 2.60 (vLLM 0.29). Importing this module
imports vLLM, so only code that serves a model imports it.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import defaultdict
from collections.abc import AsyncIterator
from functools import partial
from itertools import groupby
from typing import Any

from fastapi import HTTPException
from ray.llm._internal.serve.core.configs.llm_config import DiskMultiplexConfig
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from ray.serve.deployment import Application
from ray.serve.llm import LLMConfig, build_llm_deployment
from ray.serve.llm.deployment import LLMServer
from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.tool_parsers import ToolParserManager
from vllm.v1.engine.exceptions import EngineDeadError

from opencharacter import models
from opencharacter.config.placement import Serving
from opencharacter.config.roles import Role, Sampling
from opencharacter.engines.backends import (
    ENGINE_ERROR,
    cache_environment,
    engine_arguments,
    environment,
)
from opencharacter.engines.spec import EngineSpec, Reply
from opencharacter.errors import RowFailed, UserError
from opencharacter.runtime.cluster import accelerator_resource
from opencharacter.serving import refusals, replies
from opencharacter.serving.catalogue import Catalogue
from opencharacter.serving.protocol import ErrorBody, ResponsePart, coalesce
from opencharacter.serving.router import router_options
from opencharacter.serving.validation import template_error
from opencharacter.text.chat import Message
from opencharacter.text.templates import adapted_template, load_tokenizer, template_source

REQUEST_TYPES = {
    "chat": ChatCompletionRequest,
    "completions": CompletionRequest,
    "responses": ResponsesRequest,
}

GRAMMARS = {"backend": "xgrammar"}
"""What compiles JSON schemas. By default vLLM checks each request with the first of three compilers
that accepts it, but compiles all of them with the one that the first request of an engine needed,
which fails on schemas that it was never asked about."""


def build_deployment(
    spec: EngineSpec, serving: Serving, catalogue: Catalogue | None, max_rank: int
) -> Application:
    """Build the deployment of a role's model.

    Args:
        spec: the model and where it runs.
        serving: the server's limits.
        catalogue: the model's adapters; None for a model without adapters.
        max_rank: largest LoRA rank of the adapters.
    """
    check_tool_parser(spec.role)
    return build_llm_deployment(
        build_llm_config(spec, serving, max_rank if catalogue else None),
        deployment_cls=PersonaServer,
        name_prefix="",
        bind_kwargs={
            "role": spec.role,
            "catalogue": catalogue,
            "max_rank": max_rank,
            "max_chunks_per_second": serving.max_chunks_per_second,
        },
    )


def check_tool_parser(role: Role) -> None:
    """Raise a `UserError` if vLLM does not have the role's tool parser."""
    known = ToolParserManager.list_registered()
    if role.tool_parser and role.tool_parser not in known:
        raise UserError(
            f"tool_parser = {role.tool_parser!r} of {role.name} is unknown; vLLM has "
            f"{', '.join(sorted(known))}"
        )


def build_llm_config(spec: EngineSpec, serving: Serving, max_rank: int | None) -> LLMConfig:
    """Configure Ray to run the same engine as the pipeline does.

    Args:
        spec: the model and where it runs.
        serving: the server's limits.
        max_rank: largest LoRA rank of the adapters; None for a model without adapters.
    """
    pool, role = spec.pool, spec.role
    weights = models.local_weights(role.model, role.revision)
    arguments = engine_arguments(spec, weights)
    arguments = {k: v for k, v in arguments.items() if k != "disable_log_stats"}
    # The default for requests without max_tokens; vLLM lowers it to what the context leaves.
    arguments["override_generation_config"] = {"max_new_tokens": serving.max_tokens}
    arguments.setdefault("structured_outputs_config", GRAMMARS)
    lora = {
        "enable_lora": True,
        "max_lora_rank": max_rank,
        "max_loras": min(serving.max_loras, serving.max_adapters),
        "max_cpu_loras": serving.max_adapters,
    }
    by_name = models.is_hub(role.model) and not role.chat_template  # each node downloads it
    source = role.model if by_name else str(models.resolve_role(role))
    if by_name and role.revision:
        arguments |= dict.fromkeys(("revision", "tokenizer_revision"), role.revision)
    return LLMConfig(
        model_loading_config={"model_id": role.name, "model_source": source},
        engine_kwargs=arguments | (lora if max_rank else {}),
        experimental_configs={"stream_batching_interval_ms": 0},  # `coalesce` batches instead
        lora_config={"max_num_adapters_per_replica": serving.max_adapters} if max_rank else None,
        placement_group_config={"bundles": placement_bundles(spec)},
        runtime_env={"env_vars": environment(spec)},
        deployment_config={
            **scaling_options(spec),
            **router_options(spec.pool),
            "ray_actor_options": {
                "num_cpus": 0,
                "num_gpus": 0 if worker_processes(spec) else pool.gpus,
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


def worker_processes(spec: EngineSpec) -> int:
    """Return the number of tensor-parallel workers; 0 if the replica itself runs the model."""
    size = spec.pool.tensor_parallel
    return size if spec.pool.gpus and size > 1 else 0


def placement_bundles(spec: EngineSpec) -> list[dict[str, float]]:
    """Return the bundles that Ray reserves besides the replica: one per worker, or one of CPUs."""
    pool, workers = spec.pool, worker_processes(spec)
    if not workers:
        return [{"CPU": pool.cpus} | accelerator_resource(pool)]
    return [
        {"CPU": pool.cpus / workers, "GPU": pool.gpus / workers} | accelerator_resource(pool)
    ] * workers


def scaling_options(spec: EngineSpec) -> dict[str, Any]:
    """Return a fixed number of replicas, or autoscaling if the placement sets a maximum."""
    pool = spec.pool
    if pool.replica_limit == pool.replicas:
        return {"num_replicas": pool.replicas}
    return {
        "autoscaling_config": {
            "min_replicas": pool.replicas,
            "max_replicas": pool.replica_limit,
            "target_ongoing_requests": max(1, pool.max_num_seqs * 3 // 4),
        }
    }


class AdapterLoader:
    """Fetches adapters that a replica has not loaded yet; Ray calls it.

    Args:
        catalogue: the adapters in storage.
        max_rank: largest LoRA rank that the engine accepts.
    """

    def __init__(self, catalogue: Catalogue, max_rank: int):
        self.catalogue, self.max_rank = catalogue, max_rank
        self.unreported: set[str] = set()
        """Adapters that were loaded and that no response has reported yet."""

    async def load_model_from_config(
        self, lora_model_id: str, llm_config: LLMConfig
    ) -> DiskMultiplexConfig:
        """Copy the files of one revision to this node.

        Raises:
            HTTPException: 404 if storage does not hold the revision, 400 if its rank is too large.
        """
        try:
            folder = await self.catalogue.snapshot(lora_model_id)
        except LookupError as error:
            raise HTTPException(404, str(error)) from None
        rank = json.loads((folder / "adapter_config.json").read_text())["r"]
        if rank > self.max_rank:
            raise HTTPException(
                400,
                f"{lora_model_id} has LoRA rank {rank}, but this server allows at most "
                f"{self.max_rank}; restart it with the recipe that trained the adapter",
            )
        self.unreported.add(lora_model_id)
        return DiskMultiplexConfig(
            model_id=lora_model_id,
            local_path=str(folder),
            max_total_tokens=None,
            lora_assigned_int_id=0,  # unused: vLLM assigns ids itself
        )


class ReplicaEngine(VLLMEngine):
    """An engine that runs inside its replica if one GPU is enough.

    Ray gives every engine an executor that sends a message to another process at each step. Only
    engines on several GPUs need that.

    The chat template is the one that the model was trained with.

    Args:
        llm_config: the engine's configuration.
        role: the model, to which the chat template is adapted.
    """

    def __init__(self, llm_config: LLMConfig, role: Role):
        super().__init__(llm_config)
        self.role = role

    def _prepare_engine_config(self, callback_ctx: Any) -> tuple[Any, Any, Any]:
        arguments, frontend, config = super()._prepare_engine_config(callback_ctx)
        if config.parallel_config.world_size == 1:
            config.parallel_config.distributed_executor_backend = "uni"
        frontend.enable_prompt_tokens_details = True
        if self.role.tool_parser:
            frontend.enable_auto_tool_choice = True
            frontend.tool_call_parser = self.role.tool_parser
        frontend.chat_template = adapted_template(models.resolve_role(self.role), self.role)
        return arguments, frontend, config

    def _start_async_llm_engine(
        self, vllm_engine_args: Any, vllm_engine_config: Any, placement_group: Any
    ) -> Any:
        client: Any = super()._start_async_llm_engine(
            vllm_engine_args, vllm_engine_config, placement_group
        )
        client.generate = partial(refusals.generate, client.generate)
        return client

    async def responses(self, request: ResponsesRequest, _: Any = None) -> AsyncIterator[Any]:
        """Respond to a request of the Responses API with vLLM's implementation."""
        response = await self._app_state.openai_serving_responses.create_responses(request)
        if not hasattr(response, "__aiter__"):
            yield response
            return
        async for event in response:
            yield f"event: {event.type}\ndata: {event.model_dump_json(by_alias=True)}\n\n"

    def vocabulary_size(self) -> int:
        """Return the number of tokens that the model knows."""
        return self._engine_client.model_config.get_vocab_size()  # type: ignore


class PersonaServer(LLMServer):
    """A replica: one engine that serves the base model and its adapters.

    Args:
        llm_config: the engine's configuration.
        role: the model.
        catalogue: the model's adapters; None for a model without adapters.
        max_rank: largest LoRA rank of the adapters.
        max_chunks_per_second: chunks per second over all streamed responses of this replica.
    """

    async def __init__(
        self,
        llm_config: LLMConfig,
        *,
        role: Role,
        catalogue: Catalogue | None = None,
        max_rank: int = 0,
        max_chunks_per_second: int = 1,
    ):
        os.environ.update(cache_environment())
        self.max_chunks_per_second, self.streams = max_chunks_per_second, 0
        self.loader = AdapterLoader(catalogue, max_rank) if catalogue else None
        self.load_locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        await super().__init__(
            llm_config,
            engine_cls=partial(ReplicaEngine, role=role),  # type: ignore
            model_downloader=lambda **_: self.loader,  # type: ignore
        )
        tokenizer = load_tokenizer(models.resolve_role(role), role)
        self.template = template_source(tokenizer) or ""
        if role.tool_parser and "tools" not in self.template:
            raise UserError(
                f"the chat template of {role.name} does not render tools; set tool_parser: null"
            )
        await self.warm_up(llm_config.model_id)

    async def warm_up(self, model: str) -> None:
        """Generate one token before the first request, because the first one takes seconds."""
        hello = {"model": model, "messages": [{"role": "user", "content": "Hello"}]}
        async for _ in self.answer("chat", hello | {"max_tokens": 1}):
            pass

    async def responses(self, request: ResponsesRequest) -> AsyncIterator[Any]:
        """Return the stream of a response, as `chat` and `completions` do."""
        return await self._run_request(request, engine_method="responses")  # type: ignore

    async def ready(self) -> bool:
        """Return True if the engine is healthy; raise if it is not."""
        await self.check_health()
        return True

    async def reply(
        self,
        role: Role,
        model: str,
        messages: list[Message],
        sampling: Sampling,
        seed: int | None,
        prefill: str,
    ) -> Reply:
        """Reply to a conversation of an evaluation, as the engines of the pipeline do.

        Args:
            role: the role whose chat template and context length apply.
            model: full name of the adapter; empty for the base model.
            messages: the conversation; the last message is the user's.
            sampling: sampling parameters.
            seed: seed of this request, or None for unseeded sampling.
            prefill: beginning of the reply, which the model continues.

        Raises:
            RowFailed: if this conversation cannot be continued although others can.
            StageFailed: if storage does not hold the adapter.
        """
        payload = replies.completion_payload(role, messages, sampling, seed, prefill)
        payload["model"] = model or self._llm_config.model_id
        async for part in self.answer("completions", payload):
            if isinstance(part, ErrorBody):
                raise replies.to_error(part)
            if isinstance(part, dict) and "body" in part:
                return replies.to_reply(part["body"])
        raise RowFailed(ENGINE_ERROR, "the engine returned no completion")

    async def answer(self, kind: str, payload: dict[str, Any]) -> AsyncIterator[ResponsePart]:
        """Respond to one request.

        If the engine has died, the replica exits at once instead of at the next health check, so
        that no further request is routed to it.

        Args:
            kind: `chat` or `completions`.
            payload: the validated request; its `model` is the name that the engine knows.

        Yields:
            The parts of the response (see `protocol.ResponsePart`).
        """
        try:
            async for part in self._generate(kind, payload):
                yield part
        except EngineDeadError:
            os._exit(1)

    def check_model_limits(self, payload: dict[str, Any]) -> ErrorBody | None:
        """Return an error if a request sets what this model does not have."""
        size = self.engine.vocabulary_size()  # type: ignore
        unknown = [i for i in payload.get("stop_token_ids", ()) if i >= size]
        if unknown:
            return ErrorBody(
                400,
                f"stop_token_ids contains {unknown[0]}; this model has {size:,} tokens",
                param="stop_token_ids",
            )
        return template_error(payload, self.template, self._llm_config.model_id)

    async def _generate(self, kind: str, payload: dict[str, Any]) -> AsyncIterator[ResponsePart]:
        problem = self.check_model_limits(payload)
        if problem:
            yield problem
            return
        try:
            request = REQUEST_TYPES[kind].model_validate(payload)
        except refusals.REFUSALS as error:
            yield refusals.to_error_body(error)
            return
        try:
            async with self.load_locks[payload["model"]]:  # load an adapter once only
                stream = await getattr(self, kind)(request)
        except HTTPException as error:
            yield ErrorBody(error.status_code, str(error.detail))
            return
        if self.loader and payload["model"] in self.loader.unreported:
            self.loader.unreported.remove(payload["model"])
            yield {"loaded": payload["model"]}
        self.streams += 1
        try:
            async for batch in coalesce(stream, lambda: self.streams / self.max_chunks_per_second):
                for item in join_events(batch):
                    yield to_response_part(item)
                    if isinstance(item, ErrorBody):
                        return
        except EngineDeadError:
            raise
        except Exception as error:  # to unpickle vLLM's, the ingress would have to import vLLM
            yield refusals.to_error_body(error)
        finally:
            self.streams -= 1


def join_events(items: list[Any]) -> list[Any]:
    """Join consecutive server-sent events into one string; keep everything else as it is.

    An event that reports an error becomes an `ErrorBody`, and what follows it is left out.
    """
    parts = [part for item in items for part in (item if isinstance(item, list) else [item])]
    errors = ((i, refusals.from_event(part)) for i, part in enumerate(parts))
    position, error = next(((i, error) for i, error in errors if error), (len(parts), None))
    groups = groupby(parts[:position], key=lambda part: isinstance(part, str))
    joined = [
        part for is_text, group in groups for part in (["".join(group)] if is_text else group)
    ]
    return [*joined, error] if error else joined


def to_response_part(item: Any) -> ResponsePart:
    """Convert what Ray's LLM server yields to a part of the response."""
    if isinstance(item, str | ErrorBody):
        return item
    if hasattr(item, "error"):
        return refusals.from_response(int(item.error.code), item.error.message, item.error.param)
    return {"body": item.model_dump(mode="json", exclude_none=True)}
