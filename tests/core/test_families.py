"""Families: where the pictures are, the decoder's facts, and what every family must state."""

import json
import math
from importlib.metadata import entry_points

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ep_adapters import internvl, llava, qwen2_5_vl
from ep_adapters.decoder import decoder_shape, read_decoder, text_config
from ep_core.budget import DecoderShape
from ep_core.errors import UnsupportedError
from ep_core.family import Placeholder
from ep_core.plan import Run
from ep_core.plugins import registry

IMAGE, VIDEO, TEXT = 32000, 32001, 5
LLAVA_TEXT = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
}


def placed(start, stop):
    return Placeholder(Run(start, stop))


def llava_config(*, tower="clip_vision_model", strategy=None, image=28, patch=14, **more):
    config = {
        "model_type": "llava",
        "image_token_id": IMAGE,
        "text_config": LLAVA_TEXT,
        "vision_config": {"model_type": tower, "image_size": image, "patch_size": patch},
    }
    if strategy:
        config["vision_feature_select_strategy"] = strategy
    return config | more


@pytest.mark.parametrize(
    ("tower", "strategy", "image", "patch", "tokens"),
    [
        ("clip_vision_model", None, 336, 14, 576),
        ("clip_vision_model", "default", 336, 14, 576),
        ("clip_vision_model", "full", 336, 14, 577),
        ("siglip_vision_model", "full", 384, 16, 576),  # SigLIP has no class token
        ("siglip_vision_model", "default", 384, 16, 576),
        ("clip_vision_model", "default", 224, 14, 256),
        ("siglip_vision_model", "full", 384, 14, 729),  # 384 / 14 is no whole number
    ],
)
def test_llava_tokens_of_one_picture(tower, strategy, image, patch, tokens):
    config = llava_config(tower=tower, strategy=strategy, image=image, patch=patch)
    assert llava.tokens_per_picture(config) == tokens
    assert llava.find(config, [TEXT] + [IMAGE] * tokens) == [placed(1, 1 + tokens)]


@pytest.mark.parametrize("strategy", ["default", "full"])
def test_llava_adjacent_pictures_are_told_apart(strategy):
    size = 4 if strategy == "default" else 5
    ids = [TEXT, *[IMAGE] * (2 * size), TEXT, TEXT, *[IMAGE] * size, *[IMAGE] * size, TEXT]
    spans = llava.find(llava_config(strategy=strategy), ids)
    starts = [1, 1 + size, 3 + 2 * size, 3 + 3 * size]
    assert spans == [placed(start, start + size) for start in starts]


@pytest.mark.parametrize("run", [1, 3, 5, 7])
def test_llava_a_run_that_is_no_multiple_is_refused(run):
    with pytest.raises(UnsupportedError, match=f"a run of {run} image tokens is no multiple of 4"):
        llava.find(llava_config(), [IMAGE] * 4 + [TEXT] + [IMAGE] * run)


def test_llava_a_prompt_without_pictures_has_no_spans():
    assert llava.find(llava_config(), [TEXT, TEXT]) == []
    assert llava.find(llava_config(), []) == []


def test_llava_a_tower_with_grids_by_picture_is_refused():
    with pytest.raises(UnsupportedError, match="pixtral tower is not supported") as caught:
        llava.find(llava_config(tower="pixtral"), [IMAGE] * 4)
    assert "clip_vision_model, siglip_vision_model" in str(caught.value)


def test_llava_the_image_token_has_two_names_in_config():
    config = llava_config()
    del config["image_token_id"]
    with pytest.raises(UnsupportedError, match="names no image token"):
        llava.find(config, [7] * 4)
    assert llava.find(config | {"image_token_index": 7}, [7] * 4) == [placed(0, 4)]


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((336, 336), (0, 0, 336, 336)),
        ((1000, 600), (200, 0, 800, 600)),
        ((600, 1000), (0, 200, 600, 800)),
        ((101, 100), (0.5, 0, 100.5, 100)),
    ],
)
def test_llava_the_grid_covers_the_centre_of_the_picture(size, box):
    grid = llava.patch_grid(llava_config(), 576, size)
    assert (grid.rows, grid.columns) == (24, 24)
    assert grid.box == box


