"""Ranking and cutting never wait for the device; decode is in test_decode_graph."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from ep_backends.lmdeploy.prefill import Pruner, _Pass, _Picture
from ep_core import kernels
from ep_core.plugins import registry

from ..host_sync import KERNELS, NoWaiting  # noqa: TID252 # tests are no installed package

empty = partial(torch.empty, device="meta")


@pytest.mark.parametrize("method", ["released", "set-entropy"])
def test_layer_k_does_not_wait(monkeypatch, method):
    monkeypatch.setitem(kernels._found, "meta", KERNELS)
    pruner = object.__new__(Pruner)
    pruner._settings = SimpleNamespace(selector=registry().selector(method))
    pruner._ranks = None
    with NoWaiting():
        current = pruner._pass = _Pass(
            runs=[(0, 3), _Picture(3, 19, 5, None), (19, 22), _Picture(22, 30, 2, None), (30, 33)],
            tokens=33,
            queries=[empty(16, 4, 8), empty(8, 4, 8)],
        )
        pruner._rest = None
        hidden, rotary = empty(1, 33, 32), (empty(33, 8), empty(33, 8))
        (cut,), kwargs = pruner._before_k(
            None, (hidden,), {"residual": hidden, "rotary_pos_emb": rotary}
        )
        kept = 3 + 5 + 3 + 2 + 3
        assert cut.shape == kwargs["residual"].shape == (1, kept, 32)
        assert kwargs["rotary_pos_emb"][0].shape == (kept, 8)
        assert current.source.shape == (kept,)
        assert pruner.end(cut).shape == hidden.shape
