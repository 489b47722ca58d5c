"""What cannot be pruned is refused by name, or runs unpruned and says why."""

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlavaForConditionalGeneration, StaticCache
from transformers.cache_utils import DynamicLayer

from ep_backends.transformers import enable
from ep_backends.transformers.backend import TransformersBackend
from ep_core import BudgetError, PluginError, PolicyError, PruningPolicy, UnsupportedError

from .compiling import WAYS_TO_COMPILE

POLICY = "layer=2,keep=0.3"


@pytest.fixture(scope="module")
def qwen(lab):
    return lab("qwen-gqa")


@pytest.fixture(scope="module")
def qwen_model(qwen):
    return qwen.model()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"prompt_lookup_num_tokens": 3}, "assisted generation"),
        ({"assistant_early_exit": 1}, "assisted generation"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive search"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"cache_implementation": "offloaded"}, "cache_implementation='offloaded'"),
        ({"prefill_chunk_size": 8}, "prefill_chunk_size"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"output_attentions": True}, "output_attentions"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"custom_generate": lambda *args, **kwargs: None}, "custom_generate"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_generate_options_are_refused_by_name(qwen, qwen_model, options, named):
    inputs = qwen.encode([qwen.picture(0), "what?"])
    with enable(qwen_model, POLICY), pytest.raises(UnsupportedError) as caught:
        qwen_model.generate(**inputs, max_new_tokens=2, **options)
    assert named in str(caught.value)
    assert "disable pruning" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_assistant_model_is_refused(qwen, qwen_model):
    inputs = qwen.encode([qwen.picture(0), "what?"])
    with enable(qwen_model, POLICY), pytest.raises(UnsupportedError, match="assisted generation"):
        qwen_model.generate(**inputs, max_new_tokens=2, assistant_model=qwen_model)


def test_refused_options_in_a_generation_config_are_seen_too(qwen, qwen_model):
    from transformers import GenerationConfig

    inputs = qwen.encode([qwen.picture(0), "what?"])
    config = GenerationConfig(max_new_tokens=2, prompt_lookup_num_tokens=3)
    with enable(qwen_model, POLICY), pytest.raises(UnsupportedError, match="assisted generation"):
        qwen_model.generate(generation_config=config, **inputs)


def test_a_static_cache_object_is_refused(qwen, qwen_model):
    inputs = qwen.encode([qwen.picture(0), "what?"])
    cache = StaticCache(config=qwen_model.get_decoder().config, max_cache_len=200)
    with enable(qwen_model, POLICY), pytest.raises(UnsupportedError, match="StaticCache"):
        qwen_model(**inputs, past_key_values=cache)


@pytest.mark.parametrize("option", ["output_attentions", "output_hidden_states"])
@pytest.mark.parametrize("place", ["argument", "config"])
def test_outputs_by_layer_are_refused_in_a_forward(qwen, option, place):
    model = qwen.model(attn_implementation="eager")
    inputs = qwen.encode([qwen.picture(0), "what?"])
    arguments = {option: True} if place == "argument" else {}
    with enable(model, POLICY):
        if place == "config":
            setattr(model.base_model.config, option, True)
        with pytest.raises(UnsupportedError, match=option):
            model(**inputs, **arguments)


def test_a_prepared_mask_is_refused(qwen, qwen_model):
    inputs = qwen.encode([qwen.picture(0), "what?"])
    tokens = inputs["input_ids"].shape[1]
    inputs["attention_mask"] = torch.zeros(1, 1, tokens, tokens)
    with enable(qwen_model, POLICY), pytest.raises(UnsupportedError, match="attention_mask"):
        qwen_model(**inputs)


def test_two_policies_at_once_are_refused(qwen_model):
    with enable(qwen_model, POLICY), pytest.raises(UnsupportedError, match="already on with"):
        enable(qwen_model, "layer=1,keep=4")


