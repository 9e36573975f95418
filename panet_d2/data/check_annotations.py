"""Find errors in an annotation file in COCO format, without looking at its images."""

from __future__ import annotations

from collections import Counter
from typing import Any, Collection, Dict, Iterator, List, Optional, Tuple

import numpy as np

from .check_boxes import BoxStatistics, is_near
from .check_masks import (
    NUMBERS,
    TOLERANCE,
    fine_polygons_extent,
    fine_rle_extent,
    mask_extent,
    mask_problems,
    outside,
)
from .problem import LARGEST_COORDINATE, Problem, is_coordinate, is_number, shown, warning

# Raise this number when check_annotations finds other problems in the same file.
VERSION = 5

# More objects in one image are likely to exceed a limit of some tool.
_MANY = 1000
# COCO has 1 % of crowds. Some tools call each mask in RLE a crowd.
_MANY_CROWDS = 0.1
# bool and subclasses take the exact check.
_IDS = {int, str}
BOX_DIFFERS = "box differs from its mask"
BOX_EMPTY, BOX_OUTSIDE = "box of no area", "box is outside the image"
REPEATED = "same object as another annotation"
# Found only with the number of keypoints, which the config has.
NEEDS_CONFIG = ("has no keypoints", "not as many keypoints as others")
# COCO's evaluation ignores objects whose area is not between 0 and this one.
_LARGEST_AREA = 1e10


def has_oriented_boxes(content: dict) -> bool:
    """
    Whether most boxes of an annotation file are Detectron2's ``XYWHA_ABS``: center x, center y,
    width, height and angle, instead of COCO's.
    """
    boxes = [a.get("bbox") for a in content.get("annotations", ()) if isinstance(a, dict)]
    return 2 * sum(isinstance(box, list) and len(box) == 5 for box in boxes) > len(boxes)


def check_annotations(
    content: dict,
    masks: Optional[bool] = None,
    evaluated: bool = True,
    keypoints: int = 0,
    trained: Optional[bool] = None,
) -> List[Problem]:
    """
    Find all problems of an annotation file.

    Args:
        content (dict): see :func:`read_coco`.
        masks (bool): whether each object must have a mask; by default, if any object has a mask.
        evaluated (bool): whether models will be evaluated on the file, which needs more fields than
            training.
        keypoints (int): number of keypoints that each object must have; 0 for no check.
        trained (bool): whether models will be trained on the file; by default, if it has objects.

    Returns:
        list[Problem]: in the order of the file: categories, images, annotations.
    """
    annotations = content.get("annotations", [])
    categories, images = content["categories"], content["images"]
    category_ids, problems = _ids("category", categories)
    for category in categories:
        if isinstance(category, dict) and not isinstance(category.get("name"), str):
            problems.append(_not_text(record_name("category", category), category, "name"))
    problems += _keypoint_name_problems(categories, keypoints)
    image_ids, found = _ids("image", images)
    sizes: Dict[Any, Any] = dict.fromkeys(image_ids)
    problems += found + _image_problems(images, annotations, sizes)
    problems += summary_problems(content, evaluated, trained)
    _, found = _ids("annotation", annotations)
    problems += found + _repeated(annotations)

    has_masks = any(isinstance(a, dict) and a.get("segmentation") for a in annotations)
    if masks and annotations and not has_masks:
        problems.append(Problem("annotations", "have no masks", "MODEL.MASK_ON must be False"))
    masks = has_masks and masks is not False
    boxes, found = BoxStatistics(), []
    fractions: Counter = Counter()  # whether the visible keypoints of an object are fractions
    oriented = has_oriented_boxes(content)
    for annotation in annotations:
        if not isinstance(annotation, dict):
            continue
        # The exact check takes five times as long, and most annotations are fine.
        if oriented or not _is_fine(annotation, sizes, category_ids, masks, evaluated):
            found += _annotation_problems(
                annotation, sizes, category_ids, masks, evaluated, boxes, oriented
            )
        else:
            box, size = annotation["bbox"], sizes[annotation["image_id"]]
            boxes.see(box, size)
            if annotation.get("segmentation"):
                boxes.with_mask += 1
            else:
                boxes.without_mask.append((box, size))
        points = annotation.get("keypoints")
        if points and not _are_numbers(points):
            # Detectron2 reads them even for models without keypoints.
            where = record_name("annotation", annotation)
            found.append(Problem(where, "keypoints are not a list of numbers"))
        elif keypoints:
            size = sizes.get(annotation["image_id"]) if _is_id(annotation.get("image_id")) else None
            found += _keypoint_problems(annotation, keypoints, evaluated, size, fractions)
    fault = boxes.fault()
    if fault:
        problems.append(Problem("annotations", fault))
        found = [p for p in found if p.what not in (BOX_DIFFERS, BOX_EMPTY, BOX_OUTSIDE)]
    if 2 * fractions[True] > sum(fractions.values()):
        what = "keypoints look like fractions of the image's size; COCO's are in pixels"
        problems.append(Problem("annotations", what))
    return problems + found


