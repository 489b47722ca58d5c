"""The command line: `entropyprune run | calibrate | show | serve | eval | doctor | list`."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

import ep_core
from ep_core import demo, kernels
from ep_core.backend import Answer, Backend, Request, default_device
from ep_core.budget import layer_average
from ep_core.ecl import EntropyProfile, find_collapse_layer, plot_profile
from ep_core.errors import EntropyPruneError
from ep_core.plugins import ENV_BLOCK, registry
from ep_core.policy import ENV, EXAMPLE, PruningPolicy
from ep_core.spans import VisualSpan, plan

try:
    import click
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from ep_core.cli_common import (
        ModelFacts,
        OutputType,
        PictureType,
        PolicyType,
        backend_option,
        device_option,
        dtype_option,
        load_backend,
        model_option,
    )
    from ep_core.cli_eval import evaluate
except ImportError as error:  # one line instead of a traceback for a bare installation
    sys.exit(
        f"entropyprune: error: the command line needs {error.name}; "
        "run pip install 'entropyprune[cli]'"
    )


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(ep_core.__version__, prog_name="entropyprune")
@click.pass_context
def cli(context: click.Context) -> None:
    """Prune redundant visual tokens inside vision-language models."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


cli.add_command(evaluate)


def main() -> None:
    """Run the command line; every user error is one line on stderr and exit status 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():  # progress bars are for people
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        status = cli.main(standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt):
        sys.exit(130)
    except click.ClickException as error:
        _fail(error.format_message())
    except EntropyPruneError as error:
        _fail(str(error))
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        sys.exit(1)
    except OSError as error:
        _fail(str(error))
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str) -> None:
    click.echo(f"entropyprune: error: {message}", err=True)
    sys.exit(2)


@cli.command()
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
@click.option(
    "--policy", type=PolicyType(), help=f'Such as "{EXAMPLE}"; default: the variable {ENV}.'
)
@click.option(
    "--max-new-tokens", default=64, show_default=True, type=click.IntRange(min=1), metavar="N"
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
        facts.draw(images, answer, overlay)
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
    console = Console()
    if compare:
        console.print(_comparison(timed, facts))
    else:
        console.print(answer.text, highlight=False, markup=False)
    if answer.reason is not None:
        console.print(f"nothing was pruned: {answer.reason}", highlight=False, markup=False)
    if overlay is not None:
        console.print(f"overlay written to {overlay}", highlight=False)


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

    def visual(answer: Answer) -> int:
        return sum(len(span.kept) for span in answer.spans)

    table = Table(title=f"{facts.family.name}, {facts.policy}", title_justify="left")
    table.add_column()
    for name in ("unpruned", "pruned", "saved"):
        table.add_column(name, justify="right")

    def row(name: str, before: float | None, after: float | None, unit: str = ",") -> None:
        if before is None or after is None:
            return
        table.add_row(name, format(before, unit), format(after, unit), f"{1 - after / before:.1%}")

    seen = sum(span.stop - span.start for span in pruned.spans)
    table.add_row("answer", full.text, pruned.text, "")
    table.add_row("prompt tokens", str(full.prompt_tokens), str(pruned.prompt_tokens), "")
    if seen:
        row(f"visual tokens, layers {layer}-{layers - 1}", seen, visual(pruned))
    row("prefill GFLOPs (model)", facts.flops(full) / 1e9, facts.flops(pruned) / 1e9, ".3f")
    row("prompt KV slots, all layers", slots(full), slots(pruned))
    row("seconds, warm", full_seconds, pruned_seconds, ".3f")
    return table


@cli.command()
@backend_option
@model_option
@click.option(
    "--image",
    "images",
    multiple=True,
    required=True,
    type=PictureType(),
    help="Calibration picture.",
)
@click.option("--prompt", default="Describe the image.", show_default=True)
@click.option(
    "--layer",
    type=click.IntRange(min=1),
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
    engine = load_backend(backend)
    if not engine.capabilities.layer_entropies:
        raise EntropyPruneError(f"backend {backend!r} cannot measure layers; use transformers")
    samples: list[list[float]] = []
    device = device or default_device(engine)
    with engine.open(model, None, device=device, dtype=dtype) as session:
        for image in track(images, "measuring", console=Console(stderr=True)):
            samples += session.layer_entropies(Request((image, prompt)))
    profile = EntropyProfile(model.name, tuple(map(tuple, samples)))
    collapse = find_collapse_layer(profile)
    if out is not None:
        out.write_text(profile.to_json())
    if plot is not None:
        try:
            plot_profile(profile, collapse, plot)
        except ImportError:
            raise EntropyPruneError(
                "--plot needs matplotlib; run pip install 'entropyprune[plot]'"
            ) from None
    table = Table("entering layer", "median entropy", "drop")
    for i, value in enumerate(profile.median):
        drop = f"{profile.median[i - 1] - value:+.4f}" if i else ""
        table.add_row(str(i), f"{value:.4f}", drop)
    console = Console()
    console.print(table)
    if collapse.layer is not None:
        verdict = f"collapse layer {collapse.layer}: use layer={collapse.layer}"
    else:
        verdict = f"no collapse layer: layer={configured} stands"
    console.print(
        f"{verdict}\ncandidate {collapse.candidate}, drop {collapse.drop:.4f}: {collapse.reason}",
        highlight=False,
    )


@cli.command()
@model_option
@click.option("--policy", type=PolicyType(), help=f"Default: the variable {ENV}.")
@click.option("--image-tokens", type=click.IntRange(min=1), default=576, show_default=True)
@click.option("--text-tokens", type=click.IntRange(min=0), default=64, show_default=True)
def show(model: Path, policy: PruningPolicy | None, image_tokens: int, text_tokens: int) -> None:
    """Say what a policy means for a model: tokens, FLOPs, KV."""
    policy = policy or PruningPolicy.from_environment()
    if policy is None:
        raise EntropyPruneError(f'no policy: give --policy "{EXAMPLE}" or set {ENV}')
    facts = ModelFacts.of(model, policy)
    assert facts.policy is not None
    shape, layer = facts.shape, facts.layer
    prompt = image_tokens + text_tokens
    (kept,) = plan(
        facts.policy,
        [VisualSpan(0, image_tokens)],
        layer=layer,
        shape=shape,
        prompt_tokens=prompt,
    )
    average = layer_average(image_tokens, kept, layer=layer, layers=shape.layers)
    after = prompt - image_tokens + kept
    slots = layer * prompt + (shape.layers - layer) * after
    source = f" ({facts.family.default_layer_source})" if policy.layer == "auto" else ""
    table = Table(title=f"{facts.family.name}: {facts.policy}", title_justify="left")
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
    table.add_row("digest", facts.policy.digest)
    Console().print(table)


@cli.command(context_settings={"ignore_unknown_options": True})
@click.argument("engine")
@click.option(
    "--policy", type=PolicyType(), help=f'Such as "{EXAMPLE}"; default: the variable {ENV}.'
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def serve(engine: str, policy: PruningPolicy | None, arguments: tuple[str, ...]) -> None:
    """Start an engine's own server with pruning: `serve sglang --policy ... -- ARGUMENTS`."""
    policy = policy or PruningPolicy.from_environment()
    if policy is None:
        raise EntropyPruneError(f'no policy: give --policy "{EXAMPLE}" or set {ENV}')
    backend = load_backend(engine)
    failed = [status for status in backend.probe() if status.state == "FAILED"]
    if failed:
        raise EntropyPruneError(
            f"{failed[0].target}: {failed[0].detail}; run entropyprune doctor for all of them"
        )
    command = backend.server_command(arguments)
    os.environ[ENV] = str(policy)
    os.execv(command[0], command)


