"""Pruning inside LMDeploy's PyTorch engine; see docs/lmdeploy.md.

    import ep_backends.lmdeploy

    ep_backends.lmdeploy.activate("layer=2,keep=128")

From then on each engine that this process starts prunes. With the policy left out, an engine takes
it from its `hf_overrides={"entropyprune": ...}` or from the variable `ENTROPYPRUNE`.
"""

from ep_backends.lmdeploy.plugin import activate

__all__ = ["activate"]
