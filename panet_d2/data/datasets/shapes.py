"""
The embedded dataset, drawn on first use. It has shapes of six classes, 8 to 200 pixels large,
textured, overlapping and cut off by the border. Training on it shows within minutes whether a model
learns to segment instances at all scales.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
import uuid
import zlib
from functools import partial
from itertools import product

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from pycocotools import mask as mask_util
from tqdm import tqdm

from ...errors import DataError
from ..check_cache import cache_folder

CLASSES: tuple[str, ...] = ("disc", "square", "triangle", "star", "ring", "cross")
SPLITS: dict[str, int] = {"train": 1000, "val": 100}  # number of images
SIZES: dict[str, int] = {"panet_shapes": 256, "panet_shapes_small": 128}  # side of the images

# Part of the seeds and of the folder's name. Increase the version whenever the images change, so
# that no cache of old images is used.
_VERSION = 1
_MIN_SIDE, _MAX_SIDE = 8.0, 200.0 / 256.0  # in pixels; as a share of the image
_MIN_COUNT, _MAX_COUNT = 6, 16
# Smallest visible share and area in pixels of every instance: with less, classes look alike.
_MIN_VISIBLE, _MIN_AREA = 0.6, 16
_TRIES = 30
_PATTERNS = ("plain", "ramp", "noise", "stripes", "checks", "dots")
_STALE_SECONDS = 3600

_logger = logging.getLogger(__name__)


def _spikes(x: np.ndarray, y: np.ndarray, points: int, inner: float) -> np.ndarray:
    """Return the distance to the edges of a star with tips at radius 1; large ``inner``: convex."""
    sector = np.pi / points
    angle = np.abs((np.arctan2(x, y) + sector) % (2 * sector) - sector)
    nx, ny = 1 - inner * np.cos(sector), inner * np.sin(sector)
    normal, length = np.arctan2(nx, ny), np.hypot(nx, ny)
    return np.hypot(x, y) * np.cos(angle - normal) - ny / length


def _distance(category: int, x: np.ndarray, y: np.ndarray, slim: float) -> np.ndarray:
    """Return the distance to a shape's outline, negative inside; ``slim`` is from 0 to 1."""
    name, ax, ay = CLASSES[category], np.abs(x), np.abs(y)
    if name == "disc":
        return np.hypot(x, y) - 1
    if name == "square":
        return np.maximum(ax, ay) - np.sqrt(0.5)
    if name == "triangle":
        return _spikes(x, y, 3, 0.5)
    if name == "star":
        return _spikes(x, y, 5, 0.5 - 0.1 * slim)
    if name == "ring":
        hole = 0.45 + 0.2 * slim
        return np.abs(np.hypot(x, y) - (1 + hole) / 2) - (1 - hole) / 2
    wide = _arm(slim)
    long = np.sqrt(1 - wide**2)
    return np.minimum(np.maximum(ax - long, ay - wide), np.maximum(ax - wide, ay - long))


def _arm(slim: float) -> float:
    """Half the width of a cross's arms."""
    return 0.36 - 0.1 * slim


def _corners(category: int, slim: float) -> np.ndarray:
    """Points, 2 x N, with the same bounding box as the shape at any rotation."""
    tilt = np.arcsin(_arm(slim))
    first, count = {
        "square": ([np.pi / 4], 4),
        "triangle": ([np.pi / 2], 3),
        "star": ([np.pi / 2], 5),
        "cross": ([-tilt, tilt], 4),
    }.get(CLASSES[category], ([0.0], 64))
    angle = np.add.outer(first, 2 * np.pi * np.arange(count) / count).ravel()
    return np.stack([np.cos(angle), np.sin(angle)])


def _draw(rng: np.random.Generator, category: int, side: float) -> np.ndarray:
    """Distances to the outline in pixels, on a grid that leaves room for the shadow."""
    angle, aspect, slim = rng.uniform(0, 2 * np.pi), rng.uniform(0.7, 1), rng.random()
    cos, sin = np.cos(angle), np.sin(angle)
    frame = np.array([[cos, -sin], [sin, cos]]) * [1, aspect]
    corners = frame @ _corners(category, slim)
    low, high = corners.min(axis=1), corners.max(axis=1)
    scale = side / (high - low).max()
    # A random position between two pixels, so that small shapes are not all alike.
    x0, y0 = rng.random(2) - low * scale + _pad(side)
    width, height = np.ceil((high - low) * scale).astype(int) + 1 + 2 * _pad(side)
    x = (np.arange(width) + 0.5 - x0) / scale
    y = ((np.arange(height) + 0.5 - y0) / scale)[:, None]
    own = (cos * x + sin * y, (cos * y - sin * x) / aspect)
    return _distance(category, *own, slim) * scale * np.sqrt(aspect)


