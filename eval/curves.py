"""One picture of a run: training and held-out loss over the steps, and the accuracy under both markers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .accuracy import Accuracy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, told apart by colour-blind readers too
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")


def read_metrics(path: Path) -> list[dict[str, float | str]]:
    """Return the lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def draw_curves(
    metrics: list[dict[str, float | str]], accuracy: Mapping[str, Accuracy], path: Path, title: str
) -> None:
    """Write a PNG; without accuracies it shows the losses alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10 if accuracy else 7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2 if accuracy else 1, squeeze=False, width_ratios=[3, 1] if accuracy else [1])[0]
    _draw_losses(panels[0], metrics)
    if accuracy:
        _draw_accuracy(panels[1], accuracy)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)


def _draw_losses(axes: "Axes", metrics: list[dict[str, float | str]]) -> None:
    train = [m for m in metrics if m["kind"] == "train"]
    heldout = [m for m in metrics if m["kind"] == "heldout"]
    axes.plot([m["step"] for m in train], [m["loss"] for m in train], color="#999999", label="training")
    names = [name for name in (heldout[0] if heldout else {}) if name not in ("step", "kind", "all")]
    for name, color in zip(names, _COLORS * len(names), strict=False):
        steps, losses = [m["step"] for m in heldout], [m[name] for m in heldout]
        axes.plot(steps, losses, color=color, marker="o", markersize=3.5, label=f"held-out {name}")
    axes.set(xlabel="step", ylabel="loss (nats per trained token)", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)


def _draw_accuracy(axes: "Axes", accuracy: Mapping[str, Accuracy]) -> None:
    shares = [100 * a.share for a in accuracy.values()]
    errors = [
        [100 * (a.share - a.low) for a in accuracy.values()],
        [100 * (a.high - a.share) for a in accuracy.values()],
    ]
    bars = axes.bar(
        [f"{name} marker" for name in accuracy], shares, yerr=errors, capsize=4, color=_COLORS[: len(shares)]
    )
    axes.bar_label(bars, [f"{share:.1f} %" for share in shares], label_type="center", color="white")
    axes.set(ylim=(0, 105), ylabel="held-out questions answered right (%)")
