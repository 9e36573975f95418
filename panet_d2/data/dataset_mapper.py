"""A dataset mapper whose errors name the image."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Dict, Optional, Tuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import (
    annotations_to_instances,
    annotations_to_instances_rotated,
    filter_empty_instances,
)
from detectron2.data.transforms import Augmentation, ResizeShortestEdge, TransformList
from detectron2.structures import BoxMode
from fvcore.transforms.transform import Transform

from .._detectron2 import AnnotationHook
from ..check_config import CHANNELS
from ..config import read_choice
from ..errors import ConfigError, DataError
from .augmentation import ResizeShortestEdgePerBatch
from .worker_signals import leave_sigterm_to_parent


class NamedImageMapper(AnnotationHook):
    """
    Detectron2's mapper, with errors that name the image. Errors of an augmentation are not changed.
    For workers of a data loader, see :func:`leave_sigterm_to_parent`.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> Dict[str, Any]:
        ret = super().from_config(cfg, is_train)
        channels, mean = CHANNELS.get(cfg.INPUT.FORMAT), cfg.MODEL.PIXEL_MEAN
        if channels is not None and channels != len(mean):
            raise ConfigError(
                f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r}, which has {channels} channels, but "
                f"MODEL.PIXEL_MEAN is {list(mean)}; PIXEL_MEAN and PIXEL_STD must have one number "
                "for each channel."
            )
        if is_train and read_choice(cfg, "INPUT.SAME_SIZE_PER_BATCH", (True, False)):
            ret["augmentations"] = [
                ResizeShortestEdgePerBatch(
                    cfg.INPUT.MIN_SIZE_TRAIN,
                    cfg.INPUT.MAX_SIZE_TRAIN,
                    cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING,
                )
                if type(augmentation) is ResizeShortestEdge
                else augmentation
                for augmentation in ret["augmentations"]
            ]
        return ret

    def __call__(self, dataset_dict: dict) -> dict:
        """
        Args:
            dataset_dict (dict): one image in Detectron2's dataset format.

        Returns:
            dict: the input of Detectron2's models.

        Raises:
            ConfigError: if shapely is missing; also see
                :meth:`panet_d2.data.augmentation.ResizeShortestEdgePerBatch.get_transform`.
            DataError: if the image or its annotations cannot be used.
            Exception: any error of an augmentation, or of a transform that is not Detectron2's.
        """
        leave_sigterm_to_parent()
        try:
            mapped = super().__call__(dataset_dict)
            if mapped["image"].dtype == torch.float64:  # YUV-BT.601 is; models are not
                mapped["image"] = mapped["image"].float()
            return mapped
        except ModuleNotFoundError as e:
            if e.name is None or not e.name.startswith("shapely"):
                raise
            raise ConfigError(
                "polygon masks need the package shapely to be cropped; run pip install shapely, or "
                "do not crop."
            ) from e
        # Pillow raises almost any error for broken files, and Detectron2 for broken annotations.
        except Exception as e:
            if _from_augmentation(e.__traceback__):
                raise
            raise DataError(
                f"cannot use image {dataset_dict['file_name']}: {type(e).__name__}: {e}"
            ) from e

    def transform_annotations(
        self, dataset_dict: dict, transforms: TransformList, image_shape: Tuple[int, int]
    ) -> None:
        annotations = dataset_dict["annotations"]
        if any(a["bbox_mode"] == BoxMode.XYWHA_ABS for a in annotations):
            # The parent would turn them into upright boxes.
            objects = [a for a in dataset_dict.pop("annotations") if not a.get("iscrowd", 0)]
            for a in objects:
                box = np.asarray([a["bbox"]], dtype=float)
                a["bbox"] = transforms.apply_rotated_box(box)[0]
            instances = annotations_to_instances_rotated(objects, image_shape)
            dataset_dict["instances"] = filter_empty_instances(instances)
            return
        # The parent computes boxes from cropped masks, which fails without objects.
        if self.recompute_boxes and all(a.get("iscrowd", 0) for a in annotations):
            del dataset_dict["annotations"]
            dataset_dict["instances"] = annotations_to_instances([], image_shape)
        else:
            super().transform_annotations(dataset_dict, transforms, image_shape)


def _from_augmentation(traceback: Optional[TracebackType]) -> bool:
    """
    Whether an error was raised by a transform that is not Detectron2's, or by an augmentation that
    makes a transform. An error of Detectron2's transforms means that the data cannot be used.
    """
    while traceback is not None:
        frame = traceback.tb_frame
        owner = frame.f_locals.get("self")
        if isinstance(owner, (Augmentation, Transform)):
            if type(owner).__module__.split(".")[0] not in ("detectron2", "fvcore"):
                return True
            if frame.f_code.co_name == "get_transform":
                return True
        traceback = traceback.tb_next
    return False