@pytest.mark.parametrize(
    ("policy", "error", "message"),
    [
        ("layer=4,keep=3", PolicyError, "allowed are 1 to 3"),
        ("layer=2,keep=3,method=nonsense", PluginError, "set-entropy"),
        ("layer=2,keep=0", BudgetError, "keep=128"),
        ("layer=two,keep=3", PolicyError, "layer=two"),
    ],
)
def test_policies_that_do_not_fit_leave_the_model_alone(qwen_model, policy, error, message):
    before = sorted(vars(qwen_model))
    with pytest.raises(error) as caught:
        enable(qwen_model, policy)
    assert message in str(caught.value)
    assert sorted(vars(qwen_model)) == before


def test_an_impossible_budget_is_an_error_that_says_what_is_possible(qwen, qwen_model):
    inputs = qwen.encode([qwen.picture(0), "what?"])  # 12 visual tokens
    with enable(qwen_model, "layer=2,keep=128"), pytest.raises(BudgetError, match="keep=12"):
        qwen_model.generate(**inputs, max_new_tokens=2)
    with enable(qwen_model, "layer=2,keep=128,min_tokens=12") as pruning:
        qwen_model.generate(**inputs, max_new_tokens=2)
        assert pruning.records[0].reason == "the budget keeps every token"


def test_an_unproven_attention_implementation_is_refused(lab):
    model = lab("llava").model(attn_implementation="flex_attention")
    with pytest.raises(UnsupportedError, match=r"flex_attention.*sdpa, eager"):
        enable(model, POLICY)


def test_a_model_without_an_adapter_is_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    with pytest.raises(UnsupportedError, match=r"'llama'.*internvl, llava, qwen2_5_vl, qwen2_vl"):
        enable(LlamaForCausalLM(config), POLICY)


def test_sliding_window_layers_are_refused(qwen):
    model = qwen.model()
    model.get_decoder().config.layer_types = ["full_attention"] * 3 + ["sliding_attention"]
    with pytest.raises(UnsupportedError, match="sliding_attention"):
        enable(model, POLICY)


def prefilled(model: Any, inputs: dict[str, torch.Tensor]) -> DynamicCache:
    cache = DynamicCache(config=model.get_decoder().config)
    with torch.no_grad():
        model(**inputs, past_key_values=cache, use_cache=True)
    return cache


def test_a_cropped_cache_is_refused(qwen, qwen_model):
    inputs = qwen.encode([qwen.picture(0), "what?"])
    with enable(qwen_model, POLICY):
        cache = prefilled(qwen_model, inputs)
        with pytest.raises(UnsupportedError, match="cannot be cropped"):
            cache.crop(-1)
        with pytest.raises(UnsupportedError, match="was cropped"):
            qwen_model(input_ids=torch.tensor([[5]]), past_key_values=cache)


@pytest.mark.parametrize("other", ["layer=1,keep=0.3", "layer=2,keep=0.4"])
def test_a_cache_of_another_policy_is_refused(qwen, qwen_model, other):
    inputs = qwen.encode([qwen.picture(0), "what?"])
    with enable(qwen_model, POLICY):
        cache = prefilled(qwen_model, inputs)
    with enable(qwen_model, other), pytest.raises(UnsupportedError, match="another policy"):
        qwen_model(input_ids=torch.tensor([[5]]), past_key_values=cache)


def test_a_pruned_cache_is_not_continued_by_the_decoder_alone(qwen, qwen_model):
    inputs = qwen.encode([qwen.picture(0), "what?"])
    with enable(qwen_model, POLICY):
        cache = prefilled(qwen_model, inputs)
        with pytest.raises(UnsupportedError, match="calling the model"):
            qwen_model.get_decoder()(input_ids=torch.tensor([[5]]), past_key_values=cache)


@pytest.mark.parametrize("tail", [[5], [5, 6, 7]])
def test_a_pruned_cache_is_refused_once_pruning_is_off(qwen, qwen_model, tail):
    inputs = qwen.encode([qwen.picture(0), "what?"])
    with enable(qwen_model, POLICY):
        cache = prefilled(qwen_model, inputs)
    with torch.no_grad(), pytest.raises(UnsupportedError, match="pruned prompt, and pruning is of"):
        qwen_model(input_ids=torch.tensor([tail]), past_key_values=cache)


