"""A stage of the paper's size with the echo engine: the driver's memory stays bounded."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from samples import ECHO_ROLE, TINY

from opencharacter.runtime.store import Store

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("one_stage.py")
STAGE = "introspection/interaction"


def peak_memory(folder: Path, rows: int) -> float:
    """Run an interaction stage of ten turns; return the driver's peak memory in MB."""
    folder.mkdir()
    sizes = {"free": rows // 2, "leading": rows // 2, "turns": 10, "limits": {"min_texts": 10**6}}
    recipe = {**TINY, "introspection": {"interaction": sizes}}
    recipe["roles"] = dict.fromkeys(("teacher", "student", "judge", "prompt_generator"), ECHO_ROLE)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    pools = {"student": {"cpus": 0.5, "max_num_seqs": 1024}}
    placement = {"pools": pools, "ray_cpus": 2}
    (folder / "wide.yaml").write_text(yaml.safe_dump(placement))
    command = [sys.executable, str(SCRIPT), "tiny.yaml", "poeticism", STAGE, "wide.yaml"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    stored = Store(str(folder / "runs/tiny")).read_table(f"echo/poeticism/{STAGE}", columns=["id"])
    assert len(set(stored["id"].to_pylist())) == len(stored) == rows
    return float(result.stdout.rsplit("peak MB: ")[-1])


def test_the_memory_of_the_driver_hardly_grows_with_the_number_of_rows(tmp_path):
    few, many = peak_memory(tmp_path / "few", 1200), peak_memory(tmp_path / "many", 12_000)
    assert many < 500
    assert many - few < 100
