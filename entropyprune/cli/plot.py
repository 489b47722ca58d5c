"""Drawing an entropy profile. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ep_core.ecl import Collapse, EntropyProfile


def plot_profile(profile: EntropyProfile, collapse: Collapse, path: Path) -> None:
    """Draw the profile with its quartiles and the finding. Needs matplotlib."""

    values = np.array(profile.entropies)
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75), axis=0)
    layers = range(values.shape[1])
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(layers, values.T, color="0.8", linewidth=0.7)
    axes.fill_between(layers, low, high, alpha=0.3, label="middle half of the pictures")
    axes.plot(layers, middle, marker="o", label="median")
    if collapse.layer is not None:
        axes.axvline(collapse.layer, color="C3", linestyle="--", label=f"layer={collapse.layer}")
        verdict = f"collapse layer {collapse.layer}"
    else:
        verdict = "no collapse layer"
    axes.set(
        xlabel="entering layer",
        ylabel="matrix entropy of the visual tokens",
        title=f"{profile.model}: {verdict} ({len(values)} pictures)",
        xticks=list(layers),
    )
    axes.legend()
    figure.savefig(path, dpi=150)
