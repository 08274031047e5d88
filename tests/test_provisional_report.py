"""The report of an unfinished run: what is finished, and ratings so far marked as provisional."""

from __future__ import annotations

import pyarrow as pa
import pytest
from samples import ECHO_ROLE, recipe_of

from opencharacter import pipeline
from opencharacter.api import Run
from opencharacter.cli import run as cli
from opencharacter.config.evaluation import Rating
from opencharacter.errors import UserError
from opencharacter.evaluation import live_ratings
from opencharacter.runtime.stage import StageResult
from opencharacter.runtime.store import RemoteDir, Shards


def games(condition, winners):
    """One game of poetic and blunt for each winner; None for an unreadable verdict."""
    return [
        {
            "id": f"{condition}-{n}",
            "game": n,
            "condition": condition,
            "first": "poetic",
            "second": "blunt",
            "chosen": winner,
            "drop_reason": None,
        }
        for n, winner in enumerate(winners)
    ]


BASE = games("base", ["poetic", "blunt"] * 5)
FULL = games("full", ["poetic"] * 8 + ["blunt", None])


@pytest.fixture
def unfinished(tmp_path):
    """A run whose base model has played its games, and whose persona is playing."""
    run = Run(recipe_of(ECHO_ROLE), ["poeticism"], storage=str(tmp_path / "runs"))
    of_student, of_persona = (j for j in run.jobs if j.stage.name == "evaluation/preferences")
    table = pa.Table.from_pylist(BASE, schema=pa.Table.from_pylist(FULL).schema)
    of_student.store.write_table(of_student.dataset, table)
    pipeline.finish(of_student, StageResult(len(table)), 1.0)
    folder = RemoteDir(of_persona.store, f"{of_persona.dataset}/.shards/full")
    played = pa.Table.from_pylist(FULL)
    Shards(folder, played.schema).write(played, "shard-1")
    return run


def test_ratings_so_far_have_the_games_and_the_unscored_games_of_each_trait():
    (section,) = live_ratings.section("poet", [*BASE, *FULL, *FULL], Rating(), 5)
    assert section.columns == ["Base", "Full"]
    assert list(section.rows) == ["poetic", "blunt"]
    base, full = section.rows["poetic"]["Base"], section.rows["poetic"]["Full"]
    assert base.value == pytest.approx(1000)
    assert 1000 < full.low < full.value < full.high
    assert (full.n, full.unscored) == (9, 1)
    (finding,) = section.findings
    assert finding.endswith("So far there are 10 of base, 10 of full.")
    assert live_ratings.section("poet", games("full", [None]), Rating(), 5) == []
    (short,) = live_ratings.section("poet", FULL, Rating(), 1)
    assert list(short.rows) == ["poetic"]


def test_the_page_of_an_unfinished_run_marks_ratings_as_provisional(unfinished):
    assert not unfinished.is_evaluated()
    path = unfinished.write_provisional_report(refresh_seconds=10)
    with open(path, encoding="utf-8") as file:
        text = file.read()
    assert "<b>This run is not finished.</b> 1 of " in text
    assert "Which traits does the model prefer so far? (provisional)" in text
    assert "n = 9 games, 1 unscored" in text
    assert '<meta http-equiv="refresh" content="10">' in text
    assert unfinished.report_address() is None


def test_a_page_is_written_again_until_the_run_has_its_report(unfinished, monkeypatch, capsys):
    addresses = iter([None, None, "report.html", "report.html"])
    monkeypatch.setattr(Run, "report_address", lambda run: next(addresses))
    monkeypatch.setattr(cli.time, "sleep", lambda seconds: None)
    cli.watch_report(unfinished)
    printed = capsys.readouterr().out
    assert printed.count("report-so-far.html") == 1
    assert "report: report.html" in printed


def test_an_empty_storage_has_no_page(tmp_path):
    run = Run(recipe_of(ECHO_ROLE), ["poeticism"], storage=str(tmp_path / "none"))
    with pytest.raises(UserError, match="is empty, so there is nothing to report; run:"):
        run.write_provisional_report()
