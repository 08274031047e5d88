"""Every bad input: one line that names the value, the limit and the remedy, exit code 2."""

import json
import re
from pathlib import Path

import pytest
import yaml
from samples import ECHO_ROLE, TINY

from opencharacter.cli import main

ROLES = ("teacher", "student", "judge", "prompt_generator")
POET = ("--constitution", "poeticism")


def recipe(tmp_path: Path, **changes) -> str:
    roles = dict.fromkeys(ROLES, ECHO_ROLE)
    return write(tmp_path / "tiny.yaml", {**TINY, "roles": roles, **changes})


def student(tmp_path: Path, **changes) -> str:
    roles = dict.fromkeys(ROLES, ECHO_ROLE) | {"student": ECHO_ROLE | changes}
    return write(tmp_path / "tiny.yaml", {**TINY, "roles": roles})


def panel(tmp_path: Path, **changes) -> str:
    return recipe(tmp_path, evaluation={"judge": {"panel": [ECHO_ROLE | changes]}})


def write(path: Path, data: object) -> str:
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return str(path)


def persona(tmp_path: Path, text: str, name: str = "odd") -> tuple[str, str]:
    return "--constitution", write(tmp_path / f"{name}.yaml", text)


TRAIT = """
  - trait: I am plain.
    questions: [one one, two two, three three, four four, five five]
"""
GOOD = f"name: odd\ndescription: A sentence.\ntraits:{TRAIT}"

