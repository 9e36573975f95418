"""Pictures of predictions beside the ground truth."""

from __future__ import annotations

from itertools import product
from typing import Dict, Iterable, List, Tuple

import numpy as np
from pycocotools.coco import COCO

from .matching import ImageMatch

_Color = Tuple[int, int, int]

# RGB. Most colour-blind readers can tell these colours apart.
_FOUND, _FALSE, _MISSED = (0, 190, 160), (230, 60, 40), (255, 200, 0)
_GROUND_TRUTH, _WRONG = (90, 150, 255), (220, 80, 220)
_MIN_HEIGHT = 384  # outlines and labels would cover the objects of a smaller picture
_BAR = 26
_FONT, _SCALE, _LINE = 0, 0.45, 13  # cv2.FONT_HERSHEY_SIMPLEX


def draw_comparison(
    image: np.ndarray, annotations: List[dict], match: ImageMatch, coco: COCO
) -> np.ndarray:
    """
    Draw the ground truth on the left and the predictions on the right.

    Predictions are found objects (green) with the wrong pixels of their masks (magenta), false
    positives (red) and missed objects (yellow).

    Args:
        image (np.ndarray): RGB, uint8, shape (H, W, 3).
        annotations (list[dict]): the image's COCO annotations.
        match (ImageMatch): from :func:`panet_d2.analysis.match_predictions`.
        coco (COCO): the ground truth, for the names of the categories.

    Returns:
        np.ndarray: RGB, uint8, shape (H', 2 W' + gap, 3). Small images are enlarged by an integer
        factor.
    """
    import cv2

    def masks(entries: List[dict]) -> List[np.ndarray]:
        return [annotation_mask(entry, image.shape[:2]) for entry in entries]

    factor = -(-_MIN_HEIGHT // image.shape[0])
    left = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_NEAREST)
    right = left.copy()
    _draw(left, masks(annotations), _GROUND_TRUTH, fill=0.15)
    found = masks(match.found)
    wrong = [prediction ^ target for prediction, target in zip(found, masks(match.objects))]
    _draw(right, found, _FOUND)
    _draw(right, wrong, _WRONG, fill=0.6, outline=False)
    _draw(right, masks(match.false_positives), _FALSE)
    _draw(right, masks(match.missed), _MISSED, fill=0.0)
    names = {c["id"]: c["name"] for c in coco.loadCats(coco.getCatIds())}
    if len(names) > 1:  # a single class needs no name on every object
        _label(left, {_GROUND_TRUTH: annotations}, names, factor)
        _label(right, {_FOUND: match.found, _FALSE: match.false_positives}, names, factor)
    title = {
        f"{len(match.found)} found": _FOUND,
        "wrong pixels": _WRONG,
        f"{len(match.false_positives)} false": _FALSE,
        f"{len(match.missed)} missed": _MISSED,
    }
    left = _titled(left, {f"ground truth: {len(annotations)} objects": _GROUND_TRUTH})
    gap = np.full((len(left), 6, 3), 255, np.uint8)
    return np.concatenate([left, gap, _titled(right, title)], axis=1)


def annotation_mask(entry: dict, size: Tuple[int, int]) -> np.ndarray:
    """
    Return the mask of an annotation or prediction.

    Args:
        entry (dict): an annotation or prediction in COCO format, with polygons or RLE. Without a
            mask, the box is the mask.
        size (tuple[int, int]): height and width of the image.

    Returns:
        np.ndarray: uint8, 0 and 1, shape (height, width).
    """
    if entry.get("segmentation"):
        from detectron2.utils.visualizer import GenericMask  # imports cv2

        return GenericMask(entry["segmentation"], *size).mask
    mask = np.zeros(size, np.uint8)
    x, y, w, h = (int(round(v)) for v in entry["bbox"])
    mask[max(y, 0) : y + h, max(x, 0) : x + w] = 1
    return mask


def _draw(
    canvas: np.ndarray,
    masks: Iterable[np.ndarray],
    color: _Color,
    fill: float = 0.35,
    outline: bool = True,
) -> None:
    """Blend the color into the pixels of the masks and draw their outlines, in place."""
    import cv2

    height, width = canvas.shape[:2]
    for mask in masks:
        mask = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST)
        inside = mask.astype(bool)
        canvas[inside] = (1 - fill) * canvas[inside] + fill * np.array(color)
        if outline:
            contours, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
            cv2.drawContours(canvas, contours, -1, color, 1, cv2.LINE_AA)


def _text(canvas: np.ndarray, text: str, at: Tuple[int, int], color: _Color) -> int:
    """Write text with a dark outline, readable on any background; return its width in pixels."""
    import cv2

    # OpenCV 5 spaces thicker letters more widely, so a thick black text cannot be the outline.
    for dx, dy in product((-1, 0, 1), repeat=2):
        shifted = (at[0] + dx, at[1] + dy)
        cv2.putText(canvas, text, shifted, _FONT, _SCALE, (0, 0, 0), 1, cv2.LINE_AA)
    cv2.putText(canvas, text, at, _FONT, _SCALE, color, 1, cv2.LINE_AA)
    return _text_width(text)


def _text_width(text: str) -> int:
    import cv2

    return cv2.getTextSize(text, _FONT, _SCALE, 1)[0][0]


def _label(
    canvas: np.ndarray, entries: Dict[_Color, List[dict]], names: Dict[int, str], factor: int
) -> None:
    """Write category and score above each box, where no other label is, in a light color."""
    height, width = canvas.shape[:2]
    taken: List[Tuple[int, int, int]] = []  # left, right and baseline of each label
    for color, entry in ((color, entry) for color, group in entries.items() for entry in group):
        text = names[entry["category_id"]]
        if "score" in entry:
            text += f" {100 * entry['score']:.0f}%"
        x, y = (int(factor * v) for v in entry["bbox"][:2])
        left = max(min(x, width - _text_width(text)), 0)
        right = left + _text_width(text)
        first = min(max(y - 3, _LINE), height)
        beside = [line for x0, x1, line in taken if x0 < right and left < x1]
        # Search downwards first, towards the object.
        lines = [*range(first, height + 1), *range(first - 1, _LINE - 1, -1)]
        free = (y for y in lines if all(abs(y - line) >= _LINE for line in beside))
        line = next(free, first)
        red, green, blue = ((c + 2 * 255) // 3 for c in color)
        _text(canvas, text, (left, line), (red, green, blue))
        taken.append((left, right, line))


def _titled(canvas: np.ndarray, parts: Dict[str, _Color]) -> np.ndarray:
    bar = np.full((_BAR, canvas.shape[1], 3), 40, np.uint8)
    x = 6
    for text, color in parts.items():
        x += _text(bar, text, (x, 18), color) + 14
    return np.concatenate([bar, canvas], axis=0)
