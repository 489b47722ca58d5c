"""Ranking, cutting and packing never wait for the device; decode is in test_decode_graph."""

from types import SimpleNamespace

import pytest
import torch

from ep_core import kernels
from ep_core.plan import PlannedUnit, RequestPlan, Run, Unit
from ep_core.plugins import registry

from ..host_sync import KERNELS, NoWaiting  # noqa: TID252 # tests are no installed package

pytestmark = pytest.mark.filterwarnings("default")  # the engine's warnings are not ours to fix


@pytest.mark.parametrize("method", ["released", "set-entropy"])
def test_layer_k_does_not_wait(monkeypatch, method):
    """A prompt of two pictures in two chunks, the first of which ends inside the second picture."""
    from sglang.srt.layers.layer_boundary.residual import batch as residual
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    from ep_backends.sglang.attention import PrunedAttention
    from ep_backends.sglang.batch import ForwardPass, pass_of, prefill_of
    from ep_backends.sglang.prefill import LayerHooks
    from ep_backends.sglang.requests import SGLangRequest

    monkeypatch.setitem(kernels._found, "meta", KERNELS)
    units = [PlannedUnit(Unit((Run(3, 19),)), 5), PlannedUnit(Unit((Run(22, 30),)), 2)]
    request = SGLangRequest(RequestPlan.of(units, 33))
    with NoWaiting(), torch.device("meta"):
        attention = object.__new__(PrunedAttention)
        attention._rows = torch.empty(4, 64, dtype=torch.int32)
        attention._mapping = torch.empty(99, dtype=torch.int64)
        attention._kept_rows = torch.empty(4, 64, dtype=torch.int32)
        attention.kept = SimpleNamespace(
            kv_index_translator=None, init_forward_metadata=lambda view: None
        )
        hooks = LayerHooks(attention, registry().selector(method), 2, (4, 8))
        for start, new, computed in [(0, 26, 3 + 5 + 3), (26, 7, 2 + 3)]:
            batch = SimpleNamespace(
                forward_mode=ForwardMode.EXTEND,
                extend_prefix_lens=None,
                extend_seq_lens=None,
                extend_prefix_lens_cpu=[start],
                extend_seq_lens_cpu=[new],
                req_pool_indices=torch.empty(1, dtype=torch.int64),
                req_pool_indices_cpu=torch.ones(1, dtype=torch.int64, device="cpu"),
                out_cache_loc=torch.empty(new, dtype=torch.int64),
                seq_lens=torch.empty(1, dtype=torch.int64),
                global_num_token_non_padded_cpu=new,
                pruning=ForwardPass([request]),
            )
            residual.start(batch)
            given = torch.empty(3, new, dtype=torch.int64), torch.empty(new, 32), batch
            if method == "released":
                hooks.enter_attention(None, given, {})
                hooks.after_projection(None, (), (torch.empty(new, 48),))
            (positions, hidden, _), _ = hooks.between(2, None, given, {})
            assert hidden.shape == (computed, 32)
            assert positions.shape == (3, computed)
            current = pass_of(batch)
            assert current.kept.out_cache_loc.shape == (computed,)
            for unit in prefill_of(batch).units:
                assert unit.queries is None, "queries are held through all later layers"
                assert not (unit.waited and unit.waited.rows), "so are rows that waited"
            output = hooks.after_last_layer(None, given, {}, hidden)
            assert output.shape == (new, 32)
        assert request.waiting is None
        assert len(request.dropped) == 11 + 6


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