def _pad(side: float) -> int:
    return 2 + int(side / 12)


def _texture(rng: np.random.Generator, height: int, width: int, period: float) -> np.ndarray:
    """Return a pattern of values from 0 to 1 with details of about ``period`` pixels."""
    pattern, angle = _PATTERNS[rng.integers(len(_PATTERNS))], rng.uniform(0, np.pi)
    phase = rng.uniform(0, 2 * np.pi, 2).astype(np.float32)
    if pattern == "plain":
        return np.zeros((height, width), np.float32)
    if pattern == "noise":
        return _noise(rng, height, width, period)
    x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    along, across = cos * x + sin * y, cos * y - sin * x
    if pattern == "ramp":
        return (along - along.min()) / np.ptp(along)
    # Large dots would be discs without annotation, and large checks squares.
    frequency = np.float32(2 * np.pi / (period if pattern == "stripes" else min(period, 9)))
    u, v = np.sin(frequency * along + phase[0]), np.sin(frequency * across + phase[1])
    wave = {"stripes": u, "checks": u * v, "dots": u + v - 0.6}[pattern]
    return np.clip(0.5 + 2 * wave, 0, 1)


def _noise(rng: np.random.Generator, height: int, width: int, period: float) -> np.ndarray:
    """Smooth noise of three octaves, the coarsest of ``period`` pixels."""
    import cv2

    total = np.zeros((height, width), np.float32)
    for octave in range(3):
        step = max(period / 2**octave, 1)
        grid = rng.random((int(height / step) + 2, int(width / step) + 2), dtype=np.float32)
        total += cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC) / 2**octave
    return np.clip(total - 0.4, 0, 1)


def _blend(image: np.ndarray, colour: np.ndarray, weight: np.ndarray) -> None:
    """Move ``image`` towards ``colour`` by ``weight``, from 0 to 1, in place."""
    image += weight[..., None] * (colour - image)


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    colours = rng.uniform(20, 235, (4, 3)).astype(np.float32)
    image = np.tile(colours[0], (size, size, 1))
    _blend(image, colours[1], _noise(rng, size, size, rng.uniform(24, 128)))
    for colour in colours[2:]:
        period = np.exp(rng.uniform(np.log(5), np.log(60)))
        _blend(image, colour, _texture(rng, size, size, period) * rng.uniform(0.1, 0.5))
    return image


def _colours(rng: np.random.Generator, category: int, count: int) -> np.ndarray:
    """Colours of a class, count x 3. Hues of classes overlap, so that hue alone does not tell."""
    import cv2

    hue = (360 * category / len(CLASSES) + 12 * rng.standard_normal(count)) % 360
    saturation, value = rng.uniform(0.4, 1, count), rng.uniform(80, 245, count)
    hsv = np.stack([hue, saturation, value], axis=-1).astype(np.float32)
    return cv2.cvtColor(hsv[None], cv2.COLOR_HSV2RGB)[0]


def _paint(
    rng: np.random.Generator, image: np.ndarray, distance: np.ndarray, category: int, side: float
) -> None:
    """Draw one shape with its shadow over ``image``, which has the size of ``distance``."""
    height, width = distance.shape
    alpha = np.clip(0.5 - distance, 0, 1)
    shadow = np.clip(1 - distance / _pad(side), 0, 1) ** 2
    # The first colour with enough contrast to the pixels below, else the one with the most.
    below = (image * alpha[..., None]).sum((0, 1)) / alpha.sum()
    colours = _colours(rng, category, 12)
    contrast = np.linalg.norm(colours - below, axis=1)
    colour = colours[np.argmax(np.minimum(contrast, 110))]
    # A pattern as coarse as the shape would break the smallest shapes into pieces.
    spread = min(80, 2 * side)
    other = colour + rng.uniform(-spread, spread, 3).astype(np.float32)

    paint = np.tile(colour, (height, width, 1))
    _blend(paint, other, _texture(rng, height, width, rng.uniform(4, max(9, side / 3))))
    light = rng.uniform(-0.2, 0.2, 2).astype(np.float32)
    x, y = np.linspace(-1, 1, width), np.linspace(-1, 1, height)[:, None]
    paint *= (1 + light[0] * x + light[1] * y)[..., None]
    _blend(image, np.float32(0), shadow * rng.uniform(0.15, 0.5))
    _blend(image, paint, alpha)


