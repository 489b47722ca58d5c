"""The model, a Qwen2.5-VL of 6.8 million parameters, and the heads that supervise its training."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from benchmarks.embedded_model.prompts import Batch
from benchmarks.embedded_model.scenes import COLORS, SHAPES
from benchmarks.embedded_model.tokenizer import (
    END_OF_TEXT,
    IM_END,
    IMAGE_PAD,
    VIDEO_PAD,
    VISION_END,
    VISION_PAD,
    VISION_START,
    VOCABULARY,
    build_tokenizer,
    token_id,
)

LABELS = {  # the classes of each column of prompts.token_labels
    "shape": 1 + len(SHAPES),
    "color": 1 + len(COLORS),
    "tens": 11,
    "ones": 11,
    "digit": 11,
    "center": 2,
}
SIMILARITY = 2.0  # factor on the default standard deviation of queries and keys
LABEL_WEIGHT = 0.3  # in the language stage; the vision stage has no other loss
ATTENTION_WEIGHT, ATTENTION_LAYER = 0.3, 3
PLACE_LAYER, MENTION_LAYER, DIRECTION_LAYER = 3, 5, 7  # of 8: what the heads read


def build_config() -> Qwen2_5_VLConfig:
    """Every dimension of the model."""
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 256,
            "intermediate_size": 640,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 4096,
            # With head_dim 32 the usual bases (1e4, 1e6) leave the columns, which get the lowest
            # frequencies, indistinguishable; a much smaller base makes it hard to attend to
            # content whatever its place.
            "rope_parameters": {
                "rope_type": "default",
                "type": "mrope",
                "rope_theta": 100.0,
                "mrope_section": [4, 6, 6],
            },
            "rms_norm_eps": 1e-6,
            "bos_token_id": token_id(END_OF_TEXT),
            "eos_token_id": token_id(IM_END),
            "pad_token_id": token_id(END_OF_TEXT),
            "use_sliding_window": False,
            "tie_word_embeddings": False,
        },
        vision_config={
            "depth": 3,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 2,
            "out_hidden_size": 256,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [0, 1, 2],
            "in_channels": 3,
            "tokens_per_second": 2,
        },
        image_token_id=token_id(IMAGE_PAD),
        video_token_id=token_id(VIDEO_PAD),
        vision_start_token_id=token_id(VISION_START),
        vision_end_token_id=token_id(VISION_END),
        vision_token_id=token_id(VISION_PAD),
        tie_word_embeddings=False,
    )


def build_model(seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """Initialise transformers' own model, so that what is trained is what is exported."""
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration._from_config(
        build_config(), attn_implementation="eager"
    )
    # The default standard deviation, 0.02, starves a network as narrow as the vision tower, and
    # the residual branches of the decoder start small, as in GPT-2.
    for module in model.model.visual.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.5 * module.in_features**-0.5)
    layers = model.model.language_model.layers
    for layer in layers:
        attention = layer.self_attn
        # Queries start as the keys of their group: tokens first attend to what is like them, a
        # short cut to what attention in trained models looks like (mimetic initialisation).
        keys = SIMILARITY * attention.k_proj.weight.data
        groups = attention.num_key_value_groups
        attention.k_proj.weight.data = keys
        attention.q_proj.weight.data = (
            keys.view(-1, 1, attention.head_dim, keys.shape[-1])
            .expand(-1, groups, -1, -1)
            .reshape(-1, keys.shape[-1])
            .clone()
        )
        for branch in (layer.self_attn.o_proj, layer.mlp.down_proj):
            branch.weight.data *= (2 * len(layers)) ** -0.5
    return model


@dataclass
class Outcome:
    """What to minimise, and numbers for the log: parts of the loss and accuracies."""

    loss: Tensor
    report: dict[str, float]


