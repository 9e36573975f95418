#!/usr/bin/env python
"""
Prepare the tiles of configs/DOTA from DOTA 1.0 (https://captain-whu.github.io/DOTA). The input is a
folder with train/ and val/. Each has the PNGs of images and, in labelTxt*/, their labels.
"""

from __future__ import annotations

import math
import os
import sys
from typing import Dict, Iterator, List, NamedTuple, Optional, Tuple

import numpy as np
from tqdm import tqdm

from panet_d2 import cli
from panet_d2.data.tiles import (
    CocoWriter,
    Window,
    files_by_image,
    open_rgb,
    run_tiling,
    windows,
    written_whole,
)
from panet_d2.errors import DataError

CLASSES = (
    *("plane", "ship", "storage-tank", "baseball-diamond", "tennis-court", "basketball-court"),
    *("ground-track-field", "harbor", "bridge", "large-vehicle", "small-vehicle", "helicopter"),
    *("roundabout", "soccer-ball-field", "swimming-pool"),
)
# As in DOTA's development kit: a tile with a smaller share of an object need not find the object.
_VISIBLE_SHARE = 0.7
_HEADER = ("imagesource:", "gsd:")


class _Object(NamedTuple):
    corners: np.ndarray  # shape (4, 2)
    category_id: int
    difficult: bool


def prepare_dota(
    source: str, root: str, size: int = 1024, overlap: int = 200
) -> Dict[str, Tuple[int, int]]:
    """
    Write DOTA's training and validation sets as tiles. The datasets ``dota_train`` and ``dota_val``
    have upright boxes around the objects. The datasets ``dota_oriented_train`` and
    ``dota_oriented_val`` have oriented boxes.

    With upright boxes, an object of which less than 0.7 is in a tile is a crowd. A difficult object
    of the validation set is a crowd, too. The evaluation ignores crowds. Detectron2's evaluation of
    oriented boxes has no crowds. With oriented boxes, cut objects are left out, and difficult
    objects are normal objects.

    Args:
        source (str): the folder with ``train`` and ``val``.
        root (str): the folder that ``DETECTRON2_DATASETS`` names; the new folder ``dota`` is
            in it.
        size, overlap (int): side of a tile, and overlap of neighbouring tiles, in pixels.

    Returns:
        dict[str, tuple[int, int]]: tiles and objects of each dataset; crowds are not counted.

    Raises:
        DataError: if a file is missing or wrong; the message names the file.
        FileExistsError: if ``dota`` already exists.
    """
    counts = {}
    with written_whole(os.path.join(root, "dota")) as target:
        for split in ("train", "val"):
            upright, oriented = CocoWriter(CLASSES), CocoWriter(CLASSES)
            folder = os.path.join(target, split)
            os.makedirs(folder)
            images = _index(os.path.join(source, split))
            for name, (image_file, label_file) in tqdm(images.items(), desc=split, unit="image"):
                objects = list(_read_labels(label_file))
                image = open_rgb(image_file)
                for window in windows(*image.size, size, overlap):
                    upright.add_tile(image, name, window, folder)
                    oriented.add_image(upright.content["images"][-1]["file_name"], window)
                    for item in objects:
                        _add(item, window, upright, oriented, split == "val")
            for kind, writer in (("", upright), ("oriented_", oriented)):
                content = writer.content
                writer.save(os.path.join(target, "annotations", f"{kind}{split}.json"))
                found = sum(not a["iscrowd"] for a in content["annotations"])
                counts[f"dota_{kind}{split}"] = len(content["images"]), found
    return counts


def _index(folder: str) -> Dict[str, Tuple[str, str]]:
    """Return the PNG and the label file of each image."""
    images = files_by_image(folder, ".png")
    labels = files_by_image(folder, ".txt", "labelTxt")
    if not images:
        raise DataError(f"{folder} has no images/<image>.png; names with '_' are not DOTA's.")
    for name in sorted(images.keys() ^ labels.keys()):
        missing = "labelTxt/<image>.txt" if name in images else "<image>.png"
        raise DataError(f"{folder}: image {name} has no {missing.replace('<image>', name)}.")
    return {name: (images[name], labels[name]) for name in sorted(images)}


