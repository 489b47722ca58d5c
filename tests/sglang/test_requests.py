"""What a request keeps and what is done for it, without an engine."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from ep_backends.sglang import requests
from ep_backends.sglang.requests import DroppedSlots, SGLangRequest, plan_request, request_of
from ep_backends.shared.requests import server_settings
from ep_core.errors import BudgetError, PolicyError
from ep_core.plan import PlannedUnit, Reason, RequestPlan, Run, Unit
from ep_core.policy import PruningPolicy

pytestmark = pytest.mark.filterwarnings("default")  # the engine's warnings are not ours to fix

SERVER = PruningPolicy.parse("layer=2,keep=16,method=rows")
CONFIG = {
    "model_type": "qwen2_5_vl",
    "image_token_id": 9,
    "video_token_id": 8,
    "text_config": {
        "model_type": "qwen2_5_vl_text",
        "num_hidden_layers": 8,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
SETTINGS = server_settings(SERVER, CONFIG)


def item(*offsets, image=True):
    return SimpleNamespace(is_image=lambda: image, offsets=list(offsets))


def request(asked=None, *, tokens=200, **more):
    """SGLang's `Req`, as much of it as is read."""
    fields = {
        "sampling_params": SimpleNamespace(
            custom_params=None if asked is None else {"entropyprune": asked},
            n=1,
            max_new_tokens=8,
            min_new_tokens=0,
        ),
        "origin_input_ids": [0] * tokens,
        "session": None,
        "return_hidden_states": False,
        "beam_group": None,
        "return_logprob": False,
        "logprob_start_len": -1,
        "customized_info": None,
    }
    return SimpleNamespace(**(fields | more))


def planned(req, *items, details=False):
    items = items or (item((4, 67), (70, 133)),)
    inputs = SimpleNamespace(mm_items=list(items))
    return plan_request(req, inputs, SETTINGS, details=details)


def test_pictures_are_where_sglangs_processors_put_them():
    """Several in one item, their ends inclusive, items in any order."""
    plan = planned(request(), item((70, 133)), item((4, 67), (140, 155))).plan
    runs = [(unit.unit.start, unit.unit.stop) for unit in plan.units]
    assert runs == [(4, 68), (70, 134), (140, 156)]
    assert [unit.keep for unit in plan.units] == [16, 16, 16]
    assert [unit.unit.item for unit in plan.units] == [0, 1, 2]


def test_pictures_of_the_older_llava_code_path():
    old = SimpleNamespace(mm_items=[item()], image_offsets=[70, 4], image_pad_len=[64, 60])
    plan = plan_request(request(), old, SETTINGS, details=False).plan
    assert [(unit.unit.start, unit.unit.stop) for unit in plan.units] == [(4, 64), (70, 134)]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"asked": "off"}, Reason.OFF),
        ({"asked": "off", "session": "s"}, Reason.OFF),
        ({"session": "s"}, Reason.SESSION),
        ({"return_hidden_states": "last"}, Reason.HIDDEN_STATES),
        ({"beam_group": object()}, Reason.BEAM_SEARCH),
        ({"return_logprob": True, "logprob_start_len": 0}, Reason.PROMPT_LOGPROBS),
        ({"return_logprob": True, "logprob_start_len": 199}, Reason.PROMPT_LOGPROBS),
        ({"tokens": 134}, Reason.ENDS_INSIDE),
    ],
)
def test_what_is_not_pruned_says_why_and_shares_no_prefix_with_what_is(more, reason):
    found = planned(request(**more))
    assert found.plan.reason == reason
    assert found.plan.dropped == 0
    assert found.report() == {"visual_tokens": 128, "kept": 128, "reason": str(reason)}
    assert found.namespace == "off"


@pytest.mark.parametrize("start", [200, -1])
def test_logprobs_of_the_answer_alone_do_not_switch_pruning_off(start):
    found = planned(request(return_logprob=True, logprob_start_len=start))
    assert found.plan.dropped == 2 * 48


def test_other_media_and_pictures_that_are_nowhere():
    assert planned(request(), item((4, 9), image=False)).plan.reason == Reason.OTHER_MEDIA
    assert planned(request(), item()).plan.reason == Reason.NOT_FOUND
    assert planned(request("off"), item()).plan.reason == Reason.OFF


def test_requests_with_the_same_pictures_and_policy_share_prefixes_whatever_they_keep():
    assert planned(request()).namespace == ""
    assert planned(request({"keep": 16})).namespace == ""
    assert planned(request({"keep": 17})).namespace not in ("", "off")
    assert planned(request({"keep": 17})).namespace == planned(request({"keep": 17})).namespace
    small = planned(request(), item((4, 9)))  # 6 tokens
    assert small.plan.reason == Reason.DOES_NOT_FIT
    assert small.namespace == ""
    assert planned(request({"keep": 1.0})).plan.reason == Reason.KEEPS_ALL


def test_details_are_for_engines_that_allow_them():
    assert not planned(request()).details
    assert planned(request({"details": True}), details=True).details
    with pytest.raises(PolicyError, match="a request cannot set 'details'"):
        planned(request({"details": True}))


def test_a_budget_of_its_own_that_does_not_fit_is_an_error():
    with pytest.raises(BudgetError):
        planned(request({"keep": 65}))


