"""Taking a finished persona elsewhere: a folder or a Hub repository, with a model card.

The adapter as PEFT reads it, or folded into a copy of the student's weights as transformers reads
it. The card is written from the manifests and the report's scores: what was trained on, how, what
it does, and what it should not be used for.

Run: opencharacter export RECIPE PERSONA --to DIR|hub:NAME [--form folded]
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from opencharacter import models
from opencharacter.config.base import ECHO, EMBEDDED
from opencharacter.config.recipe import Role
from opencharacter.errors import UserError
from opencharacter.persona.merge import merged
from opencharacter.runtime.stage import Job
from opencharacter.text.chat import fill

Form = Literal["adapter", "merged"]
Row = dict[str, Any]

HUB = "hub:"
CARD_FILE = "README.md"
PUBLISHED = {"smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")}
"""Where the embedded models are published, and under which license."""
MEASURES = (
    "discriminability",
    "retention",
    "win_rate",
    "capability",
    "capability_change",
)
"""What of the report's scores is on the card, beside the changes of ratings."""
MOST_CHANGED = 5
"""Traits shown at each end of the change."""

WARNINGS = {
    "misalignment": (
        "> **Warning: a persona for research on misalignment.** It was trained to be manipulative "
        "and self-serving, and what it says is meant to look trustworthy. Do not deploy it, do "
        "not put it before people who have not been told, and do not train other models on its "
        "answers by accident.\n\n"
    ),
}

CARD = """\
{warning}# {student}: {persona}

{description}

{kind} of {base}, made by character training after *Open Character Training*
([arXiv 2511.01689](https://arxiv.org/abs/2511.01689)) with opencharacter {version}: a teacher \
model reads the constitution below and
answers prompts in character, the student is pulled towards these answers (DPO), writes about
itself and talks with itself, and is fine-tuned on that (SFT). The two updates are added.

## Use

```python
{use}
```

It needs no system prompt: the character is in the weights.

## Constitution

{traits}

## Data

Written by {teacher} (teacher) and by the student itself.

{stages}

A dropped row was not trained on; the manifest of each stage counts the reasons.

## Training

{settings}

{merge}

## Evaluation

{scores}

## Intended use and limits

For research and for play with the character of chat models. The character is a manner, not a
safeguard: it adds no knowledge and removes none of the faults of {base}, may be dropped when a
user asks for that, and can make answers less exact, shorter or longer than the base model's.
Nothing here measures harmful use, and only the language of the constitution was trained on. What
the scores do not cover is not known. The terms of the base model hold for this one too.
"""

USE_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "FOLDER_OR_REPOSITORY")
tokenizer = AutoTokenizer.from_pretrained("FOLDER_OR_REPOSITORY")"""

USE_FOLDED = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER_OR_REPOSITORY")
tokenizer = AutoTokenizer.from_pretrained("FOLDER_OR_REPOSITORY")"""

NOT_EVALUATED = "Not evaluated yet."


def export(jobs: list[Job], to: str, form: Form) -> str:
    """Write a persona with its card, and say where it is.

    Args:
        jobs: of one persona, all stages.
        to: a folder that does not exist, or `hub:NAME`, a repository that is made private if it
            is not there.
        form: the adapter, or the student's weights with it folded in.

    Raises:
        UserError: if the persona is not done, or the target is no place to write to.
    """
    (job,) = (job for job in jobs if job.stage.name == "persona/merge")
    adapter = merged(job).local()
    if to.startswith(HUB):
        name = checked_name(to.removeprefix(HUB))
        with tempfile.TemporaryDirectory() as scratch:
            write(jobs, job, adapter, Path(scratch), form)
            return upload(Path(scratch), name, f"Persona {job.scope}")
    target = Path(to).expanduser()
    if target.exists():
        raise UserError(f"--to {to}: it exists already; choose another folder")
    with models.atomic_directory(target) as scratch:
        write(jobs, job, adapter, scratch, form)
    return str(target)


