"""Find errors in images of Detectron2's dataset format, which a user's own function returns."""

from __future__ import annotations

from math import isfinite
from typing import Any, Optional, Sequence

from detectron2.config import CfgNode
from detectron2.modeling import PanopticFPN, SemanticSegmentor
from detectron2.structures import BoxMode
from torch.utils.data import Dataset

from ..errors import DataError
from ..modeling.check_model import is_architecture, num_classes_node

_MODES = tuple(BoxMode)


def check_records(
    cfg: CfgNode, names: Sequence[str], records: Sequence[dict], evaluated: bool = False
) -> None:
    """
    Check what Detectron2 does not check before it uses an image.

    Args:
        cfg (CfgNode): the number of classes, and whether there are masks.
        names (sequence[str]): the datasets, for the message.
        records (sequence[dict]): their images. Those of a :class:`torch.utils.data.Dataset` are
            not checked, because reading each can take long.
        evaluated (bool): whether models are evaluated on the images, instead of trained.

    Raises:
        DataError: for the first image that cannot be used.
    """
    if isinstance(records, Dataset):
        return
    node = num_classes_node(cfg)
    classes = cfg.MODEL[node].NUM_CLASSES if node else None
    masks = cfg.MODEL.MASK_ON
    keys = ["file_name"] + ["image_id"] * evaluated
    if not evaluated and is_architecture(cfg, PanopticFPN, SemanticSegmentor):
        keys.append("sem_seg_file_name")
    keys += ["annotations"] * any("annotations" in record for record in records)
    for index, record in enumerate(records):
        problem = next((f"has no {key!r}" for key in keys if key not in record), None)
        for a in record.get("annotations", ()) if problem is None else ():
            if not a.get("iscrowd", 0):
                problem = problem or _problem(a, classes, masks)
        if problem:
            image = record.get("file_name", f"at index {index}")
            raise DataError(f"dataset {', '.join(map(repr, names))}: image {image} {problem}.")


def _problem(annotation: dict, classes: Optional[int], masks: bool) -> Optional[str]:
    get = annotation.get
    category = get("category_id")
    if not _is_class(category, classes):
        wanted = "the number of a class"
        if classes is not None:
            wanted = f"from 0 to {classes - 1}, because the model's NUM_CLASSES is {classes}"
        return f"has an object whose category_id is {category!r}; it must be {wanted}"
    if not _is_box(get("bbox")):
        return f"has an object whose bbox is {get('bbox')!r}; it must be a list of numbers"
    if get("bbox_mode") not in _MODES:
        return f"has an object whose bbox_mode is {get('bbox_mode')!r}; it must be a BoxMode"
    if masks and get("segmentation") is None:
        return "has an object without 'segmentation', which MODEL.MASK_ON True needs"
    return None


def _is_class(value: Any, classes: Optional[int]) -> bool:
    try:
        return value == int(value) and 0 <= value and (classes is None or value < classes)
    except (TypeError, ValueError):
        return False


def _is_box(box: Any) -> bool:
    try:
        return isinstance(box, (list, tuple)) and len(box) in (4, 5) and isfinite(sum(box))
    except (TypeError, ValueError):
        return False
