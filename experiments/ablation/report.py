"""The tables and the plots of the ablation's results."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from math import isnan, nan
from typing import Any, Dict, List, NamedTuple, Optional

import pandas as pd
from scipy.stats import ttest_rel

from panet_d2.analysis.plots import pyplot, save_figure
from panet_d2.errors import DataError

from .rungs import GROUPS, LADDER, RUNGS, overrides
from .runner import differing_key

__all__ = [
    "Difference",
    "load_results",
    "markdown",
    "paired_difference",
    "plot_curves",
    "plot_differences",
    "table",
    "with_interval",
]

Results = Dict[str, Dict[int, dict]]  # by rung and seed

# The config keys that rungs differ in.
_RUNG_KEYS = {k for rung in RUNGS.values() for k in overrides(rung, resnet_norm="BN")[::2]}

_BASELINE, _FULL = list(LADDER)[0], list(LADDER)[-1]

_GROUP_TITLES = {
    "ladder": "The ladder",
    "alone": "Each part alone, compared with Mask R-CNN",
    "without": "Full PANet without one part, compared with full PANet",
    "layers": "BPA and AFP, compared with BPA alone",
    "ideas": "BPA, AFP and FF together, compared with Mask R-CNN with the same norms",
    "fusion": "How and where levels are fused, compared with full PANet",
}


class Difference(NamedTuple):
    """A mean difference and its 95 % confidence interval, which is nan for a single pair."""

    mean: float
    low: float
    high: float


def load_results(folder: str) -> Results:
    """
    Args:
        folder (str): the folder of the runs' JSON files.

    Returns:
        dict[str, dict[int, dict]]: the runs, by rung and seed.

    Raises:
        DataError: if settings differ that the rungs do not set, or differ between seeds of a rung.
    """
    results: Results = defaultdict(dict)
    firsts: Dict[str, tuple] = {}  # name and settings of the first file of all and of each rung
    for name in sorted(os.listdir(folder)):
        if name.endswith(".json"):
            with open(os.path.join(folder, name), encoding="utf-8") as f:
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


def paired_difference(ours: pd.Series, theirs: pd.Series) -> Optional[Difference]:
    """
    Compare two models by the seeds that both were trained with. The seed sets the order of the
    data, so differences within pairs vary less than the values.

    Args:
        ours, theirs (Series): one value for each seed.

    Returns:
        Difference: ours minus theirs; None without a common seed.
    """
    ours, theirs = ours.align(theirs, join="inner")
    if ours.empty:
        return None
    mean = (ours - theirs).mean()
    if len(ours) == 1:
        return Difference(mean, nan, nan)
    return Difference(mean, *ttest_rel(ours, theirs).confidence_interval(0.95))


def _by_seed(results: Results, rung: str, metric: str) -> pd.Series:
    values = {seed: run["results"][metric] for seed, run in results[rung].items()}
    return pd.Series(values, dtype=float)  # the JSON files have null for nan


def _difference(results: Results, rung: str, other: str) -> Optional[Difference]:
    """Difference in mask AP; None where the two rungs have no runs to compare."""
    if rung not in results or other not in results:
        return None
    return paired_difference(*(_by_seed(results, name, "segm/AP") for name in (rung, other)))


def table(results: Results, models: Dict[str, dict]) -> str:
    """
    Args:
        results (dict): see :func:`load_results`.
        models (dict[str, dict]): "million_parameters" and "gflops" of each rung. If the rungs were
            timed side by side, also "seconds_per_step" and "seconds_per_image", which then replace
            the times of the runs.

    Returns:
        str: Markdown tables, one for each group of rungs that has results.
    """
    lines: List[str] = []
    for group, rungs in GROUPS.items():
        rows = []
        for name, rung in rungs.items():
            if name not in results:
                continue
            model = models.get(name, {})
            runs = pd.DataFrame(list(results[name].values()))
            row = {"model": rung.title, "seeds": len(runs)}
            row["mask AP"] = _mean_and_error(_by_seed(results, name, "segm/AP"))
            compared = with_interval(_difference(results, name, rung.compared_with))
            if group == "ladder":
                row["from the row above [95 %]"] = compared
                baseline = _BASELINE if name != _BASELINE else ""
                row[f"from {LADDER[_BASELINE].title} [95 %]"] = with_interval(
                    _difference(results, name, baseline)
                )
            else:
                row["difference [95 %]"] = compared
            for kind in ("50", "75", "s", "m", "l"):
                # nan where there are no objects of a size. The mean is over the other seeds.
                row[f"AP{kind}"] = _number(_by_seed(results, name, f"segm/AP{kind}").mean())
            row["box AP"] = _mean_and_error(_by_seed(results, name, "bbox/AP"))
            for header, key in (("ms/step", "seconds_per_step"), ("ms/image", "seconds_per_image")):
                row[header] = f"{1e3 * model.get(key, runs[key].mean()):.0f}"
            row["M params"] = _number(model.get("million_parameters", nan))
            row["GFLOPs"] = _number(model.get("gflops", nan))
            rows.append(row)
        if rows:
            lines += [f"### {_GROUP_TITLES[group]}", "", markdown(rows), ""]
    return "\n".join(lines)


def markdown(rows: List[Dict[str, Any]]) -> str:
    """Markdown table of rows, whose cells are text: tabulate would print 67.0 as 67."""
    cells = pd.DataFrame(rows)
    return str(cells.to_markdown(index=False, tablefmt="github", disable_numparse=True))


def _number(value: float) -> str:
    return "-" if isnan(value) else f"{value:.1f}"


def _mean_and_error(values: pd.Series) -> str:
    error = values.sem()  # nan for one seed
    return f"{values.mean():.1f}" if isnan(error) else f"{values.mean():.1f} ± {error:.1f}"


def with_interval(d: Optional[Difference]) -> str:
    """Text of a difference and its interval; empty for None."""
    if d is None:
        return ""
    return _signed(d.mean) + ("" if isnan(d.low) else f" [{_signed(d.low)}, {_signed(d.high)}]")


def _signed(value: float) -> str:
    text = f"{value:+.1f}"
    return "0.0" if float(text) == 0 else text


def plot_curves(results: Results, path: str) -> None:
    """
    Plot mask AP over training for the rungs of the ladder, as means over seeds. A second panel
    shows the last half of training, where the curves lie close together.

    Args:
        results (dict): see :func:`load_results`.
        path (str): the PNG to write.
    """
    plt = pyplot()
    figure, (full, last) = plt.subplots(1, 2, figsize=(11, 4.5))
    for name, rung in GROUPS["ladder"].items():
        if name not in results:
            continue
        curve = pd.DataFrame([run["curve"] for run in results[name].values()]).mean()
        curve = curve.set_axis(curve.index.astype(int)).sort_index()
        full.plot(curve, "-o", ms=3, label=rung.title)
        last.plot(curve[2 * curve.index >= curve.index[-1]], "-o", ms=3)
    for axis in (full, last):
        axis.set_xlabel("steps")
    full.set_ylabel("mask AP, validation")
    full.set_ylim(bottom=0)
    last.set_title("the last half", fontsize=10)
    if full.has_data():
        full.legend(fontsize=8)
    save_figure(figure, path)


def plot_differences(results: Results, path: str) -> None:
    """
    Plot the difference of each rung from the rung that it is compared with, and of full PANet from
    Mask R-CNN, with their intervals.

    Args:
        results (dict): see :func:`load_results`.
        path (str): the PNG to write.
    """
    plt = pyplot()
    compared = [(name, rung.compared_with) for name, rung in RUNGS.items()]
    compared.insert(len(LADDER), (_FULL, _BASELINE))
    rows = []
    for name, other in compared:
        d = _difference(results, name, other)
        if d:
            rows.append((f"{name} against {other}", d))
    figure, axis = plt.subplots(figsize=(7, 1 + 0.3 * len(rows)))
    for i, (_, d) in enumerate(rows):
        axis.plot([d.low, d.high], [i, i], color="C0")  # nothing for nan
        axis.plot([d.mean], [i], "o", color="C0")
    axis.axvline(0, color="0.6", lw=1)
    axis.set_yticks(range(len(rows)), [label for label, _ in rows])
    axis.invert_yaxis()
    axis.set_xlabel("difference in mask AP, and its 95 % interval")
    save_figure(figure, path)
