"""What happens before a server runs: the policy is found, arguments are chosen or refused."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ep_backends.sglang
from ep_backends.sglang import arguments, plugin
from ep_backends.sglang.arguments import Orders
from ep_conformance.checkpoints import tiny_internvl
from ep_core import demo
from ep_core.errors import PolicyError, UnsupportedError
from ep_core.policy import ENV, PruningPolicy

pytestmark = pytest.mark.filterwarnings("default")  # the engine's warnings are not ours to fix

POLICY = "layer=2,keep=0.25,method=set-entropy"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    """What the launcher of a server leaves in the environment must not reach other tests."""
    monkeypatch.delenv("ENTROPYPRUNE", raising=False)
    yield
    Orders.give(None)


def resolve(**arguments):
    """Resolve a server's arguments as its launcher does."""
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    load_plugins()
    given = {"model_path": str(demo.MODEL), "device": "cpu", "grammar_backend": "none"}
    server_args = ServerArgs(**(given | arguments))
    server_args.resolve_once()
    return resolving_view(server_args)


def test_nothing_set_changes_no_argument():
    plain = resolve()
    assert plain.radix_cache_backend is None
    assert plain.swa_full_tokens_ratio is None
    assert not plain.disable_prefill_cuda_graph


@pytest.mark.parametrize(
    "override", [{"entropyprune": POLICY}, {"entropyprune": PruningPolicy.parse(POLICY).to_json()}]
)
def test_policy_in_json_reaches_the_workers_through_the_environment(override):
    resolved = resolve(json_model_override_args=json.dumps(override))
    assert Orders.read() == Orders(PruningPolicy.parse(POLICY))
    assert PruningPolicy.from_environment() is None, "what a user sets was overwritten"
    assert resolved.radix_cache_backend == "entropyprune"
    assert resolved.attention_backend == "torch_native"
    # and it is gone for the next engine of this process
    assert resolve().radix_cache_backend is None
    assert Orders.read() is None


def test_policy_in_the_environment_reaches_the_workers_too(monkeypatch):
    monkeypatch.setenv("ENTROPYPRUNE", POLICY)
    assert resolve().radix_cache_backend == "entropyprune"
    assert Orders.read() == Orders(PruningPolicy.parse(POLICY))


def test_a_server_that_this_process_starts_is_not_pruned_by_our_own_policy():
    """What an engine hands to its workers is not what a user set for every server."""
    resolve(json_model_override_args=json.dumps({"entropyprune": POLICY}))
    program = f"from {Path(__file__).stem} import resolve; print(resolve().radix_cache_backend)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent,  # where this module is
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    assert done.stdout.split()[-1] == "None"


@pytest.mark.parametrize("override", ["nonsense", "[]", '{"other": 1}'])
def test_override_that_is_not_for_us_is_left_to_sglang(override):
    assert arguments.asked_for(override) is None


def test_only_who_starts_an_engine_can_allow_details(monkeypatch):
    policy = PruningPolicy.parse(POLICY)

    def asked(**more):
        return arguments.asked_for(json.dumps({"entropyprune": policy.to_json() | more}))

    assert asked() == Orders(policy, details=False)
    assert asked(details=True) == Orders(policy, details=True)
    with pytest.raises(PolicyError, match="details='yes' is not allowed; use true or false"):
        asked(details="yes")
    monkeypatch.setenv("ENTROPYPRUNE", POLICY)
    assert asked(details=True) == Orders(policy, details=True)
    assert arguments.asked_for("") == Orders(policy, details=False)


