"""What a training run has written down on its way."""

from __future__ import annotations

import json
from typing import Dict, List

__all__ = ["evaluations", "losses", "read_history"]


def read_history(path: str) -> List[dict]:
    """
    Args:
        path (str): the ``metrics.json`` of a run.

    Returns:
        list[dict]: its lines, in order.
    """
    with open(path) as f:
        return [json.loads(line) for line in f]


def losses(history: List[dict]) -> Dict[int, dict]:
    """
    Args:
        history (list[dict]): see :func:`read_history`.

    Returns:
        dict[int, dict]: lines with losses, by the number of steps that had been trained. Where a
        run was cut off and resumed before that point, its later line counts.
    """
    lines = {line["iteration"] + 1: line for line in history if "total_loss" in line}
    return dict(sorted(lines.items()))


def evaluations(history: List[dict], task: str = "segm") -> Dict[int, dict]:
    """
    Args:
        history (list[dict]): see :func:`read_history`.
        task (str): lines count that have its AP, such as "segm" or "bbox".

    Returns:
        dict[int, dict]: lines with evaluations, by the number of steps that had been trained.
    """
    # The last evaluation comes when training is over and the count of steps has moved on already.
    trained = max(losses(history), default=0)
    lines = {}
    for line in history:
        if f"{task}/AP" in line:
            lines[min(line["iteration"] + 1, trained)] = line
    return dict(sorted(lines.items()))
