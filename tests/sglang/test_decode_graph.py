"""Decoding through SGLang's own CUDA graph runner, with a tape in the place of the CUDA graph.

A CUDA graph is a list of kernels with the addresses and the host numbers that they had while it
was captured; a replay runs no Python. `Tape` is that on a CPU. All the rest is the real thing:
scheduler, graph runner, its static buffers and padding, the Triton kernels (interpreted).

`activate` is an SGLang plugin: it puts the tape into the engine's process and writes a line of
JSON about each capture and each replay, which the tests read.
"""

import contextlib
import json
import multiprocessing
import os
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ep_conformance.checkpoints import make_picture, tiny_qwen2_5_vl
from ep_conformance.oracle import Oracle
from ep_core.backend import Request
from ep_core.plugins import registry
from ep_core.policy import PruningPolicy

pytestmark = pytest.mark.filterwarnings("default")  # the engine's warnings are not ours to fix

JOURNAL = "TEST_DECODE_GRAPH_JOURNAL"
LANES = 4  # the one batch size that is captured: smaller batches are padded
KEEP = 3
ENGINE = {
    "dtype": "float32",
    "attention_backend": "triton",
    "disable_cuda_graph": False,
    "cuda_graph_bs_decode": [LANES],
    "max_total_tokens": 1024,
    "context_length": 256,
}


