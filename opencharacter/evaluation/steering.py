"""Stage evaluation/steering: a training-free baseline, one steering vector per middle layer.

A layer's direction is the first principal component of the differences between its residual
stream after a prompt with the constitution and after the prompt alone, centred within each pair.
The strength is the one of the recipe's sweep that makes the teacher's answers to held-out prompts
most likely. In Llama and Qwen2 blocks, adding a vector to the residual stream after a layer equals
a bias on that layer's down projection, so the steered student is a plain checkpoint and runs at
full speed.

The stage does nothing unless a stage of the recipe uses the condition `steered`.

Reads: distillation/pairs. Writes: adapter/steering.safetensors, one vector per layer;
sweep.
Run: opencharacter run RECIPE --constitution NAME --only evaluation/steering
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from opencharacter import models
from opencharacter.config.evaluation import Steering
from opencharacter.config.roles import Role
from opencharacter.distillation import teacher
from opencharacter.errors import StageFailed
from opencharacter.evaluation.conditions import uses_condition
from opencharacter.runtime.stage import Estimate, Job, ResourceRequest, StageResult
from opencharacter.text.chat import Message, assistant, user
from opencharacter.text.templates import encode_answer, load_tokenizer, prompt_ids

if TYPE_CHECKING:
    import torch

    Vectors = dict[int, torch.Tensor]
    """The vector of shape (hidden,) that is added to the residual stream after each layer."""

SWEEP = pa.schema(
    [
        pa.field("strength", pa.float64(), nullable=False),
        pa.field("nll", pa.float64(), nullable=False),
    ]
)


def is_enabled(job: Job) -> bool:
    return uses_condition(job.recipe, "steered")


# -------------------------------------------------------------------------------------- directions


def last_states(model: Any, tokenizer: Any, conversation: list[Message]) -> torch.Tensor:
    """The residual stream after each layer where the answer begins; (layers, hidden), float32."""
    import torch

    ids = torch.tensor([prompt_ids(tokenizer, conversation)], device=model.device)
    with torch.no_grad():  # the model without its head, because logits are not needed
        output = model.base_model(ids, output_hidden_states=True, use_cache=False)
    return torch.stack([state[0, -1].float().cpu() for state in output.hidden_states[1:]])


def direction(with_constitution: torch.Tensor, without: torch.Tensor) -> torch.Tensor:
    """The unit vector along which a layer's states differ most: PCA, centred within each pair.

    A pair centred on its mean is plus and minus half of its difference, so the first principal
    component is the first right singular vector of the differences. It points towards the states
    with the constitution.

    Args:
        with_constitution: states after the constitution and the prompt, shape (pairs, hidden).
        without: states after the same prompts alone, shape (pairs, hidden).
    """
    import torch

    differences = with_constitution - without
    component = torch.linalg.svd(differences, full_matrices=False).Vh[0]
    return component if (differences @ component).sum() >= 0 else -component


def steered_layers(layers: int, first: float, last: float) -> range:
    """The layers between two fractions of the depth."""
    return range(math.floor(first * layers), math.ceil(last * layers))


def directions(
    model: Any, tokenizer: Any, prompts: list[str], context: list[Message], settings: Steering
) -> Vectors:
    """The vectors at strength 1, at which all layers together add the residual stream's mean norm.

    Args:
        model: the student.
        tokenizer: its tokenizer.
        prompts: the prompts to find the directions from.
        context: the messages with the constitution, which precede the prompt.
        settings: the stage's configuration.
    """
    import torch

    plain = torch.stack([last_states(model, tokenizer, [user(text)]) for text in prompts])
    with_constitution = torch.stack(
        [last_states(model, tokenizer, [*context, user(text)]) for text in prompts]
    )
    layers = steered_layers(plain.shape[1], settings.first_layer, settings.last_layer)
    return {
        layer: direction(with_constitution[:, layer], plain[:, layer])
        * plain[:, layer].norm(dim=-1).mean()
        / len(layers)
        for layer in layers
    }


def scaled(vectors: Vectors, strength: float) -> Vectors:
    return {layer: strength * vector for layer, vector in vectors.items()}


@contextmanager
def hooked(model: Any, vectors: Vectors) -> Iterator[None]:
    """Add the vectors to the residual stream after their layers while the context is active."""

    def hook(vector: torch.Tensor) -> Any:
        def add(_module: Any, _inputs: Any, output: Any) -> Any:
            states = output[0] if isinstance(output, tuple) else output
            steered = states + vector.to(states.device, states.dtype)
            return (steered, *output[1:]) if isinstance(output, tuple) else steered

        return add

    layers = model.get_decoder().layers
    handles = [layers[n].register_forward_hook(hook(v)) for n, v in vectors.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# -------------------------------------------------------------------------------------------- sweep


def answer_nll(model: Any, tokenizer: Any, pairs: list[dict[str, Any]]) -> float:
    """Mean negative log-likelihood, in nats per token, of the teacher's answers to the prompts."""
    import torch

    total, tokens = 0.0, 0
    for row in pairs:
        conversation = [user(row["prompt"]), assistant(row["chosen"])]
        prompt_ids, answer_ids = encode_answer(tokenizer, conversation)
        ids = torch.tensor([prompt_ids + answer_ids], device=model.device)
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0, len(prompt_ids) - 1 : -1].float()
        losses = torch.nn.functional.cross_entropy(
            logits, ids[0, len(prompt_ids) :], reduction="sum"
        )
        total, tokens = total + float(losses), tokens + len(answer_ids)
    return total / max(tokens, 1)


