"""Read the ``metrics.json`` that a training run writes."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from typing import Dict, List


def read_history(path: str) -> List[dict]:
    """
    Return the lines of a run's ``metrics.json``, in order. Incomplete lines, such as those of a
    full disk, are left out.
    """
    history = []
    with open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            with suppress(ValueError):
                history.append(json.loads(line))
    return [line for line in history if isinstance(line, dict) and "iteration" in line]


def losses(history: List[dict]) -> Dict[int, dict]:
    """
    Select the lines with losses, by number of finished steps. If a resumed run repeated a step, the
    later line is kept.
    """
    lines = {line["iteration"] + 1: line for line in history if "total_loss" in line}
    return dict(sorted(lines.items()))


def evaluations(history: List[dict], task: str = "segm") -> Dict[int, dict]:
    """Select the lines with an AP of the task, for instance "bbox", by number of finished steps."""
    # The evaluation after training is written with an iteration that is one too high.
    trained = max(losses(history), default=math.inf)
    lines = {min(line["iteration"] + 1, trained): line for line in history if f"{task}/AP" in line}
    return dict(sorted(lines.items()))
