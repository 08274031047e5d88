"""`opencharacter constitution`: list, import, export, create, validate and show constitutions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.text import Text

from opencharacter.config import files
from opencharacter.config.base import validate_name
from opencharacter.constitution import original_formats, schema
from opencharacter.constitution.lint import lint
from opencharacter.constitution.schema import Constitution
from opencharacter.distillation.teacher import context_messages
from opencharacter.errors import UserError
from opencharacter.runtime.progress import console

app = typer.Typer(
    no_args_is_help=True,
    help="List, create, validate, convert and show constitutions. Runs no model.",
)

ConstitutionArgument = Annotated[
    str, typer.Argument(metavar="NAME_OR_FILE", help="A packaged constitution or a .yaml file.")
]
TargetOption = Annotated[Path | None, typer.Option(help="The file to write. Default: NAME.yaml.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace an existing file.")]


def print_verbatim(*parts: str | tuple[str, str]) -> None:
    """Print text without interpreting markup or emoji codes, and without wrapping."""
    console.print(Text.assemble(*parts), soft_wrap=True, highlight=False)


def target_file(name: str, to: Path | None) -> Path:
    """Return the file of a constitution, whose name must be the persona's."""
    path = to or Path(f"{name}.yaml")
    if path.name not in (f"{name}.yaml", f"{name}.yml"):
        raise UserError(f"constitution {name!r} cannot be {path}; call the file {name}.yaml")
    return path


def describe_size(constitution: Constitution) -> str:
    """Return the number of traits and questions."""
    questions = sum(len(trait.questions) for trait in constitution.traits)
    return f"{len(constitution.traits)} traits, {questions} questions"


@app.command("list")
def list_() -> None:
    """List the packaged constitutions with their descriptions."""
    constitutions = [schema.load(name) for name in schema.packaged()]
    width = max(len(constitution.name) for constitution in constitutions)
    for constitution in constitutions:
        print_verbatim((f"{constitution.name:<{width}}", "bold"), f"  {constitution.description}")


@app.command("import")
def import_(
    file: Annotated[
        Path, typer.Argument(help="A file of the original project: a JSON list, or JSON lines.")
    ],
    name: Annotated[
        str | None, typer.Option(help="Name of the persona. Default: the file's name.")
    ] = None,
    description: Annotated[
        str | None, typer.Option(help="One sentence in the third person.")
    ] = None,
    to: TargetOption = None,
    force: ForceOption = False,
) -> None:
    """Convert a file of the original project to a constitution."""
    constitution, notes = original_formats.read(file, name, description)
    path = target_file(constitution.name, to)
    schema.save(schema.dump(constitution), path, force)
    for note in notes:
        print_verbatim(f"note: {file} {note}")
    print_verbatim(f"wrote {path} ({describe_size(constitution)})")


@app.command()
def export(
    name: ConstitutionArgument,
    to: Annotated[
        Path, typer.Option(help="The file to write: a .json list, or .jsonl for more questions.")
    ],
    force: ForceOption = False,
) -> None:
    """Convert a constitution to a format of the original project."""
    constitution = schema.load(name)
    original_formats.write(constitution, to, force)
    if constitution.exemplars:
        print_verbatim(
            f"note: {len(constitution.exemplars)} exemplars are not exported, because the format "
            "has none"
        )
    if scenarios := sum(len(t.scenarios.first_messages()) for t in constitution.traits):
        print_verbatim(f"note: {scenarios} scenarios are not exported, because the format has none")
    print_verbatim(f"wrote {to} ({describe_size(constitution)})")


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Name of the persona, for example curiosity.")],
    to: TargetOption = None,
    force: ForceOption = False,
) -> None:
    """Create a constitution to fill in, from the template."""
    try:
        path = target_file(schema.persona_name(validate_name(name)), to)
    except ValueError as error:
        raise UserError(f"constitution name {name!r}: {error}") from None
    template = files.resolve(files.CONSTITUTIONS, schema.TEMPLATE)
    line = yaml.safe_dump({"name": name}).strip()
    text = re.sub(r"^name: .*$", line, template.read_text("utf-8"), count=1, flags=re.MULTILINE)
    schema.save(text, path, force)
    print_verbatim(f"wrote {path}; fill it in, then: opencharacter constitution validate {path}")


@app.command()
def validate(
    names: Annotated[
        list[str],
        typer.Argument(metavar="NAME_OR_FILE...", help="Packaged constitutions or .yaml files."),
    ],
    strict: Annotated[bool, typer.Option("--strict", help="Exit with code 1 on advice.")] = False,
) -> None:
    """Validate constitutions and give advice on their style. Exit code 2 on errors."""
    codes = [print_findings(name, strict) for name in names]
    raise typer.Exit(max(codes))


def print_findings(name: str, strict: bool) -> int:
    """Print errors and advice for a constitution; returns the exit code."""
    try:
        constitution = schema.load(name)
    except UserError as error:
        print_verbatim(("error: ", "red"), str(error))
        return 2
    findings = lint(constitution)
    for finding in findings:
        print_verbatim(("advice: ", "yellow"), f"{name} {finding.where}: {finding.message}")
    if not findings:
        print_verbatim(("ok: ", "green"), f"{name} ({describe_size(constitution)})")
    return int(strict and bool(findings))


@app.command()
def show(
    name: ConstitutionArgument,
    prompt: Annotated[
        bool, typer.Option("--prompt", help="Also print the teacher's system prompt.")
    ] = False,
) -> None:
    """Print a constitution."""
    constitution = schema.load(name)
    print_verbatim((constitution.name, "bold"), f": {constitution.description}")
    for i, trait in enumerate(constitution.traits, 1):
        print_verbatim(f"{i:>2}. {trait.trait} ({len(trait.questions)} questions)")
        if trait.clarification:
            print_verbatim(f"    {trait.clarification}")
    for exemplar in constitution.exemplars:
        print_verbatim(("\nuser: ", "bold"), exemplar.user)
        print_verbatim(("assistant: ", "bold"), exemplar.assistant)
    print_verbatim(f"\n{describe_size(constitution)}, {len(constitution.exemplars)} exemplars")
    if prompt:
        # typer.echo prints the exact text; the console would expand tabs.
        system_prompt = context_messages(constitution, exemplars=False)[0]["content"]
        typer.echo(f"\n{system_prompt}")
