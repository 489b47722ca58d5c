"""Pruned generation: batches, turns, caches, dtypes, decoding methods, compiled models, losses."""

import copy
import re
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, TextIteratorStreamer

from ep_backends.transformers import enable
from ep_backends.transformers.backend import TransformersBackend
from ep_core import UnsupportedError

from .compiling import WAYS_TO_COMPILE
from .layouts import in_rows

POLICY = "layer=2,keep=0.3,method=released"
TOLERANCE = 1e-4


def run(model: Any, inputs: dict[str, torch.Tensor], steps: int = 6, **options: Any) -> Any:
    options = {"do_sample": False, "min_new_tokens": steps} | options
    return model.generate(
        **inputs,
        max_new_tokens=steps,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )


def new_tokens(output: Any, inputs: dict[str, torch.Tensor]) -> list[list[int]]:
    return output.sequences[:, inputs["input_ids"].shape[1] :].tolist()


def logits(output: Any) -> torch.Tensor:
    return torch.stack(output.logits, dim=1)


def assert_close(a: torch.Tensor, b: torch.Tensor, what: str) -> None:
    worst = float((a - b).abs().max())
    assert worst <= TOLERANCE, f"{what}: logits differ by up to {worst:.2e}"


def state_of(model: Any) -> dict[str, Any]:
    """Everything that hooks and patches could have changed."""
    hooks = {
        name: (len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    }
    return {"hooks": hooks, "attributes": sorted(vars(model))}


def test_disable_restores_the_model_to_the_bit(family, model):
    inputs = family.encode([family.picture(0), "what is it?"])
    before = run(model, inputs)  # first: transformers attaches hooks of its own when first run
    before_state = state_of(model)
    with enable(model, POLICY):
        pruned = run(model, inputs)
    after = run(model, inputs)
    assert state_of(model) == before_state
    assert torch.equal(logits(before), logits(after)), "disabled is not the plain model"
    assert not torch.equal(logits(before), logits(pruned)), "pruning changed nothing at all"


def test_text_only_prompts_are_untouched_to_the_bit(family, model):
    inputs = family.encode(["no picture"], ["and none in this longer message either"])
    plain = run(model, inputs)
    with enable(model, POLICY) as pruning:
        pruned = run(model, inputs)
        reasons = {record.reason for record in pruning.records}
    assert torch.equal(logits(plain), logits(pruned))
    assert reasons == {"the prompt has no visual tokens"}


def test_a_budget_that_keeps_everything_is_untouched_to_the_bit(family, model):
    inputs = family.encode([family.picture(0), "what is it?"])
    plain = run(model, inputs)
    with enable(model, "layer=1,keep=1.0") as pruning:
        pruned = run(model, inputs)
        (record,) = pruning.records
    assert torch.equal(logits(plain), logits(pruned))
    assert record.reason == "the budget keeps every token"
    (span,) = record.spans
    assert span.kept == tuple(range(span.stop - span.start))


def test_layers_from_k_compute_on_fewer_tokens_and_hold_a_shorter_cache(family, model):
    inputs = family.encode([family.picture(0), "what is it?"])
    widths: dict[int, int] = {}
    handles = [
        layer.mlp.register_forward_hook(
            lambda module, args, output, i=i: widths.setdefault(i, args[0].shape[1])
        )
        for i, layer in enumerate(model.get_decoder().layers)
    ]
    with enable(model, POLICY) as pruning:
        output = run(model, inputs, steps=3)
        (record,) = pruning.records
    for handle in handles:
        handle.remove()
    prompt = inputs["input_ids"].shape[1]
    dropped = sum(span.stop - span.start - len(span.kept) for span in record.spans)
    assert dropped > 0
    assert [widths[i] for i in range(4)] == [prompt, prompt, prompt - dropped, prompt - dropped]
    cached = [layer.get_seq_length() for layer in output.past_key_values.layers]
    assert cached == [prompt + 2, prompt + 2, prompt - dropped + 2, prompt - dropped + 2]


@pytest.mark.parametrize("method", ["released", "set-entropy"])
def test_a_left_padded_batch_equals_each_prompt_alone(family, model, method):
    messages = [
        [family.picture(0), "what?"],
        [family.picture(1), "and", family.picture(2), "which of these two is larger?"],
        ["a text without any picture, " + "longer than all the other prompts " * 12],
        [family.picture(3), family.picture(4), family.picture(5), "three"],
    ]
    batch = family.encode(*messages)
    with enable(model, f"layer=2,keep=0.3,method={method}") as pruning:
        together, records = run(model, batch), pruning.records
        for i, message in enumerate(messages):
            inputs = family.encode(message)
            alone, (record,) = run(model, inputs), pruning.records
            assert records[i] == record, f"prompt {i} is pruned differently in a batch"
            assert new_tokens(together, batch)[i] == new_tokens(alone, inputs)[0]
            assert_close(logits(together)[i], logits(alone)[0], f"prompt {i} in a batch and alone")
    assert records[2].reason is not None
    assert all(records[i].reason is None for i in (0, 1, 3))


def equal_lengths(family):
    """Two prompts of the same length, with one picture and with two, each alone."""
    prompts = [
        family.encode([family.picture(0), "what?"]),
        family.encode([family.picture(0), "and", family.picture(3), "which is larger?"]),
    ]
    short, long = prompts
    filler = long["input_ids"].shape[1] - short["input_ids"].shape[1]
    for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if key in short:
            end = short[key][:, -1:]  # text in each of them
            short[key] = torch.cat([short[key], end.expand(-1, filler)], dim=1)
    return prompts


@pytest.mark.parametrize("masked", [True, False])
def test_prompts_of_equal_length_that_keep_different_numbers(family, model, masked):
    """No row is padded, so layers < K need no mask; layers >= K pad the row that keeps less."""
    prompts = equal_lengths(family)
    batch = {key: torch.cat([prompt[key] for prompt in prompts]) for key in prompts[0]}
    if not masked:
        del batch["attention_mask"]
    with enable(model, POLICY) as pruning, torch.no_grad():
        together, records = model(**batch).logits[:, -1], pruning.records
        for i, prompt in enumerate(prompts):
            assert_close(together[i], model(**prompt).logits[0, -1], f"prompt {i}")
        output = run(model, batch)
        for i, prompt in enumerate(prompts):
            assert_close(logits(output)[i], logits(run(model, prompt))[0], f"answer {i}")
    dropped = [sum(s.stop - s.start - len(s.kept) for s in record.spans) for record in records]
    assert dropped[0] != dropped[1], "the case does not pad"


def test_right_padding_and_output_shape_in_a_plain_forward(family, model):
    messages = [[family.picture(0), "what?"], [family.picture(1), family.picture(2), "longer one"]]
    batch = family.encode(*messages, side="right")
    with enable(model, POLICY) as pruning, torch.no_grad():
        together, records = model(**batch).logits, pruning.records
        for i, message in enumerate(messages):
            inputs = family.encode(message)
            alone = model(**inputs).logits[0]
            length = int(batch["attention_mask"][i].sum())
            assert together.shape[1] == batch["input_ids"].shape[1]
            kept = torch.ones(length, dtype=torch.bool)
            for span in records[i].spans:
                kept[span.start : span.stop] = False
                kept[[span.start + k for k in span.kept]] = True
            answered = ~alone.isnan().any(dim=1)
            assert torch.equal(answered, kept), "exactly the dropped positions hold NaN"
            assert torch.equal(~together[i, :length].isnan().any(dim=1), kept)
            assert_close(together[i, :length][kept], alone[kept], f"right-padded prompt {i}")


def test_cache_and_recomputation_agree(family, model):
    """Without a cache every step prunes the whole prompt again: nothing can be stale."""
    inputs = family.encode(
        [family.picture(0), "what?"], [family.picture(1), "and", family.picture(2), "this?"]
    )
    with enable(model, POLICY):
        cached = run(model, inputs)
        recomputed = run(model, inputs, use_cache=False)
    assert new_tokens(cached, inputs) == new_tokens(recomputed, inputs)
    assert_close(logits(cached), logits(recomputed), "with and without a cache")


def skip_mixed_tiles(family: Any) -> None:
    before_mended = tuple(map(int, version("transformers").split(".")[:2])) < (5, 19)
    if family.name == "internvl" and before_mended:
        pytest.skip("transformers before 5.19 gives beams each other's tiles, pruned or not")


def test_beam_search_with_a_cache_equals_recomputation(family, model):
    skip_mixed_tiles(family)
    inputs = family.encode(
        [family.picture(0), "what?"], [family.picture(1), "and", family.picture(2), "this?"]
    )
    outputs = []
    with enable(model, POLICY):
        for use_cache in (True, False):
            output = model.generate(
                **inputs, max_new_tokens=6, num_beams=3, do_sample=False, use_cache=use_cache
            )
            outputs.append(output.tolist())
    assert outputs[0] == outputs[1]


def test_beam_sampling_is_reproducible(family, model):
    """transformers 5.17 itself samples other beams without a cache, so that is no oracle here."""
    skip_mixed_tiles(family)
    inputs = family.encode([family.picture(0), "what?"], [family.picture(1), "which?"])
    outputs = []
    with enable(model, POLICY) as pruning:
        for _ in range(2):
            torch.manual_seed(7)
            output = model.generate(**inputs, max_new_tokens=6, num_beams=3, do_sample=True)
            outputs.append(output.tolist())
        records = pruning.records
    assert outputs[0] == outputs[1]
    assert len(records) == 6, "every beam is a row of the prefill"
    assert records[0] == records[1] == records[2] != records[3]


def test_sampling_is_reproducible_and_follows_pruned_logits(family, model):
    inputs = family.encode([family.picture(0), "what?"])
    outputs = []
    with enable(model, POLICY):
        for use_cache in (True, True, False):
            torch.manual_seed(3)
            output = model.generate(
                **inputs, max_new_tokens=8, do_sample=True, temperature=2.0, use_cache=use_cache
            )
            outputs.append(output.tolist())
    assert outputs[0] == outputs[1] == outputs[2]


def turns(family, model, *messages, policy=POLICY):
    """A conversation over one cache, fed by concatenating token ids; logits of the last answer."""
    cache, history, extra, steps = DynamicCache(config=model.get_decoder().config), None, {}, 4
    with enable(model, policy) as pruning:
        for message in messages:
            turn = family.encode(message)
            for key, value in turn.items():
                join_at = 1 if value.ndim == 2 and value.shape[0] == 1 else 0
                if key in ("input_ids", "attention_mask", "mm_token_type_ids"):
                    before = history[key] if history else value[:, :0]
                    extra[key] = torch.cat([before, value], dim=join_at)
                else:
                    before = history[key] if history and key in history else value[:0]
                    extra[key] = torch.cat([before, value])
            history = dict(extra)
            fresh = run(model, history, steps=steps)
            reuse = dict(history)
            past = cache.get_seq_length()
            if "pixel_values" in turn:  # earlier pictures are in the cache already
                reuse["pixel_values"] = turn["pixel_values"]
            elif past:
                reuse.pop("pixel_values", None)
            output = run(model, reuse, steps=steps, past_key_values=cache)
            yield output, fresh, pruning.records
            tail = output.sequences[:, history["input_ids"].shape[1] :]
            answered = torch.cat([history["input_ids"], tail], dim=1)
            history["input_ids"] = answered
            history["attention_mask"] = torch.ones_like(answered)
            if "mm_token_type_ids" in history:
                filler = torch.zeros_like(tail)
                history["mm_token_type_ids"] = torch.cat(
                    [history["mm_token_type_ids"], filler.to(history["mm_token_type_ids"])], dim=1
                )
            extra = dict(history)


def test_a_second_turn_over_the_same_cache_equals_the_whole_conversation(family, model):
    conversation = turns(
        family, model, [family.picture(0), "what is it?"], ["and its colour?"], ["sure?"]
    )
    for number, (reused, fresh, _) in enumerate(conversation):
        assert_close(logits(reused), logits(fresh), f"turn {number}")


@pytest.mark.parametrize("name", ["internvl", "llava"])
def test_a_picture_in_a_later_turn_is_pruned_too(lab, name):
    """Not Qwen: transformers wants one image_grid_thw for all of its pictures and the new ones."""
    family = lab(name)
    model = family.model()
    conversation = turns(
        family, model, ["hello"], [family.picture(0), "what is it?"], [family.picture(1), "this?"]
    )
    reasons = []
    for number, (reused, fresh, records) in enumerate(conversation):
        assert_close(logits(reused), logits(fresh), f"turn {number}")
        reasons += [record.reason for record in records]
    assert reasons == ["the prompt has no visual tokens", None, None]


def test_a_copied_prefix_cache_can_be_continued_twice(family, model):
    prefix = family.encode([family.picture(0), "what is it?"])
    with enable(model, POLICY):
        cache = DynamicCache(config=model.get_decoder().config)
        with torch.no_grad():
            model(**prefix, past_key_values=cache, use_cache=True)
        for tail in ([17, 5, 40], [8, 9]):
            ids = torch.cat([prefix["input_ids"], torch.tensor([tail])], dim=1)
            whole = dict(prefix, input_ids=ids, attention_mask=torch.ones_like(ids))
            if "mm_token_type_ids" in whole:
                kinds = whole["mm_token_type_ids"]
                whole["mm_token_type_ids"] = torch.cat(
                    [kinds, torch.zeros(1, len(tail), dtype=kinds.dtype)], dim=1
                )
            fresh = run(model, whole)
            reuse = {key: value for key, value in whole.items() if key != "pixel_values"}
            continued = run(model, reuse, past_key_values=copy.deepcopy(cache))
            assert_close(logits(continued), logits(fresh), f"continuation {tail}")


@pytest.mark.parametrize("method", ["released", "set-entropy"])
def test_eager_and_sdpa_agree(family, method):
    inputs = family.encode([family.picture(0), "what?"], [family.picture(1), "longer question?"])
    results = []
    for attention in ("sdpa", "eager"):
        model = family.model(attn_implementation=attention)
        with enable(model, f"layer=2,keep=0.3,method={method}") as pruning:
            results.append((logits(run(model, inputs)), pruning.records))
    (a, a_records), (b, b_records) = results
    assert a_records == b_records
    assert_close(a, b, "sdpa and eager")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(family, dtype):
    """Rounding is coarse here, so only the structure is exact."""
    model = family.model(dtype=dtype)
    inputs = family.encode([family.picture(0), "what?"], [family.picture(1), "longer question?"])
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with enable(model, POLICY) as pruning:
        first, records = run(model, inputs), pruning.records
        again = run(model, inputs)
    assert torch.equal(logits(first), logits(again)), "not deterministic"
    assert not logits(first).isnan().any()
    assert all(record.reason is None for record in records)
    padded = inputs["input_ids"].shape[1] - inputs["attention_mask"].sum(dim=1)
    for pad, record in zip(padded.tolist(), records, strict=True):
        for span in record.spans:
            assert len(span.kept) == max(1, int(0.3 * (span.stop - span.start) + 0.5))
            assert span.start >= 0
            assert span.stop + pad <= inputs["input_ids"].shape[1]


def test_counters_add_up(family, model):
    with enable(model, POLICY) as pruning:
        run(model, family.encode([family.picture(0), "what?"], ["none"]), steps=3)
        run(model, family.encode([family.picture(0), "what?"]), steps=3)
        (span,) = pruning.records[0].spans
        counters = pruning.counters
    assert counters.requests_pruned == 2
    assert counters.requests_unpruned == {"the prompt has no visual tokens": 1}
    assert counters.visual_tokens_seen == 2 * (span.stop - span.start)
    assert counters.visual_tokens_kept == 2 * len(span.kept)


def test_a_pass_that_fails_leaves_nothing_behind(family, model):
    inputs = family.encode([family.picture(0), "what?"])
    other = family.encode(["text only"])
    with enable(model, POLICY) as pruning:
        expected, plain = run(model, inputs), run(model, other)

        def fail(*_: Any) -> None:
            raise RuntimeError("planted")

        handle = model.get_decoder().layers[-1].mlp.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="planted"):
            run(model, inputs)
        handle.remove()
        assert pruning.records == [], "records of a call before"
        assert torch.equal(logits(run(model, other)), logits(plain)), "a stale plan was applied"
        assert torch.equal(logits(run(model, inputs)), logits(expected))


