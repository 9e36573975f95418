"""Plots of training, evaluation and inspection."""

from __future__ import annotations

from types import ModuleType
from typing import Dict, List, Sequence, Tuple

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from ..errors import DataError
from .history import evaluations, losses


def pyplot() -> ModuleType:
    """Return matplotlib's pyplot with the Agg backend, which needs no display."""
    matplotlib.use("Agg")
    return plt


def save_figure(figure: Figure, path: str) -> None:
    """Write a figure as PNG and close it."""
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_level_shares(shares: Dict[str, torch.Tensor], names: Sequence[str], path: str) -> None:
    """Plot :func:`panet_d2.analysis.level_shares` as PNG. The finest of ``names`` is first."""
    size = (5 * len(shares), 4)
    figure, axes = pyplot().subplots(1, len(shares), figsize=size, squeeze=False)
    for axis, (pooler, table) in zip(axes[0], shares.items()):
        for name, row in zip(names, table.tolist()):
            if row[-1]:
                label = f"{name}: {int(row[-1])} proposals"
                axis.plot(names, [100 * share for share in row[:-1]], "-o", label=label)
        axis.set(title=pooler.replace("_", " "), ylim=(0, 100))
        axis.set(xlabel="source level of the features", ylabel="share of the fused features, %")
        axis.legend(title="level by FPN's rule", fontsize=8)
    save_figure(figure, path)


def plot_training(runs: Dict[str, List[dict]], path: str) -> None:
    """
    Plot losses and AP by step as PNG, from the lines of ``metrics.json`` of each named run.

    Raises:
        DataError: if no run has any.
    """
    keys = {key for lines in runs.values() for line in lines for key in line}
    parts = sorted(key for key in keys if "loss" in key)
    tasks = sorted(key for key in keys if key.endswith("/AP"))
    titles = parts + tasks
    if not titles:
        raise DataError(f"{', '.join(runs)}: no losses yet; a run writes them every 20 steps.")
    columns = min(4, len(titles))
    rows = -(-len(titles) // columns)
    figure, axes = pyplot().subplots(rows, columns, figsize=(4 * columns, 3 * rows), squeeze=False)
    for axis, title in zip(axes.flat, titles):
        for name, lines in runs.items():
            by_step = evaluations(lines, title[: -len("/AP")]) if title in tasks else losses(lines)
            points = {step: line[title] for step, line in by_step.items() if title in line}
            style = "-o" if title in tasks or len(points) == 1 else "-"
            axis.plot(list(points), list(points.values()), style, ms=3, label=name)
        axis.set_title(title, fontsize=10)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("step", fontsize=8)
    axes[0][0].legend(fontsize=7)
    for axis in axes.flat[len(titles) :]:
        axis.set_visible(False)
    save_figure(figure, path)


def plot_precision_recall(curves: Dict[str, Tuple[np.ndarray, np.ndarray]], path: str) -> None:
    """Plot named results of :func:`panet_d2.analysis.precision_recall` as PNG."""
    figure, axis = pyplot().subplots(figsize=(5, 4.5))
    for name, (recall, precision) in curves.items():
        axis.plot(recall, precision, label=f"{name}, area {100 * precision.mean():.1f}")
    axis.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axis.legend(fontsize=8)
    save_figure(figure, path)


def draw_mask_paths(
    crops: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    fcn: Sequence[torch.Tensor],
    fc: Sequence[torch.Tensor],
) -> np.ndarray:
    """
    Draw one row per object: the image, then the mask probabilities of the FCN path, of the
    fully-connected path and of their sum. Each panel has the outline of the ground truth.

    Args:
        crops (sequence[np.ndarray]): the images within the boxes, RGB, uint8.
        masks (sequence[np.ndarray]): ground-truth masks of the crops, uint8, 0 and 1.
        fcn, fc (sequence[Tensor]): logits of shape (S, S), see
            :func:`panet_d2.analysis.mask_paths`.

    Returns:
        np.ndarray: RGB, uint8.
    """
    import cv2

    side = 160  # of each panel, in pixels
    titles = ("image and ground truth", "FCN path", "fully-connected path", "sum")
    bar = np.full((24, len(titles) * (side + 4), 3), 40, np.uint8)
    for i, title in enumerate(titles):
        at = (i * (side + 4) + 4, 16)
        cv2.putText(bar, title, at, cv2.FONT_HERSHEY_SIMPLEX, 0.4, (255,) * 3, 1, cv2.LINE_AA)
    rows = [bar]
    for crop, mask, a, b in zip(crops, masks, fcn, fc):
        mask = cv2.resize(mask, (side, side), interpolation=cv2.INTER_NEAREST)
        outline, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
        panels = [cv2.resize(crop, (side, side))]
        for logits in (a, b, a + b):
            probability = (255 * logits.float().sigmoid()).byte().cpu().numpy()
            panel = cv2.resize(probability, (side, side))
            panels.append(cv2.cvtColor(panel, cv2.COLOR_GRAY2RGB))
        for panel in panels:
            cv2.drawContours(panel, outline, -1, (255, 140, 0), 1, cv2.LINE_AA)
        framed = [cv2.copyMakeBorder(p, 2, 2, 2, 2, cv2.BORDER_CONSTANT) for p in panels]
        rows.append(np.concatenate(framed, axis=1))
    return np.concatenate(rows)
