"""What `plan` and `status` say besides numbers: stale datasets, endpoints and prompt sources."""

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from samples import ECHO_ROLE, recipe_of

from opencharacter.cli import plan, status
from opencharacter.config.roles import Role
from opencharacter.distillation import sources
from opencharacter.errors import UserError

CHANGED = ["config.count: 1 -> 2", "parents.echo/a: 1 -> 2"]


def test_plan_and_status_say_in_words_why_a_dataset_is_stale():
    stale = "stale: made from another recipe (config.count: 1 -> 2)"
    assert plan.describe_states([("stale", CHANGED)] * 2) == stale
    assert plan.describe_states([("stale", CHANGED), ("done", [])]) == f"1 {stale}, 1 done"
    counts = {"rows": 1, "dropped": {}, "tokens_out": 1, "seconds": 1, "gpu_seconds": 0}
    store = Mock(manifest=Mock(return_value=counts | {"attempts": []}))
    job = Mock(store=store, state=Mock(return_value=("stale", CHANGED)))
    assert status.status_cells(job)[0] == stale


def test_roles_with_the_same_engine_or_the_same_missing_weights_share_a_line():
    texts = {"teacher": "weights of A", "student": "weights of B", "judge": "weights of A"}
    assert plan.roles_by_text(texts) == ["teacher, judge: weights of A", "student: weights of B"]


def test_plan_says_which_date_an_endpoint_states():
    role = Role.model_validate(ECHO_ROLE | {"model": "m", "endpoint": "http://127.0.0.1:1/v1"})
    assert "states its own date" in plan.endpoint_date(role)
    dated = role.model_copy(update={"date_string": "01 Mar 2025"})
    assert "'01 Mar 2025' is sent" in plan.endpoint_date(dated)
    assert plan.endpoint_date(Role.model_validate(ECHO_ROLE)) == ""


@pytest.fixture
def hub(monkeypatch):
    """Replaces the Hub by a dataset whose rows are `hub.rows`."""
    hub = SimpleNamespace(rows=[], info=Mock())
    stream = Mock(take=lambda count: hub.rows[:count])
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: Mock(dataset_info=hub.info))
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: stream)
    return hub


def test_a_dataset_of_the_hub_is_checked_for_a_plan(hub):
    hub.rows = [{"text": "no"}, {"prompt": "one"}]
    sources.check_hub_source("hf:a/b")
    hub.rows = [{"text": "no"}]
    with pytest.raises(UserError, match=r"hf:a/b: none of the 1 rows has a prompt"):
        sources.check_hub_source("hf:a/b")
    hub.info.side_effect = ValueError("404 not found")
    with pytest.raises(UserError, match=r"'hf:a/b' could not be loaded \(404 not found\)"):
        sources.check_hub_source("hf:a/b")


def test_a_plan_without_a_connection_says_that_a_dataset_was_not_checked(hub):
    import httpx

    hub.info.side_effect = httpx.ConnectError("no route")
    recipe = recipe_of(ECHO_ROLE, distillation={"prompts": {"general_prompts": "hf:a/b"}})
    (line,) = plan.unchecked_sources(Mock(recipe=recipe))
    assert line == "prompts 'hf:a/b' could not be checked: the Hub cannot be reached"
