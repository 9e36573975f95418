"""Pictures of predictions beside the ground truth."""

from __future__ import annotations

from itertools import product
from typing import Dict, List, Tuple

import cv2
import numpy as np
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from .matching import ImageMatch

__all__ = ["annotation_mask", "draw_comparison"]

# RGB, told apart by most colour-blind readers too.
_FOUND, _FALSE, _MISSED, _TRUTH = (0, 190, 160), (230, 60, 40), (255, 200, 0), (90, 150, 255)
_WRONG = (220, 80, 220)
_MIN_HEIGHT = 384  # small images are enlarged, so that outlines and labels do not cover them
_BAR = 26
_FONT, _SCALE, _LINE = cv2.FONT_HERSHEY_SIMPLEX, 0.45, 13


def draw_comparison(
    image: np.ndarray, annotations: List[dict], match: ImageMatch, coco: COCO
) -> np.ndarray:
    """
    The ground truth on the left; on the right what was found (green), where its masks are wrong
    (magenta), false positives (red) and the outlines of what was missed (yellow).

    Args:
        image (np.ndarray): RGB, uint8, shape (H, W, 3).
        annotations (list[dict]): the image's COCO annotations.
        match (ImageMatch): from :func:`panet_d2.analysis.match_predictions`.
        coco (COCO): the ground truth, for the names of the categories.

    Returns:
        np.ndarray: RGB, uint8, shape (H', 2 W' + gap, 3), enlarged by a whole factor where the
        image is small.
    """
    factor = max(1, -(-_MIN_HEIGHT // image.shape[0]))
    size = image.shape[:2]
    canvas = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_NEAREST)
    truth = _draw(canvas, annotations, _TRUTH, size, fill=0.15)
    right = _draw(canvas, match.found, _FOUND, size)
    right = _draw_wrong_pixels(right, match, size)
    right = _draw(right, match.false_positives, _FALSE, size)
    right = _draw(right, match.missed, _MISSED, size, fill=0.0)
    names = {c["id"]: c["name"] for c in coco.loadCats(coco.getCatIds())}
    if len(names) > 1:  # a single class needs no name on every object
        _label(truth, {_TRUTH: annotations}, names, factor)
        _label(right, {_FOUND: match.found, _FALSE: match.false_positives}, names, factor)
    panels = [
        _titled(truth, [(f"truth: {len(annotations)} objects", _TRUTH)]),
        np.full((truth.shape[0] + _BAR, 6, 3), 255, np.uint8),
        _titled(
            right,
            [
                (f"{len(match.found)} found", _FOUND),
                ("wrong pixels", _WRONG),
                (f"{len(match.false_positives)} false", _FALSE),
                (f"{len(match.missed)} missed", _MISSED),
            ],
        ),
    ]
    return np.concatenate(panels, axis=1)


def annotation_mask(entry: dict, size: Tuple[int, int]) -> np.ndarray:
    """
    Args:
        entry (dict): an annotation or a prediction in COCO's format, with polygons, RLE, or only a
            box, whose mask is all of it.
        size (tuple[int, int]): height and width of the image.

    Returns:
        np.ndarray: uint8, 0 and 1, shape (height, width).
    """
    segmentation = entry.get("segmentation")
    if not segmentation:
        mask = np.zeros(size, np.uint8)
        x, y, w, h = (int(round(v)) for v in entry["bbox"])
        mask[max(y, 0) : y + h, max(x, 0) : x + w] = 1
        return mask
    if isinstance(segmentation, list):
        segmentation = mask_util.merge(mask_util.frPyObjects(segmentation, *size))
    elif isinstance(segmentation["counts"], list):
        segmentation = mask_util.frPyObjects(segmentation, *size)
    return mask_util.decode(segmentation)


def _draw(
    canvas: np.ndarray,
    entries: List[dict],
    color: Tuple[int, int, int],
    size: Tuple[int, int],
    fill: float = 0.35,
) -> np.ndarray:
    canvas = canvas.copy()
    height, width = canvas.shape[:2]
    for entry in entries:
        mask = cv2.resize(
            annotation_mask(entry, size), (width, height), interpolation=cv2.INTER_NEAREST
        )
        inside = mask.astype(bool)
        canvas[inside] = ((1 - fill) * canvas[inside] + fill * np.array(color)).astype(np.uint8)
        contours, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
        cv2.drawContours(canvas, contours, -1, color, 1, cv2.LINE_AA)
    return canvas


def _draw_wrong_pixels(canvas: np.ndarray, match: ImageMatch, size: Tuple[int, int]) -> np.ndarray:
    """Mark what a mask covers beyond its object, and what of the object it leaves out."""
    wrong = np.zeros(size, np.uint8)
    for prediction, truth in zip(match.found, match.objects):
        wrong |= annotation_mask(prediction, size) ^ annotation_mask(truth, size)
    height, width = canvas.shape[:2]
    inside = cv2.resize(wrong, (width, height), interpolation=cv2.INTER_NEAREST).astype(bool)
    canvas = canvas.copy()
    canvas[inside] = (0.4 * canvas[inside] + 0.6 * np.array(_WRONG)).astype(np.uint8)
    return canvas


def _text(canvas: np.ndarray, text: str, at: Tuple[int, int], color: Tuple[int, int, int]) -> int:
    """Write with a dark outline, readable on anything; returns the width."""
    # Not a thicker text behind it: in OpenCV 5 that is also a wider one.
    for dx, dy in product((-1, 0, 1), repeat=2):
        shifted = (at[0] + dx, at[1] + dy)
        cv2.putText(canvas, text, shifted, _FONT, _SCALE, (0, 0, 0), 1, cv2.LINE_AA)
    cv2.putText(canvas, text, at, _FONT, _SCALE, color, 1, cv2.LINE_AA)
    return _text_width(text)


def _text_width(text: str) -> int:
    return cv2.getTextSize(text, _FONT, _SCALE, 1)[0][0]


def _label(
    canvas: np.ndarray,
    entries: Dict[Tuple[int, int, int], List[dict]],
    names: Dict[int, str],
    factor: int,
) -> None:
    """
    Write category and score above the corner of each box, in a light tone of the color that its
    entry stands under; where another label is already, the next free line below.
    """
    height, width = canvas.shape[:2]
    taken: List[Tuple[int, int, int]] = []  # left, right and baseline of the labels so far
    for color, entry in ((color, entry) for color, group in entries.items() for entry in group):
        text = names[entry["category_id"]]
        if "score" in entry:
            text += f" {100 * entry['score']:.0f}%"
        x, y = (int(factor * v) for v in entry["bbox"][:2])
        text_width = _text_width(text)
        left = max(min(x, width - text_width), 0)
        right = left + text_width
        first = min(max(y - 3, _LINE), height)
        beside = [line for x0, x1, line in taken if x0 < right and left < x1]
        # Downwards first: there, and not above, is what the label belongs to.
        lines = [*range(first, height + 1), *range(first - 1, _LINE - 1, -1)]
        free = (y for y in lines if all(abs(y - line) >= _LINE for line in beside))
        line = next(free, first)
        red, green, blue = ((c + 2 * 255) // 3 for c in color)
        _text(canvas, text, (left, line), (red, green, blue))
        taken.append((left, right, line))


def _titled(canvas: np.ndarray, parts: List[Tuple[str, Tuple[int, int, int]]]) -> np.ndarray:
    bar = np.full((_BAR, canvas.shape[1], 3), 40, np.uint8)
    x = 6
    for text, color in parts:
        x += _text(bar, text, (x, 18), color) + 14
    return np.concatenate([bar, canvas], axis=0)
