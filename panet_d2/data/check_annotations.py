"""Find errors in an annotation file in COCO format, without looking at its images."""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial
from operator import mul
from typing import Any, Dict, Iterator, List, Optional, Tuple

import numpy as np
from detectron2.structures.masks import polygon_area, polygons_to_bitmask
from pycocotools import mask as mask_util

# Raise this number when check_annotations finds other problems in the same file.
VERSION = 1

# Beyond this many objects in one image a limit of somebody's is likely to be reached.
_MANY = 1000
# pycocotools walks along an outline in fifths of a pixel, and keeps them all in memory.
_LARGEST_COORDINATE = 1e6
# Annotations are often a rounding error larger than the image.
_TOLERANCE = 1.0
# What rounding makes of the area of points in one line.
_SMALLEST_AREA = 1e-6
# Text that pycocotools takes for numbers: 32 digits that go on, and 32 that end one. It reads past
# the end of a text whose last number goes on.
_COMPRESSED_RLE = re.compile("[0-o]*[0-O]")
# bool, NumPy's numbers and subclasses take the exact check.
_NUMBERS = {int, float}
_IDS = {int, str}


@dataclass(frozen=True)
class Problem:
    """
    A problem of a dataset.

    Attributes:
        where (str): the annotation, image or file.
        what (str): the kind of problem, in the same words for the same kind.
        detail (str): the wrong values, or what to do.
        severity (str): "error" if training would stop or learn something wrong; "warning" if it
            works without this annotation or image.
    """

    where: str
    what: str
    detail: str = ""
    severity: str = "error"

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f" ({self.detail})" if self.detail else "")


_warning = partial(Problem, severity="warning")


def check_annotations(
    content: dict, masks: Optional[bool] = None, evaluated: bool = True, keypoints: int = 0
) -> List[Problem]:
    """
    Find all problems of an annotation file.

    Args:
        content (dict): see :func:`read_coco`.
        masks (bool): whether each object must have a mask; by default, if any object has one.
        evaluated (bool): whether models will be evaluated on it, which needs more than training.
        keypoints (int): the number that each object must have; 0 for no check.

    Returns:
        list[Problem]: in the order of the file: categories, images, annotations.
    """
    annotations = content.get("annotations", [])
    category_ids, problems = _ids("category", content["categories"])
    for category in content["categories"]:
        if isinstance(category, dict) and not isinstance(category.get("name"), str):
            problems.append(Problem(_name("category", category), "has no name"))

    image_ids, found = _ids("image", content["images"])
    problems += found
    sizes: Dict[Any, Optional[Tuple[int, int]]] = dict.fromkeys(image_ids)
    files: Counter = Counter()
    counts = Counter(
        a["image_id"] for a in annotations if isinstance(a, dict) and _is_id(a.get("image_id"))
    )
    for image in content["images"]:
        if not isinstance(image, dict):
            continue
        where = _name("image", image)
        if not isinstance(image.get("file_name"), str) or not image["file_name"]:
            problems.append(Problem(where, "has no file name"))
        else:
            files[image["file_name"]] += 1
            if files[image["file_name"]] == 2:
                problems.append(_warning(where, "file is listed more than once"))
        size: Any = (image.get("height"), image.get("width"))
        if not all(type(side) is int and side > 0 for side in size):
            problems.append(Problem(where, "has no size", f"height and width are {size}"))
        elif _is_id(image.get("id")):
            sizes[image["id"]] = size
        count = counts[image["id"]] if _is_id(image.get("id")) else 0
        if annotations and not count:
            problems.append(_warning(where, "has no annotations"))
        elif count > _MANY:
            problems.append(_warning(where, f"has more than {_MANY} annotations", str(count)))

    _, found = _ids("annotation", annotations)
    problems += found
    if masks is None:
        masks = any(isinstance(a, dict) and a.get("segmentation") for a in annotations)
    for annotation in annotations:
        if not isinstance(annotation, dict):
            continue
        # The exact check takes five times as long, and most annotations are fine.
        if not _is_fine(annotation, sizes, category_ids, masks, evaluated):
            problems += _annotation_problems(annotation, sizes, category_ids, masks, evaluated)
        if keypoints:
            problems += _keypoint_problems(annotation, keypoints, evaluated)
    return problems


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, str))


def _name(kind: str, record: dict) -> str:
    name = f"{kind} {record.get('id', '?')}"
    if kind == "image" and record.get("file_name"):
        name += f" ({record['file_name']})"
    elif kind == "annotation":
        name += f" (image {record.get('image_id', '?')})"
    return name


