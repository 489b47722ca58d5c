"""What several commands of the command line share: options, a model's facts, finding an engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ep_core.backend import DTYPES, Answer, Backend
from ep_core.budget import DecoderShape
from ep_core.checkpoint import read_config
from ep_core.errors import EntropyPruneError
from ep_core.family import Family
from ep_core.overlay import draw_overlay
from ep_core.pictures import read_picture
from ep_core.plugins import registry
from ep_core.policy import PruningPolicy


class PolicyType(click.ParamType[PruningPolicy]):
    """A policy in one line or as JSON."""

    name = "policy"

    def convert(self, value: Any, param: Any, ctx: Any) -> PruningPolicy:
        """Read it; a `PolicyError` says what is allowed."""
        return value if isinstance(value, PruningPolicy) else PruningPolicy.parse(value)


class PictureType(click.Path):
    """An existing file that Pillow can read."""

    def __init__(self) -> None:
        super().__init__(exists=True, dir_okay=False, path_type=Path)

    def convert(self, value: Any, param: Any, ctx: Any) -> Path:
        """The file's path, once Pillow has read it."""
        path = Path(str(super().convert(value, param, ctx)))
        read_picture(path)
        return path


class OutputType(click.Path):
    """A file to write; its folder and ending are checked before any work is done."""

    def __init__(self, ending: str) -> None:
        super().__init__(dir_okay=False, path_type=Path)
        self._ending = ending

    def convert(self, value: Any, param: Any, ctx: Any) -> Path:
        """The file's path, once it is known that it can be written."""
        path = Path(str(super().convert(value, param, ctx)))
        if path.suffix.lower() != self._ending:
            raise EntropyPruneError(f"{path}: the file must end in {self._ending}")
        if not path.absolute().parent.is_dir():
            raise EntropyPruneError(f"{path}: there is no such folder")
        return path


model_option = click.option(
    "--model",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of a checkpoint in Hugging Face layout.",
)
backend_option = click.option(
    "--backend", default="transformers", show_default=True, help="Engine; see `entropyprune list`."
)
device_option = click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    help="Default: cuda where there is one, else cpu.",
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Default: the checkpoint's.",
)


@dataclass(frozen=True)
class ModelFacts:
    """What the command line reads of a checkpoint before an engine loads it."""

    config: dict[str, Any]
    family: Family
    shape: DecoderShape
    policy: PruningPolicy | None

    @classmethod
    def of(cls, model: Path, policy: PruningPolicy | None) -> ModelFacts:
        """Read config.json and settle the policy's layer."""
        config = read_config(model)
        family = registry().family(config["model_type"])
        shape = family.decoder(config).shape
        if policy is not None:
            policy = policy.at_layer(family.default_layer, shape.layers)
            registry().selector(policy.method)
        return cls(config, family, shape, policy)

    @property
    def layer(self) -> int:
        """The pruning layer, or the number of layers where nothing is pruned."""
        return self.shape.layers if self.policy is None else int(self.policy.layer)

    def flops(self, answer: Answer) -> int:
        """Prefill FLOPs of the language model for an answered prompt."""
        dropped = sum(span.stop - span.start - len(span.kept) for span in answer.spans)
        tokens = answer.prompt_tokens
        return self.shape.prefill_flops(tokens, tokens - dropped, self.layer)

    def draw(self, images: tuple[Path, ...], answer: Answer, out: Path) -> None:
        """Draw the pictures with what was kept of each."""
        if len(answer.spans) != len(images):
            raise EntropyPruneError(f"no overlay: {answer.reason or 'the engine names no spans'}")
        grids = [
            self.family.patch_grid(self.config, span.stop - span.start, read_picture(path).size)
            for path, span in zip(images, answer.spans, strict=True)
        ]
        draw_overlay(images, answer.spans, grids, out)


def load_backend(name: str) -> Backend:
    """The engine of that name, imported; an error says how to install what is missing."""
    try:
        return registry().backend(name).load()
    except EntropyPruneError:
        raise
    except Exception as error:  # an engine that does not import can raise anything
        raise EntropyPruneError(
            f"backend {name!r} cannot be loaded ({error}); run pip install 'entropyprune[{name}]'"
        ) from None
