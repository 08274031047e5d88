"""The Serve application: student, personas and judge behind one ingress."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from ray import serve

from opencharacter import models
from opencharacter.config.base import ECHO
from opencharacter.config.placement import Placement, Serving
from opencharacter.config.recipe import Recipe
from opencharacter.constitution.schema import Constitution
from opencharacter.engines.spec import EngineSpec
from opencharacter.errors import UserError
from opencharacter.runtime.store import Store
from opencharacter.serving.catalogue import Catalogue
from opencharacter.serving.ingress import AccessPolicy, Ingress, http
from opencharacter.serving.protocol import ResponsePart, Served, event

JUDGE = "judge"


def application(
    recipe: Recipe,
    placement: Placement,
    store: Store,
    constitutions: list[Constitution],
    access_policy: AccessPolicy,
    judge: bool = False,
) -> serve.Application:
    """Student, personas and judge behind one entrance.

    Args:
        recipe: names the models.
        placement: where they run and what is allowed.
        store: where trained adapters are, now and later.
        constitutions: the personas to serve; all that storage holds if empty.
        access_policy: who may come in.
        judge: whether the judge is served too.
    """
    roles, serving = recipe.roles, placement.serving
    student = EngineSpec(roles.student, placement.pools.student)
    personas = tuple(c.name for c in constitutions)
    catalogue = Catalogue(store, roles.student.name, roles.student.model, personas)
    handles = {roles.student.name: deployment(student, serving, catalogue, max_lora_rank(recipe))}
    names = {roles.student.name: Served(roles.student.name, recipe.evaluation.answers.sampling)}
    if judge:
        spec = EngineSpec(roles.judge, placement.pools.judge)
        target = roles.student.name
        if not same_weights(spec, student):
            target = roles.judge.name
            if target in handles:
                raise UserError(f"judge and student are two models named {target!r}; rename one")
            handles[target] = deployment(spec, serving, None, 0)
        names[JUDGE] = Served(target, recipe.evaluation.preferences.judge)
    options = {
        "num_replicas": serving.ingress_replicas,
        "ray_actor_options": {"num_cpus": 0},
        "max_ongoing_requests": 10_000,
        "graceful_shutdown_timeout_s": serving.drain_seconds,
        "graceful_shutdown_wait_loop_s": 0.5,
    }
    written = {c.name: c for c in constitutions}
    entrance: Any = serve.deployment(serve.ingress(http)(Ingress), name="entrance", **options)
    return entrance.bind(handles, names, catalogue, written, serving, access_policy)


def same_weights(one: EngineSpec, other: EngineSpec) -> bool:
    """Whether one engine can answer for both."""
    return (one.role.model, one.role.max_model_len) == (other.role.model, other.role.max_model_len)


def deployment(
    spec: EngineSpec, serving: Serving, catalogue: Catalogue | None, max_rank: int
) -> serve.Application:
    """A role's model as a Serve deployment.

    Raises:
        UserError: if it is not one to be served.
    """
    role = spec.role
    if role.endpoint:
        raise UserError(f"{role.name} is served at {role.endpoint} already; name a model to serve")
    if role.trust_remote_code:
        raise UserError(f"{role.name} asks for trust_remote_code; what is served may not have it")
    if role.model.startswith(ECHO):
        return Echo.options(name=role.name, max_queued_requests=serving.max_queued_requests).bind(
            float(role.model.removeprefix(ECHO) or 0)
        )
    from opencharacter.serving import replica

    return replica.deployment(spec, serving, catalogue, max_rank)


def max_lora_rank(recipe: Recipe) -> int:
    """The rank that an engine must allow for the recipe's adapters, before and after the merge."""
    dpo, sft = (
        recipe.distillation.dpo.lora.max_lora_rank,
        recipe.introspection.sft.lora.max_lora_rank,
    )
    return models.allowed_rank(max(dpo, recipe.persona.merge.max_lora_rank or dpo + sft))


@serve.deployment(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=100)
class Echo:
    """Answers as `echo:` does elsewhere, for tests of everything but the text: word by word."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    async def ready(self) -> bool:
        return True

    async def answer(self, kind: str, payload: dict[str, Any]) -> AsyncIterator[ResponsePart]:
        """As `llm.PersonaServer.answer`."""
        said = payload["messages"][-1]["content"] if kind == "chat" else payload["prompt"]
        words = f"{payload['model']}: {said}".split(" ")[: payload.get("max_tokens")]
        usage = {
            "prompt_tokens": 1,
            "completion_tokens": len(words),
            "total_tokens": 1 + len(words),
        }
        base = {"id": f"echo-{uuid.uuid4().hex}", "created": int(time.time())}
        base["model"] = payload["model"]
        if not payload.get("stream"):
            await asyncio.sleep(self.seconds)
            message = {"role": "assistant", "content": " ".join(words)}
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            yield {
                "body": {**base, "object": "chat.completion", "choices": [choice], "usage": usage}
            }
            return
        base["object"] = "chat.completion.chunk"
        for i, word in enumerate(words):
            await asyncio.sleep(self.seconds / len(words))
            delta = {"role": "assistant", "content": word if i == 0 else f" {word}"}
            ended = "stop" if i == len(words) - 1 else None
            choice = {"index": 0, "delta": delta, "finish_reason": ended}
            yield event({**base, "choices": [choice]})
        yield event({**base, "choices": [], "usage": usage})
        yield "data: [DONE]\n\n"
