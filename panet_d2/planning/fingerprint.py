"""Measurements of a dataset in COCO format, from which a config is planned."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

import numpy as np
import torch
from detectron2.structures import Boxes, pairwise_iou
from detectron2.utils.file_io import PathManager
from PIL import Image
from tqdm import tqdm

from ..data.check import raise_errors, read_coco
from ..data.check_annotations import check_annotations, has_oriented_boxes
from ..data.problem import Problem
from ..errors import DataError

QUANTILES = (0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
OVERLAPS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
_FEWEST_OBJECTS = 10  # quantiles of fewer objects say nothing

# What annotation and photo tools append to the name of a copy.
_COPY = re.compile(
    r"(\.rf\.[0-9a-f]+|[ _-]*(copy|aug(mented)?|flip(ped)?|rot(ated)?)[ _-]*\d*|[ _]*\(\d+\))+$"
)

_COUNTER = re.compile(r"(image|img|im|frame)?[ _-]*\d{1,6}")  # such names match by chance


@dataclass(frozen=True)
class Fingerprint:
    """
    Measurements of a dataset with N images and M objects. Objects are annotations that are not
    crowd regions and whose box has an area.

    Attributes:
        sizes (np.ndarray): shape (N, 2), height and width of each image in pixels.
        boxes (np.ndarray): shape (M, 4), x0, y0, x1, y1 in pixels of the original images.
        images (np.ndarray): shape (M,), index of each object's image.
        classes (np.ndarray): shape (M,), index of each object's class.
        areas (np.ndarray): shape (M,), annotated areas in pixels, else areas of the boxes.
        overlaps (np.ndarray): shape (M,), the highest IoU of the object's box with an earlier
            object of its image, so that each pair counts once; 0 if there is none.
        class_overlaps (np.ndarray): the same among objects of one class.
        categories (tuple[str]): names of the classes.
        masks (dict[str, int]): number of objects whose mask is "polygon", "rle" or "none".
        corners (float): median number of corners of the polygons of an object; NaN without any.
        crowds (int): number of crowd regions.
        files (tuple[str]): file names of the images.
        most_at_test (int): number of objects of the fullest image of the evaluation; 0 if unknown.
    """

    sizes: np.ndarray
    boxes: np.ndarray
    images: np.ndarray
    classes: np.ndarray
    areas: np.ndarray
    overlaps: np.ndarray
    class_overlaps: np.ndarray
    categories: Tuple[str, ...]
    masks: Dict[str, int]
    corners: float = float("nan")
    crowds: int = 0
    files: Tuple[str, ...] = ()
    most_at_test: int = 0

    @cached_property
    def short_edges(self) -> np.ndarray:
        """Shape (N,), the shorter edge of each image in pixels."""
        return self.sizes.min(axis=1)

    @cached_property
    def elongations(self) -> np.ndarray:
        """Shape (N,), the longer edge of each image divided by the shorter."""
        return self.sizes.max(axis=1) / self.short_edges

    @cached_property
    def sides(self) -> np.ndarray:
        """Shape (M,), the root of each box's area in pixels."""
        return np.sqrt((self.boxes[:, 2:] - self.boxes[:, :2]).prod(axis=1))

    @cached_property
    def relative_sides(self) -> np.ndarray:
        """Shape (M,), the sides divided by the shorter edge of the object's image."""
        return self.sides / self.short_edges[self.images]

    @cached_property
    def aspect_ratios(self) -> np.ndarray:
        """Shape (M,), height divided by width of each box, as for Detectron2's anchors."""
        width, height = (self.boxes[:, 2:] - self.boxes[:, :2]).T
        return height / width

    @cached_property
    def objects_per_image(self) -> np.ndarray:
        """Shape (N,), the number of objects in each image."""
        return np.bincount(self.images, minlength=len(self.sizes))

    @cached_property
    def images_per_class(self) -> np.ndarray:
        """The number of images in which each class occurs."""
        pairs = np.unique(np.stack([self.images, self.classes], axis=1), axis=0)
        return np.bincount(pairs[:, 1], minlength=len(self.categories))

    @property
    def empty_share(self) -> float:
        """Share of images without objects."""
        return float((self.objects_per_image == 0).mean())

    def doubt(self) -> str:
        """Return why sizes cannot be planned from this dataset, or ""."""
        if len(self.boxes) == 0:
            return "the data has no objects"
        if (self.objects_per_image > 0).sum() < 2:
            return "only one image has objects"
        if len(self.boxes) < _FEWEST_OBJECTS:
            return f"the data has only {len(self.boxes)} objects"
        if np.ptp(np.log(self.sides)) < 0.01 and np.ptp(np.log(self.relative_sides)) < 0.01:
            return "all boxes have the same size"
        return ""

    def summary(self) -> Dict[str, Any]:
        """Return counts, shares and quantiles, ready for JSON."""
        common, rare = self.images_per_class.max(initial=0), self.images_per_class.min(initial=0)
        return {
            "images": len(self.sizes),
            "objects": len(self.boxes),
            "crowds": self.crowds,
            "empty images, share": self.empty_share,
            "masks": dict(self.masks),
            "corners of an object's polygons, median": _finite(self.corners),
            "quantiles": {
                "at": list(QUANTILES),
                "shorter edge of the image, pixels": _quantiles(self.short_edges),
                "longer edge divided by the shorter": _quantiles(self.elongations),
                "objects per image": _quantiles(self.objects_per_image),
                "side of the box, pixels": _quantiles(self.sides),
                "side of the box divided by the image's shorter edge": _quantiles(
                    self.relative_sides
                ),
                "height of the box divided by its width": _quantiles(self.aspect_ratios),
            },
            "objects that overlap another, share by IoU": {
                str(t): float((self.overlaps > t).mean()) if len(self.boxes) else 0.0
                for t in OVERLAPS
            },
            "objects by class": dict(
                zip(
                    self.categories,
                    np.bincount(self.classes, minlength=len(self.categories)).tolist(),
                )
            ),
            "images of the most common class per image of the rarest": _finite(
                common / rare if rare else float("nan")
            ),
        }


