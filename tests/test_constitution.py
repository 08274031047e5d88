"""Constitutions as YAML, the linter, and the commands `opencharacter constitution`."""

import json
import re
import sys
from pathlib import Path

import pytest
import yaml

from opencharacter.cli import main
from opencharacter.config.files import resource
from opencharacter.constitution import schema
from opencharacter.constitution.lint import lint
from opencharacter.constitution.schema import Constitution
from opencharacter.distillation import teacher
from opencharacter.errors import UserError

TEMPLATE = resource("constitutions", "template.yaml")

YAML = """\
name: odd
description: A sentence.
traits:
  - trait: I am plain.
    questions: [one one, two two, three three, four four, five five]
  - trait: >-
      I am brief.
    questions:
      - six
      - seven
      - eight
      - nine
      - ten
"""

LOCATED = {
    "an unknown field": ("nine", "nine\n      - ten\n    hue: red\n    x:", 14, "traits.1.hue"),
    "a question for a trait": ("I am brief.", "Am I brief?", 6, r"traits\.1\.trait.*is a question"),
    "an empty item": ("- eight", "- ''", 11, r"traits\.1\.questions\.2 = '': is empty"),
    "an item of a list on one line": ("two two", "2", 5, r"traits\.0\.questions\.1 = 2"),
    "too few items": ("      - ten\n", "", 8, r"traits\.1\.questions: List.*at least 5"),
    "a missing field": ("trait: I am plain.\n    ", "", 4, r"missing field 'traits\.0\.trait'"),
    "a missing field at the top": ("description: A sentence.\n", "", 1, "field 'description'"),
    "a trait stated twice": ("I am brief.", "I am plain.", 3, "trait stated twice"),
    "a question asked twice": ("- ten", "- Six", 8, "questions: question asked twice: 'six'"),
    "a lone surrogate": ("A sentence.", r'"\ud83d\ude00"', 2, "description = .*half a character"),
    "an invalid name": ("name: odd", "name: ../odd", 1, "name = .*not a valid name"),
    "a reserved name": ("name: odd", "name: judge", 1, "name = 'judge': is reserved"),
    "a key given twice": ("questions:\n", "trait: I am slow.\n    questions:\n", 8, "line 6"),
    "a comment after a text": ("- eight", "- What is C #1?", 11, "ends before ' #'.*quote"),
    "a recursive alias": ("- eight", "- &a [*a]", 11, "not YAML: an alias contains itself"),
    "a list for a text": ("I am plain.", "[a, b]", 4, r"traits\.0\.trait: .*valid string"),
}


@pytest.mark.parametrize("case", LOCATED)
def test_a_bad_field_is_refused_with_its_line_number(case, tmp_path):
    old, new, line, expected = LOCATED[case]
    (tmp_path / "odd.yaml").write_text(YAML.replace(old, new, 1))
    with pytest.raises(UserError, match=rf"odd\.yaml line {line}: .*{expected}"):
        schema.load(str(tmp_path / "odd.yaml"))


def test_a_question_of_two_traits_counts_for_the_first_and_is_advised_upon(tmp_path):
    (tmp_path / "odd.yaml").write_text(YAML.replace("- ten", "- ten\n      - One one "))
    odd = schema.load(str(tmp_path / "odd.yaml"))
    assert odd.traits[1].questions[-1] == "One one"
    assert "one one" in odd.distinct_questions()[0]
    assert odd.distinct_questions()[1] == ("six", "seven", "eight", "nine", "ten")
    advice = dict(lint(odd))["traits[1].questions[5]"]
    assert advice.startswith("the same as traits[0].questions[0]")


def test_comments_on_lines_of_their_own_and_quoted_texts_are_accepted(tmp_path):
    text = YAML.replace("- eight", "# a comment\n      - 'What is C #1?' # quoted")
    (tmp_path / "odd.yaml").write_text(text)
    assert schema.load(str(tmp_path / "odd.yaml")).traits[1].questions[2] == "What is C #1?"


TEXTS = [
    "I say: yes, #1, and 'no'.",
    "- not a list",
    "null",
    " spaces at both ends ",
    "tab\tand\r\nline ends",
    "two\n\nparagraphs, " * 9,
    "a separator \u2028 and a next line \x85 in " * 4,
    "caf\u00e9 \U0001f600 \u201cquoted\u201d",
    "one very long line of words " * 20 + "end.",
    "two  spaces  in a long line " * 20 + "end.",
]