def test_policy_in_both_places_must_agree(monkeypatch):
    monkeypatch.setenv("ENTROPYPRUNE", POLICY)
    override = json.dumps({"entropyprune": {"layer": 2, "keep": 5}})
    with pytest.raises(UnsupportedError, match="set one of them"):
        resolve(json_model_override_args=override)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pp_size": 2}, "--pp-size 2 .* same device"),
        ({"tp_size": 2, "attn_dp_size": 2}, "--attn-dp-size 2"),
        (
            {"enable_unified_memory": True, "attention_backend": "triton"},
            "--enable-unified-memory",
        ),
        ({"page_size": 16}, "--page-size 16 .* single slots"),
        ({"enable_two_batch_overlap": True}, "--enable-two-batch-overlap"),
        ({"enable_mixed_chunk": True}, "--enable-mixed-chunk"),
        ({"enable_hierarchical_cache": True}, "--enable-hierarchical-cache"),
        ({"speculative_algorithm": "NGRAM"}, "--speculative-algorithm"),
        ({"disaggregation_mode": "prefill"}, "--disaggregation-mode prefill"),
        ({"enable_lora": True}, "--enable-lora"),
        ({"attention_backend": "flashinfer"}, "flashinfer.*not proven.*triton"),
        ({"enable_streaming_session": True}, "--enable-streaming-session"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "--kv-cache-dtype fp8_e5m2"),
        ({"enable_torch_compile": True}, "--enable-torch-compile"),
        ({"enable_pdmux": True}, "--enable-pdmux"),
        ({"nnodes": 2, "dist_init_addr": "127.0.0.1:1"}, "--nnodes 2"),
        ({"kv_canary": "log"}, "--kv-canary log"),
        ({"model_impl": "transformers"}, "--model-impl transformers"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_argument_is_refused_by_name(arguments, message, monkeypatch):
    monkeypatch.setenv("ENTROPYPRUNE", POLICY)
    with pytest.raises(UnsupportedError, match=message) as refusal:
        resolve(**arguments)
    assert isinstance(refusal.value, SystemExit), "a command line would print a traceback"


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ({"prefill": "breakable"}, r"a prefill CUDA graph \(breakable\)"),
        ({"decode": "breakable"}, "--cuda-graph-backend-decode breakable"),
    ],
)
def test_cuda_graphs_that_pass_by_the_hooks_are_refused(phases, message):
    """SGLang switches graphs off on a CPU, so its resolved arguments get them back here."""
    from sglang.srt.model_executor.cuda_graph_config import CudaGraphConfig, PhaseConfig

    resolved = resolve()

    class WithGraphs:
        cuda_graph_config = CudaGraphConfig(
            **{
                phase: PhaseConfig(backend=phases.get(phase, "disabled"))
                for phase in ("decode", "prefill")
            }
        )

        def __getattr__(self, name):
            return getattr(resolved, name)

    with pytest.raises(UnsupportedError, match=message):
        arguments.check_arguments(WithGraphs())


@pytest.mark.parametrize("name", ["SGLANG_ENABLE_METADATA_GLUE_GRAPH", "SGLANG_RUST_SERVER"])
def test_environment_variables_that_cannot_work_are_refused(name, monkeypatch):
    resolve()
    monkeypatch.setenv("ENTROPYPRUNE", POLICY)
    monkeypatch.setenv(name, "1")
    with pytest.raises(UnsupportedError, match=f"{name} does not work with pruning"):
        resolve()


@pytest.mark.parametrize("name", [*arguments.FINE, *arguments.OFF])
def test_every_refused_argument_exists(name):
    from sglang.srt.server_args import ServerArgs

    assert hasattr(ServerArgs(model_path="none"), name), f"SGLang has no argument {name} any more"


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("layer=9,keep=5", "layer=9 is out of range for a model of 8 layers"),
        ("layer=2,flops=0.5", "flops budgets depend on the length of the question"),
        ("layer=2,keep=5,method=nonsense", "unknown method 'nonsense'"),
        ("layer=2,keep=0", "keep=0"),
        ("nonsense", "cannot read 'nonsense'"),
    ],
)
def test_policy_that_cannot_work_is_refused(policy, message, monkeypatch):
    resolve()  # SGLang loads its plugins once in a process
    monkeypatch.setenv("ENTROPYPRUNE", policy)
    with pytest.raises(UnsupportedError, match=message):
        resolve()


def test_model_that_sglang_runs_with_transformers_code_is_refused(tmp_path, monkeypatch):
    resolve()
    monkeypatch.setenv("ENTROPYPRUNE", "layer=2,keep=0.25")
    with pytest.raises(UnsupportedError, match="runs InternVLForConditionalGeneration with"):
        resolve(model_path=str(tiny_internvl(tmp_path / "model")))