def test_a_users_cache_keeps_its_layers(lab):
    """Layer K of the list is another one; the layer that was there is as it was."""
    llava = lab("llava")
    model = llava.model()
    cache = DynamicCache(config=model.get_decoder().config)
    text = llava.encode(["hello"])
    with torch.no_grad():
        model(**text, past_key_values=cache)
    layers, keys = list(cache.layers), cache.layers[2].keys
    inputs = llava.encode([llava.picture(0), "what?"])
    inputs["attention_mask"] = torch.cat([text["attention_mask"], inputs["attention_mask"]], 1)
    with enable(model, POLICY), torch.no_grad():
        model(**inputs, past_key_values=cache)
    assert {type(layer) for layer in layers} == {DynamicLayer}
    assert torch.equal(layers[2].keys, keys)


def emptied(cache):
    for layer in cache.layers:  # Cache.reset keeps the length of a dynamic layer up to 5.17
        layer.keys = layer.values = None
        layer.is_initialized = False
    return cache


def test_a_pruned_cache_that_is_emptied_is_like_a_new_one(qwen, qwen_model):
    inputs = qwen.encode([qwen.picture(0), "what?"])
    tail = torch.tensor([[5]])
    answers = []
    with torch.no_grad():
        with enable(qwen_model, POLICY):
            used = prefilled(qwen_model, inputs)
        for cache in (DynamicCache(config=qwen_model.get_decoder().config), emptied(used)):
            first = qwen_model(**inputs, past_key_values=cache).logits
            cache.crop(-1)
            answers.append((first, qwen_model(input_ids=tail, past_key_values=cache).logits))
    assert torch.equal(answers[0][0], answers[1][0])
    assert torch.equal(answers[0][1], answers[1][1])


def test_a_reset_cache_starts_anew(qwen, qwen_model):
    inputs = qwen.encode([qwen.picture(0), "what?"])
    with enable(qwen_model, POLICY), torch.no_grad():
        cache = prefilled(qwen_model, inputs)
        fresh = qwen_model(**inputs).logits[0, -1]
        again = qwen_model(**inputs, past_key_values=emptied(cache), use_cache=True).logits[0, -1]
    assert torch.equal(fresh, again)


def test_a_prompt_that_ends_inside_a_picture_runs_unpruned(qwen, qwen_model):
    inputs = qwen.encode([qwen.picture(0), "what?"])
    image = qwen_model.config.image_token_id
    end = int((inputs["input_ids"][0] == image).nonzero().max()) + 1
    for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
        inputs[key] = inputs[key][:, :end]
    with torch.no_grad():
        plain = qwen_model(**inputs).logits
        with enable(qwen_model, POLICY) as pruning:
            pruned = qwen_model(**inputs).logits
    assert torch.equal(plain, pruned)
    assert "ends inside a picture" in str(pruning.records[0].reason)


def test_embeddings_without_token_ids_run_unpruned(qwen_model):
    embeddings = qwen_model.get_input_embeddings()(torch.arange(9)[None])
    with torch.no_grad():
        plain = qwen_model(inputs_embeds=embeddings).logits
        with enable(qwen_model, POLICY) as pruning:
            pruned = qwen_model(inputs_embeds=embeddings).logits
    assert torch.equal(plain, pruned)
    assert "inputs_embeds" in str(pruning.records[0].reason)


def test_video_tokens_run_unpruned(qwen, qwen_model):
    ids = qwen.encode(["a text"])["input_ids"]
    ids[0, 3] = qwen_model.config.video_token_id
    with torch.no_grad():
        plain = qwen_model(input_ids=ids).logits
        with enable(qwen_model, POLICY) as pruning:
            pruned = qwen_model(input_ids=ids).logits
    assert torch.equal(plain, pruned)
    assert "video" in str(pruning.records[0].reason)


