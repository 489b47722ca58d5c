"""Conformance: does a backend prune the tokens that it should?

    python -m ep_conformance --backend transformers

Level 1 gives stored tensors to the backend's own selection path and expects the stored kept
indices. Level 2 runs checkpoints through the engine and compares with an oracle in plain torch
that shares no code with it. See docs/conformance.md.
"""
