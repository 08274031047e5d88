"""The three engine backends: vLLM, any OpenAI-compatible endpoint, and an echo for tests."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from opencharacter import models
from opencharacter.cache import cache_dir
from opencharacter.config.base import ECHO
from opencharacter.config.placement import MAX_RUNTIME_ADAPTERS
from opencharacter.config.roles import Sampling
from opencharacter.engines import weights
from opencharacter.engines.spec import Engine, EngineSpec, FirstToken, Reply
from opencharacter.errors import RowFailed, StageFailed, UserError
from opencharacter.runtime.cluster import GIB
from opencharacter.runtime.store import RemoteDir
from opencharacter.text.chat import EMPTY_THOUGHT, Message, assistant
from opencharacter.text.templates import load_tokenizer, prompt_ids

DEFAULT_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    # A fresh GPU host compiles FlashInfer's sampler for two and a half minutes, and vLLM does not
    # use it for requests with seeds, as those of a run are by default.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}
"""Environment of every engine, unless the environment has other values."""
MAX_CPU_THREADS = 8
"""Threads of an engine on a CPU at most."""
CPU_ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Without it, vLLM starts a process for the model beside that of the engine, to bind threads.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
ENGINE_ERROR = "engine_error"
"""Drop reason of rows that the engine failed to answer; a rerun requests them again."""


def start(spec: EngineSpec) -> Engine:
    """Start the engine of a spec. VLLM needs a running event loop."""
    if spec.role.endpoint:
        return EndpointEngine(spec)
    if spec.role.model.startswith(ECHO):
        return EchoEngine(float(spec.role.model.removeprefix(ECHO) or 0))
    return VllmEngine(spec)


class VllmEngine:
    """VLLM's asynchronous engine with one model.

    An adapter is merged into its weights, or it applies adapters that its requests name.
    """

    def __init__(self, spec: EngineSpec):
        os.environ.update(environment(spec) | cache_environment())
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        base = models.resolve_role(spec.role)
        models.check_parallel(base, spec.pool.tensor_parallel)
        arguments = engine_arguments(spec, base)
        if spec.merged_adapter:
            base = models.merge_into_base(base, spec.merged_adapter.local())
        if spec.pool.tensor_parallel > 1:  # within this actor, whose GPUs are all on one node
            arguments.setdefault("distributed_executor_backend", "mp")
        elif spec.pool.gpus == 0:
            arguments.setdefault("distributed_executor_backend", "uni")
        if spec.sleeps and current_platform.is_sleep_mode_available():
            arguments["enable_sleep_mode"] = True
        self.can_sleep = arguments.get("enable_sleep_mode", False)
        self.model, self.max_model_len = str(base), spec.role.max_model_len
        self.tokenizer = load_tokenizer(base, spec.role)
        self.engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=self.model, **arguments))
        self.requests = 0
        self.adapters: dict[str, Any] = {}
        self.adding_adapter = asyncio.Lock()

    async def swap(self, spec: EngineSpec) -> None:
        """Replace the weights by those of a spec that differs only in the merged adapter.

        No request may be in flight. Compiled graphs are kept. After an error, the engine may have
        weights of both checkpoints and must not be used.

        Raises:
            WeightsDiffer: if the checkpoints are incompatible, or the weights are not as expected.
        """
        folder = models.resolve_role(spec.role)
        if spec.merged_adapter:
            folder = models.merge_into_base(folder, spec.merged_adapter.local())
        weights.check_compatible(Path(self.model), folder)
        workers = await self.engine.collective_rpc("swap_weights", args=(str(folder),))
        weights.check_sums(workers)
        if not await self.engine.reset_prefix_cache():
            raise StageFailed("the prefix cache of an engine could not be cleared")
        self.model = str(folder)

    async def sleep(self) -> None:
        """Free the memory of the GPU and keep the weights in main memory; nothing is in flight.

        Raises:
            StageFailed: if vLLM cannot do that on this platform.
        """
        if not self.can_sleep:
            raise StageFailed("vLLM has no sleep mode on this platform")
        await self.engine.sleep(level=1)

    async def wake(self) -> None:
        """Load the weights into the GPU again."""
        await self.engine.wake_up()

    async def _generate(
        self,
        messages: list[Message],
        sampling: Sampling,
        seed: int | None,
        prefill: str,
        final_only: bool,
        adapter: RemoteDir | None = None,
    ) -> AsyncIterator[Any]:
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        ids = prompt_ids(self.tokenizer, messages, prefill)
        remaining = self.max_model_len - len(ids)
        if remaining < 1:
            raise RowFailed(
                "too_long", f"prompt has {len(ids)} tokens, max_model_len is {self.max_model_len}"
            )
        kind = RequestOutputKind.FINAL_ONLY if final_only else RequestOutputKind.DELTA
        parameters = SamplingParams(
            max_tokens=min(sampling.max_tokens, remaining),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            repetition_penalty=sampling.repetition_penalty,
            seed=seed,
            output_kind=kind,
            logprobs=sampling.top_logprobs if isinstance(sampling, FirstToken) else None,
        )
        self.requests += 1
        async for output in self.engine.generate(
            TokensPrompt(prompt_token_ids=ids),
            parameters,
            request_id=str(self.requests),
            lora_request=adapter and await self.lora_request(adapter),
        ):
            yield output

    async def lora_request(self, adapter: RemoteDir) -> Any:
        """Return vLLM's reference to an adapter, which it loads with the first request."""
        from vllm.lora.request import LoRARequest

        address = adapter.store.address(adapter.relative)
        async with self.adding_adapter:  # so that no two adapters get the same number
            if address not in self.adapters:
                folder = await asyncio.to_thread(adapter.local)
                number = len(self.adapters) + 1
                self.adapters[address] = LoRARequest(address, number, str(folder))
            return self.adapters[address]

    async def reply(self, messages, sampling, *, seed, prefill="", adapter=None) -> Reply:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            outputs = self._generate(
                messages, sampling, seed, prefill, final_only=True, adapter=adapter
            )
            (final,) = [output async for output in outputs]
        except EngineDeadError:
            raise
        except ValueError as error:  # vLLM refused this request
            raise RowFailed(ENGINE_ERROR, str(error)) from None
        return Reply(
            text=final.outputs[0].text,
            finish_reason=final.outputs[0].finish_reason or "",
            tokens_in=len(final.prompt_token_ids),
            tokens_out=len(final.outputs[0].token_ids),
            cached_tokens=final.num_cached_tokens or 0,
            first_tokens=first_tokens(final.outputs[0].logprobs),
        )

    async def stream(self, messages, sampling) -> AsyncIterator[str]:
        async for output in self._generate(messages, sampling, None, "", final_only=False):
            yield output.outputs[0].text

    def close(self) -> None:
        self.engine.shutdown()


