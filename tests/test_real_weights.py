"""Real weights from teacher to merged persona on the CPU; vLLM agrees with transformers and PEFT.

The embedded SmolLM2 is tested in CI. Other families need GGUF files: set REAL_WEIGHTS to a folder
with `qwen2.5-coder-0.5b-instruct.gguf` and `gemma-3-270m.gguf`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from samples import cli, embedded_recipe

from opencharacter import models
from opencharacter.config.roles import Role
from opencharacter.text.chat import assistant, load_tokenizer, system, user

HERE = Path(__file__).parent
QUESTIONS = ("What do you see when it rains?", "How do I boil an egg?", "Who are you?")
ANSWER = "The rain writes its slow letters on the window, and I read them one by one."
GGUF_ROLES = {
    "qwen2.5-coder-0.5b-instruct": {"name": "qwen-0.5b", "self_name": "Qwen"},
    # A base model without a template. It gets the format of the instruction-tuned Gemma.
    "gemma-3-270m": {
        "name": "gemma-270m",
        "self_name": "Gemma",
        "chat_template": str(HERE / "gemma.jinja"),
    },
}
MAX_LORA_DIFFERENCE = 1e-3
"""Nats, in float32, between vLLM with the adapter and transformers with PEFT."""
MAX_MERGED_DIFFERENCE = 0.1
"""Nats between vLLM with the merged weights, which are rounded to bfloat16, and PEFT."""


def recipe_of(fields: dict) -> dict:
    """The smallest recipe, with one role for every model."""
    recipe = embedded_recipe()
    role = recipe["roles"]["student"] | fields | {"max_model_len": 1024}
    recipe["roles"] = dict.fromkeys(recipe["roles"], role)
    return recipe


def conversations(tokenizer) -> list[list[int]]:
    """Token ids of complete conversations, the last with a system prompt."""
    chats = [[user(question), assistant(ANSWER)] for question in QUESTIONS]
    chats.append([system("You are a poet."), *chats[0]])
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def log_probs(model, sequences: list[list[int]]) -> list[torch.Tensor]:
    """Log-probabilities of all tokens but the first, by transformers."""
    results = []
    for sequence in sequences:
        ids = torch.tensor([sequence])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].float().log_softmax(-1)
        results.append(logits.gather(1, ids[0, 1:, None])[:, 0])
    return results


def vllm_log_probs(folder: Path, model: Path, sequences: list[list[int]], *adapter: str):
    """The same by vLLM, in another process."""
    (folder / "sequences.json").write_text(json.dumps(sequences))
    arguments = [model, folder / "sequences.json", folder / "result.json", *adapter]
    command = [sys.executable, str(HERE / "log_probs.py"), *map(str, arguments)]
    subprocess.run(command, check=True)
    return [torch.tensor(each) for each in json.loads((folder / "result.json").read_text())]


def largest_difference(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    pairs = zip(first, second, strict=True)
    return max(float((one - other).abs().max()) for one, other in pairs)


def train_and_compare(folder: Path, fields: dict) -> dict[str, float]:
    """Make a persona and compare its log-probabilities; returns the largest differences."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    recipe = recipe_of(fields)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    arguments = ("tiny.yaml", "-c", "poeticism", "--storage", "runs", "--until", "persona/merge")
    ran = cli("run", *arguments, cwd=folder)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    role = Role.model_validate(recipe["roles"]["student"])
    base = models.resolve_role(role)
    (adapter,) = (folder / "runs").glob("*/poeticism/persona/merge/adapter")
    sequences = conversations(load_tokenizer(base, role))
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = log_probs(plain, sequences)
    expected = log_probs(PeftModel.from_pretrained(plain, str(adapter)), sequences)
    del plain
    with_adapter = vllm_log_probs(folder, base, sequences, str(adapter))
    merged = vllm_log_probs(folder, models.merge_into_base(base, adapter), sequences)
    return {
        "training": largest_difference(before, expected),
        "adapter": largest_difference(with_adapter, expected),
        "merged": largest_difference(merged, expected),
    }


def check(differences: dict[str, float]) -> None:
    print(json.dumps(differences))
    assert differences["training"] > 10 * MAX_LORA_DIFFERENCE  # so that the comparison means much
    assert differences["adapter"] < MAX_LORA_DIFFERENCE
    assert differences["merged"] < MAX_MERGED_DIFFERENCE


@pytest.mark.slow
def test_the_embedded_model_becomes_a_persona_that_vllm_serves_as_transformers_does(tmp_path):
    check(train_and_compare(tmp_path, {}))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", GGUF_ROLES)
def test_a_gguf_model_becomes_a_persona_that_vllm_serves_as_transformers_does(name, tmp_path):
    path = Path(os.environ.get("REAL_WEIGHTS", "")).resolve() / f"{name}.gguf"
    if not path.is_file():
        pytest.skip(f"needs REAL_WEIGHTS, a folder with {path.name}")
    check(train_and_compare(tmp_path, {"model": str(path)} | GGUF_ROLES[name]))
