"""What is wrong with a data set in COCO format: its annotations, and its images."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Iterator, List, Optional, Sequence

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.utils.file_io import PathManager
from PIL import Image, ImageFile
from tqdm import tqdm

from ..config import read_choice
from ..errors import DataError
from .check_annotations import Problem, check_annotations

__all__ = [
    "Problem",
    "check_annotations",
    "check_coco",
    "check_images",
    "check_training_images",
    "read_coco",
    "refuse_errors",
]

logger = logging.getLogger("panet_d2")


def read_coco(json_file: str) -> dict:
    """
    Args:
        json_file (str): path of an annotation file.

    Returns:
        dict: its content, with the lists "images" and "categories", neither of them empty, and
        perhaps "annotations".

    Raises:
        DataError: if it cannot be read, or is not such a file.
    """
    try:
        with PathManager.open(json_file) as f:
            content = json.load(f)
        lists = [content["images"], content["categories"], content.get("annotations", [])]
        if not all(isinstance(x, list) for x in lists):
            raise TypeError("these must be lists")
    except OSError as e:
        raise DataError(f"cannot read {json_file}: {e.strerror or e}.") from e
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise DataError(
            f"{json_file} is not a COCO annotation file ({type(e).__name__}: {e}); it needs "
            "'images', 'categories' and, except for a test set, 'annotations'."
        ) from e
    for key in ("images", "categories"):
        if not content[key]:
            raise DataError(f"{json_file} has no {key}.")
    return content


def check_coco(
    json_file: str,
    image_root: str,
    masks: Optional[bool] = None,
    evaluated: bool = True,
    image_format: str = "BGR",
    keypoints: int = 0,
    workers: Optional[int] = None,
) -> List[Problem]:
    """
    Find everything that is wrong with a data set: :func:`check_annotations`, then
    :func:`check_images`.

    Args:
        json_file (str): annotation file.
        image_root (str): folder of the images.
        masks, evaluated, keypoints: see :func:`check_annotations`.
        image_format, workers: see :func:`check_images`.

    Returns:
        list[Problem]: those of the annotation file first.

    Raises:
        DataError: if the annotation file is not one, or there is no such folder.
    """
    content = read_coco(json_file)
    if not PathManager.isdir(image_root):
        raise DataError(f"there is no image folder {image_root}.")
    problems = check_annotations(content, masks, evaluated, keypoints)
    return problems + check_images(content["images"], image_root, image_format, workers)


def check_images(
    images: Sequence[dict],
    image_root: str,
    image_format: str = "BGR",
    workers: Optional[int] = None,
) -> List[Problem]:
    """
    Read every image as training does, but more strictly. On a terminal there is a progress bar.

    Args:
        images (list[dict]): the "images" of an annotation file.
        image_root (str): their folder.
        image_format (str): ``INPUT.FORMAT``.
        workers (int): how many threads; by default one per core, eight at most.

    Returns:
        list[Problem]: in the order of ``images``. Those without a file name are left out, since
        :func:`check_annotations` names them.
    """
    named = [i for i in images if isinstance(i, dict) and isinstance(i.get("file_name"), str)]
    read = partial(_image_problems, root=image_root, image_format=image_format)
    workers = workers or min(8, os.cpu_count() or 1)
    with _strict_pillow(), ThreadPoolExecutor(workers) as executor:
        found = executor.map(read, named)
        # Without a terminal there is no bar.
        found = tqdm(found, total=len(named), desc="images", unit="image", disable=None)
        return [problem for problems in found for problem in problems]


@contextlib.contextmanager
def _strict_pillow() -> Iterator[None]:
    """Programs that tolerate truncated images switch that on for the whole process."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _image_problems(record: dict, root: str, image_format: str) -> List[Problem]:
    path = os.path.join(root, record["file_name"])
    if not PathManager.isfile(path):
        return [Problem(path, "there is no such image")]
    try:
        with PathManager.open(path, "rb") as f, Image.open(f) as image:
            mode, size = image.mode, image.size
            # Decoding a PNG does not notice all that its checksums do.
            image.verify()
        pixels = read_image(path, image_format)
    # Pillow raises almost anything for what is broken.
    except Exception as e:
        return [Problem(path, "image cannot be read", f"{type(e).__name__}: {e}")]
    problems = []
    if mode.startswith(("I", "F")):
        # They would be cut at 255, and most of them become white.
        detail = f"Pillow's mode {mode}; scale it to 8 bits first"
        problems.append(Problem(path, "image has more than 8 bits per channel", detail))
    height, width = pixels.shape[:2]
    annotated = record.get("width"), record.get("height")
    if annotated != (width, height):
        turned = "" if size == (width, height) else ", turned as its EXIF says"
        detail = f"{width}x{height}{turned}; annotated is {annotated[0]}x{annotated[1]}"
        problems.append(Problem(path, "image has another size than annotated", detail))
    return problems


def check_training_images(cfg: CfgNode) -> None:
    """
    Read all images that a training run will read, those that it is evaluated on too, as far as
    their data sets are listed in ``DATASETS.REGISTER_COCO``. Does nothing where
    ``DATASETS.CHECK_IMAGES`` is False.

    Args:
        cfg (CfgNode): its data sets registered by :func:`panet_d2.data.setup_datasets`.

    Raises:
        DataError: naming the images that cannot be used.
    """
    if not read_choice(cfg, "DATASETS.CHECK_IMAGES", (True, False)):
        return
    listed = {entry[0] for entry in cfg.DATASETS.REGISTER_COCO}
    for name in dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)):
        if name not in listed:
            continue
        metadata = MetadataCatalog.get(name)
        images = read_coco(metadata.json_file)["images"]
        logger.info(f"Checking the {len(images)} images of {name!r} (DATASETS.CHECK_IMAGES) …")
        problems = check_images(images, metadata.image_root, cfg.INPUT.FORMAT)
        refuse_errors(problems, metadata.json_file, metadata.image_root)


def refuse_errors(problems: Sequence[Problem], json_file: str, image_root: str) -> None:
    """
    Args:
        problems (list[Problem]): what was found in a data set.
        json_file (str): its annotation file.
        image_root (str): its folder of images.

    Raises:
        DataError: if there are errors among them; it names the first few.
    """
    errors = [str(p) for p in problems if p.severity == "error"]
    if errors:
        more = f"; and {len(errors) - 3} more" if len(errors) > 3 else ""
        raise DataError(
            f"{json_file} cannot be used: {'; '.join(errors[:3])}{more}. To see all: "
            f"python tools/check_dataset.py --annotations {json_file} --images {image_root}"
        )