def test_llava_with_a_class_token_has_no_grid():
    with pytest.raises(UnsupportedError, match="577 tokens"):
        llava.patch_grid(llava_config(strategy="full"), 577, (336, 336))


QWEN = {
    "model_type": "qwen2_5_vl",
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": 1,
    "vision_end_token_id": 2,
    "num_hidden_layers": 28,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}


def test_qwen_each_picture_between_its_vision_tokens_is_a_span():
    ids = [TEXT, 1, *[IMAGE] * 6, 2, 1, *[IMAGE] * 9, 2, TEXT, 1, IMAGE, 2]
    assert qwen2_5_vl.find(QWEN, ids) == [
        placed(2, 8),
        placed(10, 19),
        placed(22, 23),
    ]


def test_qwen_a_prompt_without_pictures_has_no_spans():
    assert qwen2_5_vl.find(QWEN, [TEXT, 1, 2]) == []


def test_qwen_video_is_refused():
    with pytest.raises(UnsupportedError, match="video"):
        qwen2_5_vl.find(QWEN, [1, IMAGE, 2, 1, VIDEO, VIDEO, 2])


def resized_grid(width, height, cell=28, least=4 * 28 * 28, most=1280 * 28 * 28):
    """Rows and columns after Qwen's documented resizing: sides are multiples of a cell."""
    rows, columns = round(height / cell), round(width / cell)
    area = rows * columns * cell**2
    if area > most:
        factor = math.sqrt(height * width / most)
        rows, columns = (math.floor(side / factor / cell) for side in (height, width))
    elif area < least:
        factor = math.sqrt(least / (height * width))
        rows, columns = (math.ceil(side * factor / cell) for side in (height, width))
    return rows, columns


@given(st.integers(112, 3000), st.integers(112, 3000))
def test_qwen_the_grid_is_that_of_the_resized_picture(width, height):
    assume(1 / 4 < width / height < 4)
    rows, columns = resized_grid(width, height)
    grid = qwen2_5_vl.patch_grid(QWEN, rows * columns, (width, height))
    assert (grid.rows, grid.columns) == (rows, columns)
    assert grid.box == (0, 0, width, height)


@given(st.integers(1, 400), st.integers(1, 3000), st.integers(1, 3000))
def test_qwen_any_grid_has_a_cell_for_each_token(tokens, width, height):
    grid = qwen2_5_vl.patch_grid(QWEN, tokens, (width, height))
    assert grid.rows * grid.columns == tokens


# config.json of Qwen/Qwen2-VL-2B-Instruct, without settings that no family reads
PUBLISHED_QWEN2_VL = """{
  "architectures": ["Qwen2VLForConditionalGeneration"],
  "hidden_size": 1536,
  "image_token_id": 151655,
  "intermediate_size": 8960,
  "model_type": "qwen2_vl",
  "num_attention_heads": 12,
  "num_hidden_layers": 28,
  "num_key_value_heads": 2,
  "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
  "rope_theta": 1000000.0,
  "video_token_id": 151656,
  "vision_config": {"hidden_size": 1536, "in_chans": 3, "model_type": "qwen2_vl"},
  "vision_end_token_id": 151653,
  "vision_start_token_id": 151652,
  "vocab_size": 151936
}"""


def nested(config):
    """The same config.json in the layout of newer saves."""
    outside = ("model_type", "image_token_id", "video_token_id", "vision_config")
    text = {key: value for key, value in config.items() if key not in outside}
    return {key: config[key] for key in outside} | {
        "text_config": text | {"model_type": "qwen2_vl_text"}
    }


@pytest.mark.parametrize("layout", [dict, nested])
def test_the_published_qwen2_vl_checkpoint_in_either_layout(layout):
    config = layout(json.loads(PUBLISHED_QWEN2_VL))
    family = registry().family("qwen2_vl")
    assert family.decoder(config).shape == DecoderShape(
        layers=28, hidden_size=1536, intermediate_size=8960, heads=12, kv_heads=2, head_dim=128
    )
    assert family.decoder(config).query_norm is False
    picture = [151652, *[151655] * 4, 151653]
    spans = [placed(2, 6), placed(8, 12)]
    assert family.find(config, [TEXT, *picture, *picture, TEXT]) == spans
    with pytest.raises(UnsupportedError, match="video"):
        family.find(config, [*picture, 151652, 151656, 151653])