def summary_problems(content: dict, evaluated: bool, trained: Optional[bool]) -> List[Problem]:
    """Find the problems of the file rather than of a record. See :func:`check_annotations`."""
    problems: List[Problem] = []
    names: Counter = Counter()
    objects: Counter = Counter()  # by category
    crowds: Counter = Counter()
    for a in content.get("annotations", ()):
        if isinstance(a, dict) and not a.get("ignore"):
            counter = crowds if a.get("iscrowd") else objects
            counter[a["category_id"] if _is_id(a.get("category_id")) else None] += 1
    only_crowds = "all have iscrowd 1" if crowds else ""
    if evaluated and "annotations" in content and not objects:
        detail = f"{only_crowds or 'without objects'}, all AP will be nan"
        problems.append(warning("annotations", "there are none to evaluate on", detail))
    if trained and not objects:
        problems.append(Problem("annotations", "there are none to train on", only_crowds))
    number, total = sum(crowds.values()), sum((crowds + objects).values())
    if objects and number > _MANY_CROWDS * total:
        detail = f"{number} of {total} have iscrowd 1; training and AP leave them out"
        problems.append(warning("annotations", "many are crowds", detail))
    for category in content["categories"]:
        if not isinstance(category, dict):
            continue
        name, where = category.get("name"), record_name("category", category)
        if isinstance(name, str):
            names[name] += 1
            if names[name] == 2:
                detail = "they are different classes"
                problems.append(warning(where, "another category has the same name", detail))
        if trained is not False and objects and _is_id(category.get("id")):
            if not objects[category["id"]]:
                detail = "all have iscrowd 1" if crowds[category["id"]] else ""
                problems.append(warning(where, "has no annotations", detail))
    return problems


def _image_problems(images: list, annotations: list, sizes: dict) -> List[Problem]:
    """Find the problems of the file's images, and add their sizes to ``sizes``."""
    problems: List[Problem] = []
    files: Counter = Counter()
    counts = Counter(
        a["image_id"] for a in annotations if isinstance(a, dict) and _is_id(a.get("image_id"))
    )
    for image in images:
        if not isinstance(image, dict):
            continue
        where = record_name("image", image)
        if not isinstance(image.get("file_name"), str) or not image["file_name"]:
            problems.append(_not_text(where, image, "file_name"))
        else:
            files[image["file_name"]] += 1
            if files[image["file_name"]] == 2:
                problems.append(warning(where, "file is listed more than once"))
        size: Any = (image.get("height"), image.get("width"))
        if all(type(side) is int and side > 0 for side in size):
            if _is_id(image.get("id")):
                sizes[image["id"]] = size
        elif any(side is None or type(side) is int for side in size):
            detail = f"height is {shown(size[0])}, width {shown(size[1])}"
            problems.append(Problem(where, "has no size", detail))
        else:
            detail = " x ".join(map(shown, size))
            problems.append(Problem(where, "size is not whole numbers", detail))
        count = counts[image["id"]] if _is_id(image.get("id")) else 0
        if annotations and not count:
            problems.append(warning(where, "has no annotations"))
        elif count > _MANY:
            problems.append(warning(where, f"has more than {_MANY} annotations", str(count)))
    return problems


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def record_name(kind: str, record: dict) -> str:
    """Return the name of an annotation file's record, for messages."""
    name = f"{kind} {record.get('id', '?')}"
    if kind == "annotation":
        return name + f" (image {record.get('image_id', '?')})"
    title = record.get("file_name" if kind == "image" else "name")
    return name + (f" ({title})" if title else "")