class Streamed(torch.Tensor):
    """A tensor that remembers which streams read it."""

    @property
    def is_cuda(self):
        return True

    def record_stream(self, stream):
        self.streams = [*getattr(self, "streams", ()), stream]


class Stream:
    def __init__(self):
        self.waited = []

    def record_event(self):
        return "when the slots are known"

    def wait_event(self, event):
        self.waited.append(event)


def test_dropped_slots_outlive_the_pass_that_dropped_them(monkeypatch):
    """Allocated on the forward stream, read on the scheduler's: the allocator must know both."""
    forward, scheduler = Stream(), Stream()
    parts = [torch.tensor(slots).as_subclass(Streamed) for slots in ([3, 4], [9])]
    dropped = DroppedSlots()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: forward)
    for part in parts:
        dropped.add(part)
    assert len(dropped) == 3
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: scheduler)
    assert dropped.take().tolist() == [3, 4, 9]
    assert scheduler.waited == ["when the slots are known"]
    assert [part.streams for part in parts] == [[scheduler], [scheduler]]
    assert not len(dropped)


def test_slots_on_a_cpu_wait_for_nothing():
    dropped = DroppedSlots()
    dropped.add(torch.tensor([5, 6]))
    assert dropped.take().tolist() == [5, 6]


def test_a_report_is_built_when_it_is_due_and_shared_with_nobody():
    req = request()
    found = planned(req)
    requests.publish(req, found.report())
    (told,) = req.customized_info["entropyprune"]
    assert told == {"visual_tokens": 128, "kept": 32}
    told["kept"] = "changed by a reader"
    assert found.report()["kept"] == 32


def scheduler(slots=1000, **more):
    """As much of SGLang's scheduler as admission looks at."""
    counted = []

    class Metrics:
        def count(self, seen, kept, reason):
            counted.append((seen, kept, reason))

    return SimpleNamespace(
        model_config=SimpleNamespace(_entropyprune_settings=SETTINGS),
        chunked_prefill_size=64,
        token_to_kv_pool_allocator=SimpleNamespace(size_swa=slots),
        metrics_collector_context=SimpleNamespace(current_scheduler_metrics_enabled=True),
        _entropyprune_metrics=Metrics(),
        counted=counted,
        **more,
    )


def admitted(engine, req):
    """The request after admission, and why SGLang gave it up, or None."""
    aborted = []
    req.to_finish, req.extra_key = None, None
    req.multimodal_inputs = SimpleNamespace(mm_items=[item((4, 67))])
    req.set_finish_with_abort = aborted.append
    requests.admit(lambda *args: None, engine, req)
    return next(iter(aborted), None)


@pytest.fixture
def pruned(monkeypatch):
    """A process that was told to prune."""
    from ep_backends.sglang.arguments import Orders

    Orders.give(Orders(SERVER))
    yield
    Orders.give(None)


def test_one_picture_of_one_request_is_counted_once(pruned):
    """For n answers SGLang sends n requests, and one before them that asks for no answer."""
    engine = scheduler()
    for tokens in (0, 8, 8, 8):
        req = request()
        req.sampling_params.n, req.sampling_params.max_new_tokens = 3, tokens
        assert admitted(engine, req) is None
    assert engine.counted == [(64, 16, None)]
    assert admitted(engine, request()) is None
    assert engine.counted == [(64, 16, None)] * 2


def test_a_request_that_cannot_be_read_is_given_up_and_planned_no_further(pruned):
    engine, req = scheduler(), request("nonsense")
    assert "cannot be read" in admitted(engine, req)
    assert request_of(req) is None
    assert engine.counted == []


def test_a_prompt_that_can_never_fit_is_given_up(pruned):
    assert "--swa-full-tokens-ratio" in admitted(scheduler(slots=60), request(tokens=100))
    long = request(tokens=100)
    long.sampling_params.max_new_tokens = 5000
    assert admitted(scheduler(slots=100), long) is None
    # 100 - 2 - (100 - 48) slots are left for the answer
    assert long.sampling_params.max_new_tokens == 46


def test_a_batch_keeps_what_its_pass_knows_when_sglang_copies_it():
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

    from ep_backends.sglang.batch import make_batch, make_replay_view, pass_of
    from ep_core.errors import UnsupportedError

    units = [PlannedUnit(Unit((Run(4, 68),)), 16)]
    found = SGLangRequest(RequestPlan.of(units, 100))
    reqs = [SimpleNamespace(_entropyprune_request=found), SimpleNamespace()]

    def init_new(cls, batch, model_runner, **kwargs):
        empty = torch.zeros(len(batch.reqs), dtype=torch.int64)
        return cls(ForwardMode.DECODE, len(batch.reqs), empty, empty, empty, empty, 0)

    made = make_batch(init_new, ForwardBatch, SimpleNamespace(reqs=reqs), None)
    assert list(pass_of(made).requests) == [found, None]
    copied = dataclasses.replace(made, seq_lens=torch.ones(2))
    assert pass_of(copied) is pass_of(made)
    view = make_replay_view(lambda batch, **kwargs: SimpleNamespace(), made, bs=4)
    assert pass_of(view) is pass_of(made)
    with pytest.raises(UnsupportedError, match="another plugin makes batches of its own, Other"):
        make_batch(init_new, type("Other", (ForwardBatch,), {}), SimpleNamespace(reqs=reqs), None)
