"""What differs in SGLang from one model family to the next, and which models pruning does not fit.

The table speaks of SGLang 0.5.23. A family that is not in it, from a plugin, works wherever
SGLang runs it with a model of its own whose decoder fits the hooks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ep_backends.sglang.ledger import LAYER_INPUTS
from ep_core.errors import UnsupportedError
from ep_core.family import Config
from ep_core.settings import Settings


@dataclass(frozen=True)
class Differences:
    """What differs for one family.

    Attributes:
        works: what of the family is proven, or why nothing is, as a phrase for tables.
        refusal: `config.json -> why a checkpoint does not work`, as a sentence, or None.
        half_only: architectures that SGLang runs in float16 whatever is asked.
    """

    works: str = ""
    refusal: Callable[[Config], str | None] = lambda config: None
    half_only: tuple[str, ...] = ()


def _llava(config: Config) -> str | None:
    architecture = architecture_of(config)
    if architecture == "LlavaForConditionalGeneration":
        return (
            "SGLang 0.5.23 cannot run LLaVA-1.5 checkpoints in Hugging Face layout, pruned or not; "
            "use one in the original layout (LlavaLlamaForCausalLM)"
        )
    if architecture != "LlavaLlamaForCausalLM" or config.get("image_aspect_ratio") != "pad":
        return (
            "of LLaVA's original layout only LLaVA-1.5 was tested with pruning: "
            'LlavaLlamaForCausalLM with "image_aspect_ratio": "pad", whose pictures are not cut '
            "into tiles"
        )
    return None


def _internvl(config: Config) -> str:
    return (
        f"SGLang 0.5.23 runs {architecture_of(config)} with transformers' model code, which the "
        "hooks do not fit"
    )


FAMILIES: Mapping[str, Differences] = {
    "internvl": Differences(
        works="no: SGLang runs it with transformers' model code", refusal=_internvl
    ),
    "llava": Differences(
        works="original layout (`LlavaLlamaForCausalLM`), in float16",
        refusal=_llava,
        half_only=("LlavaLlamaForCausalLM",),
    ),
    "qwen2_5_vl": Differences(works="yes"),
    "qwen2_vl": Differences(works="yes"),
}


def differences(config: Config) -> Differences:
    """What differs for a checkpoint's family."""
    return FAMILIES.get(config["model_type"], Differences())


def architecture_of(config: Config) -> str:
    """The class that a checkpoint asks for, "" where it names none."""
    return str(next(iter(config.get("architectures") or ()), ""))


def check_checkpoint(config: Config) -> None:
    """Refuse checkpoints that SGLang cannot run, or not in a way that pruning fits.

    Raises:
        UnsupportedError: why, and what works.
    """
    if reason := differences(config).refusal(config):
        raise UnsupportedError(reason)


def check_model(config: Any, settings: Settings) -> None:
    """Refuse models that the pools and hooks do not fit.

    Args:
        config: SGLang's `ModelConfig`.
        settings: for this model.

    Raises:
        UnsupportedError: with the property.
    """
    check_checkpoint(settings.config)
    if config.is_hybrid_swa or getattr(config.hf_text_config, "use_sliding_window", False):
        raise UnsupportedError("a decoder with sliding-window attention is not supported")
    if settings.decoder.query_norm:
        raise UnsupportedError("a decoder that normalises its queries is not supported in SGLang")
    from sglang.srt.model_loader.utils import get_resolved_model_impl

    # what was asked for is refused with the arguments; this is SGLang's own fallback
    if config.model_impl in ("auto", "sglang") and get_resolved_model_impl(config) != "sglang":
        raise UnsupportedError(
            f"SGLang runs {architecture_of(settings.config)} with transformers' model code, which "
            "the hooks do not fit"
        )


def check_decoder(layers: Sequence[Any], layer: int) -> None:
    """Refuse decoders that the hooks do not fit.

    Args:
        layers: of SGLang's model.
        layer: K.

    Raises:
        UnsupportedError: with what the decoder lacks.
    """
    first = layers[0]
    attention = first.self_attn
    for module in (first, attention):
        inputs = tuple(inspect.signature(module.forward).parameters)
        if inputs[: len(LAYER_INPUTS)] != LAYER_INPUTS:
            raise UnsupportedError(
                f"{type(module).__name__} takes {', '.join(inputs)}; pruning relies on "
                f"{', '.join(LAYER_INPUTS)}, in this order"
            )
        if "residual" in inputs:
            raise UnsupportedError(
                f"{type(module).__name__} is given its residual apart, which pruning would not cut"
            )
    missing = [name for name in ("qkv_proj", "q_size", "head_dim") if not hasattr(attention, name)]
    if missing:
        raise UnsupportedError(
            f"{type(attention).__name__} has no {', '.join(missing)}, which pruning relies on"
        )
    if hasattr(attention, "q_norm"):
        raise UnsupportedError("a decoder that normalises its queries is not supported in SGLang")
    if layers[layer].self_attn.attn.sliding_window_size > 0:
        raise UnsupportedError("a decoder with sliding-window attention is not supported")
