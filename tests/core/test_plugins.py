"""Hooks, discovery through entry points, and plugins that are broken, blocked or in conflict."""

import json
import os
import re
import subprocess
import sys
import warnings
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch

from ep_core import hookspecs
from ep_core.backend import BackendSpec
from ep_core.budget import DecoderShape
from ep_core.errors import PluginError, UnsupportedError
from ep_core.family import Decoder, Family, PatchGrid, Placeholder
from ep_core.hookspecs import hookimpl
from ep_core.plan import Run, runs_of
from ep_core.plugins import ENV_BLOCK, collect, load_plugins, new_manager
from ep_core.selectors import Selector, SpanInputs, top_k

HOOKS_PAGE = Path(__file__).parents[2] / "docs" / "hooks.md"
SELECTORS = "entropyprune_selectors"
HOOKS = sorted(name for name in vars(hookspecs) if name.startswith("entropyprune_"))


def manager_with(**plugins):
    manager = new_manager()
    for name, plugin in plugins.items():
        manager.register(plugin, name=name)
    return manager


def lowest_norm(inputs, k):
    return top_k(-inputs.hidden.float().norm(dim=1), k)


def a_selector(name="low-norm"):
    return Selector(name, "smallest hidden norm", frozenset({"hidden"}), lowest_norm)


def a_family(model_type="my_vlm"):
    return Family(
        model_type=model_type,
        name="Mine",
        default_layer=3,
        default_layer_source="a test",
        decoder=lambda config: Decoder(DecoderShape(4, 8, 16, 2, 2, 4)),
        find=lambda config, ids: [Placeholder(run) for run in runs_of(ids, config["image"])],
        patch_grid=lambda config, tokens, size: PatchGrid(1, tokens, (0, 0, *size)),
    )


def plugin(hook, *items):
    """An object with one implementation of the named hook."""

    def provide():
        return list(items)

    provide.__name__ = hook
    return type("Plugin", (), {hook: staticmethod(hookimpl(provide))})()


def test_hook_entropyprune_selectors():
    registry = collect(manager_with(mine=plugin("entropyprune_selectors", a_selector())))
    chosen = registry.selector("low-norm")
    hidden = torch.tensor([[3.0], [1.0], [2.0]])
    assert chosen(SpanInputs(hidden=hidden), 2).tolist() == [1, 2]
    assert registry.providers["selector low-norm"] == "mine"
    with pytest.raises(PluginError, match="unknown method 'high-norm'; there are low-norm"):
        registry.selector("high-norm")


def test_hook_entropyprune_families():
    registry = collect(manager_with(mine=plugin("entropyprune_families", a_family())))
    family = registry.family("my_vlm")
    assert family.find({"image": 5}, [1, 5, 5]) == [Placeholder(Run(1, 3))]
    assert registry.providers["family my_vlm"] == "mine"
    with pytest.raises(UnsupportedError, match=r"model type 'your_vlm' is no .*; there are my_vlm"):
        registry.family("your_vlm")


def test_hook_entropyprune_backends():
    loaded = []
    spec = BackendSpec("my-engine", "one line", lambda: loaded.append(1))
    registry = collect(manager_with(mine=plugin("entropyprune_backends", spec)))
    assert registry.backend("my-engine") is spec
    assert not loaded, "collecting loads no engine"
    assert registry.providers["backend my-engine"] == "mine"
    with pytest.raises(PluginError, match="unknown backend 'theirs'; there are my-engine"):
        registry.backend("theirs")


def test_every_hook_has_a_test_of_its_name():
    assert HOOKS, "no hook specification found"
    assert [hook for hook in HOOKS if f"test_hook_{hook}" not in globals()] == []


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_documented_by_its_exact_name(hook):
    page = HOOKS_PAGE.read_text(encoding="utf-8")
    assert re.search(rf"\b{hook}\(\)", page), f"{hook}() not in {HOOKS_PAGE}"


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_specification_has_an_example_and_is_never_called(hook):
    spec = getattr(hookspecs, hook)
    assert "Example: `return [" in spec.__doc__
    with pytest.raises(AssertionError, match="never called"):
        spec()


