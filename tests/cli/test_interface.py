"""`import entropyprune`: what a program uses, and how little it costs to import."""

import subprocess
import sys

import pytest

import entropyprune
import ep_backends.transformers
import ep_core

WITHOUT = """
import sys

class Absent:
    def find_spec(name, path, target=None):
        if name == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent)
"""


def python(code, without=None):
    """Run it in a new process, where a package is not installed."""
    code = WITHOUT.format(package=without) + code
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_every_public_name_is_the_thing_itself():
    assert entropyprune.enable is ep_backends.transformers.enable
    assert entropyprune.Pruning is ep_backends.transformers.Pruning
    assert entropyprune.PruningPolicy is ep_core.PruningPolicy
    assert entropyprune.EntropyPruneError is ep_core.EntropyPruneError
    assert dir(entropyprune) == sorted(entropyprune.__all__)
    for name in entropyprune.__all__:
        assert getattr(entropyprune, name), name


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'entropyprune' has no attribute 'disable'"):
        entropyprune.disable  # noqa: B018


def test_importing_imports_no_framework():
    code = "import entropyprune, sys; entropyprune.__version__; print(*sys.modules)"
    done = python(code)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    heavy = {"torch", "numpy", "transformers", "click", "rich", "PIL", "ep_core", "ep_backends"}
    assert "entropyprune" in loaded
    assert not loaded & heavy


def test_a_policy_needs_no_engine():
    code = "import entropyprune; print(entropyprune.PruningPolicy.parse('layer=2,keep=9'))"
    done = python(code, without="transformers")
    assert done.stdout == "layer=2,keep=9,method=released\n", done.stderr


def test_enable_without_transformers_says_what_to_install():
    done = python("from entropyprune import enable", without="transformers")
    last = done.stderr.splitlines()[-1]
    assert last == (
        "ImportError: entropyprune.enable needs transformers; "
        "run pip install 'entropyprune[transformers]'"
    )


@pytest.mark.parametrize("package", ["click", "rich", "PIL"])
def test_the_command_line_without_its_packages_is_one_line(package):
    done = python("import entropyprune.__main__", without=package)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"entropyprune: error: the command line needs {package}; "
        "run pip install 'entropyprune[cli]'\n"
    )


def test_a_defect_of_ours_is_no_missing_package():
    done = python("import entropyprune.__main__", without="ep_core.plan")
    assert "ModuleNotFoundError" in done.stderr.splitlines()[-1]


def test_the_module_runs_as_the_command():
    command = [sys.executable, "-m", "entropyprune", "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    expected = f"entropyprune, version {entropyprune.__version__}\n"
    assert (done.returncode, done.stdout) == (0, expected), done.stderr