def test_the_decoder_called_by_itself_says_why_it_prunes_nothing(family, model):
    inputs = family.encode([family.picture(0), "what?"], [family.picture(1), "what?"])
    ids = inputs["input_ids"]
    with torch.no_grad():
        plain = model.get_decoder()(input_ids=ids).last_hidden_state
        with enable(model, POLICY) as pruning:
            run(model, inputs)
            again = model.get_decoder()(input_ids=ids).last_hidden_state
            records = pruning.records
    assert torch.equal(plain, again)
    assert [record.spans for record in records] == [(), ()]
    assert {record.reason for record in records} == {
        "the engine does not say where the pictures are in the prompt: the decoder was called by "
        "itself"
    }
    assert pruning.counters.requests_unpruned.total() == 2


@pytest.mark.parametrize("compiled", WAYS_TO_COMPILE)
@pytest.mark.filterwarnings("ignore::UserWarning:torch._dynamo")
def test_a_model_may_be_compiled_after_enable(lab, compiled):
    family = lab("llava")
    model = family.model()
    inputs = family.encode([family.picture(0), "what?"])
    plain = new_tokens(run(model, inputs), inputs)
    with enable(model, POLICY) as pruning:
        expected, records = new_tokens(run(model, inputs), inputs), pruning.records
    assert expected != plain
    with enable(model, POLICY) as pruning:
        compiled(model)
        assert new_tokens(run(model, inputs), inputs) == expected
        assert pruning.records == records
    assert new_tokens(run(model, inputs), inputs) == plain


