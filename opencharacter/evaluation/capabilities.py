"""Stage evaluation/capabilities: what does the character cost in ability?

lm-evaluation-harness asks the student as it came and the trained persona the same documents, so
that a change is a mean over pairs. Of this package's own task, `commonplace`, every question is
also asked as a chat message that wants a letter: where the right option is the likeliest and the
reply names no letter, what is lost is the form and not the knowledge.

It runs in two scopes: the student's own results belong to the student and serve every persona.

Reads: persona/merge, evaluation/capabilities of the student. Writes: task, metric, document, value,
answer; scores (persona).
Run: opencharacter run RECIPE --constitution NAME --only evaluation/capabilities
"""

from __future__ import annotations

import importlib.util
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from opencharacter import models
from opencharacter.config.files import resource
from opencharacter.config.placement import Resources
from opencharacter.config.recipe import Capabilities, Capability, Role
from opencharacter.engines.allocation import acquire
from opencharacter.engines.conversations import Row
from opencharacter.errors import UserError
from opencharacter.evaluation.scores import SCORES, Z95, Score, score_row, wilson
from opencharacter.runtime.stage import (
    AttemptLog,
    Estimate,
    Job,
    ResourceRequest,
    StageResult,
    TrainingWorkers,
)
from opencharacter.runtime.store import SHARDS
from opencharacter.text.chat import row_id, strip_think

OWN = "commonplace"
"""The task of this package: plain knowledge, common sense and sums, four options each."""
LETTERS = "ABCD"

QUESTION = "Question: {{question}}\nAnswer:"
CHAT = """\
{{question}}
A. {{options[0]}}
B. {{options[1]}}
C. {{options[2]}}
D. {{options[3]}}
Reply with the letter of the right answer and nothing else."""
"""Both are filled by the harness."""

TEMPLATES = (QUESTION, CHAT)
REPLY_TOKENS = 16
"""Of a reply that should be one letter."""
CPU_BATCH = 12
PATIENT = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Threads that wait for one another without spinning: on a busy machine of two cores the same 16
questions took 23 s and not 151."""
READ_TOKENS = 300
"""That `plan` expects of a document, or of a worked example, with all its options."""

METRICS = ("acc", "acc_norm", "exact_match")
"""What of the harness's metrics is kept: shares of 0 .. 1."""
IN_CHAT, READABLE, FORMAT_LOST = "chat", "chat_readable", "format_lost"
"""Right in chat; a letter can be read there; known by likelihood, but no letter can be read."""
MEASURED = (*METRICS, IN_CHAT, READABLE, FORMAT_LOST)

SIZES = {
    "truthfulqa_mc2": 817,
    "winogrande": 1267,
    "hellaswag": 10042,
    "arc_challenge": 1172,
    "mmlu": 14042,
    OWN: 80,
}
"""Documents of the paper's tasks and ours, for `plan`."""

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("document", pa.string(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
        pa.field("answer", pa.string()),
    ]
)

Samples = dict[str, list[dict[str, Any]]]
"""The harness's record of each document, by the task's parts."""


# ------------------------------------------------------------------------------------- the harness


def questions() -> Path:
    """The file of our own task: kind, question, options, right (the place of the right one)."""
    path = resource("prompts", f"{OWN}.jsonl")
    assert path is not None
    return path


def own_task(chat: bool) -> dict[str, Any]:
    """Our own task as the harness is given it: by likelihood of the options, or as chat."""
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
    """A model's rows for one task; where the model is loaded.

    Args:
        role: the student.
        adapter: folder to fold into its weights, or None.
        task: of the harness.
        settings: the section.
        gpus: of this process; 0 is the CPU, in float32.
        threads: on the CPU.
    """
    import torch
    from lm_eval.models import huggingface

    torch.set_num_threads(threads)
    base = models.resolve(role.model)
    path = models.merge_into_base(base, adapter.local()) if adapter else base
    harness_model: Any = huggingface.HFLM
    # bfloat16 logits are so coarse that options tie; on a CPU there is time for better ones.
    model = harness_model(
        pretrained=str(path),
        device="cuda" if gpus else "cpu",
        dtype=role.dtype if gpus else "float32",
        batch_size="auto" if gpus else CPU_BATCH,
        trust_remote_code=role.trust_remote_code,
        parallelize=gpus > 1,
    )
    if task.task != OWN:
        return documents(task.task, samples(model, task.task, task, settings))
    known = documents(OWN, samples(model, own_task(chat=False), task, settings))
    said = samples(model, own_task(chat=True), task, settings, chat=True)
    return known + in_chat(known, next(iter(said.values())))


