"""Find errors in the masks of an annotation file in COCO format."""

from __future__ import annotations

import re
import sys
from itertools import permutations
from operator import mul
from typing import Any, Iterator, List, Optional, Tuple, Union

import numpy as np
from detectron2.structures.masks import polygon_area, polygons_to_bitmask
from pycocotools import mask as mask_util

from .check_boxes import Corners
from .problem import Problem, is_coordinate, is_number, warning

# Annotations are often a rounding error larger than the image.
TOLERANCE = 1.0
# bool, NumPy's numbers and subclasses take the exact check.
NUMBERS = {int, float}
# Below this, an area can be a rounding error of points on one line.
_SMALLEST_AREA = 1e-6
HOLE = "polygon inside another of its mask"
# More are checked with NumPy.
_FEW_POLYGONS = 10
# Characters P to o continue a number, 0 to O end a number. pycocotools reads past the end of a text
# whose last number does not end.
_COMPRESSED_RLE = re.compile("[0-o]*[0-O]")


def fine_polygons_extent(polygons: list, size: Tuple[int, int]) -> Optional[Corners]:
    """
    Return the extent of polygons in which :func:`mask_problems` certainly finds nothing. Return
    None for anything unusual.
    """
    height, width = size
    left, top, right, bottom = width + 1, height + 1, 0, 0
    count, area = 0, 0.0
    extents = []
    for polygon in polygons:
        if type(polygon) is not list or len(polygon) < 6 or len(polygon) % 2:
            return None
        if not set(map(type, polygon)) <= NUMBERS:
            return None
        x, y = polygon[::2], polygon[1::2]
        # min() and max() may skip a NaN, but not an infinite or huge number.
        x0, x1, y0, y1 = min(x), max(x), min(y), max(y)
        if not (-TOLERANCE <= x0 < width and 0 < x1 <= width + TOLERANCE):
            return None
        if not (-TOLERANCE <= y0 < height and 0 < y1 <= height + TOLERANCE):
            return None
        extents.append((x0, y0, x1, y1))
        left, top = min(left, x0), min(top, y0)
        right, bottom = max(right, x1), max(bottom, y1)
        count += len(x)
        area += abs(sum(map(mul, x, y[-1:] + y[:-1])) - sum(map(mul, y, x[-1:] + x[:-1]))) / 2
    # A smaller area could be a rounding error, here or in polygon_area. NaN is not larger either.
    rounding = 4 * sys.float_info.epsilon * count**2 * (height + 2) * (width + 2)
    fine = area > _SMALLEST_AREA + rounding and len(extents) <= _FEW_POLYGONS
    if not fine or any(_encloses(a, b) for a, b in permutations(extents, 2)):
        return None
    return left, top, right, bottom


def _encloses(outer: Corners, inner: Corners) -> bool:
    low = outer[0] < inner[0] and outer[1] < inner[1]
    return low and outer[2] > inner[2] and outer[3] > inner[3]


def _has_hole(polygons: List[np.ndarray], area: Any) -> bool:
    """Whether a polygon lies inside another and is not counted in the area as one more part."""
    low = np.array([p.min(axis=0) for p in polygons])
    high = np.array([p.max(axis=0) for p in polygons])
    enclosed = ((low[:, None] < low) & (high[:, None] > high)).all(axis=2)
    if not enclosed.any():
        return False
    parts = sum(polygon_area(*p.T) for p in polygons)
    if is_number(area) and abs(area - parts) <= 0.01 * parts:
        return False
    from matplotlib.path import Path  # here, because few files need it and it takes long

    return any(
        Path(polygons[outer]).contains_points(polygons[inner]).all()
        for outer, inner in zip(*np.nonzero(enclosed))
    )


def fine_rle_extent(rle: dict, size: Tuple[int, int]) -> Optional[Corners]:
    """Return the extent of an RLE, or None if :func:`mask_problems` finds a problem."""
    if any(True for _ in _rle_problems("", rle, size, visible=True)):
        return None
    return mask_extent(rle)


def mask_problems(
    where: str,
    mask: Any,
    size: Optional[Tuple[int, int]],
    visible: bool,
    evaluated: bool,
    area: Any = None,
) -> Iterator[Problem]:
    """
    Find all problems of a mask.

    Args:
        where (str): the annotation.
        mask: its "segmentation", not empty.
        size (tuple[int, int] or None): height and width of the image, if it has a size.
        visible (bool): whether the box says that there is something to see.
        evaluated (bool): whether COCO's evaluation will read the mask.
        area: the annotation's "area".
    """
    if isinstance(mask, dict):
        if size:
            yield from _rle_problems(where, mask, size, visible)
    elif isinstance(mask, list):
        yield from _polygon_problems(where, mask, size, visible, evaluated, area)
    else:
        yield Problem(where, "mask is neither polygons nor RLE")