def test_one_who_streams_sees_the_records(lab):
    """As transformers' guide to TextIteratorStreamer does it: `generate` in a thread of its own."""
    family = lab("llava")
    model = family.model()
    inputs = family.encode([family.picture(0), "what?"])
    with enable(model, POLICY) as pruning:
        for _ in range(2):
            streamer = TextIteratorStreamer(
                family.processor.tokenizer, skip_prompt=True, timeout=60
            )
            options = {"max_new_tokens": 4, "streamer": streamer}
            thread = threading.Thread(target=model.generate, kwargs=inputs | options)
            thread.start()
            for _ in streamer:
                (record,) = pruning.records
            thread.join()
            assert pruning.records == [record]
        run(model, inputs)
        assert pruning.records == [record]
    assert record.reason is None


def test_a_thread_that_prunes_sees_its_own_records(lab):
    family = lab("llava")
    model = family.model()
    with enable(model, POLICY) as pruning:
        run(model, family.encode([family.picture(0), "what?"]))
        own = pruning.records
        other = family.encode(["no picture"])
        thread = threading.Thread(target=run, args=(model, other))
        thread.start()
        thread.join()
        assert pruning.records == own
        assert own[0].reason is None


def labels_of(inputs, model):
    """As docs/transformers.md makes them: none for pictures, what stands behind them, padding."""
    page = Path(__file__).parents[2] / "docs" / "transformers.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    (block,) = [block for block in blocks if "labels =" in block]
    names = {"inputs": inputs, "model": model}
    exec(block, names)
    return names["labels"]


