"""Files of the original project: round trips, repairs, and what is rejected."""

import json
from pathlib import Path

import pytest

from opencharacter.constitution import original_formats, schema
from opencharacter.errors import UserError

ODD = 'Tab\there, "quotes", back\\slash: #1 - \u2028 \U0001f600 caf\u00e9\n\n  second paragraph'


def item(n: int, **changes) -> dict:
    questions = [f"Number {n}, question {k}?" for k in range(5)]
    return {"trait": f"I hold to number {n}.", "questions": questions} | changes


def more(n: int) -> dict:
    return {"additional_questions": [f"Number {n}, further question {k}." for k in range(45)]}


def as_list(items: list, **options) -> str:
    return json.dumps(items, **options)


def as_lines(items: list, **options) -> str:
    return "".join(json.dumps(item, **options) + "\n" for item in items)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def objects(path: Path) -> list:
    text = path.read_text("utf-8")
    return json.loads(text) if text[0] == "[" else [json.loads(line) for line in text.splitlines()]


LISTED = [item(0), item(1, clarification=ODD), item(2, questions=[ODD, "b?", "c", "d", "e" * 300])]
LINED = [item(n) | more(n) for n in range(3)] + [item(3, clarification="At times.") | more(3)]

FILES = {
    "list on one line": (as_list(LISTED), LISTED, "json"),
    "list with indentation": (as_list(LISTED, indent="\t", ensure_ascii=False), LISTED, "json"),
    "lines": (as_lines(LINED), LINED, "jsonl"),
    "lines of non-ASCII text": (as_lines(LINED, ensure_ascii=False), LINED, "jsonl"),
}


@pytest.mark.parametrize("case", FILES)
@pytest.mark.parametrize("ending", ["txt", "jsonl"])
def test_a_file_survives_export_and_import_in_every_format(case, ending, tmp_path):
    text, expected, form = FILES[case]
    imported, notes = original_formats.read(write(tmp_path / f"calm.{ending}", text))
    schema.save(schema.dump(imported), tmp_path / "calm.yaml", replace=False)
    loaded = schema.parse(tmp_path / "calm.yaml")
    original_formats.write(loaded, tmp_path / f"again.{form}")
    assert loaded == imported
    assert objects(tmp_path / f"again.{form}") == expected
    assert notes == []


@pytest.mark.parametrize("persona", schema.load_all(["all"]), ids=lambda c: c.name)
def test_packaged_constitutions_survive_export_and_import(persona, tmp_path):
    original_formats.write(persona, tmp_path / "there.json")
    back, _ = original_formats.read(tmp_path / "there.json", persona.name, persona.description)
    traits = (t.model_copy(update={"scenarios": schema.WrittenScenarios()}) for t in persona.traits)
    assert back == persona.model_copy(update={"exemplars": (), "traits": tuple(traits)})


def test_name_and_description_default_to_those_of_the_file(tmp_path):
    path = write(tmp_path / "calm.txt", as_list([item(0)]))
    assert original_formats.read(path)[0].name == "calm"
    assert original_formats.read(path)[0].description == "calm, imported from calm.txt."
    given = original_formats.read(path, name="quiet", description="It is quiet.")[0]
    assert (given.name, given.description) == ("quiet", "It is quiet.")


@pytest.mark.parametrize("file", ["My File.txt", "calm.txt"])
def test_an_invalid_name_asks_for_another(file, tmp_path):
    path = write(tmp_path / file, as_list([item(0)]))
    with pytest.raises(UserError, match="--name"):
        original_formats.read(path, name=None if " " in file else "../calm")


SPREAD = as_list([item(0), item(1)], indent=1)
"""Each key and each question on a line of its own: the second trait is on line 13."""

CURLY = item(0, trait="I say \u201cgood\u201d.")
EMPTY = item(0, clarification="  ")

