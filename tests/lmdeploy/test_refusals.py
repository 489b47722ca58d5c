"""What cannot work together with pruning stops an engine before anything is loaded, in one line."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import ep_backends.lmdeploy
from ep_backends.lmdeploy import refusals
from ep_backends.lmdeploy.backend import LMDeployBackend
from ep_conformance.checkpoints import tiny_llava, tiny_qwen2_5_vl
from ep_core.errors import UnsupportedError

from .common import CPU, launch, no_pruning

# the engine's warnings are not ours to fix
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

POLICY = "layer=2,keep=0.25,method=set-entropy"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_qwen2_5_vl(tmp_path_factory.mktemp("refusals") / "model", seed=1)


@pytest.fixture(autouse=True)
def inactive():
    """Each test starts without pruning and leaves none behind."""
    with no_pruning():
        yield


REFUSED = {
    "device_type": ("ascend", "device_type=ascend: .* leave out --device"),
    "quant_policy": (8, "quant_policy=.*8.*: a quantised KV cache .* leave out --quant-policy"),
    "enable_prefix_caching": (True, "leave out --enable-prefix-caching"),
    "dp": (2, "dp=2: .* leave out --dp"),
    "ep": (2, "ep=2: .* leave out --ep"),
    "enable_microbatch": (True, "leave out --enable-microbatch"),
    "enable_eplb": (True, "leave out --enable-eplb"),
    "adapters": ({"a": "b"}, "leave out --adapters"),
    "role": ("Prefill", "role=.*Prefill: .* leave out --role"),
    "kv_transfer_config": ({"kv_connector": "x", "kv_role": "kv_both"}, "--kv-transfer-config"),
    "dllm_block_length": (4, "dllm_block_length=4: .* --dllm-block-length"),
    "empty_init": (True, "leave out --empty-init"),
    "language_model_only": (True, "leave out --language-model-only"),
    "enable_return_routed_experts": (True, "leave out --enable-return-routed-experts"),
    "custom_module_map": ("some/path", "custom_module_map would be overwritten"),
}


def test_every_refused_argument_is_tested_and_exists():
    from lmdeploy import PytorchEngineConfig

    assert set(refusals._ARGUMENTS) <= set(REFUSED)
    assert {field.name for field in dataclasses.fields(PytorchEngineConfig)} >= set(REFUSED)


@pytest.mark.parametrize(
    ("there", "device", "message"),
    [
        ("cuda", "cpu", "runs on cuda only, not on device 'cpu'; give --device cuda"),
        ("cpu", "cuda", "runs on cpu only, not on device 'cuda'; give --device cpu"),
        ("none", "cpu", "there is no CUDA device here"),
        ("none", "cuda", "there is no CUDA device here"),
    ],
)
def test_another_device_is_refused_with_the_one_to_give(model, monkeypatch, there, device, message):
    def empty(*_, **__):
        if there == "none":
            raise RuntimeError("no driver")
        return SimpleNamespace(device=SimpleNamespace(type=there))

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(UnsupportedError, match=message):
        LMDeployBackend().open(model, None, device=device)


# LMDeploy's own checks come first, or it switches the thing off by itself
BEFORE_US = ("device_type", "enable_prefix_caching")


@pytest.mark.parametrize("name", BEFORE_US)
def test_argument_that_lmdeploy_sees_first_is_refused_by_name(name):
    from lmdeploy import PytorchEngineConfig

    value, message = REFUSED[name]
    config = PytorchEngineConfig(**CPU)
    setattr(config, name, value)
    with pytest.raises(UnsupportedError, match=message):
        refusals.check_arguments(config, None)


def test_prefix_caching_is_off_for_these_models(model):
    ep_backends.lmdeploy.activate(POLICY)
    assert not launch(model, enable_prefix_caching=True).enable_prefix_caching


@pytest.mark.parametrize("name", [name for name in REFUSED if name not in BEFORE_US])
def test_argument_is_refused_by_name(name, model):
    from lmdeploy import PytorchEngineConfig, pipeline
    from lmdeploy.messages import EngineRole

    value, message = REFUSED[name]
    config = PytorchEngineConfig(**CPU)
    # past LMDeploy's own checks of what fits together
    setattr(config, name, EngineRole[value] if name == "role" else value)
    ep_backends.lmdeploy.activate(POLICY)
    with pytest.raises(UnsupportedError, match=message) as refusal:
        pipeline(str(model), backend_config=config, log_level="ERROR")
    assert isinstance(refusal.value, SystemExit), "a command line would print a traceback"
    assert "\n" not in str(refusal.value)


def test_speculative_decoding_is_refused(model):
    from lmdeploy.messages import SpeculativeConfig

    ep_backends.lmdeploy.activate(POLICY)
    with pytest.raises(UnsupportedError, match="leave out --speculative-algorithm"):
        launch(model, SpeculativeConfig(method="eagle3", num_speculative_tokens=2))


def test_compiled_decode_is_refused(model, monkeypatch):
    from lmdeploy.pytorch import envs

    monkeypatch.setattr(envs, "enable_decode_torch_compile", True)
    ep_backends.lmdeploy.activate(POLICY)
    with pytest.raises(UnsupportedError, match="unset it"):
        launch(model)


@pytest.mark.parametrize("how", ["chosen", "auto-selected"])
def test_turbomind_is_refused(how, model, monkeypatch):
    from lmdeploy import TurbomindEngineConfig, archs, pipeline

    monkeypatch.setattr(archs, "autoget_backend", lambda *a, **k: "turbomind")
    config = TurbomindEngineConfig() if how == "chosen" else None
    ep_backends.lmdeploy.activate(POLICY)
    with pytest.raises(UnsupportedError, match=r"TurboMind engine was chosen.*--backend pytorch"):
        pipeline(str(model), backend_config=config, log_level="ERROR")


def edited(model, folder, change):
    """A copy of a checkpoint with another config.json."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_sliding_window_is_refused(model, tmp_path):
    def change(config):
        config["text_config"] |= {"use_sliding_window": True, "sliding_window": 64}
        config |= {"use_sliding_window": True, "sliding_window": 64}

    ep_backends.lmdeploy.activate(POLICY)
    with pytest.raises(UnsupportedError, match="a decoder with sliding_attention is not"):
        launch(edited(model, tmp_path / "model", change))


