"""Runs tasks of lm-evaluation-harness, and this package's own task, and returns rows of results.

The own task, `commonplace`, is asked twice: by the likelihood of its options, and as a chat message
that requests a letter.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opencharacter import models
from opencharacter.config.evaluation import Capabilities, Capability
from opencharacter.config.files import resource
from opencharacter.config.roles import Role
from opencharacter.engines.conversations import Row
from opencharacter.text import filters
from opencharacter.text.chat import row_id, strip_think
from opencharacter.text.templates import load_tokenizer

OWN = "commonplace"
"""This package's task: general knowledge, common sense and arithmetic, four options each."""
LETTERS = "ABCD"

QUESTION = "Question: {{question}}\nAnswer:"
CHAT = """\
{{question}}
A. {{options[0]}}
B. {{options[1]}}
C. {{options[2]}}
D. {{options[3]}}
Reply with the letter of the right answer and nothing else."""
"""Templates that the harness fills."""

REPLY_TOKENS = 16
"""Maximum length of a reply, which should be one letter."""
CPU_BATCH = 12

METRICS = ("acc", "acc_norm", "exact_match")
"""The harness's metrics that are kept: proportions, 0 .. 1."""
IN_CHAT, READABLE, FORMAT_LOST = "chat", "chat_readable", "format_lost"
"""Right in chat; a letter can be read in chat; right by likelihood, but no letter can be read."""
OTHER_FORM, WRONG, NO_ANSWER = "chat_other_form", "chat_wrong", "chat_no_answer"
"""Right, but by the option's text and not by its letter; another option; no option at all. Together
with `IN_CHAT` they count every reply once."""
ALL_METRICS = (*METRICS, IN_CHAT, OTHER_FORM, WRONG, NO_ANSWER, READABLE, FORMAT_LOST)

Samples = dict[str, list[dict[str, Any]]]
"""The harness's record of each document, by subtask."""


# ------------------------------------------------------------------------------------- the harness


def questions() -> Path:
    """The file of our own task: kind, question, options, right (index of the right option)."""
    path = resource("prompts", f"{OWN}.jsonl")
    assert path is not None
    return path


def own_task(chat: bool) -> dict[str, Any]:
    """Our own task in the harness's format: by likelihood of the options, or as chat."""
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(questions())}},
        "test_split": "test",
    }
    mean = {"aggregation": "mean", "higher_is_better": True}
    if chat:
        return data | {
            "task": f"{OWN}_chat",
            "output_type": "generate_until",
            "doc_to_text": CHAT,
            "doc_to_target": f"{{{{'{LETTERS}'[right]}}}}",
            "generation_kwargs": {"until": [], "max_gen_toks": REPLY_TOKENS, "do_sample": False},
            "metric_list": [{"metric": "exact_match", **mean}],
        }
    return data | {
        "task": OWN,
        "output_type": "multiple_choice",
        "doc_to_text": QUESTION,
        "doc_to_choice": "options",
        "doc_to_target": "right",
        "metric_list": [{"metric": "acc", **mean}],
    }


def measure(
    role: Role, adapter: Any, task: Capability, settings: Capabilities, gpus: float, threads: int
) -> list[Row]:
    """Load a model and evaluate it on one task.

    Args:
        role: the student.
        adapter: the adapter to merge into its weights, or None.
        task: the task.
        settings: the stage's configuration.
        gpus: GPUs of this process; with 0 it runs on the CPU in float32.
        threads: CPU threads.

    Returns:
        Rows of `SCHEMA`.
    """
    import torch
    from lm_eval.models import huggingface

    torch.set_num_threads(threads)
    base = models.resolve_role(role)
    path = models.merge_into_base(base, adapter.local()) if adapter else base
    harness_model: Any = huggingface.HFLM
    # In bfloat16 the likelihoods of options often tie; on the CPU float32 costs little.
    model = harness_model(
        pretrained=str(path),
        tokenizer=load_tokenizer(path, role),
        device="cuda" if gpus else "cpu",
        dtype=role.dtype if gpus else "float32",
        batch_size="auto" if gpus else CPU_BATCH,
        trust_remote_code=role.trust_remote_code,
        parallelize=gpus > 1,
    )
    if task.task != OWN:
        return documents(task.task, samples(model, task.task, task, settings))
    by_likelihood = documents(OWN, samples(model, own_task(chat=False), task, settings))
    (replies,) = samples(model, own_task(chat=True), task, settings, chat=True).values()
    return by_likelihood + chat_rows(by_likelihood, replies)


