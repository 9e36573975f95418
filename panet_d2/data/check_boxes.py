"""Detect boxes of an annotation file that are not in COCO's convention."""

from __future__ import annotations

from collections import Counter
from typing import Callable, Dict, Iterator, List, Sequence, Tuple

# Left, top, right and bottom in pixels; height and width of an image.
Corners = Tuple[float, float, float, float]
Size = Tuple[int, int]

# Rounding down both corner and size moves an edge by up to two pixels.
_ROUNDING = 2.0
# Boxes with a lower IoU with their masks are reported. Correct boxes have a low IoU if they have a
# wide margin, or if the object is partly hidden and the mask has only the visible part.
_LOOSE = 0.5
# If most masks are not within their boxes and have a lower IoU with them, the masks are wrong.
_WRONG = 0.3

_COCO = "x, y, width, height"
_CONVENTIONS: Dict[str, Callable[[float, float, float, float], Corners]] = {
    _COCO: lambda x, y, w, h: (x, y, x + w, y + h),
    "corners (x0, y0, x1, y1)": lambda x0, y0, x1, y1: (x0, y0, x1, y1),
    "corners (y0, x0, y1, x1)": lambda y0, x0, y1, x1: (x0, y0, x1, y1),
    "y, x, height, width": lambda y, x, h, w: (x, y, x + w, y + h),
    "x, y, height, width": lambda x, y, h, w: (x, y, x + w, y + h),
    "center x, center y, width, height": lambda x, y, w, h: (
        *(x - w / 2, y - h / 2),
        *(x + w / 2, y + h / 2),
    ),
}
_FRACTIONS = "fractions of the image's size (0 to 1)"


def is_near(box: Corners, mask: Corners) -> bool:
    """Whether a box is a mask's, up to rounding. False for NaN."""
    return (
        abs(box[0] - mask[0]) <= _ROUNDING
        and abs(box[1] - mask[1]) <= _ROUNDING
        and abs(box[2] - mask[2]) <= _ROUNDING
        and abs(box[3] - mask[3]) <= _ROUNDING
    )


class BoxStatistics:
    """
    Statistics of an annotation file's boxes, to detect their convention.

    Attributes:
        with_mask (int): number of boxes that were compared with their object's mask.
        without_area (int): number of boxes of no area or outside their image.
        without_mask (list[tuple]): boxes of objects without a mask, as in the file, each with the
            size of the image.
    """

    def __init__(self) -> None:
        self.with_mask = self.without_area = 0
        self.without_mask: List[Tuple[Sequence[float], Size]] = []
        self._misfits = self._disjoint = self._wrong = 0
        self._seen = self._fractions = 0
        self._conventions: Counter = Counter()  # of the misfits

    def see(self, box: Sequence[float], size: Size) -> None:
        """Count a box, with or without a mask."""
        self._seen += 1
        self._fractions += max(box) <= 1 and min(size) > 2

    def compare(self, box: Sequence[float], mask: Corners, size: Size) -> str:
        """
        Count a box, and compare the box with its object's mask.

        Args:
            box (sequence[float]): the box as in the file.
            mask (Corners): the extent of the mask.
            size (Size): the image's size.

        Returns:
            str: how the box differs from the mask; "" if both agree, or the mask is not visible.
        """
        mask = _clip(mask, size)
        if mask[0] >= mask[2] or mask[1] >= mask[3]:
            return ""
        self.with_mask += 1
        as_coco = _clip(_CONVENTIONS[_COCO](*box), size)
        overlap = _overlap(as_coco, mask)
        if is_near(as_coco, mask) or overlap > 0.8:
            return ""
        self._misfits += 1
        self._disjoint += overlap == 0
        self._wrong += overlap < _WRONG and not _is_within(mask, as_coco)
        detail = f"IoU {overlap:.2f}"
        for name, corners in _other_readings(box, size):
            corners = _clip(corners, size)
            if is_near(corners, mask) or _overlap(corners, mask) > 0.9:
                self._conventions[name] += 1
                return f"{detail}; it looks like {name}"
        return detail if overlap < _LOOSE else ""

    def fault(self) -> str:
        """Return what is wrong with the boxes of the file, if most are wrong, or ""."""
        if 2 * self.without_area > self._seen:
            return (
                "most boxes have no area or are outside their image; compute boxes from the masks"
            )
        count = self.with_mask
        if not count:
            name = _convention_without_masks(self.without_mask)
        else:
            name, fits = next(iter(self._conventions.most_common(1)), ("", 0))
            if 2 * fits <= self._misfits or fits < max(min(3, count), count / 10):
                name = ""
            if not name and 2 * self._disjoint > count:
                return "boxes lie beside their masks; both must be in pixels of the image"
            if not name and 2 * self._wrong > count:
                return "boxes do not fit their masks; masks in RLE must count down the columns"
        if not name and 2 * self._fractions > self._seen:
            name = _FRACTIONS
        return f"boxes look like {name}; COCO's are {_COCO}, in pixels" if name else ""


def _convention_without_masks(boxes: Sequence[Tuple[Sequence[float], Size]]) -> str:
    """Return the convention of boxes that cannot be in COCO's, or "" if they can be."""
    # Some boxes of cut-off objects reach beyond the image. If many do, and another convention has
    # nearly all boxes inside, the boxes are in that convention.
    read = _CONVENTIONS[_COCO]
    outside = sum(not _is_inside(read(*box), size) for box, size in boxes)
    if outside < max(3, len(boxes) / 3):
        return ""
    inside: Counter = Counter()
    for box, size in boxes:
        inside.update(name for name, c in _other_readings(box, size) if _is_inside(c, size))
    name, fits = next(iter(inside.most_common(1)), ("", 0))
    return name if fits >= 0.98 * len(boxes) else ""


def _other_readings(box: Sequence[float], size: Size) -> Iterator[Tuple[str, Corners]]:
    """Yield each convention other than COCO's, and the corners of a box in this convention."""
    for name, read in _CONVENTIONS.items():
        if name != _COCO:
            yield name, read(*box)
    if max(box) <= 1:
        height, width = size
        for name, read in _CONVENTIONS.items():
            x0, y0, x1, y1 = read(*box)
            corners = x0 * width, y0 * height, x1 * width, y1 * height
            yield f"{name}, in {_FRACTIONS}", corners


def _is_within(inner: Corners, outer: Corners) -> bool:
    low, high = zip(inner[:2], outer[:2]), zip(inner[2:], outer[2:])
    return all(i >= o - _ROUNDING for i, o in low) and all(i <= o + _ROUNDING for i, o in high)


def _is_inside(box: Corners, size: Size) -> bool:
    """Whether a box has an area and is inside the image, up to one pixel."""
    (x0, y0, x1, y1), (height, width) = box, size
    return -1 <= x0 < x1 <= width + 1 and -1 <= y0 < y1 <= height + 1


def _clip(box: Corners, size: Size) -> Corners:
    (x0, y0, x1, y1), (height, width) = box, size
    return max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)


def _overlap(a: Corners, b: Corners) -> float:
    """Return the IoU of two boxes. Either may have no area."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)
