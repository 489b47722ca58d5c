"""The hooks in a decoder's layers, and the seam between layers K-1 and K.

- layer K-1: read the query states or attention maps, where the selector wants them;
- the seam, before layer K: choose the tokens, cut the hidden states and what else layers get by
  token, tell the cache which columns come, build the mask that fits them;
- each later layer: hand it what belongs to the shorter hidden states;
- the last layer: spread its output back to the columns of the batch.

A family that adds features of its pictures to the hidden states between layers (DeepStack) does so
before the seam, where every token is still there: `Settings.of` sees to it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.masking_utils import create_causal_mask

from ep_backends.transformers.batch import ForwardPass, Grid, PaddedPass
from ep_backends.transformers.cache import Slots, pruned_layer
from ep_core.errors import UnsupportedError
from ep_core.selectors import Selector

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Hook:
    """A hook before or after a module.

    torch.compile does not trace it but calls it between two graphs: a traced hook would lose what
    the hook of one module leaves for the next.

    Attributes:
        path: of the module in the decoder, "" for the decoder itself.
        when: "before" it runs, with its arguments by name too, or "after".
        run: what to do.
    """

    path: str
    when: Literal["before", "after"]
    run: Callable[..., Any]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *given: Any) -> Any:
        """Run it, as torch calls hooks."""
        return self.run(*given)

    def __reduce__(self) -> NoReturn:
        # a copy of the model would keep hooks that act on the original
        raise UnsupportedError("a model cannot be copied or pickled while pruning is on")

    def attach(self, decoder: nn.Module) -> RemovableHandle:
        """Register it."""
        module = decoder.get_submodule(self.path)
        if self.when == "before":
            return module.register_forward_pre_hook(self, with_kwargs=True)
        return module.register_forward_hook(self)


class Thread(threading.local):
    """What one thread does; every thread may run the model."""

    grids: Sequence[Grid] = ()  # of the pictures in a call of `generate`
    labels: torch.Tensor | None = None  # from the model's hook to its base model's
    planned: ForwardPass | None = None  # from the base model's hook to the decoder's
    current: ForwardPass | None = None  # while the decoder runs
    latest: PaddedPass | None = None  # what ran through the decoder last

    def forget(self) -> None:
        """Let go of a pass that an exception ended: its tensors may be large."""
        self.planned = self.current = self.labels = None


@dataclass
class LayerHooks:
    """The hooks in the layers of one decoder.

    Attributes:
        selector: ranks the tokens.
        layer: K.
        layers: of the decoder.
        config: of the decoder, in transformers' own class.
        head_dim: of its queries.
        query_norm: are its queries normalised per head?
        digest: of the policy, for caches.
        thread: of whoever calls the model.
    """

    selector: Selector
    layer: int
    layers: int
    config: Any
    head_dim: int
    query_norm: bool
    digest: str
    thread: Thread = field(default_factory=Thread)

    def __iter__(self) -> Iterator[Hook]:
        attention = f"layers.{self.layer - 1}.self_attn"
        if "queries" in self.selector.needs:
            projection = "q_norm" if self.query_norm else "q_proj"
            yield Hook(f"{attention}.{projection}", "after", self._read_queries)
        if "attention" in self.selector.needs:
            yield Hook(attention, "after", self._read_attention)
        yield Hook(f"layers.{self.layer}", "before", self._seam)
        for later in range(self.layer + 1, self.layers):
            yield Hook(f"layers.{later}", "before", self._before_later_layer)
        yield Hook(f"layers.{self.layers - 1}", "after", self._after_last_layer)

    def _read_queries(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        current = self.thread.current
        if current is not None and current.shortened is not None:
            current.queries = output.reshape(current.shortened.tokens, -1, self.head_dim)

    def _read_attention(self, module: nn.Module, args: Any, output: Any) -> None:
        current = self.thread.current
        if current is not None and current.shortened is not None:
            current.attention = output[1][..., current.cached :]

    def _seam(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Inputs | None:
        """Between layers K-1 and K: cut what layers get by token."""
        current = self.thread.current
        if current is None or not current.acts:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]  # [B, N, d]
        if (prefill := current.shortened) is None:
            new = torch.arange(current.cached, current.shown.shape[1], device=hidden.device)
            columns = new.expand(len(hidden), -1)
        else:
            self._choose(prefill, current, hidden)
            columns = prefill.kept_columns(current.cached)
            hidden = prefill.cut(hidden)
            rotary = kwargs["position_embeddings"]  # cos and sin, each [B or 1, N, head_dim]
            current.later_inputs["position_embeddings"] = tuple(map(prefill.cut, rotary))
        padded = prefill is not None and prefill.uneven
        slots = Slots(columns, padded, current.shown.shape[1], self.digest)
        cache = kwargs.get("past_key_values")
        if cache is not None:
            slots = pruned_layer(cache, self.layer).announce(slots)
        mask = None
        # layers >= K need one where those below do, and where rows are padded
        if slots.padded or kwargs.get("attention_mask") is not None:
            # said anew in each pass, for an earlier turn's tail may become padding
            shown = current.shown.to(hidden.device)  # layers may be spread over devices
            shown = shown.take_along_dim(slots.columns.clamp_min(0), 1) & (slots.columns >= 0)
            mask = create_causal_mask(
                config=self.config,
                inputs_embeds=hidden,
                attention_mask=shown,
                past_key_values=cache,
                layer_idx=self.layer,
                allow_is_causal_skip=False,  # whether it hides anything would have to be waited for
            )
        current.later_inputs["attention_mask"] = mask
        current.steps += 1
        kwargs = kwargs | current.later_inputs
        if args:
            return (hidden, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": hidden}

    def _choose(self, prefill: PaddedPass, current: ForwardPass, hidden: torch.Tensor) -> None:
        maps = current.attention
        behind = None if maps is None else lambda unit: prefill.attention_of(unit, maps)
        prefill.choose(self.selector, hidden.flatten(0, 1), current.queries, attention=behind)
        current.queries = current.attention = None  # they are large, and not read again

    def _before_later_layer(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> Inputs | None:
        current = self.thread.current
        if current is None or not current.acts:
            return None
        current.steps += 1
        return args, kwargs | current.later_inputs

    def _after_last_layer(
        self, module: nn.Module, args: Any, output: torch.Tensor
    ) -> torch.Tensor | None:
        current = self.thread.current
        if current is None or not current.acts:
            return None
        self.check_steps(current, self.steps - 1)
        current.steps += 1
        return None if current.shortened is None else current.shortened.spread_columns(output)

    @property
    def steps(self) -> int:
        """Hooks of layers >= K that run in a pass."""
        return self.layers - self.layer + 1

    def check_steps(self, current: ForwardPass, expected: int) -> None:
        """Refuse to go on where a layer ran without its hook."""
        if current.steps != expected:
            raise UnsupportedError(
                f"only {current.steps} of {expected} hooks ran in the decoder's layers, so the "
                "answer would be wrong; disable pruning and enable it again"
            )
