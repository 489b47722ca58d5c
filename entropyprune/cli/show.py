"""`entropyprune show`: what a policy means for a model, from its config.json alone."""

from __future__ import annotations

from pathlib import Path

import click
from rich.table import Table

from entropyprune.cli.common import console, model_option, needed, policy_option
from ep_core.budget import layer_average
from ep_core.checkpoint import read_config
from ep_core.plan import Run, Unit
from ep_core.policy import PruningPolicy
from ep_core.settings import Settings


@click.command()
@model_option
@policy_option
@click.option(
    "--image-tokens",
    type=click.IntRange(min=1),
    default=576,
    show_default=True,
    metavar="N",
    help="Visual tokens of one picture.",
)
@click.option(
    "--text-tokens",
    type=click.IntRange(min=0),
    default=64,
    show_default=True,
    metavar="N",
    help="The prompt's other tokens.",
)
def show(model: Path, policy: PruningPolicy | None, image_tokens: int, text_tokens: int) -> None:
    """Say what a policy means for a model: tokens, FLOPs, KV."""
    policy = needed(policy)
    settings = Settings.of(policy, read_config(model))
    shape, layer, family = settings.shape, settings.layer, settings.family
    prompt = image_tokens + text_tokens
    (kept,) = settings.counts([Unit((Run(0, image_tokens),))], prompt)
    average = layer_average(image_tokens, kept, layer=layer, layers=shape.layers)
    after = prompt - image_tokens + kept
    slots = layer * prompt + (shape.layers - layer) * after
    source = f" ({family.default_layer_source})" if policy.layer == "auto" else ""
    table = Table(title=f"{family.name}: {settings.policy}", title_justify="left")
    table.add_column("for one picture")
    table.add_column("", justify="right")
    table.add_row("visual tokens / text tokens", f"{image_tokens} / {text_tokens}")
    table.add_row("layers", f"{shape.layers}, pruned from layer {layer}{source}")
    table.add_row("keep (tokens after the layer)", f"{kept} ({kept / image_tokens:.1%})")
    table.add_row("average (over all layers)", f"{average:.1f} ({average / image_tokens:.1%})")
    reduction = shape.flops_reduction(prompt, after, layer)
    table.add_row("flops (prefill reduction)", f"{reduction:.1%}")
    table.add_row(
        "prefill TFLOPs, unpruned -> pruned",
        f"{shape.prefill_flops(prompt, prompt, 0) / 1e12:.4g} -> "
        f"{shape.prefill_flops(prompt, after, layer) / 1e12:.4g}",
    )
    table.add_row(
        "prompt KV slots, unpruned -> pruned",
        f"{shape.layers * prompt:,} -> {slots:,} ({1 - slots / (shape.layers * prompt):.1%} less)",
    )
    console().print(table)