def _ids(kind: str, records: list) -> Tuple[set, List[Problem]]:
    """The ids of one of the file's lists."""
    seen, problems = set(), []
    for index, record in enumerate(records):
        if not isinstance(record, dict):
            problems.append(Problem(f"{kind} at index {index}", "is not a record"))
        elif not _is_id(record.get("id")):
            problems.append(Problem(f"{kind} at index {index}", "has no id"))
        elif record["id"] in seen:
            problems.append(Problem(_name(kind, record), f"{kind} id occurs more than once"))
        else:
            seen.add(record["id"])
    if kind != "annotation" and len({isinstance(id_, str) for id_ in seen}) > 1:
        where = f"{kind} {next(id_ for id_ in seen if isinstance(id_, str))}"
        problems.append(Problem(where, "ids are partly numbers, partly text", "they are sorted"))
    return seen, problems


def _is_fine(
    annotation: dict, sizes: dict, category_ids: set, masks: bool, evaluated: bool
) -> bool:
    """
    Whether :func:`_annotation_problems` certainly finds nothing; False for anything unusual. Only
    Python's own numbers, lists and dicts are compared, so that no comparison can fail.
    """
    get = annotation.get
    id_, category, image, crowd = get("id"), get("category_id"), get("image_id"), get("iscrowd", 0)
    if type(id_) is not int or id_ == 0 or type(crowd) is not int or crowd not in (0, 1):
        return False
    if type(category) not in _IDS or category not in category_ids or type(image) not in _IDS:
        return False
    if "ignore" in annotation and annotation["ignore"] != 0:
        return False
    if evaluated:
        area: Any = get("area")
        # NaN is not below infinity.
        if "iscrowd" not in annotation or type(area) not in _NUMBERS or not abs(area) < math.inf:
            return False
    size = sizes.get(image)
    # In larger images, coordinates inside the image can exceed the limit.
    if size is None or 2 * max(size) > _LARGEST_COORDINATE:
        return False
    if not _is_fine_box(get("bbox"), size):
        return False
    segmentation = get("segmentation")
    if not segmentation:
        return not masks or crowd == 1
    if type(segmentation) is dict:
        return not any(True for _ in _rle_problems("", segmentation, size, visible=True))
    return type(segmentation) is list and _are_fine_polygons(segmentation, size)


def _is_fine_box(box: Any, size: Tuple[int, int]) -> bool:
    if type(box) is not list or len(box) != 4 or not set(map(type, box)) <= _NUMBERS:
        return False
    x, y, w, h = box
    height, width = size
    return (
        -_TOLERANCE <= x < width
        and -_TOLERANCE <= y < height
        # An int can be too large to be added to a float.
        and 0 < w <= width + 2 * _TOLERANCE
        and 0 < h <= height + 2 * _TOLERANCE
        and 0 < x + w <= width + _TOLERANCE
        and 0 < y + h <= height + _TOLERANCE
    )


def _are_fine_polygons(polygons: list, size: Tuple[int, int]) -> bool:
    height, width = size
    count, area = 0, 0.0
    for polygon in polygons:
        if type(polygon) is not list or len(polygon) < 6 or len(polygon) % 2:
            return False
        if not set(map(type, polygon)) <= _NUMBERS:
            return False
        x, y = polygon[::2], polygon[1::2]
        # min() and max() may skip a NaN, but not an infinite or huge number.
        if not (-_TOLERANCE <= min(x) < width and 0 < max(x) <= width + _TOLERANCE):
            return False
        if not (-_TOLERANCE <= min(y) < height and 0 < max(y) <= height + _TOLERANCE):
            return False
        count += len(x)
        area += abs(sum(map(mul, x, y[-1:] + y[:-1])) - sum(map(mul, y, x[-1:] + x[:-1]))) / 2
    # Less could be zero but for rounding, here or in polygon_area. A NaN is not larger either.
    rounding = 4 * sys.float_info.epsilon * count**2 * (height + 2) * (width + 2)
    return area > _SMALLEST_AREA + rounding