@cli.command()
def doctor() -> int:
    """Check this installation and each backend."""
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"entropyprune {ep_core.__version__}, Python {platform.python_version()}")
    console.print(f"torch {torch.__version__}, CUDA {'yes' if torch.cuda.is_available() else 'no'}")
    for device in ("cpu", "cuda"):
        console.print(f"kernels, {device}: {kernels.describe(device)}", markup=False)
    failed = False
    for name in (ENV, ENV_BLOCK):
        console.print(f"{name}={os.environ.get(name, '(not set)')}", markup=False)
    try:
        PruningPolicy.from_environment()
    except EntropyPruneError as error:
        failed = True
        console.print(f"  FAILED: {error}", markup=False)
    plugins = registry()
    for name in sorted(plugins.backends):
        try:
            backend = plugins.backends[name].load()
        except Exception as error:  # an engine that does not import can raise anything
            console.print(f"backend {name}: cannot be loaded ({error})", markup=False)
            continue
        packages = ", ".join(f"{key} {value}" for key, value in backend.versions().items())
        console.print(f"backend {name}: {packages}")
        statuses = backend.probe()
        for status in statuses:
            console.print(f"  {status.target}\n    {status}", markup=False)
        if any(status.state == "FAILED" for status in statuses):
            failed = True
            console.print(
                f"  this version of {name} does not fit; install a supported one, as in "
                f"pip install 'entropyprune[{name}]'",
                markup=False,
            )
    return 1 if failed else 0


@cli.command(name="list")
def list_() -> None:
    """List backends, model families and methods."""
    plugins = registry()
    table = Table("kind", "name", "what it is", "plugin")
    for name, spec in sorted(plugins.backends.items()):
        table.add_row("backend", name, spec.summary, plugins.providers[f"backend {name}"])
    for name, family in sorted(plugins.families.items()):
        what = f"{family.name}, layer {family.default_layer} by default"
        table.add_row("family", name, what, plugins.providers[f"family {name}"])
    for name, selector in sorted(plugins.selectors.items()):
        table.add_row("method", name, selector.summary, plugins.providers[f"selector {name}"])
    console = Console()
    console.print(table)
    console.print(f"demonstration model: {demo.MODEL}", soft_wrap=True, highlight=False)
    console.print(f"demonstration pictures: {demo.PICTURES}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