def first_tokens(log_probs: Any) -> tuple[tuple[str, float], ...]:
    """Return the likeliest first tokens of a reply of vLLM; none if they were not requested."""
    if not log_probs:
        return ()
    tokens = [(token.decoded_token or "", float(token.logprob)) for token in log_probs[0].values()]
    return tuple(sorted(tokens, key=lambda token: -token[1]))


def environment(spec: EngineSpec) -> dict[str, str]:
    """Return the environment variables that must be set before vLLM is imported."""
    variables = {name: os.environ.get(name, value) for name, value in DEFAULT_ENVIRONMENT.items()}
    if spec.pool.gpus:
        return variables
    cache_gib = str(max(1, round(spec.pool.kv_cache_gib)))
    sizes = {"VLLM_CPU_KVCACHE_SPACE": cache_gib, "OMP_NUM_THREADS": str(cpu_threads())}
    return variables | CPU_ENVIRONMENT | sizes


def cpu_threads() -> int:
    """Return the threads of an engine on this machine's CPU: half of the cores.

    Often two engines work side by side, or an engine and a training. On two cores, two engines of
    24 sequences generated 158 tokens/s together with a thread each and 136 with two; one alone
    generated 89 and 121.
    """
    import joblib

    return min(MAX_CPU_THREADS, max(1, joblib.cpu_count() // 2))


def cache_environment() -> dict[str, str]:
    """Return where vLLM, torch, FlashInfer and Triton keep what they have compiled.

    A first start on a GPU host compiles for minutes, later ones do not.

    The folders are in the package's cache on this node, unless the environment sets others.
    """
    folders = {
        "VLLM_CACHE_ROOT": "vllm",
        "TORCHINDUCTOR_CACHE_DIR": "torchinductor",
        "FLASHINFER_WORKSPACE_BASE": "flashinfer",
        "TRITON_CACHE_DIR": "triton",
    }
    return {
        name: os.environ.get(name) or str(cache_dir() / folder) for name, folder in folders.items()
    }


def cpu_dtype(spec: EngineSpec, model: Path) -> str:
    """Return the data type of an engine on this machine's CPU.

    Without bf16 products in hardware it is float32, which is twice as fast (a model of 135M
    parameters on two cores, 24 sequences: 89 and 45 tokens/s), if such weights fit into the memory
    of the pool.

    Args:
        spec: the engine.
        model: the folder of its weights.
    """
    if spec.role.dtype != "auto" or models.fast_bf16():
        return spec.role.dtype
    doubled = 2 * models.memory_footprint(model).weights
    return "float32" if doubled <= spec.pool.memory_gib * GIB else spec.role.dtype


def engine_arguments(spec: EngineSpec, model: Path | None = None) -> dict[str, Any]:
    """Return vLLM's engine arguments for a spec, except the model.

    Args:
        spec: the engine.
        model: the folder of its weights, which decides the data type on a CPU.

    Raises:
        UserError: if a quantized model would run on a CPU.
    """
    pool, role = spec.pool, spec.role
    arguments: dict[str, Any] = {
        "dtype": role.dtype,
        "max_model_len": role.max_model_len,
        "max_num_seqs": pool.max_num_seqs,
        "tensor_parallel_size": pool.tensor_parallel,
        "trust_remote_code": role.trust_remote_code,
        "enable_prefix_caching": True,  # Paper: off in its code, though rows share system prompts.
        "enable_log_requests": False,
        "disable_log_stats": True,
        "generation_config": "vllm",  # the recipe alone decides how to sample
        "worker_extension_cls": weights.EXTENSION,
    }
    if role.quantization and not pool.gpus:
        raise UserError(
            f"quantization: {role.quantization} of {role.model} needs a GPU, and its pool in the "
            "placement has none; use another placement or leave quantization out"
        )
    if role.quantization:
        arguments["quantization"] = role.quantization
    if pool.gpus == 0:
        arguments |= {
            "dtype": cpu_dtype(spec, model) if model else role.dtype,
            "enforce_eager": True,
            "block_size": 32,  # the default of 128 never hits on short chats
            # Chunked prefill crashes a CPU engine whose requests have seeds: vLLM 0.29 rewinds a
            # generator offset that CPU generators do not have.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(role.max_model_len, 4096),
            "worker_cls": "opencharacter.engines.cpu_worker.Worker",
        }
    else:
        arguments |= {
            "gpu_memory_utilization": pool.gpu_memory_utilization,
            "max_num_batched_tokens": 8192,  # the default of vLLM's asynchronous engine is 2,048
        }
    if spec.max_lora_rank:
        arguments |= {
            "enable_lora": True,
            "max_lora_rank": spec.max_lora_rank,
            "max_loras": MAX_RUNTIME_ADAPTERS,
        }
    return arguments | pool.engine_kwargs


ROW_ERROR_STATUSES = (400, 413, 422, 500)
"""HTTP statuses that one request may cause; all others concern the server or the API key."""


class EndpointEngine:
    """Any OpenAI-compatible server.

    The client library retries rate limits, server errors and lost connections. If the server stays
    unreachable, the stage fails, and a rerun requests the missing rows.
    """

    def __init__(self, spec: EngineSpec):
        from openai import AsyncOpenAI

        key = os.environ.get(spec.role.api_key_env, "none")
        self.model, self.date = spec.role.model, spec.role.date_string
        self.client = AsyncOpenAI(base_url=spec.role.endpoint, api_key=key, max_retries=8)
        self.limit = asyncio.Semaphore(spec.role.endpoint_concurrency)

    def _request(
        self,
        messages: list[Message],
        sampling: Sampling,
        seed: int | None,
        prefill: str,
    ) -> dict[str, Any]:
        body: dict[str, Any] = {}
        options: dict[str, Any] = {"date_string": self.date} if self.date else {}
        if sampling.repetition_penalty != 1:  # some servers reject this parameter
            body["repetition_penalty"] = sampling.repetition_penalty
        if prefill == EMPTY_THOUGHT:
            options["enable_thinking"] = False
        elif prefill:
            messages = [*messages, assistant(prefill)]
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        if options:
            body["chat_template_kwargs"] = options
        return {
            "model": self.model,
            "messages": messages,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "extra_body": body,
            **log_prob_options(sampling),
            **({"seed": seed} if seed is not None else {}),
        }

    async def reply(self, messages, sampling, *, seed, prefill="") -> Reply:
        from openai import APIError

        request = self._request(messages, sampling, seed, prefill)
        try:
            async with self.limit:
                answer = await self.client.chat.completions.create(**request)
        except APIError as error:
            if getattr(error, "status_code", None) in ROW_ERROR_STATUSES:
                raise RowFailed(ENGINE_ERROR, str(error)) from None
            url = self.client.base_url
            raise StageFailed(
                f"{self.model} at {url} is unavailable: {error}; check the server and the API key, "
                "and run the same command again"
            ) from None
        if not getattr(answer, "choices", None):  # an error that the server sent with status 200
            raise RowFailed(ENGINE_ERROR, f"response without choices: {str(answer)[:300]}")
        log_probs = answer.choices[0].logprobs
        listed = log_probs.content[0].top_logprobs if log_probs and log_probs.content else ()
        usage = answer.usage
        details = usage.prompt_tokens_details if usage else None
        return Reply(
            text=answer.choices[0].message.content or "",
            finish_reason=answer.choices[0].finish_reason or "",
            tokens_in=usage.prompt_tokens if usage else 0,
            tokens_out=usage.completion_tokens if usage else 0,
            cached_tokens=(details.cached_tokens or 0) if details else 0,
            first_tokens=tuple((token.token, token.logprob) for token in listed),
        )

    async def stream(self, messages, sampling) -> AsyncIterator[str]:
        request = self._request(messages, sampling, None, "")
        async for chunk in await self.client.chat.completions.create(**request, stream=True):
            if chunk.choices and chunk.choices[0].delta.content:
                yield chunk.choices[0].delta.content

    def close(self) -> None:
        """Do nothing: the server is not ours to stop."""


def log_prob_options(sampling: Sampling) -> dict[str, Any]:
    """Return the fields of a request for the log-probabilities of the first token."""
    if not isinstance(sampling, FirstToken):
        return {}
    return {"logprobs": True, "top_logprobs": sampling.top_logprobs}


class EchoEngine:
    """Echoes the last message, for tests in which the text does not matter.

    Args:
        seconds: latency of a reply, whatever the number of concurrent requests.
    """

    def __init__(self, seconds: float = 0):
        self.seconds = seconds

    async def reply(self, messages, sampling, *, seed, prefill="") -> Reply:
        if self.seconds:
            await asyncio.sleep(self.seconds)
        character = " in character" if messages[0]["role"] == "system" else ""
        words = f"Echo {seed}{character}: {messages[-1]['content']}".split()
        text = " ".join(words[: sampling.max_tokens]).rstrip(".?!") + "."
        size = sum(len(m["content"]) for m in messages) // 4
        return Reply(text, "stop", size, min(len(words), sampling.max_tokens), 0)

    async def stream(self, messages, sampling) -> AsyncIterator[str]:
        reply = await self.reply(messages, sampling, seed=0)
        for word in reply.text.split(" "):
            yield word + " "

    def close(self) -> None:
        """Do nothing."""