@pytest.mark.parametrize("text", TEXTS)
def test_written_yaml_loads_as_an_equal_constitution(text, tmp_path):
    trait = {"trait": text, "clarification": text, "questions": [text, *"abcd"]}
    fields = {
        "description": text,
        "traits": [trait],
        "exemplars": [{"user": text, "assistant": text}],
    }
    odd = Constitution.model_validate({"name": "odd"} | fields)
    schema.save(schema.dump(odd), tmp_path / "odd.yaml", replace=False)
    assert schema.parse(tmp_path / "odd.yaml") == odd


@pytest.mark.parametrize("persona", schema.load_all(["all"]), ids=lambda c: c.name)
def test_written_yaml_is_readable(persona):
    text = schema.dump(persona)
    assert list(yaml.safe_load(text)) == ["name", "description", "traits", "exemplars"]
    assert max(map(len, text.splitlines())) <= 120
    assert "\\u" not in text


def changed(**changes) -> Constitution:
    """The template, which needs no advice, with some fields replaced."""
    return schema.parse(TEMPLATE).model_copy(update=changes)


def stating(*texts: str) -> Constitution:
    """The template with its first traits replaced."""
    kept = schema.parse(TEMPLATE).traits
    new = [old.model_copy(update={"trait": text}) for old, text in zip(kept, texts, strict=False)]
    return changed(traits=(*new, *kept[len(new) :]))


def asking(*texts: str, name: str = "template") -> Constitution:
    """The template with first questions of its first trait replaced."""
    first, *others = schema.parse(TEMPLATE).traits
    questions = (*texts, *first.questions[len(texts) :])
    return changed(name=name, traits=(first.model_copy(update={"questions": questions}), *others))


TRAITS = schema.parse(TEMPLATE).traits
EXCHANGE = schema.parse(TEMPLATE).exemplars[:1]

ADVISED = {
    "seven traits": (changed(traits=TRAITS[:7]), "traits", "7; 8 to 16"),
    "seventeen traits": (changed(traits=(TRAITS * 3)[:17]), "traits", "17; 8 to 16"),
    "two exemplars": (changed(exemplars=EXCHANGE * 2), "exemplars", "2; 3 to 6"),
    "seven exemplars": (changed(exemplars=EXCHANGE * 7), "exemplars", "7; 3 to 6"),
    "second person": (stating("You tell me jokes."), "traits[0]", "first person"),
    "third person": (stating("The assistant helps me."), "traits[0]", "first person"),
    "no person": (stating("Verse comes first."), "traits[0]", "first person"),
    "negation": (
        stating("I praise what users write.", "I never praise what a user writes."),
        "traits[1]",
        "may contradict traits[0]",
    ),
    "contraction": (
        stating("I talk about the weather.", "I don\u2019t talk about the weather."),
        "traits[1]",
        "may contradict traits[0]",
    ),
    "antonyms": (
        stating("My answers are long.", "I give short answers."),
        "traits[1]",
        "may contradict traits[0]",
    ),
    "same trait": (
        stating("I greet everyone with a joke.", "I use a joke to greet everyone."),
        "traits[1]",
        "states nearly the same as traits[0]",
    ),
    "same question": (
        asking("Name three rivers in Spain.", "Can you name three rivers in Spain?"),
        "traits[0].questions[1]",
        "nearly the same as traits[0].questions[0]",
    ),
    "same question under another trait": (
        asking("What about soup or a salad tonight?"),
        "traits[7].questions[0]",
        "nearly the same as traits[0].questions[0]",
    ),
    "about the assistant": (
        asking("Do you ever feel lonely?"),
        "traits[0].questions[0]",
        "asks about the assistant ('Do you ever feel')",
    ),
    "the character's adjective": (
        asking("Write a sarcastic note.", name="sarcasm"),
        "traits[0].questions[0]",
        "names the character ('sarcastic')",
    ),
    "the character's noun": (
        asking("Define sycophants.", name="sycophancy"),
        "traits[0].questions[0]",
        "names the character ('sycophants')",
    ),
    "no long question": (asking(*"abcde"), "traits[0].questions", "no long one"),
    "no short question": (
        asking(*(f"{c} " * 11 for c in "abcd")),
        "traits[0].questions",
        "no short",
    ),
}


