"""Real weights from teacher to merged persona on the CPU; vLLM agrees with transformers and PEFT.

They take minutes a model, so they run only on request: set REAL_WEIGHTS to a folder with
`qwen2.5-coder-0.5b-instruct.gguf` and `gemma-3-270m.gguf`; the embedded SmolLM2 needs no file.
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
from opencharacter.text.chat import assistant, system, user
from opencharacter.text.templates import load_tokenizer

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
MAX_DIFFERENCE = 1e-3
"""Nats in float32 between vLLM and transformers for the same weights."""
MAX_ROUNDING = 0.05
"""Mean nats between merged weights, which are rounded to bfloat16, and the separate adapter. The
rounding is of the order of what a few training steps change; single tokens differ by 0.1."""


def recipe_of(fields: dict) -> dict:
    """The smallest recipe, with one role for every model."""
    recipe = embedded_recipe()
    role = recipe["roles"]["student"] | fields | {"max_model_len": 1024}
    recipe["roles"] = dict.fromkeys(recipe["roles"], role)
    return recipe


def prompts(tokenizer) -> list[list[int]]:
    """Token ids of prompts of one and three turns, the last with a system prompt."""
    chats = [[user(question)] for question in QUESTIONS]
    chats.append([*chats[0], assistant(ANSWER), *chats[1]])
    chats.append([system("You are a poet."), *chats[0]])
    texts = [
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        for chat in chats
    ]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def continue_with_vllm(folder: Path, model: Path, prompts: list[list[int]], *adapter: str):
    """Greedy replies of vLLM: their tokens, and the log-probabilities of these."""
    (folder / "prompts.json").write_text(json.dumps(prompts))
    arguments = [model, folder / "prompts.json", folder / "replies.json", *adapter]
    command = [sys.executable, str(HERE / "log_probs.py"), *map(str, arguments)]
    subprocess.run(command, check=True)
    return json.loads((folder / "replies.json").read_text())


def log_probs(model, prompt: list[int], reply: list[int]) -> torch.Tensor:
    """Log-probabilities of a reply's tokens by transformers."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1).gather(1, torch.tensor(reply)[:, None])[:, 0]


def differences(model, prompts: list[list[int]], replies: list) -> torch.Tensor:
    """Absolute differences of log-probabilities between vLLM and transformers by token, in nats."""
    by_reply = [
        (log_probs(model, prompt, tokens) - torch.tensor(by_vllm)).abs()
        for prompt, (tokens, by_vllm) in zip(prompts, replies, strict=True)
    ]
    return torch.cat(by_reply)


def train_and_compare(folder: Path, fields: dict) -> dict[str, float]:
    """Make a persona and return differences of log-probabilities, in nats.

    Returns:
        The largest of `adapter`: vLLM with the adapter, transformers with PEFT; of `merged`: both
        with the merged weights; and of `training`: vLLM with the adapter, transformers without. The
        mean of `rounding`: vLLM with the merged weights, transformers with PEFT.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def load(path: Path):
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    recipe = recipe_of(fields)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    arguments = ("tiny.yaml", "-c", "poeticism", "--storage", "runs", "--until", "persona/merge")
    ran = cli("run", *arguments, cwd=folder)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    role = Role.model_validate(recipe["roles"]["student"])
    base = models.resolve_role(role)
    (adapter,) = (folder / "runs").glob("*/poeticism/persona/merge/adapter")
    merged = models.merge_into_base(base, adapter)
    ids = prompts(load_tokenizer(base, role))
    by_adapter = continue_with_vllm(folder, base, ids, str(adapter))
    by_merged = continue_with_vllm(folder, merged, ids)
    figures = {"training": differences(load(base), ids, by_adapter).max()}
    figures["merged"] = differences(load(merged), ids, by_merged).max()
    with_peft = PeftModel.from_pretrained(load(base), str(adapter))
    figures["adapter"] = differences(with_peft, ids, by_adapter).max()
    figures["rounding"] = differences(with_peft, ids, by_merged).mean()
    return {name: float(value) for name, value in figures.items()}


def check(figures: dict[str, float]) -> None:
    print(json.dumps(figures))
    assert figures["training"] > 10 * MAX_DIFFERENCE  # otherwise the others would mean little
    assert figures["adapter"] < MAX_DIFFERENCE
    assert figures["merged"] < MAX_DIFFERENCE
    assert figures["rounding"] < MAX_ROUNDING


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif("REAL_WEIGHTS" not in os.environ, reason="set REAL_WEIGHTS to a folder")
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
