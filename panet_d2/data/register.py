"""Data sets in COCO format, registered from the config; and whether data and config agree."""

from __future__ import annotations

import logging
import os
import re
from typing import Dict, Iterable, List, Sequence, Tuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.file_io import PathManager

from ..errors import ConfigError, DataError
from .check import check_annotations, read_coco, refuse_errors

__all__ = ["coco_entries", "find_coco_files", "register_coco_file", "setup_datasets"]

logger = logging.getLogger("panet_d2")

# Where the number of classes stands, by meta-architecture.
_NUM_CLASSES_KEYS = {
    "GeneralizedRCNN": "ROI_HEADS",
    "PanopticFPN": "ROI_HEADS",
    "RetinaNet": "RETINANET",
}


def register_coco_file(name: str, json_file: str, image_root: str) -> dict:
    """
    Register one data set in COCO format under ``name``; again, if it is known already.

    Args:
        name (str): the name for ``DATASETS.TRAIN`` and ``DATASETS.TEST``.
        json_file (str): annotation file. A relative path starts at the environment variable
            ``DETECTRON2_DATASETS``.
        image_root (str): folder of the images, likewise.

    Returns:
        dict: the content of the annotation file.

    Raises:
        DataError: if a file or folder is missing, or the annotation file is not one.
    """
    json_file, image_root = find_coco_files(name, json_file, image_root)
    content = read_coco(json_file)
    try:
        categories = sorted(content["categories"], key=lambda c: c["id"])
        classes = {c["id"]: c["name"] for c in categories}
    except (KeyError, TypeError) as e:
        raise DataError(
            f"{json_file}: each of its categories must have an id and a name "
            f"({type(e).__name__}: {e})."
        ) from e
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_coco_instances(
        name,
        {
            "thing_classes": list(classes.values()),
            "thing_dataset_id_to_contiguous_id": {c: i for i, c in enumerate(classes)},
            **_keypoint_metadata(categories),
        },
        json_file,
        image_root,
    )
    return content


def find_coco_files(name: str, json_file: str, image_root: str) -> Tuple[str, str]:
    """
    Args:
        name (str): the data set's name, for the message.
        json_file, image_root (str): as in ``DATASETS.REGISTER_COCO``.

    Returns:
        tuple[str, str]: their paths, relative ones from ``DETECTRON2_DATASETS`` on.

    Raises:
        DataError: if one of them is missing.
    """
    base = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
    json_file, image_root = os.path.join(base, json_file), os.path.join(base, image_root)
    hint = f"Relative paths start at DETECTRON2_DATASETS, which is {base!r}."
    if not PathManager.isfile(json_file):
        raise DataError(f"data set {name!r}: there is no annotation file {json_file}. {hint}")
    if not PathManager.isdir(image_root):
        raise DataError(f"data set {name!r}: there is no image folder {image_root}. {hint}")
    return json_file, image_root


def coco_entries(cfg: CfgNode) -> List[Tuple[str, str, str]]:
    """
    Args:
        cfg (CfgNode): a config with :func:`panet_d2.add_panet_config`.

    Returns:
        list[tuple[str, str, str]]: ``DATASETS.REGISTER_COCO``.

    Raises:
        ConfigError: if an entry is not (name, annotation file, image folder).
    """
    entries = cfg.DATASETS.REGISTER_COCO
    if not isinstance(entries, (list, tuple)):
        raise ConfigError(
            f"DATASETS.REGISTER_COCO is {entries!r}; it must be a list of (name, annotation file, "
            "image folder)."
        )
    for entry in entries:
        if not isinstance(entry, (list, tuple)) or [type(e) for e in entry] != [str] * 3:
            raise ConfigError(
                f"DATASETS.REGISTER_COCO has {entry!r}; each entry must be (name, annotation "
                "file, image folder)."
            )
    return [tuple(entry) for entry in entries]


def _keypoint_metadata(categories: List[dict]) -> dict:
    """What Detectron2's keypoint mapper wants to know, from the first category that has any."""
    for category in categories:
        names = category.get("keypoints")
        if not names:
            continue
        known = {name.lower(): name for name in names}
        pairs = []
        for left in names:
            # left_eye, Left eye, l_eye, eye.L
            right = left.lower().replace("left", "right")
            right = re.sub(r"(?<![a-z])l(?![a-z])", "r", right)
            if right != left.lower() and right in known:
                pairs.append((left, known[right]))
        return {"keypoint_names": names, "keypoint_flip_map": pairs}
    return {}


def setup_datasets(cfg: CfgNode, needed: Sequence[str] = ("TRAIN", "TEST")) -> None:
    """
    Register the data sets of ``DATASETS.REGISTER_COCO``, check what will be used of them against
    the config, and fill in the number of classes where the config leaves it at 0.

    Args:
        cfg (CfgNode): a config with :func:`panet_d2.add_panet_config`; changed in place.
        needed (sequence[str]): which of "TRAIN" and "TEST" will be used. Evaluating needs no
            training data, and predicting none at all; a data set that is not needed may be
            missing, and then only its class names are.

    Raises:
        ConfigError: if ``DATASETS`` names an unknown data set, or the config does not go with it.
        DataError: if a data set is missing or incomplete, has nothing to learn from, or
            :func:`panet_d2.data.check_annotations` finds an error in it.
    """
    used: Dict[str, str] = {}
    for split in needed:
        for name in cfg.DATASETS[split]:
            used.setdefault(name, split)
    contents = {}
    for name, json_file, image_root in coco_entries(cfg):
        try:
            contents[name] = register_coco_file(name, json_file, image_root)
        except DataError:
            if name in used:
                raise
    for name, split in used.items():
        if name not in DatasetCatalog:
            raise ConfigError(
                f"DATASETS.{split} names {name!r}, which is neither known to Detectron2 nor "
                "listed in DATASETS.REGISTER_COCO."
            )
        if name in contents:
            metadata = MetadataCatalog.get(name)
            problems = check_annotations(
                contents[name],
                masks=None if cfg.MODEL.MASK_ON else False,
                evaluated=name in cfg.DATASETS.TEST and "TEST" in needed,
                keypoints=_num_keypoints(cfg, name, contents[name]),
            )
            refuse_errors(problems, metadata.json_file, metadata.image_root)
            _check_images(name, contents[name])
            if split == "TRAIN":
                _check_annotations(cfg, name, contents[name])
                _warn_of_flips(cfg, name)
    _check_num_classes(cfg, (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))