def _window(top: int, left: int, shape: tuple[int, int], size: int) -> tuple:
    """Return where a grid at (top, left) meets the image: slices of the image and of the grid."""
    spans = []
    for start, length in zip((top, left), shape):
        low, high = max(start, 0), min(start + length, size)
        spans.append((slice(low, high), slice(low - start, high - start)))
    return tuple(zip(*spans))


def _place(
    rng: np.random.Generator, inside: np.ndarray, pad: int, owner: np.ndarray, full: list[int]
) -> tuple | None:
    """
    Find a place where the new shape, ``inside``, and all shapes below stay visible. ``owner`` has
    the number of the shape at each pixel or -1, ``full`` the areas of the shapes without occlusion.
    """
    size = len(owner)
    needed = np.maximum(_MIN_AREA, _MIN_VISIBLE * np.array([*full, inside.sum()]))
    visible = np.bincount(owner.ravel() + 1, minlength=len(full) + 1)[1:]
    extent = np.array(inside.shape) - 2 * pad
    for _ in range(_TRIES):
        # Up to a fifth of each side may be outside of the image.
        corner = rng.uniform(-0.2 * extent, size - 0.8 * extent)
        top, left = np.round(corner).astype(int) - pad
        target, source = _window(top, left, inside.shape, size)
        hidden = np.bincount(owner[target][inside[source]] + 1, minlength=len(full) + 1)
        if (np.append(visible - hidden[1:], hidden.sum()) >= needed).all():
            return target, source
    return None


def render_image(split: str, index: int, size: int = 256) -> tuple[np.ndarray, list[dict]]:
    """
    Draw one image, which depends only on the arguments.

    Args:
        split (str): a key of ``SPLITS``.
        index (int): number of the image, from 0; may exceed the number in ``SPLITS``.
        size (int): side of the image in pixels, at least 64. The largest shapes grow with it.

    Returns:
        tuple[ndarray, list[dict]]: the image, size x size x 3, uint8 in RGB; and for each instance
        ``category`` (int, index into ``CLASSES``) and ``mask`` (ndarray, size x size, bool), the
        visible part. Masks do not overlap.

    Raises:
        ValueError: if the split is unknown, the index negative or the size too small.
    """
    if split not in SPLITS or index < 0 or size < 64:
        raise ValueError(
            f"there is no image {index} of {size} pixels in split {split!r}; splits are "
            f"{', '.join(SPLITS)}, images count from 0, and sizes start at 64."
        )
    rng = np.random.default_rng([_VERSION, zlib.crc32(split.encode()), index])
    image = _background(rng, size)
    owner = np.full((size, size), -1)
    count = rng.integers(_MIN_COUNT, _MAX_COUNT + 1)
    sides = np.exp(rng.uniform(np.log(_MIN_SIDE), np.log(_MAX_SIDE * size), count))
    # Small shapes are mostly, but not always, on top. Otherwise few of them would be visible.
    order = np.argsort(-sides * np.exp(rng.uniform(-0.7, 0.7, count)), kind="stable")
    full: list[int] = []
    categories: list[int] = []
    for side in sides[order]:
        category = int(rng.integers(len(CLASSES)))
        distance = _draw(rng, category, side)
        inside = distance < 0
        place = _place(rng, inside, _pad(side), owner, full)
        if place is None:
            continue
        target, source = place
        _paint(rng, image[target], distance[source].astype(np.float32), category, side)
        owner[target][inside[source]] = len(full)
        full.append(int(inside.sum()))
        categories.append(category)
    image += rng.standard_normal(image.shape, dtype=np.float32) * np.float32(rng.uniform(1, 3))
    image = np.clip(np.round(image), 0, 255).astype(np.uint8)
    return image, [{"category": c, "mask": owner == i} for i, c in enumerate(categories)]


def _annotation(instance: dict) -> dict:
    """Return COCO's fields of one instance, without ids."""
    rle = mask_util.encode(np.asfortranarray(instance["mask"], dtype=np.uint8))
    return {
        "category_id": instance["category"] + 1,
        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
        "bbox": mask_util.toBbox(rle).tolist(),
        "area": int(mask_util.area(rle)),
        "iscrowd": 0,
    }