def _quantiles(values: np.ndarray) -> List[Optional[float]]:
    if not len(values):
        return [None] * len(QUANTILES)
    return [float(f"{v:.4g}") for v in np.quantile(values, QUANTILES)]


def _finite(value: float) -> Optional[float]:
    """None for NaN, which JSON does not have."""
    return round(float(value), 4) if np.isfinite(value) else None


def read_fingerprint(json_file: str, image_root: str, evaluated: bool = False) -> Fingerprint:
    """
    Measure a dataset: check and read its annotations, and read the header of each image.

    Args:
        json_file (str): annotation file in COCO format.
        image_root (str): folder of the images.
        evaluated (bool): whether models are evaluated on the dataset or, if False, trained on it.

    Raises:
        DataError: if the dataset cannot be used.
    """
    content = read_coco(json_file)
    if not PathManager.isdir(image_root):
        raise DataError(f"there is no image folder {image_root}.")
    problems = check_annotations(content, evaluated=evaluated, trained=not evaluated)
    raise_errors(problems, json_file, image_root)
    if has_oriented_boxes(content):
        raise DataError(f"{json_file} has oriented boxes; only upright boxes can be measured.")
    images = tqdm(content["images"], desc="image headers", unit="image", disable=None)
    problems = [p for i in images for p in _header_problems(i, image_root)]
    raise_errors(problems, json_file, image_root)
    return measure(content)


