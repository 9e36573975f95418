"""Test-time augmentation beyond Detectron2's: more views of an image and more ways to merge."""

from __future__ import annotations

import importlib.util
import logging
import threading
from contextlib import ExitStack, contextmanager
from itertools import groupby
from typing import Iterator, List, Optional, Tuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import create_keypoint_hflip_indices
from detectron2.data.transforms import HFlipTransform, TransformList, VFlipTransform
from detectron2.modeling import GeneralizedRCNN, PanopticFPN, detector_postprocess
from detectron2.structures import Boxes, Instances
from detectron2.structures.keypoints import heatmaps_to_keypoints
from torch import nn

from .._detectron2 import TTAHooks
from ..config import read_choice
from ..errors import ConfigError
from .check_model import is_architecture
from .roi_heads.suppression import Suppression, last_predictor
from .tta_mapper import MapperTTA, Rotate90Transform

logger = logging.getLogger("panet_d2")

# Augmentation switches parts of the model off and on again, which no other augmented prediction may
# see.
_switching = threading.RLock()


class RCNNWithTTA(TTAHooks):
    """
    :class:`GeneralizedRCNNWithTTA` with all views of :class:`MapperTTA` and with keypoints. Boxes
    are merged by the config's NMS, Soft-NMS and voting, or by weighted boxes fusion.

    Detectron2 pads views of different sizes to one batch. Here a batch has views of one shape only,
    because a norm over the whole feature map, such as GroupNorm, sees the padding.
    """

    def __init__(
        self,
        cfg: CfgNode,
        model: nn.Module,
        tta_mapper: Optional[MapperTTA] = None,
        batch_size: int = 3,
    ):
        """
        Args:
            cfg, model, batch_size: see :class:`GeneralizedRCNNWithTTA`.
            tta_mapper (callable): makes the views of an image; by default ``MapperTTA(cfg)``.

        Raises:
            ConfigError: see :func:`check_test_aug`.
        """
        check_test_aug(cfg, enabled=True)
        without_keypoints = cfg.clone()
        without_keypoints.defrost()
        without_keypoints.MODEL.KEYPOINT_ON = False  # the parent rejects True
        super().__init__(without_keypoints, model, tta_mapper or MapperTTA(cfg), batch_size)
        self.cfg.MODEL.KEYPOINT_ON = cfg.MODEL.KEYPOINT_ON
        self.suppression = Suppression.from_config(cfg)
        self.flipped_keypoints = _flipped_keypoints(cfg) if cfg.MODEL.KEYPOINT_ON else None
        logger.info(
            "Test-time augmentation: %d views of an image, %d forward passes.",
            len(self.tta_mapper),
            self.passes,
        )

    @property
    def passes(self) -> int:
        """Number of forward passes for an image. Masks and keypoints need a second pass."""
        again = self.cfg.MODEL.MASK_ON or self.cfg.MODEL.KEYPOINT_ON
        return len(self.tta_mapper) * (2 if again else 1)

    def infer_image(self, image: dict) -> dict:
        with _switching:
            return self._merged(image)

    def _merged(self, image: dict) -> dict:
        shape = (image["height"], image["width"])
        views = self.tta_mapper(image)
        transforms = [view.pop("transforms") for view in views]
        sizes = [view.pop("min_size") for view in views]
        with ExitStack() as stack:
            stack.enter_context(_without_heads(self.model, ["mask_on", "keypoint_on"]))
            if self.cfg.TEST.AUG.MERGE == "nms":
                # Suppress all boxes once, below: a second Soft-NMS would lower scores twice.
                stack.enter_context(_no_suppression(self.model))
            outputs = self.batch_inference(views)
        found = self.merge([_to_original(o, t) for o, t in zip(outputs, transforms)], sizes, shape)
        if not (self.cfg.MODEL.MASK_ON or self.cfg.MODEL.KEYPOINT_ON):
            return {"instances": found}
        outputs = self.batch_inference(views, self.into_views(views, found, transforms))
        counted = torch.stack([self.counts(found.pred_boxes, size) for size in sizes])
        if self.cfg.MODEL.MASK_ON:
            masks = [_unturn(o.pred_masks, t) for o, t in zip(outputs, transforms)]
            if self.cfg.TEST.AUG.MASKS == "logits":
                masks = [torch.logit(m, eps=1e-6) for m in masks]
            mean = _mean(masks, counted)
            found.pred_masks = mean.sigmoid() if self.cfg.TEST.AUG.MASKS == "logits" else mean
        if self.cfg.MODEL.KEYPOINT_ON:
            maps = [self._keypoint_maps(o, t) for o, t in zip(outputs, transforms)]
            found.pred_keypoint_heatmaps = _mean(maps, counted)
            points = heatmaps_to_keypoints(found.pred_keypoint_heatmaps, found.pred_boxes.tensor)
            found.pred_keypoints = points[:, :, [0, 1, 3]]
        return {"instances": detector_postprocess(found, *shape)}

    def batch_inference(
        self, inputs: List[dict], instances: Optional[List[Instances]] = None
    ) -> List[Instances]:
        outputs: List[Instances] = []
        for _, indices in groupby(range(len(inputs)), lambda i: inputs[i]["image"].shape):
            group = list(indices)
            given = None if instances is None else [instances[i] for i in group]
            outputs += super().batch_inference([inputs[i] for i in group], given)
        return outputs

    def counts(self, boxes: Boxes, min_size: int) -> torch.Tensor:
        """Return a bool tensor (N,): whether views of this size count for each original box."""
        counted = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
        if not self.cfg.TEST.AUG.BOX_SIZES:
            return counted
        low, high = self.cfg.TEST.AUG.BOX_SIZES
        sizes = sorted(set(self.cfg.TEST.AUG.MIN_SIZES))
        side = boxes.area().sqrt()
        if min_size < sizes[len(sizes) // 2]:
            counted &= side >= low
        if min_size > sizes[(len(sizes) - 1) // 2]:
            counted &= side <= high
        return counted

    def merge(
        self, outputs: List[Instances], sizes: List[int], shape: Tuple[int, int]
    ) -> Instances:
        """
        Merge the detections of all views.

        Args:
            outputs (list[Instances]): detections of each view, with boxes in pixels of the original
                image.
            sizes (list[int]): for each view its value of ``TEST.AUG.MIN_SIZES``.
            shape (tuple[int, int]): height and width of the original image.

        Returns:
            Instances: the detections, by decreasing score.
        """
        outputs = [o[self.counts(o.pred_boxes, size)] for o, size in zip(outputs, sizes)]
        for output in outputs:
            output.pred_boxes.clip(shape)
        if self.cfg.TEST.AUG.MERGE == "wbf":
            return self._fuse(outputs, sizes, shape)
        found = Instances(shape)
        found.pred_boxes = Boxes.cat([o.pred_boxes for o in outputs])
        found.scores = torch.cat([o.scores for o in outputs])
        found.pred_classes = torch.cat([o.pred_classes for o in outputs])
        return self.suppression(found)

    def _fuse(
        self, outputs: List[Instances], sizes: List[int], shape: Tuple[int, int]
    ) -> Instances:
        from ensemble_boxes import weighted_boxes_fusion

        device = outputs[0].scores.device
        scale = np.array([shape[1], shape[0], shape[1], shape[0]])
        outputs = [o[o.pred_boxes.nonempty()] for o in outputs]
        boxes, scores, classes = weighted_boxes_fusion(
            [np.clip(o.pred_boxes.tensor.cpu().numpy() / scale, 0, 1) for o in outputs],
            [o.scores.cpu().numpy() for o in outputs],
            [o.pred_classes.cpu().numpy() for o in outputs],
            iou_thr=self.suppression.iou_threshold,
        )
        found = Instances(shape)
        found.pred_boxes = Boxes(torch.as_tensor(boxes * scale, dtype=torch.float32, device=device))
        found.scores = torch.as_tensor(scores, dtype=torch.float32, device=device)
        found.pred_classes = torch.as_tensor(classes, dtype=torch.long, device=device)
        # Fusion lowers the score of a box that few views found. Undo this for views that do not
        # count for the box.
        views = sum(self.counts(found.pred_boxes, size).float() for size in sizes)
        found.scores = (found.scores * len(sizes) / views).clamp(max=1)
        order = found.scores.argsort(descending=True, stable=True)
        limit = self.suppression.limit
        return found[order[:limit] if limit >= 0 else order]

    def _keypoint_maps(self, output: Instances, transforms: TransformList) -> torch.Tensor:
        maps = _unturn(output.pred_keypoint_heatmaps, transforms)
        mirrored = sum(
            isinstance(t, (HFlipTransform, VFlipTransform)) for t in transforms.transforms
        )
        return maps[:, self.flipped_keypoints] if mirrored % 2 else maps


@contextmanager
def _without_heads(model: nn.Module, switches: List[str]) -> Iterator[None]:
    """Turn heads off by the names of their switches, and on again even after an error."""
    heads = model.roi_heads
    before = {name: getattr(heads, name) for name in switches if hasattr(heads, name)}
    try:
        for name in before:
            setattr(heads, name, False)
        yield
    finally:
        for name, value in before.items():
            setattr(heads, name, value)


@contextmanager
def _no_suppression(model: nn.Module) -> Iterator[None]:
    """Let heads with Soft-NMS or voting return all boxes."""
    predictor = last_predictor(getattr(model.roi_heads, "box_predictor", nn.Module()))
    suppression = getattr(predictor, "suppression", None)
    if suppression is None:
        yield
        return
    predictor.suppression = None
    try:
        yield
    finally:
        predictor.suppression = suppression


def _to_original(output: Instances, transforms: TransformList) -> Instances:
    """Return the detections of a view with boxes in pixels of the original image."""
    boxes = output.pred_boxes.tensor
    boxes = torch.from_numpy(transforms.inverse().apply_box(boxes.cpu().numpy())).to(boxes.device)
    output.pred_boxes = Boxes(boxes)
    return output


def _unturn(maps: torch.Tensor, transforms: TransformList) -> torch.Tensor:
    """Turn the maps (N, C, S, S) of boxes in a view back to the original image."""
    for transform in reversed(transforms.transforms):
        if isinstance(transform, HFlipTransform):
            maps = maps.flip(3)
        elif isinstance(transform, VFlipTransform):
            maps = maps.flip(2)
        elif isinstance(transform, Rotate90Transform):
            maps = torch.rot90(maps, -transform.quarter_turns, (2, 3))
    return maps


def _mean(maps: List[torch.Tensor], counted: torch.Tensor) -> torch.Tensor:
    """Return each box's mean over the views that are ``counted``, bool of shape (views, N)."""
    stacked = torch.stack(maps)
    if counted.all():
        return stacked.mean(dim=0)
    weights = counted.to(stacked.dtype)[:, :, None, None, None]
    return (stacked * weights).sum(dim=0) / weights.sum(dim=0)


def _flipped_keypoints(cfg: CfgNode) -> Optional[List[int]]:
    """Return the keypoints' order in a mirrored image, from the first dataset with names."""
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        metadata = MetadataCatalog.get(name)
        if metadata.get("keypoint_names") and metadata.get("keypoint_flip_map") is not None:
            return create_keypoint_hflip_indices([name])
    return None


def check_test_aug(cfg: CfgNode, enabled: bool = False) -> None:
    """
    Check that :class:`RCNNWithTTA` can run the model.

    Args:
        cfg (CfgNode): the config, with its datasets registered.
        enabled (bool): check even if ``TEST.AUG.ENABLED`` is False.

    Raises:
        ConfigError: if the model cannot be run; the message names the key.
    """
    aug, name = cfg.TEST.AUG, cfg.MODEL.META_ARCHITECTURE
    if not (aug.ENABLED or enabled):
        return
    # For a panoptic model, only instances would be returned, and the evaluators need the rest.
    if not is_architecture(cfg, GeneralizedRCNN) or is_architecture(cfg, PanopticFPN):
        raise ConfigError(
            f"TEST.AUG.ENABLED must be False with MODEL.META_ARCHITECTURE {name}: "
            "test-time augmentation is for GeneralizedRCNN."
        )
    if cfg.MODEL.LOAD_PROPOSALS:
        raise ConfigError("TEST.AUG.ENABLED must be False if MODEL.LOAD_PROPOSALS is True.")
    read_choice(cfg, "TEST.AUG.MASKS", ("probabilities", "logits"))
    merge = read_choice(cfg, "TEST.AUG.MERGE", ("nms", "wbf"))
    if merge == "wbf" and importlib.util.find_spec("ensemble_boxes") is None:
        raise ConfigError(
            "TEST.AUG.MERGE is 'wbf', which needs the package ensemble-boxes; install it "
            "(pip install ensemble-boxes), or set 'nms'."
        )
    mirrors = [key for key in ("FLIP", "VFLIP") if aug[key]]
    if cfg.MODEL.KEYPOINT_ON and mirrors and _flipped_keypoints(cfg) is None:
        raise ConfigError(
            f"TEST.AUG.{mirrors[0]} is True, but no dataset of DATASETS.TRAIN and TEST says which "
            "keypoints a flip exchanges; set it to False, or name a dataset with keypoints."
        )