@pytest.mark.parametrize("messages", [1, 2])
def test_an_evaluation_loss_is_the_mean_over_the_labels(family, model, messages):
    parts = [
        [family.picture(0), "what?"],
        [family.picture(1), "and", family.picture(2), "which of these two is larger?"],
    ]
    inputs = family.encode(*parts[:messages])
    labels = labels_of(inputs, model)
    with torch.no_grad(), enable(model, POLICY):
        output = model(**inputs, labels=labels)
    kept = labels[:, 1:] != -100
    chosen = (
        output.logits[:, :-1][kept]
        .log_softmax(-1)
        .take_along_dim(labels[:, 1:][kept][:, None], dim=1)
    )
    assert len(chosen) > 5
    assert abs(float(output.loss) + float(chosen.mean())) < 1e-5, "another mean"


@pytest.mark.parametrize(
    ("place", "shift"), [("behind", 1), ("inside", 0)], ids=["behind a picture", "of a picture"]
)
def test_a_label_that_a_dropped_token_predicts_is_refused(family, model, place, shift):
    inputs = family.encode([family.picture(0), "what?"], [family.picture(1), "what is it?"])
    labels = labels_of(inputs, model)
    image = inputs["input_ids"] == model.config.image_token_id
    for row in range(2):
        labels[row, int(image[row].nonzero().max()) + shift] = 5
    with torch.no_grad(), enable(model, POLICY) as pruning:
        with pytest.raises(UnsupportedError, match=r"without a prediction: 2,.*-100") as caught:
            model(**inputs, labels=labels)
        assert "\n" not in str(caught.value)
        model(**inputs)
        assert pruning.records[0].reason is None
    with torch.no_grad(), enable(model, "layer=2,keep=1.0"):
        assert model(**inputs, labels=labels).loss.isfinite(), "nothing is dropped here"


