"""What a server reports about itself."""

from types import SimpleNamespace

from opencharacter.serving import observability


def test_the_error_of_a_deployment_that_does_not_start_is_its_last_line(monkeypatch):
    failed = SimpleNamespace(message="failed 3 times\nTraceback ...\nModuleNotFoundError: no x\n")
    applications = {
        "broken": SimpleNamespace(deployments={"one": failed, "two": SimpleNamespace(message="")}),
        "fine": SimpleNamespace(deployments={"one": SimpleNamespace(message="")}),
    }
    status = SimpleNamespace(applications=applications)
    monkeypatch.setattr(observability.serve, "status", lambda: status)
    errors = [observability.start_error(name) for name in ("broken", "fine", "absent")]
    assert errors == [" (ModuleNotFoundError: no x)", "", ""]
