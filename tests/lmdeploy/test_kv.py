"""The KV cache in two groups of layers: what blocks are counted, and what memory they take."""

import math
from types import SimpleNamespace

import pytest
import torch

from ep_backends.lmdeploy.attached import PLAN
from ep_backends.lmdeploy.kv import GroupedLayout, grouped, pages_below
from ep_backends.lmdeploy.settings import LMDeploySettings
from ep_backends.shared.capacity import TEXT_CAPACITY_LOSS
from ep_conformance.checkpoints import tiny_qwen2_5_vl
from ep_core.errors import EntropyPruneError, UnsupportedError
from ep_core.plan import PlannedUnit, RequestPlan, Run, Unit
from ep_core.policy import PruningPolicy

from .common import ask, expected, few_blocks, nothing_lost, picture, scheduler, start, wrong

# the engine's warnings are not ours to fix
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


# Counting.


def with_plan(pictures, prompt_tokens):
    """LMDeploy's data of pictures `(start, stop, keep)`, as they reach its scheduler."""
    units = [PlannedUnit(Unit((Run(a, b),), i), keep) for i, (a, b, keep) in enumerate(pictures)]
    plan = RequestPlan.of(units, prompt_tokens)
    data = [SimpleNamespace(start=a, end=b, meta={PLAN: plan}) for a, b, _ in pictures]
    return SimpleNamespace(multimodals={"image": data})


def literal_blocks(tokens, dropped_positions, size, ratio):
    """Put each token into a slot of both groups of layers; blocks that were touched."""
    below, rest = set(), set()
    slot = 0
    for token in range(tokens):
        below.add(token // (size * ratio))
        if token not in dropped_positions:
            rest.add(slot // size)
            slot += 1
    return len(below | rest)


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("ratio", [2, 3, 7])
@pytest.mark.parametrize(
    "pictures",
    [
        [(0, 40, 1)],
        [(5, 69, 16)],
        [(5, 69, 63)],
        [(3, 300, 10), (310, 450, 100)],
        [(0, 128, 128 - 16), (128, 200, 1)],
    ],
)
def test_blocks_of_a_sequence_are_those_that_it_touches(size, ratio, pictures):
    from lmdeploy.pytorch.paging.block_manager.default_block_manager import DefaultBlockManager

    from ep_backends.lmdeploy.kv import required_blocks

    original = DefaultBlockManager.num_required_blocks
    last = pictures[-1][1]
    history = with_plan(pictures, last + 1)
    for tokens in [*range(last, last + 2 * size * ratio + 2), 1000]:
        for ahead in (0, 1, size):
            if ahead and tokens % 5:
                continue
            sequence = SimpleNamespace(
                num_all_ids=tokens,
                kv_token_limit=None,
                block_size=size,
                logical_blocks=[None] * (tokens % 3),
                history_multimodals=history,
            )
            dropped = {at for begin, stop, keep in pictures for at in range(begin, stop - keep)}
            literal = literal_blocks(tokens + ahead, dropped, size, ratio)
            wanted = max(0, literal - len(sequence.logical_blocks))
            found = required_blocks(original, ratio, sequence, ahead)
            assert found == wanted, f"{tokens} + {ahead} tokens: {found} blocks, not {wanted}"


def test_blocks_of_a_chunk_are_those_of_the_pictures_in_it():
    from lmdeploy.pytorch.paging.block_manager.default_block_manager import DefaultBlockManager

    from ep_backends.lmdeploy.kv import required_blocks

    sequence = SimpleNamespace(
        num_all_ids=300,
        block_size=16,
        logical_blocks=[],
        history_multimodals=with_plan([(10, 110, 60), (120, 220, 60)], 300),
    )
    for limit, dropped in ((10, set()), (115, range(10, 50)), (None, None)):
        sequence.kv_token_limit = limit
        tokens = limit or 300
        if dropped is None:
            dropped = {*range(10, 50), *range(120, 160)}
        literal = literal_blocks(tokens, dropped, 16, 2 if dropped else 1)
        found = required_blocks(DefaultBlockManager.num_required_blocks, 2, sequence)
        assert found == literal, f"a chunk that ends at {limit}: {found} blocks, not {literal}"


def test_an_engine_that_counts_blocks_otherwise_is_refused():
    from ep_backends.lmdeploy.plugin import build_engine
    from ep_backends.lmdeploy.settings import EnginePolicy

    config = SimpleNamespace(
        entropyprune=EnginePolicy("layer=2,keep=5"),
        to_dict=lambda: {"model_type": "llava", "text_config": {"model_type": "llama"}},
    )
    engine = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=config),
        scheduler=SimpleNamespace(block_manager=SimpleNamespace(num_required_blocks=None)),
    )
    with pytest.raises(UnsupportedError, match="counted by SimpleNamespace; pruning works with"):
        build_engine(lambda engine: None, engine)
    config.entropyprune = None
    build_engine(lambda engine: None, engine)


