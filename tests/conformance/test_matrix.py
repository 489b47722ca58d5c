"""The support matrix of README and docs: of the suite as it is, and without unexplained cells."""

import subprocess
import sys
from pathlib import Path

import pytest

import ep_conformance.__main__ as suite
from ep_conformance.compare import compare, matrix
from ep_conformance.recording import Recording

ROOT = Path(__file__).parents[2]
RECORDED = {
    path.stem: Recording.read(path)
    for path in sorted((ROOT / "conformance_tests/recordings").glob("*.json"))
}


def test_every_engine_was_recorded_on_the_cpu():
    assert RECORDED.keys() >= {"lmdeploy-cpu", "sglang-cpu", "transformers-cpu"}


@pytest.mark.parametrize("page", ["README.md", "docs/conformance.md"])
def test_pages_show_the_recordings(page):
    start, end = suite.MARKS
    shown = (ROOT / page).read_text().split(start)[1].split(end)[0].strip()
    assert shown == matrix(list(RECORDED.values())), "run make conformance"


def test_recordings_are_of_the_suite_as_it_is():
    folder = Path(suite.__file__).parent
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", f"--config-file={folder / 'pytest.ini'}", "-q"),
            *(f"--rootdir={folder}", "--backend=transformers", "--collect-only"),
            *(str(folder / name) for name in suite.LEVELS.values()),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    tests = {line.rpartition("/")[2] for line in done.stdout.splitlines() if "::" in line}
    assert len(tests) > 80
    for name, recording in RECORDED.items():
        files = {test.partition("::")[0] for test in recording.outcomes}
        wanted = {test for test in tests if test.partition("::")[0] in files}
        assert recording.outcomes.keys() == wanted, f"{name} is stale; run make conformance"


@pytest.mark.parametrize("name", RECORDED)
def test_nothing_failed_and_everything_left_out_says_why(name):
    for test, outcome in RECORDED[name].outcomes.items():
        assert outcome.outcome != "failed", test
        assert (outcome.outcome == "passed") == (outcome.reason is None), test


def test_engines_keep_the_same_tokens():
    """On the CPU no engine needs the noise that the suite allows."""
    found = compare([recording for name, recording in RECORDED.items() if name.endswith("-cpu")])
    assert found.tests > 60
    assert not found.lines