def test_internvl_pictures_that_touch_run_unpruned(lab):
    internvl = lab("internvl")
    model = internvl.model()
    inputs = internvl.encode([internvl.picture(1), internvl.picture(4), "what?"])
    image = inputs["input_ids"][0] == model.config.image_token_id
    first, second = image.nonzero()[[15, 16], 0].tolist()
    apart = [*range(first + 1), *range(second, len(image))]  # without </img>, a newline and <img>
    for key in ("input_ids", "attention_mask"):
        inputs[key] = inputs[key][:, apart]
    with torch.no_grad():
        plain = model(**inputs).logits
        with enable(model, POLICY) as pruning:
            pruned = model(**inputs).logits
    assert torch.equal(plain, pruned)
    assert "32 image tokens is no picture" in str(pruning.records[0].reason)


def test_a_missing_device_or_dtype_is_one_line(qwen):
    backend, policy = TransformersBackend(), PruningPolicy.parse(POLICY)
    if not torch.cuda.is_available():
        with pytest.raises(UnsupportedError, match="use cpu"):
            backend.open(qwen.path, policy, device="cuda")
    with pytest.raises(UnsupportedError, match="float32, bfloat16, float16"):
        backend.open(qwen.path, policy, dtype="int8")


def test_a_checkpoint_whose_pictures_cannot_be_found_is_refused_at_once():
    from transformers import LlamaConfig, LlavaConfig, PixtralVisionConfig

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=PixtralVisionConfig(**sizes, **heads, image_size=28, patch_size=14),
        text_config=LlamaConfig(**sizes, **heads, vocab_size=64),
    )
    with pytest.raises(UnsupportedError, match="pixtral tower is not supported"):
        enable(LlavaForConditionalGeneration(config), POLICY)


def test_training_is_refused(qwen):
    model = qwen.model().train()
    inputs = qwen.encode([qwen.picture(0), "what?"])
    with enable(model, POLICY):
        with pytest.raises(UnsupportedError, match="training"):
            model(**inputs)
        with torch.no_grad():
            model(**inputs)


def test_packed_prompts_are_refused(lab):
    llava = lab("llava")
    model = llava.model()
    ids = llava.encode([llava.picture(0), "what?"])["input_ids"]
    tokens = ids.shape[1]
    packed = torch.cat([torch.arange(tokens), torch.arange(tokens)])[None]
    with enable(model, POLICY), pytest.raises(UnsupportedError, match="packed position_ids"):
        model(input_ids=ids.repeat(1, 2), position_ids=packed, use_cache=False)


def test_continuous_batching_is_refused(qwen_model):
    with enable(qwen_model, POLICY):
        with pytest.raises(UnsupportedError, match="continuous batching"):
            qwen_model.generate_batch([[1, 2, 3]])
        with pytest.raises(UnsupportedError, match="continuous batching"):
            qwen_model.init_continuous_batching()


def test_a_flops_budget_without_a_cache_is_refused(qwen, qwen_model):
    inputs = qwen.encode([qwen.picture(0), "what?"])
    with enable(qwen_model, "layer=2,flops=0.05"):
        qwen_model.generate(**inputs, max_new_tokens=2)
        with pytest.raises(UnsupportedError, match="use_cache=False under a flops budget"):
            qwen_model.generate(**inputs, max_new_tokens=2, use_cache=False)


def test_an_enabled_model_is_not_copied_or_pickled(qwen, tmp_path):
    model = qwen.model()
    with enable(model, POLICY):
        with pytest.raises(UnsupportedError, match="copied or pickled"):
            copy.deepcopy(model)
        with pytest.raises(UnsupportedError, match="copied or pickled"):
            torch.save(model, tmp_path / "model.pt")
    copy.deepcopy(model)


def test_a_wrapper_is_refused_with_what_to_enable(qwen_model):
    with pytest.raises(UnsupportedError, match="get_base_model"):
        enable(torch.nn.Sequential(qwen_model), POLICY)


def test_a_second_policy_on_the_same_decoder_is_refused(qwen_model):
    with enable(qwen_model, POLICY), pytest.raises(UnsupportedError, match="already on with"):
        enable(qwen_model.base_model, POLICY)


