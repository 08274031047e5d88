"""What is lost in the middle of a swap, and a Ray that is restarted, change nothing that is stored.

The engines are those of `fake_engines`: their replies name their weights, so mixed weights show.
"""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from samples import embedded_recipe

from opencharacter.runtime.store import Store

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("fake_engines.py")
PERSONA = "smollm2-135m/poeticism"
DATASET = f"{PERSONA}/evaluation/answers"
PROMPTS = 6


def run(folder: Path, disturbance: str, stages: str = "evaluation/answers@persona") -> None:
    """Run stages on two replicas of an engine, and lose something during the swap."""
    recipe = embedded_recipe()
    recipe["evaluation"]["answers"] |= {
        "conditions": ["base", "prompted", "full"],
        "count": PROMPTS,
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    pool = {"replicas": 2, "cpus": 0.4, "memory_gib": 0.1, "max_num_seqs": 4}
    placement = {"ray_cpus": 2, "object_store_gib": 0.1, "training": {"cpus": 1}}
    placement["pools"] = {"student": pool}
    (folder / "two.yaml").write_text(yaml.safe_dump(placement))
    for storage in ("runs/tiny", "again"):
        prompts = pa.table({"id": ["1"], "prompt": ["Hello?"]})
        Store(str(folder / storage)).write_table("poeticism/distillation/prompts", prompts)
    command = [sys.executable, str(SCRIPT), disturbance, "tiny.yaml", "poeticism", stages]
    ended = subprocess.run([*command, "two.yaml"], cwd=folder, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def answers(folder: Path) -> list[str]:
    """Return the answers in the order of their ids, of which each is stored once."""
    rows = Store(str(folder)).read_table(DATASET).sort_by("id").to_pylist()
    assert len({row["id"] for row in rows}) == len(rows) == 2 * PROMPTS
    for row in rows:
        weights = "full" if row["condition"] == "full" else "base"
        assert row["answer"].endswith(f"of the weights {weights}.")
    return [row["answer"] for row in rows]


def manifest(folder: Path) -> dict:
    return json.loads((folder / DATASET / "manifest.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> list[str]:
    """The answers of a run whose Ray is shut down, and which is repeated in a new one."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run(folder, "session")
    first, again = manifest(folder / "runs/tiny"), manifest(folder / "again")
    assert (len(first["engines_started"]), len(first["engines_swapped"])) == (1, 1)
    assert (len(again["engines_started"]), len(again["engines_swapped"])) == (1, 1)
    assert answers(folder / "again") == answers(folder / "runs/tiny")
    return answers(folder / "runs/tiny")


def test_engines_of_a_ray_that_was_shut_down_are_not_used_in_the_next_one(undisturbed):
    assert undisturbed


@pytest.mark.parametrize("lost", ["engine", "actor", "node"])
def test_what_is_lost_during_a_swap_leaves_no_mixed_weights(undisturbed, lost, tmp_path):
    run(tmp_path, lost)
    assert answers(tmp_path / "runs/tiny") == undisturbed
    used = manifest(tmp_path / "runs/tiny")
    assert (len(used["engines_started"]), used["engines_swapped"]) == (2, [])
