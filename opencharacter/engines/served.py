"""Engines that are the deployments of a Ray Serve application; the evaluation is its client.

The application hosts the student once, with the adapters of all personas, and the judge. A run
deploys it (`served: own`), or joins an application of the Ray cluster by its name, or one of
another cluster by its URL. To the rest of the pipeline, a served engine is an engine like others:
the first job that needs one deploys the application, which all jobs share. Ids, seeds and prompts
do not depend on this choice. Run-time LoRA rounds differently from merged weights, so texts do.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import random
import re
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Any

import ray.exceptions

from opencharacter.config.placement import OWN_APPLICATION, Placement, Resources, total_resources
from opencharacter.config.recipe import Recipe
from opencharacter.config.roles import Role
from opencharacter.constitution.schema import Constitution
from opencharacter.engines.backends import EndpointEngine
from opencharacter.engines.spec import EngineSpec, Reply
from opencharacter.errors import OpenCharacterError, StageFailed
from opencharacter.runtime.manifests import adapter_revision
from opencharacter.runtime.stage import Job
from opencharacter.runtime.store import RemoteDir, Store
from opencharacter.text.chat import row_id

ADAPTER_STAGES = {"": "persona/merge", ":dpo": "distillation/dpo"}
"""The stage that writes an adapter, by the suffix of its served name."""
JUDGE = "judge"
"""The name under which a server lists the judge."""
SERVED_ROLES = ("student", JUDGE)
LIFECYCLE = "opencharacter.serving.evaluation"
"""The module that deploys applications. It is imported by its name, because serving is a layer
above this one."""
MAX_JOBS = 16
"""Jobs that use an application concurrently. Each keeps as many conversations in flight as all
replicas can generate, so the queues are full with a few; more would only be more processes."""
MAX_WAIT_SECONDS = 5
"""Longest pause before a rejected request is sent again."""
UNAVAILABLE_SECONDS = 900
"""Seconds without any reply after which a stage fails: a large model needs minutes to restart."""
HTTP_RETRIES = 200
"""Attempts at a request to a URL; the client library waits up to 8 s or as `Retry-After` says."""
MAX_FAILURES = 8
"""Attempts at a request whose replicas die."""


@dataclass(frozen=True)
class ServedApp:
    """The application of a run.

    Args:
        target: `own`, the name of an application, or a URL.
        recipe: the models.
        placement: where they run.
        store: storage with the adapters.
        constitutions: the personas.
    """

    target: str
    recipe: Recipe = field(repr=False)
    placement: Placement = field(repr=False)
    store: Store = field(repr=False)
    constitutions: tuple[Constitution, ...] = field(repr=False)

    @property
    def is_url(self) -> bool:
        return "://" in self.target

    @property
    def is_own(self) -> bool:
        """Whether the run deploys and deletes it."""
        return self.target == OWN_APPLICATION

    @property
    def name(self) -> str:
        """Name of the Serve application; equal for a repeated run, which finds it by that name."""
        if not self.is_own:
            return self.target
        roles, placement = self.recipe.roles, self.placement
        models = (roles.student, roles.judge, placement.pools.student, placement.pools.judge)
        identity = [self.store.address(), *(model.model_dump_json() for model in models)]
        personas = sorted(constitution.name for constitution in self.constitutions)
        return f"opencharacter-evaluation-{row_id(*identity, *personas)[:8]}"

    @property
    def specs(self) -> dict[str, EngineSpec]:
        """The engines that it hosts, by role. An endpoint is not hosted."""
        return {
            name: EngineSpec(role, getattr(self.placement.pools, name), None, name)
            for name in SERVED_ROLES
            if not (role := getattr(self.recipe.roles, name)).endpoint
        }

    @property
    def has_judge(self) -> bool:
        return JUDGE in self.specs

    @property
    def shares_engine(self) -> bool:
        """Whether student and judge have the same weights, so that one engine serves both."""
        specs = self.specs
        return len(specs) == 2 and has_same_weights(*specs.values())

    @property
    def resources(self) -> Resources:
        """What its replicas reserve; nothing for an application that the run does not deploy."""
        if not self.is_own:
            return Resources()
        specs = self.specs
        if self.shares_engine:
            specs.pop(JUDGE)
        return total_resources(spec.resources for spec in specs.values())

    def deployment(self, role: str) -> str:
        """Return the name of the model that answers for a role."""
        roles = self.recipe.roles
        is_student = role == "student" or self.shares_engine
        return roles.student.name if is_student else roles.judge.name


def has_same_weights(first: EngineSpec, second: EngineSpec) -> bool:
    """Return whether one engine can serve both roles."""
    names = ("model", "revision", "dtype", "max_model_len")
    return all(getattr(first.role, name) == getattr(second.role, name) for name in names)


@dataclass(frozen=True)
class ServedSpec(EngineSpec):
    """An engine of a served application: the student with an adapter, or the judge.

    Args:
        app: the application.
    """

    app: ServedApp = field(kw_only=True)

    @property
    def has_weights(self) -> bool:
        """Whether a job holds it: not a server elsewhere, of which nothing is started."""
        return not self.app.is_url

    @property
    def resources(self) -> Resources:
        return self.app.resources

    @property
    def max_concurrent_jobs(self) -> int:
        return MAX_JOBS

    @property
    def label(self) -> str:
        return f"Serve application {self.app.name}"

    def key(self) -> str:
        return self.label

    @property
    def swap_group(self) -> str:
        return ""

    def connect(self) -> ServedEngine | ServedEndpoint:
        """Return the client of the application."""
        return ServedEndpoint(self) if self.app.is_url else ServedEngine(self)


def served_spec(
    job: Job, role: str, adapter: RemoteDir | None, model: Role | None
) -> ServedSpec | None:
    """Return the served engine of a role, or None if the job starts an engine of its own.

    These are not served: stages outside of the evaluation, other models than the recipe's, roles
    with an endpoint, and adapters of other stages than `ADAPTER_STAGES`, such as steering vectors,
    which are biases and no LoRA.
    """
    target = job.placement.evaluation.served
    if not target or not job.stage.name.startswith("evaluation/") or role not in SERVED_ROLES:
        return None
    own: Role = getattr(job.recipe.roles, role)
    if own.endpoint or (model or own) != own or (adapter and served_suffix(adapter) is None):
        return None
    app = ServedApp(target, job.recipe, job.placement, job.store, job.constitutions)
    return ServedSpec(own, getattr(job.placement.pools, role), adapter, role, app=app)


def served_suffix(adapter: RemoteDir) -> str | None:
    """Return the suffix of an adapter's served name; None if it is not served."""
    for suffix, stage in ADAPTER_STAGES.items():
        if adapter.relative.endswith(f"/{stage}/adapter"):
            return suffix
    return None


