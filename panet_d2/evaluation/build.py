"""Detectron2's evaluators, chosen by the type of the dataset."""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import Any, Dict, Optional, Type

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    RotatedCOCOEvaluator,
    SemSegEvaluator,
)
from detectron2.utils.file_io import PathManager
from PIL import Image

from ..data.check_records import check_records
from ..errors import ConfigError

# By the evaluator_type of a dataset.
_EVALUATORS = {
    "coco": (COCOEvaluator,),
    "coco_rotated": (RotatedCOCOEvaluator,),
    "coco_panoptic_seg": (SemSegEvaluator, COCOEvaluator, COCOPanopticEvaluator),
    "sem_seg": (SemSegEvaluator,),
    "lvis": (LVISEvaluator,),
    "cityscapes_instance": (CityscapesInstanceEvaluator,),
    "cityscapes_sem_seg": (CityscapesSemSegEvaluator,),
    "pascal_voc": (PascalVOCDetectionEvaluator,),
}
# The package that an evaluator imports when it evaluates, and how to install it.
_PACKAGES = {
    LVISEvaluator: ("lvis", "pip install lvis"),
    CityscapesInstanceEvaluator: ("cityscapesscripts", "pip install cityscapesscripts"),
    CityscapesSemSegEvaluator: ("cityscapesscripts", "pip install cityscapesscripts"),
    COCOPanopticEvaluator: (
        "panopticapi",
        "pip install git+https://github.com/cocodataset/panopticapi.git",
    ),
}
# Modules of these packages that use names which NumPy has removed: lvis 0.5.3 np.float, and
# cityscapesscripts 2.3.0 np.in1d. Both are the latest release.
_MODULES_FOR_OLD_NUMPY = {
    "lvis": ("lvis.eval",),
    "cityscapesscripts": (
        "cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling",
        "cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling",
    ),
}
_ALL_DETECTIONS = 100_000  # more than any image has
_TAKE_FOLDER = (
    COCOEvaluator,
    COCOPanopticEvaluator,
    LVISEvaluator,
    RotatedCOCOEvaluator,
    SemSegEvaluator,
)


def detection_limit(wanted: int) -> int:
    """
    Return how many detections of an image COCO's AP uses: 100, or ``wanted`` if higher. A negative
    number is Detectron2's for all detections.
    """
    return max(100, wanted) if wanted >= 0 else _ALL_DETECTIONS


def inference_folder(cfg: CfgNode, dataset_name: str, folder: Optional[str] = None) -> str:
    """
    Return the folder with the results of a dataset: ``folder``, by default OUTPUT_DIR/inference.
    With several datasets in ``DATASETS.TEST``, each has a subfolder, because the file names are the
    same.
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
        dataset_name (str): a registered dataset. Its ``evaluator_type`` selects the evaluator.
        output_folder (str or None): where results are written, see :func:`inference_folder`.

    Raises:
        ConfigError: if the ``evaluator_type`` is unknown, or the evaluator needs a package that is
            not installed.
    """
    folder = inference_folder(cfg, dataset_name, output_folder)
    evaluators = []
    for evaluator in _EVALUATORS[_evaluator_type(dataset_name)]:
        options: Dict[str, Any] = {"output_dir": folder} if evaluator in _TAKE_FOLDER else {}
        if evaluator is COCOEvaluator:
            options["max_dets_per_image"] = detection_limit(cfg.TEST.DETECTIONS_PER_IMAGE)
            options["kpt_oks_sigmas"] = cfg.TEST.KEYPOINT_OKS_SIGMAS
            # A dataset that is not a COCO file is converted to one. The file of an earlier run may
            # hold other annotations.
            options["allow_cached_coco"] = False
        elif evaluator is SemSegEvaluator:
            options["sem_seg_loading_fn"] = _read_labels
        _prepare_package(evaluator, dataset_name)
        evaluators.append(evaluator(dataset_name, **options))
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)


