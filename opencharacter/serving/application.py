"""The Serve application: the student with its personas, and the judge, behind one ingress."""

from __future__ import annotations

import logging
import os
from typing import Any

from ray import serve

from opencharacter import models
from opencharacter.config.base import ECHO
from opencharacter.config.placement import Placement, Serving
from opencharacter.config.recipe import Recipe
from opencharacter.constitution.schema import Constitution
from opencharacter.engines.served import JUDGE, has_same_weights
from opencharacter.engines.spec import EngineSpec, max_lora_rank
from opencharacter.errors import UserError
from opencharacter.runtime.store import Store
from opencharacter.serving.access import AccessPolicy
from opencharacter.serving.catalogue import Catalogue
from opencharacter.serving.echo import EchoModel
from opencharacter.serving.ingress import Ingress, build_http_app
from opencharacter.serving.metrics import MetricsAggregator
from opencharacter.serving.presence import ServedJudge
from opencharacter.serving.protocol import BaseModelEntry


def build_application(
    recipe: Recipe,
    placement: Placement,
    store: Store,
    constitutions: list[Constitution],
    access_policy: AccessPolicy,
    judge: bool = False,
) -> serve.Application:
    """Build the Serve application.

    Args:
        recipe: the models and their sampling parameters.
        placement: where the models run, and the server's limits.
        store: storage with the adapters; personas trained later are served too.
        constitutions: the personas to serve; every persona in storage if empty.
        access_policy: which requests are accepted.
        judge: whether to serve the judge.

    Raises:
        UserError: if a model cannot be served, or student and judge share a name.
    """
    roles, serving = recipe.roles, placement.serving
    student = EngineSpec(roles.student, placement.pools.student)
    personas = tuple(c.name for c in constitutions)
    catalogue = Catalogue(
        store,
        roles.student.name,
        roles.student.model,
        personas,
        models.identity(roles.student),
    )
    handles = {
        roles.student.name: model_deployment(student, serving, catalogue, max_lora_rank(recipe))
    }
    base_models = {
        roles.student.name: BaseModelEntry(
            roles.student.name,
            recipe.evaluation.answers.sampling,
            bool(roles.student.tool_parser),
        )
    }
    served_judge = None
    if judge:
        spec = EngineSpec(roles.judge, placement.pools.judge)
        name = roles.student.name
        if not has_same_weights(spec, student):
            name = roles.judge.name
            if name in handles:
                raise UserError(
                    f"student and judge are different models with the same name {name!r}; "
                    "rename one of them in the recipe"
                )
            handles[name] = model_deployment(spec, serving, None, 0)
        tools = base_models[name].tools if name in base_models else bool(roles.judge.tool_parser)
        base_models[JUDGE] = BaseModelEntry(name, recipe.evaluation.preferences.judge, tools)
        served_judge = ServedJudge(roles.judge, name, recipe.evaluation.judge)
    options = {
        "num_replicas": serving.ingress_replicas,
        "ray_actor_options": {"num_cpus": 0},
        "max_ongoing_requests": 10_000,
        "graceful_shutdown_timeout_s": serving.drain_seconds,
        "graceful_shutdown_wait_loop_s": 0.5,
    }
    ingress_class = serve.ingress(build_http_app)(Ingress)
    ingress: Any = serve.deployment(ingress_class, name="ingress", **options)
    return ingress.bind(
        handles,
        base_models,
        catalogue,
        {c.name: c for c in constitutions},
        serving,
        access_policy,
        served_judge,
        MetricsAggregator.bind() if serving.ingress_replicas > 1 else None,
    )


def model_deployment(
    spec: EngineSpec, serving: Serving, catalogue: Catalogue | None, max_rank: int
) -> serve.Application:
    """Build the deployment of a role's model.

    Args:
        spec: the model and where it runs.
        serving: the server's limits.
        catalogue: the model's adapters; None for a model without adapters.
        max_rank: largest LoRA rank of the adapters.

    Raises:
        UserError: if the model cannot be served.
    """
    role = spec.role
    if role.endpoint:
        raise UserError(
            f"{role.name} is an endpoint ({role.endpoint}), which is served already; "
            "give the role a model to serve"
        )
    if role.trust_remote_code:
        raise UserError(
            f"{role.name} sets trust_remote_code, which a server does not allow; "
            "serve a model that needs no code of its own"
        )
    if role.model.startswith(ECHO):
        return EchoModel.options(
            name=role.name, max_queued_requests=serving.max_queued_requests
        ).bind(float(role.model.removeprefix(ECHO) or 0))
    root = logging.getLogger()
    level, handlers = root.level, root.handlers
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # importing vLLM logs what it misses
    from opencharacter.serving import replica

    # Importing Ray's LLM server makes the root logger of this process print everything as JSON.
    root.setLevel(level)
    root.handlers = handlers
    return replica.build_deployment(spec, serving, catalogue, max_rank)
