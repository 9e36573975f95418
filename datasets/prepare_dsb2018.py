#!/usr/bin/env python
"""
Prepare the nuclei of configs/DSB2018. Download stage1_train.zip of BBBC038v1 (CC0) from
https://bbbc.broadinstitute.org/BBBC038, and give the file to this tool.
"""

from __future__ import annotations

import json
import os
import sys
import zipfile
import zlib
from collections import defaultdict
from io import BytesIO
from typing import Dict, List, Optional, Tuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from panet_d2 import cli
from panet_d2.data.image_file import is_deep
from panet_d2.data.tiles import UNREADABLE_IMAGE, mask_fields, source_arguments, written_whole
from panet_d2.errors import DataError

# One image in nine is for validation, chosen by the image's name alone.
_VALIDATION_SHARE = 9
# With what zipfile raises for damaged files, and RuntimeError for encrypted files and those of
# another compression.
_UNREADABLE = (*UNREADABLE_IMAGE, zipfile.BadZipFile, zlib.error, RuntimeError)


def prepare_dsb2018(source: str, root: str) -> Dict[str, Tuple[int, int]]:
    """
    Write the training set of the competition's first stage (BBBC038v1 of the Broad Bioimage
    Benchmark Collection, CC0) as ``dsb2018_train`` and ``dsb2018_val`` of ``configs/DSB2018``.

    Args:
        source (str): ``stage1_train.zip``, or the folder that it was unpacked into. For each image
            it has ``<image>/images/<image>.png``, and in ``<image>/masks/`` a PNG for each nucleus.
        root (str): the folder that ``DETECTRON2_DATASETS`` names; the new folder ``dsb2018``
            is in it.

    Returns:
        dict[str, tuple[int, int]]: images and nuclei of "train" and "val".

    Raises:
        DataError: if a file is missing or wrong; the message names the file.
        FileExistsError: if ``dsb2018`` already exists.
    """
    contents = {split: _content() for split in ("train", "val")}
    with written_whole(os.path.join(root, "dsb2018")) as unfinished:
        images, read = _index(source)
        for folder in (*contents, "annotations"):
            os.makedirs(os.path.join(unfinished, folder))
        for index, name in enumerate(tqdm(sorted(images), desc="dsb2018", unit="image"), 1):
            split = "train" if zlib.crc32(name.encode()) % _VALIDATION_SHARE else "val"
            _add(contents[split], index, name, images[name], read, os.path.join(unfinished, split))
        for split, content in contents.items():
            path = os.path.join(unfinished, "annotations", f"instances_{split}.json")
            with open(path, "w", encoding="utf-8") as f:
                json.dump(content, f)
    return {s: (len(c["images"]), len(c["annotations"])) for s, c in contents.items()}


def _content() -> dict:
    return {
        "info": {"description": "2018 Data Science Bowl, stage 1 (BBBC038v1, CC0 1.0)"},
        "images": [],
        "annotations": [],
        "categories": [{"id": 1, "name": "nucleus"}],
    }


def _index(source: str):
    """Return each image's PNGs, its picture first, and a function that reads a PNG."""
    if os.path.isdir(source):
        names = [
            os.path.relpath(os.path.join(folder, name), source).replace(os.sep, "/")
            for folder, _, files in os.walk(source, followlinks=True)
            for name in files
        ]

        def read(name: str) -> Image.Image:
            return Image.open(os.path.join(source, name))

    else:
        try:
            archive = zipfile.ZipFile(source)
        except (OSError, zipfile.BadZipFile) as e:
            raise DataError(f"{source} is neither a folder nor a zip file: {e}") from e
        names = archive.namelist()

        def read(name: str) -> Image.Image:
            return Image.open(BytesIO(archive.read(name)))

    pictures: Dict[str, List[str]] = defaultdict(list)
    masks: Dict[str, List[str]] = defaultdict(list)
    for name in sorted(names):
        parts = name.split("/")
        if name.endswith(".png") and len(parts) >= 3 and parts[-2] in ("images", "masks"):
            (pictures if parts[-2] == "images" else masks)[parts[-3]].append(name)
    if not pictures:
        raise DataError(f"{source} has no <image>/images/<image>.png in it.")
    for image, files in pictures.items():
        if len(files) != 1:
            raise DataError(f"{source}: {image} has {len(files)} pictures: {', '.join(files)}.")
        if not masks[image]:
            raise DataError(f"{source}: {image} has no masks; stage1_train has some for each.")
    return {image: files + masks[image] for image, files in pictures.items()}, read


def _add(content: dict, index: int, name: str, files: List[str], read, folder: str) -> None:
    picture, *masks = files
    try:
        image = read(picture)
        if is_deep(image.mode):
            raise DataError(
                f"{picture} has more than 8 bits per channel; scale it to 8 bits first."
            )
        image = image.convert("RGB")  # the pictures have an opaque alpha channel
    except _UNREADABLE as e:
        raise DataError(f"cannot read {picture}: {e}") from e
    image.save(os.path.join(folder, f"{name}.png"))
    width, height = image.size
    content["images"].append(
        {"id": index, "file_name": f"{name}.png", "height": height, "width": width}
    )
    for file in masks:
        try:
            values = np.array(read(file).convert("L"))
        except _UNREADABLE as e:
            raise DataError(f"cannot read {file}: {e}") from e
        mask = values > 127
        if mask.shape != (height, width):
            raise DataError(f"{file} is {mask.shape[1]}x{mask.shape[0]}, not {width}x{height}.")
        if not mask.any():
            if values.any():
                raise DataError(
                    f"{file} has no value above 127; a nucleus must have the value 255."
                )
            continue
        number = len(content["annotations"]) + 1
        annotation = {"id": number, "image_id": index, "category_id": 1, "iscrowd": 0}
        content["annotations"].append({**annotation, **mask_fields(mask)})


def main(argv: Optional[List[str]] = None) -> None:
    source = "stage1_train.zip, or the folder that it was unpacked into"
    args = source_arguments(__doc__, source).parse_args(argv)
    for split, (images, nuclei) in prepare_dsb2018(args.source, args.root).items():
        print(f"dsb2018_{split}: {images} images, {nuclei} nuclei")


if __name__ == "__main__":
    sys.exit(cli.run(main))
