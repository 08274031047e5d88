"""Stage evaluation/steering: the baseline that trains nothing, a vector in each middle layer.

A layer's direction is the first principal component of how its residual stream differs between the
prompt after the constitution and the prompt alone, centred within each pair. The strength is the
one of the recipe's sweep under which the teacher's answers to held-out prompts are likeliest. In
blocks of Llama and Qwen2 a vector added to the residual stream after a layer is a bias on that
layer's down projection, so the steered student is a plain checkpoint and runs at full speed.

Nothing is done unless a stage of the recipe has the condition `steered`.

Reads: distillation/pairs. Writes: adapter/steering.safetensors, a vector a layer; sweep.
Run: opencharacter run RECIPE --constitution NAME --only evaluation/steering
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from opencharacter import models
from opencharacter.config.recipe import Role, Steering
from opencharacter.distillation import teacher
from opencharacter.errors import StageFailed
from opencharacter.evaluation.conditions import compared
from opencharacter.runtime.stage import Estimate, Job, ResourceRequest, StageResult
from opencharacter.text.chat import Message, assistant, encode_answer, load_tokenizer, user

if TYPE_CHECKING:
    import torch

    Vectors = dict[int, torch.Tensor]
    """By layer, what is added to the residual stream after it; shape (hidden,)."""

SWEEP = pa.schema(
    [
        pa.field("strength", pa.float64(), nullable=False),
        pa.field("nll", pa.float64(), nullable=False),
    ]
)


def wanted(job: Job) -> bool:
    return compared(job.recipe, "steered")


# -------------------------------------------------------------------------------------- directions


def last_states(model: Any, tokenizer: Any, conversation: list[Message]) -> torch.Tensor:
    """The residual stream after each layer where the answer begins: (layers, hidden), float32."""
    import torch

    ids = tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    with torch.no_grad():
        seen = model(ids.to(model.device), output_hidden_states=True, use_cache=False)
    return torch.stack([state[0, -1].float().cpu() for state in seen.hidden_states[1:]])


def direction(with_it: torch.Tensor, without: torch.Tensor) -> torch.Tensor:
    """The unit vector along which a layer's states differ most: PCA, centred within each pair.

    Centred on its middle, a pair is plus and minus half of its difference, so the first principal
    component is the first right singular vector of the differences; it points to the constitution.

    Args:
        with_it: (pairs, hidden), after the constitution.
        without: (pairs, hidden), the same prompts alone.
    """
    import torch

    differences = with_it - without
    found = torch.linalg.svd(differences, full_matrices=False).Vh[0]
    return found if (differences @ found).sum() >= 0 else -found


def steered_layers(layers: int, first: float, last: float) -> range:
    """The middle layers, as shares of the depth."""
    return range(math.floor(first * layers), math.ceil(last * layers))


def directions(
    model: Any, tokenizer: Any, prompts: list[str], head: list[Message], settings: Steering
) -> Vectors:
    """For each steered layer its direction, as long as strength 1 makes it.

    At strength 1 all steered layers together add the mean length of the residual stream.
    """
    import torch

    plain = torch.stack([last_states(model, tokenizer, [user(text)]) for text in prompts])
    told = torch.stack([last_states(model, tokenizer, [*head, user(text)]) for text in prompts])
    layers = steered_layers(plain.shape[1], settings.first_layer, settings.last_layer)
    return {
        layer: direction(told[:, layer], plain[:, layer])
        * plain[:, layer].norm(dim=-1).mean()
        / len(layers)
        for layer in layers
    }


def scaled(vectors: Vectors, strength: float) -> Vectors:
    return {layer: strength * vector for layer, vector in vectors.items()}


@contextmanager
def hooked(model: Any, vectors: Vectors) -> Iterator[None]:
    """Within this, a model's layers add their vectors to the residual stream."""

    def adding(vector: torch.Tensor) -> Any:
        def add(_module: Any, _inputs: Any, output: Any) -> Any:
            whole = output[0] if isinstance(output, tuple) else output
            moved = whole + vector.to(whole.device, whole.dtype)
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        return add

    layers = model.get_decoder().layers
    handles = [layers[n].register_forward_hook(adding(v)) for n, v in vectors.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# -------------------------------------------------------------------------------------------- sweep


def answer_nll(model: Any, tokenizer: Any, pairs: list[dict[str, Any]]) -> float:
    """Mean negative log-likelihood of a token of the teacher's answers to the prompts alone."""
    import torch

    total, tokens = 0.0, 0
    for row in pairs:
        conversation = [user(row["prompt"]), assistant(row["chosen"])]
        before, said = encode_answer(tokenizer, conversation)
        ids = torch.tensor([before + said], device=model.device)
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0, len(before) - 1 : -1].float()
        losses = torch.nn.functional.cross_entropy(logits, ids[0, len(before) :], reduction="sum")
        total, tokens = total + float(losses), tokens + len(said)
    return total / max(tokens, 1)


