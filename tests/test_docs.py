"""The commands and code in the documentation work.

An HTML comment before each shell or Python block says how the block is tested:

`<!-- test: run -->`    every command is executed in a temporary folder, with two exceptions: the
                        recipe `demo` uses the echo model and ends early, and `chat` is only parsed.
`<!-- test: parse (reason) -->`  the commands and options exist, but the block is not executed.
`<!-- test: make -->`   the targets exist in the Makefile.
`<!-- test: skip (reason) -->`   not tested.

A YAML block whose first line is a comment with a file name is written to that file.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
import yaml
from samples import ECHO_ROLE, cli

from opencharacter.cli.main import app
from opencharacter.config import files
from opencharacter.constitution.schema import PLACEHOLDERS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CLUSTER_PAGES = sorted((ROOT / "clusters").rglob("*.md"))
BLOCK = re.compile(
    r"(?:<!-- test: (?P<kind>\w+)(?: \([^)]*\))? -->\n)?```(?P<language>\w*)\n(?P<text>.*?)```",
    re.DOTALL,
)
KINDS = {"run", "parse", "make", "skip"}
SEPARATORS = {"&&", "|", ";"}
ECHO_DEMO = {
    "extends": "demo",
    "name": "demo",
    "roles": dict.fromkeys(("teacher", "student", "judge", "prompt_generator"), ECHO_ROLE),
}


class Block(NamedTuple):
    """A fenced block of a page."""

    kind: str | None
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    matches = BLOCK.finditer(page.read_text())
    return [Block(m["kind"], m["language"], m["text"]) for m in matches]


def commands(text: str, program: str) -> list[list[str]]:
    """Return the arguments of each call of a program in a shell block."""
    calls = []
    for line in text.replace("\\\n", " ").splitlines():
        if program not in line:
            continue
        words = shlex.split(line, comments=True)
        starts = [
            i
            for i, word in enumerate(words)
            if word in (program, f".venv/bin/{program}")
            and (i == 0 or words[i - 1] in ("--", *SEPARATORS))
        ]
        for start in starts:
            arguments = words[start + 1 :]
            ends = [i for i, word in enumerate(arguments) if word in SEPARATORS]
            calls.append(arguments[: min(ends, default=len(arguments))])
    return calls


def parse(arguments: list[str]) -> None:
    """Parse arguments as the command line does, without running the command.

    Raises:
        Exception: of Typer, if a command or an option does not exist.
    """
    found = typer.main.get_command(app)
    rest = list(arguments)
    while hasattr(found, "commands"):
        if rest[0] in found.commands:
            found = found.commands[rest.pop(0)]
        else:
            assert found.name == "serve", f"no command {rest[0]!r}"
            found = found.commands["start"]
    found.make_context(found.name, rest)


def shell_blocks(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language == "sh"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_of_commands_or_code_says_how_it_is_tested(page):
    for block in blocks(page):
        if block.language in ("sh", "python"):
            assert block.kind in KINDS, block.text


@pytest.mark.parametrize("page", [*PAGES, *CLUSTER_PAGES], ids=lambda page: str(page)[-30:])
def test_every_documented_command_and_option_exists(page):
    for block in blocks(page):
        if block.language in ("sh", "") and block.kind != "skip":
            for arguments in commands(block.text, "opencharacter"):
                parse(arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_documented_make_target_exists(page):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for block in shell_blocks(page):
        for arguments in commands(block.text, "make"):
            assert set(arguments) <= set(targets)


def test_an_option_that_does_not_exist_is_noticed():
    with pytest.raises(Exception, match="No such option"):
        parse(["run", "demo", "-c", "poeticism", "--no-such"])


def with_echo_demo(arguments: list[str]) -> list[str]:
    """Name the recipe that uses the echo model instead of the packaged `demo`."""
    echo = ["demo.yaml" if word == "demo" else word for word in arguments]
    return [*echo, "--until", "distillation/student"] if arguments[0] == "run" else echo


def fill_in(constitution: Path) -> None:
    """Replace the template's placeholders, as its author would."""
    text = constitution.read_text()
    for placeholder in PLACEHOLDERS:
        text = text.replace(placeholder, "with curiosity")
    constitution.write_text(text)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(block.kind == "run" for block in blocks(page))],
    ids=lambda page: page.stem,
)
def test_documented_commands_and_code_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("demo.yaml").write_text(yaml.safe_dump(ECHO_DEMO))
    for block in blocks(page):
        first_line = block.text.partition("\n")[0]
        if block.language == "yaml" and (named := re.fullmatch(r"# (\S+\.yaml)", first_line)):
            text = block.text.replace("extends: demo\n", "extends: demo.yaml\n")
            Path(named[1]).write_text(text)
        if block.kind == "run" and block.language == "python":
            exec(compile(block.text, str(page), "exec"), {})
        if block.kind != "run" or block.language != "sh":
            continue
        for arguments in commands(block.text, "opencharacter"):
            if arguments[0] == "chat":
                continue
            if arguments[0] == "run":
                finished = cli(*with_echo_demo(arguments), cwd=tmp_path)
                assert finished.returncode == 0, finished.stdout + finished.stderr
            else:
                app(with_echo_demo(arguments), standalone_mode=False)
            if arguments[:2] == ["constitution", "new"]:
                fill_in(Path(f"{arguments[2]}.yaml"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_to_files_of_the_repository_exist(page):
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text()):
        if not target.startswith("reference/"):
            assert (page.parent / target).exists(), target


def test_the_readme_has_at_most_12_kb():
    assert (ROOT / "README.md").stat().st_size <= 12_000


def test_recipes_and_placements_named_in_commands_are_packaged():
    names = {*files.packaged(files.PLACEMENTS)}
    for page in [*PAGES, *CLUSTER_PAGES]:
        for block in blocks(page):
            for arguments in commands(block.text, "opencharacter"):
                if "--placement" in arguments:
                    name = arguments[arguments.index("--placement") + 1]
                    assert name in names or f"# {name}\n" in page.read_text()