def test_normalised_queries_are_refused(tmp_path):
    def change(config):
        config["text_config"]["model_type"] = "qwen3"

    llava = tiny_llava(tmp_path / "llava", seed=1)
    ep_backends.lmdeploy.activate("layer=2,keep=0.25,method=released")
    with pytest.raises(UnsupportedError, match=r"'released' reads queries.* use method=set-ent"):
        launch(edited(llava, tmp_path / "model", change))


def test_other_model_class_is_refused(tmp_path, model):
    def change(config):
        config["architectures"] = ["Qwen2_5_VLSomethingElse"]

    folder = edited(model, tmp_path / "model", change)
    ep_backends.lmdeploy.activate(POLICY)
    with pytest.raises(
        UnsupportedError, match="Qwen2_5_VLSomethingElse is not supported in LMDeploy"
    ):
        launch(folder)


@pytest.mark.parametrize("where", ["hf_overrides", "activate", "environment"])
def test_engine_by_itself_does_not_prune_in_silence(where, model, monkeypatch):
    """`lmdeploy.pytorch.engine.Engine` has nobody who decides what requests keep."""
    from lmdeploy import PytorchEngineConfig
    from lmdeploy.pytorch.engine import Engine

    config = PytorchEngineConfig(**CPU)
    if where == "hf_overrides":
        config.hf_overrides = {"entropyprune": POLICY}
    elif where == "environment":
        monkeypatch.setenv("ENTROPYPRUNE", POLICY)
    ep_backends.lmdeploy.activate(POLICY if where == "activate" else None)
    with pytest.raises(UnsupportedError, match="started by itself"):
        Engine(str(model), config)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--quant-policy", "8"], "quant_policy"),
        (["--dp", "2", "--tp", "2"], "data parallelism was never tested"),
        (["--hf-overrides", '{"memory_model_path": "x"}'], "memory model"),
        (["--hf-overrides", '{"entropyprune": {"layer": 1, "keep": 3}}'], "set one of them"),
    ],
)
def test_command_line_stops_with_one_line(arguments, expected, model):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "ep_backends.lmdeploy", "serve", "api_server", str(model)),
            *("--backend", "pytorch", "--max-batch-size", "4", *arguments),
        ],
        env=os.environ | {"ENTROPYPRUNE": POLICY},
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
