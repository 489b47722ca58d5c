"""Time the prefill of a pruned LLaVA-1.5-7B decoder against what pruning could save at best.

python -m benchmarks.prefill.bench --out benchmarks/results/prefill
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from benchmarks.report import environment, heading, output, publish, ratio, table, timed
from ep_backends.transformers import enable
from ep_core import kernels
from ep_core.budget import DecoderShape, LayerAverage
from ep_core.compaction import Pass
from ep_core.plan import PlannedUnit, RequestPlan, Run, Unit
from ep_core.plugins import registry

# LLaVA-1.5-7B and the prompt of the paper's FLOPs
PAPER = DecoderShape(
    layers=32, hidden_size=4096, intermediate_size=11008, heads=32, kv_heads=32, head_dim=128
)
PICTURE = Unit((Run(35, 35 + 576),))
TOKENS = 86 + len(PICTURE)
K = 2
IMAGE_TOKEN = 32000
CASES = ((192, "released"), (128, "released"), (128, "set-entropy"), (64, "released"))
METHODS = ("released", "rows", "trace", "set-entropy")
DISTINCT = 4  # layers with weights of their own: 1.6 GB, which no processor cache holds


def build(layers: int, device: torch.device) -> Any:
    """LLaVA-1.5-7B in bfloat16 with random weights.

    What never runs has no memory: vision tower, projector and head stay on the device `meta`.
    """
    config = LlavaConfig(
        text_config=LlamaConfig(
            hidden_size=PAPER.hidden_size,
            intermediate_size=PAPER.intermediate_size,
            num_attention_heads=PAPER.heads,
            num_key_value_heads=PAPER.kv_heads,
            num_hidden_layers=layers,
            vocab_size=32064,
            max_position_embeddings=4096,
        ),
        vision_config=CLIPVisionConfig(image_size=336, patch_size=14),
        image_token_index=IMAGE_TOKEN,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config).to(torch.bfloat16).eval()
    decoder = model.get_decoder()
    for part in (decoder.embed_tokens, decoder.norm, *decoder.layers[:DISTINCT]):
        part.to_empty(device=device)
        for weight in part.parameters():
            weight.data.normal_(std=0.02) if weight.ndim > 1 else weight.data.fill_(1)
    for index, layer in enumerate(decoder.layers[DISTINCT:]):
        layer.load_state_dict(decoder.layers[index % DISTINCT].state_dict(), assign=True)
    decoder.rotary_emb = type(decoder.rotary_emb)(decoder.config).to(device)
    return model


def prompt(device: torch.device) -> dict[str, Any]:
    """Arguments of the base model: text around one picture, whose features are random."""
    ids = torch.randint(3, IMAGE_TOKEN, (1, TOKENS), device=device)
    ids[:, PICTURE.start : PICTURE.stop] = IMAGE_TOKEN
    features = torch.randn(len(PICTURE), PAPER.hidden_size, device=device) * 0.02
    image = BaseModelOutputWithPooling(pooler_output=[features.to(torch.bfloat16)])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_encoder_outputs": {"image": image},
        "use_cache": True,
    }


def twin(model: Any) -> Any:
    """The model once more: the same weights in memory, hooks of its own."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def two_lengths(model: Any, hidden: torch.Tensor, tokens: int) -> torch.Tensor:
    """The ceiling: K layers over all of `hidden` `[1, N, d]`, the others over `tokens` of it.

    Nothing is scored, gathered or spread. Like a prefill it fills a cache and ends in the norm.
    """
    decoder = model.get_decoder()
    cache = DynamicCache(config=decoder.config)
    for index, layer in enumerate(decoder.layers):
        if index in (0, K):
            hidden = hidden[:, : tokens if index else None]
            positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
            rope = decoder.rotary_emb(hidden, position_ids=positions)
        hidden = layer(hidden, position_embeddings=rope, past_key_values=cache, use_cache=True)
    normed: torch.Tensor = decoder.norm(hidden)
    return normed


class Through(nn.Module):
    """A decoder layer without work: what its hooks do is all that takes time.

    Attributes:
        queries: `[1, N, H D]`, what its query projection answers.
        output: `[1, N, d]`, what it returns, or None for its input.
    """

    def __init__(self, queries: torch.Tensor, output: torch.Tensor | None) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict({"q_proj": nn.Identity()})
        self.queries, self.output = queries, output

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """`[1, N, d]`, like a decoder layer."""
        self.self_attn["q_proj"](self.queries)
        return hidden_states if self.output is None else self.output


