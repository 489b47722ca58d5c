"""The oracle: one request through a vision-language model with pruning, in plain torch.

Every backend is compared with this file, so it shares no code with them or with ``ep_core``: it
is written from the description of the method alone, and each step is the most literal one (a
Python loop over layers, over tokens, over picks). It is slow and means to be read in one sitting.

Layers 0..K-1 see the whole prompt. Then, for each picture by itself, a selection keeps some of its
tokens; layers K..L-1 see the text and the kept tokens, at their original positions. Decoding goes
on from the original next position: layers < K read the full KV, layers >= K the kept KV.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from ep_conformance.vision import (
    ACTIVATIONS,
    attention,
    encode_internvl,
    encode_llava,
    encode_qwen,
    linear,
    load_weights,
    rms_norm,
    rotate,
)

ENCODERS = {
    "internvl": encode_internvl,
    "llava": encode_llava,
    "qwen2_5_vl": encode_qwen,
    "qwen2_vl": encode_qwen,
}
SUPPORTED = {  # model_type, and that of the language model
    ("internvl", "qwen2"),
    ("llava", "llama"),
    ("qwen2_5_vl", "qwen2_5_vl_text"),
    ("qwen2_vl", "qwen2_vl_text"),
}
METHODS = ("released", "rows", "trace", "set-entropy")  # all but the last score each token

Cache = list[tuple[torch.Tensor, torch.Tensor]]  # per layer: keys, values [S, G, D]


@dataclass(frozen=True)
class OracleResult:
    """What one request did."""

    input_ids: list[int]  # expanded prompt (image placeholders repeated)
    spans: list[tuple[int, int]]  # [start, stop) of each picture in input_ids
    kept: list[list[int]]  # per span, indices relative to start, ascending
    scores: list[list[float]] | None  # per span and token, where the method is a per-token score
    output_ids: list[int]  # greedy tokens, eos included when produced
    logits: torch.Tensor  # [steps, vocab] float32, the logits each output id was taken from
    kv: tuple[int, int]  # KV slots of layers < K and of layers >= K after the prompt


def token_score(queries: np.ndarray, method: str) -> float:
    """Matrix entropy of one visual token.

    queries: [H, D] query states before RoPE, any float dtype, H >= 2. Centred over the heads;
    ``rows`` then scales each head to unit length, ``trace`` divides the Gram matrix by its trace,
    ``released`` does neither. Returns ``-sum(l ln l) / ln H`` over the eigenvalues ``l`` of
    ``X X^T / H`` in float64, with ``0 ln 0 = 0``. What has no length stays zero (score 0.0); a
    query that is not finite scores NaN.
    """
    x = queries.astype(np.float64)
    heads = len(x)
    if not np.isfinite(x).all():
        return math.nan
    x = x - x.mean(axis=0)
    if method == "rows":
        length = np.linalg.norm(x, axis=1, keepdims=True)
        x = np.divide(x, length, out=np.zeros_like(x), where=length > 0)
    gram = x @ x.T / heads  # [H, H]
    if method == "trace" and np.trace(gram) > 0:
        gram = gram / np.trace(gram)
    # Rounding makes some zero eigenvalues slightly negative: they count as zero.
    eigenvalues: list[float] = np.linalg.eigvalsh(gram).tolist()
    return -sum(e * math.log(e) for e in eigenvalues if e > 0) / math.log(heads)


def keep_best(scores: Sequence[float], keep: int) -> list[int]:
    """The ``keep`` best tokens, ascending: highest score first, then lowest index.

    A score that is not finite (NaN or an infinity of either sign) comes after every finite one.
    """
    finite = [math.isfinite(s) for s in scores]
    order = sorted(
        range(len(scores)), key=lambda i: (not finite[i], -scores[i] if finite[i] else 0.0, i)
    )
    return sorted(order[:keep])


def keep_set(hidden: np.ndarray, keep: int) -> list[int]:
    """The ``set-entropy`` choice, ascending: a greedy maximiser of the set's Renyi-2 entropy.

    hidden: [N, d] hidden states of one span entering layer K. Rows are scaled to unit length,
    ``G = rows rows^T``; the first pick has the smallest sum of G^2 over all tokens, every later
    pick the smallest sum of G^2 over the tokens picked so far; ties go to the lowest index. A row
    that is zero or not finite is picked after all others and counts as zero in the sums.
    """
    rows = hidden.astype(np.float64)  # [N, d]
    usable = np.isfinite(rows).all(axis=1) & (rows != 0).any(axis=1)
    rows[~usable] = 0.0
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = np.divide(rows, length, out=np.zeros_like(rows), where=usable[:, None])
    # Float32 makes G well defined (its float64 rounding errors vanish). A float32 squared is exact
    # in float64 and fsum rounds once, so equal sums are equal whatever the order of summation.
    gram = (rows @ rows.T).astype(np.float32)
    squares = (gram.astype(np.float64) ** 2).tolist()  # [N][N]
    picked: list[int] = []
    while len(picked) < keep:
        over = picked or range(len(squares))
        left = [i for i in range(len(squares)) if i not in picked]
        best = min(left, key=lambda i: (not usable[i], math.fsum(squares[i][j] for j in over), i))
        picked.append(best)
    return sorted(picked)


class Oracle:
    """A checkpoint folder in Hugging Face layout, of a model in ``SUPPORTED``.

    Runs on the CPU in ``dtype``; norms, softmax and rotation angles in float32 or better. Raises
    ValueError for a checkpoint it would compute wrongly.
    """

    def __init__(self, model_dir: Path, dtype: torch.dtype = torch.float32) -> None:
        self.config = _read_json(model_dir / "config.json")
        self.text = _text_config(self.config)
        _check_supported(self.config, self.text)
        self.weights = load_weights(model_dir, dtype)
        if self.config["tie_word_embeddings"]:
            self.weights["lm_head.weight"] = self.weights["text.embed_tokens.weight"]
        self.processor = _read_json(model_dir / "processor_config.json")["image_processor"]
        self.tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
        settings = _read_json(model_dir / "tokenizer_config.json")
        self.bos = settings.get("bos_token")
        key = "image_token_id" if "image_token_id" in self.config else "image_token_index"
        self.placeholder: int = self.config[key]
        self.marked = [self.placeholder]
        if self.config["model_type"] == "internvl":  # its processor adds what stands around
            names = settings["extra_special_tokens"]
            around = names["start_image_token"] + names["end_image_token"]
            start, end = self.tokenizer.encode(around, add_special_tokens=False).ids
            self.marked = [start, self.placeholder, end]
        template = model_dir / "chat_template.jinja"
        # The options are those every chat template is written for.
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        self.template = environment.from_string(
            template.read_text() if template.exists() else settings["chat_template"]
        )
        eos = _read_json(model_dir / "generation_config.json")["eos_token_id"]
        self.eos: list[int] = eos if isinstance(eos, list) else [eos]
        self.layers: int = self.text["num_hidden_layers"]
        even_share = self.text["hidden_size"] // self.text["num_attention_heads"]
        self.head_dim: int = self.text.get("head_dim") or even_share

    @torch.no_grad()
    def generate(
        self,
        content: Sequence[str | Path],
        *,
        layer: int | None,
        keep: Sequence[int] | None,
        method: str,
        max_new_tokens: int,
        chosen: Sequence[Sequence[int]] | None = None,
    ) -> OracleResult:
        """Greedy decoding of one user message, pruned at the input of ``layer``.

        content: texts and picture files in the order of the message. layer: K in 1..L-1, or None
        for no pruning (then ``keep`` and ``method`` are not read). keep: tokens kept of each
        picture, 1..N. chosen: the kept tokens of each picture, to go on from a choice that was made
        elsewhere; None lets ``method`` choose. Raises ValueError for values outside of these.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
        ids, spans, positions, x = self._prompt(content)  # positions: [3, T]; x: [T, hidden]
        kept = [list(range(stop - start)) for start, stop in spans]
        scores: list[list[float]] | None = None
        if layer is not None:
            _check_policy(layer, self.layers, keep, spans, method)
        empty = x.new_empty(0, self.text["num_key_value_heads"], self.head_dim)
        cache: Cache = [(empty, empty)] * self.layers

        angles = self._angles(positions)  # [T, D/2]
        queries = x  # replaced by the first layer
        for i in range(self.layers):
            if i == layer and keep is not None:
                kept, scores = _select(method, keep, spans, queries, x)
                if chosen is not None:
                    kept = [list(own) for own in chosen]
                rows = _surviving(len(ids), spans, kept)
                x, angles = x[rows], angles[rows]
            x, queries = self._layer(i, x, angles, cache)
        kv = (len(cache[0][0]), len(cache[-1][0]))

        output: list[int] = []
        logits: list[torch.Tensor] = []
        position = int(positions.max()) + 1
        while True:
            logits.append(self._logits(x[-1]))
            output.append(int(logits[-1].argmax()))
            if output[-1] in self.eos or len(output) == max_new_tokens:
                break
            x = self.weights["text.embed_tokens.weight"][output[-1:]]  # [1, hidden]
            angles = self._angles(torch.full((3, 1), position))
            position += 1
            for i in range(self.layers):
                x, _ = self._layer(i, x, angles, cache)
        return OracleResult(ids, spans, kept, scores, output, torch.stack(logits), kv)

    def _prompt(
        self, content: Sequence[str | Path]
    ) -> tuple[list[int], list[tuple[int, int]], torch.Tensor, torch.Tensor]:
        """Expanded ids, spans, M-RoPE positions [3, T] and embeddings [T, hidden] of a message."""
        items = [
            {"type": "image"} if isinstance(part, Path) else {"type": "text", "text": part}
            for part in content
        ]
        messages = [{"role": "user", "content": items}]
        text = self.template.render(messages=messages, add_generation_prompt=True)
        has_bos = self.bos is not None and text.startswith(self.bos)
        short = self.tokenizer.encode(text, add_special_tokens=not has_bos).ids

        encode = ENCODERS[self.config["model_type"]]
        pictures = [part for part in content if isinstance(part, Path)]
        if short.count(self.placeholder) != len(pictures):
            raise ValueError(
                f"the prompt has {short.count(self.placeholder)} image placeholders for "
                f"{len(pictures)} pictures: {text!r}"
            )
        marked = {self.placeholder: self.marked}
        short = [part for token in short for part in marked.get(token, [token])]
        waiting = iter(pictures)
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        positions: list[torch.Tensor] = []
        rows: list[torch.Tensor] = []
        position = 0  # of the next token
        for token in short:
            row = self.weights["text.embed_tokens.weight"][[token]]  # [1, hidden]
            offsets = torch.zeros(3, 1, dtype=torch.long)
            if token == self.placeholder:
                row, offsets = encode(next(waiting), self.config, self.processor, self.weights)
                spans.append((len(ids), len(ids) + len(row)))
            ids += [token] * len(row)
            rows.append(row)
            positions.append(position + offsets)
            position += int(offsets.max()) + 1
        return ids, spans, torch.cat(positions, dim=1), torch.cat(rows)

    def _angles(self, positions: torch.Tensor) -> torch.Tensor:
        """Rotation angles [T, D/2] of positions [3, T]: time, row, column share the channels."""
        rope = self.text["rope_parameters"]
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
        inverse: torch.Tensor = 1.0 / rope["rope_theta"] ** exponent  # [D/2]
        # Without sections (plain RoPE) the three axes hold the same position.
        sections = torch.tensor(rope.get("mrope_section", [self.head_dim // 2, 0, 0]))
        axis = torch.arange(3).repeat_interleave(sections)  # [D/2]
        return positions[axis].T.to(torch.float32) * inverse

    def _layer(
        self, i: int, x: torch.Tensor, angles: torch.Tensor, cache: Cache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decoder layer ``i`` over new tokens x [T, hidden]; its KV grows by T slots.

        Returns the new hidden states [T, hidden] and the query states before RoPE [T, H, D].
        """
        name, w, eps = f"text.layers.{i}.", self.weights, self.text["rms_norm_eps"]
        h = rms_norm(w, name + "input_layernorm", x, eps)
        q, k, v = (
            linear(w, f"{name}self_attn.{which}_proj", h).view(len(h), -1, self.head_dim)
            for which in "qkv"
        )
        keys = torch.cat((cache[i][0], rotate(k, angles)))  # [S, G, D]
        values = torch.cat((cache[i][1], v))
        cache[i] = (keys, values)
        # The new tokens are the last T slots; each reads the slots up to its own.
        slot = torch.arange(len(keys))
        allowed = slot[None, :] <= slot[len(keys) - len(x) :, None]  # [T, S]
        mixed = attention(rotate(q, angles), keys, values, allowed)
        x = x + linear(w, name + "self_attn.o_proj", mixed)
        h = rms_norm(w, name + "post_attention_layernorm", x, eps)
        gate = ACTIVATIONS[self.text["hidden_act"]](linear(w, name + "mlp.gate_proj", h))
        x = x + linear(w, name + "mlp.down_proj", gate * linear(w, name + "mlp.up_proj", h))
        return x, q

    def _logits(self, last: torch.Tensor) -> torch.Tensor:
        """Logits [vocab], float32, of one token's final hidden state [hidden]."""
        h = rms_norm(self.weights, "text.norm", last, self.text["rms_norm_eps"])
        return linear(self.weights, "lm_head", h).to(torch.float32)


def _select(
    method: str,
    keep: Sequence[int],
    spans: list[tuple[int, int]],
    queries: torch.Tensor,
    hidden: torch.Tensor,
) -> tuple[list[list[int]], list[list[float]] | None]:
    """Kept indices of every span and, for a per-token method, the scores.

    queries: [T, H, D] of layer K-1 before RoPE; hidden: [T, d] entering layer K.
    """
    if method == "set-entropy":
        states = hidden.double().numpy()
        return [keep_set(states[a:b], k) for (a, b), k in zip(spans, keep, strict=True)], None
    q = queries.double().numpy()
    scores = [[token_score(q[t], method) for t in range(a, b)] for a, b in spans]
    return [keep_best(s, k) for s, k in zip(scores, keep, strict=True)], scores


def _surviving(length: int, spans: list[tuple[int, int]], kept: list[list[int]]) -> list[int]:
    """Rows of a prompt of ``length`` tokens that go on after the pruning layer, ascending."""
    pruned = {row for start, stop in spans for row in range(start, stop)}
    back = {start + i for (start, _), chosen in zip(spans, kept, strict=True) for i in chosen}
    return [row for row in range(length) if row not in pruned or row in back]


def _check_policy(
    layer: int, layers: int, keep: Sequence[int] | None, spans: list[tuple[int, int]], method: str
) -> None:
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}")
    if not 1 <= layer < layers:
        raise ValueError(f"layer {layer} is outside 1..{layers - 1}, the layers that can prune")
    sizes = [stop - start for start, stop in spans]
    if keep is None or len(keep) != len(sizes):
        raise ValueError(f"keep must give one count for each of {len(sizes)} pictures, not {keep}")
    for count, size in zip(keep, sizes, strict=True):
        if not 1 <= count <= size:
            raise ValueError(f"cannot keep {count} of the {size} tokens of a picture")


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part; published Qwen2-VL files have it at the top level."""
    if "text_config" in config:
        nested: dict[str, Any] = config["text_config"]
        return nested
    scaling = config["rope_scaling"]
    kind = "default" if scaling["type"] == "mrope" else scaling["type"]
    rope = scaling | {"rope_type": kind, "rope_theta": config["rope_theta"]}
    return config | {"model_type": "qwen2_vl_text", "rope_parameters": rope}


def _check_supported(config: dict[str, Any], text: dict[str, Any]) -> None:
    if (config["model_type"], text["model_type"]) not in SUPPORTED:
        known = ", ".join(f"{model} with {language}" for model, language in sorted(SUPPORTED))
        raise ValueError(
            f"the oracle knows {known}, not {config['model_type']} with {text['model_type']}"
        )
    if text["rope_parameters"]["rope_type"] != "default" or text.get("use_sliding_window"):
        raise ValueError("the oracle knows neither scaled RoPE nor sliding-window attention")
    if not isinstance(config.get("vision_feature_layer", 0), int):
        raise ValueError("the oracle knows a single vision_feature_layer only")
    if config["model_type"] == "internvl":
        vision = config["vision_config"]
        if vision["use_qk_norm"] or vision["norm_type"] != "layer_norm":
            raise ValueError("the oracle knows InternVL's smaller tower only, without RMS norms")
        if config["vision_feature_layer"] != -1 or not vision["use_mean_pooling"]:
            raise ValueError("the oracle knows InternVL's last layer only, without a final norm")


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
