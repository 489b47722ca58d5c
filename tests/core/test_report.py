"""Records and counters of what was pruned."""

import json
from dataclasses import FrozenInstanceError

import pytest

from ep_core.report import PruneCounters, RequestRecord, SpanRecord


def test_a_span_record_is_plain_json():
    record = SpanRecord(3, 10, (0, 2, 6))
    written = json.loads(json.dumps(record.to_json()))
    assert written == {"start": 3, "stop": 10, "kept": [0, 2, 6]}


def test_a_request_record_says_nothing_by_default():
    assert RequestRecord() == RequestRecord(spans=(), reason=None)


def test_records_cannot_change():
    with pytest.raises(FrozenInstanceError):
        SpanRecord(0, 1, (0,)).kept = ()
    with pytest.raises(FrozenInstanceError):
        RequestRecord().reason = "later"


def test_counters_add_up_over_requests():
    counters = PruneCounters()
    counters.add(576, 478, None)
    counters.add(1152, 0, "video")
    counters.add(0, 0, "no picture")
    counters.add(100, 75, None)
    counters.add(0, 0, "no picture")
    assert counters.visual_tokens_seen == 1828
    assert counters.visual_tokens_kept == 98 + 1152 + 25
    assert counters.requests_pruned == 2
    assert counters.requests_unpruned == {"video": 1, "no picture": 2}


def test_counters_are_not_shared():
    one = PruneCounters()
    one.add(5, 0, "no reason")
    assert PruneCounters().requests_unpruned == {}