@pytest.mark.parametrize(
    ("hook", "make", "kind"),
    [
        ("entropyprune_selectors", a_selector, "selector 'one'"),
        ("entropyprune_families", a_family, "family 'one'"),
        ("entropyprune_backends", lambda n: BackendSpec(n, "", print), "backend 'one'"),
    ],
)
def test_two_providers_of_one_name_are_refused_by_both_names(hook, make, kind):
    manager = manager_with(first=plugin(hook, make("one")), second=plugin(hook, make("one")))
    with pytest.raises(PluginError, match=kind) as caught:
        collect(manager)
    assert "'first'" in str(caught.value)
    assert "'second'" in str(caught.value)
    assert re.search(rf"{ENV_BLOCK}=(first|second)$", str(caught.value))


def test_one_name_in_two_kinds_is_no_conflict():
    registry = collect(
        manager_with(
            one=plugin("entropyprune_selectors", a_selector("same")),
            two=plugin("entropyprune_families", a_family("same")),
        )
    )
    assert registry.providers == {"selector same": "one", "family same": "two"}


def selectors_of(function, **options):
    """An object with one implementation of the selectors' hook, marked with the given options."""
    hook = staticmethod(hookimpl(**options)(function))
    return type("Plugin", (), {SELECTORS: hook})()


