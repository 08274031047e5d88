"""Benchmark of DPO and SFT training: rank 64, random weights in the shape of Llama 3.1 8B.

It uses one GPU and the package's trainer without Ray. Ways:
`opencharacter`  DPO with packing and a precomputed reference, whose time is recorded as `reference`
`fp8`            the same with `frozen_weights: fp8`; the reference is recorded as `fp8_reference`
`trl_tuned`      TRL's DPOTrainer with a precomputed reference, pairs sorted by length and
                 microbatches of eight pairs
`trl_liger`      the same with Liger's kernels and fused loss (sigmoid alone, as Liger has no NLL)
`sft`            the package's SFT on packed conversations
`trl_packed`     TRL's SFTTrainer on the same conversations, packed into microbatches of the same
                 size, with FlexAttention (SDPA on a CPU) and Liger's kernels
`parity`         the losses of both DPO trainers on the same pairs with the same adapter
`parity_float32` the same in float32, which shows differences other than rounding
`two_gpus`       DPO with two Ray Train workers and the same batch; only if `--ways` names it
Every optimizer step after the first two is a repeat. FLOPs are 4 per weight and token, for the
forward and backward pass through frozen weights, relative to the fastest bf16 matrix product of the
same device.

Run: python benchmarks/training.py --out benchmarks/results
     python benchmarks/training.py --out /tmp/results --tiny
"""

from __future__ import annotations

import itertools
import json
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import harness
from harness import LLAMA_8B, TINY_LLAMA, Figures, Machine, Run, Series, Settings

from opencharacter.config.placement import Training
from opencharacter.config.recipe import Dpo, Lora, Optimizer
from opencharacter.training import adapters, trainer
from opencharacter.training.batches import PackedBatches
from opencharacter.training.packing import Example, Tokens
from opencharacter.training.trainer import worker_resources