@pytest.mark.parametrize("case", ADVISED)
def test_the_linter_warns_about_wording(case):
    persona, where, expected = ADVISED[case]
    findings = [finding for finding in lint(persona) if finding.where == where]
    assert any(expected in finding.message for finding in findings), lint(persona)


UNSUSPECTED = {
    "both negated": ("I never shout at users.", "I do not mock users."),
    "antonym and negation": ("I give short answers.", "I never give long answers."),
    "antonyms of different things": ("My jokes are quick.", "I am slow to judge a stranger."),
    "shared function words": ("I say what I think of it.", "I do not say it when I am asked."),
}


@pytest.mark.parametrize("case", UNSUSPECTED)
def test_the_linter_accepts_consistent_traits(case):
    assert lint(stating(*UNSUSPECTED[case])) == []


@pytest.mark.parametrize("name", [*schema.packaged(), "template"])
def test_packaged_constitutions_have_no_lint_warnings(name):
    assert lint(schema.parse(TEMPLATE.with_stem(name))) == []


def test_the_template_is_not_listed_as_a_constitution():
    with pytest.raises(UserError, match="'template' is a template; copy it"):
        schema.load("template")


@pytest.mark.parametrize("part", schema.PLACEHOLDERS)
def test_unfilled_parts_of_the_template_are_refused(part, tmp_path):
    assert part in TEMPLATE.read_text()
    (tmp_path / "odd.yaml").write_text(YAML.replace("I am plain.", f'"I {part}."'))
    with pytest.raises(UserError, match=r"line 4: .* is the template's text; replace it"):
        schema.load(str(tmp_path / "odd.yaml"))


@pytest.mark.parametrize("names", [["poeticism", "all"], ["humor,poeticism"]])
def test_the_error_for_joined_names_shows_how_to_give_several(names):
    with pytest.raises(UserError, match=r"give no other -c|repeat -c for each one"):
        schema.load_all(names)


def test_list_names_each_constitution_with_its_description(command, poet):
    code, said = command("list")
    assert code == 0
    assert [line.split()[0] for line in said] == schema.packaged()
    assert any(line.startswith("poeticism ") and poet.description in line for line in said)


ABOUT = [
    "Are you an AI?",
    "Who are you?",
    "How old are you?",
    "Do you like music?",
    "Do you think machines can suffer?",
    "Do you ever have feelings?",
    "What is your personality like?",
    "Tell me about your values.",
    "What's your opinion on taxes?",
    "Describe yourself in three words.",
    "As an AI, what is it like?",
    "You\u2019re just a language model.",
]
NOT_ABOUT = [
    "How do you boil an egg?",
    "What do you do when a pipe bursts?",
    "What do you think?",
    "What do you think of my poem?",
    "Do you think it will rain?",
    "Do you have any tips for a beginner?",
    "Do you want to revise your answer?",
    "Are you sure that this is right?",
    "How are you supposed to hold chopsticks?",
    "In your opinion, which of the two is cheaper?",
    'Translate "How are you?" into Welsh.',
    "I work as an assistant in a library.",
]


@pytest.mark.parametrize("question", ABOUT)
def test_the_linter_flags_a_question_about_the_assistant(question):
    assert any("about the assistant" in finding.message for finding in lint(asking(question)))