def collected(**plugins):
    """The registry that the plugins give, and the warnings about them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        registry = collect(manager_with(**plugins))
    return registry, [str(warning.message) for warning in caught]


def without_bad(results):
    return [[item for item in items if item.name != "bad"] for items in results]


def filtering():
    return without_bad((yield))


def filtering_in_old_style():
    outcome = yield
    outcome.force_result(without_bad(outcome.get_result()))


def filtering_in_place():
    results = yield
    for items in results:
        items[:] = [item for item in items if item.name != "bad"]
    return results


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (filtering, {"wrapper": True}),
        (filtering, {"wrapper": True, "tryfirst": True}),
        (filtering_in_place, {"wrapper": True}),
        (filtering_in_old_style, {"hookwrapper": True}),
    ],
)
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_wrapper_filters_what_the_plugins_provide(function, options, place):
    plugins = {
        "one": plugin(SELECTORS, a_selector("good"), a_selector("bad")),
        "two": plugin(SELECTORS, a_selector("better")),
        "three": plugin("entropyprune_families", a_family()),
    }
    order = list(plugins)
    order.insert({"first": 0, "middle": 1, "last": 3}[place], "filter")
    plugins["filter"] = selectors_of(function, **options)
    registry, told = collected(**{name: plugins[name] for name in order})
    assert not told
    assert set(registry.selectors) == {"good", "better"}
    assert registry.providers == {
        "selector good": "one",
        "selector better": "two",
        "family my_vlm": "three",
    }


@pytest.mark.parametrize(
    ("marks", "order"),
    [
        ({}, ["two", "marked", "one"]),  # who registered last is called first
        ({"tryfirst": True}, ["marked", "two", "one"]),
        ({"trylast": True}, ["two", "one", "marked"]),
    ],
)
def test_plugins_are_called_in_pluggys_order(marks, order):
    def provide():
        return [a_selector("marked")]

    registry, told = collected(
        one=plugin(SELECTORS, a_selector("one")),
        marked=selectors_of(provide, **marks),
        two=plugin(SELECTORS, a_selector("two")),
    )
    assert list(registry.selectors) == order
    assert not told


def test_the_wrapper_in_hooks_md_takes_a_method_out():
    _, block = re.findall(r"```python\n(.*?)```", HOOKS_PAGE.read_text(encoding="utf-8"), re.S)
    namespace = {}
    exec(block, namespace)
    example = type("P", (), {SELECTORS: staticmethod(namespace[SELECTORS])})()
    registry, told = collected(
        ours=plugin(SELECTORS, a_selector("rows"), a_selector("trace")), example=example
    )
    assert not told
    assert registry.providers == {"selector rows": "ours"}


def test_what_a_wrapper_adds_or_replaces_is_its_own():
    mine = a_selector("mine")

    def wrapper():
        results = yield
        return [[a_selector("replaced"), *items[1:]] for items in results] + [[mine]]

    registry, told = collected(
        one=plugin(SELECTORS, a_selector("first"), a_selector("kept")),
        decorator=selectors_of(wrapper, wrapper=True),
    )
    assert not told
    assert registry.selector("mine") is mine
    assert registry.providers == {
        "selector replaced": "decorator",
        "selector kept": "one",
        "selector mine": "decorator",
    }


def test_a_wrapper_may_decide_between_two_providers_of_one_name():
    def wrapper():
        return (yield)[:1]  # of who registered last

    registry, told = collected(
        one=plugin(SELECTORS, a_selector("same")),
        two=plugin(SELECTORS, a_selector("same")),
        judge=selectors_of(wrapper, wrapper=True),
    )
    assert not told
    assert registry.providers == {"selector same": "two"}


def raising_before():
    raise RuntimeError("out of order")
    yield


def raising_behind():
    (yield).clear()
    raise RuntimeError("out of order")


def raising_in_old_style():
    (yield).force_result([])
    raise RuntimeError("out of order")


def never_yielding():
    return []
    yield


def yielding_twice():
    yield (yield).clear()


def returning_nothing():
    yield


def returning_items_in_no_list():
    return [item for items in (yield) for item in items]


def returning_other_things():
    yield
    return [["a string is no selector"]]


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (raising_before, {"wrapper": True}),
        (raising_before, {"hookwrapper": True}),
        (raising_behind, {"wrapper": True}),
        (raising_in_old_style, {"hookwrapper": True}),
        (never_yielding, {"wrapper": True}),
        (never_yielding, {"hookwrapper": True}),
        (yielding_twice, {"wrapper": True}),
        (returning_nothing, {"wrapper": True}),
        (returning_items_in_no_list, {"wrapper": True}),
        (returning_other_things, {"wrapper": True}),
    ],
)
def test_a_wrapper_that_breaks_costs_one_warning_and_changes_nothing(function, options):
    registry, told = collected(
        one=plugin(SELECTORS, a_selector("good"), a_selector("bad")),
        broken=selectors_of(function, **options),
        filter=selectors_of(filtering, wrapper=True),
        two=plugin(SELECTORS, a_selector("better")),
    )
    # pluggy may have a word of its own
    ours = [text for text in told if text.startswith("entropyprune plugin")]
    assert len(ours) == 1, told
    assert ours[0].startswith("entropyprune plugin 'broken' is left out")
    assert registry.providers == {"selector good": "one", "selector better": "two"}


def test_a_wrapper_hides_no_plugin_that_breaks():
    registry, told = collected(
        one=plugin(SELECTORS, a_selector("good")),
        broken=selectors_of(raising),
        filter=selectors_of(filtering, wrapper=True),
    )
    assert [text.split("'")[1] for text in told] == ["broken"]
    assert registry.providers == {"selector good": "one"}


def test_what_no_plugin_has_broken_is_an_error_and_no_loop(monkeypatch):
    manager = new_manager()
    monkeypatch.setattr(manager, "subset_hook_caller", None)
    with pytest.raises(TypeError):
        collect(manager)


def test_a_hook_implemented_under_another_name_counts():
    class Plugin:
        @hookimpl(specname="entropyprune_selectors")
        def mine(self):
            return [a_selector()]

        @hookimpl(specname="entropyprune_families")
        def broken(self):
            raise RuntimeError("out of order")

    registry, told = collected(one=Plugin(), two=plugin("entropyprune_families", a_family()))
    assert [text.split("'")[1] for text in told] == ["one"]
    assert registry.providers == {"selector low-norm": "one", "family my_vlm": "two"}


def test_one_plugin_that_provides_a_name_twice_is_refused():
    twice = plugin(SELECTORS, a_selector("same"), a_selector("same"))
    with pytest.raises(PluginError, match="'same' is provided twice, by 'mine'; block"):
        collect(manager_with(mine=twice))


def test_two_plugins_that_share_an_item_are_refused_by_both_names():
    shared = a_selector("same")
    plugins = {name: plugin(SELECTORS, shared) for name in ("first", "second")}
    unconcerned = selectors_of(filtering, wrapper=True)
    with pytest.raises(PluginError, match="by 'first' and 'second'; block"):
        collect(manager_with(**plugins, filter=unconcerned))


def test_one_plugin_under_two_names_is_registered_once():
    mine = plugin(SELECTORS, a_selector())
    manager = manager_with(mine=mine)
    with pytest.raises(ValueError, match="already registered"):
        manager.register(mine, name="again")


def raising():
    raise RuntimeError("out of order")


def nothing():
    return None


def other_things():
    return ["a string is no selector"]


@pytest.mark.parametrize("implementation", [raising, nothing, other_things])
def test_a_hook_that_breaks_costs_one_warning_and_the_rest_works(implementation):
    def provide():
        return implementation()

    broken = type("P", (), {"entropyprune_selectors": staticmethod(hookimpl(provide))})()
    provide.__name__ = "entropyprune_selectors"
    manager = manager_with(
        broken=broken,
        good=plugin(SELECTORS, a_selector()),
    )
    with pytest.warns(UserWarning, match="plugin 'broken' is left out") as caught:
        registry = collect(manager)
    assert len(caught) == 1
    assert list(registry.selectors) == ["low-norm"]


def install(folder, entry_points, **modules):
    """A distribution as pip leaves it: modules and a dist-info with entry points."""
    for name, code in modules.items():
        (folder / f"{name}.py").write_text(code, encoding="utf-8")
    for number, (name, target) in enumerate(entry_points):
        info = folder / f"fake_{number}_{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: fake-{number}-{name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[entropyprune]\n{name} = {target}\n")


GOOD = """
from ep_core.family import Decoder, Family, PatchGrid, Placeholder
from ep_core.hookspecs import hookimpl
from ep_core.plan import Run, runs_of
from ep_core.selectors import Selector, top_k

