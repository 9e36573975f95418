"""What several of these tests need."""

from __future__ import annotations

import pytest
import torch
from detectron2.structures import Boxes, RotatedBoxes


def _has_rotated_ops() -> bool:
    try:
        from detectron2 import _C  # noqa: F401
    except ImportError:
        return False
    return True


needs_rotated_ops = pytest.mark.skipif(
    not _has_rotated_ops(), reason="needs Detectron2's compiled ops for rotated boxes"
)


def rotated(boxes: Boxes, angle: float = 0.0) -> RotatedBoxes:
    """The same boxes in the rotated format: center, width, height, angle in degrees."""
    sides = boxes.tensor[:, 2:] - boxes.tensor[:, :2]
    angles = torch.full((len(boxes), 1), angle)
    return RotatedBoxes(torch.cat([boxes.get_centers(), sides, angles], dim=1))
