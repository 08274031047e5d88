"""Two columns of docs/students.md: which chat templates a student has, and how vLLM serves it."""

from __future__ import annotations

import ast
import importlib.util
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from template_samples import CONVERSATION, FAMILIES, make_tokenizer

from opencharacter import models
from opencharacter.errors import UserError
from opencharacter.text import templates

FORMATS = {
    "chatml": "Qwen2.5",
    "command_a": "Command A",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3",
    "glm4_5": "GLM-4.5",
    "gpt_oss": "gpt-oss",
    "granite3": "Granite 3",
    "llama3_2": "Llama 3.2",
    "mistral": "Mistral",
    "olmo2": "OLMo 2",
    "phi3": "Phi-3",
    "qwen3": "Qwen3",
    "smollm3": "SmolLM3",
}
"""Models after whose published formats the templates in tests/templates are written."""
TEMPLATES = {
    "cohere2": ("command_a",),
    "falcon_h1": ("chatml",),
    "gemma": ("gemma2",),
    "gemma2": ("gemma2",),
    "gemma3": ("gemma3",),
    "gemma3_text": ("gemma3",),
    "gemma3n_text": ("gemma3",),
    "glm4_moe": ("glm4_5",),
    "gpt_oss": ("gpt_oss",),
    "granite": ("granite3",),
    "granitemoe": ("granite3",),
    "granitemoehybrid": ("granite3",),
    "granitemoeshared": ("granite3",),
    "internlm3": ("chatml",),
    "lfm2": ("chatml",),
    "llama": ("llama3_2", "chatml"),
    "ministral": ("mistral",),
    "mistral": ("mistral",),
    "mixtral": ("mistral",),
    "olmo2": ("olmo2",),
    "olmoe": ("olmo2",),
    "phi3": ("phi3",),
    "qwen2": ("chatml",),
    "qwen2_moe": ("chatml",),
    "qwen3": ("qwen3",),
    "qwen3_moe": ("qwen3",),
    "smollm3": ("smollm3",),
}
"""The templates that the published chat models of an architecture use."""
TRANSFORMERS_BACKEND = "TransformersForCausalLM"
"""vLLM's class for models that it runs with the code of transformers."""


class TemplateClass(NamedTuple):
    """What a run does with a template.

    Args:
        rendering: how the template is rendered: as it is, adapted in named ways, or refused.
        training: what a conversation of several answers becomes in training.
        thinking: whether a student may think; empty if the template knows no thoughts.
    """

    rendering: str
    training: str
    thinking: str


def classify(tokenizer: Any, thinking: Any) -> TemplateClass:
    """Say what a run does with a template.

    Args:
        tokenizer: a tokenizer whose template is adapted to a role that does not think.
        thinking: the same for a role that thinks.
    """
    try:
        templates.check_template(tokenizer)
        templates.check_trainable(tokenizer)
    except UserError as error:
        return TemplateClass(f"refused: {error}", "", "")
    source = templates.template_source(tokenizer) or ""
    prelude, _, own = source.rpartition(templates.END_OF_PRELUDE)
    changes = {
        "thinking turned off": templates.THINKING_OFF in prelude,
        "date fixed": bool(templates.fixed_date(own, templates.DATE_STRING)),
        "prompt opens the final channel": templates.ANSWER_OPENED in own,
        "system message moved into the first user turn": templates.SYSTEM_IN_USER_TURN in prelude,
    }
    adapted = ", ".join(name for name, made in changes.items() if made)
    assert bool(adapted) == source.startswith(templates.ADAPTED)
    training = "one sequence" if keeps_turns(tokenizer) else "one sequence per answer"
    if templates.special_tokens(tokenizer).search(templates.answer_lead(tokenizer)):
        training += ", answers open with special tokens"
    rendering = f"adapted: {adapted}" if adapted else "as it is"
    return TemplateClass(rendering, training, may_think(thinking))


def may_think(tokenizer: Any) -> str:
    """Say whether a student that thinks can have a template; nothing if it knows no thoughts."""
    source = templates.template_source(tokenizer) or ""
    if "think" not in source and templates.CHANNEL not in source:
        return ""
    try:
        templates.check_thoughts(tokenizer)
    except UserError:
        return "refused"
    return "allowed"


def keeps_turns(tokenizer: Any) -> bool:
    """Return whether the prompt of a second turn continues the first turn, whatever the tokens."""
    first = templates.prompt(tokenizer, CONVERSATION[:2])
    answered = first + templates.completion(tokenizer, CONVERSATION[:3], first)
    return templates.prompt(tokenizer, CONVERSATION[:4]).startswith(answered)


def template_table() -> str:
    """Classify all sampled templates."""
    from transformers import AutoTokenizer

    vocabulary = AutoTokenizer.from_pretrained(models.resolve("embedded:smollm2-135m"))
    titles = ("template", "rendered", "a conversation in training", "a student that thinks")
    lines = [f"| {' | '.join(titles)} |", "|---|---|---|---|"]
    for family in sorted(FAMILIES, key=lambda family: FORMATS[family].lower()):
        with tempfile.TemporaryDirectory() as folder:
            plain, thinking = (
                make_tokenizer(vocabulary, family, Path(folder), thinks=thinks)
                for thinks in (False, True)
            )
            result = classify(plain, thinking)
        lines.append(f"| {' | '.join((FORMATS[family], *result))} |")
    return "\n".join(lines) + "\n"


def template_names(architecture: str) -> str:
    """Return the sampled templates of an architecture's published chat models."""
    return ", ".join(FORMATS[family] for family in TEMPLATES.get(architecture, ()))


# ----------------------------------------------------------------------------------------- serving


def vllm_version() -> str:
    """Return major and minor version of the installed vLLM."""
    import vllm

    return ".".join(vllm.__version__.split(".")[:2])


def serving(class_name: str) -> str:
    """Say how vLLM serves a model class of transformers, by its registry; no engine is started.

    Args:
        class_name: name in `architectures` of the model's config.
    """
    import transformers
    from vllm import ModelRegistry

    if class_name in ModelRegistry.models:
        return "LoRA" if supports_lora(class_name) else "merged"
    model_class = getattr(transformers, class_name)
    if not model_class.is_backend_compatible():
        return "no"
    return "LoRA*" if supports_lora(TRANSFORMERS_BACKEND) else "merged*"


def supports_lora(class_name: str) -> bool:
    """Return whether a class of vLLM's registry declares that it takes LoRA adapters."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.interfaces import supports_lora as declares

    entry: Any = ModelRegistry.models[class_name]
    try:
        return bool(declares(entry.load_model_cls()))
    except ModuleNotFoundError:  # models for images need torchvision
        return is_derived(entry.module_name, entry.class_name, "SupportsLoRA")


def is_derived(module: str, class_name: str, base: str) -> bool:
    """Return whether a class derives from a base, by the source of its module alone."""
    spec = importlib.util.find_spec(module)
    assert spec and spec.origin
    body = ast.parse(Path(spec.origin).read_text()).body
    bases = {
        node.name: [ast.unparse(parent) for parent in node.bases]
        for node in body
        if isinstance(node, ast.ClassDef)
    }

    def derives(name: str) -> bool:
        return name == base or any(map(derives, bases.get(name, ())))

    return derives(class_name)