def hollow(model: Any, queries: torch.Tensor, hidden: torch.Tensor) -> Any:
    """A twin whose layers do nothing; layer K-1 answers with given queries and hidden states."""
    other = twin(model)
    decoder = other.get_decoder()
    decoder.layers = nn.ModuleList(
        Through(queries, hidden if index < K else None) for index in range(len(decoder.layers))
    )
    return other


def clock(
    paths: Mapping[str, Callable[[], object]], rounds: int, what: str, device: torch.device
) -> dict[str, list[float]]:
    """`timed`, where a path ends when the device has finished."""

    def finish(path: Callable[[], object]) -> None:
        path()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return timed({name: partial(finish, path) for name, path in paths.items()}, rounds, what)


def kept(average: int) -> int:
    """Visual tokens after layer K: the paper's count, also where fewer layers run."""
    return LayerAverage(average).tokens([len(PICTURE)], layer=K, shape=PAPER)[0]


def prefill(
    model: Any, inputs: dict[str, Any], rounds: int, device: torch.device
) -> tuple[list[dict[str, Any]], list[float]]:
    """Each policy and its ceiling, and the milliseconds of the unpruned prefill."""
    shape = replace(PAPER, layers=len(model.get_decoder().layers))
    embedded = torch.randn(1, TOKENS, PAPER.hidden_size, device=device).to(torch.bfloat16) * 0.02
    paths: dict[str, Callable[[], object]] = {"unpruned": partial(model.model, **inputs)}
    for average, method in CASES:
        pruned = twin(model)
        enable(pruned, f"layer={K},keep={kept(average)},method={method}")
        paths[f"{method} {average}"] = partial(pruned.model, **inputs)
        left = TOKENS - len(PICTURE) + kept(average)
        paths[f"ceiling {average}"] = partial(two_lengths, model, embedded, left)
    times = clock(paths, rounds, f"prefill, {shape.layers} layers", device)
    full = times["unpruned"]
    rows = []
    for average, method in CASES:
        pruned_ms, ceiling_ms = times[f"{method} {average}"], times[f"ceiling {average}"]
        left = TOKENS - len(PICTURE) + kept(average)
        saved = shape.flops_reduction(TOKENS, left, K)
        rows.append(
            {
                "average": average,
                "method": method,
                "kept": kept(average),
                "FLOPs saved": round(saved, 4),
                "FLOPs model": round(1 / (1 - saved), 3),
                "ceiling": round(ratio(full, ceiling_ms), 3),
                "speed-up": round(ratio(full, pruned_ms), 3),
                "share of ceiling": [
                    round(a / b, 4) for a, b in zip(ceiling_ms, pruned_ms, strict=True)
                ],
                "ceiling ms": [round(ms, 1) for ms in ceiling_ms],
                "ms": [round(ms, 1) for ms in pruned_ms],
            }
        )
    return rows, full


def choose(method: str, keep: int, hidden: torch.Tensor, queries: torch.Tensor) -> None:
    """Rank the picture's tokens of one prompt: hidden `[T, d]`, queries `[T, H, D]`."""
    current = Pass()
    current.add(RequestPlan.of([PlannedUnit(PICTURE, keep)], TOKENS), TOKENS)
    current.choose(registry().selector(method), hidden, queries)