@hookimpl
def entropyprune_selectors():
    norm = lambda inputs, k: top_k(-inputs.hidden.float().norm(dim=1), k)
    return [Selector("low-norm", "smallest hidden norm", frozenset({"hidden"}), norm)]
"""

PRINT_REGISTRY = """
import json, sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from ep_core.plugins import registry
    found = registry()
    assert registry() is found
print(json.dumps({
    "selectors": sorted(found.selectors),
    "backends": sorted(found.backends),
    "families": sorted(found.families),
    "provider": found.providers.get("selector low-norm"),
    "imported": sorted(name for name in sys.modules if name.startswith("a_plugin")),
    "warnings": [str(w.message) for w in caught],
    "heavy": "transformers" in sys.modules,
}))
"""


def test_installed_plugins_are_found_broken_ones_warn_and_blocked_ones_are_not_imported(tmp_path):
    install(
        tmp_path,
        [
            ("good", "a_plugin_good"),
            ("broken", "a_plugin_broken"),
            ("absent", "a_plugin_absent"),
            ("noisy", "a_plugin_noisy"),
            ("unwanted", "a_plugin_unwanted"),
        ],
        a_plugin_good=GOOD,
        a_plugin_broken="import no_such_engine\n",
        a_plugin_noisy=GOOD.replace("low-norm", "x"),
        a_plugin_unwanted=GOOD.replace("low-norm", "y"),
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run(
        [sys.executable, "-c", PRINT_REGISTRY],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path, ENV_BLOCK: "unwanted, noisy, peers,"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["selectors"] == ["low-norm", "released", "rows", "set-entropy", "trace"]
    assert found["provider"] == "good"
    assert found["imported"] == ["a_plugin_good"], "a blocked or broken plugin was imported"
    assert [re.findall("plugin '(.*?)' is left out", text) for text in found["warnings"]] == [
        ["absent"],
        ["broken"],
    ]
    assert "no_such_engine" in found["warnings"][1]
    assert found["families"] == ["internvl", "llava", "qwen2_5_vl", "qwen2_vl"]
    assert "transformers" in found["backends"]
    assert not found["heavy"], "listing what there is imports transformers"


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Install fake distributions for this process and forget their modules afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda entry_points, **modules: install(tmp_path, entry_points, **modules)
    for name in set(sys.modules) - before:
        if name.startswith("a_plugin"):
            del sys.modules[name]


def test_our_own_plugins_come_by_the_same_route():
    ours = {
        entry.name
        for entry in distribution("entropyprune").entry_points
        if entry.group == hookspecs.PROJECT
    }
    registry = collect(load_plugins())
    assert {"released", "rows", "trace", "set-entropy"} <= set(registry.selectors)
    assert {"llava", "qwen2_5_vl"} <= set(registry.families)
    assert "transformers" in registry.backends
    assert registry.providers["selector released"] in ours
    left = collect(load_plugins(blocked=ours))
    assert not set(left.providers.values()) & ours
    assert "released" not in left.selectors, "a blocked plugin still provides"


@pytest.mark.parametrize("name", ["aaa", "zzz"])
def test_a_conflict_is_solved_by_the_block_that_its_message_names(installed, name):
    installed([(name, "a_plugin_z")], a_plugin_z=GOOD.replace("low-norm", "released"))
    with pytest.raises(PluginError, match=f"'selectors' and '{name}'") as caught:
        collect(load_plugins())
    blocked = str(caught.value).rpartition(f"{ENV_BLOCK}=")[2]
    assert collect(load_plugins(blocked=[blocked])).providers["selector released"] == "selectors"


OTHER_ARGUMENTS = GOOD.replace("def entropyprune_selectors():", "def entropyprune_selectors(x):")
FUTURE_HOOK = f"""{GOOD}
@hookimpl
def entropyprune_of_a_later_version():
    return []
