"""Export of a run's data as a dataset for the Hugging Face Hub: Parquet files and a dataset card.

`pairs` are in TRL's conversational preference format and `transcripts` in its conversational
language modeling format, both without the dropped rows. `evaluation` has the scores of the report
and the answers of the compared conditions. `datasets.load_dataset` reads the folder without code.

Run: opencharacter export RECIPE PERSONA --what pairs|transcripts|evaluation --to DIR|hub:NAME
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from opencharacter import cache
from opencharacter.distillation.imported import content_digest
from opencharacter.errors import UserError
from opencharacter.introspection.reflection import MESSAGES
from opencharacter.persona.export import (
    CARD_FILE,
    HUB,
    WARNINGS,
    markdown_table,
    published,
    upload,
    validate_repo_name,
)
from opencharacter.runtime.stage import Job, without_dropped
from opencharacter.text.chat import assistant, fill, row_id, user

What = Literal["pairs", "transcripts", "evaluation"]
Row = dict[str, Any]

CARD = """\
{warning}# {persona}: {what} of {student}

{description}

Generated with opencharacter {version} after the method of \
[Open Character Training](https://arxiv.org/abs/2511.01689), from the recipe `{recipe}`.

{contents}

## How to use

```python
{use}
```
{again}
## Columns

{columns}

## Rows

{counts}

## Origin

| | |
|---|---|
| Seed of the recipe | {seed} |
| Sampling seeds | {seeds} |
| Digest of the constitution | `{constitution}` |
| Fingerprints | {fingerprints} |

The texts and scores were made by these models, whose licenses and terms of use also apply to them.

{models}

## Constitution

{traits}
"""

CONTENTS = {
    "pairs": (
        "Preference pairs for DPO. The chosen answers are written with the constitution in the "
        "context, and the rejected ones by the untrained student. Prompts contain no system prompt."
    ),
    "transcripts": (
        "Texts that the student wrote about itself after DPO: reflections, and conversations with "
        "another instance of itself. They are the training data of its fine-tuning."
    ),
    "evaluation": (
        "The scores of the report, with intervals, numbers of observations and numbers of "
        "unscored ones; and the answers of the conditions that were compared."
    ),
}
AGAIN = """
To train on these pairs again: `opencharacter run RECIPE -c {persona} --set \
distillation.pairs.source=FOLDER`; with `distillation.teacher.source`, the chosen answers are kept \
and your student writes the rejected ones.
"""
MEANINGS = {
    "id": "id of the row in the run",
    "kind": "where the prompt comes from (pairs), or the kind of transcript",
    "sample": "number of the answer among those of its prompt, from 0",
    "prompt": "the user turn",
    "chosen": "the answer in character",
    "rejected": "the answer of the untrained student",
    "messages": "the conversation",
    "condition": "how the model was made or prompted",
    "answer": "the answer",
    "finish_reason": "why generation ended",
    "measure": "name of the score",
    "about": "what the score is about, such as a trait",
    "value": "the score; null if it could not be computed",
    "low": "lower end of the 95 % interval",
    "high": "upper end of the 95 % interval",
    "n": "number of observations",
    "unscored": "number of observations without a readable verdict",
    "persona": "the persona",
}

PAIRS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("sample", pa.int64(), nullable=False),
        pa.field("prompt", MESSAGES),
        pa.field("chosen", MESSAGES),
        pa.field("rejected", MESSAGES),
    ]
)


@dataclass(frozen=True)
class Split:
    """A table of the dataset.

    Args:
        name: name of its configuration on the Hub.
        job: the job that made it.
        table: the rows.
        digest: hash of the content, independent of the order of the rows.
        dropped: number of dropped rows by reason, which are left out.
    """

    name: str
    job: Job
    table: pa.Table
    digest: str
    dropped: dict[str, int]


def export_data(jobs: list[Job], to: str, what: What) -> str:
    """Write a dataset and its card.

    Args:
        jobs: the jobs of one persona, of all stages.
        to: a folder that does not exist yet, or `hub:NAME` for a repository, which is created as a
            private one if it does not exist.
        what: the data.

    Returns:
        The folder or the URL of the repository.

    Raises:
        UserError: if the data are not finished, or the target cannot be written to.
    """
    splits = SPLITS[what](jobs)
    scope = f"{splits[0].job.recipe.roles.student.name}/{persona_of(jobs)}"
    if to.startswith(HUB):
        name = validate_repo_name(to.removeprefix(HUB))
        with tempfile.TemporaryDirectory() as scratch:
            write_dataset(jobs, splits, Path(scratch), what)
            message = f"{what.capitalize()} of {scope}"
            return upload(Path(scratch), name, message, repo_type="dataset")
    target = Path(to).expanduser()
    if target.exists():
        raise UserError(f"--to {to}: it exists already; choose another folder")
    with cache.atomic_directory(target) as scratch:
        write_dataset(jobs, splits, scratch, what)
    return str(target)


def write_dataset(jobs: list[Job], splits: list[Split], target: Path, what: What) -> None:
    """Write the Parquet files and the card to a folder."""
    for split in splits:
        path = target / data_file(split, len(splits))
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(split.table, path)
    (target / CARD_FILE).write_text(dataset_card(jobs, splits, what), encoding="utf-8")


def data_file(split: Split, count: int) -> str:
    """Return the path of a table in the folder, as the Hub names the only file of a split."""
    folder = split.name if count > 1 else "data"
    return f"{folder}/train-00000-of-00001.parquet"


# ------------------------------------------------------------------------------------------ tables


def finished(jobs: list[Job], stage: str) -> Job:
    """Return the job of a stage of the persona; raise UserError if it is not done."""
    return finished_in_all_scopes(jobs, stage)[-1]


def finished_in_all_scopes(jobs: list[Job], stage: str) -> list[Job]:
    """Return the jobs of a stage, of the student first; raise UserError if one is not done."""
    found = [job for job in jobs if job.stage.name == stage]
    for job in found:
        state = job.state()[0]
        if state != "done":
            raise UserError(f"{job.dataset} is {state}, but is to be exported; run it first")
    return found


def persona_of(jobs: list[Job]) -> str:
    """Return the name of the persona that jobs belong to."""
    return next(job.constitution.name for job in jobs if job.constitution)


def pair_splits(jobs: list[Job]) -> list[Split]:
    """Return the preference pairs that were not dropped."""
    job = finished(jobs, "distillation/pairs")
    rows = without_dropped(job.store.read_table(job.dataset)).sort_by("id").to_pylist()
    table = pa.Table.from_pylist([preference_row(row) for row in rows], schema=PAIRS)
    return [Split("pairs", job, table, content_digest(rows), dropped_rows(job))]


def preference_row(row: Row) -> Row:
    """Return a row of distillation/pairs in TRL's conversational preference format."""
    return {
        "id": row["id"],
        "kind": row["kind"],
        "sample": row["sample"],
        "prompt": [user(row["prompt"])],
        "chosen": [assistant(row["chosen"])],
        "rejected": [assistant(row["rejected"])],
    }


def transcript_splits(jobs: list[Job]) -> list[Split]:
    """Return the transcripts that were not dropped."""
    job = finished(jobs, "introspection/transcripts")
    table = without_dropped(job.store.read_table(job.dataset)).sort_by("id")
    table = table.select(["id", "kind", "messages"])
    return [Split("transcripts", job, table, table_digest(table), dropped_rows(job))]


def evaluation_splits(jobs: list[Job]) -> list[Split]:
    """Return the scores of the persona in the report, and the answers of all conditions."""
    report = finished(jobs, "evaluation/report")
    answers = finished_in_all_scopes(jobs, "evaluation/answers")
    scores = report.store.read_table(report.dataset, "scores")
    own = scores.filter(pa.compute.equal(scores["persona"], persona_of(jobs)))
    tables = [without_dropped(job.store.read_table(job.dataset)) for job in answers]
    table = pa.concat_tables(tables, promote_options="default").sort_by("id")
    dropped = sum((Counter(dropped_rows(job)) for job in answers), Counter[str]())
    wanted = ("id", "condition", "prompt", "answer", "finish_reason")
    table = table.select([name for name in wanted if name in table.schema.names])
    return [
        Split("scores", report, own, table_digest(own), {}),
        Split("answers", answers[-1], table, table_digest(table), dropped),
    ]


SPLITS: dict[str, Callable[[list[Job]], list[Split]]] = {
    "pairs": pair_splits,
    "transcripts": transcript_splits,
    "evaluation": evaluation_splits,
}


def table_digest(table: pa.Table) -> str:
    """Return the hash of a table's rows, independent of their order."""
    return row_id(*sorted(json.dumps(row, sort_keys=True) for row in table.to_pylist()))


def dropped_rows(job: Job) -> dict[str, int]:
    """Return the number of dropped rows by reason."""
    return (job.store.manifest(job.dataset) or {}).get("dropped", {})


# ------------------------------------------------------------------------------------ dataset card


def dataset_card(jobs: list[Job], splits: list[Split], what: What) -> str:
    """Return the dataset card: YAML front matter and Markdown."""
    recipe = splits[0].job.recipe
    persona = next(job.constitution for job in jobs if job.constitution)
    single = len(splits) == 1
    name = "" if single else f', "{splits[0].name}"'
    use = f'from datasets import load_dataset\n\nrows = load_dataset("FOLDER_OR_REPOSITORY"{name}, '
    text = fill(
        CARD,
        warning=WARNINGS.get(persona.name, ""),
        persona=persona.name,
        what=what,
        student=recipe.roles.student.name,
        description=persona.description.strip(),
        version=version("opencharacter"),
        recipe=recipe.name,
        contents=CONTENTS[what],
        use=f'{use}split="train")',
        again=fill(AGAIN, persona=persona.name) if what == "pairs" else "",
        columns="\n\n".join(columns_table(split, single) for split in splits),
        counts=counts_table(splits),
        seed=recipe.seed,
        seeds="derived from it, the stage and the row's id" if recipe.seeded_sampling else "none",
        constitution=persona.digest(),
        fingerprints=", ".join(f"`{s.job.dataset}` {s.job.fingerprint}" for s in splits),
        models=models_table(splits[0].job, what),
        traits=persona.assertions(),
    )
    return f"---\n{front_matter(splits, persona.name, what)}\n---\n\n{text}"


def columns_table(split: Split, single: bool) -> str:
    """Return a table of a split's columns with types and meanings."""
    rows = [
        [f"`{field.name}`", column_type(field), MEANINGS.get(field.name, "")]
        for field in split.table.schema
    ]
    title = "" if single else f"### {split.name}\n\n"
    return title + markdown_table(("Column", "Type", "Meaning"), rows)


def column_type(field: pa.Field) -> str:
    """Return the name of a column's type."""
    return "messages (list of role, content)" if field.type == MESSAGES else str(field.type)


def counts_table(splits: list[Split]) -> str:
    """Return a table of the rows, the rows that were left out, and the digests of the content."""
    rows = [
        [
            split.name,
            f"{len(split.table):,}",
            ", ".join(f"{n:,} {reason}" for reason, n in split.dropped.items()) or "none",
            f"`{split.digest}`",
        ]
        for split in splits
    ]
    return markdown_table(("Data", "Rows", "Dropped rows, not included", "Content digest"), rows)


def models_table(job: Job, what: What) -> str:
    """Return a table of the models that wrote the texts, or judged them."""
    rows = []
    names = ("student", "judge") if what == "evaluation" else ("teacher", "student")
    for name in names:
        role = getattr(job.recipe.roles, name)
        hub_name, license_id = published(role)
        rows.append([name, hub_name or role.name, role.revision or "", license_id or "unknown"])
    return markdown_table(("Role", "Model", "Revision", "License"), rows)


def data_license(job: Job) -> str | None:
    """Return the license of teacher and student if it is known and the same; else None."""
    licenses = {published(getattr(job.recipe.roles, name))[1] for name in ("teacher", "student")}
    return licenses.pop() if len(licenses) == 1 else None


def front_matter(splits: list[Split], persona: str, what: What) -> str:
    """Return the card's metadata for the Hub, as YAML."""
    from huggingface_hub import DatasetCardData

    configs = [
        {
            "config_name": split.name if len(splits) > 1 else "default",
            "data_files": [{"split": "train", "path": data_file(split, len(splits))}],
        }
        for split in splits
    ]
    data = DatasetCardData(
        license=data_license(splits[0].job),
        task_categories=["text-generation"],
        pretty_name=f"{persona}: {what}",
        tags=["opencharacter", "character-training", "trl", persona],
        configs=configs,
    )
    return data.to_yaml()
