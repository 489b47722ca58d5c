"""Whatever of SGLang's is overridden, called or read is in the ledger, and a change is noticed."""

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import ep_backends.sglang
from ep_backends.sglang.ledger import LEDGER, probe
from ep_core import plugins
from ep_core.ledger import check_extension, check_point

from ..ledgers import changes, extending, planted, redefined, renamed  # noqa: TID252 # no package

pytestmark = pytest.mark.filterwarnings("default")  # the engine's warnings are not ours to fix

FILES = sorted(Path(ep_backends.sglang.__file__).parent.glob("*.py"))
# of Python, torch, transformers and msgspec, which the search by names takes for SGLang's
OTHERS = {
    *("cell_contents", "AROUND", "structs", "run_until_complete", "to_dict"),
    *("apply_chat_template", "record_event", "wait_event", "Module", "ModuleList", "labels"),
    *("Engine", "n"),
    "image_pad_len",  # of the older LLaVA code path, whose processors set what they like
}


def failures():
    return {status.target: status.detail for status in probe() if status.state == "FAILED"}


def test_everything_fits_the_installed_version():
    assert not failures()
    for status in probe():
        assert status.detail, f"{status.target}: nothing says what it is for"


def test_the_version_is_the_one_the_ledger_names():
    from sglang.version import __version__

    assert LEDGER.tested[-1] == __version__


def test_every_wrapper_is_a_function_of_ours():
    wrappers = dict(LEDGER.wrappers())
    assert wrappers.keys() == {point.target for point in LEDGER.points["wrapped"]}
    assert len(set(wrappers.values())) == len(wrappers), "one function wraps two"
    for wrapper in wrappers.values():
        assert next(iter(inspect.signature(wrapper).parameters)) == "original"


@pytest.mark.parametrize(("point", "change"), changes(LEDGER))
def test_a_change_of_sglang_is_noticed(point, change):
    with planted(point, change):
        assert check_point(point).state == "FAILED"


@pytest.mark.parametrize(
    "name", ["_evict_device_start", "_evict_device_next_node", "_evict_device_end"]
)
def test_a_private_method_that_sglang_renames_is_noticed(name):
    """Ours would not be called any more, and eviction would leave prefixes without their ends."""
    from sglang.srt.mem_cache.unified_cache.components.swa import SWAComponent

    with renamed(SWAComponent, name):
        (target,) = failures()
    assert target.endswith(f"SWAComponent.{name}")


def test_redefinitions_are_read_off_the_classes():
    assert sum(len(list(redefined(extension))) for extension in LEDGER.extensions) > 20


@pytest.mark.parametrize("extension", LEDGER.extensions, ids=lambda extension: extension.ours)
def test_every_redefinition_that_sglang_renames_is_noticed(extension):
    for base, name in redefined(extension):
        with renamed(base, name):
            failed = [one for one in check_extension(extension) if one.state == "FAILED"]
        assert [one.target.rpartition(".")[2] for one in failed] == [name]


def test_every_class_that_extends_one_of_sglangs_is_in_the_ledger():
    extended = {extension.ours for extension in LEDGER.extensions}
    assert extending(ep_backends.sglang, "sglang") == extended


def test_a_method_of_sglangs_by_the_name_of_one_of_ours_is_noticed(monkeypatch):
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

    monkeypatch.setattr(AttentionBackend, "drop", lambda self: None, raising=False)
    (detail,) = failures().values()
    assert "PrunedAttention has another of the same name" in detail


def test_a_parameter_that_is_gone_is_noticed(monkeypatch):
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    monkeypatch.setattr(UnifiedRadixCache, "checkpoint", lambda self, req, *, stop: None)
    (detail,) = failures().values()
    assert detail == "its signature no longer takes up_to"


@pytest.mark.parametrize("name", ["pp_size", "enable_lora"])
def test_a_refused_argument_that_is_gone_is_noticed(name, monkeypatch):
    from ep_backends.sglang import ledger

    for table in ("FINE", "OFF"):
        known = getattr(ledger, table)
        changed = {f"{key}_of_old" if key == name else key: known[key] for key in known}
        monkeypatch.setattr(ledger, table, changed)
    assert failures() == {"sglang.srt.server_args:ServerArgs": f"it has no {name}_of_old any more"}


def test_whatever_is_read_is_in_the_ledger():
    """By names: an attribute that is neither ours, the core's, torch's nor Python's is SGLang's."""
    known = set(OTHERS)
    for point in LEDGER.all_points():
        known |= {*point.target.replace(":", ".").split("."), *point.takes, *point.reads}
    for owner in (torch, torch.Tensor, torch.cuda, nn.Module, str, list, dict, tuple, set, type):
        known |= set(dir(owner))
    trees = {file.name: ast.parse(file.read_text()) for file in FILES}
    for module in list(sys.modules.values()):
        name = getattr(module, "__name__", "")
        root = name.split(".")[0]
        if root in sys.stdlib_module_names or root in ("ep_core", "ep_backends"):
            known |= set(vars(module))
        if root == "ep_core":
            for value in vars(module).values():
                known |= set(dir(value)) | set(getattr(value, "__annotations__", {}))
    for kind in (Path, os.environ, inspect.Signature, inspect.Parameter, plugins.Registry):
        known |= set(dir(kind)) | set(getattr(kind, "__annotations__", {}))
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                known.add(node.name)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                known.add(node.target.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                known |= {node.attr} if own else set()
    unlisted = {
        f"{name}: {ast.unparse(node)}"
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr not in known
        and not node.attr.startswith("_")
    }
    assert not unlisted, f"read, and not in the ledger: {sorted(unlisted)}"


def a_pipeline_with_a_step_behind_ours(server_args):
    run_hook(validate_deepep_v2_dispatch_token_budget, server_args)  # noqa: F821 # only read
    run_hook(a_new_step, server_args)  # noqa: F821


def test_a_resolution_step_behind_ours_is_noticed(monkeypatch):
    from sglang.srt.arg_groups import pipeline

    monkeypatch.setattr(pipeline, "run_resolution_pipeline", a_pipeline_with_a_step_behind_ours)
    (detail,) = failures().values()
    assert "steps come behind" in detail
    assert "a_new_step" in detail


def test_attributes_of_attention_backends_are_decided_one_by_one():
    """What SGLang reads off a backend is either of both instances, ours, or left at its "no"."""
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

    from ep_backends.sglang.attention import OF_BOTH

    ours = {"needs_cpu_seq_lens", "kv_index_translator"}
    left = {
        *("supports_ragged_verify_graph", "folds_encoder_swa_replay", "attn_backend_list"),
        *("forward_metadata", "supports_draft_extend_metadata_staging", "dllm_attention"),
        "use_captured_forward_metadata_for_breakable_cuda_graph",
        *("prefill_cuda_graph_max_batch_size", "prefill_cuda_graph_default_max_seq_len"),
        "prefer_eager_mixed_prefill_under_dp_attention",
        "skips_prefill_metadata_on_idle_dp_rank",
        "supports_prefill_cuda_graph_max_context_size",
        "supports_full_cuda_graph_chunked_prefix",
    }
    declared = {
        name
        for name, value in vars(AttentionBackend).items()
        if not name.startswith("_") and not callable(value) and not isinstance(value, property)
    }
    assert declared == {*OF_BOTH, *ours, *left}


def test_another_version_is_mentioned_once():
    program = """
from ep_core import ledger
ledger.version = lambda package: "0.5.24"
from ep_backends.sglang.plugin import install
install()
install()
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    assert done.stderr.count("never tested with SGLang 0.5.24, tested is 0.5.23") == 1, done.stderr
