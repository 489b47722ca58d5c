"""Tiny random checkpoints and pictures: what the suite runs engines on, made on the spot.

Each writer fills a folder in Hugging Face layout that transformers 5 loads (model, tokenizer,
image processor) without any file from a network. The weights are random but seeded, rounded to
values that bfloat16 holds exactly, and scaled so that attention is uneven, token scores vary, and
greedy tokens depend on the picture. Norm weights and biases are not the identity, and RoPE bases
are not the defaults, so an engine that forgets one gives other tokens.

Random models answer at random: they test equality between engines, never quality.
"""

from ep_conformance.checkpoints.internvl import tiny_internvl
from ep_conformance.checkpoints.llava import tiny_llava
from ep_conformance.checkpoints.pictures import make_picture
from ep_conformance.checkpoints.qwen import tiny_qwen2_5_vl, tiny_qwen2_vl

__all__ = ["make_picture", "tiny_internvl", "tiny_llava", "tiny_qwen2_5_vl", "tiny_qwen2_vl"]
