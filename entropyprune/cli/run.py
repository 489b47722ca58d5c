"""`entropyprune run`: a question about pictures, answered with pruning."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
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
    policy_option,
)
from entropyprune.cli.overlay import draw_overlay
from ep_backends.shared.pictures import read_picture
from ep_core.backend import Answer, Backend, Request, default_device
from ep_core.errors import EntropyPruneError
from ep_core.policy import EXAMPLE, PruningPolicy


@click.command()
@backend_option
@model_option
@click.option(
    "--image",
    "images",
    multiple=True,
    type=PictureType(),
    help="Picture file; repeat for several. They come before the text.",
)
@click.option("--prompt", required=True, help="The text of the message.")
@policy_option
@click.option(
    "--max-new-tokens",
    default=64,
    show_default=True,
    type=click.IntRange(min=1),
    metavar="N",
    help="The answer ends here at the latest.",
)
@device_option
@dtype_option
@click.option("--compare", is_flag=True, help="Run unpruned too and show both side by side.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, alone on stdout.")
@click.option(
    "--overlay",
    type=OutputType(".png"),
    help="Write the pictures with dropped patches dimmed to this PNG.",
)
def run(
    backend: str,
    model: Path,
    images: tuple[Path, ...],
    prompt: str,
    policy: PruningPolicy | None,
    max_new_tokens: int,
    device: str | None,
    dtype: str | None,
    compare: bool,
    as_json: bool,
    overlay: Path | None,
) -> None:
    """Answer a question about pictures, greedily, with pruning."""
    policy = policy or PruningPolicy.from_environment()
    if overlay is not None and not images:
        raise EntropyPruneError("--overlay needs at least one --image")
    if compare and policy is None:
        raise EntropyPruneError(f'--compare needs a policy, such as --policy "{EXAMPLE}"')
    facts = ModelFacts.of(model, policy)
    engine = load_backend(backend)
    device = device or default_device(engine)
    request = Request((*images, prompt), max_new_tokens)
    timed = {"pruned": _ask(engine, model, facts.policy, request, device, dtype, warm=compare)}
    if compare:
        timed["unpruned"] = _ask(engine, model, None, request, device, dtype, warm=True)
    answer, _ = timed["pruned"]
    if overlay is not None:
        _draw(facts, images, answer, overlay)
    if as_json:
        result = _answer_json(answer)
        head = {
            "backend": backend,
            "model": str(model),
            "policy": str(facts.policy) if facts.policy else None,
        }
        if compare:
            result["unpruned"] = _answer_json(timed["unpruned"][0])
            result["seconds"] = {name: seconds for name, (_, seconds) in timed.items()}
        click.echo(json.dumps(head | result))
        return
    if compare:
        console().print(_comparison(timed, facts))
    else:
        click.echo(answer.text)
    if answer.reason is not None:
        click.echo(f"nothing was pruned: {answer.reason}")
    if overlay is not None:
        click.echo(f"overlay written to {overlay}")


def _ask(
    backend: Backend,
    model: Path,
    policy: PruningPolicy | None,
    request: Request,
    device: str,
    dtype: str | None,
    *,
    warm: bool,
) -> tuple[Answer, float]:
    """One answer and the seconds it took, the model's loading left out."""
    with backend.open(model, policy, device=device, dtype=dtype) as session:
        if warm:  # the first call pays for set-up that later ones do not
            session.generate([request])
        start = time.perf_counter()
        answer = session.generate([request])[0]
        return answer, time.perf_counter() - start


def _draw(facts: ModelFacts, images: tuple[Path, ...], answer: Answer, out: Path) -> None:
    """Draw the pictures with what was kept of each."""
    if len(answer.spans) != len(images):
        raise EntropyPruneError(f"no overlay: {answer.reason or 'the engine names no spans'}")
    grids = [
        facts.family.patch_grid(facts.config, span.stop - span.start, read_picture(path).size)
        for path, span in zip(images, answer.spans, strict=True)
    ]
    draw_overlay(images, answer.spans, grids, out)


def _answer_json(answer: Answer) -> dict[str, Any]:
    return {
        "spans": [span.to_json() for span in answer.spans],
        "output_ids": list(answer.output_ids),
        "text": answer.text,
        "kv": None
        if answer.kv is None
        else {"below": answer.kv.below, "from": answer.kv.from_layer},
        "reason": answer.reason,
    }


def _comparison(timed: dict[str, tuple[Answer, float]], facts: ModelFacts) -> Table:
    full, full_seconds = timed["unpruned"]
    pruned, pruned_seconds = timed["pruned"]
    layers, layer = facts.shape.layers, facts.layer

    def slots(answer: Answer) -> int | None:
        if answer.kv is None:
            return None
        return layer * answer.kv.below + (layers - layer) * answer.kv.from_layer

    def flops(answer: Answer) -> float:
        dropped = sum(span.stop - span.start - len(span.kept) for span in answer.spans)
        tokens = answer.prompt_tokens
        return facts.shape.prefill_flops(tokens, tokens - dropped, layer) / 1e9

    table = Table(title=f"{facts.family.name}, {facts.policy}", title_justify="left")
    table.add_column()
    for name in ("unpruned", "pruned", "saved"):
        table.add_column(name, justify="right")

    def row(name: str, before: float | None, after: float | None, unit: str = ",") -> None:
        if before is None or after is None:
            return
        table.add_row(name, format(before, unit), format(after, unit), f"{1 - after / before:.1%}")

    seen = sum(span.stop - span.start for span in pruned.spans)
    kept = sum(len(span.kept) for span in pruned.spans)
    table.add_row("answer", full.text, pruned.text, "")
    table.add_row("prompt tokens", str(full.prompt_tokens), str(pruned.prompt_tokens), "")
    if seen:
        row(f"visual tokens, layers {layer}-{layers - 1}", seen, kept)
    row("prefill GFLOPs (model)", flops(full), flops(pruned), ".3f")
    row("prompt KV slots, all layers", slots(full), slots(pruned))
    row("seconds, warm", full_seconds, pruned_seconds, ".3f")
    return table
