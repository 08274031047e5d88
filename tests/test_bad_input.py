"""Invalid input is rejected in one line with the value, the limit and the remedy; exit code 2."""

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
    "missing recipe file": lambda t: (["./nope.yaml", *POET], "no such file"),
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
        r"distillation: teacher\.answers is 3 and student\.answers is 5.*make them equal",
    ),
    "no data for SFT": lambda t: (
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
        "all 0, so sft has no training data; raise one",
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
    "invalid recipe name": lambda t: (
        [student(t, name="../etc"), *POET],
        r"'\.\./etc' is not a valid name",
    ),
    "missing model folder": lambda t: ([student(t, model="/no/weights"), *POET], "/no/weights"),
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
    "name that differs from its file": lambda t: (
        [recipe(t), *persona(t, GOOD, "other")],
        "line 1: name = 'odd': must be the file's name, 'other'",
    ),
    "all and another persona": lambda t: ([recipe(t), *POET, "-c", "all"], "give no other -c"),
    "personas with a comma": lambda t: (
        [recipe(t), "-c", "humor,loving"],
        "repeat -c for each one",
    ),
    "the constitution template": lambda t: (
        [recipe(t), "-c", "template"],
        "is a template; copy it with",
    ),
    "duplicate persona": lambda t: ([recipe(t), *POET, *POET], "'poeticism' is given twice"),
    "persona named like the student": lambda t: (
        [student(t, name="poeticism"), *POET],
        "has the student's name",
    ),
    "persona named as a condition": lambda t: (
        [recipe(t), *persona(t, GOOD.replace("name: odd", "name: base"), "base")],
        r"base\.yaml line 1: name = 'base': is reserved",
    ),
    "unknown field in --set": lambda t: (
        [recipe(t), *POET, "--set", "distillation.dpo.betta=1"],
        r"--set distillation\.dpo\.betta: unknown field .*; valid fields are beta, ",
    ),
    "value out of range in --set": lambda t: (
        [recipe(t), *POET, "--set", "seed=1", "--set", "distillation.dpo.beta=-1"],
        r"distillation\.dpo\.beta = -1: Input should be greater than 0",
    ),
    "field of version 0.1": lambda t: (
        [recipe(t, distillation={"dpo": {"nll": 1}}), *POET],
        r"tiny\.yaml line 3: `nll` is now `nll_weight`",
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
    "missing prompts file": lambda t: (
        [
            recipe(t, distillation={"prompts": {"general_prompts": "/no/such.jsonl"}}),
            *POET,
        ],
        "/no/such.jsonl.*embedded",
    ),
    "empty prompts file": lambda t: (
        [
            recipe(
                t,
                distillation={
                    "prompts": {"general_prompts": write(t / "p.jsonl", '{"text": "x"}\n')}
                },
            ),
            *POET,
        ],
        "every row needs a text field 'prompt'",
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
    "number instead of a mapping": lambda t: (
        [recipe(t), *POET, "--placement", write(t / "p.yaml", {"pools": 4})],
        "pools = 4: Input should be a mapping",
    ),
    "placement that needs a missing GPU": lambda t: (
        [recipe(t), *POET, "--placement", write(t / "p.yaml", {"training": {"gpus": 1}})],
        "training requests 1 GPUs.*has 0",
    ),
    "missing judge of the panel": lambda t: (
        [panel(t, name="second", model="/no/judge"), *POET],
        "role judge: missing weights at /no/judge",
    ),
    "two judges with the same name": lambda t: (
        [panel(t, model="/no/judge"), *POET],
        "evaluation.judge.panel use a name twice: echo, echo; give each judge its own name",
    ),
    "trait that no verdict can name": lambda t: (
        [recipe(t, evaluation={"preferences": {"traits": ["warm", "Two words"]}}), *POET],
        r"preferences\.traits\.1 = 'Two words': a judge names a trait by one word",
    ),
    "single trait": lambda t: (
        [recipe(t, evaluation={"preferences": {"traits": ["warm"]}}), *POET],
        r"preferences\.traits: has one trait; name at least two, or none to use all",
    ),
    "unknown lm_eval task": lambda t: (
        [recipe(t, evaluation={"capabilities": {"tasks": [{"task": "nonesuch"}]}}), *POET],
        r"task 'nonesuch' is neither in lm-evaluation-harness nor",
    ),
    "blend of an untrained persona": lambda t: (
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
    "rank over the limit of the engine": lambda t: (
        [recipe(t, distillation={"dpo": {"lora": {"rank": 500}}}), *POET],
        "rank 564 is over the engine's limit 512",
    ),
    "more workers than rows in a batch": lambda t: (
        [recipe(t), *POET, "--placement", write(t / "p.yaml", {"training": {"workers": 33}})],
        "global_batch_size 32 is too small for 33",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(
    case, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    arguments, expected = CASES[case](tmp_path)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("sys.argv", ["opencharacter", "run", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main.main()
    output = capsys.readouterr().out.strip()
    assert stopped.value.code == 2, output
    assert output.startswith("error:")
    assert "\n" not in output
    assert re.search(expected, output), output
    written = [p for p in sorted(tmp_path.rglob("*")) if p not in before and p.is_file()]
    assert written == []


OTHERS = {
    "export of an untrained persona": (
        ["export", "demo", "humor", "--to", "x", "--smoke", "--storage", "s"],
        "is missing.*run: opencharacter run demo --smoke --storage s -c humor$",
    ),
    "export of an untrained persona with an overridden field": (
        ["export", "demo", "humor", "--to", "x", "--set", "seed=3", "--storage", "s"],
        "is missing.*run: opencharacter run demo --set seed=3 --storage s -c humor$",
    ),
    "chat with a recipe file": (
        ["chat", "./tiny.yaml", "poeticism"],
        r"run: opencharacter run \./tiny\.yaml -c poeticism$",
    ),
    "serve with an unknown persona": (
        ["serve", "config", "demo", "--storage", "s", "-c", "nobody"],
        "constitution 'nobody' is unknown",
    ),
    "stop without a server": (
        ["serve", "stop", "--port", "1"],
        "no server at port 1;",
    ),
    "compare folders without ratings": (
        ["compare", "a", "b"],
        "STORAGE/STUDENT/PERSONA/evaluation/rating",
    ),
    "blend with an invalid weight": (
        ["merge", "a:x", "--to", "y"],
        "^error: a:x: weight 'x' is not a number",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_commands_refuse_bad_input_in_one_line(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe(tmp_path)
    arguments, expected = OTHERS[case]
    monkeypatch.setattr("sys.argv", ["opencharacter", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main.main()
    output = capsys.readouterr().out.strip()
    assert stopped.value.code == 2, output
    assert "\n" not in output
    assert re.search(expected, output), output


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
