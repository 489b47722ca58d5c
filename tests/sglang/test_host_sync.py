"""Ranking, cutting and packing never wait for the device; decode is in test_decode_graph."""

from types import SimpleNamespace

import pytest
import torch

from ep_core import kernels
from ep_core.plugins import registry
from ep_core.spans import VisualSpan

from ..host_sync import KERNELS, NoWaiting  # noqa: TID252 # tests are no installed package

pytestmark = pytest.mark.filterwarnings("default")  # the engine's warnings are not ours to fix


@pytest.mark.parametrize("method", ["released", "set-entropy"])
def test_layer_k_does_not_wait(monkeypatch, method):
    """A prompt of two pictures in two chunks, the first of which ends inside the second picture."""
    from ep_backends.sglang.attention import PrunedAttention
    from ep_backends.sglang.prefill import Prefill, _Pass, _plan_request
    from ep_backends.sglang.requests import RequestPlan

    monkeypatch.setitem(kernels._found, "meta", KERNELS)
    prefill = object.__new__(Prefill)
    prefill._settings = SimpleNamespace(selector=registry().selector(method))
    prefill._group, prefill._head_dim = SimpleNamespace(world_size=1), 8
    with NoWaiting(), torch.device("meta"):
        attention = prefill._attention = object.__new__(PrunedAttention)
        attention.rows = SimpleNamespace(req_to_token=torch.empty(4, 64, dtype=torch.int32))
        attention.mapping = torch.empty(99, dtype=torch.int64)
        attention._kept_rows = SimpleNamespace(req_to_token=torch.empty(4, 64, dtype=torch.int32))
        spans = [VisualSpan(3, 19), VisualSpan(22, 30)]
        plan = RequestPlan(spans, [5, 2], None, "", False, {})
        for start, new, computed in [(0, 26, 3 + 5 + 3), (26, 7, 2 + 3)]:
            current = _Pass(new, queries=torch.empty(new, 32))
            _plan_request(current, plan, row=1, first=0, prefix=start, new=new)
            hidden, positions, slots = prefill._drop(
                current,
                torch.empty(new, 32),
                torch.empty(3, new, dtype=torch.int64),
                torch.empty(new, dtype=torch.int64),
            )
            assert hidden.shape == (computed, 32)
            assert positions.shape == (3, computed)
            assert slots.shape == (computed,)
            rows = torch.empty(1, dtype=torch.int64)
            assert attention.compact_rows(rows, rows, start + new).shape == (1,)
        assert plan.carried is None
        assert [len(gone) for gone in plan.released] == [11, 6]


def test_freeing_waits_only_where_tokens_were_dropped():
    from ep_backends.sglang.kv import free_kept_slots

    freed = []
    allocator = SimpleNamespace(
        size_full=64,
        size_swa=32,
        full_available_size=lambda: 44,
        swa_available_size=lambda: 12,
        full_to_swa_index_mapping=torch.empty(65, dtype=torch.int64, device="meta"),
    )

    def free(where, slots, start_pos):
        freed.append(len(slots))

    slots = torch.empty(7, dtype=torch.int64, device="meta")
    with NoWaiting():
        free_kept_slots(free, allocator, slots)
        allocator.swa_available_size = lambda: 13
        with pytest.raises(AssertionError, match="booleans"):
            free_kept_slots(free, allocator, slots)
    assert freed == [7]
