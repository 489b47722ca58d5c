"""The pruning policy: one frozen value, spelled the same in the environment, JSON and CLI."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

from ep_core.budget import BUDGETS, Budget
from ep_core.errors import PolicyError

ENV = "ENTROPYPRUNE"
EXAMPLE = "layer=2,keep=128,method=released"
DEFAULT_METHOD = "released"

_KEYS = ("layer", *BUDGETS, "method", "min_tokens")
METHOD_NAME = re.compile(r"[\w.-]+")
_INTEGER = re.compile(r"[+-]?\d{1,18}")


@dataclass(frozen=True)
class PruningPolicy:
    """What is pruned, where, and by which method.

    Attributes:
        layer: the first decoder layer that sees the kept tokens only, 1 <= layer < layers, or
            "auto" for the default of the model's family.
        budget: `Keep`, `LayerAverage` or `FlopsReduction`, applied to each picture.
        method: name of a selector.
        min_tokens: spans of at most this many tokens are left whole.
    """

    layer: int | Literal["auto"]
    budget: Budget
    method: str = DEFAULT_METHOD
    min_tokens: int = 0

    def __post_init__(self) -> None:
        if self.layer != "auto" and (
            isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 1
        ):
            raise PolicyError(
                f"layer={self.layer} is not allowed; use an integer of at least 1, or auto, as "
                "in layer=2"
            )
        if not isinstance(self.budget, tuple(BUDGETS.values())):
            raise PolicyError(f"budget={self.budget!r} is no budget; an example is Keep(128)")
        if not isinstance(self.method, str) or not METHOD_NAME.fullmatch(self.method):
            raise PolicyError(f"method={self.method!r} is no name; an example is method=released")
        if (
            isinstance(self.min_tokens, bool)
            or not isinstance(self.min_tokens, int)
            or self.min_tokens < 0
        ):
            raise PolicyError(
                f"min_tokens={self.min_tokens} is not allowed; use an integer of at least 0, as "
                "in min_tokens=64"
            )

    @classmethod
    def parse(cls, text: str) -> PruningPolicy:
        """Read `layer=2,keep=128,method=released`, or the same as a JSON object.

        Raises:
            PolicyError: with what was wrong, what is allowed and an example.
        """
        if text.lstrip().startswith("{"):
            try:
                value = json.loads(text, object_pairs_hook=_without_repeats)
            except json.JSONDecodeError as error:
                raise PolicyError(
                    f"the policy is no valid JSON: {error}; an example is "
                    '{"layer": 2, "keep": 128}'
                ) from None
            return cls.from_json(value)
        fields: list[tuple[str, Any]] = []
        for item in text.split(","):
            key, equals, value = (part.strip() for part in item.partition("="))
            if not equals or not key or not value:
                raise PolicyError(f"cannot read {item.strip()!r} in the policy, as in {EXAMPLE!r}")
            fields.append((key, value if key == "method" else _number(value)))
        return cls.from_json(_without_repeats(fields))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> PruningPolicy:
        """Read the object that `to_json` writes."""
        if not isinstance(value, Mapping):
            raise PolicyError(f"the policy must be a JSON object, got {value!r}")
        unknown = [key for key in value if key not in _KEYS]
        if unknown:
            raise PolicyError(
                f"the policy has no setting {unknown[0]!r}; there are {', '.join(_KEYS)}, as in "
                f"{EXAMPLE!r}"
            )
        budgets = [key for key in BUDGETS if key in value]
        if len(budgets) != 1:
            found = "both " + " and ".join(budgets) if budgets else "none"
            raise PolicyError(
                f"the policy needs one budget out of {', '.join(BUDGETS)}, got {found}; "
                f"an example is {EXAMPLE!r}"
            )
        if "layer" not in value:
            raise PolicyError(f"the policy needs a layer, as in {EXAMPLE!r}, or layer=auto")
        rest = {key: value[key] for key in ("method", "min_tokens") if key in value}
        return cls(value["layer"], BUDGETS[budgets[0]](value[budgets[0]]), **rest)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> PruningPolicy | None:
        """The policy in `ENTROPYPRUNE`, or None where nothing is set."""
        text = environ.get(ENV, "").strip()
        return cls.parse(text) if text else None

    def to_json(self) -> dict[str, Any]:
        """The policy as a JSON object, defaults of no effect left out."""
        fields = {"layer": self.layer, self.budget.key: self.budget.value, "method": self.method}
        return fields | ({"min_tokens": self.min_tokens} if self.min_tokens else {})

    def __str__(self) -> str:
        return ",".join(f"{key}={value}" for key, value in self.to_json().items())

    @property
    def digest(self) -> str:
        """12 hex digits that differ where policies differ: a namespace for caches of prefixes."""
        return hashlib.sha256(str(self).encode()).hexdigest()[:12]

    def at_layer(self, default: int, layers: int) -> PruningPolicy:
        """The policy with its layer settled for a model.

        Args:
            default: the family's layer, taken for "auto".
            layers: decoder layers of the model.

        Raises:
            PolicyError: no layer would be left to prune.
        """
        layer = default if self.layer == "auto" else self.layer
        if layer >= layers:
            raise PolicyError(
                f"layer={layer} is out of range for a model of {layers} layers; allowed are 1 to "
                f"{layers - 1}"
            )
        return replace(self, layer=layer)


@contextmanager
def no_policy_in_environment() -> Iterator[None]:
    """Inside, `ENTROPYPRUNE` is not set: a session prunes by its own argument alone."""
    value = os.environ.pop(ENV, None)
    try:
        yield
    finally:
        os.environ.pop(ENV, None)
        if value is not None:
            os.environ[ENV] = value


def _without_repeats(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in fields]
    if repeated := [key for key in keys if keys.count(key) > 1]:
        raise PolicyError(f"{repeated[0]} is given twice; an example is {EXAMPLE!r}")
    return dict(fields)


def _number(text: str) -> int | float | str:
    """`2` is an integer, `0.5` a decimal, anything else stays text for the field's own check."""
    if _INTEGER.fullmatch(text):
        return int(text)
    try:
        return float(text)
    except ValueError:
        return text
