"""Plots of what training, evaluation and inspection have measured."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Dict, List, Sequence, Tuple

import cv2
import numpy as np
import torch

from .history import evaluations, losses

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "draw_mask_paths",
    "plot_level_shares",
    "plot_precision_recall",
    "plot_training",
    "pyplot",
    "save_figure",
]


def pyplot() -> ModuleType:
    """Matplotlib's pyplot, imported only where something is drawn, and without a window."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def save_figure(figure: Figure, path: str) -> None:
    """Write a figure as a PNG and let go of it."""
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot().close(figure)


def plot_level_shares(shares: Dict[str, torch.Tensor], names: Sequence[str], path: str) -> None:
    """
    Args:
        shares (dict[str, Tensor]): see :func:`panet_d2.analysis.level_shares`.
        names (sequence[str]): of the levels, from fine to coarse.
        path (str): the PNG to write.
    """
    plt = pyplot()
    figure, axes = plt.subplots(1, len(shares), figsize=(5 * len(shares), 4), squeeze=False)
    for axis, (pooler, table) in zip(axes[0], shares.items()):
        for name, row in zip(names, table.tolist()):
            if row[-1]:
                label = f"{name}: {int(row[-1])} proposals"
                axis.plot(names, [100 * share for share in row[:-1]], "-o", label=label)
        axis.set_title(pooler.replace("_", " "))
        axis.set_xlabel("level that the features come from")
        axis.set_ylabel("share of the fused features, %")
        axis.set_ylim(0, 100)
        axis.legend(title="level by FPN's rule", fontsize=8)
    save_figure(figure, path)


def plot_training(runs: Dict[str, List[dict]], path: str) -> None:
    """
    Draw losses and AP by step.

    Args:
        runs (dict[str, list[dict]]): lines of each run's ``metrics.json``, by the run's name.
        path (str): the PNG to write.
    """
    plt = pyplot()
    keys = {key for lines in runs.values() for line in lines for key in line}
    parts = sorted(key for key in keys if "loss" in key)
    tasks = sorted(key for key in keys if key.endswith("/AP"))
    titles = parts + tasks
    columns = min(4, len(titles))
    rows = -(-len(titles) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 3 * rows), squeeze=False)
    for axis, title in zip(axes.flat, titles):
        for name, lines in runs.items():
            by_step = evaluations(lines, title[: -len("/AP")]) if title in tasks else losses(lines)
            points = {step: line[title] for step, line in by_step.items() if title in line}
            style = "-o" if title in tasks else "-"
            axis.plot(list(points), list(points.values()), style, ms=3, label=name)
        axis.set_title(title, fontsize=10)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("step", fontsize=8)
    axes[0][0].legend(fontsize=7)
    for axis in axes.flat[len(titles) :]:
        axis.set_visible(False)
    save_figure(figure, path)


def plot_precision_recall(curves: Dict[str, Tuple[np.ndarray, np.ndarray]], path: str) -> None:
    """
    Args:
        curves (dict): recalls and precisions, see :func:`panet_d2.analysis.precision_recall`,
            by name.
        path (str): the PNG to write.
    """
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(5, 4.5))
    for name, (recall, precision) in curves.items():
        axis.plot(recall, precision, label=f"{name}, area {100 * precision.mean():.1f}")
    axis.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axis.legend(fontsize=8)
    save_figure(figure, path)


def draw_mask_paths(
    crops: Sequence[np.ndarray],
    truths: Sequence[np.ndarray],
    fcn: torch.Tensor,
    fc: torch.Tensor,
    side: int = 160,
) -> np.ndarray:
    """
    One row for each object: the image, then the masks of the FCN path, of the fully-connected
    path and of their sum, as probabilities, each with the outline of the truth.

    Args:
        crops (sequence[np.ndarray]): M pieces of images within the boxes, RGB, uint8.
        truths (sequence[np.ndarray]): the true masks of these, uint8, 0 and 1.
        fcn (Tensor): logits of shape (M, S, S), see :func:`panet_d2.analysis.mask_paths`.
        fc (Tensor): the same of the fully-connected path.
        side (int): of each panel, in pixels.

    Returns:
        np.ndarray: RGB, uint8.
    """
    titles = ("image and truth", "FCN path", "fully-connected path", "sum")
    bar = np.full((24, len(titles) * (side + 4), 3), 40, np.uint8)
    for i, title in enumerate(titles):
        at = (i * (side + 4) + 4, 16)
        cv2.putText(bar, title, at, cv2.FONT_HERSHEY_SIMPLEX, 0.4, (255,) * 3, 1, cv2.LINE_AA)
    rows = [bar]
    for crop, truth, a, b in zip(crops, truths, fcn, fc):
        truth = cv2.resize(truth, (side, side), interpolation=cv2.INTER_NEAREST)
        outline, _ = cv2.findContours(truth, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
        panels = [cv2.resize(crop, (side, side), interpolation=cv2.INTER_LINEAR)]
        for logits in (a, b, a + b):
            probability = (255 * logits.float().sigmoid()).byte().cpu().numpy()
            panel = cv2.resize(probability, (side, side), interpolation=cv2.INTER_LINEAR)
            panels.append(cv2.cvtColor(panel, cv2.COLOR_GRAY2RGB))
        for panel in panels:
            cv2.drawContours(panel, outline, -1, (255, 140, 0), 1, cv2.LINE_AA)
        framed = [cv2.copyMakeBorder(p, 2, 2, 2, 2, cv2.BORDER_CONSTANT) for p in panels]
        rows.append(np.concatenate(framed, axis=1))
    return np.concatenate(rows)