def _not_text(where: str, record: dict, key: str) -> Problem:
    what = key.replace("_", " ")
    if record.get(key) in (None, ""):
        return Problem(where, f"has no {what}")
    return Problem(where, f"{what} is not text", shown(record[key]))


def _ids(kind: str, records: list) -> Tuple[set, List[Problem]]:
    """Return the ids of one of the file's lists, and their problems."""
    seen, problems = set(), []
    for index, record in enumerate(records):
        where = f"{kind} at index {index}"
        if not isinstance(record, dict):
            problems.append(Problem(where, "is not a record"))
        elif "id" not in record:
            problems.append(Problem(where, "has no id"))
        elif not _is_id(record["id"]):
            what = "id is not a whole number or text"
            problems.append(Problem(where, what, shown(record["id"])))
        elif record["id"] in seen:
            problems.append(Problem(record_name(kind, record), f"{kind} id occurs more than once"))
        else:
            seen.add(record["id"])
    if kind != "annotation" and len({isinstance(id_, str) for id_ in seen}) > 1:
        where = f"{kind} {next(id_ for id_ in seen if isinstance(id_, str))}"
        problems.append(Problem(where, "ids are partly numbers, partly text", "they are sorted"))
    return seen, problems


def _repeated(annotations: list) -> List[Problem]:
    """Find annotations that are equal to an earlier one, up to their id."""
    first: Dict[int, dict] = {}  # by hash: the tuples of all objects would take much memory
    problems = []
    for a in annotations:
        if not isinstance(a, dict) or not isinstance(a.get("bbox"), list) or a.get("iscrowd"):
            continue
        try:
            key = hash((a.get("image_id"), a.get("category_id"), *a["bbox"]))
        except TypeError:
            continue  # not numbers, which is another problem
        other = first.setdefault(key, a)
        keys = ("image_id", "category_id", "bbox", "segmentation")
        if other is not a and all(a.get(k) == other.get(k) for k in keys):
            detail = f"annotation {other.get('id', '?')}; both are used"
            problems.append(warning(record_name("annotation", a), REPEATED, detail))
    return problems


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
        if "iscrowd" not in annotation or type(area) not in NUMBERS:
            return False
    size = sizes.get(image)
    # In larger images, coordinates inside the image can exceed the limit.
    if size is None or 2 * max(size) > LARGEST_COORDINATE:
        return False
    if evaluated and not 0 < area <= size[0] * size[1]:  # False for NaN
        return False
    box: Any = get("bbox")
    segmentation = get("segmentation")
    if not _is_fine_box(box, size):
        return False
    if not segmentation:
        return not masks or (crowd == 1 and not evaluated)
    if type(segmentation) is dict:
        extent = fine_rle_extent(segmentation, size)
    else:
        extent = fine_polygons_extent(segmentation, size) if type(segmentation) is list else None
    if extent is None:
        return False
    x, y, w, h = box
    return is_near((x, y, x + w, y + h), extent)


def _is_fine_box(box: Any, size: Tuple[int, int]) -> bool:
    if type(box) is not list or len(box) != 4 or not set(map(type, box)) <= NUMBERS:
        return False
    x, y, w, h = box
    height, width = size
    return (
        -TOLERANCE <= x < width
        and -TOLERANCE <= y < height
        # An int can be too large to be added to a float.
        and 0 < w <= width + 2 * TOLERANCE
        and 0 < h <= height + 2 * TOLERANCE
        and 0 < x + w <= width + TOLERANCE
        and 0 < y + h <= height + TOLERANCE
    )