CASES = {
    "unknown recipe": lambda t: (["nonesuch", *POET], "nonesuch.*demo"),
    "recipe file absent": lambda t: (["./nope.yaml", *POET], "no such file"),
    "unknown recipe field": lambda t: (
        [recipe(t, sead=3), *POET],
        "unknown field 'sead'",
    ),
    "value out of range": lambda t: (
        [recipe(t, distillation={"dpo": {"beta": -1}}), *POET],
        r"distillation\.dpo\.beta = -1.*greater than 0",
    ),
    "negative seed": lambda t: (
        [recipe(t, seed=-1), *POET],
        "seed = -1.*greater than or equal to 0",
    ),
    "seed beyond 32 bits": lambda t: (
        [recipe(t, seed=2**32), *POET],
        "seed = 4294967296.*less than 4294967296",
    ),
    "answers that cannot be paired": lambda t: (
        [recipe(t, distillation={"teacher": {"answers": 3}}), *POET],
        r"distillation: teacher\.answers is 3 and student\.answers 5.*make them equal",
    ),
    "nothing for sft to learn": lambda t: (
        [
            recipe(
                t,
                introspection={
                    "reflection": {"transcripts_per_prompt": 0},
                    "interaction": {"free": 0, "leading": 0},
                },
            ),
            *POET,
        ],
        "all 0, which leaves sft nothing to learn; raise one",
    ),
    "unknown stage to rebuild": lambda t: (
        [recipe(t), *POET, "--rebuild", "distil/dpo"],
        "'distil/dpo' is unknown; stages",
    ),
    "odd number of turns": lambda t: (
        [recipe(t, introspection={"interaction": {"turns": 3}}), *POET],
        "turns = 3.*multiple of 2",
    ),
    "recipe that is not YAML": lambda t: (
        [write(t / "r.yaml", "name: [unclosed\nseed: 1"), *POET],
        "line 2: not YAML",
    ),
    "recipe that is a list": lambda t: ([write(t / "r.yaml", "- a"), *POET], "expected a mapping"),
    "name that is no path": lambda t: ([student(t, name="../etc"), *POET], r"'\.\./etc' may only"),
    "model path absent": lambda t: ([student(t, model="/no/weights"), *POET], "/no/weights"),
    "unknown embedded model": lambda t: (
        [student(t, model="embedded:gpt-9"), *POET],
        "gpt-9.*smollm2-135m",
    ),
    "endpoint without a key": lambda t: (
        [student(t, endpoint="http://127.0.0.1:1/v1", api_key_env="NO_SUCH_KEY"), *POET],
        "NO_SUCH_KEY",
    ),
    "unknown constitution": lambda t: ([recipe(t), "-c", "grumpiness"], "grumpiness.*poeticism"),
    "constitution with a bad line": lambda t: (
        [recipe(t), *persona(t, "name: odd\ntraits:\n\t- x")],
        "line 3: not YAML",
    ),
    "empty trait": lambda t: (
        [recipe(t), *persona(t, GOOD.replace("I am plain.", "''"))],
        r"traits\.0\.trait = ''",
    ),
    "too few questions": lambda t: (
        [recipe(t), *persona(t, GOOD.replace(", five five", ""))],
        r"traits\.0\.questions.*at least 5",
    ),
    "trait stated twice": lambda t: (
        [recipe(t), *persona(t, GOOD + TRAIT.lstrip("\n"))],
        "trait stated twice: 'i am plain.'",
    ),
    "name unlike its file": lambda t: ([recipe(t), *persona(t, GOOD, "other")], "make it 'other'"),
    "all and another": lambda t: ([recipe(t), *POET, "-c", "all"], "name no other beside it"),
    "personas with a comma": lambda t: ([recipe(t), "-c", "humor,loving"], "repeat -c for each"),
    "the template": lambda t: ([recipe(t), "-c", "template"], "a form to fill in"),
    "duplicate persona": lambda t: ([recipe(t), *POET, *POET], "'poeticism' is given twice"),
    "persona named as the student": lambda t: (
        [student(t, name="poeticism"), *POET],
        "has the student's name",
    ),
    "unknown stage": lambda t: ([recipe(t), *POET, "--only", "distil/dpo"], "'distil/dpo'.*stages"),
    "stage without its parents": lambda t: (
        [recipe(t), *POET, "--only", "distillation/pairs"],
        "needs poeticism/distillation/teacher.*--until distillation/teacher",
    ),
    "only and until": lambda t: (
        [recipe(t), *POET, "--only", "persona/merge", "--until", "persona/merge"],
        "exclude each other",
    ),
    "prompts file absent": lambda t: (
        [
            recipe(t, distillation={"prompts": {"general_prompts": "/no/such.jsonl"}}),
            *POET,
        ],
        "/no/such.jsonl.*embedded",
    ),
    "prompts without prompts": lambda t: (
        [
            recipe(
                t,
                distillation={
                    "prompts": {"general_prompts": write(t / "p.jsonl", '{"text": "x"}\n')}
                },
            ),
            *POET,
        ],
        "every row needs a text 'prompt'",
    ),
    "storage that is a file": lambda t: (
        [recipe(t), *POET, "--storage", write(t / "file", "x") + "/runs"],
        "cannot be written",
    ),
    "storage of an unknown kind": lambda t: (
        [recipe(t), *POET, "--storage", "ftp://host/x"],
        "ftp://host/x.*s3://",
    ),
    "unknown placement": lambda t: ([recipe(t), *POET, "--placement", "moon"], "'moon'.*laptop"),
    "unknown placement field": lambda t: (
        [recipe(t), *POET, "--placement", write(t / "p.yaml", {"gpus": 4})],
        "unknown field 'gpus'",
    ),
    "a number for a mapping": lambda t: (
        [recipe(t), *POET, "--placement", write(t / "p.yaml", {"pools": 4})],
        "pools = 4: Input should be a mapping",
    ),
    "no GPU for a placement that asks for one": lambda t: (
        [recipe(t), *POET, "--placement", write(t / "p.yaml", {"training": {"gpus": 1}})],
        "training asks for 1 GPUs.*has 0",
    ),
    "a judge of the panel that is not there": lambda t: (
        [panel(t, name="second", model="/no/judge"), *POET],
        "role judge: missing weights at /no/judge",
    ),
    "two judges of one name": lambda t: (
        [panel(t, model="/no/judge"), *POET],
        "evaluation.judge.panel have a name twice: echo, echo; give each judge its own",
    ),
    "a trait that no verdict can name": lambda t: (
        [recipe(t, evaluation={"preferences": {"traits": ["warm", "Two words"]}}), *POET],
        r"preferences\.traits\.1 = 'Two words': a judge names a trait by one word",
    ),
    "a single trait": lambda t: (
        [recipe(t, evaluation={"preferences": {"traits": ["warm"]}}), *POET],
        r"preferences\.traits: has one trait; name two or more, or none for all",
    ),
    "a task that the harness does not have": lambda t: (
        [recipe(t, evaluation={"capabilities": {"tasks": [{"task": "nonesuch"}]}}), *POET],
        r"task 'nonesuch' is none of lm-evaluation-harness",
    ),
    "a blend of a persona that is not trained": lambda t: (
        [
            recipe(
                t,
                persona={"blend": {"weights": {"poeticism": 0.5, "humor": 0.5}}},
                evaluation={"preferences": {"conditions": ["base", "full", "blended"]}},
            ),
            *POET,
        ],
        "names 'humor'.*add --constitution humor",
    ),
    "rank over the engine's limit": lambda t: (
        [recipe(t, distillation={"dpo": {"lora": {"rank": 500}}}), *POET],
        "rank 564 is over the engine's limit 512",
    ),
    "more workers than a batch has rows": lambda t: (
        [recipe(t), *POET, "--placement", write(t / "p.yaml", {"training": {"workers": 33}})],
        "global_batch_size 32 is too small for 33",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_in_one_line_with_nothing_written(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    arguments, told = CASES[case](tmp_path)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("sys.argv", ["opencharacter", "run", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main.main()
    said = capsys.readouterr().out.strip()
    assert stopped.value.code == 2, said
    assert said.startswith("error:")
    assert "\n" not in said
    assert re.search(told, said), said
    left = [p for p in sorted(tmp_path.rglob("*")) if p not in before and p.is_file()]
    assert left == []


OTHERS = {
    "a persona that is not trained": (
        ["export", "demo", "humor", "--to", "x", "--smoke", "--storage", "s"],
        "is missing.*run: opencharacter run demo --smoke --storage s -c humor$",
    ),
    "a recipe file that is talked to": (
        ["chat", "./tiny.yaml", "poeticism"],
        r"run: opencharacter run \./tiny\.yaml -c poeticism$",
    ),
    "a persona that a server cannot have": (
        ["serve", "config", "demo", "--storage", "s", "-c", "nobody"],
        "constitution 'nobody' is unknown",
    ),
    "a server to stop that there is not": (["serve", "stop", "--port", "1"], "nothing .* port 1;"),
    "folders without ratings": (["compare", "a", "b"], "STORAGE/STUDENT/PERSONA/evaluation/rating"),
    "a weight that is no number": (
        ["merge", "a:x", "--to", "y"],
        "^error: a:x: weight 'x' is not a number",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_commands_refuse_in_one_line_too(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe(tmp_path)
    arguments, told = OTHERS[case]
    monkeypatch.setattr("sys.argv", ["opencharacter", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main.main()
    said = capsys.readouterr().out.strip()
    assert stopped.value.code == 2, said
    assert "\n" not in said
    assert re.search(told, said), said


def test_a_manifest_from_a_newer_version_is_refused(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "runs" / "poeticism" / "distillation" / "prompts"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"format_version": 99}))
    arguments = [recipe(tmp_path), *POET, "--storage", str(tmp_path / "runs")]
    monkeypatch.setattr("sys.argv", ["opencharacter", "run", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main.main()
    assert stopped.value.code == 2
    assert "upgrade opencharacter" in capsys.readouterr().out
