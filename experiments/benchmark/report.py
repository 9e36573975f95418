"""The tables and the plot of the benchmark's results."""

from __future__ import annotations

import os
import platform
from typing import Dict, List

import pandas as pd
import torch
import torchvision
from tabulate import tabulate

from panet_d2.analysis.plots import pyplot, save_figure

__all__ = ["PARTS", "describe_machine", "markdown", "plot"]

PARTS = ("backbone", "neck", "RPN", "pooling", "adaptation", "heads", "post-processing", "other")
MODELS = ("Mask R-CNN", "naive PANet", "PANet")


def describe_machine(device: str) -> Dict[str, object]:
    """Device, number of threads and versions, on which the results depend."""
    machine: Dict[str, object] = {
        "device": "CPU",
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
    if device.startswith("cuda"):
        machine["device"] = torch.cuda.get_device_name()
        machine["cuda"] = torch.version.cuda
        machine["tf32"] = torch.backends.cuda.matmul.allow_tf32
    return machine


def _cpu_name() -> str:
    if os.path.isfile("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            for line in f:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor()


def markdown(results: Dict) -> str:
    """
    Args:
        results (dict): the content of the benchmark's JSON file.

    Returns:
        str: the tables in Markdown.
    """
    machine = results["machine"]
    lines = [
        f"# {machine['device']}",
        "",
        ", ".join(f"{key} {value}" for key, value in machine.items()),
        "",
        ", ".join(f"{key} {value}" for key, value in results["settings"].items()),
        "",
    ]
    for head, measured in results.get("models", {}).items():
        lines += [f"## {head} head", "", _model_table(measured), "", _part_table(measured), ""]
    if results.get("op"):
        lines += ["## Multi-level RoIAlign", "", _op_table(results["op"]), ""]
    if results.get("ladder"):
        ladder = pd.DataFrame(results["ladder"])[["rung", "gflops", "million_parameters"]]
        ladder.columns = ["config", "GFLOPs", "million parameters"]
        table = ladder.to_markdown(index=False, tablefmt="github", floatfmt=".1f")
        lines += ["## The ladder", "", table, ""]
    return "\n".join(lines)


def _model_table(measured: Dict) -> str:
    rows = []
    for kind, scale, cell in (("seconds", 1e3, "{:.1f} ms"), ("bytes", 2**-20, "{:.0f} MiB")):
        for what, values in measured[kind].items():
            stock = values[MODELS[0]]
            if stock is None:  # memory is measured on a GPU only
                continue
            cells = [cell.format(scale * values[m]) for m in MODELS]
            rows.append([what, *cells, *(f"{values[m] / stock:.2f}" for m in MODELS[1:])])
    headers = ["", *MODELS, "naive / stock", "PANet / stock"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _part_table(measured: Dict) -> str:
    ms = 1e3 * pd.DataFrame(measured["parts"], index=PARTS, columns=MODELS).fillna(0)
    return ms.rename_axis("inference by part, ms").to_markdown(tablefmt="github", floatfmt=".1f")


def _op_table(rows: List[Dict]) -> str:
    cells = []
    for row in rows:
        ms, used = row["milliseconds"], row["bytes"]
        line = [row["boxes"], row["fusion"] or "none"]
        for name in ("forward", "backward"):
            ours, theirs = ms[name], ms[f"{name} torchvision"]
            line += [f"{ours:.2f}", f"{theirs:.2f}", f"{theirs / ours:.1f}"]
        if used["forward"] is not None:
            line += [f"{used[n] / 2**20:.0f}" for n in ("forward", "forward torchvision")]
        cells.append(line)
    headers = ["boxes", "fusion"]
    for name in ("forward", "backward"):
        headers += [f"{name}, ms", "torchvision, ms", "times faster"]
    if cells and len(cells[0]) > len(headers):
        headers += ["forward, MiB", "torchvision, MiB"]
    return tabulate(cells, headers, tablefmt="github", disable_numparse=True)


def plot(results: Dict, path: str) -> None:
    """
    Plot the time of inference by part, and of RoIAlign by the number of boxes.

    Args:
        results (dict): the content of the benchmark's JSON file.
        path (str): the PNG to write.
    """
    plt = pyplot()
    models, op = results.get("models", {}), results.get("op", [])
    panels = len(models) + bool(op)
    figure, axes = plt.subplots(1, panels, figsize=(5 * panels, 4), squeeze=False)
    for axis, (head, measured) in zip(axes[0], models.items()):
        left = {m: 0.0 for m in MODELS}
        for part in PARTS:
            widths = [1e3 * measured["parts"][m].get(part, 0.0) for m in MODELS]
            axis.barh(MODELS, widths, left=list(left.values()), label=part)
            left = {m: left[m] + w for m, w in zip(MODELS, widths)}
        axis.set_title(f"Inference, {head} head")
        axis.set_xlabel("ms")
        axis.invert_yaxis()
        if head == list(models)[-1]:
            axis.legend(fontsize=7, ncol=4, loc="upper right", bbox_to_anchor=(1.0, -0.15))
    if op:
        axis = axes[0][-1]
        fusion = "max" if any(r["fusion"] == "max" for r in op) else op[0]["fusion"]
        rows = [r for r in op if r["fusion"] == fusion]
        for index, name in enumerate(("forward", "backward")):
            for suffix, style in (("", "-o"), (" torchvision", "--o")):
                values = [r["milliseconds"][name + suffix] for r in rows]
                label = name + (suffix or " ours")
                axis.plot([r["boxes"] for r in rows], values, style, color=f"C{index}", label=label)
        axis.set_title(f"Multi-level RoIAlign, fusion {fusion}")
        axis.set_xlabel("boxes")
        axis.set_ylabel("ms")
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7)
    figure.suptitle(str(results["machine"]["device"]))
    save_figure(figure, path)
