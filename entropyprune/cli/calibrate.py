"""`entropyprune calibrate`: the entropy of visual tokens, layer by layer."""

from __future__ import annotations

from pathlib import Path

import click
from rich.progress import track
from rich.table import Table

from entropyprune.cli.common import (
    ModelFacts,
    OutputType,
    PictureType,
    backend_option,
    console,
    device_option,
    dtype_option,
    load_backend,
    model_option,
)
from ep_core.backend import Request, default_device
from ep_core.ecl import EntropyProfile, find_collapse_layer
from ep_core.errors import EntropyPruneError


@click.command()
@backend_option
@model_option
@click.option(
    "--image",
    "images",
    multiple=True,
    required=True,
    type=PictureType(),
    help="Picture file; repeat for several.",
)
@click.option(
    "--prompt", default="Describe the image.", show_default=True, help="The text of each message."
)
@click.option(
    "--layer",
    type=click.IntRange(min=1),
    metavar="K",
    help="Layer that stands where no collapse is found; default: the family's.",
)
@click.option(
    "--out",
    type=OutputType(".json"),
    help="Write the entropy profile to this JSON file.",
)
@click.option(
    "--plot",
    type=OutputType(".png"),
    help="Draw the profile to this PNG file.",
)
@device_option
@dtype_option
def calibrate(
    backend: str,
    model: Path,
    images: tuple[Path, ...],
    prompt: str,
    layer: int | None,
    out: Path | None,
    plot: Path | None,
    device: str | None,
    dtype: str | None,
) -> None:
    """Look for the collapse layer over your pictures."""
    facts = ModelFacts.of(model, None)
    configured = facts.family.default_layer if layer is None else layer
    if configured >= facts.shape.layers:
        raise EntropyPruneError(
            f"--layer {configured} is out of range; allowed are 1 to {facts.shape.layers - 1}"
        )
    if plot is not None:
        try:
            from entropyprune.cli.plot import plot_profile
        except ModuleNotFoundError:
            raise EntropyPruneError(
                "--plot needs matplotlib; run pip install 'entropyprune[plot]'"
            ) from None
    engine = load_backend(backend)
    if not engine.capabilities.layer_entropies:
        raise EntropyPruneError(f"backend {backend!r} cannot measure layers; use transformers")
    samples: list[list[float]] = []
    device = device or default_device(engine)
    with engine.open(model, None, device=device, dtype=dtype) as session:
        for image in track(images, "measuring", console=console(stderr=True)):
            samples += session.layer_entropies(Request((image, prompt)))
    profile = EntropyProfile(model.name, tuple(map(tuple, samples)))
    collapse = find_collapse_layer(profile)
    if out is not None:
        out.write_text(profile.to_json())
    if plot is not None:
        plot_profile(profile, collapse, plot)
    table = Table("entering layer", "median entropy", "drop")
    for i, value in enumerate(profile.median):
        drop = f"{profile.median[i - 1] - value:+.4f}" if i else ""
        table.add_row(str(i), f"{value:.4f}", drop)
    console().print(table)
    if collapse.layer is not None:
        verdict = f"collapse layer {collapse.layer}: use layer={collapse.layer}"
    else:
        verdict = f"no collapse layer: layer={configured} stands"
    click.echo(verdict)
    click.echo(f"candidate {collapse.candidate}, drop {collapse.drop:.4f}: {collapse.reason}")
