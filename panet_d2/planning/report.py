"""Tables and a plot of a dataset's fingerprint and of a plan."""

from __future__ import annotations

from typing import Any, Dict, List

import numpy as np
from tabulate import tabulate

from ..analysis.plots import pyplot, save_figure
from .anchors import scaled_sides
from .fingerprint import Fingerprint
from .plan import Plan

_MOST_CLASSES = 10  # in the table; the JSON file has all


def fingerprint_table(data: Fingerprint) -> str:
    """Return a dataset's fingerprint as tables."""
    summary: Dict[str, Any] = data.summary()
    quantiles = summary.pop("quantiles")
    classes = sorted(summary.pop("objects by class").items(), key=lambda c: -c[1])
    more = f", … ({len(classes)} classes)" if len(classes) > _MOST_CLASSES else ""
    summary["objects by class"] = (
        ", ".join(f"{name} {count}" for name, count in classes[:_MOST_CLASSES]) + more
    )
    rows = []
    for key, value in summary.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k}: {_number(v)}" for k, v in value.items())
        rows.append([key, _number(value)])
    facts = tabulate(rows, tablefmt="plain", disable_numparse=True)
    headers = ["quantiles", *(f"{100 * q:.0f} %" for q in quantiles.pop("at"))]
    table = [[key, *map(_number, values)] for key, values in quantiles.items()]
    return f"{facts}\n\n{tabulate(table, headers, 'plain', disable_numparse=True)}"


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def prediction_table(plan: Plan, data: Fingerprint, name: str) -> str:
    """Return a table of the shares of objects that anchors overlap, for the base and the plan."""
    rows: List[List[str]] = []
    for who, values in plan.prediction(data).items():
        scale = (plan.base if who == "base" else plan.cfg).INPUT
        shares = [f"{values[k]:.1%}" for k in ("IoU 0.5", "IoU 0.7")]
        size = f"{scale.MIN_SIZE_TEST}, at most {scale.MAX_SIZE_TEST}"
        rows.append([who, size, f"{values['side of small objects']:.1f} px", *shares])
    if not rows:
        return f"{name}: no objects, or no anchors on the levels of an FPN"
    headers = [
        name,
        "shorter edge",
        "a tenth of the objects is below",
        "some anchor has IoU 0.5",
        "0.7",
    ]
    return tabulate(rows, headers, "plain", disable_numparse=True)


def plot_plan(plan: Plan, data: Fingerprint, path: str) -> None:
    """
    Plot the sizes and aspect ratios of objects and anchors as PNG, for the base and the plan.
    """
    predicted = plan.prediction(data)
    figure, axes = pyplot().subplots(1, 2, figsize=(10, 4), sharex=True, sharey=True)
    for axis, cfg, title in zip(axes, (plan.base, plan.cfg), ("base", "plan")):
        node = cfg.MODEL.ANCHOR_GENERATOR
        sides = scaled_sides(cfg, data)
        axis.scatter(sides, data.aspect_ratios, s=3, alpha=0.3, lw=0, label="objects")
        ratios = np.ravel(node.ASPECT_RATIOS)
        for size in np.unique(np.ravel(node.SIZES)):
            axis.plot([size] * len(ratios), ratios, "_-", color="C1", ms=8, lw=1)
        axis.plot([], [], "_-", color="C1", label="anchors")
        share = predicted.get(title, {}).get("IoU 0.5")
        caption = f"; IoU 0.5 for {share:.1%}" if share is not None else ""
        axis.set(xscale="log", yscale="log", xlabel="root of the area, pixels at the test size")
        axis.set_title(f"{title}: shorter edge {cfg.INPUT.MIN_SIZE_TEST}{caption}", fontsize=10)
    axes[0].set_ylabel("height / width")
    axes[0].legend(fontsize=8)
    save_figure(figure, path)
