"""The two plots of the report as inline SVG; the only file that imports matplotlib."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from veneer.train.extras import require

_PANELS = 12  # kinds of weight that get a panel of their own; the rest share the last


def loss_plot(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Training and held-out loss over steps."""
    figure = _figure(8, 3.4)
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("heldout_loss", "held-out", "o--")):
        points = [(row["step"], row[key]) for row in metrics if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set_xlabel("step")
    axes.set_ylabel("loss per token (nats)")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(frameon=False)
    return _svg(figure)


def norm_plot(norms: Mapping[str, float]) -> str:
    """Bars of the relative update, one panel for each kind of weight, one bar for each layer."""
    panels = group_by_kind(norms)
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = _figure(9, 1.9 * rows + 0.4)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    flat = [axes for row in grid for axes in row]
    for axes, (kind, values) in zip(flat, panels.items(), strict=False):
        axes.bar(range(len(values)), values, width=0.8)
        axes.set_title(kind, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(axis="y", alpha=0.3)
    for axes in flat[len(panels) :]:
        axes.axis("off")
    for axes in grid[-1]:
        axes.set_xlabel("layer", fontsize=8)
    return _svg(figure)


def group_by_kind(norms: Mapping[str, float]) -> dict[str, list[float]]:
    """Weights that differ only in a number in their name belong together, in the order of the model."""
    kinds: dict[str, list[float]] = defaultdict(list)
    for name, value in norms.items():
        kinds[re.sub(r"\.\d+\.", ".*.", name)].append(value)
    if len(kinds) <= _PANELS:
        return dict(kinds)
    shown = list(kinds)[: _PANELS - 1]
    rest = [value for kind, values in kinds.items() if kind not in shown for value in values]
    return {**{kind: kinds[kind] for kind in shown}, "others": rest}


def _figure(width: float, height: float) -> Any:
    # the object interface and no pyplot: no display is needed, and no global state of a notebook is changed
    figures = require("matplotlib.figure", "plotting the report")
    return figures.Figure(figsize=(width, height), layout="constrained")


def _svg(figure: Any) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