@pytest.fixture(scope="module")
def journal(tmp_path_factory):
    """Two rounds of requests through one engine, their answers, and what its process noted."""
    folder = tmp_path_factory.mktemp("graph")
    model = tiny_qwen2_5_vl(folder / "model", seed=1)
    pictures = [
        make_picture(folder / f"{i}.png", i, size)
        for i, size in enumerate([(112, 84), (56, 140), (84, 84), (112, 56), (56, 56)])
    ]
    # some end early: the batch shrinks, its last lanes become padding
    rounds = [
        [
            Request((pictures[0], "what number?"), 3),
            Request((pictures[1], "and where?"), 4),
            Request((pictures[2], "is it red?"), 7),
            Request(("how many?",), 7),
        ],
        [
            Request((pictures[3], "look"), 7),
            Request((pictures[4], "a circle?"), 4),
            Request((pictures[0], "a star?"), 5),
        ],
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv(JOURNAL, str(folder / "journal"))
        patch.syspath_prepend(plugin(folder))
        policy = PruningPolicy.parse(f"layer=2,keep={KEEP},method=released")
        with registry().backend("sglang").load().open(model, policy, **ENGINE) as session:
            pairs = [
                pair
                for asked in rounds
                for pair in zip(asked, session.generate(asked), strict=True)
            ]
    lines = [json.loads(line) for line in (folder / "journal").read_text().splitlines()]
    return SimpleNamespace(
        model=model,
        pairs=pairs,
        captures=[line for line in lines if line["event"] == "capture"],
        replays=[line for line in lines if line["event"] == "replay"],
    )


def plugin(folder):
    """A folder with the metadata of an installed SGLang plugin that is this file."""
    packaged = folder / "installed"
    metadata = packaged / "decode_graph-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: decode_graph\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text("[sglang.srt.plugins]\ntape = tape:activate\n")
    (packaged / "tape.py").symlink_to(__file__)
    return str(packaged)


def test_replays_answer_as_the_oracle(journal):
    assert len(journal.captures) == 1, "no graph was captured"
    paddings = [line["padding"] for line in journal.replays]
    assert any(after > before for before, after in pairwise(paddings)), (
        f"no batch shrank: the padded lanes of the replays were {paddings}"
    )
    oracle = Oracle(journal.model)
    for request, answer in journal.pairs:
        expected = oracle.generate(
            request.content,
            layer=2,
            keep=[KEEP] * (len(request.content) - 1),
            method="released",
            max_new_tokens=request.max_new_tokens,
        )
        assert [list(span.kept) for span in answer.spans] == expected.kept, f"{request}"
        assert list(answer.output_ids) == expected.output_ids, (
            f"{request}: greedy tokens {list(answer.output_ids)}, the oracle has "
            f"{expected.output_ids}"
        )


def test_buffers_stay_where_the_graph_reads_them(journal):
    captured = journal.captures[0]["addresses"]
    for line in journal.replays:
        assert line["addresses"] == captured, "a replay prepared other memory than was captured"


def test_buffers_hold_what_an_eager_pass_would_read(journal):
    for line in journal.replays:
        assert line["read"] == line["expected"], "layers >= K would read other slots"
        assert line["written"] == line["targets"], (
            f"the new tokens of {LANES - line['padding']} requests and {line['padding']} padded "
            f"lanes go to the kept slots {line['written']}, expected {line['targets']}; a padded "
            "lane must write to the padding slot 0"
        )


def test_kept_lengths_are_exact_on_the_host(journal):
    """An attention backend that plans decode on the host would else plan work that is not there."""
    for line in journal.replays:
        lengths = [n or 1 for n in line["lengths"]]  # a padded lane reads the padding slot
        assert line["on host"] == lengths
        assert line["summed"] == sum(lengths)
    held = {n for line in journal.replays for n in line["lengths"]}
    assert len(held) > 3, "hardly a length occurred"


def test_nothing_waits_for_the_device(journal):
    for line in journal.captures + journal.replays:
        assert not line["waits"], f"{line['event']}: {line['waits']}"


def test_the_watch_sees_reads():
    here, there = torch.arange(3), torch.arange(3)
    with Waits([here]) as waits:
        int(here.max())
        assert not waits.seen, "what is computed of host tensors alone may be read"
        int(there.max())
        there[there > 1].tolist()
    assert waits.seen == ["__int__", "__getitem__", "tolist"]


# In the engine's own process.

CAPTURE = {}  # what is known of a capture before its kernels ran


def activate():
    """SGLang's plugin entry point."""
    if multiprocessing.parent_process() is None or JOURNAL not in os.environ:
        return
    from sglang.srt.model_executor import model_runner
    from sglang.srt.model_executor.model_runner_components import cuda_graph_setup
    from sglang.srt.model_executor.runner import decode_cuda_graph_runner as runner
    from triton.runtime.interpreter import GridExecutor

    from ep_backends.sglang.attention import PrunedAttention

    def capture(*, model_runner):
        return cuda_graph_setup.GraphCapture(
            runner=runner.DecodeCudaGraphRunner(model_runner),
            memory_phase="decode",
            memory_usage_gb=0,
            capture_time=0,
        )

    # SGLang has no decode graphs on a CPU: this is where it says so
    model_runner.capture_decode_graph = cuda_graph_setup.capture_decode_graph = capture
    # and these need a CUDA device
    runner.graph_capture = lambda stream: contextlib.nullcontext(SimpleNamespace(stream=None))
    runner.get_or_create_global_graph_capture_stream = lambda: None
    runner.resolve_decode_backend = TapeBackend
    torch.cpu.is_current_stream_capturing = lambda: False

    launch = GridExecutor.__call__
    GridExecutor.__call__ = lambda *args, **kwargs: Tape.kernel(launch, args, kwargs)
    prepare = PrunedAttention.init_forward_metadata_out_graph

    def noted(self, forward_batch, in_capture=False):
        note(prepare, self, forward_batch, in_capture)

    PrunedAttention.init_forward_metadata_out_graph = noted


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
        """A launch of an interpreted Triton kernel; what the interpreter does is no step."""
        if Tape.recording is not None:
            Tape.recording.steps.append((launch, args, kwargs, None))
        Tape.in_kernel = True
        try:
            return launch(*args, **kwargs)
        finally:
            Tape.in_kernel = False

    def replay(self):
        for func, args, kwargs, out in self.steps:
            again = func(*args, **kwargs)
            inputs = {memory(t) for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                # views and results in place are there already
                if torch.is_tensor(old) and memory(old) not in inputs:
                    old.copy_(new)


class TapeBackend:
    """What SGLang's graph runner expects of a backend."""

    def __init__(self, runner):
        self.tapes = {}

    def capture_session(self, stream):
        return contextlib.nullcontext()

    def capture_one(self, key, forward, capture_inputs=None, post_warmup_hook=None):
        forward()
        post_warmup_hook()
        with Waits() as waits, Tape() as tape:
            self.tapes[key] = tape, forward()
        write({"event": "capture", **CAPTURE, "waits": CAPTURE["waits"] + waits.seen})

    def can_run(self, batch, key):
        return key in self.tapes

    def replay_session(self):
        return contextlib.nullcontext()

    def replay(self, key, batch, **kwargs):
        tape, output = self.tapes[key]
        tape.replay()
        return output

    def cleanup(self):
        self.tapes.clear()


class Waits(TorchFunctionMode):
    """Notes each place where the host reads what is on the device.

    Here both are memory of the CPU: `host` tensors and what is computed of them alone may be read.
    """

    NUMBERS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")
    SIZES = ("__contains__", "nonzero", "argwhere", "masked_select", "unique", "equal", "allclose")

    def __init__(self, host=()):
        super().__init__()
        self.host = [t for t in host if t is not None]
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)]
        if tensors and all(any(t is known for known in self.host) for t in tensors):
            self.host += [t for t in tree_leaves(out) if torch.is_tensor(t)]
            return out
        name = getattr(func, "__name__", "")
        by_mask = name in ("__getitem__", "__setitem__") and any(
            torch.is_tensor(t) and t.dtype == torch.bool for t in tree_leaves(args[1])
        )
        alone = name == "where" and len(tensors) == 1
        if (name in self.NUMBERS + self.SIZES or by_mask or alone) and not Tape.in_kernel:
            self.seen.append(name)
        return out


