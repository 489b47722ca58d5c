"""What happens before an engine runs: the policy is found, refused, or nothing is touched."""

import copy
import dataclasses
import os
import pickle
import pkgutil
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

import ep_backends.lmdeploy
from ep_backends.lmdeploy import plugin
from ep_backends.lmdeploy.attached import settings_of
from ep_backends.lmdeploy.families import FAMILIES
from ep_backends.lmdeploy.ledger import LEDGER
from ep_backends.lmdeploy.settings import EnginePolicy, settings_in
from ep_conformance.checkpoints import tiny_qwen2_5_vl
from ep_core.errors import EntropyPruneError, PolicyError, UnsupportedError
from ep_core.ledger import check_point
from ep_core.policy import PruningPolicy

from ..ledgers import changes, planted, redefined, renamed  # noqa: TID252 # no installed package
from .common import CPU, ask, launch, no_pruning, picture, start

# the engine's warnings are not ours to fix
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

POLICY = "layer=2,keep=0.25,method=set-entropy"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_qwen2_5_vl(tmp_path_factory.mktemp("start") / "model", seed=1)


@pytest.fixture(autouse=True)
def inactive():
    """Each test starts without pruning and leaves none behind."""
    with no_pruning():
        yield


# Attach points.


def test_everything_fits_the_installed_version():
    for status in LEDGER.check():
        assert status.state == "ok", f"{status.target}: {status.detail}"
        assert status.detail, f"{status.target}: nothing says what it is for"


@pytest.mark.parametrize(("point", "change"), changes(LEDGER))
def test_a_change_of_lmdeploy_is_noticed(point, change):
    start = ep_backends.lmdeploy.activate
    for group in ("in_workers", "in_sessions"):
        if point in LEDGER.points[group]:
            start = partial(refuse, group)
    with planted(point, change):
        assert check_point(point).state == "FAILED"
        with pytest.raises(UnsupportedError, match=r"does not fit: .* run entropyprune doctor"):
            start()


def refuse(group):
    LEDGER.require(LEDGER.check(group))


@pytest.mark.parametrize("extension", LEDGER.extensions, ids=lambda extension: extension.ours)
def test_every_redefinition_that_lmdeploy_renames_is_noticed(extension):
    """A method that LMDeploy calls otherwise one day would override nothing."""
    names = list(redefined(extension))
    assert names
    for base, name in names:
        with renamed(base, name), pytest.raises(UnsupportedError, match=rf"does not fit.*{name}"):
            ep_backends.lmdeploy.activate()


def test_every_class_of_ours_that_stands_in_for_one_of_lmdeploys_is_known():
    from ep_backends.lmdeploy import kv, models

    found = {
        f"{module.__name__}:{name}"
        for module in (kv, models)
        for name, kind in vars(module).items()
        if isinstance(kind, type) and kind.__module__ == module.__name__
    }
    made = {f"{models.__name__}:Pruned{family.architecture}" for family in FAMILIES.values()}
    assert found - made == {
        *(extension.ours for extension in LEDGER.extensions),
        f"{models.__name__}:_Ranks",
    }


def test_what_is_replaced_is_in_the_ledger():
    """Each `setattr` of ours on an object of LMDeploy's, found in the source."""
    sources = Path(ep_backends.lmdeploy.__file__).parent.glob("*.py")
    found = {
        name
        for source in sources
        for name in re.findall(
            r"^ *(?:manager|strategy|vision|engine)\.(\w+) = ", source.read_text(), re.M
        )
    }
    assert found == {"num_required_blocks", "update_running"}
    for name in found:
        assert any(point.target.endswith(f".{name}") for point in LEDGER.all_points()), name


def test_an_untested_version_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr("ep_core.ledger.version", lambda package: "0.18.7")
    for _ in range(2):
        ep_backends.lmdeploy.activate().undo()
    (record,) = caplog.records
    assert "never tested with LMDeploy 0.18.7, tested is 0.18.0" in record.getMessage()


def test_activating_leaves_cuda_to_the_workers():
    """A process that has started CUDA cannot fork ones that use it."""
    asked = (
        "import sys, torch, lmdeploy, ep_backends.lmdeploy; seen = []\n"
        "torch.cuda.get_device_capability = lambda *device: seen.append(device) or (8, 0)\n"
        "ep_backends.lmdeploy.activate('layer=2,keep=3')\n"
        "sys.exit(f'asked {len(seen)} times' if seen else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", asked], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr


def test_the_version_is_the_one_the_ledger_names():
    from lmdeploy.version import __version__

    assert LEDGER.tested[-1] == __version__


def functions():
    return {
        point.target: vars(pkgutil.resolve_name(path))[name]
        for point in LEDGER.points["wrapped"]
        for path, _, name in [point.target.replace(":", ".").rpartition(".")]
    }


