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
from ep_backends.sglang import ledger
from ep_core import plugins

pytestmark = pytest.mark.filterwarnings("default")  # the engine's warnings are not ours to fix

FILES = sorted(Path(ep_backends.sglang.__file__).parent.glob("*.py"))
# of Python, torch, transformers and msgspec, which the search by names takes for SGLang's
OTHERS = {
    *("cell_contents", "AROUND", "structs", "run_until_complete", "to_dict"),
    *("apply_chat_template", "record_event", "wait_event", "Module", "ModuleList", "labels"),
    *("Engine", "n", "argval"),
    "image_pad_len",  # of the older LLaVA code path, whose processors set what they like
}


def failures():
    return {status.target: status.detail for status in ledger.probe() if status.state == "FAILED"}


def test_everything_fits_the_installed_version():
    assert not failures()
    for status in ledger.probe():
        assert status.detail, f"{status.target}: nothing says what it is for"


def test_every_point_says_why_and_until_when():
    for point in (*ledger.CALLED, *ledger.HOOKED.values()):
        assert point.why
        assert point.upstream
        assert point.remove_when


def test_the_version_is_the_one_the_ledger_names():
    from sglang.version import __version__

    assert __version__ == ledger.TESTED


def test_every_hook_is_a_point_and_every_point_a_hook():
    from ep_backends.sglang.plugin import hooks

    assert hooks().keys() == ledger.HOOKED.keys()


@pytest.mark.parametrize(
    "name", ["_evict_device_start", "_evict_device_next_node", "_evict_device_end"]
)
def test_a_private_method_that_sglang_renames_is_noticed(name, monkeypatch):
    """Ours would not be called any more, and eviction would leave prefixes without their ends."""
    from sglang.srt.mem_cache.unified_cache.components.swa import SWAComponent

    rename(SWAComponent, name, monkeypatch)
    (target,) = failures()
    assert target.endswith(f"SWAComponent.{name}")


def rename(base, name, monkeypatch):
    for each in inspect.getmro(base):
        if name in vars(each):
            monkeypatch.setattr(each, f"{name}_of_nodes", vars(each)[name], raising=False)
            monkeypatch.delattr(each, name)


def test_every_redefinition_is_checked(monkeypatch):
    """Whatever SGLang renames of what is redefined, its check fails."""
    names = list(ledger.redefined())
    assert len(names) > 30
    for ours, name in names:
        if name in ledger.NEW[ours.__name__]:
            continue
        with monkeypatch.context() as renamed:
            rename(ours.__bases__[0], name, renamed)
            assert ledger.check_redefined(ours, name).state == "FAILED", f"{ours.__name__}.{name}"


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


class Host:
    declared: int

    def method(self):
        """Sets one more."""
        self.set_by_a_method = self.read_by_a_method


@pytest.mark.parametrize("read", ledger.READ, ids=lambda read: read.owner)
def test_an_attribute_that_is_gone_is_noticed(read):
    gone = ledger.Read(read.owner, (*read.names, "not_there_at_all"), read.why)
    assert ledger.check_read(read).state == "ok"
    assert "it has no not_there_at_all any more" in ledger.check_read(gone).detail


def test_attributes_that_objects_are_given_are_found():
    assert {"declared", "set_by_a_method"} <= ledger._given_to_objects(Host)
    assert "read_by_a_method" not in ledger._given_to_objects(Host)


def test_a_class_that_is_gone_is_a_failure_and_no_traceback():
    gone = ledger.Read("sglang.srt.managers.scheduler:NoSuchClass", ("a",), "")
    assert ledger.check_read(gone).state == "FAILED"


def test_whatever_is_read_is_in_the_ledger():
    """By names: an attribute that is neither ours, the core's, torch's nor Python's is SGLang's."""
    known = set(OTHERS)
    for point in (*ledger.CALLED, *ledger.HOOKED.values()):
        known |= {*point.target.replace(":", ".").split("."), *point.parameters}
    for read in ledger.READ:
        known |= {read.owner.rpartition(":")[2], *read.names}
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
    assert not unlisted, f"read, and not in ledger.READ: {sorted(unlisted)}"


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
import logging, sglang.version
sglang.version.__version__ = "0.5.24"
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
    assert done.stderr.count("tested with SGLang 0.5.23, this is 0.5.24") == 1, done.stderr