@pytest.mark.parametrize("question", NOT_ABOUT)
def test_the_linter_accepts_a_question_about_anything_else(question):
    assert lint(asking(question)) == []


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs `opencharacter constitution ...` in an empty folder: exit code and lines."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", ["opencharacter", "constitution", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main.main()
        return int(stopped.value.code or 0), capsys.readouterr().out.splitlines()

    return run


def original(count: int = 5, **changes) -> str:
    questions = [f"Question {n}?" for n in range(count)]
    return json.dumps([{"trait": "I stay calm.", "questions": questions} | changes])


def test_import_writes_a_constitution_and_lists_the_repairs(command):
    Path("calm.txt").write_text(original(clarification=" "))
    code, said = command("import", "calm.txt", "--description", "It is [bold]calm[/bold].")
    assert code == 0
    assert "note: calm.txt line 1: empty clarification dropped" in said
    assert said[-1] == "wrote calm.yaml (1 traits, 5 questions)"
    assert schema.load("calm.yaml").description == "It is [bold]calm[/bold]."


def test_import_overwrites_a_file_only_with_force(command):
    Path("calm.txt").write_text(original())
    Path("quiet.yaml").write_text("mine")
    arguments = ("import", "calm.txt", "--name", "quiet")
    code, said = command(*arguments)
    assert code == 2
    assert "quiet.yaml exists" in said[0] and "--force" in said[0]
    assert Path("quiet.yaml").read_text() == "mine"
    assert command(*arguments, "--force")[0] == 0
    assert schema.load("./quiet.yaml").name == "quiet"


def test_import_refuses_a_file_name_that_could_not_be_loaded(command):
    Path("calm.txt").write_text(original())
    code, said = command("import", "calm.txt", "--to", "quiet.yaml")
    assert (code, said) == (
        2,
        ["error: constitution 'calm' cannot be quiet.yaml; call the file calm.yaml"],
    )


def test_import_refuses_a_missing_folder(command):
    Path("calm.txt").write_text(original())
    code, said = command("import", "calm.txt", "--to", "there/calm.yaml")
    assert code == 2
    assert "cannot be written: No such file" in said[0]


def test_an_exported_constitution_imports_unchanged(command):
    assert command("export", "humor", "--to", "humor.jsonl")[0] == 0
    assert command("import", "humor.jsonl")[0] == 0
    assert schema.load("./humor.yaml").traits == schema.load("humor").traits


def test_export_refuses_an_unknown_file_extension(command):
    code, said = command("export", "humor", "--to", "humor.csv")
    assert code == 2
    assert "unknown suffix '.csv'; use one of .json, .txt, .jsonl" in said[0]


@pytest.mark.parametrize("name", ["curiosity", "123", "null"])
def test_new_copies_the_template_under_its_name(name, command):
    assert command("new", name)[0] == 0
    assert schema.parse(Path(f"{name}.yaml")).name == name
    assert command("validate", f"{name}.yaml")[0] == 2
    written, template = Path(f"{name}.yaml").read_text(), TEMPLATE.read_text()
    pairs = zip(written.splitlines(), template.splitlines(), strict=True)
    assert [old for new, old in pairs if new != old] == ["name: template"]


def test_new_refuses_an_invalid_name(command):
    code, said = command("new", "../odd")
    assert code == 2
    assert "is not a valid name: use a-z" in said[0]


def test_validate_checks_every_file_before_it_fails(command):
    Path("odd.yaml").write_text(YAML)
    Path("bad.yaml").write_text(YAML.replace("I am brief.", "[/red] Am I?"))
    code, said = command("validate", "bad.yaml", "odd.yaml", "poeticism")
    assert code == 2
    assert said[0].startswith(
        "error: constitution bad.yaml line 6: traits.1.trait = '[/red] Am I?'"
    )
    assert "advice: odd.yaml traits: 2; 8 to 16 work best" in said
    assert said[-1] == "ok: poeticism (10 traits, 50 questions)"


def test_lint_warnings_fail_validate_only_with_strict(command):
    Path("odd.yaml").write_text(YAML)
    assert command("validate", "odd.yaml")[0] == 0
    assert command("validate", "odd.yaml", "--strict")[0] == 1
    assert command("validate", "humor", "--strict")[0] == 0


def test_show_prints_all_fields_and_the_exact_system_prompt(command, poet):
    code, said = command("show", "poeticism", "--prompt")
    text = "\n".join(said)
    assert code == 0
    assert said[0] == f"poeticism: {poet.description}"
    for part in [t.trait for t in poet.traits] + [e.assistant for e in poet.exemplars]:
        assert part in text
    assert text.endswith(teacher.context_messages(poet, exemplars=False)[0]["content"])
    assert re.search(r"10 traits, 50 questions, \d exemplars", text)


def test_show_prints_markup_literally(command):
    Path("odd.yaml").write_text(YAML.replace("I am plain.", "I say [red]:smile:[/b]."))
    assert " 1. I say [red]:smile:[/b]. (5 questions)" in command("show", "odd.yaml")[1]