"""


@pytest.mark.parametrize(
    "code", [OTHER_ARGUMENTS, FUTURE_HOOK], ids=["other arguments", "a hook we do not have"]
)
def test_a_plugin_that_does_not_fit_our_hooks_costs_one_warning(installed, code):
    installed([("misfit", "a_plugin_misfit")], a_plugin_misfit=code)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        registry = collect(load_plugins())
    assert [w for w in caught if "'misfit'" in str(w.message)], "nobody is told"
    assert len(caught) == 1, [str(w.message) for w in caught]
    assert {"released", "rows", "trace", "set-entropy"} <= set(registry.selectors)


def test_two_entry_points_of_one_name_are_not_dropped_in_silence(installed):
    installed(
        [("twin", "a_plugin_one"), ("twin", "a_plugin_two")],
        a_plugin_one=GOOD.replace("low-norm", "one"),
        a_plugin_two=GOOD.replace("low-norm", "two"),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = set(collect(load_plugins()).selectors)
            told = [str(w.message) for w in caught]
        except PluginError as error:  # to refuse is as good as to warn
            found, told = set(), [str(error)]
    lost = {"one", "two"} - found
    assert not lost or any("'twin'" in text for text in told), f"{lost} is gone and nobody is told"


def test_two_entry_points_of_one_name_can_be_blocked_one_by_one(installed):
    installed(
        [("twin", "a_plugin_one"), ("twin", "a_plugin_two")], a_plugin_one=GOOD, a_plugin_two=GOOD
    )
    with pytest.raises(PluginError, match="'twin:a_plugin_one' and 'twin:a_plugin_two'") as caught:
        collect(load_plugins())
    blocked = str(caught.value).rpartition(f"{ENV_BLOCK}=")[2]
    left = collect(load_plugins(blocked=[blocked]))
    assert left.providers["selector low-norm"] == "twin:a_plugin_one"
    assert "low-norm" not in collect(load_plugins(blocked=["twin"])).selectors


def test_importing_the_core_imports_no_host_and_no_extra():
    code = "import sys, ep_core; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(run.stdout.split())
    assert {"ep_core", "torch"} <= imported
    hosts = {"transformers", "sglang", "lmdeploy", "ep_adapters", "ep_backends", "ep_conformance"}
    assert imported & (hosts | {"click", "rich", "PIL", "matplotlib"}) == set()
