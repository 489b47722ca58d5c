"""What cannot run with pruning in transformers: decoders, compiled modules, arguments of calls."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import nn

from ep_backends.transformers.batch import Row
from ep_backends.transformers.ledger import LAYER_INPUTS
from ep_core.budget import FlopsReduction
from ep_core.errors import UnsupportedError
from ep_core.patching import missing_parameters
from ep_core.policy import PruningPolicy
from ep_core.settings import Settings

ATTENTION = ("sdpa", "eager")
IGNORED = -100  # transformers' label for what the loss leaves out
GENERATION_MODES = ("greedy_search", "sample", "beam_search", "beam_sample")

_BY_LAYER = {
    "output_attentions": "layers >= K attend fewer tokens, so attention maps differ in size",
    "output_hidden_states": "layers >= K hold fewer tokens, so hidden states differ in size",
}
_REFUSED_OPTIONS = _BY_LAYER | {
    "prefill_chunk_size": "a chunk may end inside a picture, whose tokens are ranked together",
    "guidance_scale": "it runs a second prompt through the model for each request",
}


def check_decoder(decoder: Any, settings: Settings) -> None:
    """Refuse decoders that the hooks, or the method, do not fit.

    Raises:
        UnsupportedError: with the property, and what is supported.
    """
    implementation, first = decoder.config._attn_implementation, decoder.layers[0]
    if implementation not in ATTENTION:
        raise UnsupportedError(
            f"attention implementation {implementation!r} is not proven with pruning; load the "
            f"model with attn_implementation set to one of {', '.join(ATTENTION)}"
        )
    if "attention" in settings.selector.needs and implementation != "eager":
        raise UnsupportedError(
            f"method {settings.selector.name!r} reads attention maps, which {implementation!r} "
            "does not give; load the model with attn_implementation='eager'"
        )
    missing = missing_parameters(first.forward, LAYER_INPUTS)
    attention, query_norm = getattr(first, "self_attn", None), settings.decoder.query_norm
    if "queries" in settings.selector.needs:
        source = "q_norm" if query_norm else "q_proj"
        missing += [] if hasattr(attention, source) else [f"self_attn.{source}"]
    if missing:
        raise UnsupportedError(
            f"{type(first).__name__} has no {', '.join(missing)}, which pruning relies on"
        )
    if "queries" in settings.selector.needs and hasattr(attention, "q_norm") and not query_norm:
        raise UnsupportedError(
            f"{type(first).__name__} normalises its queries, which the family "
            f"{settings.family.name} does not know of; supported are decoders like Llama, Qwen2 "
            "and Qwen3, or a method that reads no queries"
        )


def check_not_compiled(model: Any, base: Any, decoder: Any, hooked: Mapping[str, Any]) -> None:
    """Refuse modules whose graphs were traced without the hooks that they are about to get.

    Args:
        model, base, decoder: the model and the parts around the layers.
        hooked: modules of the decoder that get hooks, by path.

    Raises:
        UnsupportedError: one of them, or one around them, is compiled.
    """
    around = {"the model": model, "its base model": base, "its decoder": decoder}
    for path in hooked:
        parts = path.split(".") if path else []
        inner = [".".join(parts[: i + 1]) for i in range(len(parts))]
        around |= {name: decoder.get_submodule(name) for name in inner}
    for name, module in around.items():
        if (
            uncompiled(module) is not module
            or module._compiled_call_impl is not None
            or hasattr(module.forward, "_torchdynamo_orig_callable")
        ):
            raise UnsupportedError(
                f"{name} is compiled, and its graph may have been traced without hooks; load the "
                "model anew, and enable pruning before torch.compile"
            )


def uncompiled(module: Any) -> Any:
    """The module inside the wrapper that torch.compile puts around it."""
    return getattr(module, "_orig_mod", module)


def replaced(what: str) -> UnsupportedError:
    """The error for a module that lost its hook."""
    return UnsupportedError(
        f"{what} was replaced after pruning was enabled, as adapters and quantisation do; disable "
        "pruning and enable it again"
    )


def check_inputs(module: nn.Module, decoder: Any, given: dict[str, Any]) -> None:
    """Refuse arguments of a forward call that pruning would make wrong.

    Args:
        module: the base model.
        decoder: its language model.
        given: the call's arguments by name.
    """
    if module.training and torch.is_grad_enabled():
        raise _refusal("training", "a dropped token has no output to learn from")
    for name, reason in _BY_LAYER.items():
        if given.get(name) or any(getattr(m.config, name, False) for m in (module, decoder)):
            raise _refusal(name, reason)
    positions = given.get("position_ids")
    if positions is None or given.get("attention_mask") is not None:
        return
    # without a mask transformers reads packed prompts off the text positions
    text = positions[0] if positions.ndim == 3 and len(positions) == 4 else positions
    if text.ndim == 2 and text.shape[1] > 1 and bool((text.diff(dim=-1) != 1).any()):
        raise _refusal("packed position_ids", "several prompts in one row cannot be told apart")


def check_labels(labels: torch.Tensor, rows: Sequence[Row]) -> None:
    """Refuse labels that are predicted by a token which may be dropped, as by padding.

    Args:
        labels: `[B, N]`, IGNORED where nothing is predicted. The label of a column is predicted by
            the column before it.
        rows: of the pass, at least one of which drops tokens.
    """
    unanswered = sum(
        label != IGNORED and row.may_lack(column - 1)
        for row, own in zip(rows, labels.tolist(), strict=True)
        for column, label in enumerate(own)
        if column > 0
    )
    if unanswered:
        raise UnsupportedError(
            f"labels without a prediction: {unanswered}, which follow a visual token that may be "
            f"dropped, or padding; set to {IGNORED} the labels of pictures, the one behind each "
            "picture and the one behind left padding"
        )


def check_generation(default: Any, policy: PruningPolicy, arguments: dict[str, Any]) -> None:
    """Refuse options of `generate` that cannot work with pruning.

    Args:
        default: the model's `GenerationConfig`.
        policy: what is pruned.
        arguments: arguments of the call by name.

    Raises:
        UnsupportedError: with the option, the reason and what to do.
    """
    config = copy.deepcopy(arguments.get("generation_config") or default)
    config.update(**{name: value for name, value in arguments.items() if hasattr(config, name)})
    mode = str(config.get_generation_mode(arguments.get("assistant_model")).value)
    if mode not in GENERATION_MODES:
        raise _refusal(mode.replace("_", " "), f"supported are {', '.join(GENERATION_MODES)}")
    if arguments.get("custom_generate") is not None:
        raise _refusal("custom_generate", "a decoding loop that was never tested with pruning")
    if config.cache_implementation not in (None, "dynamic"):
        raise _refusal(
            f"cache_implementation={config.cache_implementation!r}",
            "layers >= K need a cache that is shorter than below: the dynamic cache",
        )
    if config.use_cache is False and isinstance(policy.budget, FlopsReduction):
        raise _refusal(
            "use_cache=False under a flops budget", "the prompt, and so the budget, grows each step"
        )
    for name, reason in _REFUSED_OPTIONS.items():
        if getattr(config, name):
            raise _refusal(name, reason)


def refuse_continuous_batching(method: Callable[..., Any]) -> Callable[..., NoReturn]:
    """What takes the place of transformers' continuous batching while pruning is on."""

    @functools.wraps(method)
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise _refusal("continuous batching", "its paged cache has one length for all layers")

    return refuse


def _refusal(what: str, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"{what} does not work with pruning: {reason}; leave it out, or disable pruning first"
    )