def samples(
    model: Any, spec: Any, task: Capability, settings: Capabilities, chat: bool = False
) -> Samples:
    """What the harness says of each document of a task."""
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    own = isinstance(spec, dict)
    evaluate: Any = evaluator.simple_evaluate
    found = evaluate(
        model,
        tasks=[spec],
        num_fewshot=task.shots,
        limit=settings.documents,
        apply_chat_template=chat,
        task_manager=TaskManager(include_path=settings.include, include_defaults=not own),
        bootstrap_iters=0,
    )
    return found["samples"]


# --------------------------------------------------------------------------------------- documents


def document(part: str, sample: dict[str, Any]) -> str:
    """Names a document: the same in base and persona, and another one if the data has changed."""
    return row_id(part, sample["doc_id"], sample["doc_hash"])


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
    """A row for each document and metric; the parts of a group are one task."""
    return [
        row(task, metric, document(part.removesuffix("_chat"), sample), sample[metric])
        for part, of_part in samples.items()
        for sample in of_part
        for metric in METRICS
        if metric in sample
    ]


def in_chat(known: list[Row], said: list[dict[str, Any]]) -> list[Row]:
    """The same questions as chat: right or not, readable or not, and what was lost to form alone.

    Args:
        known: the rows of likelihoods.
        said: the harness's samples of the chat form.
    """
    likeliest = {r["document"]: bool(r["value"]) for r in known if r["metric"] == "acc"}
    rows = []
    for sample in said:
        name, text = document(OWN, sample), sample["resps"][0][0]
        letter = read_letter(text)
        values = {
            IN_CHAT: letter == sample["target"],
            READABLE: letter is not None,
            FORMAT_LOST: likeliest[name] and letter is None,
        }
        rows += [row(OWN, metric, name, value, text) for metric, value in values.items()]
    return rows


def read_letter(text: str) -> str | None:
    """The letter that a reply gives as its answer; None where the form was not kept.

    The reply is a letter, begins with one as a list does (`B.`, `(B) Paris`), or says that the
    answer is one. The name of the right option in other words is not a letter.
    """
    said = strip_think(text) or text
    first = re.match(rf"\W*([{LETTERS}])(?:\W*$|[.:,)\]*]|\s*\n)", said)
    named = re.findall(rf"\banswer(?:\s+is)?:?\s*\W{{0,3}}([{LETTERS}])\b(?!['\w])", said)
    found = {first.group(1)} if first else set(named)
    return found.pop() if len(found) == 1 else None


# ------------------------------------------------------------------------------------------ scores


def mean(values: Sequence[float]) -> Score:
    """A mean of values in 0 .. 1; Wilson's interval, which is wide where they are graded."""
    return wilson(sum(values), len(values))


def paired_change(before: Sequence[float], after: Sequence[float]) -> Score:
    """The mean change of the same documents, with its 95 % interval.

    Agresti and Min (2005) for pairs of 0 and 1, two pairs' worth of doubt added: without it no
    change at all in a few documents would be certain. It holds for graded values too.

    Args:
        before: values in 0 .. 1.
        after: of the same documents, in the same order.
    """
    changes = [b - a for a, b in zip(before, after, strict=True)]
    n = len(changes)
    if not n:
        return Score(None, None, None, 0)
    centre = sum(changes) / (n + 2)
    spread = (sum(c * c for c in changes) + 1) / (n + 2) - centre**2
    half = Z95 * math.sqrt(spread / (n + 2))
    return Score(sum(changes) / n, max(-1.0, centre - half), min(1.0, centre + half), n)


def scores(persona: str, base: list[Row], full: list[Row]) -> list[dict[str, Any]]:
    """Rows of `SCORES`: base, persona and the paired change of each task's metrics.

    A document that only one of the two has is not compared, and counted as unscored.
    """
    rows = []
    there = {(r["task"], r["metric"]) for r in [*base, *full]}
    for task, metric in sorted(there, key=lambda what: (what[0], MEASURED.index(what[1]))):
        sides = [
            {r["document"]: r["value"] for r in side if (r["task"], r["metric"]) == (task, metric)}
            for side in (base, full)
        ]
        both = sorted(sides[0].keys() & sides[1].keys())
        before, after = ([side[name] for name in both] for side in sides)
        change = paired_change(before, after)
        lone = len(sides[0].keys() ^ sides[1].keys())
        found = Score(change.value, change.low, change.high, change.n, lone)
        about = f"{task} {metric}"
        for condition, side in (("base", before), ("full", after)):
            rows.append(score_row(persona, "capability", condition, about, mean(side)))
        rows.append(score_row(persona, "capability_change", "full", about, found))
    return rows


# ------------------------------------------------------------------------------------------- stage


