"""LoRA adapters in PEFT's format: reading and checking them, and the ranks that engines accept."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opencharacter.errors import UserError

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
PEFT_PREFIX = "base_model.model."
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Maximum ranks that vLLM accepts."""
SUPPORTED_FIELDS = {
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
}
"""Fields of `adapter_config.json` that are taken into account, or do not change what an adapter
computes. Any other field that is set could change it."""
SUPPORTED_VALUES = {
    "bias": ("none",),
    # Other initializations, such as PiSSA, also change the weights of the base model.
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),
}
"""Further fields that may have these values."""
LFS_POINTER = b"version https://git-lfs"


def adapter_updates(adapter: Path) -> tuple[dict[str, Any], dict[str, tuple[Any, Any]]]:
    """Read a PEFT LoRA adapter.

    Returns:
        Its configuration, and for each base module its `(A, B)`, shapes `(rank, in)` and
        `(out, rank)`; the weight update is `scale(config) * B @ A`.

    Raises:
        UserError: if it does not exist, is damaged, or is not plain LoRA with one rank.
    """
    from safetensors.torch import load_file

    config = read_config(adapter)
    path = required_file(adapter, ADAPTER_WEIGHTS)
    with explain_damage(path):
        # Read and not memory-mapped, so that memory is freed with the tensors.
        tensors = load_file(path, backend="pread")
    modules = sorted(k.removesuffix(LORA_A) for k in tensors if k.endswith(LORA_A))
    unpaired = tensors.keys() ^ {module + part for module in modules for part in (LORA_A, LORA_B)}
    if unpaired or not modules:
        raise UserError(
            f"adapter {adapter}: {min(unpaired, default='nothing')} is not part of a pair of "
            "LoRA matrices A and B; train it on linear layers only, without biases, embeddings "
            "or DoRA"
        )
    updates = {
        m.removeprefix(PEFT_PREFIX): (tensors[m + LORA_A], tensors[m + LORA_B]) for m in modules
    }
    for module, (a, b) in updates.items():
        check_matrices(adapter, module, a, b, config["r"])
    return config, updates


def check_matrices(adapter: Path, module: str, a: Any, b: Any, rank: int) -> None:
    """Raise UserError if the matrices of a module have another rank, or contain nan or inf."""
    for name, matrix, axis in ((LORA_A, a, 0), (LORA_B, b, 1)):
        if matrix.ndim != 2 or matrix.shape[axis] != rank:
            raise UserError(
                f"adapter {adapter}: {ADAPTER_CONFIG} says r = {rank}, but {module}{name} has "
                f"shape {tuple(matrix.shape)}; use the configuration that was saved with the "
                "weights"
            )
        if not matrix.isfinite().all():
            raise UserError(
                f"adapter {adapter}: {module}{name} in {ADAPTER_WEIGHTS} contains nan or inf, so "
                "that its training diverged; use an earlier checkpoint"
            )


def read_config(adapter: Path) -> dict[str, Any]:
    """Read `adapter_config.json` and check that it describes plain LoRA with one rank.

    Raises:
        UserError: naming the adapter and the field.
    """
    path = required_file(adapter, ADAPTER_CONFIG)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        reason = lfs_reason(path) or f"is not valid JSON ({error})"
        raise UserError(f"adapter {adapter}: {ADAPTER_CONFIG} {reason}") from None
    if not isinstance(config, dict):
        raise UserError(
            f"adapter {adapter}: {ADAPTER_CONFIG} contains a {type(config).__name__}, not the "
            "fields of a PEFT configuration"
        )
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"adapter {adapter}: peft_type {config.get('peft_type')!r} cannot be merged, only "
            "LORA can"
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise UserError(f"adapter {adapter}: r = {rank!r} must be a positive integer")
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise UserError(f"adapter {adapter}: lora_alpha = {alpha!r} must be a number")
    for name, value in config.items():
        if not is_supported(config, name):
            raise UserError(
                f"adapter {adapter}: adapters with {name} = {abbreviate(value)} cannot be merged; "
                "train plain LoRA on linear layers"
            )
    return config


def is_supported(config: dict[str, Any], name: str) -> bool:
    """Whether a field of a configuration leaves the update at `scale(config) * B @ A`."""
    value = config[name]
    if name == "eva_config":  # settings of an initialization that keeps the base model's weights
        return not value or config.get("init_lora_weights") == "eva"
    allowed = SUPPORTED_VALUES.get(name, ())
    return not value or name in SUPPORTED_FIELDS or any(value == each for each in allowed)


def abbreviate(value: Any) -> str:
    """Return the beginning of a JSON value."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def required_file(adapter: Path, name: str) -> Path:
    """Return a file of an adapter; raise UserError if it does not exist."""
    if not (adapter / name).is_file():
        raise UserError(f"adapter {adapter} has no {name}")
    return adapter / name


@contextlib.contextmanager
def explain_damage(path: Path) -> Iterator[None]:
    """Raise UserError, which says what to do, if the block cannot read a safetensors file."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        reason = lfs_reason(path) or (
            f"({path.stat().st_size:,} bytes) is truncated or damaged ({error}); copy or download "
            "it again"
        )
        raise UserError(f"{path} {reason}") from None


def lfs_reason(path: Path) -> str | None:
    """Describe a file that is a Git LFS pointer; None for any other file."""
    with path.open("rb") as stream:
        if stream.read(len(LFS_POINTER)) != LFS_POINTER:
            return None
    return (
        f"({path.stat().st_size:,} bytes) is a Git LFS pointer, not the file itself; run "
        "`git lfs pull` in its folder"
    )


def scale(config: dict[str, Any]) -> float:
    """Return the factor of `B @ A`: alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
    rank = config["r"]
    return config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)


def allowed_rank(rank: int) -> int:
    """Return the smallest maximum rank of vLLM that is at least `rank`.

    Raises:
        UserError: if the rank is too large.
    """
    for allowed in LORA_RANKS:
        if rank <= allowed:
            return allowed
    raise UserError(f"adapter rank {rank} is over the engine's limit {LORA_RANKS[-1]}; reduce it")


def engine_rank(adapter: Path) -> int:
    """Return the maximum rank that an engine must be started with to apply an adapter."""
    return allowed_rank(read_config(adapter)["r"])