def _header_problems(record: dict, root: str) -> Iterable[Problem]:
    path = os.path.join(root, record["file_name"])
    if not PathManager.isfile(path):
        return [Problem(path, "there is no such image")]
    try:
        with PathManager.open(path, "rb") as f, Image.open(f) as image:
            size = image.size
    except Exception as e:  # Pillow raises almost any error for broken images
        return [Problem(path, "image cannot be read", f"{type(e).__name__}: {e}")]
    annotated = (record["width"], record["height"])
    if annotated not in (size, size[::-1]):  # EXIF can turn the image
        detail = f"{size[0]}x{size[1]}; annotated is {annotated[0]}x{annotated[1]}"
        return [Problem(path, "image has another size than annotated", detail)]
    return []


def measure(content: dict) -> Fingerprint:
    """
    Measure the content of an annotation file.

    Args:
        content (dict): see :func:`panet_d2.data.check.read_coco`; without errors of
            :func:`panet_d2.data.check_annotations`.
    """
    images, categories = content["images"], sorted(content["categories"], key=lambda c: c["id"])
    index = {image["id"]: i for i, image in enumerate(images)}
    class_index = {category["id"]: i for i, category in enumerate(categories)}
    sizes = np.array([(i["height"], i["width"]) for i in images], float).reshape(-1, 2)
    boxes, image_ids, classes, areas, corners = [], [], [], [], []
    masks: Counter = Counter()
    crowds = 0
    for a in content.get("annotations", ()):
        if a.get("iscrowd"):
            crowds += 1
            continue
        i = index[a["image_id"]]
        height, width = sizes[i]
        x, y, w, h = a["bbox"]
        box = (max(x, 0), max(y, 0), min(x + w, width), min(y + h, height))
        if box[2] <= box[0] or box[3] <= box[1]:  # training skips this box
            continue
        boxes.append(box)
        image_ids.append(i)
        classes.append(class_index[a["category_id"]])
        areas.append(a.get("area", w * h))
        mask = a.get("segmentation")
        masks["none" if not mask else "rle" if isinstance(mask, dict) else "polygon"] += 1
        if isinstance(mask, list) and mask:
            corners.append(sum(map(len, mask)) / 2)
    arrays = (
        np.array(boxes, float).reshape(-1, 4),
        np.array(image_ids, int),
        np.array(classes, int),
    )
    return Fingerprint(
        sizes,
        *arrays,
        np.array(areas, float),
        *_overlaps(*arrays),
        categories=tuple(category["name"] for category in categories),
        masks=dict(masks),
        corners=float(np.median(corners)) if corners else float("nan"),
        crowds=crowds,
        files=tuple(image["file_name"] for image in images),
    )


def _overlaps(
    boxes: np.ndarray, images: np.ndarray, classes: np.ndarray
) -> Tuple[np.ndarray, np.ndarray]:
    """``Fingerprint.overlaps`` and ``class_overlaps``."""
    found = np.zeros((2, len(boxes)))
    order = np.argsort(images, kind="stable")
    for group in np.split(order, np.flatnonzero(np.diff(images[order])) + 1):
        if len(group) < 2:
            continue
        group_boxes = Boxes(torch.from_numpy(boxes[group]))
        iou = np.tril(pairwise_iou(group_boxes, group_boxes).numpy(), -1)
        same = classes[group][:, None] == classes[group]
        found[:, group] = iou.max(axis=1), (iou * same).max(axis=1)
    return found[0], found[1]


def similar_files(train: Sequence[str], val: Sequence[str]) -> List[Tuple[str, str]]:
    """
    Find validation images whose file name matches that of a training image.

    The folder, the case, the extension and marks of a copy do not matter. Marks of a copy are
    " (1)", "_flip", Roboflow's ".rf.HASH" and others. Numbered names such as "0001" or "img_17"
    are left out.

    Returns:
        list[tuple[str, str]]: names of the training image and of the validation image.
    """
    known = {_stem(name): name for name in train}
    pairs = [(known[_stem(name)], name) for name in val if _stem(name) in known]
    return [pair for pair in pairs if not _COUNTER.fullmatch(_stem(pair[1]))]


def _stem(name: str) -> str:
    stem = os.path.splitext(os.path.basename(name.replace("\\", "/")))[0].lower()
    return _COPY.sub("", stem) or stem