def samples(
    model: Any, spec: Any, task: Capability, settings: Capabilities, chat: bool = False
) -> Samples:
    """The harness's records of the documents of a task."""
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    own = isinstance(spec, dict)
    evaluate: Any = evaluator.simple_evaluate
    results = evaluate(
        model,
        tasks=[spec],
        num_fewshot=task.shots,
        limit=settings.documents,
        apply_chat_template=chat,
        task_manager=TaskManager(include_path=settings.include, include_defaults=not own),
        bootstrap_iters=0,
    )
    return results["samples"]


# --------------------------------------------------------------------------------------- documents


def document_id(subtask: str, sample: dict[str, Any]) -> str:
    """The id of a document: the same for base and persona, different if the data changed."""
    return row_id(subtask, sample["doc_id"], sample["doc_hash"])


def row(task: str, metric: str, document: str, value: float, answer: str | None = None) -> Row:
    return {
        "id": row_id("evaluation/capabilities", task, metric, document),
        "task": task,
        "metric": metric,
        "document": document,
        "value": float(value),
        "answer": answer,
    }


def documents(task: str, samples: Samples) -> list[Row]:
    """A row per document and metric; the subtasks of a group are one task."""
    return [
        row(task, metric, document_id(subtask.removesuffix("_chat"), sample), sample[metric])
        for subtask, records in samples.items()
        for sample in records
        for metric in METRICS
        if metric in sample
    ]


def chat_rows(by_likelihood: list[Row], replies: list[dict[str, Any]]) -> list[Row]:
    """Rows of the chat form: the outcome of a reply, whether it has a letter, and lost format.

    Args:
        by_likelihood: rows of the same documents by likelihood.
        replies: the harness's records of the chat form.
    """
    likeliest = {r["document"]: bool(r["value"]) for r in by_likelihood if r["metric"] == "acc"}
    rows = []
    for sample in replies:
        document, text = document_id(OWN, sample), sample["resps"][0][0]
        letter = read_letter(text)
        reached = outcome(text, sample["doc"]["options"], LETTERS.index(sample["target"]))
        values = {
            **{name: name == reached for name in (IN_CHAT, OTHER_FORM, WRONG, NO_ANSWER)},
            READABLE: letter is not None,
            FORMAT_LOST: likeliest[document] and letter is None,
        }
        rows += [row(OWN, metric, document, value, text) for metric, value in values.items()]
    return rows


def outcome(text: str, options: Sequence[str], right: int) -> str:
    """What a reply in chat amounts to: one of `IN_CHAT`, `OTHER_FORM`, `WRONG` and `NO_ANSWER`.

    A reply without a letter answers by the text of an option, if it names exactly one.
    """
    letter = read_letter(text)
    if letter is not None:
        return IN_CHAT if letter == LETTERS[right] else WRONG
    visible = " ".join(filters.words(strip_think(text) or text))
    named = [
        n for n, o in enumerate(options) if f" {' '.join(filters.words(o))} " in f" {visible} "
    ]
    if len(named) != 1:
        return NO_ANSWER
    return OTHER_FORM if named[0] == right else WRONG


def read_letter(text: str) -> str | None:
    """The letter that a reply gives as its answer; None if it did not keep the format.

    The reply is a letter, begins with one as in a list (`B.`, `(B) Paris`), or states that the
    answer is a letter. The text of an option is not a letter.
    """
    visible = strip_think(text) or text
    first = re.match(rf"\W*([{LETTERS}])(?:\W*$|[.:,)\]*]|\s*\n)", visible)
    named = re.findall(rf"\banswer(?:\s+is)?:?\s*\W{{0,3}}([{LETTERS}])\b(?!['\w])", visible)
    letters = {first.group(1)} if first else set(named)
    return letters.pop() if len(letters) == 1 else None
