"""What this backend relies on in SGLang, and whether the installed version fits: `ledger.toml`."""

from __future__ import annotations

import inspect
import re

from ep_backends.sglang.arguments import FINE, OFF, STEPS
from ep_core.ledger import AttachPoint, Ledger, PointStatus, check_point

LEDGER = Ledger.read("ep_backends.sglang")

# of a decoder layer, in this order
LAYER_INPUTS = LEDGER["sglang.srt.models.qwen2:Qwen2DecoderLayer.forward"].takes


def probe() -> list[PointStatus]:
    """Compare with the installed SGLang, which is not changed."""
    refused = AttachPoint(
        "sglang.srt.server_args:ServerArgs", "arguments that are refused", reads=(*FINE, *OFF)
    )
    return [*LEDGER.check(), check_point(refused), check_last_step()]


def check_last_step() -> PointStatus:
    """Is the step at which arguments are refused SGLang's last one?"""
    target = "sglang.srt.arg_groups.pipeline:run_resolution_pipeline"
    last = list(STEPS)[-1]
    try:
        from sglang.srt.arg_groups.pipeline import run_resolution_pipeline

        steps = re.findall(r"run_hook\((\w+)", inspect.getsource(run_resolution_pipeline))
    except Exception as error:  # importing a host can raise anything
        return PointStatus(target, "FAILED", f"not found: {error}")
    if steps[-1:] != [last]:
        behind = steps[steps.index(last) + 1 :] if last in steps else ["all of them"]
        return PointStatus(
            target, "FAILED", f"steps come behind {last}, where arguments are refused: {behind}"
        )
    return PointStatus(target, "ok", f"{last} is the last step; arguments are refused there")
