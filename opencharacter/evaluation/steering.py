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
from collections.abc import Callable, Iterator, Sequence
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

MAX_BATCH_TOKENS = 8192
"""Tokens that the student reads at once, with their padding."""
SWEEP = pa.schema(
    [
        pa.field("strength", pa.float64(), nullable=False),
        pa.field("nll", pa.float64(), nullable=False),
    ]
)


def is_enabled(job: Job) -> bool:
    return uses_condition(job.recipe, "steered")


# -------------------------------------------------------------------------------------- directions


def padded_batches(
    sequences: Sequence[Sequence[int]], max_tokens: int
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Group sequences of similar lengths into batches that are padded on the right.

    Causal attention keeps the padding out of all positions before it.

    Args:
        sequences: token ids of each text.
        max_tokens: tokens of a batch with its padding; a longer sequence has a batch of its own.

    Yields:
        The indices of the sequences, their ids and the attention mask, both (batch, length).
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    order = sorted(range(len(sequences)), key=lambda n: len(sequences[n]), reverse=True)
    while order:
        length = len(sequences[order[0]])
        size = max(1, max_tokens // max(length, 1))
        batch, order = order[:size], order[size:]
        texts = [torch.tensor(sequences[n]) for n in batch]
        ids = pad_sequence(texts, batch_first=True)
        mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
        yield batch, ids, mask


def mean_states(
    model: Any, sequences: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Mean residual stream after each layer over some positions of each sequence.

    Args:
        model: the student.
        sequences: token ids of each text.
        positions: at least one position of each text.

    Returns:
        The states in float32 on the CPU, shape (texts, layers, hidden).
    """
    import torch

    states: dict[int, torch.Tensor] = {}
    for batch, ids, mask in padded_batches(sequences, MAX_BATCH_TOKENS):
        weights = torch.zeros(mask.shape)
        for row, n in enumerate(batch):
            weights[row, list(positions[n])] = 1 / len(positions[n])
        weights = weights.unsqueeze(1).to(model.device)
        with torch.no_grad():  # the model without its head, because logits are not needed
            hidden = model.base_model(
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                output_hidden_states=True,
                use_cache=False,
            ).hidden_states
            means = torch.cat([weights @ layer.float() for layer in hidden[1:]], dim=1).cpu()
        states.update(zip(batch, means, strict=True))
    return torch.stack([states[n] for n in range(len(sequences))])


def last_states(model: Any, tokenizer: Any, conversations: Sequence[list[Message]]) -> torch.Tensor:
    """The residual stream where each answer begins, float32, (conversations, layers, hidden)."""
    sequences = [prompt_ids(tokenizer, conversation) for conversation in conversations]
    return mean_states(model, sequences, [[len(ids) - 1] for ids in sequences])


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
    plain = last_states(model, tokenizer, [[user(text)] for text in prompts])
    with_constitution = last_states(model, tokenizer, [[*context, user(text)] for text in prompts])
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

    encoded = [
        encode_answer(tokenizer, [user(row["prompt"]), assistant(row["chosen"])]) for row in pairs
    ]
    sequences = [prompt + answer for prompt, answer in encoded]
    total = 0.0
    for batch, ids, mask in padded_batches(sequences, MAX_BATCH_TOKENS // 4):
        ids, mask = ids.to(model.device), mask.to(model.device)
        with torch.no_grad():
            logits = model(ids, attention_mask=mask, use_cache=False).logits
        for row, n in enumerate(batch):
            answer = slice(len(encoded[n][0]), len(sequences[n]))
            before = slice(answer.start - 1, answer.stop - 1)
            total += float(
                torch.nn.functional.cross_entropy(
                    logits[row, before].float(), ids[row, answer], reduction="sum"
                )
            )
    return total / max(sum(len(answer) for _, answer in encoded), 1)


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

    training = job.placement.training.single
    remote: Any = ray.remote(function)
    task = remote.options(num_cpus=training.cpus, num_gpus=training.gpus)
    growth = job.placement.autoscaling_resources
    with acquire(job.dataset, [job.single_worker()], growth) as allocation:
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
    return [(job.single_worker(),)] if is_enabled(job) else []


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
