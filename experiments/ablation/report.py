"""The ablation's results for people: a table, and plots."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from statistics import mean
from typing import Dict, List

from tabulate import tabulate

from panet_d2.analysis.plots import pyplot, save_figure
from panet_d2.errors import DataError

from .rungs import GROUPS, LADDER, RUNGS, overrides
from .runner import differing_key
from .statistics import paired_difference, standard_error

__all__ = ["load_results", "plot_curves", "plot_differences", "table"]

Results = Dict[str, Dict[int, dict]]  # by rung and seed

# What rungs differ in.
_RUNG_KEYS = {k for rung in RUNGS.values() for k in overrides(rung, resnet_norm="BN")[::2]}

_BASELINE, _FULL = list(LADDER)[0], list(LADDER)[-1]

_GROUP_TITLES = {
    "ladder": "The ladder",
    "alone": "Each part alone, compared with Mask R-CNN",
    "without": "The whole without a part, compared with the whole",
    "ideas": "Bottom-up path, adaptive pooling and fusion, compared with Mask R-CNN trained alike",
    "fusion": "How and where levels are fused, compared with the whole",
}


def load_results(folder: str) -> Results:
    """
    Args:
        folder (str): where the runs' JSON files are.

    Returns:
        dict[str, dict[int, dict]]: the runs, by rung and seed.

    Raises:
        DataError: if they differ in more than rung and seed, and so cannot be compared.
    """
    results: Results = defaultdict(dict)
    firsts: Dict[str, tuple] = {}  # name and settings of the first file: of all, and of each rung
    for name in sorted(os.listdir(folder)):
        if name.endswith(".json"):
            with open(os.path.join(folder, name)) as f:
                run = json.load(f)
            if run.get("rung") not in RUNGS:
                continue
            own = run.get("settings", {})
            shared = {k: v for k, v in own.items() if k not in _RUNG_KEYS}
            for kind, settings in (("all", shared), (run["rung"], own)):
                first, others = firsts.setdefault(kind, (name, settings))
                key = differing_key(settings, others)
                if key:
                    raise DataError(
                        f"{folder} holds runs that cannot be compared: {key} is "
                        f"{settings.get(key)} in {name}, {others.get(key)} in {first}."
                    )
            results[run["rung"]][run["seed"]] = run
    return dict(results)


def _by_seed(results: Results, rung: str, metric: str) -> Dict[int, float]:
    return {seed: run["results"][metric] for seed, run in results[rung].items()}


def _mean_and_error(values: List[float]) -> str:
    error = standard_error(values)
    return f"{mean(values):.1f}" if error != error else f"{mean(values):.1f} ± {error:.1f}"


def table(results: Results, models: Dict[str, dict]) -> str:
    """
    Args:
        results (dict): see :func:`load_results`.
        models (dict[str, dict]): "million_parameters" and "gflops" by rung; and, if they were
            timed side by side, "seconds_per_step" and "seconds_per_image", which are otherwise the
            runs' own.

    Returns:
        str: Markdown tables, one for each group of rungs that has results.
    """
    lines: List[str] = []
    for group, rungs in GROUPS.items():
        rows = []
        for name, rung in rungs.items():
            runs = results.get(name)
            if not runs:
                continue
            row = [rung.title, len(runs)]
            masks = list(_by_seed(results, name, "segm/AP").values())
            row.append(_mean_and_error(masks))
            row.append(_difference(results, name, rung.compared_with))
            if group == "ladder":
                row.append(_difference(results, name, _BASELINE if name != _BASELINE else ""))
            for metric in ("segm/AP50", "segm/AP75", "segm/APs", "segm/APm", "segm/APl"):
                # COCO says nan where there are no objects of a size.
                values = [v for v in _by_seed(results, name, metric).values() if v == v]
                row.append(f"{mean(values):.1f}" if values else "-")
            row.append(_mean_and_error(list(_by_seed(results, name, "bbox/AP").values())))
            model = models.get(name, {})
            for key in ("seconds_per_step", "seconds_per_image"):
                # What other work of the machine slows is a run, not the comparison side by side.
                seconds = model.get(key) or mean(run[key] for run in runs.values())
                row.append(f"{1e3 * seconds:.0f}")
            row.append(f"{model['million_parameters']:.1f}" if model else "-")
            row.append(f"{model['gflops']:.1f}" if model else "-")
            rows.append(row)
        if not rows:
            continue
        headers = ["model", "seeds", "mask AP", "difference [95 %]"]
        if group == "ladder":
            headers[-1:] = ["from the row above [95 %]", f"from {LADDER[_BASELINE].title} [95 %]"]
        headers += ["AP50", "AP75"]
        headers += ["APs", "APm", "APl", "box AP", "ms/step", "ms/image", "M params", "GFLOPs"]
        lines += [f"### {_GROUP_TITLES[group]}", ""]
        lines += [tabulate(rows, headers, tablefmt="github", disable_numparse=True), ""]
    return "\n".join(lines)


def _difference(results: Results, name: str, other: str) -> str:
    if not other or other not in results:
        return ""
    ours, theirs = (_by_seed(results, rung, "segm/AP") for rung in (name, other))
    if not ours.keys() & theirs.keys():
        return ""
    d = paired_difference(ours, theirs)
    return _signed(d.mean) + (f" [{_signed(d.low)}, {_signed(d.high)}]" if d.pairs > 1 else "")


def _signed(value: float) -> str:
    text = f"{value:+.1f}"
    return "0.0" if float(text) == 0 else text


def plot_curves(results: Results, path: str) -> None:
    """
    Draw mask AP over training, the mean over seeds, for the rungs of the ladder; and its last half
    once more by itself, where they lie close together.

    Args:
        results (dict): see :func:`load_results`.
        path (str): the PNG to write.
    """
    plt = pyplot()
    figure, (whole, last) = plt.subplots(1, 2, figsize=(11, 4.5))
    for name, rung in GROUPS["ladder"].items():
        if name not in results:
            continue
        points: Dict[int, List[float]] = defaultdict(list)
        for run in results[name].values():
            for step, ap in run["curve"].items():
                points[int(step)].append(ap)
        means = [(step, mean(points[step])) for step in sorted(points)]
        whole.plot(*zip(*means), "-o", ms=3, label=rung.title)
        half = [(step, ap) for step, ap in means if 2 * step >= means[-1][0]]
        last.plot(*zip(*half), "-o", ms=3)
    for axis in (whole, last):
        axis.set_xlabel("steps")
    whole.set_ylabel("mask AP, validation")
    whole.set_ylim(bottom=0)
    last.set_title("the last half", fontsize=10)
    if whole.has_data():
        whole.legend(fontsize=8)
    save_figure(figure, path)


def plot_differences(results: Results, path: str) -> None:
    """
    Draw each rung's difference from the one that it is compared with, and the whole ladder's, with
    their intervals.

    Args:
        results (dict): see :func:`load_results`.
        path (str): the PNG to write.
    """
    plt = pyplot()
    rows = []
    compared = [(name, rung.compared_with) for name, rung in RUNGS.items()]
    compared.insert(len(LADDER), (_FULL, _BASELINE))
    for name, below in compared:
        if name in results and below in results:
            ours, theirs = (_by_seed(results, r, "segm/AP") for r in (name, below))
            if ours.keys() & theirs.keys():
                rows.append((f"{name} against {below}", paired_difference(ours, theirs)))
    figure, axis = plt.subplots(figsize=(7, 1 + 0.3 * len(rows)))
    for i, (_, d) in enumerate(rows):
        if d.pairs > 1:
            axis.plot([d.low, d.high], [i, i], color="C0")
        axis.plot([d.mean], [i], "o", color="C0")
    axis.axvline(0, color="0.6", lw=1)
    axis.set_yticks(range(len(rows)), [label for label, _ in rows])
    axis.invert_yaxis()
    axis.set_xlabel("difference in mask AP, and its 95 % interval")
    save_figure(figure, path)