def note(prepare, attention, batch, in_capture):
    """Around the preparation of a pass: what it waited for and what it left in the buffers."""
    with Waits([batch.seq_lens_cpu]) as waits:
        prepare(attention, batch, in_capture=in_capture)
    view, full, kept = batch.pruning.kept, attention.full, attention.kept
    line = {"waits": waits.seen, "addresses": {}}
    if in_capture:
        # what the captured kernels are given
        for name, part in (("full", full), ("kept", kept)):
            reads = part.forward_metadata
            line["addresses"][name] = [
                t.data_ptr() for t in (reads.kv_indptr, reads.kv_indices, reads.num_kv_splits)
            ]
    else:
        # what was filled for them
        for name, part in (("full", full), ("kept", kept)):
            fills = (part.kv_indptr, part.cuda_graph_kv_indices, part.cuda_graph_num_kv_splits)
            line["addresses"][name] = [t.data_ptr() for t in fills]
    line["addresses"]["view"] = [view.out_cache_loc.data_ptr(), view.seq_lens.data_ptr()]
    if in_capture:
        CAPTURE.update(line)
        return
    lanes, padding = batch.batch_size, batch.num_padding
    mapping, table = attention._mapping.tolist(), attention._rows.tolist()
    rows, lengths = batch.req_pool_indices.tolist(), batch.seq_lens.tolist()
    expected = [
        [mapping[slot] for slot in table[row][:length] if mapping[slot]]
        for row, length in zip(rows, lengths, strict=True)
    ]
    starts, reads = kept.kv_indptr.tolist(), kept.cuda_graph_kv_indices
    targets = [mapping[slot] for slot in batch.out_cache_loc[: lanes - padding].tolist()]
    write(
        {
            "event": "replay",
            **line,
            "lanes": lanes,
            "padding": padding,
            "read": [reads[starts[i] : starts[i + 1]].tolist() for i in range(lanes)],
            "expected": [lane or [0] for lane in expected],
            "lengths": [len(lane) for lane in expected],
            "on host": view.seq_lens_cpu.tolist(),
            "summed": view.seq_lens_sum,
            "written": attention._graph_slots[:lanes].tolist(),
            "targets": targets + [0] * padding,
        }
    )


def memory(tensor):
    return tensor.untyped_storage().data_ptr()


def write(line):
    with open(os.environ[JOURNAL], "a") as file:
        file.write(json.dumps(line) + "\n")