@pytest.mark.parametrize(
    ("policy", "layers", "ratio"),
    [("layer=2,keep=128", 32, 0.304), ("layer=2,keep=0.5", 32, 0.5), ("layer=1,keep=1", 2, 0.778)],
)
def test_kept_pool_leaves_text_seven_eighths_of_its_capacity(policy, layers, ratio):
    parsed = PruningPolicy.parse(policy)
    assert arguments.kept_ratio(parsed, layers) == pytest.approx(ratio, abs=1e-3)
    k = parsed.layer
    text_tokens = ratio * layers / (k + ratio * (layers - k))
    assert text_tokens >= 7 / 8 - 1e-3


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"ENTROPYPRUNE": "nonsense"}, "entropyprune: error: cannot read 'nonsense'"),
        ({"ENTROPYPRUNE": POLICY}, "--page-size 16 does not work with pruning"),
    ],
)
def test_launcher_stops_with_one_line(environment, expected):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "sglang.launch_server"),
            *("--model-path", str(demo.MODEL), "--device", "cpu", "--page-size", "16"),
        ],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("entropyprune: error:"), done.stderr[-2000:]
    assert expected in last
    assert "Traceback" not in done.stderr


def test_hook_that_did_not_take_stops_the_server(monkeypatch):
    from sglang.srt.managers.scheduler import Scheduler

    monkeypatch.setenv("ENTROPYPRUNE", POLICY)
    resolve()
    plugin.verify()
    hooked = Scheduler._add_request_to_queue
    # another plugin's hook, and not ours
    monkeypatch.setattr(Scheduler, "_add_request_to_queue", hooked.__wrapped__)
    with pytest.raises(UnsupportedError, match="_add_request_to_queue did not take"):
        plugin.verify()


def test_quantised_kv_that_a_checkpoint_asks_for_is_refused(monkeypatch):
    """The argument that is refused says "auto" then."""
    monkeypatch.setenv("ENTROPYPRUNE", POLICY)
    resolved = resolve()
    runner = runner_of(resolved, dtype=torch.bfloat16, kv_cache_dtype=torch.float8_e4m3fn)
    with pytest.raises(SystemExit, match=r"KV cache in torch\.float8_e4m3fn, .* give one"):
        plugin.build_attention(lambda **arguments: None, model_runner=runner)


def test_arguments_that_a_step_behind_ours_changed_are_refused_where_the_model_runs(monkeypatch):
    """SGLang's last step has no name of its own: one day another may come behind it."""
    from sglang.srt.arg_groups.overrides import declare_resolution

    monkeypatch.setenv("ENTROPYPRUNE", POLICY)
    resolved = resolve()
    runner = runner_of(resolved)
    declare_resolution(runner.server_args, "a later step", page_size=16)
    with pytest.raises(SystemExit, match="--page-size 16 does not work with pruning"):
        plugin.build_attention(lambda **arguments: None, model_runner=runner)


def runner_of(resolved, **more):
    """As much of SGLang's `ModelRunner` as is looked at before anything is built."""
    from sglang.srt.arg_groups.model_override_base import model_config_of

    server_args = object.__getattribute__(resolved, "_server_args")
    return SimpleNamespace(
        server_args=server_args,
        model_config=model_config_of(server_args),
        is_draft_worker=False,
        **more,
    )


def test_plugin_that_fails_to_load_stops_the_server_that_needs_it(monkeypatch):
    from sglang.srt.arg_groups import resolution_hooks

    resolve()
    monkeypatch.setattr(resolution_hooks, "_HOOKS", {})  # as in a process where we did not load
    monkeypatch.setattr(plugin, "register", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # SGLang logs it; nothing asks for pruning
        ep_backends.sglang.activate()
    assert resolve().radix_cache_backend is None
    with pytest.raises(SystemExit, match="entropyprune: error: division by zero"):
        resolve(json_model_override_args='{"entropyprune": {"layer": 2, "keep": 3}}')
    with monkeypatch.context() as asked:
        override = '{"entropyprune": {"layer": 2, "keep": 3}}'
        asked.setattr("sys.argv", ["launch_server", "--json-model-override-args", override])
        with pytest.raises(SystemExit, match="entropyprune: error: division by zero"):
            ep_backends.sglang.activate()
    for name in ep_backends.sglang._ASKED:
        with monkeypatch.context() as asked:
            asked.setenv(name, POLICY)
            with pytest.raises(SystemExit, match="entropyprune: error: division by zero"):
                ep_backends.sglang.activate()


def test_the_variables_that_ask_for_pruning_are_those_that_are_read():
    assert set(ep_backends.sglang._ASKED) == {ENV, Orders._ENV}