def _annotation_problems(
    annotation: dict,
    sizes: dict,
    category_ids: set,
    masks: bool,
    evaluated: bool,
    boxes: BoxStatistics,
    oriented: bool,
) -> Iterator[Problem]:
    where = record_name("annotation", annotation)
    if evaluated and not is_number(annotation.get("area")):
        yield _not_evaluated(where, annotation, "area")
    elif evaluated and not 0 <= annotation["area"] <= _LARGEST_AREA:
        detail = f"{shown(annotation['area'])}; COCO's evaluation ignores this object"
        yield Problem(where, "area is not that of an object", detail)
    if evaluated and "iscrowd" not in annotation:
        yield _not_evaluated(where, annotation, "iscrowd")
    if shown(annotation.get("id")) == "0":
        severity = "error" if evaluated else "warning"
        detail = "COCO's evaluation takes it for none; number annotations from 1"
        yield Problem(where, "annotation id is 0", detail, severity)
    elif evaluated and isinstance(annotation.get("id"), str):
        detail = "COCO's evaluation computes with it"
        yield Problem(where, "annotation id is not a number", detail)
    if annotation.get("iscrowd", 0) not in (0, 1):
        yield Problem(where, "'iscrowd' is neither 0 nor 1", shown(annotation["iscrowd"]))
    if annotation.get("ignore", 0) != 0:
        yield Problem(where, "'ignore' is set", "Detectron2 does not support it; use 'iscrowd'")
    category, image = annotation.get("category_id"), annotation.get("image_id")
    if not _is_id(category) or category not in category_ids:
        detail = _why_unknown(annotation, "category_id", "categories", category_ids)
        yield Problem(where, "unknown category", detail)
    if not _is_id(image) or image not in sizes:
        yield Problem(where, "unknown image", _why_unknown(annotation, "image_id", "images", sizes))
        return
    box: Any = annotation.get("bbox")
    size = sizes[image]
    visible = True  # whether the box says that there is something to see
    has_area = False
    length, numbers = (5, "five") if oriented else (4, "four")
    if not (isinstance(box, list) and len(box) == length and all(map(is_coordinate, box))):
        detail = f"{shown(box)}; most others are" if oriented else shown(box)
        yield Problem(where, f"box is not {numbers} numbers", detail)
    elif min(box[2:4]) < 0:
        yield Problem(where, "box of negative size", str(box))
    elif min(box[2:4]) == 0:
        visible = False
        if size and not oriented:
            boxes.without_area += 1
            boxes.see(box, size)
        yield warning(where, BOX_EMPTY, f"{box}; left out")
    elif oriented:
        if size and not (0 <= box[0] <= size[1] and 0 <= box[1] <= size[0]):
            yield warning(where, "center of the box is outside the image", f"{box}; used as it is")
        if evaluated and annotation.get("iscrowd", 0):
            yield Problem(where, "crowd with an oriented box", "it cannot be evaluated")
    elif size:
        has_area = True
        boxes.see(box, size)
        low, high = np.array(box[:2]), np.add(box[:2], box[2:])
        place = outside(low, high, size)
        visible = place != "outside"
        if place:
            boxes.without_area += not visible
            effect = "clipped" if visible else "left out"
            yield warning(where, f"box is {place} the image", f"{box}; {effect}")
    if evaluated and size and is_number(annotation.get("area")) and not annotation.get("iscrowd"):
        area = annotation["area"]
        if visible and area == 0:
            yield warning(where, "area is 0", "COCO's evaluation takes the object for a small one")
        elif size[0] * size[1] < area <= _LARGEST_AREA:
            detail = f"{shown(area)}; the image has {size[0] * size[1]} pixels"
            yield warning(where, "area is larger than the image", detail)
    segmentation = annotation.get("segmentation")
    if not segmentation:
        if has_area and size:
            boxes.without_mask.append((box, size))
        crowd = annotation.get("iscrowd", 0)
        if masks and (evaluated or not crowd):
            detail = "COCO's evaluation needs it" if crowd else "others have one"
            yield Problem(where, "has no mask", detail)
        return
    area = annotation.get("area")
    found = list(mask_problems(where, segmentation, size, visible, masks and evaluated, area))
    yield from found
    if has_area and size and not any(p.severity == "error" for p in found):
        difference = boxes.compare(box, mask_extent(segmentation), size)
        if difference and visible:
            yield warning(where, BOX_DIFFERS, difference)