def check(job: Job) -> None:
    """Refuse, before a run, tasks that the harness does not have or whose data cannot be had.

    Raises:
        UserError: with the remedy.
    """
    settings: Capabilities = job.config
    if not settings.tasks or job.constitution is not None:  # the student's job asks for both
        return
    remedy = "or leave the task out of evaluation.capabilities.tasks ([] skips the stage)"
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "evaluation/capabilities needs lm-evaluation-harness, which is not installed: "
            f"pip install '.[capabilities]' in the checkout, {remedy}"
        )
    if settings.include and not Path(settings.include).is_dir():
        raise UserError(f"evaluation.capabilities.include {settings.include!r}: no such folder")
    for name in (task.task for task in settings.tasks if task.task != OWN):
        load_data(name, settings.include, remedy)


def load_data(name: str, include: str | None, remedy: str) -> None:
    """Have the harness load a task and its data, once for all later runs of this machine."""
    from lm_eval.tasks import TaskManager

    known = TaskManager(include_path=include)
    if name not in known.all_tasks:
        raise UserError(
            f"task {name!r} is none of lm-evaluation-harness, nor of evaluation.capabilities."
            f"include; correct it, {remedy}"
        )
    try:
        known.load([name])
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the data of task {name!r} cannot be had ({reason}); load it once where there is a "
            f"network and share that cache (HF_HOME), {remedy}"
        ) from None


def measured(job: Job, adapter: Any) -> pa.Table:
    """The rows of all tasks, each task in a process of its own; those that are there stay."""
    import ray

    settings, placement = job.config, job.placement
    pool, threads = placement.pools.student, int(max(1, placement.training.cpus))
    todo = [task for task in settings.tasks if not job.store.exists(part_of(job, task))]
    attempts = AttemptLog(job, kept=len(settings.tasks) - len(todo))
    remote = ray.remote(measure).options(
        num_cpus=placement.training.cpus, num_gpus=pool.gpus, runtime_env={"env_vars": PATIENT}
    )
    role = job.recipe.roles.student
    under_way = {remote.remote(role, adapter, t, settings, pool.gpus, threads): t for t in todo}
    while under_way:
        (done,), _ = ray.wait(list(under_way), num_returns=1)
        task = under_way.pop(done)
        rows = pa.Table.from_pylist(ray.get(done), schema=SCHEMA)
        job.store.write_table(f"{job.dataset}/{SHARDS}", rows, task.task)
        attempts.note(len(settings.tasks) - len(under_way))
    tables = (job.store.read_table(f"{job.dataset}/{SHARDS}", t.task) for t in settings.tasks)
    return pa.concat_tables([SCHEMA.empty_table(), *tables]).sort_by("id")


def part_of(job: Job, task: Capability) -> str:
    return f"{job.dataset}/{SHARDS}/{task.task}.parquet"


def identity(job: Job) -> dict[str, Any]:
    settings: Capabilities = job.config
    own = any(task.task == OWN for task in settings.tasks)
    folder = Path(settings.include) if settings.include else None
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder else []
    return {str(path.relative_to(folder or "")): models.file_hash(path) for path in files} | (
        {OWN: models.file_hash(questions())} if own else {}
    )


def notes(job: Job) -> list[str]:
    return [] if job.config.tasks else ["nothing to do: the recipe names no tasks"]


def resource_requests(job: Job) -> list[tuple[ResourceRequest, ...]]:
    room = Resources(cpus=job.placement.training.cpus, gpus=job.placement.pools.student.gpus)
    return [(TrainingWorkers(job.dataset, room),)] if job.config.tasks else []


def estimate(job: Job) -> Estimate:
    settings: Capabilities = job.config
    asked = [
        (min(SIZES.get(task.task, 0), settings.documents or math.inf), (task.shots or 0) + 1)
        for task in settings.tasks
    ]
    rows = sum(int(documents) for documents, _ in asked)
    read = sum(int(documents) * shots * READ_TOKENS for documents, shots in asked)
    return Estimate(rows, read=read)


def build(job: Job) -> StageResult:
    if not job.config.tasks:
        return job.write(SCHEMA.empty_table(), figures={"skipped": "the recipe names no tasks"})
    merged = job.constitution and job.parent("persona/merge").adapter
    with acquire(job.dataset, resource_requests(job)[0], job.placement.autoscaling_limit) as held:
        began = time.monotonic()
        table = measured(job, merged)
        held.busy = time.monotonic() - began
    outcome = job.write(table)
    if job.constitution:
        student = job.parent("evaluation/capabilities")
        base = student.store.read_table(student.dataset).to_pylist()
        found = scores(job.constitution.name, base, table.to_pylist())
        rows = pa.Table.from_pylist(found, schema=SCORES)
        job.store.write_table(job.dataset, rows, "scores")
    return outcome
