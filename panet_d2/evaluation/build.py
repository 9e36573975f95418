"""The evaluator that belongs to a data set."""

from __future__ import annotations

import os
from typing import List, Optional

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)

from ..errors import ConfigError

__all__ = ["build_evaluator", "check_evaluators", "detection_limit", "inference_folder"]

_KNOWN_TYPES = (
    *("coco", "coco_panoptic_seg", "sem_seg", "lvis"),
    *("cityscapes_instance", "cityscapes_sem_seg", "pascal_voc"),
)
# COCO's own limit on the detections of one image that count.
_COCO_MAX_DETECTIONS = 100
_COCO_KEYPOINTS = 17  # of a person, whose sigmas pycocotools knows


def detection_limit(wanted: int) -> int:
    """
    Args:
        wanted (int): how many detections an image can have: ``TEST.DETECTIONS_PER_IMAGE``.

    Returns:
        int: how many of them count in COCO's average precision: COCO's 100, or more if wanted.
    """
    return max(_COCO_MAX_DETECTIONS, wanted)


def inference_folder(cfg: CfgNode, dataset_name: str, folder: Optional[str] = None) -> str:
    """
    Args:
        cfg (CfgNode): the config of the evaluation.
        dataset_name (str): one of its ``DATASETS.TEST``.
        folder (str or None): the folder of the evaluation, OUTPUT_DIR/inference if None.

    Returns:
        str: where the results of the data set are. Of several each has a folder of its own, whose
        files would otherwise be those of the last.
    """
    folder = folder or os.path.join(cfg.OUTPUT_DIR, "inference")
    return os.path.join(folder, dataset_name) if len(cfg.DATASETS.TEST) > 1 else folder


def build_evaluator(
    cfg: CfgNode, dataset_name: str, output_folder: Optional[str] = None
) -> DatasetEvaluator:
    """
    Args:
        cfg (CfgNode): ``TEST.DETECTIONS_PER_IMAGE`` beyond COCO's 100 raises the limit of the
            COCO evaluator too, since data with more objects than that is what one raises it for.
        dataset_name (str): a registered data set; its ``evaluator_type`` decides.
        output_folder (str or None): where results are written, see :func:`inference_folder`.

    Returns:
        DatasetEvaluator: one evaluator, or several in one.

    Raises:
        ConfigError: if no evaluator is known for the data set.
    """
    folder = inference_folder(cfg, dataset_name, output_folder)
    kind = _evaluator_type(dataset_name)
    evaluators: List[DatasetEvaluator] = []
    if kind in ("sem_seg", "coco_panoptic_seg"):
        evaluators.append(SemSegEvaluator(dataset_name, distributed=True, output_dir=folder))
    if kind in ("coco", "coco_panoptic_seg"):
        evaluators.append(
            COCOEvaluator(
                dataset_name,
                output_dir=folder,
                max_dets_per_image=detection_limit(cfg.TEST.DETECTIONS_PER_IMAGE),
                kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
            )
        )
    if kind == "coco_panoptic_seg":
        evaluators.append(COCOPanopticEvaluator(dataset_name, folder))
    if kind == "lvis":
        evaluators.append(LVISEvaluator(dataset_name, output_dir=folder))
    if kind == "cityscapes_instance":
        evaluators.append(CityscapesInstanceEvaluator(dataset_name))
    if kind == "cityscapes_sem_seg":
        evaluators.append(CityscapesSemSegEvaluator(dataset_name))
    if kind == "pascal_voc":
        evaluators.append(PascalVOCDetectionEvaluator(dataset_name))
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)


def check_evaluators(cfg: CfgNode) -> None:
    """
    Say before a run, and not when it is trained, that it cannot be evaluated.

    Args:
        cfg (CfgNode): the config of the run.

    Raises:
        ConfigError: if no evaluator is known for one of ``DATASETS.TEST``, or it cannot judge as
            many keypoints as there are.
    """
    for name in cfg.DATASETS.TEST:
        if _evaluator_type(name) in ("coco", "coco_panoptic_seg") and cfg.MODEL.KEYPOINT_ON:
            number = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
            sigmas = len(cfg.TEST.KEYPOINT_OKS_SIGMAS) or _COCO_KEYPOINTS
            if sigmas != number:
                raise ConfigError(
                    f"TEST.KEYPOINT_OKS_SIGMAS has {sigmas} numbers, COCO's where it is empty; to "
                    f"evaluate on {name!r} it must have {number}, one for each of NUM_KEYPOINTS."
                )


def _evaluator_type(dataset_name: str) -> str:
    kind = getattr(MetadataCatalog.get(dataset_name), "evaluator_type", None)
    if kind not in _KNOWN_TYPES:
        raise ConfigError(
            f"DATASETS.TEST names {dataset_name!r}, whose evaluator_type is {kind!r}; known are "
            f"{', '.join(_KNOWN_TYPES[:-1])} and {_KNOWN_TYPES[-1]}."
        )
    return kind