def _not_evaluated(where: str, annotation: dict, key: str) -> Problem:
    if annotation.get(key) is None:
        return Problem(where, f"has no {key}", "COCO's evaluation needs it")
    return Problem(where, f"{key} is not a number", shown(annotation[key]))


def _why_unknown(annotation: dict, key: str, kind: str, known: Collection) -> str:
    """Return why an annotation's ``key`` is not an id of the file's images or categories."""
    value = annotation.get(key)
    if key not in annotation:
        return f"it has no {key}"
    if not _is_id(value):
        return f"{key} is {shown(value)}, which is not a whole number or text"
    text = isinstance(value, str)
    if known and not any(isinstance(id_, str) == text for id_ in known):
        what, ids = ("text", "numbers") if text else ("a number", "text")
        return f"{key} is {shown(value)}, which is {what}; {kind} have {ids} as ids"
    return shown(value)


def _are_numbers(points: Any) -> bool:
    """Whether keypoints are a flat list of numbers."""
    if type(points) is list and set(map(type, points)) <= NUMBERS:  # of most; the rest is slow
        return all(abs(p) < LARGEST_COORDINATE for p in points)
    return isinstance(points, list) and all(map(is_coordinate, points))


def _keypoint_name_problems(categories: list, keypoints: int) -> Iterator[Problem]:
    """Find the problems of the lists that name the keypoints of a category."""
    first: Any = None
    for category in categories:
        names = category.get("keypoints") if isinstance(category, dict) else None
        if not names:
            continue
        where = record_name("category", category)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            severity = "error" if keypoints else "warning"
            yield Problem(where, "keypoints are not a list of names", shown(names), severity)
        elif keypoints and names != (first := first or names):
            yield Problem(where, "has other keypoints than the category before", shown(names))


def _keypoint_problems(
    annotation: dict,
    number: int,
    evaluated: bool,
    size: Optional[Tuple[int, int]],
    fractions: Counter,
) -> Iterator[Problem]:
    """Find the problems of keypoints that are numbers. Count objects with fractions as such."""
    where, points = record_name("annotation", annotation), annotation.get("keypoints")
    if evaluated and not is_number(annotation.get("num_keypoints")):
        yield _not_evaluated(where, annotation, "num_keypoints")
    if not points:
        if evaluated or not annotation.get("iscrowd", 0):  # training leaves crowds out
            yield Problem(where, "has no keypoints", "others have some")
    elif len(points) != 3 * number:
        wanted = f"{len(points)} numbers; x, y and visibility of {number} are {3 * number}"
        yield Problem(where, "not as many keypoints as others", wanted)
    else:
        visible = [(x, y) for x, y, v in zip(points[::3], points[1::3], points[2::3]) if v > 0]
        if visible and evaluated and annotation.get("num_keypoints") == 0:
            detail = "COCO's evaluation ignores this object"
            yield Problem(where, "num_keypoints is 0, but keypoints are visible", detail)
        if visible and size:
            xs, ys = zip(*visible)
            fractions[max(*xs, *ys) <= 1 and min(size) > 2] += 1
            if min(*xs, *ys) < -TOLERANCE or max(xs) > size[1] + 1 or max(ys) > size[0] + 1:
                yield warning(where, "keypoints are outside the image", str(visible))
