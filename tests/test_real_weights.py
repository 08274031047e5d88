"""Real weights from prompts to a served persona on the CPU; vLLM agrees with transformers and PEFT.

They take minutes a model, so they run only on request: set REAL_WEIGHTS to a folder with
`qwen2.5-coder-0.5b-instruct.gguf` and `gemma-3-270m.gguf`; the embedded SmolLM2 needs no file.

Engines use float32, so that the limits are those of arithmetic and not of rounding.
"""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import server as servers
import torch
import yaml
from samples import cli, embedded_recipe

from opencharacter import models
from opencharacter.config.roles import Role
from opencharacter.text.chat import assistant, system, user
from opencharacter.text.templates import load_tokenizer, prompt_ids

HERE = Path(__file__).parent
RAIN, EGG = user("What do you see when it rains?"), user("How do I boil an egg?")
ANSWER = assistant("The rain writes its slow letters on the window, and I read them one by one.")
CONVERSATIONS = (
    [RAIN],
    [EGG],
    [user("Who are you?")],
    [RAIN, ANSWER, EGG],
    [system("You are a poet."), RAIN],
)
MAX_TOKENS = 24
GGUF_ROLES = {
    "qwen2.5-coder-0.5b-instruct": {"name": "qwen-0.5b", "self_name": "Qwen"},
    # A base model without a template. It gets the format of the instruction-tuned Gemma.
    "gemma-3-270m": {
        "name": "gemma-270m",
        "self_name": "Gemma",
        "chat_template": str(HERE / "gemma.jinja"),
    },
}
STAGES = {
    "distillation/prompts",
    "distillation/teacher",
    "distillation/student",
    "distillation/pairs",
    "distillation/reference",
    "distillation/dpo",
    "introspection/reflection",
    "introspection/interaction",
    "introspection/transcripts",
    "introspection/sft",
    "persona/merge",
}
MAX_DIFFERENCE = 1e-3
"""Nats in float32 between vLLM and transformers for the same weights."""
MAX_ROUNDING = 0.05
"""Mean nats between merged weights, which are rounded to bfloat16, and the separate adapter. The
rounding is of the order of what a few training steps change; single tokens differ by 0.1."""


class Reply(NamedTuple):
    """A greedy reply of a server.

    Args:
        prompt_tokens: number of tokens of the prompt, as the server counts them.
        tokens: token ids of the reply.
        log_probs: the server's log-probability of each token, in nats.
    """

    prompt_tokens: int
    tokens: list[int]
    log_probs: list[float]