def served_model(spec: ServedSpec) -> str:
    """Return the full name of a spec's adapter, with its revision; empty for the base model.

    Raises:
        StageFailed: if the adapter is not in storage.
    """
    if spec.adapter is None:
        return ""
    suffix = served_suffix(spec.adapter)
    assert suffix is not None
    dataset = spec.adapter.relative.removesuffix("/adapter")
    student, persona = dataset.removesuffix(f"/{ADAPTER_STAGES[suffix]}").rsplit("/", 1)
    manifest = spec.adapter.store.manifest(dataset)
    if manifest is None:
        raise StageFailed(f"{dataset} is not in storage; run the same command again")
    return f"{student}:{persona}{suffix}@{adapter_revision(manifest)}"


# ----------------------------------------------------------------------------------------- clients


class ServedEngine:
    """An `Engine` that calls a deployment of a Serve application through its handle.

    Requests that the queue has no place for, or whose replica was lost, are sent again.
    """

    def __init__(self, spec: ServedSpec):
        from ray import serve

        self.role, self.app = spec.role, spec.app
        self.model = served_model(spec)
        status = applications().get(spec.app.name)
        if status is None:
            raise StageFailed(f"Serve application {spec.app.name!r} does not run; run again")
        deployment = find_deployment(status.deployments, spec.app.deployment(spec.role_name))
        handle = serve.get_deployment_handle(deployment, spec.app.name)
        self.handle: Any = handle.options(multiplexed_model_id=self.model)
        self.last_reply = time.monotonic()

    async def reply(self, messages, sampling, *, seed, prefill="") -> Reply:
        return await self.call("reply", messages, sampling, seed, prefill)

    async def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of a replica with the role, the adapter's name and further arguments.

        Raises:
            RowFailed: if the replica refuses this request.
            StageFailed: if no replica has replied for `UNAVAILABLE_SECONDS`.
        """
        from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

        pause, failures, started = 0.05, 0, time.monotonic()
        while True:
            try:
                bound = getattr(self.handle, method)
                result = await bound.remote(self.role, self.model, *arguments)
                self.last_reply = time.monotonic()
                return result
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, OpenCharacterError):
                    raise error.cause from None
                raise
            except (BackPressureError, DeploymentUnavailableError) as error:
                problem = error
            except ray.exceptions.RayActorError as error:
                problem, failures = error, failures + 1
            silent = time.monotonic() - max(self.last_reply, started)
            if failures >= MAX_FAILURES or silent > UNAVAILABLE_SECONDS:
                raise StageFailed(
                    f"Serve application {self.app.name!r} does not reply "
                    f"({type(problem).__name__}); look into its logs and run the same command again"
                ) from None
            await asyncio.sleep(random.uniform(pause / 2, pause))
            pause = min(2 * pause, MAX_WAIT_SECONDS)

    def stream(self, messages, sampling) -> AsyncIterator[str]:
        raise NotImplementedError("a served engine does not stream its replies")

    def close(self) -> None:
        """Do nothing: the application outlives its clients."""


class ServedEndpoint(EndpointEngine):
    """An `Engine` that calls a server by HTTP, whose admission limits it respects.

    An adapter is named with its revision, so a server with another training of it refuses.
    """

    def __init__(self, spec: ServedSpec):
        base = spec.app.target.rstrip("/").removesuffix("/v1")
        model = served_model(spec) or (JUDGE if spec.role_name == JUDGE else spec.role.name)
        role = spec.role.model_copy(
            update={"endpoint": f"{base}/v1", "model": model, "api_key_env": KEY_VARIABLE}
        )
        super().__init__(EngineSpec(role, spec.pool, None, spec.role_name))
        self.client = self.client.with_options(max_retries=HTTP_RETRIES)


KEY_VARIABLE = "OPENCHARACTER_API_KEY"
"""Environment variable with the API key of a server that a run joins by its URL."""


def applications() -> dict[str, Any]:
    """Return the status of all Serve applications of the cluster by name."""
    from ray import serve
    from ray.serve import context

    try:
        return serve.status().applications
    except ray.exceptions.RayActorError:
        # This process was connected to a Serve instance that was shut down since.
        context._set_global_client(None)
        return serve.status().applications


def find_deployment(names: Iterable[str], model: str) -> str:
    """Return the deployment of a model; Ray prefixes its name and replaces characters of it.

    Raises:
        StageFailed: if there is none.
    """

    def plain(name: str) -> str:
        return re.sub(r"[^a-z0-9]+", "-", name.lower())

    for name in names:
        if plain(name.rpartition(":")[2]) == plain(model):
            return name
    raise StageFailed(f"the Serve application has no deployment of {model}")


# --------------------------------------------------------------------------------------- lifecycle


@dataclass(frozen=True)
class RunningApp:
    """A deployed application, in the place of an engine's replicas.

    Args:
        spec: a spec of the application.
        pending: always empty: Serve itself adds replicas.
    """

    spec: ServedSpec
    pending: tuple[Any, ...] = ()

    def stop_pending(self) -> None:
        """Do nothing: Serve itself adds and removes replicas."""

    def stop(self) -> None:
        """Delete the application, unless the run joined it."""
        if self.spec.app.is_own:
            with contextlib.suppress(Exception):  # a Serve instance that ended has deleted it
                importlib.import_module(LIFECYCLE).delete(self.spec.app)


def start_app(spec: ServedSpec) -> RunningApp:
    """Deploy the application of a spec, or check that the one to join runs.

    Raises:
        UserError: if it does not fit the cluster, or does not run.
        StageFailed: if it does not start.
    """
    importlib.import_module(LIFECYCLE).start(spec.app)
    return RunningApp(spec)
