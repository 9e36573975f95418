"""Files of results."""

from __future__ import annotations

import json
import math
from typing import Any

from panet_d2.checkpoint import atomic_open


def write_json(path: str, content: Any) -> None:
    """Write a JSON file as a whole. NaN, which JSON does not have, becomes null."""
    with atomic_open(path) as f:
        json.dump(_without_nan(content), f, indent=1, allow_nan=False)
        f.write("\n")


def _without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and math.isnan(content) else content
