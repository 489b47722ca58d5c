"""The plots of the accuracy report."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no screen
import matplotlib.pyplot as plt

THICK = {"set-entropy": "black", "released": "tab:blue"}  # the others are thin


def plot_budgets(result: dict[str, Any], path: Path) -> None:
    """Accuracy over the share of kept tokens, a panel for each layer, with 95 % intervals."""
    curves: dict[int, dict[str, list[tuple[float, dict[str, Any]]]]] = {}
    for text, tasks in result["pruned"].items():
        found = re.fullmatch(r"layer=(\d+),keep=([\d.]+),method=(.+)", text)
        assert found is not None
        layer, share, method = int(found[1]), float(found[2]), found[3]
        curves.setdefault(layer, {}).setdefault(method, []).append((share, tasks["all"]))
    widest = max(map(len, curves.values()))
    panels = [layer for layer in sorted(curves) if len(curves[layer]) == widest]
    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 5), sharey=True)
    for axis, layer in zip(axes, panels, strict=True):
        for i, (method, points) in enumerate(curves[layer].items()):
            points.sort(key=lambda point: point[0])
            shares = [100 * share for share, _ in points]
            values = [100 * counts["accuracy"] for _, counts in points]
            ends = [[100 * end for end in counts["interval"]] for _, counts in points]
            color = THICK.get(method, plt.get_cmap("tab20")(i % 20))
            width = 2.5 if method in THICK else 1.0
            marker = "osD^v"[i % 5]
            axis.plot(shares, values, marker=marker, label=method, color=color, linewidth=width)
            axis.fill_between(shares, *zip(*ends, strict=True), color=color, alpha=0.1)
        axis.axhline(100 * result["unpruned"]["all"]["accuracy"], color="gray", linestyle="--")
        axis.set_title(f"pruned at layer {layer}")
        axis.set_xlabel("visual tokens kept, %")
    axes[0].set_ylabel("accuracy, %")
    axes[-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def plot_layers(result: dict[str, Any], methods: Sequence[str], path: Path) -> None:
    """Entropy entering each layer, and beside it accuracy when pruned there."""
    rows = result["layers"]
    layers = [row["layer"] for row in rows]
    figure, entropy = plt.subplots(figsize=(7, 4.5))
    entropy.plot(layers, [row["entropy"] for row in rows], color="gray", marker="s", linestyle=":")
    entropy.set_ylabel("median matrix entropy entering the layer (squares)")
    entropy.set_xlabel("layer at which pruning starts")
    accuracy = entropy.twinx()
    accuracy.set_ylabel("accuracy, %")
    for method in methods:
        values = [100 * row[method]["accuracy"] for row in rows]
        errors = [
            [
                value - 100 * row[method]["interval"][0]
                for value, row in zip(values, rows, strict=True)
            ],
            [
                100 * row[method]["interval"][1] - value
                for value, row in zip(values, rows, strict=True)
            ],
        ]
        color = THICK.get(method, "tab:orange")
        accuracy.errorbar(layers, values, errors, label=method, color=color, capsize=3)
    accuracy.set_ylim(0, 101)
    accuracy.legend(loc="lower right")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