def _check_images(name: str, content: dict) -> None:
    root = MetadataCatalog.get(name).image_root
    files = [os.path.join(root, image["file_name"]) for image in content["images"]]
    missing = [f for f in files if not PathManager.isfile(f)]
    if missing:
        raise DataError(
            f"data set {name!r}: {len(missing)} of {len(files)} images are missing, the first is "
            f"{missing[0]}."
        )


def _check_annotations(cfg: CfgNode, name: str, content: dict) -> None:
    json_file = MetadataCatalog.get(name).json_file
    annotations = [a for a in content.get("annotations", ()) if not a.get("iscrowd", 0)]
    if not annotations:
        raise DataError(f"{json_file} has no annotations, so there is nothing to train on.")
    if cfg.MODEL.MASK_ON:
        masks = [a["segmentation"] for a in annotations if a.get("segmentation")]
        if not masks:
            raise DataError(
                f"{json_file} has no masks; MODEL.MASK_ON must be False to train on its boxes."
            )
        if cfg.INPUT.MASK_FORMAT == "polygon" and any(isinstance(m, dict) for m in masks):
            raise ConfigError(
                f"INPUT.MASK_FORMAT is 'polygon', but {json_file} has masks in RLE; it must be "
                "'bitmask'."
            )


def _num_keypoints(cfg: CfgNode, name: str, content: dict) -> int:
    """How many keypoints each object of the data set must have; 0 where they are not used."""
    annotations = [a for a in content.get("annotations", ()) if isinstance(a, dict)]
    if not cfg.MODEL.KEYPOINT_ON or not annotations:
        return 0
    metadata = MetadataCatalog.get(name)
    if not any(a.get("keypoints") for a in annotations):
        raise DataError(f"{metadata.json_file} has no keypoints; MODEL.KEYPOINT_ON must be False.")
    names = metadata.get("keypoint_names")
    if not names:
        raise DataError(
            f"{metadata.json_file} has keypoints, but none of its categories names them in a list "
            "'keypoints'."
        )
    number = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    if len(names) != number:
        raise ConfigError(
            f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {number}, but data set {name!r} has "
            f"{len(names)} keypoints; it must be {len(names)}."
        )
    return number


def _warn_of_flips(cfg: CfgNode, name: str) -> None:
    """A mirrored image has left and right keypoints exchanged, if they are known as such."""
    flipped = cfg.MODEL.KEYPOINT_ON and cfg.INPUT.RANDOM_FLIP == "horizontal"
    if flipped and not MetadataCatalog.get(name).get("keypoint_flip_map"):
        logger.warning(
            "No two keypoints of data set %r are named as left and right of each other, so they "
            "stay as they are in images that INPUT.RANDOM_FLIP mirrors.",
            name,
        )


def _check_num_classes(cfg: CfgNode, names: Iterable[str]) -> None:
    node_name = _NUM_CLASSES_KEYS.get(cfg.MODEL.META_ARCHITECTURE)
    if node_name is None:
        return
    node, key = cfg.MODEL[node_name], f"MODEL.{node_name}.NUM_CLASSES"
    classes: Dict[str, Tuple[str, ...]] = {
        name: tuple(MetadataCatalog.get(name).thing_classes)
        for name in names
        if hasattr(MetadataCatalog.get(name), "thing_classes")
    }
    for name, known in classes.items():
        if node.NUM_CLASSES == 0:
            node.NUM_CLASSES = len(known)
        if node.NUM_CLASSES != len(known):
            raise ConfigError(
                f"{key} is {node.NUM_CLASSES}, but data set {name!r} has {len(known)} classes; "
                f"{key} must be {len(known)}, or 0 to take it from the data."
            )
    _check_class_names(classes)
    if node.NUM_CLASSES < 1:
        raise ConfigError(
            f"{key} is {node.NUM_CLASSES}; it must be at least 1, or 0 where DATASETS names a "
            "data set whose classes are known."
        )


def _check_class_names(classes: Dict[str, Tuple[str, ...]]) -> None:
    """Several data sets with the same number of classes must mean the same by each number."""
    if not classes:
        return
    first, expected = next(iter(classes.items()))
    for name, known in classes.items():
        for number, (ours, theirs) in enumerate(zip(expected, known), 1):
            if len(known) > 1 and ours != theirs:  # a single one cannot be mistaken for another
                raise ConfigError(
                    f"DATASETS: class {number} of {first!r} is {ours!r}, and of {name!r} "
                    f"{theirs!r}; all must have the same classes, in the order of their ids."
                )