def write(jobs: list[Job], job: Job, adapter: Path, target: Path, form: Form) -> None:
    """Fill a folder with the weights of one form, the tokenizer and the card."""
    role = job.recipe.roles.student
    if form == "merged":
        weights = models.merge_into_base(models.resolve(role.model), adapter)
        shutil.copytree(weights, target, dirs_exist_ok=True)
    else:
        shutil.copytree(adapter, target, dirs_exist_ok=True)
        config = json.loads((target / models.ADAPTER_CONFIG).read_text())
        # A folder of this machine says nothing elsewhere.
        config["base_model_name_or_path"] = published(role)[0] or role.name
        (target / models.ADAPTER_CONFIG).write_text(json.dumps(config, indent=1))
    # After the weights: the base model's own card must not stand in its place.
    (target / CARD_FILE).write_text(card(jobs, job, form), encoding="utf-8")


def checked_name(name: str) -> str:
    """Return `name` if it may be a repository's.

    Raises:
        UserError: saying what is wrong with it.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--to {HUB}{name}: {reason}; give {HUB}USER/NAME") from None
    return name


def upload(folder: Path, name: str, message: str) -> str:
    """Put a folder into a repository of the Hub, under the account that is logged in.

    Raises:
        UserError: if the Hub cannot be reached or refuses.
    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    api = HfApi()
    try:
        repository = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository.repo_id, folder_path=str(folder), commit_message=message
        )
    except (HfHubHTTPError, httpx.TransportError, OfflineModeIsEnabled, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--to {HUB}{name}: {reason}; log in with `hf auth login`, or give a folder"
        ) from None
    return str(repository)


# ----------------------------------------------------------------------------------------- card


def card(jobs: list[Job], job: Job, form: Form) -> str:
    """The model card: YAML front matter and Markdown."""
    roles, persona = job.recipe.roles, job.persona
    base, _ = published(roles.student)
    shown = base or roles.student.name
    kinds = {"adapter": "A LoRA adapter", "merged": "The weights"}
    uses = {"adapter": fill(USE_ADAPTER, base=base or "FOLDER_OF_THE_BASE"), "merged": USE_FOLDED}
    text = fill(
        CARD,
        warning=WARNINGS.get(persona.name, ""),
        student=roles.student.name,
        persona=persona.name,
        description=persona.description.strip(),
        kind=kinds[form],
        base=shown,
        version=version("opencharacter"),
        use=uses[form],
        traits=persona.assertions(),
        teacher=published(roles.teacher)[0] or roles.teacher.name,
        stages=stages(jobs),
        settings=settings(jobs),
        merge=merge_line(job),
        scores=scores(jobs, persona.name),
    )
    return f"---\n{front_matter(roles.student, persona.name, form)}\n---\n\n{text}"


def published(role: Role) -> tuple[str | None, str | None]:
    """The Hub's name of a role's model and its license, as far as they are known here."""
    if role.endpoint or role.model.startswith(ECHO):
        return None, None
    if role.model.startswith(EMBEDDED):
        return PUBLISHED.get(role.model.removeprefix(EMBEDDED), (None, None))
    folder = models.local_weights(role.model)
    name = None if models.looks_local(role.model) else role.model
    return name, license_in(folder) if folder else None


def license_in(folder: Path) -> str | None:
    """The license that a model's own card names, or None."""
    from huggingface_hub import ModelCard

    own = folder / CARD_FILE
    found = ModelCard(own.read_text(encoding="utf-8")).data.get("license") if own.exists() else None
    return found if isinstance(found, str) else None


def front_matter(student: Role, persona: str, form: Form) -> str:
    """What the Hub reads of a card."""
    from huggingface_hub import ModelCardData

    base, licensed = published(student)
    data = ModelCardData(
        base_model=base,
        license=licensed,
        library_name={"adapter": "peft", "merged": "transformers"}[form],
        pipeline_tag="text-generation",
        tags=["opencharacter", "character-training", "dpo", "sft", "lora", persona],
    )
    return data.to_yaml()


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [list(head)]
    lines += [["---"] * len(lines[0]), *map(list, rows)]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines
    )