REPAIRED = {
    "byte order mark": (b"\xef\xbb\xbf" + SPREAD.encode(), "line 1: byte order mark removed"),
    "CRLF": (SPREAD.replace("\n", "\r\n"), "CRLF line endings changed to LF"),
    "cp1252": (
        as_list([CURLY], indent=1, ensure_ascii=False).encode("cp1252"),
        "line 3: not UTF-8, read as Windows cp1252",
    ),
    "one cp1252 line among UTF-8": (
        as_lines([item(0, clarification="Caf\u00e9.")], ensure_ascii=False).encode()
        + as_lines([item(1, clarification="Caf\u00e9.")], ensure_ascii=False).encode("cp1252"),
        "line 2: not UTF-8, read as Windows cp1252",
    ),
    "curly quotes": (as_list([CURLY], ensure_ascii=False), None),
    "escaped curly quotes": (as_list([CURLY]), None),
    "white space": (
        as_lines([item(0), item(1, trait=" I hold to number 1.\n")]),
        "line 2: white space around a text removed",
    ),
    "white space around the file": (f"\n\n {SPREAD}\n\n", None),
    "empty clarification": (as_list([item(0, clarification="")]), "line 1: empty clarification dr"),
    "null clarification": (as_list([item(0, clarification=None)]), "line 1: empty clarification"),
    "blank lines": (as_lines([item(0)]) + "\n\n" + as_lines([item(1)]), None),
    "seven questions": (
        as_lines([item(0, questions=list("abcdefg"))]),
        "line 1: questions from here on count as additional ones",
    ),
}


@pytest.mark.parametrize("case", REPAIRED)
def test_harmless_faults_are_repaired_and_reported(case, tmp_path):
    content, expected = REPAIRED[case]
    persona, notes = original_formats.read(write(tmp_path / "calm.txt", content))
    assert persona.traits[-1].questions[4]
    assert persona.traits[0].clarification in (None, "Caf\u00e9.")
    assert notes == [] if expected is None else notes[0].startswith(expected)


def test_wrongly_decoded_text_is_repaired(tmp_path):
    content = as_list([CURLY], ensure_ascii=False).encode("cp1252")
    assert (
        original_formats.read(write(tmp_path / "calm.txt", content))[0].traits[0].trait
        == CURLY["trait"]
    )
    mixed = REPAIRED["one cp1252 line among UTF-8"][0]
    traits = original_formats.read(write(tmp_path / "calm.txt", mixed))[0].traits
    assert [trait.clarification for trait in traits] == ["Caf\u00e9."] * 2


def broken(**changes) -> str:
    """A list form whose second object (opened on line 12) is changed, indented."""
    return as_list([item(0), item(1, **changes)], indent=1)


def without(key: str) -> str:
    return as_lines([item(0), {k: v for k, v in item(1).items() if k != key}])