def check_evaluators(cfg: CfgNode) -> None:
    """
    Check before a run that ``DATASETS.TEST`` can be evaluated.

    Raises:
        ConfigError: if an ``evaluator_type`` is unknown, a package of an evaluator or the names of
            the classes are missing, or the number of keypoints is not that of
            ``TEST.KEYPOINT_OKS_SIGMAS``.
        DataError: if a dataset of a user's own function has an image that cannot be evaluated.
    """
    for name in cfg.DATASETS.TEST:
        evaluators = _EVALUATORS[_evaluator_type(name)]
        for evaluator in evaluators:
            _prepare_package(evaluator, name)
        if COCOEvaluator in evaluators and not hasattr(MetadataCatalog.get(name), "json_file"):
            # The evaluator makes a COCO file of the images.
            if not hasattr(MetadataCatalog.get(name), "thing_classes"):
                raise ConfigError(
                    f"DATASETS.TEST names {name!r}, which has no names of its classes; set them: "
                    f"MetadataCatalog.get({name!r}).thing_classes = ['…']."
                )
            check_records(cfg, [name], DatasetCatalog.get(name), evaluated=True)
        if COCOEvaluator in evaluators and cfg.MODEL.KEYPOINT_ON:
            number = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
            sigmas = len(cfg.TEST.KEYPOINT_OKS_SIGMAS) or 17  # COCO's
            if sigmas != number:
                raise ConfigError(
                    f"TEST.KEYPOINT_OKS_SIGMAS has {sigmas} numbers (COCO's if it is empty); to "
                    f"evaluate on {name!r} it must have {number}, one for each of NUM_KEYPOINTS."
                )


def _evaluator_type(dataset_name: str) -> str:
    kind = getattr(MetadataCatalog.get(dataset_name), "evaluator_type", None)
    if kind is None:
        raise ConfigError(
            f"DATASETS.TEST names {dataset_name!r}, which has no evaluator_type; for COCO's AP set "
            f"MetadataCatalog.get({dataset_name!r}).evaluator_type = 'coco', or set DATASETS.TEST "
            "to []."
        )
    if kind not in _EVALUATORS:
        raise ConfigError(
            f"DATASETS.TEST names {dataset_name!r}, whose evaluator_type is {kind!r}; it must be "
            f"one of {', '.join(_EVALUATORS)}."
        )
    return kind


def _prepare_package(evaluator: Type[DatasetEvaluator], dataset_name: str) -> None:
    """Import the package of an evaluator, and make it work with the NumPy that is installed."""
    if evaluator not in _PACKAGES:
        return
    package, command = _PACKAGES[evaluator]
    if package == "cityscapesscripts":
        # The package's modules look for the ground truth when they are imported, see
        # CityscapesSemSegEvaluator.evaluate.
        root = os.path.join(MetadataCatalog.get(dataset_name).gt_dir, "..", "..")
        os.environ["CITYSCAPES_DATASET"] = os.path.abspath(root)
    try:
        modules = [
            importlib.import_module(m) for m in _MODULES_FOR_OLD_NUMPY.get(package, (package,))
        ]
    except ImportError as e:
        raise ConfigError(
            f"DATASETS.TEST names {dataset_name!r}, whose evaluation needs the package {package} "
            f"({e}); install it ({command}), or set DATASETS.TEST to []."
        ) from e
    for module in modules:
        if getattr(module, "np", None) is np:
            vars(module)["np"] = _numpy_with_old_names()


def _numpy_with_old_names() -> ModuleType:
    """Return a copy of NumPy's module that also has removed names, for another package."""
    module = ModuleType("numpy")
    vars(module).update(float=float, in1d=lambda *a, **k: np.isin(*a, **k).ravel())
    vars(module).update(vars(np))
    return module


def _read_labels(filename: str, dtype: Any = None) -> np.ndarray:
    """Read an image of labels. Detectron2's own function fails with NumPy 2."""
    with PathManager.open(filename, "rb") as f, Image.open(f) as image:
        return np.array(image, dtype=dtype)