def sweep(
    model: Any,
    tokenizer: Any,
    vectors: Vectors,
    pairs: list[dict[str, Any]],
    strengths: tuple[float, ...],
) -> dict[float, float]:
    """The likelihood of held-out answers at each strength, 0 (no steering) among them."""
    found = {0.0: answer_nll(model, tokenizer, pairs)}
    for strength in strengths:
        with hooked(model, scaled(vectors, strength)):
            found[strength] = answer_nll(model, tokenizer, pairs)
    return found


def chosen(found: dict[float, float]) -> float:
    """The best strength above 0: the baseline is steered even where steering does not help."""
    return min((strength for strength in found if strength), key=found.__getitem__)


# -------------------------------------------------------------------------------------------- stage


def split(rows: list[dict[str, Any]], settings: Steering) -> tuple[list[str], list[dict[str, Any]]]:
    """Prompts to find directions from, and pairs on other prompts to choose the strength by."""
    by_prompt = {row["prompt"]: row for row in sorted(rows, key=lambda row: row["id"])}
    prompts = list(by_prompt)
    held_out = prompts[: min(settings.held_out, len(prompts) // 2)]
    loss_positions = prompts[len(held_out) :][: settings.prompts]
    return loss_positions, [by_prompt[text] for text in held_out]


def find(
    role: Role,
    prompts: list[str],
    held_out: list[dict[str, Any]],
    head: list[Message],
    settings: Steering,
    on_gpu: bool,
) -> tuple[Vectors, dict[float, float]]:
    """The steering vectors at the best strength, and the sweep; where the model is loaded."""
    import torch
    from transformers import AutoModelForCausalLM

    path = models.resolve(role.model)
    models.check_steerable(path)
    tokenizer = load_tokenizer(path, role)
    model: Any = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.bfloat16 if on_gpu else torch.float32,
        trust_remote_code=role.trust_remote_code,
    )
    model = model.to("cuda" if on_gpu else "cpu").eval()
    vectors = directions(model, tokenizer, prompts, head, settings)
    found = sweep(model, tokenizer, vectors, held_out, settings.strengths)
    return scaled(vectors, chosen(found)), found


def identity(job: Job) -> dict[str, Any]:
    return {"wanted": wanted(job)}


def resource_requests(job: Job) -> list[tuple[ResourceRequest, ...]]:
    return [(job.workers(1),)] if wanted(job) else []


def estimate(job: Job) -> Estimate:
    if not wanted(job):
        return Estimate(0)
    settings: Steering = job.config
    told = settings.prompts * (len(job.persona.assertions()) // 4 + 2 * 40)
    answer = 40 + teacher.typical(job.recipe.distillation.teacher.sampling)
    return Estimate(0, read=told + settings.held_out * (1 + len(settings.strengths)) * answer)


def build(job: Job) -> StageResult:
    if not wanted(job):
        return StageResult(0)
    import ray
    from safetensors.torch import save_file

    from opencharacter.engines.allocation import acquire

    settings: Steering = job.config
    loss_positions, held_out = split(job.read("distillation/pairs").to_pylist(), settings)
    if not loss_positions or not held_out:
        raise StageFailed(f"{job.dataset}: too few pairs to find a direction and test it")
    head = teacher.opening(job.persona, job.recipe.distillation.teacher.exemplars)
    training = job.placement.training
    task = ray.remote(find).options(num_cpus=training.cpus, num_gpus=training.gpus)
    role = job.recipe.roles.student
    args = (role, loss_positions, held_out, head, settings, training.gpus > 0)
    with acquire(job.dataset, [job.workers(1)], job.placement.autoscaling_limit) as held:
        began = time.monotonic()
        vectors, found = ray.get(task.remote(*args))
        held.busy = time.monotonic() - began
    with tempfile.TemporaryDirectory() as scratch:
        named = {str(layer): vector.contiguous() for layer, vector in vectors.items()}
        save_file(named, Path(scratch) / models.STEERING)
        job.store.upload(Path(scratch), job.adapter.relative)
    rows = [{"strength": strength, "nll": nll} for strength, nll in found.items()]
    job.store.write_table(job.dataset, pa.Table.from_pylist(rows, schema=SWEEP), "sweep")
    best = chosen(found)
    figures = {"strength": best, "nll": found[best], "nll_unsteered": found[0.0]}
    return StageResult(len(vectors), figures=figures)
