"""Decoding through LMDeploy's own CUDA graph runner, with a tape in the place of the CUDA graph.

A CUDA graph is a list of kernels with the addresses and the host numbers that they had while it
was captured; a replay runs no Python. `Tape` is that on a CPU. All the rest is the real thing:
scheduler, warm-up, graph runner, its static buffers and padding.
"""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ep_backends.lmdeploy.prefill import DROPPED, PAGES_BELOW
from ep_conformance.checkpoints import tiny_qwen2_5_vl
from ep_core.backend import Request

from .common import expected, few_blocks, nothing_lost, picture, start, wrong

# the engine's warnings are not ours to fix
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

LAYER, KEEP, METHOD = 2, 0.25, "released"
LANES = [2, 4, 8]  # batch sizes that are captured: others are padded


@pytest.fixture(scope="module")
def journal(tmp_path_factory):
    """Two rounds of requests through one engine, the oracle's answers, and what was noted."""
    folder = tmp_path_factory.mktemp("graph")
    model = tiny_qwen2_5_vl(folder / "model", seed=1)
    big, small, middle = (
        picture(folder, i, *size) for i, size in enumerate([(8, 8), (4, 3), (5, 6)])
    )
    # they end one after the other: the batch shrinks, its last lanes become padding
    first = [
        Request((small, "what number?"), 3),
        Request((big, "and where?"), 5),
        Request((big, middle, "is it red?"), 17),
        Request(("how many?",), 9),
        Request((middle, "look"), 30),
        Request((big, "a circle?"), 40),
    ]
    # few blocks: some have to wait or are preempted, so that the batch grows again
    second = [*first[::-1], *first[1:4]]
    engine = {"eager_mode": False, "max_batch_size": 8, "cudagraph_capture_batch_sizes": LANES}
    notes = SimpleNamespace(captures=[], replays=[], waits=[])
    policy = f"layer={LAYER},keep={KEEP},method={METHOD}"
    with pytest.MonkeyPatch.context() as patch:
        attach(patch, notes)
        with start(model, policy, **engine) as session:
            warm = len(notes.captures)
            with nothing_lost(session):
                answers = session.generate(first)
            with few_blocks(session, 17), nothing_lost(session):
                answers += session.generate(second)
    wanted = [
        expected(model, request.content, LAYER, KEEP, METHOD, request.max_new_tokens)
        for request in first + second
    ]
    return SimpleNamespace(**vars(notes), warm=warm, answers=answers, wanted=wanted)


def test_replays_answer_as_the_oracle(journal):
    assert journal.warm == len(LANES), f"the warm-up captured {journal.warm} graphs"
    assert len(journal.captures) == len(LANES), "a graph was captured while serving"
    sizes = [note["lanes"] for note in journal.replays]
    steps = {after - before for before, after in pairwise(sizes)}
    assert min(steps) < 0 < max(steps), f"the batch did not both shrink and grow: {sizes}"
    assert not wrong(journal.answers, journal.wanted)


def test_buffers_stay_where_the_graph_reads_them(journal):
    captured = {note["key"]: note["addresses"] for note in journal.captures}
    for note in journal.replays:
        assert note["addresses"] == captured[note["key"]], (
            "a replay filled other memory than was captured"
        )


def test_buffers_hold_what_an_eager_pass_would_read(journal):
    padded = [note for note in journal.replays if note["lanes"] < note["key"]]
    assert padded, "no batch was padded"
    for note in journal.replays:
        assert note["filled"] == note["given"], "the graph would read something else"
    for note in padded:
        assert note["padding"] == 0, "a padded lane would lose tokens or touch a block in use"


def test_nothing_waits_for_the_device(journal):
    assert len(journal.waits) >= len(LANES), "no pass was watched"
    assert not any(journal.waits), f"a captured pass reads tensors on the host: {journal.waits}"


def test_the_watch_sees_reads():
    tensor = torch.arange(3)
    with Waits() as waits:
        int(tensor.max())
        tensor[tensor > 1].tolist()
    assert waits.seen == ["__int__", "__getitem__", "tolist"]


