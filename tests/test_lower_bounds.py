"""Each lower bound in pyproject.toml is a version that CI installs and tests."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
OLDEST = "constraints-oldest.txt"
OTHERS = {  # what has an environment of its own, or only checks the sources
    "sglang": "tests/sglang/constraints.txt",
    "lmdeploy": "tests/lmdeploy/constraints.txt",
    "lmms-eval": "tests/lmms_eval/constraints.txt",
    "ruff": "constraints.txt",
    "mypy": "constraints.txt",
    "import-linter": "constraints.txt",
}
REQUIREMENTS = sorted({*PROJECT["dependencies"], *(text for e in EXTRAS.values() for text in e)})


def pinned(file):
    lines = (line.partition("#")[0].strip() for line in (ROOT / file).read_text().splitlines())
    pins = [Requirement(line) for line in lines if line]
    assert len({canonicalize_name(pin.name) for pin in pins}) == len(pins), f"{file} repeats a name"
    versions = {}
    for pin in pins:
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        versions[canonicalize_name(pin.name)] = specifier.version
    return versions


def test_each_requirement_is_named_with_one_range():
    names = [Requirement(text).name for text in REQUIREMENTS]
    assert len(set(names)) == len(names), f"two ranges of one name: {REQUIREMENTS}"


@pytest.mark.parametrize("text", REQUIREMENTS)
def test_the_lower_bound_is_what_ci_installs(text):
    requirement = Requirement(text)
    bounds = [s.version for s in requirement.specifier if s.operator == ">="]
    assert len(bounds) == 1, f"{text} has no lower bound"
    file = OTHERS.get(requirement.name, OLDEST)
    installed = pinned(file)[requirement.name]
    assert requirement.specifier.contains(installed)
    if requirement.name == "torch":
        pytest.skip("no torch before 2.13 has a CPU build; docs/transformers.md: tried by hand")
    assert Version(installed) == Version(bounds[0]), f"{text}, but {file} installs {installed}"
