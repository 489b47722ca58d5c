"""lmms-eval's tasks, answered by any backend: `entropyprune eval`, or in lmms-eval itself

lmms-eval --model entropyprune --tasks gqa \\
  --model_args 'model=path/to/llava-1.5-7b-hf,device=cuda,policy={"layer": 2, "keep": 128}'

lmms-eval finds the model through its entry point group `lmms_eval.models`.
"""

from __future__ import annotations

from typing import Any

NAME = "entropyprune"
ENDPOINT = "entropyprune_endpoint"


def manifests() -> list[Any]:
    """What lmms-eval's registry reads: a backend, and a server that speaks OpenAI's protocol."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(NAME, chat_class_path=f"{__name__}.model.BackendModel"),
        ModelManifest(ENDPOINT, chat_class_path=f"{__name__}.model.EndpointModel"),
    ]
