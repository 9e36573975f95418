#!/usr/bin/env python
"""
Prepare the tiles of configs/iSAID from iSAID (https://captain-whu.github.io/iSAID). The input is a
folder with train/ and val/. Each has DOTA's images and iSAID's Instance_masks and Semantic_masks.
"""

from __future__ import annotations

import os
import sys
from typing import Dict, List, Optional, Tuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from panet_d2 import cli
from panet_d2.data.tiles import (
    CocoWriter,
    files_by_image,
    mask_fields,
    open_rgb,
    run_tiling,
    windows,
    written_whole,
)
from panet_d2.errors import DataError

# By color in Semantic_masks, in the order of the category ids of iSAID's JSON files.
CLASSES = {
    (0, 0, 63): "ship",
    (0, 63, 63): "storage_tank",
    (0, 63, 0): "baseball_diamond",
    (0, 63, 127): "tennis_court",
    (0, 63, 191): "basketball_court",
    (0, 63, 255): "Ground_Track_Field",
    (0, 127, 63): "Bridge",
    (0, 127, 127): "Large_Vehicle",
    (0, 0, 127): "Small_Vehicle",
    (0, 0, 191): "Helicopter",
    (0, 0, 255): "Swimming_pool",
    (0, 191, 127): "Roundabout",
    (0, 127, 191): "Soccer_ball_field",
    (0, 127, 255): "plane",
    (0, 100, 155): "Harbor",
}
_FILES = {"image": ".png", "ids": "_instance_id_RGB.png", "classes": "_instance_color_RGB.png"}


def prepare_isaid(
    source: str, root: str, size: int = 800, overlap: int = 200
) -> Dict[str, Tuple[int, int]]:
    """
    Write iSAID's training and validation sets as the tiles ``isaid_train`` and ``isaid_val``. As in
    iSAID's development kit, the masks are those of the PNGs, because the polygons in the JSON files
    have no holes. Every part of an object in a tile is an object.

    Args:
        source (str): the folder with ``train`` and ``val``. In each, ``<image>.png``,
            ``<image>_instance_id_RGB.png`` and ``<image>_instance_color_RGB.png`` may be in any
            subfolder.
        root (str): the folder that ``DETECTRON2_DATASETS`` names; the new folder ``isaid`` is
            in it.
        size, overlap (int): side of a tile, and overlap of neighbouring tiles, in pixels.

    Returns:
        dict[str, tuple[int, int]]: tiles and objects of "isaid_train" and "isaid_val".

    Raises:
        DataError: if a file is missing or wrong; the message names the file.
        FileExistsError: if ``isaid`` already exists.
    """
    counts = {}
    with written_whole(os.path.join(root, "isaid")) as target:
        for split in ("train", "val"):
            writer, folder = CocoWriter(list(CLASSES.values())), os.path.join(target, split)
            os.makedirs(folder)
            images = _index(os.path.join(source, split))
            for name, files in tqdm(images.items(), desc=split, unit="image"):
                image, ids, classes = (open_rgb(files[kind]) for kind in _FILES)
                for kind, picture in (("ids", ids), ("classes", classes)):
                    if picture.size != image.size:
                        raise DataError(
                            f"{files[kind]} is {picture.width}x{picture.height}, and its image "
                            f"{image.width}x{image.height}; they must be equal."
                        )
                for window in windows(*image.size, size, overlap):
                    writer.add_tile(image, name, window, folder)
                    _add_objects(
                        writer, _codes(ids.crop(window)), _codes(classes.crop(window)), files
                    )
            writer.save(os.path.join(target, "annotations", f"{split}.json"))
            content = writer.content
            counts[f"isaid_{split}"] = len(content["images"]), len(content["annotations"])
    return counts


def _index(folder: str) -> Dict[str, Dict[str, str]]:
    """Return the files of each image, by kind."""
    found = {kind: files_by_image(folder, suffix) for kind, suffix in _FILES.items()}
    if not found["image"]:
        raise DataError(f"{folder} has no images/<image>.png in it.")
    for name in sorted(set().union(*found.values())):
        for kind, suffix in _FILES.items():
            if name not in found[kind]:
                raise DataError(f"{folder}: image {name} has no {name}{suffix}.")
    return {name: {k: files[name] for k, files in found.items()} for name in sorted(found["image"])}


def _codes(picture: Image.Image) -> np.ndarray:
    """Return one number for each pixel's color; 0 is black, the background."""
    return np.asarray(picture, dtype=np.int64) @ (65536, 256, 1)


_CATEGORY_IDS = {
    r * 65536 + g * 256 + b: category_id for category_id, (r, g, b) in enumerate(CLASSES, 1)
}


def _add_objects(
    writer: CocoWriter, ids: np.ndarray, classes: np.ndarray, files: Dict[str, str]
) -> None:
    """Add the objects of a tile to its image."""
    for code in np.unique(ids[ids > 0]):
        mask = ids == code
        colors, counts = np.unique(classes[mask & (classes > 0)], return_counts=True)
        if not len(colors):  # iSAID's "unlabeled", which is not a class
            continue
        color = int(colors[counts.argmax()])
        if color not in _CATEGORY_IDS:
            raise DataError(
                f"{files['classes']} has the color {(color >> 16, color >> 8 & 255, color & 255)} "
                f"for an object of {files['ids']}; none of iSAID's classes has it."
            )
        writer.add_object(_CATEGORY_IDS[color], **mask_fields(mask))


def main(argv: Optional[List[str]] = None) -> None:
    run_tiling(prepare_isaid, argv, __doc__, size=800)


if __name__ == "__main__":
    sys.exit(cli.run(main))