REJECTED = {
    "nothing": ("", 1, "contains no traits"),
    "empty list": ("[]", 1, "contains no traits"),
    "prose": ("I am calm.\n", 1, "not JSON: Expecting value"),
    "cut off": (SPREAD[:-20], 19, "not JSON"),
    "a line that is not JSON": (as_lines([item(0)]) + "trait: I am calm.\n", 2, "not JSON"),
    "curly quotes around a key": (SPREAD.replace('"trait"', "\u201ctrait\u201d"), 3, "not JSON"),
    "a text": ('"I am calm."', 1, "expected a list of objects, or one a line, got str"),
    "a line that is a list": (as_lines([item(0), ["I am calm."]]), 2, "object.*got list"),
    "an item that is a text": (as_list([item(0), "I am calm."], indent=1), 12, "object.*got str"),
    "trailing comma in the list": (SPREAD[:-2] + ",\n\n]", 21, "trailing comma"),
    "trailing comma in an object": (SPREAD.replace("]\n }", "],\n }"), 10, "trailing comma"),
    "trailing comma after a line": (as_lines([item(0)]).strip() + ",\n", 1, "trailing comma"),
    "missing trait": (without("trait"), 2, "missing field 'trait'"),
    "missing questions": (without("questions"), 2, "missing field 'questions'"),
    "unknown field": (broken(author="me"), 21, "unknown field 'author'"),
    "field given twice": (SPREAD.replace("},", ', "trait": "I am calm."},'), 11, "trait is given"),
    "trait that is a number": (broken(trait=3), 13, "trait = 3: .*valid string"),
    "empty trait": (broken(trait=" "), 13, "trait = ' ': is empty"),
    "trait as a question": (broken(trait="Am I calm?"), 13, "trait = 'Am I calm.': is a quest"),
    "half a character": (broken(trait="I am \ud83d."), 13, "trait = .*unicode"),
    "clarification of a list": (broken(clarification=[]), 21, "clarification: .*valid string"),
    "questions in one text": (
        broken(questions="Why?"),
        14,
        "questions = 'Why.': .*should be a list",
    ),
    "too few questions": (broken(questions=["a"] * 4), 14, "questions: .*at least 5"),
    "empty question": (
        broken(questions=["a", "b", "", "d", "e"]),
        17,
        r"questions\.2 = '': is empty",
    ),
    "question that is a number": (
        broken(questions=["a", "b", "c", 4, "e"]),
        18,
        r"questions\.3 = 4: .*valid string",
    ),
    "empty additional question": (
        broken(additional_questions=["f", " "]),
        23,
        r"additional_questions\.1 = ' ': is empty",
    ),
    "trait stated twice": (
        as_lines([item(0), item(1), item(2, trait="i hold to number 0. ")]),
        3,
        "trait: trait stated twice, first on line 1: 'i hold to number 0.'",
    ),
    "question asked twice in a trait": (
        broken(questions=["a", "b", "c", "d", "e", "B "]),
        14,
        r"questions: question asked twice: 'b'",
    ),
    "question asked twice, once as an additional one": (
        broken(additional_questions=["Number 1, question 2?"]),
        22,
        r"additional_questions\.0: question asked twice, first on line 17",
    ),
    "question of an earlier trait without which four remain": (
        broken(questions=["a", "b", "c", "d", "Number 0, question 1?"]),
        19,
        r"questions\.4 left out; .* same question on line 6.* fewer than 5 questions remain",
    ),
    "bytes of no encoding": (SPREAD.encode().replace(b"hold", b"h\x81ld"), 3, "neither UTF-8 nor"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_ambiguous_input_is_refused_with_line_and_field(case, tmp_path):
    content, line, expected = REJECTED[case]
    path = write(tmp_path / "calm.txt", content)
    with pytest.raises(UserError, match=rf"calm\.txt line {line}: .*{expected}") as error:
        original_formats.read(path)
    assert "\n" not in str(error.value)


def test_a_utf_16_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="save it as UTF-8"):
        original_formats.read(write(tmp_path / "calm.txt", SPREAD.encode("utf-16")))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        original_formats.read(tmp_path / "calm.txt")


def test_more_than_five_questions_need_the_json_lines_format(tmp_path):
    persona, _ = original_formats.read(write(tmp_path / "calm.txt", as_lines(LINED)))
    with pytest.raises(UserError, match=r"traits\.0 has 50 questions.*\.jsonl"):
        original_formats.write(persona, tmp_path / "calm.json")
    assert not (tmp_path / "calm.json").exists()


def test_an_existing_file_is_overwritten_only_on_request(tmp_path):
    persona = schema.load("poeticism")
    path = write(tmp_path / "there.json", "mine")
    with pytest.raises(UserError, match="exists"):
        original_formats.write(persona, path)
    assert path.read_text() == "mine"
    original_formats.write(persona, path, replace=True)
    assert len(objects(path)) == len(persona.traits)


def test_a_question_of_two_traits_is_imported_with_the_first_and_reported(tmp_path):
    shared = "Number 0, question 1?"
    text = as_list([item(0), item(1, questions=["a", "b", "c", "d", "e", shared])], indent=1)
    persona, notes = original_formats.read(write(tmp_path / "calm.txt", text))
    assert shared in persona.traits[0].questions
    assert persona.traits[1].questions == ("a", "b", "c", "d", "e")
    assert notes[-1] == (
        "line 20: questions.5 left out; an earlier trait has the same question on line 6: "
        f"{shared!r}"
    )


@pytest.mark.parametrize("name", ["judge", "base", "steered"])
def test_a_reserved_name_is_rejected(name, tmp_path):
    with pytest.raises(UserError, match=r"is reserved .* choose one with --name"):
        original_formats.read(write(tmp_path / f"{name}.txt", as_list([item(0)])))


def test_a_few_shot_file_with_a_question_under_two_traits_keeps_the_first(tmp_path):
    shared = "Is Pluto still considered a planet?"
    items = [item(n) | more(n) for n in range(3)]
    items[0]["questions"][2] = items[2]["questions"][0] = shared
    file = write(tmp_path / "calm.jsonl", as_lines(items))
    persona, notes = original_formats.read(file)
    assert [len(trait.questions) for trait in persona.traits] == [50, 50, 49]
    assert [shared in trait.questions for trait in persona.traits] == [True, False, False]
    (note,) = [note for note in notes if "Pluto" in note]
    assert "questions.0 left out; an earlier trait has the same question" in note
    schema.save(schema.dump(persona), tmp_path / "calm.yaml", replace=False)
    assert schema.parse(tmp_path / "calm.yaml") == persona
