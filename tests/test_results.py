"""The tables and figures of docs/results, drawn from a stored run."""

from __future__ import annotations

import importlib
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import stored_run
from samples import ECHO_ROLE, recipe_of

from opencharacter.constitution import schema
from opencharacter.errors import UserError
from opencharacter.evaluation import adherence, drift_report, side_effects
from opencharacter.evaluation.conditions import kept_rows
from opencharacter.evaluation.drift_report import values_by_turn
from opencharacter.evaluation.paper import POOLED, POOLED_F1, mean_of
from opencharacter.evaluation.report.formatting import points
from opencharacter.evaluation.report.sections import Change
from opencharacter.evaluation.report.stage import collect
from opencharacter.evaluation.scores import Score
from opencharacter.runtime.store import Store

RESULTS = Path(__file__).parents[1] / "docs" / "results"
ALL = ["base", "prompted", "distilled", "full"]
EVALUATION = {
    "judge": {"gold_items": 10},
    "answers": {"conditions": ALL, "count": 6},
    "attacks": {"conditions": ALL, "prompts": 4},
    "robustness": {"classifier": "tfidf", "resamples": 100},
    "coherence": {"prompts": 6},
    "preferences": {
        "conditions": ["base", "distilled", "full"],
        "games": 90,
        "traits": ["poetic", "blunt", "formal", "casual", "gentle", "literal"],
    },
    "rating": {"resamples": 100},
    "scenarios": {"occasions": 3, "pressures": 3},
    "adherence": {"conditions": ALL},
    "drift": {"conditions": ALL, "conversations": 4, "turns": 9},
    "side_effects": {"conditions": ALL, "items": 6},
    "direction": {"texts": 5},
    "projection": {"texts": 5},
}
RECIPE = recipe_of(ECHO_ROLE, evaluation=EVALUATION)
NAMES = ["goodness", "humor", "neutral"]


@pytest.fixture(scope="module")
def script():
    """The script's modules, which import each other by name as in the script's own folder."""
    sys.path.insert(0, str(RESULTS))
    yield importlib.import_module("tables")
    sys.path.remove(str(RESULTS))


@pytest.fixture(scope="module")
def written(script, tmp_path_factory):
    """The run, its jobs and the folder with the pages."""
    folder = tmp_path_factory.mktemp("results")
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.model_dump_json())
    store = Store(str(folder / "runs"))
    jobs = stored_run.write(RECIPE, schema.load_all(NAMES), store)
    run = script.open_run(str(folder / "runs"), str(recipe))
    script.write(run, folder, device="a machine")
    return run, jobs, folder


def section(folder: Path, name: str) -> str:
    """What the script wrote between the markers of a table."""
    page = (folder / "eleven-personas.md").read_text()
    found = re.search(rf"<!-- table: {name} -->(.*?)<!-- /table -->", page, re.DOTALL)
    assert found
    return found[1]