def layer_k_inputs(model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries of layer K-1 `[1, N, H D]` and the hidden states it returns `[1, N, d]`."""
    seen: dict[str, torch.Tensor] = {}
    short = twin(model)
    decoder = short.get_decoder()
    decoder.layers = decoder.layers[:K]
    layer = decoder.layers[K - 1]
    layer.self_attn.q_proj.register_forward_hook(lambda m, a, out: seen.update(queries=out))
    layer.register_forward_hook(lambda m, a, out: seen.update(hidden=out))
    short.model(**inputs)
    return seen["queries"], seen["hidden"]


def overhead(
    model: Any, inputs: dict[str, Any], rounds: int, device: torch.device
) -> tuple[list[dict[str, Any]], float]:
    """What each method adds to a prefill, and the milliseconds of one full-length layer."""
    queries, hidden = layer_k_inputs(model, inputs)
    assert bool(hidden.isfinite().all())
    by_head = queries.view(TOKENS, PAPER.heads, PAPER.head_dim)
    keep, decoder = kept(128), model.get_decoder()
    rope = decoder.rotary_emb(hidden, position_ids=torch.arange(TOKENS, device=device)[None])
    bare: dict[str, Callable[[], object]] = {
        "unpruned": partial(hollow(model, queries, hidden).model, **inputs)
    }
    selects = {}
    for method in METHODS:
        pruned = hollow(model, queries, hidden)
        enable(pruned, f"layer={K},keep={keep},method={method}")
        bare[method] = partial(pruned.model, **inputs)
        selects[method] = partial(choose, method, keep, hidden[0], by_head)
    # apart, for a path leaves its memory to the next
    times = clock(bare, rounds, "what pruning adds", device)
    chosen = clock(selects, rounds, "selection", device)
    layer = partial(decoder.layers[K], hidden, position_embeddings=rope)
    layer_ms = clock({"layer": layer}, min(rounds, 5), "one layer", device)["layer"]
    rows = []
    for method in METHODS:
        added = [a - b for a, b in zip(times[method], times["unpruned"], strict=True)]
        rows.append(
            {
                "method": method,
                "select ms": round(statistics.median(chosen[method]), 3),
                "all ms": round(statistics.median(added), 3),
            }
        )
    return rows, statistics.median(layer_ms)


def report(result: dict[str, Any]) -> list[str]:
    """The tables in Markdown."""
    layers, full, layer = result["layers"], result["unpruned ms"], result["layer ms"]
    lines = [
        *heading("Prefill of a pruned decoder: time", result),
        f"LLaVA-1.5-7B's decoder in transformers, {layers} layers, bfloat16, on "
        f"{result['device']}. {len(PICTURE)} visual and {TOKENS - len(PICTURE)} text tokens, "
        f"pruned at layer {K}. Weights are random; {min(layers, DISTINCT)} layers have their own "
        f"({0.4 * min(layers, DISTINCT):.1f} GB), the others use them again. Timed are embedding, "
        "layers and final norm, with a KV cache; the picture's features are given, and the head "
        "is left out. The ceiling runs the same layers on the two lengths and does nothing else.",
        "",
        f"Unpruned: {statistics.median(full) / 1e3:.2f} s. Medians over {len(full)} rounds; in "
        "brackets the share of the ceiling in the lowest and the highest round.",
        "",
    ]
    rows = []
    for row in result["prefill"]:
        shares = [100 * share for share in row["share of ceiling"]]
        rows.append(
            [
                row["average"],
                row["method"],
                f"{len(PICTURE)} -> {row['kept']}",
                f"{100 * row['FLOPs saved']:.1f} %",
                f"{row['FLOPs model']:.2f}x",
                f"{row['ceiling']:.2f}x",
                f"**{row['speed-up']:.2f}x**",
                f"{statistics.median(shares):.1f} % ({min(shares):.1f} - {max(shares):.1f})",
            ]
        )
    header = ["average", "method", "visual tokens", "FLOPs saved", "FLOPs model"]
    lines += table([*header, "ceiling", "measured", "of the ceiling"], rows)
    lines += [
        "",
        f"What pruning adds, {len(PICTURE)} -> {kept(128)} tokens: the model once more with layers "
        "that do nothing, pruned less unpruned, on the queries and hidden states of the real "
        f"layer {K - 1}. `select` is scoring and selection, timed alone; `all` also holds the "
        "plan, the gathering, the mask, the spreading of the output and the hooks. One layer over "
        f"{TOKENS} tokens: {layer:.1f} ms. Kernels: {result['kernels']}. Medians over "
        f"{result['overhead rounds']} rounds.",
        "",
    ]
    rows = [
        [
            row["method"],
            f"{row['select ms']:.2f}",
            f"{row['all ms']:.2f}",
            f"{100 * row['all ms'] / layer:.2f} %",
            f"{100 * row['all ms'] / statistics.median(full):.3f} %",
        ]
        for row in result["overhead"]
    ]
    header = ["method", "`select`, ms", "`all`, ms", "of one layer"]
    return lines + table([*header, "of the unpruned prefill"], rows)


def main() -> None:
    """Measure, print the tables, write both files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=PAPER.layers)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--overhead-rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", type=torch.device, default="cpu")
    parser.add_argument("--out", type=output, help="write OUT.json and OUT.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with torch.inference_mode():
        model = build(args.layers, args.device)
        inputs = prompt(args.device)
        added, layer = overhead(model, inputs, args.overhead_rounds, args.device)
        rows, full = prefill(model, inputs, args.rounds, args.device)
    result: dict[str, Any] = {
        **environment(["torch", "transformers"]),
        "device": str(args.device),
        "kernels": kernels.describe(args.device.type).partition(" (")[0],
        "layers": args.layers,
        "unpruned ms": [round(ms, 1) for ms in full],
        "prefill": rows,
        "overhead rounds": args.overhead_rounds,
        "layer ms": round(layer, 2),
        "overhead": added,
    }
    publish(result, report(result), args.out)


if __name__ == "__main__":
    main()
