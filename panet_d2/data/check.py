"""Find errors in the annotations and images of a dataset in COCO format."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.utils.file_io import PathManager
from PIL import Image, ImageFile
from pycocotools import coco
from tqdm import tqdm

from ..config import read_choice
from ..errors import DataError
from .check_annotations import NEEDS_CONFIG, check_annotations, record_name
from .image_file import is_deep, page_count
from .problem import Problem, warning

logger = logging.getLogger("panet_d2")

# File names and sizes by dataset, which check_training_images would otherwise parse again. They
# take 30 MB for COCO train2017, whose full annotations take several GB.
_kept_images: Dict[str, List[dict]] = {}

# pycocotools opens annotation files in the locale's encoding and fails on a byte order mark. From
# bytes, json detects the encoding.
setattr(coco, "open", lambda path, mode="r": open(path, "rb"))  # noqa: B010


def read_coco(json_file: str) -> dict:
    """
    Read a COCO annotation file.

    Args:
        json_file (str): path of the file.

    Returns:
        dict: the content. The lists "images" and "categories" exist and are not empty. The list
        "annotations" may be missing.

    Raises:
        DataError: if the file cannot be read or is not a COCO annotation file.
    """
    try:
        with PathManager.open(json_file, "rb") as f:
            content = json.load(f)
        lists = [content["images"], content["categories"], content.get("annotations", [])]
        if not all(isinstance(x, list) for x in lists):
            raise TypeError("these must be lists")
    except OSError as e:
        raise DataError(f"cannot read {json_file}: {e.strerror or e}.") from e
    except UnicodeDecodeError as e:
        raise DataError(
            f"{json_file} is not a COCO annotation file: it is not text in UTF-8 ({e})."
        ) from e
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
    trained: Optional[bool] = None,
    cfg: Optional[CfgNode] = None,
    *,
    workers: Optional[int] = None,
) -> List[Problem]:
    """
    Find all problems of a dataset with :func:`check_annotations`, :func:`check_images` and, if
    there is a config, :func:`check_sizes`.

    Args:
        json_file (str): annotation file.
        image_root (str): folder of the images.
        masks, evaluated, keypoints, trained: see :func:`check_annotations`.
        image_format, workers: see :func:`check_images`.
        cfg: see :func:`check_sizes`.

    Raises:
        DataError: if the annotation file cannot be read or the folder does not exist.
    """
    content = read_coco(json_file)
    if not PathManager.isdir(image_root):
        raise DataError(f"there is no image folder {image_root}.")
    problems = check_annotations(content, masks, evaluated, keypoints, trained)
    if cfg is not None:
        problems += check_sizes(cfg, content, trained is not False, evaluated)
    return problems + check_images(content["images"], image_root, image_format, workers)


def check_sizes(cfg: CfgNode, content: dict, trained: bool, evaluated: bool) -> List[Problem]:
    """
    Find images that have no pixels left after Detectron2 has cropped and resized them.

    Args:
        cfg (CfgNode): ``INPUT`` and ``TEST.AUG`` have the sizes.
        content (dict): see :func:`read_coco`.
        trained, evaluated (bool): what the images are used for.

    Returns:
        list[Problem]: at most one for each image.
    """
    node, test_aug = cfg.INPUT, cfg.TEST.AUG
    resizes: List[Tuple[str, Any, int]] = []
    if trained:
        keys = "INPUT.MIN_SIZE_TRAIN and MAX_SIZE_TRAIN"
        resizes.append((keys, node.MIN_SIZE_TRAIN, node.MAX_SIZE_TRAIN))
    if evaluated:
        keys = "INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST"
        resizes.append((keys, node.MIN_SIZE_TEST, node.MAX_SIZE_TEST))
    if evaluated and test_aug.ENABLED:
        resizes.append(("TEST.AUG.MIN_SIZES and MAX_SIZE", test_aug.MIN_SIZES, test_aug.MAX_SIZE))
    problems = []
    for image in content["images"]:
        if not isinstance(image, dict):
            continue
        height, width = size = image.get("height", 0), image.get("width", 0)
        if [type(side) for side in size] != [int, int] or min(size) < 1:
            continue
        for keys, sizes, longest in resizes:
            training = "TRAIN" in keys
            shapes = [size]
            if training and node.CROP.ENABLED:
                shapes = _narrowest_crops(node.CROP, height, width)
            nothing = _resized_to_nothing(shapes, keys, sizes, longest)
            if nothing and not (training and _is_left_out(cfg, content, image)):
                detail = f"{width}x{height} pixels become {nothing}; pad the image"
                where = record_name("image", image)
                problems.append(Problem(where, "is resized to nothing", detail))
                break
    return problems


def _resized_to_nothing(shapes: List[Tuple[int, int]], keys: str, sizes: Any, longest: int) -> str:
    """Return the size without pixels that a shape (height, width) gets, and the keys, or ""."""
    for shape in shapes:
        if 0 in shape:
            return f"{shape[1]}x{shape[0]} by INPUT.CROP"
        if max(shape) <= longest * min(shape):  # each side keeps at least one pixel
            continue
        for shortest in filter(None, np.atleast_1d(sizes).tolist()):  # 0 switches it off
            new = ResizeShortestEdge.get_output_shape(*shape, shortest, longest)
            if 0 in new:
                return f"{new[1]}x{new[0]} by {keys}"
    return ""


def _is_left_out(cfg: CfgNode, content: dict, image: dict) -> bool:
    """Whether training leaves out the image because it has no objects."""
    return cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS and not any(
        isinstance(a, dict) and a.get("image_id") == image.get("id") and not a.get("iscrowd")
        for a in content.get("annotations", ())
    )


def _narrowest_crops(crop: CfgNode, height: int, width: int) -> List[Tuple[int, int]]:
    """Return RandomCrop's shapes with the least height and with the least width."""
    low, high = crop.SIZE
    if crop.TYPE.startswith("relative"):
        least = int(height * low + 0.5), int(width * high + 0.5)
        most = (height, width) if crop.TYPE == "relative_range" else least
    elif crop.TYPE == "absolute_range":
        least, most = (min(height, low), min(width, low)), (min(height, high), min(width, high))
    else:
        least = most = min(height, low), min(width, high)
    return [(least[0], most[1]), (most[0], least[1])]


