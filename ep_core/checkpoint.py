"""Reading a checkpoint's config.json before any engine loads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ep_core.errors import EntropyPruneError


def read_config(model: Path) -> dict[str, Any]:
    """The config.json of a checkpoint folder in Hugging Face layout.

    Raises:
        EntropyPruneError: in one line, if there is none or it names no model type.
    """
    path = model / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except OSError:
        raise EntropyPruneError(f"{model} is no checkpoint folder: no config.json") from None
    except ValueError as error:  # no JSON, or no UTF-8
        raise EntropyPruneError(f"{path} is no valid JSON: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise EntropyPruneError(f"{path} names no model_type")
    return config