class Wrapped(torch.nn.Module):
    """What a library puts in the place of a module, with the module inside."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, *args, **kwargs):
        return self.inside(*args, **kwargs)


class Adapter(Wrapped):
    """An adapter that stands in the place of a linear layer and adds to its output."""

    def forward(self, x):
        return self.inside(x) + 0.5 * self.inside(x).roll(7, dims=-1)


def replace_at(root, path, make):
    parent, _, name = path.rpartition(".")
    owner = root.get_submodule(parent)
    setattr(owner, name, make(owner.get_submodule(name)))


@pytest.mark.parametrize("make", [Wrapped, copy.copy], ids=["wrapped", "another"])
@pytest.mark.parametrize(
    "path",
    [
        "model",
        "model.language_model",
        "model.language_model.layers.1",
        "model.language_model.layers.1.self_attn",
        "model.language_model.layers.1.self_attn.q_proj",
        "model.language_model.layers.2",
        "model.language_model.layers.3",
    ],
)
def test_a_module_that_is_replaced_after_enable_is_noticed(qwen, path, make):
    model = qwen.model()
    inputs = qwen.encode([qwen.picture(0), "what?"])
    with enable(model, POLICY):
        model.generate(**inputs, max_new_tokens=2)
        if make is copy.copy:  # without hooks
            fresh = qwen.model().get_submodule(path)
            replace_at(model, path, lambda _: fresh)
        else:
            replace_at(model, path, make)
        with pytest.raises(UnsupportedError, match="replaced after pruning was enabled") as caught:
            model(**inputs)
        with pytest.raises(UnsupportedError, match=r"disable pruning and enable it again"):
            model.generate(**inputs, max_new_tokens=2)
    named = path.removeprefix("model").removeprefix(".language_model").removeprefix(".")
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_adapter_is_noticed_when_it_comes_and_when_it_goes(qwen):
    """Of a method that reads queries; others read nothing of what an adapter replaces."""
    model = qwen.model()
    inputs = qwen.encode([qwen.picture(0), "what?"])
    projections = [f"model.language_model.layers.{i}.self_attn.q_proj" for i in range(4)]
    with torch.no_grad():
        with enable(model, "layer=2,keep=4,method=set-entropy") as pruning:
            before = model(**inputs).logits
            for path in projections:
                replace_at(model, path, Adapter)
            adapted, records = model(**inputs).logits, pruning.records
        with enable(model, "layer=2,keep=4,method=set-entropy") as pruning:
            assert torch.equal(model(**inputs).logits.nan_to_num(), adapted.nan_to_num())
            assert pruning.records == records
        with enable(model, POLICY):
            model(**inputs)
            for path in projections:
                replace_at(model, path, lambda adapter: adapter.inside)
            with pytest.raises(UnsupportedError, match=r"layers\.1\.self_attn\.q_proj was replac"):
                model(**inputs)
    assert not torch.equal(before.nan_to_num(), adapted.nan_to_num())


@pytest.mark.parametrize(("layer", "hooks"), [(2, "_forward_pre_hooks"), (3, "_forward_hooks")])
def test_a_layer_that_runs_without_its_hook_is_noticed(qwen, layer, hooks):
    """A library may call a layer by another way than as a module."""
    model = qwen.model()
    with torch.no_grad(), enable(model, POLICY):
        getattr(model.get_decoder().layers[layer], hooks).popitem()
        with pytest.raises(UnsupportedError, match=r"only [12] of [23] hooks ran"):
            model(**qwen.encode([qwen.picture(0), "what?"]))


def test_a_failing_enable_leaves_nothing_behind(qwen):
    model = qwen.model()
    del model.get_decoder().layers[1].self_attn.q_proj
    with pytest.raises(AttributeError):
        enable(model, POLICY)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert "generate" not in vars(model)


def test_a_sliding_window_without_layer_types_is_refused():
    from transformers import CLIPVisionConfig, LlavaConfig, MistralConfig

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, **heads, image_size=28, patch_size=14),
        text_config=MistralConfig(**sizes, **heads, num_key_value_heads=2, vocab_size=64),
    )
    with pytest.raises(UnsupportedError, match="sliding_attention"):
        enable(LlavaForConditionalGeneration(config), "layer=1,keep=2")


@pytest.mark.parametrize("part", ["whole", "half", "from the start to its half"])
def test_a_masked_picture_is_padding_and_a_half_masked_one_runs_unpruned(lab, part):
    llava = lab("llava")
    model = llava.model()
    inputs = llava.encode([llava.picture(0), "and", llava.picture(1), "what is it?"])
    columns = (inputs["input_ids"][0] == model.config.image_token_index).nonzero()[:, 0]
    hidden = {"whole": columns[:64], "half": columns[:32]}
    inputs["attention_mask"][0, hidden.get(part, slice(0, int(columns[32])))] = 0
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp_min(0)
    with torch.no_grad():
        plain = model(**inputs).logits[0, -1]
        with enable(model, "layer=2,keep=5") as pruning:
            pruned = model(**inputs).logits[0, -1]
            (record,) = pruning.records
            inputs["pixel_values"][0] += 1  # the hidden picture must not matter
            again = model(**inputs).logits[0, -1]
    if part != "whole":
        assert record.reason == "the attention mask hides a part of a picture"
        assert [len(span.kept) for span in record.spans] == [64], "the other picture"
        assert torch.equal(plain, pruned)
    else:
        assert [len(span.kept) for span in record.spans] == [5]
        assert float((pruned - again).abs().max()) < 1e-5


def test_a_row_that_is_all_padding_passes(lab):
    llava = lab("llava")
    model = llava.model()
    inputs = llava.encode([llava.picture(0), "what?"], [llava.picture(1), "what?"])
    inputs["attention_mask"][1] = 0
    with torch.no_grad(), enable(model, "layer=2,keep=5") as pruning:
        together = model(**inputs).logits[0, -1]
        alone = model(**llava.encode([llava.picture(0), "what?"])).logits[0, -1]
        model(**inputs)
        reasons = [record.reason for record in pruning.records]
    assert reasons == [None, "the prompt has no visual tokens"]
    assert float((together - alone).abs().max()) < 1e-4


def test_an_interrupted_pass_does_not_reach_the_next(qwen, qwen_model):
    inputs = qwen.encode([qwen.picture(0), "what?"])

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with enable(qwen_model, POLICY), torch.no_grad():
        handle = qwen_model.get_decoder().layers[-1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            qwen_model(**inputs)
        handle.remove()
        embeddings = qwen_model.get_input_embeddings()(inputs["input_ids"])
        states = qwen_model.get_decoder()(inputs_embeds=embeddings).last_hidden_state
    assert not states.isnan().any()


def test_threads_do_not_mix(lab):
    llava = lab("llava")
    model = llava.model()
    prompts = [llava.encode([llava.picture(i), f"question {i}"]) for i in range(8)]

    def logits(inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Any]:
        with torch.no_grad():
            return model(**inputs).logits[0, -1], pruning.records

    with enable(model, POLICY) as pruning:
        expected = [logits(inputs) for inputs in prompts]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(logits, prompts * 4))
        seen = pruning.counters.requests_pruned
    for i, (answer, records) in enumerate(found):
        assert torch.equal(answer, expected[i % 8][0]), f"call {i} differs under threads"
        assert records == expected[i % 8][1]
    assert seen == 8 + 32


@pytest.mark.parametrize("compiled", WAYS_TO_COMPILE)
def test_a_model_compiled_before_enable_is_refused(lab, compiled):
    model = lab("llava").model()
    compiled(model)
    with pytest.raises(UnsupportedError, match=r"compiled.* before torch\.compile"):
        enable(model, POLICY)


def test_a_compiled_vision_tower_is_no_obstacle(lab):
    model = lab("llava").model()
    model.model.vision_tower.compile(backend="eager")
    enable(model, POLICY).disable()
