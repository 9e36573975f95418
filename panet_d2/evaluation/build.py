"""The evaluator of a dataset."""

from __future__ import annotations

import os
from typing import Any, Dict, Optional

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

# By evaluator_type.
_EVALUATORS = {
    "coco": (COCOEvaluator,),
    "coco_panoptic_seg": (SemSegEvaluator, COCOEvaluator, COCOPanopticEvaluator),
    "sem_seg": (SemSegEvaluator,),
    "lvis": (LVISEvaluator,),
    "cityscapes_instance": (CityscapesInstanceEvaluator,),
    "cityscapes_sem_seg": (CityscapesSemSegEvaluator,),
    "pascal_voc": (PascalVOCDetectionEvaluator,),
}
_TAKE_FOLDER = (COCOEvaluator, COCOPanopticEvaluator, LVISEvaluator, SemSegEvaluator)


def detection_limit(wanted: int) -> int:
    """Return how many detections of an image COCO's AP uses: 100, or ``wanted`` if higher."""
    return max(100, wanted)


def inference_folder(cfg: CfgNode, dataset_name: str, folder: Optional[str] = None) -> str:
    """
    Return the folder with the results of a dataset: ``folder``, by default OUTPUT_DIR/inference.
    Several datasets in ``DATASETS.TEST`` have subfolders, because their files have the same names.
    """
    folder = folder or os.path.join(cfg.OUTPUT_DIR, "inference")
    return os.path.join(folder, dataset_name) if len(cfg.DATASETS.TEST) > 1 else folder


def build_evaluator(
    cfg: CfgNode, dataset_name: str, output_folder: Optional[str] = None
) -> DatasetEvaluator:
    """
    Build the evaluator of a dataset.

    Args:
        cfg (CfgNode): ``TEST`` has the detection limit and the keypoint sigmas for COCO.
        dataset_name (str): a registered dataset. Its ``evaluator_type`` decides.
        output_folder (str or None): where results are written, see :func:`inference_folder`.

    Raises:
        ConfigError: if the ``evaluator_type`` is unknown.
    """
    folder = inference_folder(cfg, dataset_name, output_folder)
    evaluators = []
    for evaluator in _EVALUATORS[_evaluator_type(dataset_name)]:
        options: Dict[str, Any] = {"output_dir": folder} if evaluator in _TAKE_FOLDER else {}
        if evaluator is COCOEvaluator:
            options["max_dets_per_image"] = detection_limit(cfg.TEST.DETECTIONS_PER_IMAGE)
            options["kpt_oks_sigmas"] = cfg.TEST.KEYPOINT_OKS_SIGMAS
        evaluators.append(evaluator(dataset_name, **options))
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)


def check_evaluators(cfg: CfgNode) -> None:
    """
    Check before a run that ``DATASETS.TEST`` can be evaluated.

    Raises:
        ConfigError: if an ``evaluator_type`` is unknown, or the number of keypoints is not that of
            ``TEST.KEYPOINT_OKS_SIGMAS``.
    """
    for name in cfg.DATASETS.TEST:
        if COCOEvaluator in _EVALUATORS[_evaluator_type(name)] and cfg.MODEL.KEYPOINT_ON:
            number = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
            sigmas = len(cfg.TEST.KEYPOINT_OKS_SIGMAS) or 17  # COCO's
            if sigmas != number:
                raise ConfigError(
                    f"TEST.KEYPOINT_OKS_SIGMAS has {sigmas} numbers (COCO's if it is empty); to "
                    f"evaluate on {name!r} it must have {number}, one for each of NUM_KEYPOINTS."
                )


def _evaluator_type(dataset_name: str) -> str:
    kind = getattr(MetadataCatalog.get(dataset_name), "evaluator_type", None)
    if kind not in _EVALUATORS:
        raise ConfigError(
            f"DATASETS.TEST names {dataset_name!r}, whose evaluator_type is {kind!r}; it must be "
            f"one of {', '.join(_EVALUATORS)}."
        )
    return kind