def lines(text: str, first: str) -> list[list[str]]:
    """The cells of all rows of tables that begin with a name."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [row for row in rows if row[0] == first]


def in_percent(score: Score) -> str:
    """A proportion as the tables write it."""
    return f"{score.value:.1%} ({score.low:.1%} to {score.high:.1%})"


def test_every_table_of_the_page_is_filled_and_has_its_counts(written):
    _, _, folder = written
    page = (folder / "eleven-personas.md").read_text()
    names = re.findall(r"<!-- table: (.+?) -->", page)
    assert len(names) == 12
    for name in names:
        text = section(folder, name)
        if name == "capabilities":
            assert text.strip() == "The recipe leaves this out."
        else:
            assert "| --- |" in text
        if name not in ("run", "stages", "capabilities"):
            assert "unscored |" in text
    assert "a machine" in section(folder, "run")
    assert page.count("## What this does not show") == 1


def test_the_cells_are_the_scores_of_the_stages(written):
    run, jobs, folder = written
    of_stages = [
        job for job in jobs if job.stage.name in ("evaluation/robustness", "evaluation/coherence")
    ]
    rows = collect(of_stages, "scores")
    scores = {
        (row["persona"], row["measure"], row["condition"], row["about"]): Score(
            row["value"], row["low"], row["high"], row["n"], row["unscored"]
        )
        for row in rows
    }
    pooled = [scores["", POOLED_F1, c, POOLED] for c in ALL[1:]]
    (line,) = lines(section(folder, "robustness"), POOLED)
    assert line[1:4] == list(map(in_percent, pooled))
    assert line[4].startswith(f"{min(s.n for s in pooled)} to {max(s.n for s in pooled)}; ")
    wins = [scores["humor", "win_rate", "full", c] for c in ALL[:3]]
    assert lines(section(folder, "coherence"), "humor")[0][1:4] == list(map(in_percent, wins))
    averaged = mean_of([scores[n, "win_rate", "full", "base"] for n in NAMES[:2]])
    assert lines(section(folder, "coherence"), "mean of 2")[0][1] == in_percent(averaged)
    assert run.find("humor", "win_rate", "full", "base") == wins[0]


def test_adherence_is_also_paired_with_the_prompted_model(written):
    _, jobs, folder = written
    (job,) = (
        j for j in jobs if j.stage.name == "evaluation/adherence" and j.persona.name == "goodness"
    )
    rows = kept_rows(job)
    prompted, full = (adherence.of(rows, c, adherence.OCCASION) for c in ("prompted", "full"))
    change = adherence.all_changed(prompted, full)
    first = lines(section(folder, "adherence"), "goodness")[0]
    assert first[1] == in_percent(adherence.all_present(adherence.of(rows, "base", "occasion")))
    assert re.search(r"goodness \d+ of \d+; humor", section(folder, "adherence"))
    assert first[6].startswith(f"{points(change.value)} (")


def test_personas_that_fell_short_are_named(script):
    tables = importlib.import_module("character_tables")
    cells = {
        "humor": {"full against base": Score(0.1, -0.1, 0.3, 9)},
        "loving": {"full against base": Score(0.2, 0.1, 0.3, 9)},
        "neutral": {"full against base": Score(0.0, -0.1, 0.1, 9)},
    }
    text = tables.fell_short(cells, "full against base", "base")
    assert text.startswith("Not shown to be above base: humor (1 of 2 personas;")
    assert tables.fell_short({}, "full against base", "base") == ""


def test_the_last_third_of_a_conversation_is_compared_with_the_first(written):
    _, jobs, _ = written
    tables = importlib.import_module("character_tables")
    job = next(j for j in jobs if j.stage.name == "evaluation/drift")
    rows = [row for row in kept_rows(job) if row["condition"] == "full"]
    cells = tables.thirds(rows, "classifier", job.config.pressure_every, job.config.turns)
    changes = []
    for row in rows:
        values = values_by_turn(row, "classifier", job.config.pressure_every)
        first, last = (
            [values[t] for t in turns if t in values] for turns in ((1, 2, 3), (7, 8, 9))
        )
        changes.append(sum(last) / len(last) - sum(first) / len(first))
    assert cells["change"].value == pytest.approx(sum(changes) / len(changes))
    assert cells["change"].n == len(rows)
    ended = [row | {"turns": row["turns"][:3], "recognized": row["recognized"][:3]} for row in rows]
    assert tables.thirds(ended, "classifier", 5, 9)["change"] == Change(None, None, None, 0, 4)


def test_a_p_value_agrees_with_the_interval_of_the_change(script):
    from scipy.stats import ttest_1samp

    tables = importlib.import_module("further_tables")
    before = [{"item": n, "harm": 0.3 + n / 1000} for n in range(200)]
    after = [{"item": n, "harm": 0.3 + (n % 7) / 100} for n in range(200)]
    change = side_effects.change(before, after)
    differences = [b["harm"] - a["harm"] for a, b in zip(before, after, strict=True)]
    assert tables.p_value(change) == pytest.approx(ttest_1samp(differences, 0).pvalue, rel=0.9)
    edge = Score(0.1, 0.0, 0.2, 20)
    assert tables.p_value(edge) == pytest.approx(0.05)
    assert tables.p_value(Score(None, None, None, 0)) != tables.p_value(edge)


def write_humor(storage: Path) -> None:
    """Write a run of one persona."""
    stored_run.write(RECIPE, schema.load_all(["humor"]), Store(str(storage)), seed=1)


def test_two_runs_stand_side_by_side_with_paired_changes(script, written, tmp_path):
    run, _, _ = written
    beside = importlib.import_module("side_by_side")
    write_humor(tmp_path / "runs")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.model_dump_json())
    other = script.open_run(str(tmp_path / "runs"), str(recipe))
    text = beside.compare(run, other)
    (shown,) = (row for row in lines(text, "assertions shown, humor"))
    rows = [
        adherence.of(kept_rows(r.finished("evaluation/adherence")["humor"]), "full", "occasion")
        for r in (run, other)
    ]
    assert shown[1:3] == [in_percent(adherence.all_present(side)) for side in rows]
    assert shown[3].startswith(f"{points(adherence.all_changed(*rows).value)} (")
    others = lines(beside.compare(run, other, "base"), "assertions shown, humor")
    assert others[0][1:] != shown[1:]
    (late,) = lines(text, "recognized in long conversations, last third, humor")
    conversations = [
        drift_report.of(kept_rows(r.finished("evaluation/drift")["humor"]), "full")
        for r in (run, other)
    ]
    settings, tables = run.recipe.evaluation.drift, importlib.import_module("character_tables")
    thirds = [
        tables.thirds(side, "classifier", settings.pressure_every, settings.turns)["last third"]
        for side in conversations
    ]
    assert late[1:3] == [in_percent(score) for score in thirds]
    same = lines(beside.compare(run, run), "assertions shown, humor")
    assert same[0][3].startswith("+0.0 (")
    with pytest.raises(UserError, match="share no persona"):
        beside.compare(run, replace(other, personas=[]))


def test_runs_that_share_their_dpo_adapter_are_compared(script, written, tmp_path):
    run, _, _ = written
    ablations = importlib.import_module("ablations")
    beside = importlib.import_module("side_by_side")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.model_dump_json())
    write_humor(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    one, two = (script.open_run(str(tmp_path / name), str(recipe)) for name in ("one", "two"))
    text = ablations.compare({"introspection": one, "plain answers": two})
    (trained, late) = lines(text, "plain answers")
    assert trained[1:3] == ["10", "500"]
    before, after = (beside.conversation_thirds(two, "humor", c) for c in ("distilled", "full"))
    changes = [after[at][1] - before[at][1] for at in before]
    assert late[3].startswith(f"{points(sum(changes) / len(changes))} (")
    (shown,) = lines(text, "assertions shown")
    assert shown[1].startswith("+0.0 (")
    with pytest.raises(UserError, match="give one's"):
        ablations.compare({"introspection": run})
    earlier = {name: m | {"finished": "2026-01-01T00:00:00"} for name, m in two.manifests.items()}
    other = replace(two, manifests=earlier)
    with pytest.raises(UserError, match="several DPO adapters"):
        ablations.compare({"introspection": one, "plain answers": other})


def test_figures_are_svg_files_that_say_their_numbers(written):
    _, _, folder = written
    for name in ("drift", "adherence"):
        root = ElementTree.parse(folder / f"{name}.svg").getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        description = root.find("{http://www.w3.org/2000/svg}desc")
        assert description is not None and "full: " in (description.text or "")


def test_answers_are_escaped_and_unselected(written):
    run, _, folder = written
    page = (folder / "answers.md").read_text()
    assert page.count("<table ") == len(NAMES)
    assert page.count("<tr ") == len(NAMES) * (1 + EVALUATION["answers"]["count"])
    assert "full: &lt;b&gt;a | b&lt;/b&gt;<br><br>* Question" in page
    assert run.names == NAMES


def test_text_between_the_tables_is_kept_and_a_second_run_changes_nothing(script, written):
    run, _, folder = written
    path = folder / "eleven-personas.md"
    path.write_text(path.read_text().replace("# Eleven", "# All eleven", 1))
    before = path.read_text()
    script.write(run, folder, device="a machine")
    assert path.read_text() == before
    with pytest.raises(UserError, match="table 'other' is unknown"):
        script.fill("<!-- table: other -->\n<!-- /table -->", {"run": ""})


def test_what_the_storage_lacks_is_named(script, written, tmp_path):
    _, _, folder = written
    runs = tmp_path / "runs"
    shutil.copytree(folder / "runs", runs)
    shutil.rmtree(runs / "echo" / "humor" / "evaluation" / "drift")
    shutil.rmtree(runs / "echo" / "evaluation" / "robustness")
    recipe = str(folder / "recipe.yaml")
    script.write(script.open_run(str(runs), recipe), tmp_path)
    assert "Not finished for humor." in section(tmp_path, "drift")
    absent = "Not measured: the storage has no finished evaluation/robustness."
    assert section(tmp_path, "robustness").strip() == absent
    unfinished = "Not finished: evaluation/robustness (1 of 1 datasets), evaluation/drift (1 of"
    assert unfinished in section(tmp_path, "run")
    with pytest.raises(UserError, match="no folder echo with packaged personas"):
        script.open_run(str(tmp_path), recipe)