# In the engine.


def attach(patch, notes):
    """Put the tape into LMDeploy's graph runner, and note each capture and replay."""
    from lmdeploy.pytorch import envs
    from lmdeploy.pytorch.backends.cuda.graph_runner import full_graph
    from lmdeploy_cpu.operators import PagedAttention

    runner = full_graph.CUDASingleGraphRunner
    create, bind = runner.__init__, runner._bind_inputs

    def create_for_graphs(self, *args, **kwargs):
        create(self, *args, **kwargs)
        self._use_graph = True

    def capture(self, kwargs, stream):
        with Waits() as waits, Tape() as tape:
            output = self._model_forward(**kwargs)
        notes.waits.append(waits.seen)
        tape.output = output
        self._graph = tape
        return output

    def note_inputs(self, **kwargs):
        inputs = bind(self, **kwargs)
        given = {name: kwargs[name] for name in (DROPPED, PAGES_BELOW)}
        lanes = len(given[DROPPED])
        filled = {name: self.meta.input_buffers[name] for name in given}
        note = {
            "key": self.meta.max_batchs,
            "lanes": lanes,
            "addresses": {name: buffer.data_ptr() for name, buffer in filled.items()},
            "given": {name: tensor.tolist() for name, tensor in given.items()},
            "filled": {
                name: buffer[tuple(map(slice, given[name].shape))].tolist()
                for name, buffer in filled.items()
            },
            "padding": sum(int(buffer[lanes:].abs().sum()) for buffer in filled.values()),
        }
        (notes.captures if self._graph is None else notes.replays).append(note)
        assert all(inputs[name] is buffer for name, buffer in filled.items()), (
            "the captured pass reads what will be gone"
        )
        return inputs

    patch.setattr(envs, "fake_capture", True)  # the stand-in asks
    patch.setattr(envs, "skip_warmup", False)
    patch.setattr(runner, "__init__", create_for_graphs)
    patch.setattr(runner, "_capture_model", capture)
    patch.setattr(runner, "_bind_inputs", note_inputs)
    launch = PagedAttention.forward
    patch.setattr(PagedAttention, "forward", lambda *a, **k: Tape.kernel(launch, a, k))


class Tape(TorchDispatchMode):
    """Every operator and kernel that ran, to be run again on the same tensors."""

    recording = None
    in_kernel = False

    def __init__(self):
        super().__init__()
        self.steps = []

    def __enter__(self):
        Tape.recording = self
        return super().__enter__()

    def __exit__(self, *exception):
        Tape.recording = None
        return super().__exit__(*exception)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not Tape.in_kernel:
            self.steps.append((func, args, kwargs or {}, out))
        return out

    @staticmethod
    def kernel(launch, args, kwargs):
        """The stand-in's attention is one kernel: what it does inside is no step of the graph."""
        tape, Tape.in_kernel = Tape.recording, True
        try:
            out = launch(*args, **kwargs)
        finally:
            Tape.in_kernel = False
        if tape is not None:
            tape.steps.append((launch, args, kwargs, out))
        return out

    def replay(self):
        for func, args, kwargs, out in self.steps:
            again = func(*args, **kwargs)
            inputs = {memory(t) for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                # views and results in place are there already
                if torch.is_tensor(old) and memory(old) not in inputs:
                    old.copy_(new)


class Waits(TorchFunctionMode):
    """Notes each place where the host reads what is on the device."""

    NUMBERS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")
    SIZES = ("__contains__", "nonzero", "argwhere", "masked_select", "unique", "equal", "allclose")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        by_mask = name in ("__getitem__", "__setitem__") and any(
            torch.is_tensor(t) and t.dtype == torch.bool for t in tree_leaves(args[1])
        )
        if (name in self.NUMBERS + self.SIZES or by_mask) and not Tape.in_kernel:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def memory(tensor):
    return tensor.untyped_storage().data_ptr()