def test_undo_restores_every_function():
    before = functions()
    patches = ep_backends.lmdeploy.activate(POLICY)
    assert {name for name, each in functions().items() if each is before[name]} == set()
    assert ep_backends.lmdeploy.activate() is patches, "wrapped twice"
    patches.undo()
    assert functions() == before
    assert plugin.policy_for(None) is None


def test_doctor_shows_every_point():
    done = subprocess.run(
        [sys.executable, "-m", "entropyprune", "doctor"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for status in LEDGER.check():
        assert f"{status.target}\n    ok" in done.stdout, status.target


# Nothing set.


def as_it_is(session, content):
    """What tells LMDeploy's own engine from ours."""
    # one after the other: what is computed together with what decides the last bits
    answers = [ask(session, [each])[0] for each in (content, ("is there a red star?",))]
    agent = session.pipeline.async_engine.engine.executor.model_agent
    cache = agent.cache_engine.gpu_cache
    return {
        "classes": {type(module).__module__ for module in agent.patched_model.model.modules()},
        "cache": [(tensor.shape, tensor.stride()) for layer in cache for tensor in layer],
        "bytes": agent.cache_engine.gpu_allocation.nbytes,
        "ids": [answer.output_ids for answer in answers],
        "logprobs": [answer.logprobs for answer in answers],
        "kv": [answer.kv for answer in answers],
    }


def test_without_a_policy_nothing_differs_from_lmdeploy_alone(model, tmp_path):
    content = (picture(tmp_path, 0, 8, 8), "what number is written?")
    with start(model, None) as session:
        alone = as_it_is(session, content)
    assert not any("ep_backends" in name for name in alone["classes"])
    ep_backends.lmdeploy.activate()
    with start(model, None) as session:
        assert as_it_is(session, content) == alone, "activated, without a policy"
    with start(model, POLICY) as session:
        pruned = as_it_is(session, content)
    assert pruned["logprobs"] != alone["logprobs"]
    assert any("ep_backends" in name for name in pruned["classes"])
    with start(model, None) as session:
        assert as_it_is(session, content) == alone, "after a pruned engine"
    ep_backends.lmdeploy.activate().undo()
    with start(model, None) as session:
        assert as_it_is(session, content) == alone, "after undo"


@pytest.mark.parametrize("where", ["activate", "environment"])
def test_a_session_has_the_last_word(where, model, tmp_path, monkeypatch):
    """Whatever the process or its environment says, and without changing either."""
    content = (picture(tmp_path, 0, 8, 8), "what number is written?")
    if where == "environment":
        monkeypatch.setenv("ENTROPYPRUNE", POLICY)
    ep_backends.lmdeploy.activate(POLICY if where == "activate" else None)
    with start(model, None) as session:
        config = session.pipeline.async_engine.engine.model_config
        assert not hasattr(config.hf_config, "entropyprune")
        assert config.custom_module_map is None
        (answer,) = ask(session, [content])
        assert answer.reason == "no policy is set"
    with start(model, "layer=1,keep=3") as session:
        (answer,) = ask(session, [content])
        assert [len(span.kept) for span in answer.spans] == [3]
    assert os.environ.get("ENTROPYPRUNE", "") == (POLICY if where == "environment" else "")


def test_a_session_whose_engine_does_not_prune_says_so(model, tmp_path):
    """An answer under a policy's name is pruned by it, or an error: never `no pictures`."""
    content = (picture(tmp_path, 0, 8, 8), "what number is written?")
    with start(model, POLICY) as session:
        ep_backends.lmdeploy.activate().undo()
        with pytest.raises(EntropyPruneError, match="was pruning undone meanwhile"):
            ask(session, [content])
        assert ask(session, [("is there a red star?",)])[0].reason.startswith("the prompt has no")
    with start(model, POLICY) as session:
        unhook(session)
        with pytest.raises(EntropyPruneError, match=r"1 units .* should have lost tokens, 0 did"):
            ask(session, [content])


def unhook(session):
    """The engine's model forgets the sequences' states."""
    model = session.pipeline.async_engine.engine.executor.model_agent.patched_model.model
    model._pruner.settings = dataclasses.replace(model._pruner.settings, details=False)


def test_a_policy_on_its_way_activates_the_process_that_gets_it():
    code = (
        "import pickle, sys, ep_backends.lmdeploy.plugin as plugin; "
        "policy = pickle.loads(sys.stdin.buffer.read()); "
        "print(type(policy).__name__, policy, policy.details, plugin.is_active())"
    )
    for text, details, active in (("layer=2,keep=3", True, True), ("", False, False)):
        done = subprocess.run(
            [sys.executable, "-c", code],
            input=pickle.dumps(EnginePolicy(text, details=details)),
            capture_output=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr.decode()
        assert done.stdout.decode().split("\n")[0] == f"EnginePolicy {text} {details} {active}"


def test_a_policy_of_an_engine_is_settled_once_in_a_process():
    config = SimpleNamespace(
        to_dict=lambda: {"model_type": "llava", "text_config": {"model_type": "llama"}}
    )
    config.entropyprune = EnginePolicy("layer=2,keep=0.1", details=True)
    settings = settings_in(config)
    assert settings_in(config) is settings
    assert (settings.details, settings.core.layer, settings.ratio) == (True, 2, 3)
    assert settings_in(copy.deepcopy(config)).ratio == 3
    for nothing in (EnginePolicy(""), None, "layer=2,keep=3"):
        config.entropyprune = nothing
        assert settings_in(config) is None


@pytest.mark.parametrize("again", ["the same configuration", "a policy that nobody reads"])
def test_undo_is_for_every_later_engine(again, model):
    from lmdeploy import PytorchEngineConfig, pipeline

    def pages(config):
        with pipeline(str(model), backend_config=config, log_level="ERROR") as pipe:
            agent = pipe.async_engine.engine.executor.model_agent
            found = [len(keys) for keys, _ in agent.cache_engine.gpu_cache]
            return type(agent.patched_model.model).__name__, found

    config = PytorchEngineConfig(**CPU)
    alone = pages(PytorchEngineConfig(**CPU))
    ep_backends.lmdeploy.activate(POLICY)
    assert pages(config) != alone
    ep_backends.lmdeploy.activate().undo()
    if again == "a policy that nobody reads":
        config = PytorchEngineConfig(**CPU, hf_overrides={"entropyprune": POLICY})
    assert pages(config) == alone
    assert plugin._active is None, "starting an engine activated pruning again"


def test_configuration_object_may_be_used_again(model):
    """It belongs to the user, who may start another engine with it."""
    from lmdeploy import PytorchEngineConfig, pipeline

    config = PytorchEngineConfig(**CPU)
    for policy in (POLICY, "layer=1,keep=3"):
        ep_backends.lmdeploy.activate(policy)
        with pipeline(str(model), backend_config=config, log_level="ERROR") as pipe:
            assert settings_of(pipe.async_engine).core.policy == PruningPolicy.parse(policy)


# Where a policy is set.


@pytest.mark.parametrize("where", ["activate", "environment", "text", "object"])
def test_policy_is_found_wherever_it_is_set(where, model, monkeypatch):
    from lmdeploy import PytorchEngineConfig, pipeline

    overrides = None
    if where == "environment":
        monkeypatch.setenv("ENTROPYPRUNE", POLICY)
    elif where == "text":
        overrides = {"entropyprune": POLICY}
    elif where == "object":
        overrides = {"entropyprune": PruningPolicy.parse(POLICY).to_json()}
    ep_backends.lmdeploy.activate(POLICY if where == "activate" else None)
    config = PytorchEngineConfig(**CPU, hf_overrides=overrides)
    with pipeline(str(model), backend_config=config, log_level="ERROR") as pipe:
        assert str(settings_of(pipe.async_engine).core.policy) == POLICY
        built = pipe.async_engine.engine.executor.model_agent.patched_model.model
        assert type(built).__module__ == "ep_backends.lmdeploy.models"


@pytest.mark.parametrize("two", [("a", "e"), ("a", "o"), ("e", "o")])
def test_two_policies_that_differ_are_refused(two, model, monkeypatch):
    said = {name: f"layer=1,keep={i}" for i, name in enumerate(two, 3)}
    if "e" in said:
        monkeypatch.setenv("ENTROPYPRUNE", said["e"])
    ep_backends.lmdeploy.activate(said.get("a"))
    overrides = {"entropyprune": said["o"]} if "o" in said else None
    with pytest.raises(UnsupportedError, match="set one of them") as refusal:
        launch(model, hf_overrides=overrides)
    assert all(policy in str(refusal.value) for policy in said.values())


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("layer=4,keep=5", "layer=4 is out of range for a model of 4 layers; allowed are 1 to 3"),
        ("layer=2,keep=5,method=nonsense", "unknown method 'nonsense'"),
        ("layer=2,keep=0", "keep=0"),
        ("nonsense", "cannot read 'nonsense'"),
        ({"layer": 2}, "needs one budget"),
        (["layer=2"], "must be a JSON object"),
    ],
)
def test_policy_that_cannot_work_is_refused(policy, message, model):
    ep_backends.lmdeploy.activate()
    with pytest.raises(UnsupportedError, match=message) as refusal:
        launch(model, hf_overrides={"entropyprune": policy})
    assert isinstance(refusal.value, SystemExit), "a command line would print a traceback"


def test_policy_that_cannot_be_read_is_refused_by_activate():
    before = functions()
    with pytest.raises(PolicyError, match="cannot read 'nonsense'"):
        ep_backends.lmdeploy.activate("nonsense")
    assert functions() == before