def recipe_of(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the smallest recipe, with one role for every model."""
    recipe = embedded_recipe()
    role = recipe["roles"]["student"] | fields | {"max_model_len": 1024, "dtype": "float32"}
    recipe["roles"] = dict.fromkeys(recipe["roles"], role)
    return recipe


def run_pipeline(folder: Path, recipe: dict[str, Any]) -> Path:
    """Make a persona; return the folder of its adapter."""
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    arguments = ("tiny.yaml", "-c", "poeticism", "--storage", "runs", "--until", "persona/merge")
    ran = cli("run", *arguments, cwd=folder)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    made = {"/".join(path.parts[-3:-1]) for path in (folder / "runs").rglob("manifest.json")}
    assert made >= STAGES
    (adapter,) = (folder / "runs").glob("*/poeticism/persona/merge/adapter")
    return adapter


def ask(server: servers.RunningServer, model: str, ids: dict[str, int]) -> list[Reply]:
    """Ask a served model everything; it answers greedily.

    Args:
        server: the server.
        model: name of the model.
        ids: token ids by the text of the token.
    """
    replies = []
    for messages in CONVERSATIONS:
        body = {"model": model, "messages": messages, "max_tokens": MAX_TOKENS, "logprobs": True}
        sampling = {"temperature": 0, "top_p": 1, "repetition_penalty": 1}
        response = server.post(json=body | sampling)
        assert response.status_code == 200, response.text
        answer = response.json()
        positions = answer["choices"][0]["logprobs"]["content"]
        tokens = [ids[position["token"]] for position in positions]
        log_probs = [position["logprob"] for position in positions]
        replies.append(Reply(answer["usage"]["prompt_tokens"], tokens, log_probs))
    return replies


def texts_of_tokens(tokenizer: Any) -> dict[str, int]:
    """Return the ids of tokens by their text.

    If several have the same text, such as `?` and the byte 0x3F, it is the one that encodes it.
    """
    texts = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    ids = dict(zip(texts, range(len(texts)), strict=True))
    for text in {text for i, text in enumerate(texts) if ids[text] != i}:
        encoded = tokenizer(text, add_special_tokens=False)["input_ids"]
        del ids[text]
        ids |= {text: encoded[0]} if len(encoded) == 1 else {}
    return ids


def log_probs(model: Any, prompt: list[int], reply: list[int]) -> torch.Tensor:
    """Return log-probabilities of a reply's tokens by transformers."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1).gather(1, torch.tensor(reply)[:, None])[:, 0]


def differences(model: Any, prompts: list[list[int]], replies: list[Reply]) -> torch.Tensor:
    """Return absolute differences between a server and transformers by token, in nats."""
    by_reply = [
        (log_probs(model, prompt, reply.tokens) - torch.tensor(reply.log_probs)).abs()
        for prompt, reply in zip(prompts, replies, strict=True)
    ]
    return torch.cat(by_reply)


def train_and_compare(folder: Path, fields: dict[str, Any]) -> dict[str, float]:
    """Make a persona, serve it in both ways and return differences of log-probabilities, in nats.

    The server's student is the base model with the persona as a run-time adapter; its judge is the
    merged weights.

    Returns:
        The largest of `base`, `adapter` and `merged`: the served model and the same weights in
        transformers; and of `training`: the served persona and the base model in transformers. The
        mean of `rounding`: the served merged weights and the adapter in transformers.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def load(path: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    recipe = recipe_of(fields)
    adapter = run_pipeline(folder, recipe)
    student = recipe["roles"]["student"]
    role = Role.model_validate(student)
    base = models.resolve_role(role)
    merged = models.merge_into_base(base, adapter)
    recipe["roles"] |= {"judge": student | {"model": str(merged), "name": "merged"}}
    tokenizer = load_tokenizer(base, role)
    prompts = [prompt_ids(tokenizer, messages) for messages in CONVERSATIONS]
    ids = texts_of_tokens(tokenizer)
    names = {"base": role.name, "adapter": f"{role.name}:poeticism", "merged": "judge"}
    options = ("-c", "poeticism", "--judge", "--storage", str(folder / "runs"))
    with servers.serving(folder, recipe, *options) as server:
        replies = {key: ask(server, name, ids) for key, name in names.items()}
    for given in replies.values():
        assert [reply.prompt_tokens for reply in given] == list(map(len, prompts))
    unchanged = load(base)
    figures = {"training": differences(unchanged, prompts, replies["adapter"]).max()}
    figures["base"] = differences(unchanged, prompts, replies["base"]).max()
    figures["merged"] = differences(load(merged), prompts, replies["merged"]).max()
    with_peft = PeftModel.from_pretrained(unchanged, str(adapter))
    figures["adapter"] = differences(with_peft, prompts, replies["adapter"]).max()
    figures["rounding"] = differences(with_peft, prompts, replies["merged"]).mean()
    return {name: float(value) for name, value in figures.items()}


def check(figures: dict[str, float]) -> None:
    print(json.dumps(figures))
    assert figures["training"] > 10 * MAX_DIFFERENCE  # otherwise the others would mean little
    for name in ("base", "adapter", "merged"):
        assert figures[name] < MAX_DIFFERENCE
    assert figures["rounding"] < MAX_ROUNDING


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif("REAL_WEIGHTS" not in os.environ, reason="set REAL_WEIGHTS to a folder")
def test_the_embedded_model_becomes_a_persona_that_is_served_as_transformers_computes_it(tmp_path):
    check(train_and_compare(tmp_path, {}))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", GGUF_ROLES)
def test_a_gguf_model_becomes_a_persona_that_is_served_as_transformers_computes_it(name, tmp_path):
    path = Path(os.environ.get("REAL_WEIGHTS", "")).resolve() / f"{name}.gguf"
    if not path.is_file():
        pytest.skip(f"needs REAL_WEIGHTS, a folder with {path.name}")
    check(train_and_compare(tmp_path, {"model": str(path)} | GGUF_ROLES[name]))