# config.json of OpenGVLab/InternVL3-1B-hf, without settings that no family reads
PUBLISHED_INTERNVL = """{
  "architectures": ["InternVLForConditionalGeneration"],
  "downsample_ratio": 0.5,
  "image_seq_length": 256,
  "image_token_id": 151667,
  "model_type": "internvl",
  "text_config": {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2
  },
  "vision_config": {"image_size": [448, 448], "patch_size": [14, 14]}
}"""
INTERNVL = json.loads(PUBLISHED_INTERNVL) | {"image_seq_length": 4, "image_token_id": IMAGE}
OPEN, CLOSE = 3, 4


def internvl_picture(tiles):
    """What the processor writes for a picture; several tiles bring a thumbnail."""
    return [OPEN, *[IMAGE] * (4 * (tiles + (tiles > 1))), CLOSE]


def test_internvl_a_picture_with_all_its_tiles_is_one_span():
    ids = [TEXT, *internvl_picture(1), *internvl_picture(4), TEXT, *internvl_picture(2)]
    assert internvl.find(INTERNVL, ids) == [
        placed(2, 6),
        placed(8, 28),
        placed(31, 43),
    ]
    assert internvl.find(INTERNVL, [TEXT, OPEN, CLOSE]) == []


@pytest.mark.parametrize("run", [1, 3, 5, 8, 13])
def test_internvl_a_run_that_is_no_picture_is_refused(run):
    """Eight tokens are two tiles, and so two pictures that touch."""
    with pytest.raises(UnsupportedError, match=f"a run of {run} image tokens is no picture"):
        internvl.find(INTERNVL, [*internvl_picture(1), TEXT, *[IMAGE] * run, TEXT])


def test_internvl_the_tokens_of_a_tile_must_be_known():
    config = {key: INTERNVL[key] for key in INTERNVL if key != "image_seq_length"}
    with pytest.raises(UnsupportedError, match="image_seq_length"):
        internvl.find(config, internvl_picture(1))


@pytest.mark.parametrize("size", [(448, 448), (1000, 600), (101, 900)])
def test_internvl_the_grid_of_one_tile_covers_the_whole_picture(size):
    grid = internvl.patch_grid(json.loads(PUBLISHED_INTERNVL), 256, size)
    assert (grid.rows, grid.columns, grid.box) == (16, 16, (0, 0, *size))


def test_internvl_several_tiles_have_no_grid():
    config = json.loads(PUBLISHED_INTERNVL)
    with pytest.raises(UnsupportedError, match=r"768 tokens form no grid: .* thumbnail"):
        internvl.patch_grid(config, 768, (896, 448))


@pytest.mark.parametrize(("decoder", "norm"), [("qwen2", False), ("qwen3", True), ("llama", False)])
def test_internvl_facts_of_the_decoder_come_from_the_decoder(decoder, norm):
    config = json.loads(PUBLISHED_INTERNVL)
    config["text_config"] |= {"model_type": decoder}
    family = registry().family("internvl")
    assert family.decoder(config).query_norm is norm
    assert family.decoder(config).shape == DecoderShape(
        layers=24, hidden_size=896, intermediate_size=4864, heads=14, kv_heads=2, head_dim=64
    )


@pytest.mark.parametrize("layout", ["nested", "flat"])
@pytest.mark.parametrize(
    ("given_", "kv_heads", "head_dim"),
    [
        ({}, 14, 256),
        ({"num_key_value_heads": 2}, 2, 256),
        ({"num_key_value_heads": None, "head_dim": None}, 14, 256),
        ({"head_dim": 64}, 14, 64),
        ({"num_key_value_heads": 7, "head_dim": 96}, 7, 96),
    ],
    ids=str,
)
def test_decoder_shape_with_and_without_optional_sizes(layout, given_, kv_heads, head_dim):
    text = (
        {key: QWEN[key] for key in QWEN if key != "num_key_value_heads"}
        | {"num_attention_heads": 14}
        | given_
    )
    config = {"model_type": "qwen2_5_vl", "text_config": text} if layout == "nested" else text
    assert decoder_shape(config) == DecoderShape(
        layers=28,
        hidden_size=3584,
        intermediate_size=18944,
        heads=14,
        kv_heads=kv_heads,
        head_dim=head_dim,
    )


