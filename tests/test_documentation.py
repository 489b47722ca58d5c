"""Documentation that cannot drift: examples run, links resolve, hooks and files are named."""

import re
import runpy
from pathlib import Path

import pytest

from entropyprune.cli.list import family_table, update
from ep_core.errors import EntropyPruneError
from ep_core.plugins import registry

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page
    for folder in (".", "docs", "benchmarks/**", "examples/**")
    for page in ROOT.glob(f"{folder}/*.md")
)


def test_the_example_runs(capsys):
    runpy.run_path(str(ROOT / "examples" / "prune_a_question.py"))
    assert "kept 36 of 144 visual tokens" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


def test_python_blocks_in_the_documentation_compile():
    blocks = 0
    for page in PAGES:
        for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S)):
            compile(block, f"{page.name} block {number}", "exec")
            blocks += 1
    assert blocks >= 3


def test_the_family_in_adapters_md_is_a_working_plugin():
    """The page's family, registered as a plugin, finds the pictures of a prompt."""

    from ep_core import plugins

    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/adapters.md").read_text(), re.S)
    namespace: dict = {}
    exec(block, namespace)
    manager = plugins.new_manager()

    class Plugin:
        entropyprune_families = staticmethod(namespace["entropyprune_families"])

    manager.register(Plugin())
    family = plugins.collect(manager).family("my_vlm")
    found = family.find({"image_token_id": 7}, [1, 7, 7, 2, 7, 3])
    assert [(one.run.start, one.run.stop) for one in found] == [(1, 3), (4, 5)]


@pytest.mark.parametrize("page", ["README.md", "docs/adapters.md"])
def test_the_table_of_families_is_what_the_engines_say(page, tmp_path):
    copy = tmp_path / "page.md"
    copy.write_text((ROOT / page).read_text(encoding="utf-8"), encoding="utf-8")
    update(copy, family_table(registry()))
    assert copy.read_text(encoding="utf-8") == (ROOT / page).read_text(encoding="utf-8"), (
        f"the table of families in {page} is old: run make tables"
    )


def test_a_page_without_marks_gets_no_table(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("no marks here")
    with pytest.raises(EntropyPruneError, match="has no marks for the table"):
        update(page, "| a |\n")