class Student(nn.Module):
    """The model and its training-only heads.

    They name what lies on each visual token; where that token is; where a mentioned thing is; and
    which way the answer points. Places are read off linearly and as distances, not classes: a
    token that attends to a whole thing then averages the places of its tokens to the centre, and
    comparing two things is a subtraction.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.model = build_model(seed)
        width = self.model.config.text_config.hidden_size
        self.labels = nn.Linear(width, sum(LABELS.values()))
        self.place, self.mention, self.direction = (
            nn.Sequential(nn.RMSNorm(width), nn.Linear(width, 2)) for _ in range(3)
        )

    @torch.no_grad()
    def take_vision(self, state: dict[str, Tensor]) -> None:
        """Take over what the vision stage has learnt, and start the words from it.

        The words for shapes and colours become the directions by which the vision stage tells
        these apart: a word is similar to the visual tokens it describes before training begins.
        """
        learnt = ("model.model.visual.", "labels.")
        self.load_state_dict({k: v for k, v in state.items() if k.startswith(learnt)}, strict=False)
        shapes, colors, *_ = torch.split(self.labels.weight, list(LABELS.values()))
        rows = torch.cat([shapes[1:], colors[1:]])  # the first row of each is "nothing"
        words: list[tuple[str, ...]] = [*SHAPES.items(), *((color,) for color in COLORS)]
        embedding = self.model.model.language_model.embed_tokens.weight
        for row, forms in zip(rows, words, strict=True):
            for text in (*forms, *(f" {form}" for form in forms)):
                ids = build_tokenizer().encode(text).ids
                if len(ids) == 1:  # plurals, for one, are a token only after a space
                    embedding[ids[0]] = row / row.norm()

    def study(self, batch: Batch, stage: str) -> Outcome:
        """One forward pass of a training stage."""
        return self._look(batch) if stage == "vision" else self._answer(batch)

    def _look(self, batch: Batch) -> Outcome:
        """Name what lies on each visual token."""
        scores = self._label_scores(self._see(batch))
        report = {}
        for name, score, label in zip(LABELS, scores, batch.labels.unbind(-1), strict=True):
            report[name] = _mean((score.argmax(-1) == label)[label > 0])
        return Outcome(self._label_loss(scores, batch), report)

    def _answer(self, batch: Batch) -> Outcome:
        """Answer the packed questions."""
        visual = self._see(batch)
        decoder = self.model.model.language_model
        # In bfloat16, so that the residual stream is what it will be in the exported model.
        embeds = decoder.embed_tokens(batch.ids).bfloat16()
        embeds = embeds.masked_scatter(batch.is_visual[..., None], visual.bfloat16())
        output = decoder(
            inputs_embeds=embeds,
            attention_mask=batch.mask,
            position_ids=batch.positions,
            output_hidden_states=True,
            output_attentions=True,
            use_cache=False,
        )
        states = [state.flatten(0, 1) for state in output.hidden_states]
        at_targets = output.last_hidden_state.flatten(0, 1)[batch.target_at]
        scores = self.model.lm_head(at_targets).float()
        places = _read(self.place, states[PLACE_LAYER], batch.is_visual.flatten())
        singles = _read(self.mention, states[MENTION_LAYER], batch.single_at)
        directions = _read(self.direction, states[DIRECTION_LAYER], batch.direction_at)
        losses = {
            "answer loss": F.cross_entropy(scores, batch.targets),
            "label loss": LABEL_WEIGHT * self._label_loss(self._label_scores(visual), batch),
            "place loss": F.l1_loss(places, batch.places),
            "attention loss": ATTENTION_WEIGHT * self._attention_loss(output.attentions, batch),
            "mention loss": F.l1_loss(singles, batch.singles),
            "direction loss": F.l1_loss(directions, batch.directions),
        }
        report = {name: loss.item() for name, loss in losses.items()}
        wrong = torch.zeros(len(batch.tasks)).index_add(
            0, batch.question, (scores.argmax(-1) != batch.targets).float()
        )
        for task in set(batch.tasks):
            report[task] = _mean(wrong[[name == task for name in batch.tasks]] == 0)
        return Outcome(torch.stack(list(losses.values())).sum(), report)

    def _attention_loss(self, attentions: tuple[Tensor, ...], batch: Batch) -> Tensor:
        """Half of the heads of one layer shall attend from a mention to what it names.

        Where things are counted, nothing counts as one more, so that the parts tell the number.
        """
        scores = attentions[ATTENTION_LAYER].transpose(1, 2).flatten(0, 1)  # [B * L, heads, L]
        scores = scores[batch.look_at, : scores.shape[1] // 2].float()
        losses = -(scores @ batch.looks[..., None]).clamp_min(1e-6).log().squeeze(-1).mean(-1)
        return (batch.look_shares * losses).sum() / batch.look_shares.sum()

    def _see(self, batch: Batch) -> Tensor:
        """Encode the pictures -> [visual tokens, width]."""
        visual: Tensor = self.model.model.visual(batch.patches, grid_thw=batch.grids).pooler_output
        return visual

    def _label_scores(self, visual: Tensor) -> tuple[Tensor, ...]:
        scores: Tensor = self.labels(visual)
        return torch.split(scores.float(), list(LABELS.values()), -1)

    def _label_loss(self, scores: tuple[Tensor, ...], batch: Batch) -> Tensor:
        losses = []
        for score, label in zip(scores, batch.labels.unbind(-1), strict=True):
            weight = torch.ones(score.shape[-1])
            weight[0] = 0.15  # most tokens are background
            losses.append(F.cross_entropy(score, label, weight))
        return torch.stack(losses).sum()


def _read(head: nn.Module, states: Tensor, at: Tensor) -> Tensor:
    """Apply a head to some of the flattened states -> [len(at), 2]."""
    result: Tensor = head(states[at].float())
    return result.float()


def _mean(right: Tensor) -> float:
    return right.float().mean().item()
