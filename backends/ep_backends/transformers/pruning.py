"""Switching pruning on in a transformers model, and what is decided around its decoder.

A forward call comes by three hooks before it reaches the layers (`layers.py`):

- the model's: has anything been replaced since `enable`, and are there labels?
- the base model's: refuse what cannot work, find the pictures, plan what each keeps;
- the decoder's: hand the plan to the layers; afterwards, see that they carried it out.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from ep_backends.transformers.batch import ForwardPass, PaddedPass, Row, plan_rows
from ep_backends.transformers.cache import check_cache, slots_of
from ep_backends.transformers.families import picture_grids
from ep_backends.transformers.layers import Hook, LayerHooks
from ep_backends.transformers.ledger import GENERATE, LEDGER
from ep_backends.transformers.refusals import (
    check_decoder,
    check_generation,
    check_inputs,
    check_labels,
    check_not_compiled,
    refuse_continuous_batching,
    replaced,
    uncompiled,
)
from ep_core.errors import UnsupportedError
from ep_core.patching import Patches
from ep_core.plan import Reason, RequestPlan
from ep_core.policy import PruningPolicy
from ep_core.report import PruneCounters, RequestRecord
from ep_core.settings import Settings

_ACTIVE = "_entropyprune"  # on a decoder: its Pruning
_NOTHING = PaddedPass()


def enable(model: PreTrainedModel, policy: PruningPolicy | str) -> Pruning:
    """Prune visual tokens in a loaded transformers model until the handle is disabled.

    Args:
        model: a vision-language model of a known family.
        policy: what to prune, as a value or as text such as `"layer=2,keep=0.25"`.

    Returns:
        A handle, usable as a context manager. Disabling it restores the model to the bit.

    Raises:
        UnsupportedError: the model or its attention implementation cannot be pruned.
        PolicyError: the policy cannot be read or does not fit the model.
    """
    if isinstance(policy, str):
        policy = PruningPolicy.parse(policy)
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(
            f"{type(model).__name__} is no transformers model; of a wrapper such as PEFT's, "
            "enable what it wraps, as in enable(model.get_base_model(), policy)"
        )
    LEDGER.warn_if_untested()
    settings = Settings.of(policy, model.config.to_dict())
    settings.family.find(settings.config, ())  # refuses a checkpoint whose pictures it cannot find
    decoder = model.get_decoder()
    if active := getattr(decoder, _ACTIVE, None):
        raise UnsupportedError(
            f"pruning is already on with {active.policy}; disable it before enabling another"
        )
    check_decoder(decoder, settings)
    return Pruning(model, settings)


class Pruning:
    """Pruning that is switched on for one model. Made by `enable`.

    Attributes:
        policy: the policy, its layer settled.
        counters: totals over the prompts of all prefill passes since pruning was switched on.
    """

    def __init__(self, model: PreTrainedModel, settings: Settings) -> None:
        self.policy = settings.policy
        self.counters = PruneCounters()
        self._settings = settings
        self._base, self._decoder = model.base_model, model.get_decoder()
        self._layers = LayerHooks(
            settings.selector,
            settings.layer,
            len(self._decoder.layers),
            self._decoder.config,
            settings.shape.head_dim,
            settings.decoder.query_norm,
            settings.policy.digest,
        )
        self._thread = self._layers.thread
        self._latest: PaddedPass | None = None  # of any thread
        self._counting = threading.Lock()
        self._on = True  # a compiled graph may call hooks that were removed
        self._patches = Patches()
        try:
            self._attach(model)
        except BaseException:
            self.disable()
            raise

    @property
    def records(self) -> list[RequestRecord]:
        """One record for each row of the latest prefill; reading waits for the device.

        Of this thread's own prefills; a thread that ran none sees the latest of any thread.
        """
        latest = self._thread.latest or self._latest
        return [] if latest is None else latest.records()

    def disable(self) -> None:
        """Remove every hook; the model is as it was before `enable`. Twice does nothing."""
        self._on = False
        self._patches.undo()
        self._thread.forget()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.disable()

    @property
    def _hooks(self) -> Iterator[Hook]:
        """Every hook in the decoder."""
        yield Hook("", "before", self._before_decoder)
        yield Hook("", "after", self._after_decoder)
        yield from self._layers

    def _attach(self, model: PreTrainedModel) -> None:
        base, decoder = self._base, self._decoder
        self._hooked = {hook.path: decoder.get_submodule(hook.path) for hook in self._hooks}
        check_not_compiled(model, base, decoder, self._hooked)
        self._signatures = {m: inspect.signature(m.forward) for m in (model, base, decoder)}
        setattr(decoder, _ACTIVE, self)
        self._patches.add(lambda: delattr(decoder, _ACTIVE))
        handles = [Hook("", "before", self._before_base).attach(base)]
        if model is not base:
            handles.append(Hook("", "before", self._before_model).attach(model))
        handles += [hook.attach(decoder) for hook in self._hooks]
        for handle in handles:
            self._patches.add(handle.remove)
        if model.can_generate():
            make = functools.partial(self._checked, model)
            self._patches.replace(model, "generate", make, parameters=GENERATE)
            for name in ("generate_batch", "init_continuous_batching"):
                self._patches.replace(model, name, refuse_continuous_batching)

    def _checked(self, model: Any, generate: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(generate)

        @functools.wraps(generate)
        def checked(*args: Any, **kwargs: Any) -> Any:
            self._check_base(model)
            given = _by_name(signature, args, kwargs)
            check_generation(model.generation_config, self.policy, given)
            # it may compute the features of pictures itself, and tells the model nothing of them
            self._thread.grids = picture_grids(self._settings.config, given)
            try:
                return generate(*args, **kwargs)
            finally:
                self._thread.grids = ()

        return checked

    def _check_base(self, model: Any) -> None:
        if uncompiled(model.base_model) is not self._base:
            raise replaced("its base model")

    def _before_model(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if self._on:
            self._check_base(module)
            self._thread.labels = _by_name(self._signatures[module], args, kwargs).get("labels")

    def _before_base(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Plan this pass."""
        thread = self._thread
        labels, thread.labels, thread.planned = thread.labels, None, None
        if not self._on:
            return
        given = _by_name(self._signatures[module], args, kwargs)
        cache = given.get("past_key_values")
        cached = cache.get_seq_length() if isinstance(cache, Cache) else 0
        inputs = given.get("input_ids")
        if inputs is None:
            inputs = given["inputs_embeds"]
        rows, columns = inputs.shape[:2]
        decode = columns == 1 and cached > 0
        if not decode:
            thread.latest = _NOTHING
        check_inputs(module, self._decoder, given)
        continues = cache is not None and check_cache(cache, self.policy)
        mask = given.get("attention_mask")
        if mask is None:
            mask = torch.ones(rows, cached + columns, device=inputs.device)
        elif not isinstance(mask, torch.Tensor) or mask.shape != (rows, cached + columns):
            raise UnsupportedError(
                "pruning needs the attention_mask [batch, tokens] that says which tokens are "
                "padding; got another kind of mask"
            )
        thread.planned = current = ForwardPass(mask.bool(), cached, continues)
        if decode:
            return
        self._check_in_place(module)
        grids = picture_grids(self._settings.config, given) or thread.grids
        plans = plan_rows(self._settings, inputs, current.shown, cached, grids)
        current.prefill = PaddedPass(rows=plans, columns=columns)
        if labels is not None and current.shortened is not None:
            check_labels(labels, plans)

    def _check_in_place(self, base: Any) -> None:
        """Refuse a model some of whose modules with hooks were replaced."""
        if uncompiled(base.get_decoder()) is not self._decoder:
            raise replaced("its decoder")
        for path, module in self._hooked.items():
            try:
                found = uncompiled(self._decoder.get_submodule(path))
            except AttributeError:  # a wrapper on the way to it
                found = None
            if found is not module:
                raise replaced(path)

    def _before_decoder(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        thread = self._thread
        # a pass that an exception ended may have left its state behind
        thread.current, thread.planned = thread.planned, None
        if self._on and thread.current is None:
            thread.current = self._unplanned(_by_name(self._signatures[module], args, kwargs))

    def _unplanned(self, given: dict[str, Any]) -> ForwardPass:
        """A call of the decoder without the model around it, which says where pictures are."""
        cache = given.get("past_key_values")
        if isinstance(cache, Cache) and slots_of(cache) is not None:
            raise UnsupportedError(
                "continue the cache of a pruned prompt by calling the model, not its decoder alone"
            )
        inputs = given.get("inputs_embeds")
        if inputs is None:
            inputs = given["input_ids"]
        rows, columns = inputs.shape[:2]
        detail = "the decoder was called by itself"
        plan = RequestPlan.whole((), columns, Reason.NOT_FOUND, detail)
        prefill = PaddedPass(rows=[Row(plan)] * rows, columns=columns) if columns > 1 else None
        return ForwardPass(torch.ones(rows, columns, dtype=torch.bool), prefill=prefill)

    def _after_decoder(self, module: nn.Module, args: Any, output: Any) -> None:
        current, self._thread.current = self._thread.current, None
        if current is None or not self._on:
            return
        if current.acts:
            self._layers.check_steps(current, self._layers.steps)
        if current.prefill is not None:
            with self._counting:
                for row in current.prefill.rows:
                    self.counters.add(row.plan)
                self._thread.latest = self._latest = current.prefill


def _by_name(signature: inspect.Signature, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    given = dict(signature.bind_partial(*args, **kwargs).arguments)
    others: dict[str, Any] = given.pop("kwargs", {})
    return given | others
