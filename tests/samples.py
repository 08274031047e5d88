"""Small recipes, the command line in a subprocess, and a local S3 bucket for tests."""

import logging
import os
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import pyarrow.fs as pafs

from opencharacter.config.files import read_yaml, resource
from opencharacter.config.recipe import Recipe
from opencharacter.text.filters import AnswerRules

Finished = subprocess.CompletedProcess[str]

ECHO_ROLE = {"model": "echo:", "name": "echo", "self_name": "Echo", "max_model_len": 2048}

RULES = AnswerRules(max_repeated=0.5, quotable=frozenset(), quoted_words=8)

FAKE_KEYS = {
    "AWS_ACCESS_KEY_ID": "LOOPBACKKEYOFATEST",
    "AWS_SECRET_ACCESS_KEY": "loopback-secret-of-a-test",
    "AWS_REGION": "us-east-1",
    "OPENAI_API_KEY": "loopback-key-of-an-endpoint",
}

TINY = {
    "name": "tiny",
    "distillation": {
        "prompts": {"questions_per_trait": 1, "general": 6},
        "teacher": {"answers": 2, "exemplars": True, "prefill": False},
        "student": {"answers": 2},
    },
    "introspection": {
        "reflection": {"transcripts_per_prompt": 1},
        "interaction": {"free": 2, "leading": 2, "turns": 4},
    },
    "evaluation": {"answers": {"count": 6}, "preferences": {"games": 6}},
}


def recipe_of(role: dict, **changes: dict) -> Recipe:
    """Return the tiny recipe with the given role for every model."""
    roles = dict.fromkeys(("teacher", "student", "judge", "prompt_generator"), role)
    return Recipe.model_validate({**TINY, "roles": roles, **changes})


def embedded_recipe() -> dict:
    """Return the demo recipe, reduced to its smallest size, as a mapping."""
    path = resource("recipes", "demo.yaml")
    assert path is not None
    data = read_yaml("recipe", path)
    data["name"] = "tiny"
    short = {"temperature": 0.6, "top_p": 1.0, "trim": True}
    lora, optimizer = {"rank": 8, "alpha": 16}, {"global_batch_size": 4, "learning_rate": 2e-4}
    loose = {"max_drop_rate": 1.0}
    data["distillation"] = {
        "prompts": {"questions_per_trait": 1, "general": 2},
        "teacher": {
            "answers": 1,
            "exemplars": True,
            "prefill": False,
            "sampling": {**short, "max_tokens": 32},
            **loose,
        },
        "student": {"answers": 1, "sampling": {**short, "max_tokens": 32}, **loose},
        "pairs": loose,
        "dpo": {"lora": lora, "optimizer": optimizer},
    }
    data["introspection"] = {
        "reflection": {
            "transcripts_per_prompt": 1,
            "sampling": {**short, "max_tokens": 32},
            **loose,
        },
        "interaction": {
            "free": 1,
            "leading": 1,
            "turns": 4,
            "sampling": {**short, "max_tokens": 32},
            **loose,
        },
        "transcripts": loose,
        "sft": {"lora": lora, "optimizer": optimizer},
    }
    word = {"max_tokens": 6, "temperature": 0.1, "repetition_penalty": 1.0}
    data["evaluation"] = {
        "judge": {"gold_items": 4, "min_agreement": None, "sampling": word},
        "attacks": {
            "conditions": ["base", "full"],
            "prompts": 2,
            "kinds": ["plain", "prefill"],
            "sampling": {**short, "max_tokens": 16},
            **loose,
        },
        "coherence": {"prompts": 2, "sampling": word},
        "scenarios": {"occasions": 2, "pressures": 1, "assertions": 2, "max_turns": 2},
        "adherence": {
            "conditions": ["base", "full"],
            "control_texts": 2,
            "sampling": {**short, "max_tokens": 16},
            **loose,
        },
        "drift": {
            "conditions": ["base", "full"],
            "conversations": 2,
            "turns": 4,
            "pressure_every": 3,
            "judged_turns": 2,
            "sampling": {**short, "max_tokens": 16},
            **loose,
        },
        "direction": {"texts": 3, "prompts": 2, "max_tokens": 96},
        "projection": {"texts": 3},
        "side_effects": {
            "conditions": ["base", "full"],
            "items": 1,
            "sampling": {**short, "max_tokens": 16},
            **loose,
        },
        "answers": {
            "conditions": ["base", "prompted", "full"],
            "count": 4,
            "sampling": {**short, "max_tokens": 24},
        },
        "preferences": {
            "conditions": ["base", "full"],
            "games": 6,
            "traits": ["poetic", "technical"],
            "sampling": {**short, "max_tokens": 24},
            "judge": word,
        },
    }
    return data


def cli(*arguments: str, cwd: Path, typed: str = "", **environment: str) -> Finished:
    """Run `opencharacter` in a subprocess."""
    return subprocess.run(
        [sys.executable, "-m", "opencharacter", *arguments],
        cwd=cwd,
        input=typed,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200", **environment},
    )


class Bucket:
    """A bucket on a local moto server. Its content survives a stop of the server."""

    def __init__(self):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.name = f"bucket-{uuid.uuid4().hex[:8]}"
        self.url = f"s3://{self.name}/runs?endpoint_override=127.0.0.1:{self.port}&scheme=http"
        logging.getLogger("werkzeug").setLevel(logging.ERROR)

    def start(self) -> None:
        from moto.server import ThreadedMotoServer

        self.server = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self.server.start()

    def stop(self) -> None:
        self.server.stop()

    def filesystem(self) -> pafs.S3FileSystem:
        """Return a filesystem that accesses the bucket without the package."""
        address = f"127.0.0.1:{self.port}"
        return pafs.S3FileSystem(
            endpoint_override=address, scheme="http", allow_bucket_creation=True
        )

    def create(self) -> None:
        self.filesystem().create_dir(self.name)

    def paths(self) -> list[str]:
        """Return the paths of all files in the bucket."""
        infos = self.filesystem().get_file_info(pafs.FileSelector(self.name, recursive=True))
        return [info.path for info in infos if info.is_file]

    def read(self, path: str) -> bytes:
        """Return the content of a file, or nothing if the file does not exist."""
        try:
            with self.filesystem().open_input_file(path) as file:
                return file.read()
        except OSError:
            return b""
