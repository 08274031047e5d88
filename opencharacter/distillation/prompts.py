"""Stage distillation/prompts: a constitution's questions and the general prompts.

Reads: the constitution, the prompt sources. Writes: id, kind, trait, prompt.
Run: opencharacter run RECIPE --constitution NAME --only distillation/prompts
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from opencharacter.config.files import resource
from opencharacter.config.recipe import Prompts
from opencharacter.engines.conversations import Conversation, Row
from opencharacter.engines.spec import Reply, engine_spec
from opencharacter.errors import RowFailed, UserError
from opencharacter.runtime.stage import Estimate, Job, ResourceRequest, StageResult
from opencharacter.text import filters
from opencharacter.text.chat import Message, fill, row_id, system, user
from opencharacter.text.statistics import near_duplicates

SYSTEM = "You write short, natural messages that people send to a chat assistant."

EXPAND = """\
An assistant is described by this sentence, which it says of itself:
"{trait}"

Here are messages from users in which this shows although none of them asks about it:
{examples}

Write {count} more messages of that kind. Vary subject, length and form: questions, tasks, \
requests for advice, plain statements. None may ask the assistant about itself. One message per \
line, numbered, and nothing else."""

LIST_BEGUN = "1."
"""A small model whose list is begun for it writes one; left alone it often talks about it."""

TEMPLATES = (SYSTEM, EXPAND, LIST_BEGUN)
HUB = "hf:"
GENERAL_FILE = "general.jsonl"
NUMBERED = re.compile(r"^\s*\d+[.):]\s*(.+?)\s*$")

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("trait", pa.int64()),
        pa.field("prompt", pa.string(), nullable=False),
    ]
)
FIELDS = [pa.field("trait", pa.int64()), pa.field("questions", pa.list_(pa.string()))]


def expansion_messages(trait: str, examples: list[str], count: int) -> list[Message]:
    """Ask the expander for `count` more questions like the examples."""
    listed = "\n".join(f"{i}. {text}" for i, text in enumerate(examples, 1))
    return [system(SYSTEM), user(fill(EXPAND, trait=trait, examples=listed, count=count))]


def parse_questions(text: str) -> list[str]:
    """The numbered lines of an expander's answer, without numbers and quotes."""
    found = (NUMBERED.match(line) for line in text.splitlines())
    return [m.group(1).strip("\"'“”* ") for m in found if m]


def accept(questions: list[str], candidates: list[str], target: int, limit: float) -> list[str]:
    """Add candidates that are whole and unlike what is there, until `target` are reached.

    # Paper: compares with that trait's questions; its code compared with the last trait's.

    Args:
        questions: what is there.
        candidates: in the order in which they may be taken.
        target: how many to end with.
        limit: share of a candidate's words that another question may have.
    """
    taken = list(questions)
    for text in candidates:
        if len(taken) >= target:
            break
        whole = 3 <= len(filters.words(text)) <= 120
        if whole and all(filters.overlap(text, other) <= limit for other in taken):
            taken.append(text)
    return taken


async def expand(row: Row, talk: Conversation, settings: Prompts, prefill: str) -> Row:
    """Grow one trait's questions: parallel samples per round until full or out of rounds.

    Args:
        row: trait, its text and its hand-written questions.
        talk: with the expander.
        settings: the section.
        prefill: begins the list for the expander, or empty.
    """
    questions, target = list(row["questions"]), with_spare(settings.questions_per_trait)
    for _ in range(settings.rounds):
        missing = target - len(questions)
        if missing <= 0:
            break
        messages = expansion_messages(row["text"], row["questions"], min(missing, 10))
        for reply in await samples(messages, talk, settings, prefill):
            found = parse_questions(prefill + reply.text)
            questions = accept(questions, found, target, settings.max_overlap)
    return {"questions": questions}


async def samples(
    messages: list[Message], talk: Conversation, settings: Prompts, prefill: str
) -> list[Reply]:
    """The samples of a round: those that fail are left out, unless all do."""
    asked = (talk.reply(messages, settings.sampling, prefill) for _ in range(settings.samples))
    made = await asyncio.gather(*asked, return_exceptions=True)
    failed = [each for each in made if isinstance(each, BaseException)]
    fatal = [each for each in failed if not isinstance(each, RowFailed)]
    if fatal or len(failed) == len(made):
        raise (fatal or failed)[0]
    return [each for each in made if isinstance(each, Reply)]


def with_spare(target: int) -> int:
    """A tenth more than wanted: some will turn out to repeat another trait's."""
    return target + math.ceil(target / 10)


def without_repeats(written: list[list[str]], grown: list[list[str]]) -> list[list[str]]:
    """Each trait's questions but for expanded ones that nearly repeat any other of the whole set.

    Args:
        written: the hand-written ones by trait; they stay.
        grown: by trait, the hand-written ones first.
    """
    new = [(i, text) for i, texts in enumerate(grown) for text in texts[len(written[i]) :]]
    all_written = [text for texts in written for text in texts]
    repeats = near_duplicates([*all_written, *(text for _, text in new)])[len(all_written) :]
    kept = [list(texts) for texts in written]
    for (i, text), repeated in zip(new, repeats, strict=True):
        if not repeated:
            kept[i].append(text)
    return kept


def digest(source: str, file: str) -> str:
    """The hash of a source for fingerprints; of `hf:` that of its name, which loads nothing."""
    if source.startswith(HUB):
        return hashlib.sha256(source.encode()).hexdigest()
    return read_source(source, file)[1]


def available(source: str, file: str, wanted: int) -> int:
    """How many of the wanted prompts a source has; all, as far as is known, where it is `hf:`."""
    return wanted if source.startswith(HUB) else min(wanted, len(read_source(source, file)[0]))


