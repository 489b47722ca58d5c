"""Records and counters of what was pruned."""

import json
from dataclasses import FrozenInstanceError

import pytest

from ep_core.plan import PlannedUnit, Reason, RequestPlan, Run, Unit
from ep_core.report import PruneCounters, RequestRecord, SpanRecord


def unit(start, stop, **facts):
    return Unit((Run(start, stop),), **facts)


def test_a_span_record_is_plain_json():
    record = SpanRecord(3, 10, (0, 2, 6), grid=(1, 7))
    written = json.loads(json.dumps(record.to_json()))
    assert written == {"start": 3, "stop": 10, "kept": [0, 2, 6]}


def test_a_request_record_says_nothing_by_default():
    assert RequestRecord() == RequestRecord(spans=(), reason=None)


def test_records_cannot_change():
    with pytest.raises(FrozenInstanceError):
        SpanRecord(0, 1, (0,)).kept = ()
    with pytest.raises(FrozenInstanceError):
        RequestRecord().reason = "later"


def test_a_record_of_a_plan_says_where_its_units_are_and_how_they_lie_on_the_picture():
    units = [
        PlannedUnit(unit(2, 8, grid=(2, 3)), 2),
        PlannedUnit(unit(9, 11), 2),
        PlannedUnit(Unit((Run(12, 14), Run(15, 17)), grid=(2, 2)), 2),
    ]
    record = RequestRecord.of(RequestPlan.of(units, 20), [[0, 5], [1, 2]], first=100)
    assert record.reason is None
    assert record.spans == (
        SpanRecord(102, 108, (0, 5), (2, 3)),
        SpanRecord(109, 111, (0, 1)),
        SpanRecord(112, 117, (1, 3), (2, 2)),
    )


def test_counters_add_up_over_requests():
    counters = PruneCounters()
    two = [PlannedUnit(unit(5, 581), 98), PlannedUnit(unit(600, 700), 25)]
    counters.add(RequestPlan.of(two, 800))
    counters.add(RequestPlan.whole([unit(5, 1157)], 1200, Reason.LAYOUT, "a run of 7 tokens"))
    counters.add(RequestPlan.whole((), 9, Reason.NO_PICTURES))
    counters.add(RequestPlan.of(two[1:], 800))
    counters.add(RequestPlan.whole((), 9, Reason.NO_PICTURES))
    assert counters.visual_tokens_seen == 676 + 1152 + 100
    assert counters.visual_tokens_kept == 98 + 25 + 1152 + 25
    assert counters.requests_pruned == 2
    assert counters.requests_unpruned == {
        "the pictures cannot be told apart": 1,  # what a detail says is not counted apart
        "the prompt has no visual tokens": 2,
    }


def test_counters_are_not_shared():
    one = PruneCounters()
    one.add(RequestPlan.whole((), 9, Reason.OFF))
    assert PruneCounters().requests_unpruned == {}
