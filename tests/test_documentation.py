"""Documentation that cannot drift: examples run, links resolve, hooks and files are named."""

import re
import runpy
from pathlib import Path

import pytest

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
    """The page's adapter, registered as a plugin, finds the pictures of a prompt."""

    from ep_core import plugins

    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/adapters.md").read_text(), re.S)
    namespace: dict = {}
    exec(block, namespace)
    manager = plugins.PluginManager()

    class Plugin:
        entropyprune_adapters = staticmethod(namespace["entropyprune_adapters"])

    manager.register(Plugin())
    adapter = plugins.collect(manager).adapter("my_vlm")
    spans = adapter.find_spans({"image_token_id": 7}, [1, 7, 7, 2, 7, 3])
    assert [(span.start, span.stop) for span in spans] == [(1, 3), (4, 5)]


def test_the_third_party_backend_is_as_short_as_the_documentation_says():
    files = ROOT.glob("examples/third_party_backend/**/*")
    sources = [file.read_text() for file in files if file.suffix in (".py", ".toml")]
    assert len(sources) >= 4
    assert sum(bool(line.strip()) for source in sources for line in source.splitlines()) < 150