def test_the_nested_text_config_wins_over_sizes_of_the_same_name_outside():
    config = {"hidden_size": 1, "text_config": LLAVA_TEXT}
    assert text_config(config) == LLAVA_TEXT
    assert decoder_shape(config).hidden_size == 4096


# config.json of llava-hf/llava-1.5-7b-hf: sizes that are the defaults of Llama are left out
PUBLISHED_LLAVA = """{
  "architectures": ["LlavaForConditionalGeneration"],
  "image_token_index": 32000,
  "model_type": "llava",
  "text_config": {
    "_name_or_path": "lmsys/vicuna-7b-v1.5",
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "rms_norm_eps": 1e-05,
    "vocab_size": 32064
  },
  "vision_config": {
    "hidden_size": 1024,
    "image_size": 336,
    "model_type": "clip_vision_model",
    "num_hidden_layers": 24,
    "patch_size": 14
  },
  "vision_feature_select_strategy": "default"
}"""


def test_the_published_llava_checkpoint_has_a_decoder_shape():
    config = json.loads(PUBLISHED_LLAVA)
    assert registry().family("llava").decoder(config).shape == DecoderShape(
        layers=32, hidden_size=4096, intermediate_size=11008, heads=32, kv_heads=32, head_dim=128
    )


def test_the_published_llava_checkpoint_has_spans():
    config = json.loads(PUBLISHED_LLAVA)
    spans = registry().family("llava").find(config, [1, *[32000] * 1152, 2])
    assert spans == [placed(1, 577), placed(577, 1153)]


def test_a_decoder_whose_sizes_are_unknown_is_unsupported_and_not_a_key_error():
    with pytest.raises(UnsupportedError, match="num_attention_heads"):
        decoder_shape({"model_type": "llava", "text_config": {"model_type": "unheard_of"}})


@pytest.mark.parametrize(
    ("model_type", "norm"), [("llama", False), ("qwen2", False), ("qwen3", True), (None, False)]
)
def test_query_norm_is_a_fact_of_the_decoder(model_type, norm):
    config = {"text_config": LLAVA_TEXT | {"model_type": model_type}}
    assert read_decoder(config).query_norm is norm


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ({}, {"full_attention"}),
        ({"layer_types": ["full_attention", "full_attention"]}, {"full_attention"}),
        ({"layer_types": ["linear_attention", "full_attention"]}, None),
        ({"sliding_window": 4096}, {"full_attention", "sliding_attention"}),  # Mistral
        ({"sliding_window": 32768, "use_sliding_window": False}, {"full_attention"}),  # Qwen2
        ({"sliding_window": 64, "use_sliding_window": True}, None),
    ],
)
def test_kinds_of_layers_are_read_off_the_configuration(text, kinds):
    found = read_decoder({"text_config": LLAVA_TEXT | text}).layer_kinds
    assert found == kinds if kinds else len(found) == 2


FAMILIES = sorted(registry().families.items())


def test_all_families_are_registered():
    assert {"internvl", "llava", "qwen2_5_vl", "qwen2_vl"} <= {name for name, _ in FAMILIES}
    assert "adapters" in {entry.name for entry in entry_points(group="entropyprune")}


@pytest.mark.parametrize(("name", "family"), FAMILIES, ids=[name for name, _ in FAMILIES])
def test_every_family_states_a_usable_default_layer_and_its_source(name, family):
    assert family.model_type == name
    assert family.name.strip()
    assert type(family.default_layer) is int
    assert family.default_layer >= 1
    assert len(family.default_layer_source.split()) >= 3, "say where the layer comes from"


@pytest.mark.parametrize(("name", "layer"), [("llava", 2), ("qwen2_5_vl", 1)])
def test_default_layers_are_those_of_the_released_code(name, layer):
    family = registry().family(name)
    assert family.default_layer == layer
    assert "constant" in family.default_layer_source


@pytest.mark.parametrize("name", ["internvl", "qwen2_vl"])
def test_a_default_layer_from_another_family_says_so(name):
    family = registry().family(name)
    assert family.default_layer == registry().family("llava").default_layer
    assert family.default_layer_source.startswith("that of LLaVA-1.5")