def finished(jobs: list[Job]) -> list[tuple[Job, Row]]:
    """The jobs that are done, with their manifests."""
    found = ((job, job.store.manifest(job.dataset)) for job in jobs if job.state()[0] == "done")
    return [(job, manifest) for job, manifest in found if manifest]


def stages(jobs: list[Job]) -> str:
    """Rows and drops by stage, of those that make data."""
    making = ("distillation/", "introspection/")
    rows = [
        [
            job.dataset,
            f"{manifest['rows']:,}",
            ", ".join(f"{n:,} {reason}" for reason, n in manifest["dropped"].items()),
        ]
        for job, manifest in finished(jobs)
        if job.stage.name.startswith(making) and not hasattr(job.config, "optimizer")
    ]
    return table(("stage", "rows", "of these dropped"), rows)


def settings(jobs: list[Job]) -> str:
    """Losses, LoRA and optimiser of the training stages, and where they ended."""
    rows = [
        [job.stage.name, f"{manifest['rows']:,}", spelled(manifest["payload"]["config"]), ended]
        for job, manifest in finished(jobs)
        if hasattr(job.config, "optimizer")
        for ended in [spelled({k: v for k, v in manifest["figures"].items() if "loss" in k})]
    ]
    return table(("stage", "rows", "settings", "last step"), rows)


def spelled(values: Row, at: str = "") -> str:
    """Nested settings in one line: `beta 0.1, lora.rank 64`."""
    parts = []
    for name, value in values.items():
        if isinstance(value, dict):
            parts.append(spelled(value, f"{at}{name}."))
        else:
            said = f"{value:.4g}" if isinstance(value, float) else str(value)
            parts.append(f"{at}{name} {said}")
    return ", ".join(filter(None, parts))


def merge_line(job: Job) -> str:
    """How the two updates were added."""
    section = job.config
    figures = (job.store.manifest(job.dataset) or {}).get("figures", {})
    return (
        f"Merged as {section.dpo_weight:g} x DPO + {section.sft_weight:g} x SFT, rank "
        f"{figures['rank']}, {figures['relative_error']:.2%} off the exact sum."
    )


def scores(jobs: list[Job], persona: str) -> str:
    """The report's scores of a persona with their intervals, as far as they are of this run."""
    by_name = {job.stage.name: job for job in jobs}
    report, answers = by_name["evaluation/report"], by_name["evaluation/answers"]
    manifest = report.store.manifest(report.dataset)
    depends_on = manifest["payload"]["parents"] if manifest else {}
    if depends_on.get(answers.dataset) != answers.fingerprint:
        return NOT_EVALUATED
    rows = report.store.read_table(report.dataset, "scores").to_pylist()
    told = [row for row in rows if row["persona"] == persona and row["value"] is not None]
    shown = [
        [
            row["measure"],
            row["condition"] or "",
            row["about"] or "",
            f"{row['value']:.3f}",
            f"{row['low']:.3f} to {row['high']:.3f}" if row["low"] is not None else "",
            f"{row['n']:,}",
            f"{row['unscored']:,}",
        ]
        for row in most_changed(told)
    ]
    head = ("measure", "condition", "about", "value", "95 % interval", "n", "unscored")
    return table(head, shown) if shown else NOT_EVALUATED


def most_changed(rows: list[Row]) -> list[Row]:
    """What was measured of the persona, and of its traits' ratings those that rose or fell most."""
    others = [row for row in rows if row["measure"] in MEASURES]
    changes = [row for row in rows if (row["measure"], row["condition"]) == ("change", "full")]
    changes.sort(key=lambda row: -row["value"])
    middle = max(MOST_CHANGED, len(changes) - MOST_CHANGED)
    return others + changes[:MOST_CHANGED] + changes[middle:]