def _write_split(folder: str, split: str, size: int, progress: tqdm) -> None:
    import cv2

    os.makedirs(os.path.join(folder, split))
    images: list[dict] = []
    annotations: list[dict] = []
    for index in range(SPLITS[split]):
        image, instances = render_image(split, index, size)
        name = f"{index:06d}.png"
        path = os.path.join(folder, split, name)
        if not cv2.imwrite(path, image[..., ::-1]):
            raise OSError(f"cannot write {path}")
        height, width = image.shape[:2]
        images.append({"id": index, "file_name": name, "height": height, "width": width})
        for instance in instances:
            # From 1, because COCO's evaluation treats id 0 as no annotation.
            ids = {"id": len(annotations) + 1, "image_id": index}
            annotations.append({**ids, **_annotation(instance)})
        progress.update()
    content = {
        "info": {"description": "panet_d2 shapes", "version": str(_VERSION)},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)],
    }
    with open(_json_file(folder, split), "w", encoding="utf-8") as f:
        json.dump(content, f)


def _json_file(folder: str, split: str) -> str:
    return os.path.join(folder, "annotations", f"instances_{split}.json")


def _folder(root: str | None, size: int = 256) -> str:
    name = f"shapes_v{_VERSION}" + (f"_{size}" if size != 256 else "")
    return os.path.join(cache_folder(root), name)


def _remove_stale(folder: str) -> None:
    """Remove unfinished folders of killed processes, but not those of running processes."""
    root, prefix = os.path.dirname(folder), os.path.basename(folder) + ".tmp-"
    for name in os.listdir(root):
        path = os.path.join(root, name)
        with contextlib.suppress(FileNotFoundError):  # if someone else is doing the same
            if name.startswith(prefix) and time.time() - os.path.getmtime(path) > _STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def ensure_shapes(root: str | None = None, size: int = 256) -> str:
    """
    Draw the dataset unless it exists, which takes less than a minute and 130 MB. Several processes
    can do so at once, and each can be killed: the folder is complete or does not exist.

    Args:
        root (str | None): folder for caches; by default the environment variable
            ``PANET_D2_CACHE``, or ``~/.cache/panet_d2`` if it is not set.
        size (int): side of the images in pixels, see :func:`render_image`.

    Returns:
        str: the folder, such as ``<root>/shapes_v1``. It has ``<split>/000000.png``, … and
        ``annotations/instances_<split>.json``, in COCO format with masks in RLE.

    Raises:
        DataError: if the folder lacks its annotations or cannot be written.
    """
    folder = _folder(root, size)
    if os.path.isdir(folder):
        missing = [s for s in SPLITS if not os.path.isfile(_json_file(folder, s))]
        if missing:
            raise DataError(
                f"{folder} lacks {_json_file(folder, missing[0])}; delete the folder to draw the "
                "dataset again."
            )
        return folder
    try:
        _make(folder, size)
    except OSError as e:
        raise DataError(
            f"cannot write the embedded dataset to {folder}: {e.strerror or e}; set the "
            "environment variable PANET_D2_CACHE to another folder."
        ) from e
    return folder


def _make(folder: str, size: int) -> None:
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    _remove_stale(folder)
    # Not with tempfile, whose folders other users cannot read.
    unfinished = f"{folder}.tmp-{uuid.uuid4().hex}"
    total = sum(SPLITS.values())
    _logger.info("Drawing %d images of the embedded dataset into %s", total, folder)
    try:
        os.makedirs(os.path.join(unfinished, "annotations"))
        with tqdm(total=total, desc="shapes", unit="image", mininterval=1) as progress:
            for split in SPLITS:
                _write_split(unfinished, split, size, progress)
        try:
            os.rename(unfinished, folder)
        except OSError:  # another process may have been faster
            if not os.path.isdir(folder):
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _load(root: str, size: int, split: str, name: str) -> list[dict]:
    folder = ensure_shapes(root, size)
    return load_coco_json(_json_file(folder, split), os.path.join(folder, split), name)


def register_shapes() -> None:
    """
    Register ``panet_shapes_train``, ``panet_shapes_val`` and their small versions, see ``SIZES``. A
    dataset that is registered under one of these names stays. The images are drawn when a split is
    first loaded, into the default folder of :func:`ensure_shapes` at the time of this call.
    """
    for (prefix, size), split in product(SIZES.items(), SPLITS):
        folder, name = _folder(None, size), f"{prefix}_{split}"
        if name in DatasetCatalog:
            continue
        # One root for loader and metadata, even if the environment changes, because the evaluator
        # reads the annotations from the path in the metadata.
        DatasetCatalog.register(name, partial(_load, os.path.dirname(folder), size, split, name))
        MetadataCatalog.get(name).set(
            json_file=_json_file(folder, split),
            image_root=os.path.join(folder, split),
            evaluator_type="coco",
            thing_classes=list(CLASSES),
            thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(CLASSES))},
        )
