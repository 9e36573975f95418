"""A problem of a dataset, and checks of single values."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

# pycocotools keeps five points per pixel of an outline in memory.
LARGEST_COORDINATE = 1e6


@dataclass(frozen=True)
class Problem:
    """
    A problem of a dataset.

    Attributes:
        where (str): the annotation, image or file.
        what (str): the kind of problem; the same words for the same kind.
        detail (str): the wrong values, or what to do.
        severity (str): "error" if training would stop or learn something wrong; "warning" if
            training works without this annotation or image.
    """

    where: str
    what: str
    detail: str = ""
    severity: str = "error"

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f" ({self.detail})" if self.detail else "")


warning = partial(Problem, severity="warning")


def shown(value: Any) -> str:
    """Return a value of a JSON file so that text and numbers look different."""
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


def is_number(value: Any, limit: float = math.inf) -> bool:
    """Whether a value is a number whose absolute value is below the limit; NaN is not."""
    if isinstance(value, bool):
        return False
    return isinstance(value, (int, float)) and abs(value) < limit


def is_coordinate(value: Any) -> bool:
    """Whether a value can be a coordinate in an image."""
    return is_number(value, LARGEST_COORDINATE)