def test_a_picture_that_is_not_where_it_was_planned_is_noticed():
    from ep_backends.lmdeploy.kv import required_blocks

    history = with_plan([(10, 110, 4)], 300)
    history.multimodals["image"][0].start += 200
    history.multimodals["image"][0].end += 200
    sequence = SimpleNamespace(num_all_ids=400, history_multimodals=history)
    with pytest.raises(EntropyPruneError, match=r"moved a picture to \[210, 310\)"):
        required_blocks(None, 2, sequence)


@pytest.mark.parametrize(
    ("layers", "layer"), [(2, 1), (4, 1), (8, 5), (14, 1), (28, 2), (28, 20), (32, 1), (80, 2)]
)
@pytest.mark.parametrize("keep", [0.05, 0.25, 0.9, 64])
def test_text_loses_at_most_an_eighth_of_its_capacity(layers, layer, keep):
    policy = PruningPolicy.parse(f"layer={layer},keep={keep}")
    text = {"model_type": "llama", "num_hidden_layers": layers}
    ratio = LMDeploySettings.of(policy, {"model_type": "llava", "text_config": text}).ratio
    assert ratio >= 2
    capacity = layers / (layers - layer + ratio * layer)  # of text, in the memory of before
    allowed = 1 - float(TEXT_CAPACITY_LOSS)
    assert ratio == 2 or capacity >= allowed - 1e-12, f"ratio {ratio}: {capacity:.1%} are left"
    if ratio > 2 and isinstance(keep, float):
        assert ratio <= math.ceil(1 / keep), "more than the kept share can use"


# Memory.


@pytest.fixture
def packed():
    """LMDeploy's layout of 5 layers of keys and values of different shapes, as its engine makes."""
    from lmdeploy.pytorch.engine.cache_engine.layout import PackedBlockCacheLayout
    from lmdeploy.pytorch.engine.cache_engine.schema import CacheDesc, CacheTensorSpec

    specs = tuple(
        CacheTensorSpec(name=name, desc=CacheDesc(shape=list(shape), dtype=torch.float16))
        for name, shape in (("k", (16, 2, 8)), ("v", (16, 2, 4)))
    )
    return PackedBlockCacheLayout(specs, num_layers=5)


def test_layout_has_ratio_times_as_many_pages_below(packed):
    layout = GroupedLayout(
        packed.__class__(packed.tensor_specs, 2), packed.__class__(packed.tensor_specs, 3), 3
    )
    cache = layout.allocate(7, "cpu")
    keys, values = cache.tensor_views
    assert [len(layer) for layer in keys] == [len(layer) for layer in values] == [21] * 2 + [7] * 3
    assert {tuple(layer.shape[1:]) for layer in keys} == {(16, 2, 8)}
    one = packed.allocate(1, "meta").nbytes // 5  # a page of a layer
    assert cache.nbytes == one * (2 * 21 + 3 * 7)
    # every byte of a view is its own
    for i, layer in enumerate((*keys, *values)):
        layer.fill_(i + 1)
    for i, layer in enumerate((*keys, *values)):
        assert (layer == i + 1).all(), "two layers share memory"


@pytest.mark.parametrize("per_block", [1, 2, 4])
def test_copy_of_a_block_moves_all_its_pages(packed, per_block):
    from lmdeploy.pytorch.backends.default.cache import TorchBlockCacheCopy
    from lmdeploy.pytorch.engine.cache_engine.plan import BlockCachePlan

    blocks, ratio = 6, 3
    plan = grouped(BlockCachePlan(packed.tensor_specs, packed, per_block), 2, ratio)
    cache = plan.allocate(blocks, "cpu")
    assert plan.logical_block_nbytes * blocks == cache.nbytes
    generator = torch.Generator().manual_seed(0)
    for layers in cache.tensor_views:
        for layer in layers:
            layer.copy_(torch.randn(layer.shape, generator=generator))
    before = [[layer.clone() for layer in layers] for layers in cache.tensor_views]
    copier = TorchBlockCacheCopy.build(cache, blocks, per_block)
    copier.copy(torch.tensor([1, 4]), torch.tensor([5, 0]))
    for layers, olds in zip(cache.tensor_views, before, strict=True):
        for i, (layer, old) in enumerate(zip(layers, olds, strict=True)):
            pages = per_block * (ratio if i < 2 else 1)
            wanted = old.unflatten(0, (blocks, pages)).clone()
            wanted[5], wanted[0] = wanted[1].clone(), wanted[4].clone()
            assert torch.equal(layer, wanted.flatten(0, 1)), f"layer {i}"


