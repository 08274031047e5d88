"""What makes the start of an engine short."""

from opencharacter.engines.backends import cache_environment


def test_compiled_graphs_are_kept_in_the_cache_of_the_package(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENCHARACTER_CACHE", str(tmp_path))
    for name in ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    assert cache_environment() == {
        "VLLM_CACHE_ROOT": str(tmp_path / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "torchinductor"),
    }


def test_folders_that_the_environment_sets_are_used(monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", "/fast/vllm")
    assert cache_environment()["VLLM_CACHE_ROOT"] == "/fast/vllm"