SETTINGS: Settings = {
    "shape": LLAMA_8B,
    "steps": 8,
    "trl_steps": 5,
    "batch": 32,
    "rank": 64,
    "conversation": {"mean": 390, "max": 1024},
    "transcript": {"mean": 1200, "max": 3072},
    "trl_micro_batch": 8,
    "placement": {"gpus": 1, "max_tokens_per_microbatch": 8192, "activation_checkpointing": False},
    "environment": {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
}
TINY: Settings = {
    "shape": TINY_LLAMA,
    "steps": 4,
    "trl_steps": 4,
    "batch": 4,
    "rank": 8,
    "conversation": {"mean": 40, "max": 100},
    "transcript": {"mean": 60, "max": 96},
    "trl_micro_batch": 2,
    "placement": {"gpus": 0, "max_tokens_per_microbatch": 256},
}
VARIANTS: dict[str, Settings] = {
    "compiled": {"placement": {"kernels": "compiled"}},
    "plain": {"placement": {"kernels": "plain"}},
    "tokens_4096": {"placement": {"max_tokens_per_microbatch": 4096}},
    "tokens_16384": {"placement": {"max_tokens_per_microbatch": 16384}},
    "recomputed": {"placement": {"activation_checkpointing": True}},
}
WARMUP_STEPS = 2
SHORTEST = 16
"""Tokens of the shortest conversation."""
LORA_B_SCALE = 0.002
"""Size of the adapter weights in `parity`, which Adam reaches in 40 steps at 5e-5."""
SUBJECT = harness.SUBJECT


def pairs(settings: Settings, count: int) -> list[Example]:
    """Return random pairs with log-normal lengths, a quarter of which is the prompt."""
    rng, sizes = random.Random(17), settings["conversation"]
    words = range(len(harness.RESERVED), settings["shape"]["vocab_size"])
    examples = []
    for _ in range(count):
        prompt = rng.choices(words, k=draw_length(rng, sizes) // 4)
        sides = [prompt + rng.choices(words, k=draw_length(rng, sizes) * 3 // 4) for _ in range(2)]
        sides = [ids[: sizes["max"]] for ids in sides]
        examples.append([Tokens(ids, list(range(len(prompt), len(ids)))) for ids in sides])
    return examples


def transcripts(settings: Settings, count: int) -> list[Example]:
    """Return random conversations with log-normal lengths; the second half of each has a loss."""
    rng = random.Random(17)
    words = range(len(harness.RESERVED), settings["shape"]["vocab_size"])
    lengths = [draw_length(rng, settings["transcript"]) for _ in range(count)]
    return [[Tokens(rng.choices(words, k=n), list(range(n // 2, n)))] for n in lengths]


def draw_length(rng: random.Random, sizes: dict[str, int]) -> int:
    """Draw the tokens of a conversation from the mean and the maximum of the settings."""
    return harness.draw_length(rng, sizes["mean"], SHORTEST, sizes["max"])


def model_of(settings: Settings, attention: str, precise: bool = False) -> Any:
    """Return a model with random weights, in bf16 on a GPU unless `precise`, else in float32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from trl.trainer import add_fused_lm_head

    from opencharacter.training import packing

    packing.register()
    torch.manual_seed(0)
    on_gpu = settings["placement"]["gpus"] > 0
    config = AutoConfig.from_pretrained(harness.model_folder(settings["shape"]))
    with torch.device("cuda" if on_gpu else "cpu"):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=torch.bfloat16 if on_gpu and not precise else torch.float32,
            attn_implementation=attention,
        )
    add_fused_lm_head(model)
    return model


def lora(settings: Settings) -> Lora:
    return Lora(rank=settings["rank"], alpha=2 * settings["rank"])


def with_reference(model: Any, examples: list[Example], max_tokens: int) -> list[Example]:
    """Add the log-probabilities of the answers under the model to pairs."""
    from opencharacter.distillation.reference import pair_log_probs

    log_probs = pair_log_probs(model.eval(), examples, max_tokens)
    return [
        [tokens._replace(reference=side) for tokens, side in zip(pair, values, strict=True)]
        for pair, values in zip(examples, log_probs, strict=True)
    ]


# ------------------------------------------------------------------------------------------- ways


def ours(settings: Settings) -> Iterator[Run]:
    """Train with the package's DPO."""
    return dpo(settings, SUBJECT)


def fp8(settings: Settings) -> Iterator[Run]:
    """Train with the package's DPO over weights in FP8."""
    return dpo(settings, "fp8", frozen_weights="fp8")


def dpo(
    settings: Settings, series: str, rank: int = 0, world: int = 1, frozen_weights: str = "bf16"
) -> Iterator[Run]:
    """Compute the reference and train, on one worker of `world`."""
    from opencharacter.distillation.dpo import dpo_loss
    from opencharacter.training.frozen import quantize_linear

    examples = pairs(settings, settings["steps"] * settings["batch"])
    model = model_of(settings, "packed")
    if frozen_weights == "fp8":
        quantize_linear(model, adapters.adapted_layers(model))
    warmup = examples[: 2 * settings["batch"]]
    with_reference(model, warmup, settings["placement"]["max_tokens_per_microbatch"])
    start = time.time()
    examples = with_reference(model, examples, settings["placement"]["max_tokens_per_microbatch"])
    tokens = sum(len(t.ids) for e in examples for t in e)
    if world == 1:
        name = "reference" if series == SUBJECT else f"{series}_reference"
        yield {"series": name, "seconds": time.time() - start, "tokens": tokens}
    if frozen_weights == "fp8":  # the weights were released
        model = model_of(settings, "packed")
    loss_fn = partial(dpo_loss, config=Dpo())
    yield from steps_of(model, examples, loss_fn, settings, series, rank, world, frozen_weights)


def two_gpus(settings: Settings) -> Iterator[Run]:
    """Train with DPO on two workers with one GPU each."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from opencharacter.config.placement import Placement
    from opencharacter.runtime import cluster

    placement = Training(**settings["placement"], workers=2)
    cluster.connect(Placement(training=placement, ray_cpus=int(2 * placement.cpus)))
    with tempfile.TemporaryDirectory() as scratch:
        TorchTrainer(
            one_of_two,
            train_loop_config={"settings": settings, "file": f"{scratch}/runs.json"},
            scaling_config=ScalingConfig(
                num_workers=placement.workers,
                use_gpu=placement.gpus > 0,
                resources_per_worker=worker_resources(placement),
            ),
            run_config=RunConfig(storage_path=scratch),
        ).fit()
        yield from json.loads(Path(scratch, "runs.json").read_text())
    ray.shutdown()


def one_of_two(config: dict[str, Any]) -> None:
    """Run one worker of `two_gpus`; the worker of rank 0 records the steps."""
    import ray.train
    import ray.train.torch
    import torch

    device, rank = ray.train.torch.get_device(), ray.train.get_context().get_world_rank()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    recorded = list(dpo(config["settings"], "two_gpus", rank, world=2))
    if rank == 0:
        Path(config["file"]).write_text(json.dumps(recorded))


def sft(settings: Settings) -> Iterator[Run]:
    """Train with the package's SFT."""
    from opencharacter.introspection.sft import sft_loss

    examples = transcripts(settings, settings["steps"] * settings["batch"])
    model = model_of(settings, "packed")
    yield from steps_of(model, examples, sft_loss, settings, "sft")


def steps_of(
    model: Any,
    examples: list[Example],
    loss_fn: Any,
    settings: Settings,
    series: str,
    rank: int = 0,
    world: int = 1,
    frozen_weights: str = "bf16",
) -> Iterator[Run]:
    """Train and yield one run per step after the warmup steps."""
    import transformers

    placement = Training(**settings["placement"])
    optimizer = Optimizer(global_batch_size=settings["batch"])
    longest = max(sum(len(t.ids) for t in e) for e in examples)
    memory = adapters.plan_memory(model, placement, longest)
    peft_model = adapters.add_lora(
        model, lora(settings), memory.activation_checkpointing, adapters.select_kernels(placement)
    )
    task = SimpleNamespace(
        optimizer=optimizer,
        placement=placement,
        seed=0,
        dataset=series,
        frozen_weights=frozen_weights,
    )
    frozen = frozen_parameters(peft_model)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = trainer.trainer_arguments(task, scratch, placement.gpus > 0, peft_model)
        arguments |= {"report_to": [], "save_strategy": "no"}
        runner = trainer.PackedTrainer(
            model=peft_model,
            args=transformers.TrainingArguments(**arguments),
            batches=PackedBatches(examples, optimizer, 0, memory.max_tokens, rank, world),
            loss_fn=loss_fn,
        )
        trainer.fuse_frozen(runner.model, task)
        timer = Timer()
        runner.add_callback(timer)
        runner.train()
        batches: Any = runner.train_dataset
        sizes = [batches[step][1].tokens for step in range(len(batches))]
    yield from runs(timer, sizes, series, world * runner.peak_flops, frozen)


def trl_tuned(settings: Settings) -> Iterator[Run]:
    """Train with TRL's DPO trainer in the fastest configuration that was found."""
    return trl(settings, "trl_tuned")


def trl_liger(settings: Settings) -> Iterator[Run]:
    """Train with TRL's DPO trainer, Liger's kernels and Liger's fused loss."""
    liger = settings["placement"]["gpus"] > 0  # it has no kernels for CPUs
    loss = {"loss_type": ["sigmoid"], "loss_weights": None}
    return trl(settings, "trl_liger", use_liger_kernel=liger, **loss)


def trl(settings: Settings, series: str, **options: Any) -> Iterator[Run]:
    """Train with TRL's DPO trainer: precomputed reference, pairs sorted by length."""
    from trl import DPOConfig

    examples = pairs(settings, settings["trl_steps"] * settings["batch"])
    examples.sort(key=lambda pair: -max(len(side.ids) for side in pair))
    model = model_of(settings, "sdpa")
    micro = settings["trl_micro_batch"]
    with tempfile.TemporaryDirectory() as scratch:
        runner = trl_trainer(
            model,
            examples,
            settings,
            DPOConfig(
                **dpo_arguments(settings, scratch) | options,
                per_device_train_batch_size=micro,
                gradient_accumulation_steps=settings["batch"] // micro,
                num_train_epochs=1,
                precompute_ref_log_probs=True,
                precompute_ref_batch_size=micro,
                train_sampling_strategy="sequential",
            ),
        )
        yield from trl_runs(runner, series)


def trl_packed(settings: Settings) -> Iterator[Run]:
    """Train with TRL's SFT trainer, which packs conversations too."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    on_gpu = settings["placement"]["gpus"] > 0
    size = settings["placement"]["max_tokens_per_microbatch"]
    examples = transcripts(settings, settings["trl_steps"] * settings["batch"])
    rows = [{"input_ids": tokens.ids, "labels": labels_of(tokens)} for (tokens,) in examples]
    tokens_per_step = settings["batch"] * settings["transcript"]["mean"]
    with tempfile.TemporaryDirectory() as scratch:
        arguments = trl_arguments(settings, scratch) | {
            "packing": True,
            "max_length": size,
            "pad_to_multiple_of": size,  # one shape, for which FlexAttention is compiled
            "use_liger_kernel": on_gpu,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": max(1, round(tokens_per_step / size)),
            "num_train_epochs": 1,
        }
        runner = SFTTrainer(
            model=model_of(settings, "flex_attention" if on_gpu else "sdpa"),
            args=SFTConfig(**arguments),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=trl_tokenizer(settings),
            peft_config=trl_lora(settings),
        )
        yield from trl_runs(runner, "trl_packed")


def trl_runs(runner: Any, series: str) -> Iterator[Run]:
    """Train with one of TRL's trainers and yield one run per step after the warmup steps."""
    timer, sizes = Timer(), list[int]()
    runner.add_callback(timer)
    runner.add_callback(TokenCounter(runner, sizes))
    runner.train()
    peak = trainer.matmul_peak_flops(runner.args.device, True)
    yield from runs(timer, sizes, series, peak, frozen_parameters(runner.model))


def labels_of(tokens: Tokens) -> list[int]:
    """Return the token ids, with -100 for those without a loss."""
    first = tokens.loss_positions[0]
    return [-100] * first + list(tokens.ids[first:])


def frozen_parameters(model: Any) -> int:
    """Return the number of parameters that are not trained."""
    return sum(p.numel() for p in model.parameters() if not p.requires_grad)


def dpo_arguments(settings: Settings, scratch: str) -> dict[str, Any]:
    """Return the arguments of TRL's DPO trainer."""
    return trl_arguments(settings, scratch) | {
        "beta": 0.1,
        "loss_type": ["sigmoid", "sft"],
        "loss_weights": [1.0, 0.1],
        "max_length": None,
        "remove_unused_columns": False,
    }


def trl_arguments(settings: Settings, scratch: str) -> dict[str, Any]:
    """Return the arguments that TRL's trainers share."""
    on_gpu = settings["placement"]["gpus"] > 0
    return {
        "output_dir": scratch,
        "bf16": on_gpu,
        "use_cpu": not on_gpu,
        "gradient_checkpointing": False,
        "learning_rate": 5e-5,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 0,
    }


def trl_trainer(model: Any, examples: list[Example], settings: Settings, args: Any) -> Any:
    """Return TRL's trainer for tokenized pairs."""
    import datasets
    from trl import DPOTrainer

    class PretokenizedTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

    rows = []
    for chosen, rejected in examples:
        start = chosen.loss_positions[0]
        sides = {"chosen_ids": chosen.ids[start:], "rejected_ids": rejected.ids[start:]}
        rows.append({"prompt_ids": chosen.ids[:start], **sides})
    return PretokenizedTrainer(
        model=model,
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=trl_tokenizer(settings),
        peft_config=trl_lora(settings),
    )


def trl_tokenizer(settings: Settings) -> Any:
    """Return the tokenizer of the model, with a token for padding."""
    tokenizer = harness.make_tokenizer(settings["shape"]["vocab_size"])
    tokenizer.pad_token = tokenizer.eos_token = harness.END
    return tokenizer


def trl_lora(settings: Settings) -> Any:
    """Return the adapter's configuration."""
    from peft import LoraConfig

    rank = settings["rank"]
    return LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def parity(settings: Settings) -> Iterator[Run]:
    """Compare the losses in the precision of training."""
    return losses_of_both(settings, "parity", precise=False)


def parity_float32(settings: Settings) -> Iterator[Run]:
    """Compare the losses in float32, without the rounding of bf16."""
    return losses_of_both(settings, "parity_float32", precise=True)


def losses_of_both(settings: Settings, series: str, precise: bool) -> Iterator[Run]:
    """Compute the loss of both trainers on the microbatches of a batch, with the same adapter."""
    import torch
    from trl import DPOConfig

    from opencharacter.distillation.dpo import dpo_loss
    from opencharacter.training import packing

    examples, micro = pairs(settings, settings["batch"]), settings["trl_micro_batch"]
    model = model_of(settings, "sdpa", precise)
    arguments = dpo_arguments(settings, "unused")
    arguments["bf16"] &= not precise
    with tempfile.TemporaryDirectory() as scratch:
        arguments["output_dir"] = scratch
        other = trl_trainer(model, examples, settings, DPOConfig(**arguments))
    policy = other.model
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) * LORA_B_SCALE)
    policy.eval()
    groups = [examples[at : at + micro] for at in range(0, len(examples), micro)]
    rows = other.train_dataset
    losses: dict[str, list[float]] = {"trl": [], "ours": []}
    with torch.no_grad():
        for number, group in enumerate(groups):
            batch = other.data_collator([rows[number * micro + i] for i in range(len(group))])
            batch = {name: value.to(policy.device) for name, value in batch.items()}
            with other.compute_loss_context_manager():
                losses["trl"].append(float(other.compute_loss(policy, batch)))
        model.set_attn_implementation("packed")
        for group in groups:
            with policy.disable_adapter():
                before = scores(policy, packing.pack(group), precise)
            sides = iter(before.split([len(t.loss_positions) for pair in group for t in pair]))
            group = [[t._replace(reference=next(sides).tolist()) for t in pair] for pair in group]
            pack = packing.pack(group).to(policy.device)
            values = scores(policy, pack, precise)
            denominators = packing.loss_denominators(group)
            loss = dpo_loss(values, pack, denominators, Dpo(sq_log_ratio_weight=0))["loss"]
            losses["ours"].append(float(loss))
    mean = {name: sum(values) / len(values) for name, values in losses.items()}
    difference = abs(mean["ours"] - mean["trl"]) / mean["trl"]
    yield {"series": series, "seconds": 0, "tokens": 0, **mean, "difference": difference}


def scores(model: Any, pack: Any, precise: bool) -> Any:
    """Compute the log-probabilities of a pack, in the precision of training or in float32."""
    from opencharacter.training import packing

    with nullcontext() if precise else adapters.autocast(model.device):
        return packing.log_probs(model, pack.to(model.device))


# ---------------------------------------------------------------------------------------- timing


def callback_class() -> Any:
    from transformers import TrainerCallback

    return TrainerCallback


class Timer(callback_class()):
    """Records the seconds of each optimizer step."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = clock()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(clock() - self.start)


class TokenCounter(callback_class()):
    """Records the tokens of each optimizer step, without padding."""

    def __init__(self, trainer: Any, sizes: list[int]):
        self.sizes, self.step_tokens, original = sizes, 0, trainer.compute_loss

        padding = trainer.processing_class.pad_token_id

        def compute_loss(model, inputs, *args, **kwargs):
            mask = inputs.get("attention_mask")  # a packed batch has none
            is_token = inputs["input_ids"] != padding if mask is None else mask
            self.step_tokens += int(is_token.sum())
            return original(model, inputs, *args, **kwargs)

        trainer.compute_loss = compute_loss

    def on_step_end(self, args, state, control, **kwargs):
        self.sizes.append(self.step_tokens)
        self.step_tokens = 0


def clock() -> float:
    """Return the time after all work on the GPU has finished."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic()


def runs(timer: Timer, sizes: list[int], series: str, peak: float, frozen: int) -> Iterator[Run]:
    """Yield one run per step after the warmup steps."""
    import torch

    memory = torch.cuda.max_memory_reserved() / 1e9 if torch.cuda.is_available() else 0
    for seconds, tokens in itertools.islice(
        zip(timer.seconds, sizes, strict=True), WARMUP_STEPS, None
    ):
        peak_fraction = 4 * frozen * tokens / seconds / peak
        yield {
            "series": series,
            "seconds": seconds,
            "tokens": tokens,
            "peak_fraction": peak_fraction,
            "peak_gb": memory,
            "matmul_tflops": peak / 1e12,
        }


def figures(series: Series, settings: Settings, machine: Machine) -> Figures:
    """Return speeds, their ratios, fractions of the device's peak, and memory."""
    names = {SUBJECT: "dpo"} | {
        way: way for way in ("fp8", "sft", "trl_tuned", "trl_liger", "trl_packed")
    }
    results: Figures = {}
    for key, name in names.items():
        if key in series:
            results[f"{name}_tokens_per_s"] = harness.figure(harness.speeds(series[key]))
            for kind in ("peak_fraction", "peak_gb"):
                results[f"{name}_{kind}"] = harness.figure([run[kind] for run in series[key]])
    for name in {"reference", "fp8_reference"} & series.keys():
        results[f"{name}_tokens_per_s"] = harness.figure(harness.speeds(series[name]))
    measured = [run["matmul_tflops"] for key in names for run in series.get(key, ())]
    if measured:
        results["matmul_tflops"] = harness.figure(measured)
    for key, name in {"parity": "loss", "parity_float32": "loss_float32"}.items():
        if key in series:
            differences = [run["difference"] for run in series[key]]
            results[f"{name}_difference"] = harness.figure(differences)
    ratios = {
        "dpo_ratio_to_trl_tuned": (SUBJECT, "trl_tuned"),
        "dpo_ratio_to_trl_liger": (SUBJECT, "trl_liger"),
        "sft_ratio_to_trl_packed": ("sft", "trl_packed"),
        "fp8_ratio": ("fp8", SUBJECT),
        "fp8_ratio_to_trl_tuned": ("fp8", "trl_tuned"),
        "fp8_reference_ratio": ("fp8_reference", "reference"),
        "two_gpu_scaling": ("two_gpus", SUBJECT),
    }
    return results | harness.ratios(series, ratios)


BENCHMARK = harness.Benchmark(
    name="training",
    script=Path(__file__).resolve(),
    settings=SETTINGS,
    tiny=TINY,
    ways={
        SUBJECT: ours,
        **{
            way.__name__: way
            for way in (
                fp8,
                trl_tuned,
                trl_liger,
                sft,
                trl_packed,
                parity,
                parity_float32,
                two_gpus,
            )
        },
    },
    figures=figures,
    extra=("two_gpus",),
    variants=VARIANTS,
)

if __name__ == "__main__":
    harness.main(BENCHMARK, __doc__ or "")
