"""Cut large images into tiles that overlap, and write them as a dataset in COCO format."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import uuid
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
from PIL import Image
from pycocotools import mask as mask_util

from ..errors import DataError
from .register import datasets_folder

# Left, top, right and bottom of a tile, in pixels of the image.
Window = Tuple[int, int, int, int]


def windows(width: int, height: int, size: int, overlap: int) -> List[Window]:
    """
    Return the tiles of an image. The last of a row or column ends at the border of the image and so
    overlaps more. A side shorter than ``size`` has one tile of its own length.

    Args:
        width, height, size, overlap (int): of the image, of a tile's side, and of what two tiles
            share, in pixels.

    Raises:
        DataError: if ``overlap`` is not from 0 to ``size - 1``.
    """
    if not 0 <= overlap < size:
        raise DataError(
            f"--overlap is {overlap} and --size {size}; the overlap must be at least 0 and less "
            "than the size."
        )

    def sides(length: int) -> List[Tuple[int, int]]:
        last = max(length - size, 0)
        starts = [*range(0, last, size - overlap), last]
        return [(start, min(start + size, length)) for start in starts]

    return [(x0, y0, x1, y1) for y0, y1 in sides(height) for x0, x1 in sides(width)]


@contextmanager
def written_whole(target: str) -> Iterator[str]:
    """
    Yield a new folder that gets the name ``target`` at the end, or is removed if there is an error.

    Raises:
        FileExistsError: if ``target`` is there already.
    """
    if os.path.exists(target):
        raise FileExistsError(f"{target} is there already; remove it to have it made again.")
    unfinished = f"{target}.tmp-{uuid.uuid4().hex}"
    try:
        os.makedirs(unfinished)
        yield unfinished
        os.rename(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def files_by_image(folder: str, suffix: str, parent: str = "") -> Dict[str, str]:
    """
    Find one file for each image below a folder.

    Args:
        folder (str): searched with its subfolders.
        suffix (str): how the files' names end; what is before is the image's name and has no "_".
        parent (str): how the name of one of the folders that hold a file begins.

    Raises:
        DataError: if an image has two files.
    """
    found: Dict[str, str] = {}
    for where, _, files in sorted(os.walk(folder, followlinks=True)):
        inside = os.path.relpath(where, folder).split(os.sep)
        for file in sorted(files):
            image = file[: -len(suffix)]
            if not file.endswith(suffix) or "_" in image:
                continue
            if parent and not any(part.startswith(parent) for part in inside):
                continue
            path = os.path.join(where, file)
            if image in found:
                raise DataError(
                    f"{image} has two files: {found[image]} and {path}; keep the one to use."
                )
            found[image] = path
    return found


# What Pillow raises for broken images.
UNREADABLE_IMAGE = (OSError, SyntaxError, Image.DecompressionBombError)


def open_rgb(path: str) -> Image.Image:
    """Read an image as RGB; raise a DataError if it cannot be read."""
    try:
        return Image.open(path).convert("RGB")
    except UNREADABLE_IMAGE as e:
        raise DataError(f"cannot read {path}: {e}") from e


def mask_fields(mask: np.ndarray) -> Dict[str, Any]:
    """Return area, box and RLE of a bool mask (H, W), as an annotation in COCO format has them."""
    rle = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {
        "area": int(mask.sum()),
        "bbox": mask_util.toBbox(rle).tolist(),
        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
    }


def source_arguments(description: Optional[str], source: str) -> argparse.ArgumentParser:
    """The arguments of the tools that prepare a dataset: where it comes from and where it goes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("source", help=source)
    parser.add_argument(
        "--root",
        default=datasets_folder(),
        help="folder of the datasets, to which this one is added; DETECTRON2_DATASETS by default",
    )
    return parser


def run_tiling(
    prepare: Callable[[str, str, int, int], Dict[str, Tuple[int, int]]],
    argv: Optional[Sequence[str]],
    description: Optional[str],
    size: int,
) -> None:
    """Run a tool that cuts a dataset into tiles: parse the command line, and print the counts."""
    parser = source_arguments(description, "the folder with train/ and val/")
    parser.add_argument("--size", type=int, default=size, help="side of a tile in pixels")
    parser.add_argument("--overlap", type=int, default=200, help="what two tiles share, in pixels")
    args = parser.parse_args(argv)
    counts = prepare(args.source, args.root, args.size, args.overlap)
    for name, (tiles, objects) in counts.items():
        print(f"{name}: {tiles} tiles, {objects} objects")


class CocoWriter:
    """The content of an annotation file in COCO format. Ids start at 1."""

    def __init__(self, classes: Sequence[str]):
        categories = [{"id": i, "name": name} for i, name in enumerate(classes, 1)]
        self.content: Dict[str, List[Dict[str, Any]]] = {
            "images": [],
            "annotations": [],
            "categories": categories,
        }

    def add_tile(self, image: Image.Image, name: str, window: Window, folder: str) -> None:
        """Write a tile of an image into a folder, and add it to the file's images."""
        file_name = f"{name}_{window[0]}_{window[1]}.png"
        image.crop(window).save(os.path.join(folder, file_name))
        self.add_image(file_name, window)

    def add_image(self, file_name: str, window: Window) -> None:
        """Add an image to the file."""
        x0, y0, x1, y1 = window
        images = self.content["images"]
        images.append(
            {"id": len(images) + 1, "file_name": file_name, "height": y1 - y0, "width": x1 - x0}
        )

    def add_object(
        self, category_id: int, bbox: List[float], area: float, crowd: bool = False, **keys: Any
    ) -> None:
        """Add an object to the last image, with more ``keys`` of its annotation."""
        annotations = self.content["annotations"]
        annotations.append(
            {
                "id": len(annotations) + 1,
                "image_id": len(self.content["images"]),
                "category_id": category_id,
                "bbox": bbox,
                "area": area,
                "iscrowd": int(crowd),
                **keys,
            }
        )

    def save(self, path: str) -> None:
        """Write the file."""
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8") as f:
            json.dump(self.content, f)
