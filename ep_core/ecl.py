"""The Entropy Collapse Layer: at which layer the visual tokens' entropy drops, if it does.

The paper prunes where the matrix entropy of the visual tokens drops sharply and names no rule
for finding that layer; the rule here is ours. It may answer "none": then the configured layer
stands.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from ep_core.errors import EntropyPruneError

BOOTSTRAP_RESAMPLES = 1000
MIN_SAMPLES = 4
MIN_OTHER_LAYERS = 3  # fewer have no spread to compare with
MIN_SHARE_OF_RESAMPLES = 0.95
MIN_SHARE_OF_SAMPLES = 0.6
MIN_STANDARD_DROP = 3.0
MAD_TO_STANDARD_DEVIATION = 1.4826  # of a normal distribution: 1 / its quantile of 3/4


@dataclass(frozen=True)
class EntropyProfile:
    """Matrix entropy of visual tokens entering each layer, over a calibration set.

    Attributes:
        model: what was measured.
        entropies: `[samples][layers]`, each in [0, 1]; sample s, layer l is the entropy of one
            picture's tokens at the input of layer l (see `ep_core.entropy.layer_entropy`).
    """

    model: str
    entropies: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        widths = {len(sample) for sample in self.entropies}
        if len(widths) != 1 or min(widths) < 3:
            raise EntropyPruneError(
                "an entropy profile needs at least one sample and the same 3 or more layers in "
                f"each, got {len(self.entropies)} samples of {sorted(widths)} layers"
            )
        if not all(0 <= value <= 1 for sample in self.entropies for value in sample):
            raise EntropyPruneError("an entropy profile holds numbers in [0, 1]")

    @property
    def median(self) -> list[float]:
        """Median over the samples, for each layer."""
        median: list[float] = np.median(self.entropies, axis=0).tolist()
        return median

    def to_json(self) -> str:
        """The profile as JSON text; `from_json` reads it back unchanged."""
        return json.dumps({"model": self.model, "entropies": self.entropies}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> EntropyProfile:
        """Read what `to_json` wrote."""
        try:
            value: dict[str, Any] = json.loads(text)
            return cls(value["model"], tuple(tuple(map(float, s)) for s in value["entropies"]))
        except EntropyPruneError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise EntropyPruneError(f"this is no entropy profile: {error!r}") from None


@dataclass(frozen=True)
class Collapse:
    """What the finder says of a profile.

    Attributes:
        layer: the collapse layer, to be used as `layer=` in a policy, or None.
        candidate: the layer with the largest median drop, accepted or not.
        drop: that drop of entropy between the inputs of layers `candidate - 1` and `candidate`.
        standard_drop: the drop in robust standard deviations of the other layers' drops.
        share_of_resamples: bootstrap resamples of the samples that pick the same layer.
        share_of_samples: samples in which the entropy falls there.
        reason: why the candidate was accepted, or the first reason why not.
    """

    layer: int | None
    candidate: int
    drop: float
    standard_drop: float
    share_of_resamples: float
    share_of_samples: float
    reason: str


def find_collapse_layer(profile: EntropyProfile, *, seed: int = 0) -> Collapse:
    """Find the layer before which the entropy drops most, or say that none stands out.

    The drop of a layer is the median over samples. It is stated in standard deviations of the other
    layers' drops, which their median absolute deviation estimates. The largest is accepted if it
    is positive in at least 60 % of the samples, at least 3 standard deviations, and the same in at
    least 95 % of 1000 bootstrap resamples of the samples. Fewer than 4 samples are never enough.
    """
    values = np.array(profile.entropies)  # [S, L]
    drops = values[:, :-1] - values[:, 1:]  # [S, L-1], column l-1 is the drop before layer l
    median = np.median(drops, axis=0)
    best = int(median.argmax())
    others = np.delete(median, best)
    deviation = float(np.median(np.abs(others - np.median(others))))
    spread = MAD_TO_STANDARD_DEVIATION * deviation + 1e-12
    standard_drop = float((median[best] - np.median(others)) / spread)
    samples = len(values)
    resamples = np.random.default_rng(seed).integers(0, samples, (BOOTSTRAP_RESAMPLES, samples))
    picks = np.median(drops[resamples], axis=1).argmax(axis=1)
    share_of_resamples = float((picks == best).mean())
    share_of_samples = float((drops[:, best] > 0).mean())
    refusals = [
        (samples < MIN_SAMPLES, f"{samples} samples are too few, {MIN_SAMPLES} are needed"),
        (
            len(others) < MIN_OTHER_LAYERS,
            f"{len(others) + 2} layers are too few, {MIN_OTHER_LAYERS + 2} are needed",
        ),
        (median[best] <= 0, "the entropy falls before no layer"),
        (
            standard_drop < MIN_STANDARD_DROP,
            f"the drop is {standard_drop:.1f} standard deviations of the other layers' drops, "
            f"{MIN_STANDARD_DROP:.0f} are needed",
        ),
        (
            share_of_samples < MIN_SHARE_OF_SAMPLES,
            f"the entropy falls there in {share_of_samples:.0%} of the samples, "
            f"{MIN_SHARE_OF_SAMPLES:.0%} are needed",
        ),
        (
            share_of_resamples < MIN_SHARE_OF_RESAMPLES,
            f"{share_of_resamples:.0%} of the bootstrap resamples agree, "
            f"{MIN_SHARE_OF_RESAMPLES:.0%} are needed",
        ),
    ]
    reasons = [reason for refused, reason in refusals if refused]
    return Collapse(
        layer=None if reasons else best + 1,
        candidate=best + 1,
        drop=float(median[best]),
        standard_drop=standard_drop,
        share_of_resamples=share_of_resamples,
        share_of_samples=share_of_samples,
        reason=reasons[0] if reasons else "it stands out and the resamples agree",
    )
