"""The demonstration model loads unchanged in LMDeploy and answers as it does in transformers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ep_core import demo

SAMPLES = json.loads((demo.PICTURES / "samples.json").read_text())[:4]
ASKED = [(sample["image"], each["question"]) for sample in SAMPLES for each in sample["questions"]]
ENGINE = {
    "dtype": "float32",
    "num_gpu_blocks": 128,
    "block_size": 16,
    "kernel_block_size": 16,
    "session_len": 1024,
    "max_batch_size": 4,
    "eager_mode": True,
}


def ask(engine: str, folder: Path, asked: Any, options: dict[str, Any], **env: str) -> Any:
    """What an engine answers, in a process of its own with these environment variables."""
    asked_file, answers_file = folder / "asked.json", folder / f"{engine}.json"
    asked_file.write_text(json.dumps({"asked": asked, "options": options}))
    script = Path(__file__).with_name("answers.py")
    done = subprocess.run(
        [sys.executable, script, engine, asked_file, answers_file],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(answers_file.read_text())


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transformers")
    return ask("transformers", folder, ASKED, {"dtype": "float32"})


def test_same_answers_as_transformers(expected, tmp_path):
    assert ask("lmdeploy", tmp_path, ASKED, ENGINE) == expected


def test_same_answers_through_decode_graphs(expected, tmp_path):
    options = ENGINE | {"eager_mode": False}
    answers = ask("lmdeploy", tmp_path, ASKED, options, LMDEPLOY_FAKE_CUDA_GRAPH_CAPTURE="1")
    assert answers == expected
