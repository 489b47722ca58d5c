"""What several commands share: options, a checkpoint's facts, finding a policy and an engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from ep_backends.shared.pictures import read_picture
from ep_core.backend import DTYPES, Backend
from ep_core.budget import DecoderShape
from ep_core.checkpoint import read_config
from ep_core.errors import EntropyPruneError
from ep_core.family import Family
from ep_core.plugins import OURS, registry
from ep_core.policy import ENV, EXAMPLE, PruningPolicy
from ep_core.settings import Settings


class PolicyType(click.ParamType):  # type: ignore[type-arg] # generic from click 8.4 on only
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
    "--backend",
    default="transformers",
    show_default=True,
    metavar="NAME",
    help="Engine; see `entropyprune list`.",
)
policy_option = click.option(
    "--policy", type=PolicyType(), help=f'Such as "{EXAMPLE}"; default: the variable {ENV}.'
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


def console(*, stderr: bool = False) -> Console:
    """Where tables go; what a model says in a cell is printed as it is."""
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


@dataclass(frozen=True)
class ModelFacts:
    """What the command line reads of a checkpoint before an engine loads it."""

    config: dict[str, Any]
    family: Family
    shape: DecoderShape
    settings: Settings | None

    @classmethod
    def of(cls, model: Path, policy: PruningPolicy | None) -> ModelFacts:
        """Read config.json and settle the policy."""
        config = read_config(model)
        family = registry().family(config["model_type"])
        settings = None if policy is None else Settings.of(policy, config)
        return cls(config, family, family.decoder(config).shape, settings)

    @property
    def policy(self) -> PruningPolicy | None:
        """The policy with its layer settled, or None."""
        return None if self.settings is None else self.settings.policy

    @property
    def layer(self) -> int:
        """The pruning layer, or the number of layers where nothing is pruned."""
        return self.shape.layers if self.settings is None else self.settings.layer


def needed(policy: PruningPolicy | None) -> PruningPolicy:
    """The policy that was given, or that of the environment; an error if there is neither."""
    policy = policy or PruningPolicy.from_environment()
    if policy is None:
        raise EntropyPruneError(f'no policy: give --policy "{EXAMPLE}" or set {ENV}')
    return policy


def load_backend(name: str) -> Backend:
    """The engine of that name, imported; an error says how to install what is missing."""
    spec = registry().backend(name)
    try:
        return spec.load()
    except EntropyPruneError:
        raise
    except Exception as error:  # an engine that does not import can raise anything
        raise EntropyPruneError(
            f"backend {name!r} {why_not_loaded(name, error)}{remedy(name)}"
        ) from None


def why_not_loaded(name: str, error: Exception) -> str:
    """What an engine's failed import means: it is missing, or it is there and broken."""
    if isinstance(error, ModuleNotFoundError) and error.name == name:
        return "is not installed"
    return f"cannot be loaded ({error})"


def remedy(name: str) -> str:
    """How to install an engine that our backend supports; nothing for a stranger's backend."""
    if registry().providers[f"backend {name}"] not in OURS:
        return ""
    return f"; run pip install 'entropyprune[{name}]'"