def check_images(
    images: Sequence[dict],
    image_root: str,
    image_format: str = "BGR",
    workers: Optional[int] = None,
) -> List[Problem]:
    """
    Read every image as training does, but more strictly.

    Args:
        images (list[dict]): the "images" of an annotation file. Those without a file name are
            skipped, because :func:`check_annotations` names them.
        image_root (str): their folder.
        image_format (str): ``INPUT.FORMAT``.
        workers (int): number of threads; by default one per core, at most eight.

    Returns:
        list[Problem]: in the order of ``images``.
    """
    named = [i for i in images if isinstance(i, dict) and isinstance(i.get("file_name"), str)]
    read = partial(_image_problems, root=image_root, image_format=image_format)
    workers = workers or min(8, os.cpu_count() or 1)
    with _strict_pillow(), ThreadPoolExecutor(workers) as executor:
        found = executor.map(read, named)
        # disable=None: no bar without a terminal.
        found = tqdm(found, total=len(named), desc="images", unit="image", disable=None)
        return [problem for problems in found for problem in problems]


@contextlib.contextmanager
def _strict_pillow() -> Iterator[None]:
    """Reject truncated images, which a global setting of Pillow can allow."""
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
            pages = page_count(image)
            image.verify()  # a PNG's checksums, which decoding ignores
        pixels = read_image(path, image_format)
    # Pillow raises almost any error for broken images.
    except Exception as e:
        return [Problem(path, "image cannot be read", f"{type(e).__name__}: {e}")]
    problems = []
    if is_deep(mode):
        detail = f"Pillow's mode {mode}; scale it to 8 bits first"
        problems.append(Problem(path, "image has more than 8 bits per channel", detail))
    if pages > 1:
        detail = f"{pages} pages; only the first is read"
        problems.append(warning(path, "image has several pages", detail))
    height, width = pixels.shape[:2]
    annotated = record.get("width"), record.get("height")
    if annotated != (width, height):
        turned = "" if size == (width, height) else ", turned as its EXIF says"
        detail = f"{width}x{height}{turned}; annotated is {annotated[0]}x{annotated[1]}"
        problems.append(Problem(path, "image has another size than annotated", detail))
    return problems


def check_training_images(cfg: CfgNode) -> None:
    """
    Check all images of the datasets in ``DATASETS.REGISTER_COCO`` that a run uses for training or
    evaluation. Does nothing if ``DATASETS.CHECK_IMAGES`` is False.

    Args:
        cfg (CfgNode): a config after :func:`panet_d2.data.setup_datasets`.

    Raises:
        DataError: if an image cannot be used. The message names the image.
    """
    if not read_choice(cfg, "DATASETS.CHECK_IMAGES", (True, False)):
        return
    listed = {entry[0] for entry in cfg.DATASETS.REGISTER_COCO}
    kept = dict(_kept_images)
    forget_images()
    for name in dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)):
        if name not in listed:
            continue
        metadata = MetadataCatalog.get(name)
        images = kept.get(name) or read_coco(metadata.json_file)["images"]
        logger.info(f"Checking the {len(images)} images of {name!r} (DATASETS.CHECK_IMAGES) …")
        problems = check_images(images, metadata.image_root, cfg.INPUT.FORMAT)
        raise_errors(problems, metadata.json_file, metadata.image_root)
        log_warnings(problems, metadata.json_file)


def keep_images(name: str, images: Sequence[dict]) -> None:
    """Keep file names and sizes of a dataset's images for :func:`check_training_images`."""
    keys = ("file_name", "width", "height")
    records = (i for i in images if isinstance(i, dict))
    _kept_images[name] = [{k: r[k] for k in keys if k in r} for r in records]


def forget_images() -> None:
    """Drop what :func:`keep_images` keeps."""
    _kept_images.clear()


def raise_errors(problems: Sequence[Problem], json_file: str, image_root: str = "") -> None:
    """
    Raise a DataError that names the first few problems of severity "error", if there are any. With
    an image folder, the message has the command that shows all problems.
    """
    errors = [p for p in problems if p.severity == "error"]
    if errors:
        files = f"--annotations {shlex.quote(json_file)} --images {shlex.quote(image_root)}"
        see_all = f"; to see all, run python tools/check_dataset.py {files}" if image_root else "."
        if image_root and any(p.what in NEEDS_CONFIG for p in errors):
            see_all = "; to see all, give the config to tools/check_dataset.py --config-file."
        raise DataError(f"{json_file} cannot be used: {_first(errors)}{see_all}")


def log_warnings(problems: Sequence[Problem], json_file: str) -> None:
    """Log the first few problems of severity "warning", if there are any."""
    warnings = [p for p in problems if p.severity == "warning"]
    if warnings:
        logger.warning("%s: %s.", json_file, _first(warnings))


def _first(problems: Sequence[Problem]) -> str:
    more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
    return "; ".join(map(str, problems[:3])) + more
