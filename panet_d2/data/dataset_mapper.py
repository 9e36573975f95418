"""A dataset mapper that says which image it could not use."""

from __future__ import annotations

import os
import signal
import threading
from functools import cache
from typing import Any, Dict, Tuple

from detectron2.config import CfgNode
from detectron2.data.detection_utils import annotations_to_instances
from detectron2.data.transforms import ResizeShortestEdge, TransformList
from torch.utils.data import get_worker_info

from .._detectron2 import AnnotationHook
from ..config import read_choice
from ..errors import ConfigError, DataError
from .augmentation import ResizeShortestEdgePerBatch

__all__ = ["NamedImageMapper"]


@cache  # once in a process
def _heed_only_the_parents_sigterm() -> None:
    """
    Schedulers send SIGTERM to all processes of a job. A data loader's worker that ends by it ends
    training with an error, when it should be saved first; so a worker leaves that to its parent.
    """
    if not hasattr(signal, "sigwaitinfo"):  # as on macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class NamedImageMapper(AnnotationHook):
    """
    Detectron2's mapper; what goes wrong with an image is reported with the image's name. Workers of
    a data loader that use it are ended by their parent alone, and not by anybody's SIGTERM.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> Dict[str, Any]:
        ret = super().from_config(cfg, is_train)
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
            dict: what Detectron2's models accept.

        Raises:
            ConfigError: see
                :meth:`panet_d2.data.augmentation.ResizeShortestEdgePerBatch.get_transform`.
            DataError: if the image or its annotations cannot be used.
        """
        if get_worker_info() is not None:
            _heed_only_the_parents_sigterm()
        try:
            return super().__call__(dataset_dict)
        except ConfigError:  # is not the image's fault
            raise
        # Pillow raises almost anything for broken files, and so does Detectron2 for annotations.
        except Exception as e:
            raise DataError(
                f"cannot use image {dataset_dict['file_name']}: {type(e).__name__}: {e}"
            ) from e

    def transform_annotations(
        self, dataset_dict: dict, transforms: TransformList, image_shape: Tuple[int, int]
    ) -> None:
        # The parent takes boxes from cropped masks, and without objects there are none to take.
        if self.recompute_boxes and all(a.get("iscrowd", 0) for a in dataset_dict["annotations"]):
            del dataset_dict["annotations"]
            dataset_dict["instances"] = annotations_to_instances([], image_shape)
        else:
            super().transform_annotations(dataset_dict, transforms, image_shape)
