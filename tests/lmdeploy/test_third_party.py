"""A family of somebody else's works where its decoder fits; what does not is refused by name."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import ep_backends.lmdeploy
from ep_backends.lmdeploy import refusals
from ep_backends.lmdeploy.families import FAMILIES
from ep_backends.lmdeploy.requests import placeholders_of
from ep_conformance.checkpoints import make_picture
from ep_core.backend import Request, Serving
from ep_core.errors import PolicyError, UnsupportedError
from ep_core.plan import Run, Unprunable
from ep_core.plugins import registry

from .common import launch, no_pruning, start
from .third_party import FAMILY, PIXELS, tiny_qwen3_vl

# the engine's warnings are not ours to fix
pytestmark = pytest.mark.filterwarnings("default")

SECONDS = 600
TEXT = "what number is written?"


@pytest.fixture(autouse=True)
def plugin(monkeypatch):
    monkeypatch.setitem(registry().families, FAMILY.model_type, FAMILY)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_qwen3_vl(tmp_path_factory.mktemp("third-party") / "qwen3-vl", seed=3)


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    sizes = [(6, 5), (3, 4), (8, 4)]
    big, small, wide = (
        make_picture(folder / f"{i}.png", i, (PIXELS * w, PIXELS * h))
        for i, (w, h) in enumerate(sizes)
    )
    return [(big, TEXT), (TEXT,), (small, "look: ", wide, "and where?"), (wide, "is it red?")]


def expected(model, contents, layer, keep, folder):
    """What transformers answers, in a process without the stand-in."""
    asked = [
        ([("text" if isinstance(p, str) else "picture", str(p)) for p in content], layer, keep)
        for content in contents
    ]
    asked_file, answers_file = folder / "asked.json", folder / "answers.json"
    asked_file.write_text(json.dumps(asked))
    script = Path(__file__).with_name("third_party.py")
    done = subprocess.run(
        [sys.executable, script, model, asked_file, answers_file],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(answers_file.read_text())


@pytest.mark.parametrize(
    ("layer", "keep", "chunk"), [(3, None, None), (3, 0.25, None), (4, 0.4, 40)]
)
def test_qwen3_vl_as_transformers_with_a_mask(model, contents, tmp_path, layer, keep, chunk):
    """Behind layers 0 to 2 LMDeploy adds features of the pictures: then layer 3 has no residual."""
    policy = None if keep is None else f"layer={layer},keep={keep},method=set-entropy"
    with start(model, policy, serving=Serving(prefill_chunk=chunk)) as session:
        answers = session.generate([Request(content, 5) for content in contents])
    wanted = expected(model, contents, layer, keep, tmp_path)
    for answer, (kept, ids) in zip(answers, wanted, strict=True):
        assert [list(span.kept) for span in answer.spans] == kept
        assert list(answer.output_ids) == ids
    assert chunk is None or max(answer.chunks for answer in answers) > 1


@pytest.mark.parametrize(
    ("policy", "error", "message"),
    [
        ("layer=2,keep=5", PolicyError, "layer=2 does not work for Qwen3-VL.*use layer=3 or more"),
        ("layer=3,keep=5,method=released", UnsupportedError, "normalises its queries"),
    ],
)
def test_what_does_not_fit_is_refused_at_the_start(model, policy, error, message):
    with no_pruning():
        ep_backends.lmdeploy.activate(policy)
        with pytest.raises(UnsupportedError, match=message):
            launch(model)


def placed(**picture):
    return [(one.run.start, one.run.stop) for one in placeholders_of([picture])]


def test_places_of_either_preprocessing():
    assert placed(offset=4, image_tokens=torch.tensor([6])) == [(4, 10)]
    assert placed(offset=(4, 10), modality="image") == [(4, 10)]
    for other in (
        {"offset": (4, 10), "modality": "video"},
        {"offset": 4},
        {"image_tokens": 4},
    ):
        with pytest.raises(Unprunable, match="video and audio"):
            placed(**other)
    assert Run(4, 10) == placeholders_of([{"offset": 4, "image_tokens": 6}])[0].run


# What LMDeploy's class of a model must be like.


def decoder(**changes):
    """A model as LMDeploy builds them, of two layers, and what its own class says of it."""
    from lmdeploy.pytorch.models.utils.cudagraph import CudaGraphMixin
    from lmdeploy.pytorch.models.utils.model import DeployModelMixin

    class Theirs(nn.Module, DeployModelMixin, CudaGraphMixin):
        pass

    class Layer(nn.Module):
        def forward(
            self, hidden_states, rotary_pos_emb, past_key_value, residual, attn_metadata, **more
        ):
            return hidden_states, residual

    layers = [Layer() for _ in range(changes.get("layers", 2))]
    for layer in layers:
        layer.self_attn = SimpleNamespace(
            attn_fwd=SimpleNamespace(impl=object()), qkv_proj=SimpleNamespace(split_qkv=None)
        )
    model = type("Mixed", (type("Mixin", (), {}), Theirs), {})()
    return model, Theirs, layers


SETTINGS = SimpleNamespace(
    shape=SimpleNamespace(layers=2), layer=1, selector=SimpleNamespace(needs={"queries"})
)


def check(model, theirs, layers, settings=SETTINGS):
    refusals.check_decoder(model, super(type(model).__mro__[1], model), layers, settings)


def test_a_decoder_that_fits_is_taken():
    check(*decoder())


def test_a_model_that_uses_the_values_of_sequences_is_refused():
    """Also under `python -O`."""
    model, theirs, layers = decoder()
    theirs.update_model_metas = lambda self, *args, **kwargs: [{}]
    with pytest.raises(UnsupportedError, match=r"Theirs keeps values of its own .*model_metas"):
        check(model, theirs, layers)


def test_a_model_without_lmdeploys_methods_is_refused():
    model = type("Mixed", (type("Mixin", (), {}), type("Theirs", (), {})), {})()
    with pytest.raises(UnsupportedError, match="Theirs has not the methods"):
        check(model, None, [])


def test_another_number_of_layers_is_refused():
    with pytest.raises(UnsupportedError, match="has 3 layers, its configuration says 2"):
        check(*decoder(layers=3))


@pytest.mark.parametrize("which", [0, 1])
def test_a_layer_of_other_arguments_is_refused(which):
    model, theirs, layers = decoder()

    class Other(nn.Module):
        def forward(self, hidden_states, attn_metadata):
            return hidden_states

    layers[which] = Other()
    with pytest.raises(UnsupportedError, match="Other takes no rotary_pos_emb"):
        check(model, theirs, layers)


def test_layers_without_attention_or_queries_are_refused():
    model, theirs, layers = decoder()
    del layers[0].self_attn.qkv_proj
    with pytest.raises(UnsupportedError, match=r"no self_attn\.qkv_proj to read queries from"):
        check(model, theirs, layers)
    check(model, theirs, layers, SimpleNamespace(**vars(SETTINGS) | {"selector": SELECTS_HIDDEN}))
    del layers[1].self_attn
    with pytest.raises(UnsupportedError, match="Layer has no attention through the KV cache"):
        check(model, theirs, layers)


SELECTS_HIDDEN = SimpleNamespace(needs={"hidden"})


# Classes made on demand.


def test_every_tested_architecture_has_a_class_that_workers_can_import():
    import importlib
    import pickle

    from ep_backends.lmdeploy import models, module_map

    for family in FAMILIES.values():
        name = module_map.MODULE_MAP[family.architecture]
        path, _, attribute = name.rpartition(".")
        kind = getattr(importlib.import_module(path), attribute)
        assert issubclass(kind, models.PrunedModel)
        assert kind is getattr(models, attribute), "made twice"
        assert pickle.loads(pickle.dumps(kind)) is kind


def test_names_of_no_architecture_are_missing():
    from ep_backends.lmdeploy import models

    with pytest.raises(AttributeError, match="PrunedNothing"):
        models.PrunedNothing  # noqa: B018 # looking it up is the test


def test_the_family_table_needs_no_engine():
    code = "import sys, ep_backends.lmdeploy.families; sys.exit('lmdeploy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