def test_a_label_that_padding_predicts_is_refused(family, model):
    inputs = family.encode([family.picture(0), "what?"], ["none"])
    labels = labels_of(inputs, model)
    start = int(inputs["attention_mask"][1].argmax())
    assert start > 0
    labels[1, start] = 5
    with torch.no_grad(), enable(model, POLICY):
        with pytest.raises(UnsupportedError, match="labels without a prediction: 1,"):
            model(**inputs, labels=labels)
        labels[1, start] = -100
        assert model(**inputs, labels=labels).loss.isfinite()


def test_grids_of_pictures_come_from_the_processor(family, model):
    messages = [
        [family.picture(0), "what?"],
        [family.picture(1), "and", family.picture(2), "which is larger?"],
    ]
    inputs = family.encode(*messages)
    with torch.no_grad(), enable(model, POLICY) as pruning:
        model(**inputs)
        spans = [span for record in pruning.records for span in record.spans]
        run(model, inputs, steps=2)
        assert spans == [span for record in pruning.records for span in record.spans]
    if "image_grid_thw" in inputs:
        assert [span.grid for span in spans] == [
            (rows // 2, columns // 2) for _, rows, columns in inputs["image_grid_thw"].tolist()
        ]
        assert all(span.grid[0] * span.grid[1] == span.stop - span.start for span in spans)
    else:
        assert {span.grid for span in spans} == {None}


@pytest.mark.parametrize("method", ["released", "set-entropy"])
def test_separators_between_the_rows_of_a_picture_stay(family, model, method):
    messages = [[family.picture(0), "what?"], [family.picture(1), family.picture(2), "longer one"]]
    batch = family.encode(*messages)
    with enable(model, f"layer=2,keep=3,method={method}") as pruning, torch.no_grad():
        in_rows(pruning, 3)
        together, records = model(**batch).logits, pruning.records
        for i, message in enumerate(messages):
            alone = model(**family.encode(message)).logits[0]
            assert records[i] == pruning.records[0]
            stays = torch.ones(len(alone), dtype=torch.bool)
            for span in records[i].spans:
                offsets = torch.arange(span.stop - span.start)
                stays[span.start : span.stop] = offsets % 4 == 3
                assert all(offset % 4 < 3 for offset in span.kept)
                stays[[span.start + offset for offset in span.kept]] = True
            assert torch.equal(~alone.isnan().any(dim=1), stays)
            assert_close(together[i, -len(alone) :][stays], alone[stays], f"prompt {i}")


def test_session_answers_requests_of_different_lengths(lab):
    from ep_core import PruningPolicy
    from ep_core.backend import Request

    family = lab("qwen-gqa")
    requests = [Request((family.picture(0), "what?"), 2), Request(("text", family.picture(1)), 5)]
    backend = TransformersBackend()
    with backend.open(family.path, PruningPolicy.parse(POLICY), dtype="float32") as session:
        together = session.generate(requests)
        alone = [session.generate([request])[0] for request in requests]
    for a, b in zip(together, alone, strict=True):
        assert (a.output_ids, a.text, a.spans, a.prompt_tokens, a.reason) == (
            b.output_ids,
            b.text,
            b.spans,
            b.prompt_tokens,
            b.reason,
        )
    assert len(together[0].output_ids) <= 2