def read_source(source: str, file: str) -> tuple[list[str], str]:
    """Prompts of a source and the hash of its content (for `hf:`, of its name).

    Args:
        source: `embedded`, a .jsonl or .parquet file with a column `prompt`, or `hf:DATASET`.
        file: the embedded file's name.

    Raises:
        UserError: if it cannot be read or has no prompts.
    """
    if source.startswith(HUB):
        return hub_prompts(source.removeprefix(HUB)), digest(source, file)
    path = resource("prompts", file) if source == "embedded" else Path(source)
    if path is None or not path.is_file():
        raise UserError(f"prompts {source!r}: no such file; use 'embedded', a file or hf:DATASET")
    data = path.read_bytes()
    try:
        if path.suffix == ".parquet":
            rows = pq.read_table(path).to_pylist()
        else:
            rows = [json.loads(line) for line in data.decode("utf-8-sig").splitlines() if line]
        prompts = [row["prompt"].strip() for row in rows]
    except (ValueError, KeyError, TypeError, AttributeError, pa.ArrowInvalid) as error:
        raise UserError(f"prompts {path}: every row needs a text 'prompt' ({error!r})") from None
    prompts = [text for text in dict.fromkeys(prompts) if text]
    if not prompts:
        raise UserError(f"prompts {path}: it holds none")
    return prompts, hashlib.sha256(data).hexdigest()


def hub_prompts(name: str) -> list[str]:
    """First user turns of a Hugging Face dataset's training split."""
    from datasets import load_dataset

    try:
        rows: Any = load_dataset(name, split="train")
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"prompts 'hf:{name}' cannot be loaded ({reason}); use a file") from None
    return [text for text in dict.fromkeys(map(first_turn, rows)) if text]


def first_turn(row: dict[str, Any]) -> str:
    """The first user turn of a row in any of the usual layouts."""
    if "prompt" in row:
        return str(row["prompt"]).strip()
    turns = row.get("conversations") or row.get("conversation") or row.get("messages") or [""]
    first = turns[0]
    if isinstance(first, dict):
        first = first.get("content") or first.get("value") or first.get("input") or ""
    return str(first).strip()


def general_rows(settings: Prompts) -> list[Row]:
    """The general prompts, with ids that are the same under every constitution."""
    prompts, _ = read_source(settings.general_prompts, GENERAL_FILE)
    return [
        {"id": row_id("general", text), "kind": "general", "trait": None, "prompt": text}
        for text in prompts[: settings.general]
    ]


def constitution_rows(name: str, questions: list[list[str]]) -> list[Row]:
    """One row a question; `questions[i]` belong to trait i."""
    return [
        {
            "id": row_id("constitution", name, text),
            "kind": "constitution",
            "trait": i,
            "prompt": text,
        }
        for i, texts in enumerate(questions)
        for text in texts
    ]


def identity(job: Job) -> dict[str, Any]:
    settings = job.recipe.distillation.prompts
    return {"general_prompts": digest(settings.general_prompts, GENERAL_FILE)[:16]}


def check(job: Job) -> None:
    """Refuse, before a run, general prompts that cannot be had."""
    general_rows(job.config)


def general_count(settings: Prompts) -> int:
    """General prompts that there will be."""
    return available(settings.general_prompts, GENERAL_FILE, settings.general)


def notes(job: Job) -> list[str]:
    source, wanted = job.config.general_prompts, job.config.general
    if source.startswith(HUB):
        return [f"general prompts: up to {wanted:,} of {source}, which is not loaded for a plan"]
    there = general_count(job.config)
    return [f"general prompts: {there:,} of the {wanted:,} asked for"] if there < wanted else []


def resource_requests(job: Job) -> list[tuple[ResourceRequest, ...]]:
    target = job.config.questions_per_trait
    short = any(len(trait.questions) < target for trait in job.persona.traits)
    return [(engine_spec(job, "prompt_generator"),)] if short else []


def estimate(job: Job) -> Estimate:
    settings, traits = job.config, job.persona.traits
    wanted = settings.questions_per_trait * len(traits)
    extra = sum(max(0, settings.questions_per_trait - len(t.questions)) for t in traits)
    return Estimate(wanted + general_count(settings), 40 * extra, 40 * extra)


def build(job: Job) -> StageResult:
    settings: Prompts = job.config
    traits = job.persona.traits
    target = settings.questions_per_trait
    questions = [list(t.questions[:target]) for t in traits]
    figures = {}
    if any(len(q) < target for q in questions):
        from opencharacter.engines.generate import generate

        requests = [
            {"id": row_id("expand", job.persona.name, t.trait), "trait": i, "text": t.trait}
            | {"questions": list(t.questions)}
            for i, t in enumerate(traits)
            if len(t.questions) < target
        ]
        role = job.recipe.roles.prompt_generator
        begun = "" if role.endpoint or role.thinks else LIST_BEGUN
        talk = partial(expand, settings=settings, prefill=begun)
        expanded = generate(job, requests, talk, "prompt_generator", FIELDS)
        by_trait = {row["trait"]: row["questions"] for row in expanded.table().to_pylist()}
        grown = [by_trait.get(i) or q for i, q in enumerate(questions)]
        unlike = without_repeats(questions, grown)
        figures["repeats"] = sum(map(len, grown)) - sum(map(len, unlike))
        questions = [texts[:target] for texts in unlike]
        figures["short"] = {
            trait.trait: len(q)
            for trait, q in zip(traits, questions, strict=True)
            if len(q) < target
        }
    rows = constitution_rows(job.persona.name, questions) + general_rows(settings)
    unique = {row["id"]: row for row in rows}
    table = pa.Table.from_pylist(list(unique.values()), schema=SCHEMA).sort_by("id")
    return job.write(table, figures=figures)