@pytest.mark.parametrize(("per_block", "ratio"), [(1, 2), (1, 5), (2, 2), (4, 3)])
def test_pages_below_are_those_of_the_same_blocks(per_block, ratio):
    table = torch.tensor([[3, 0, 7], [1, 0, 0]], dtype=torch.int32)  # of blocks
    pages = (table[:, :, None] * per_block + torch.arange(per_block)).flatten(1).int()
    found = pages_below(pages, per_block, ratio)
    wanted = [
        [block * per_block * ratio + page for block in row for page in range(per_block * ratio)]
        for row in table.tolist()
    ]
    assert found.tolist() == wanted
    assert found.dtype == pages.dtype


def test_layout_that_was_never_tested_is_refused(packed):
    from lmdeploy.pytorch.engine.cache_engine.layout import ContiguousBlockCacheLayout
    from lmdeploy.pytorch.engine.cache_engine.plan import BlockCachePlan

    other = ContiguousBlockCacheLayout(packed.tensor_specs, 5)
    with pytest.raises(UnsupportedError, match="ContiguousBlockCacheLayout"):
        grouped(BlockCachePlan(packed.tensor_specs, other, 1), 2, 2)


# In an engine.


def caches(session):
    """The KV cache of its only worker: LMDeploy's cache engine."""
    return session.pipeline.async_engine.engine.executor.model_agent.cache_engine


@pytest.mark.parametrize(
    ("layers", "ratio", "options"),
    [
        (4, 2, {}),
        (14, 3, {}),
        (28, 5, {"block_size": 64, "kernel_block_size": 16}),
        (4, 2, {"block_size": 32, "kernel_block_size": 16}),
    ],
)
def test_engine_with_other_blocks_answers_as_the_oracle(tmp_path, layers, ratio, options):
    model = tiny_qwen2_5_vl(tmp_path / "model", seed=2, heads=2, layers=layers)
    big, small = picture(tmp_path, 0, 8, 8), picture(tmp_path, 1, 4, 3)
    messages = [(big, "what?"), (small, big, "and where?"), ("is it red?",), (big, big, "?")]
    with start(model, "layer=1,keep=0.1", **options) as session:
        config = scheduler(session).cache_config
        cache = caches(session)
        pages = config.block_size // config.kernel_block_size * config.num_gpu_blocks
        assert {len(kv) for kv in cache.gpu_cache[0]} == {pages * ratio}, "pages of layer 0"
        assert {len(kv) for layer in cache.gpu_cache[1:] for kv in layer} == {pages}
        blocks = 9 if config.block_size == 64 else 14
        with few_blocks(session, blocks), nothing_lost(session):
            answers = ask(session, messages * 2, 60)
    assert sum(answer.preempted for answer in answers) > 0, "nobody was preempted"
    wanted = [expected(model, content, 1, 0.1, tokens=60) for content in messages * 2]
    assert not wrong(answers, wanted)


def test_more_requests_fit_into_the_same_memory(tmp_path):
    """32 requests of a picture of 256 tokens; the cache has the same number of bytes."""
    model = tiny_qwen2_5_vl(tmp_path / "model", seed=2, heads=2, layers=14)
    content = (picture(tmp_path, 0, 16, 16), "what number is written?")
    most, bytes_of = {}, {}
    for policy, blocks in ((None, 112), ("layer=1,keep=0.11", 98)):
        with start(model, policy, num_gpu_blocks=blocks, max_batch_size=32) as session:
            bytes_of[policy] = caches(session).gpu_allocation.nbytes
            running = []
            strategy = session.pipeline.async_engine.engine.seq_strategy
            watch = strategy.update_running

            def count(*, running, seen=running, watch=watch, **step):
                seen.append(len(running))
                watch(running=running, **step)

            strategy.update_running = count
            with nothing_lost(session):
                answers = ask(session, [content] * 32, 8)
        most[policy] = max(running)
        assert {len(answer.output_ids) for answer in answers} == {8}
    assert bytes_of[None] == bytes_of["layer=1,keep=0.11"]
    assert most[None] * 2 <= most["layer=1,keep=0.11"], f"at once there ran {most}"