def sweep(
    model: Any,
    tokenizer: Any,
    vectors: Vectors,
    pairs: list[dict[str, Any]],
    strengths: tuple[float, ...],
) -> dict[float, float]:
    """`answer_nll` of held-out answers by strength, including 0 (no steering)."""
    nll = {0.0: answer_nll(model, tokenizer, pairs)}
    for strength in strengths:
        with hooked(model, scaled(vectors, strength)):
            nll[strength] = answer_nll(model, tokenizer, pairs)
    return nll


def best_strength(nll: dict[float, float]) -> float:
    """The best strength above 0: the baseline is steered even if steering does not help."""
    return min((strength for strength in nll if strength), key=nll.__getitem__)


# -------------------------------------------------------------------------------------------- stage


def split(rows: list[dict[str, Any]], settings: Steering) -> tuple[list[str], list[dict[str, Any]]]:
    """Prompts to find the directions from, and pairs of other prompts to choose the strength by."""
    by_prompt = {row["prompt"]: row for row in sorted(rows, key=lambda row: row["id"])}
    prompts = list(by_prompt)
    held_out = prompts[: min(settings.held_out, len(prompts) // 2)]
    training = prompts[len(held_out) :][: settings.prompts]
    return training, [by_prompt[text] for text in held_out]


def load_student(role: Role, on_gpu: bool) -> tuple[Any, Any]:
    """Load a model and its tokenizer, in bfloat16 on a GPU and float32 elsewhere."""
    import torch
    from transformers import AutoModelForCausalLM

    path = models.resolve_role(role)
    model: Any = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.bfloat16 if on_gpu else torch.float32,
        trust_remote_code=role.trust_remote_code,
    )
    return model.to("cuda" if on_gpu else "cpu").eval(), load_tokenizer(path, role)


def run_in_task(job: Job, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a Ray task with the resources of one training worker.

    Its last argument, `on_gpu`, says whether they include a GPU.
    """
    import ray

    from opencharacter.engines.allocation import acquire

    training = job.placement.training
    remote: Any = ray.remote(function)
    task = remote.options(num_cpus=training.cpus, num_gpus=training.gpus)
    with acquire(job.dataset, [job.workers(1)], job.placement.autoscaling_resources) as allocation:
        began = time.monotonic()
        result = ray.get(task.remote(*arguments, training.gpus > 0))
        allocation.work_seconds = time.monotonic() - began
    return result


def find_vectors(
    role: Role,
    prompts: list[str],
    held_out: list[dict[str, Any]],
    context: list[Message],
    settings: Steering,
    on_gpu: bool,
) -> tuple[Vectors, dict[float, float]]:
    """Load the model and find its steering vectors.

    Returns:
        The vectors at the best strength, and the result of `sweep`.
    """
    models.check_steerable(models.resolve_role(role))
    model, tokenizer = load_student(role, on_gpu)
    vectors = directions(model, tokenizer, prompts, context, settings)
    nll = sweep(model, tokenizer, vectors, held_out, settings.strengths)
    return scaled(vectors, best_strength(nll)), nll


def identity(job: Job) -> dict[str, Any]:
    return {"enabled": is_enabled(job)}


def resource_requests(job: Job) -> list[tuple[ResourceRequest, ...]]:
    return [(job.workers(1),)] if is_enabled(job) else []


def estimate(job: Job) -> Estimate:
    if not is_enabled(job):
        return Estimate(0)
    settings: Steering = job.config
    directions_tokens = settings.prompts * (len(job.persona.assertions()) // 4 + 2 * 40)
    answer = 40 + teacher.expected_tokens(job.recipe.distillation.teacher.sampling)
    sweep_tokens = settings.held_out * (1 + len(settings.strengths)) * answer
    return Estimate(0, read=directions_tokens + sweep_tokens)


def build(job: Job) -> StageResult:
    if not is_enabled(job):
        return StageResult(0)
    from safetensors.torch import save_file

    settings: Steering = job.config
    prompts, held_out = split(job.read("distillation/pairs").to_pylist(), settings)
    if not prompts or not held_out:
        raise StageFailed(
            f"{job.dataset}: too few pairs for steering; it needs at least two prompts"
        )
    context = teacher.context_messages(job.persona, job.recipe.distillation.teacher.exemplars)
    role = job.recipe.roles.student
    vectors, nll = run_in_task(job, find_vectors, role, prompts, held_out, context, settings)
    with tempfile.TemporaryDirectory() as scratch:
        tensors = {str(layer): vector.contiguous() for layer, vector in vectors.items()}
        save_file(tensors, Path(scratch) / models.STEERING)
        job.store.upload(Path(scratch), job.adapter.relative)
    rows = [{"strength": strength, "nll": value} for strength, value in nll.items()]
    job.store.write_table(job.dataset, pa.Table.from_pylist(rows, schema=SWEEP), "sweep")
    best = best_strength(nll)
    figures = {"strength": best, "nll": nll[best], "nll_unsteered": nll[0.0]}
    return StageResult(len(vectors), figures=figures)