def mask_extent(mask: Union[dict, list]) -> Corners:
    """Return the extent of a mask without errors of :func:`mask_problems`; zeros if it is empty."""
    if isinstance(mask, dict):
        if isinstance(mask["counts"], list):
            mask = mask_util.frPyObjects(mask, *mask["size"])
        x, y, width, height = mask_util.toBbox(mask).tolist()
        return x, y, x + width, y + height
    polygons = [p for p in mask if len(p) >= 6]
    if not polygons:
        return 0, 0, 0, 0
    return (
        *(min(min(p[::2]) for p in polygons), min(min(p[1::2]) for p in polygons)),
        *(max(max(p[::2]) for p in polygons), max(max(p[1::2]) for p in polygons)),
    )


def outside(low: np.ndarray, high: np.ndarray, size: Tuple[int, int]) -> str:
    """Say where the region between two corners (x, y) lies; "" if it is inside the image."""
    shape = np.array(size[::-1])
    if (low >= shape).any() or (high <= 0).any():
        return "outside"
    if (low < -TOLERANCE).any() or (high > shape + TOLERANCE).any():
        return "partly outside"
    return ""


def _rle_problems(where: str, rle: dict, size: Tuple[int, int], visible: bool) -> Iterator[Problem]:
    if rle.get("size") != list(size):
        yield Problem(where, "RLE of another size than the image", f"{rle.get('size')}, {size}")
        return
    counts, pixels = rle.get("counts"), size[0] * size[1]
    total = area = -1
    if isinstance(counts, list):
        if all(type(c) is int and c >= 0 for c in counts):
            total, area = sum(counts), sum(counts[1::2])
    elif isinstance(counts, str) and _COMPRESSED_RLE.fullmatch(counts):
        total, area = _run_totals(counts)
    if total != pixels:
        yield Problem(where, "malformed RLE", f"its runs are not the image's {pixels} pixels")
    elif visible and area == 0:
        yield Problem(where, "mask is empty", "though its box is not")


def _run_totals(counts: str) -> Tuple[int, int]:
    """
    Return the number of pixels in all runs of a compressed RLE, and in the object's runs. If the
    runs are too short for the image, pycocotools decodes random memory, and some of its functions
    never return.
    """
    # In an image one pixel high, the box ends where the object's last run ends. One run is added:
    # after a last run of background, the added run is the object's. Its pixels are subtracted.
    rle, longer = ({"size": [1, 1], "counts": c} for c in (counts, counts + "1"))
    x, _, width, _ = mask_util.toBbox(longer)
    area, longer_area = map(int, mask_util.area([rle, longer]))
    return int(x + width) - longer_area + area, area


def _polygon_problems(
    where: str,
    polygons: list,
    size: Optional[Tuple[int, int]],
    visible: bool,
    evaluated: bool,
    area: Any,
) -> Iterator[Problem]:
    arrays = []
    if not all(isinstance(p, list) and all(map(is_coordinate, p)) for p in polygons):
        yield Problem(where, "polygon is not a list of numbers")
        return
    for index, polygon in enumerate(polygons):
        if len(polygon) % 2:
            yield Problem(where, "polygon with an odd number of coordinates", str(len(polygon)))
        elif len(polygon) < 6:
            # Detectron2 leaves out this polygon. The object is lost if no other polygon remains.
            remains = not visible or any(len(p) >= 6 for p in polygons)
            unreadable = evaluated and index == 0
            severity = "warning" if remains and not unreadable else "error"
            detail = "the first, which COCO's evaluation takes for a box" if unreadable else ""
            yield Problem(where, "polygon of fewer than three points", detail, severity)
        else:
            arrays.append(np.array(polygon).reshape(-1, 2))
    if len(arrays) > 1 and _has_hole(arrays, area):
        yield warning(where, HOLE, "filled; a mask with a hole must be in RLE")
    if not (arrays and size and visible):
        return
    points = np.concatenate(arrays)
    place = outside(points.min(axis=0), points.max(axis=0), size)
    if place == "outside":
        yield Problem(where, "mask is outside the image", "though its box is not")
    elif place:
        yield warning(where, "mask is partly outside the image", "clipped")
    # An outline that crosses itself can have an area of zero. Masks are drawn only in this case,
    # because drawing is slow.
    if sum(polygon_area(*a.T) for a in arrays) < _SMALLEST_AREA:
        if not polygons_to_bitmask([a.ravel() for a in arrays], *size).any():
            yield Problem(where, "mask is empty", "though its box is not")
