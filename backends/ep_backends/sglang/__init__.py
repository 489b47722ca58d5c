"""Pruning inside SGLang: `activate` is loaded by SGLang itself, see docs/sglang.md."""