def _annotation_problems(
    annotation: dict, sizes: dict, category_ids: set, masks: bool, evaluated: bool
) -> Iterator[Problem]:
    where = _name("annotation", annotation)
    if evaluated and not _is_number(annotation.get("area")):
        yield Problem(where, "has no area", "COCO's evaluation needs it")
    if evaluated and "iscrowd" not in annotation:
        yield Problem(where, "has no iscrowd", "COCO's evaluation needs it")
    if annotation.get("id") == 0:
        severity = "error" if evaluated else "warning"
        yield Problem(where, "annotation id is 0", "COCO's evaluation takes it for none", severity)
    elif evaluated and isinstance(annotation.get("id"), str):
        detail = "COCO's evaluation computes with it"
        yield Problem(where, "annotation id is not a number", detail)
    if annotation.get("iscrowd", 0) not in (0, 1):
        yield Problem(where, "'iscrowd' is neither 0 nor 1", str(annotation["iscrowd"]))
    if annotation.get("ignore", 0) != 0:
        yield Problem(where, "'ignore' is set", "Detectron2 does not support it; use 'iscrowd'")
    category = annotation.get("category_id")
    if not _is_id(category) or category not in category_ids:
        yield Problem(where, "unknown category", str(category))
    image = annotation.get("image_id")
    if not _is_id(image) or image not in sizes:
        yield Problem(where, "unknown image", str(image))
        return
    box, size = annotation.get("bbox"), sizes[image]
    visible = True  # whether the box says that there is something to see
    if not (isinstance(box, list) and len(box) == 4 and all(map(_is_coordinate, box))):
        yield Problem(where, "box is not four numbers", str(box))
    elif min(box[2:]) < 0:
        yield Problem(where, "box of negative size", str(box))
    elif min(box[2:]) == 0:
        visible = False
        yield _warning(where, "box of no area", f"{box}; left out")
    elif size:
        low, high = np.array(box[:2]), np.add(box[:2], box[2:])
        place = _outside(low, high, size)
        visible = place != "outside"
        if place:
            effect = "clipped" if visible else "left out"
            yield _warning(where, f"box is {place} the image", f"{box}; {effect}")
    segmentation = annotation.get("segmentation")
    if not segmentation:
        if masks and not annotation.get("iscrowd", 0):
            yield Problem(where, "has no mask", "others have one")
    elif isinstance(segmentation, dict):
        if size:
            yield from _rle_problems(where, segmentation, size, visible)
    elif isinstance(segmentation, list):
        yield from _polygon_problems(where, segmentation, size, visible)
    else:
        yield Problem(where, "mask is neither polygons nor RLE")


def _keypoint_problems(annotation: dict, number: int, evaluated: bool) -> Iterator[Problem]:
    where, points = _name("annotation", annotation), annotation.get("keypoints")
    if evaluated and not _is_number(annotation.get("num_keypoints")):
        yield Problem(where, "has no num_keypoints", "COCO's evaluation needs it")
    if not points:
        if evaluated or not annotation.get("iscrowd", 0):  # training leaves crowds out
            yield Problem(where, "has no keypoints", "others have some")
    elif not isinstance(points, list) or not all(map(_is_coordinate, points)):
        yield Problem(where, "keypoints are not a list of numbers")
    elif len(points) != 3 * number:
        wanted = f"{len(points)} numbers; x, y and visibility of {number} are {3 * number}"
        yield Problem(where, "not as many keypoints as others", wanted)


def _is_number(value: Any, limit: float = math.inf) -> bool:
    return isinstance(value, (int, float)) and abs(value) < limit  # NaN is not


def _is_coordinate(value: Any) -> bool:
    return _is_number(value, _LARGEST_COORDINATE)


def _outside(low: np.ndarray, high: np.ndarray, size: Tuple[int, int]) -> str:
    """Where the region between two corners (x, y) lies: "" is inside the image."""
    shape = np.array(size[::-1])
    if (low >= shape).any() or (high <= 0).any():
        return "outside"
    if (low < -_TOLERANCE).any() or (high > shape + _TOLERANCE).any():
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
    How many pixels a compressed RLE has runs for, and how many of them are the object's. Where the
    runs are too few, pycocotools decodes what happens to be in memory, and some of its functions
    never end.
    """
    # In an image one pixel high, the box ends where the object's last run does. So that this is
    # the end of all runs, an object of one pixel or more is appended, unless they end with one.
    rle, longer = ({"size": [1, 1], "counts": c} for c in (counts, counts + "1"))
    x, _, width, _ = mask_util.toBbox(longer)
    area, longer_area = map(int, mask_util.area([rle, longer]))
    return int(x + width) - longer_area + area, area


def _polygon_problems(
    where: str, polygons: list, size: Optional[Tuple[int, int]], visible: bool
) -> Iterator[Problem]:
    arrays = []
    if not all(isinstance(p, list) and all(map(_is_coordinate, p)) for p in polygons):
        yield Problem(where, "polygon is not a list of numbers")
        return
    for polygon in polygons:
        if len(polygon) % 2:
            yield Problem(where, "polygon with an odd number of coordinates", str(len(polygon)))
        elif len(polygon) < 6:
            # Detectron2 leaves it out; that is no loss only if something else remains.
            whole = not visible or any(len(p) >= 6 for p in polygons)
            severity = "warning" if whole else "error"
            yield Problem(where, "polygon of fewer than three points", severity=severity)
        else:
            arrays.append(np.array(polygon).reshape(-1, 2))
    if not (arrays and size and visible):
        return
    points = np.concatenate(arrays)
    place = _outside(points.min(axis=0), points.max(axis=0), size)
    if place == "outside":
        yield Problem(where, "mask is outside the image", "though its box is not")
    elif place:
        yield _warning(where, "mask is partly outside the image", "clipped")
    # Drawing each takes long, and an outline that crosses itself can have an area of zero.
    if sum(polygon_area(*a.T) for a in arrays) < _SMALLEST_AREA:
        if not polygons_to_bitmask([a.ravel() for a in arrays], *size).any():
            yield Problem(where, "mask is empty", "though its box is not")