def _read_labels(path: str) -> Iterator[_Object]:
    try:
        with open(path, encoding="utf-8-sig") as f:
            lines = f.read().splitlines()
    except UnicodeDecodeError as e:
        raise DataError(f"{path} is not text in UTF-8: {e}") from e
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or line.startswith(_HEADER):
            continue
        try:
            corners = np.array(words[:8], dtype=float).reshape(4, 2)
            name, difficult = words[8], {"0": False, "1": True}[words[9]]
        except (ValueError, IndexError, KeyError):
            corners = np.array(np.nan)
        if not np.isfinite(corners).all():
            raise DataError(
                f"{path}: line {number} is {line!r}; it must be x1 y1 x2 y2 x3 y3 x4 y4, the "
                "class, and 0 or 1 for difficult."
            )
        if name not in CLASSES:
            raise DataError(
                f"{path}: line {number} has the class {name!r}, which is none of DOTA 1.0's: "
                f"{', '.join(CLASSES)}."
            )
        yield _Object(corners, CLASSES.index(name) + 1, difficult)


def _add(
    item: _Object, window: Window, upright: CocoWriter, oriented: CocoWriter, evaluated: bool
) -> None:
    """Add the part of an object that is in a tile."""
    corners = item.corners - window[:2]
    visible = _clip(corners, window[2] - window[0], window[3] - window[1])
    whole_area, area = _area(corners), _area(visible)
    if area < 1:  # of a pixel
        return
    cut = area < _VISIBLE_SHARE * whole_area
    low, high = visible.min(0), visible.max(0)
    upright.add_object(
        item.category_id,
        [*low.tolist(), *(high - low).tolist()],
        area,
        cut or (evaluated and item.difficult),
        segmentation=[visible.ravel().tolist()],
    )
    if not cut:
        box = oriented_box(corners)
        oriented.add_object(item.category_id, box, box[2] * box[3])


def _clip(polygon: np.ndarray, width: float, height: float) -> np.ndarray:
    """Return the part of a polygon (N, 2) inside a tile, by Sutherland and Hodgman."""
    for axis, sign, limit in ((0, -1, 0), (0, 1, width), (1, -1, 0), (1, 1, height)):
        depth = limit - sign * polygon[:, axis]
        points = []
        for i in range(len(polygon)):
            a, b = depth[i - 1], depth[i]
            if (a >= 0) != (b >= 0):  # the side crosses the border
                points.append(polygon[i - 1] + a / (a - b) * (polygon[i] - polygon[i - 1]))
            if b >= 0:
                points.append(polygon[i])
        polygon = np.array(points).reshape(-1, 2)
    return polygon


def _area(polygon: np.ndarray) -> float:
    x, y = polygon.T
    return float(abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2)


def oriented_box(corners: np.ndarray) -> List[float]:
    """
    Find the smallest rectangle around a quadrilateral that has a side parallel to one of its sides.

    Args:
        corners (ndarray): shape (4, 2), in order.

    Returns:
        list[float]: center x, center y, width, height and angle, as in
        :class:`detectron2.structures.RotatedBoxes`. The width is the longer side, and the angle is
        from -90 to 90 degrees.
    """
    best: List[float] = []
    for side in np.roll(corners, -1, 0) - corners:
        if not side.any():
            continue
        across = side / np.hypot(*side)
        axes = np.stack([across, [-across[1], across[0]]])
        low, high = (corners @ axes.T).min(0), (corners @ axes.T).max(0)
        center, (w, h) = (low + high) / 2 @ axes, high - low
        # In an image, y points down and angles run counter-clockwise.
        angle = -math.degrees(math.atan2(across[1], across[0]))
        if h > w:
            w, h, angle = h, w, angle + 90
        angle = (angle + 90) % 180 - 90
        if not best or w * h < best[2] * best[3]:
            best = [*center.tolist(), float(w), float(h), angle]
    return best


def main(argv: Optional[List[str]] = None) -> None:
    run_tiling(prepare_dota, argv, __doc__, size=1024)


if __name__ == "__main__":
    sys.exit(cli.run(main))
