"""Test-time augmentation beyond Detectron2's: more views of an image, and more ways to merge."""

from __future__ import annotations

import importlib.util
import logging
from contextlib import ExitStack
from itertools import groupby, product
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import create_keypoint_hflip_indices
from detectron2.data.transforms import (
    HFlipTransform,
    NoOpTransform,
    ResizeShortestEdge,
    ResizeTransform,
    Transform,
    TransformList,
    VFlipTransform,
)
from detectron2.modeling import DatasetMapperTTA, GeneralizedRCNN, PanopticFPN, detector_postprocess
from detectron2.structures import Boxes, Instances
from detectron2.structures.keypoints import heatmaps_to_keypoints
from torch import nn

from .._detectron2 import TTAHooks
from ..config import read_choice
from ..errors import ConfigError, DataError
from .check_model import is_architecture, suppression_keys
from .roi_heads.suppression import Suppression, last_predictor

logger = logging.getLogger("panet_d2")

# Keys of TEST.AUG that Detectron2 does not have, with the values that ask for nothing.
_OWN_KEYS = {
    "VFLIP": False,
    "ROTATIONS": (),
    "ASPECT_RATIOS": (),
    "BOX_SIZES": (),
    "MERGE": "nms",
    "MASKS": "probabilities",
}


class Rotate90Transform(Transform):
    """Rotate an image by quarter turns, exactly."""

    def __init__(self, h: int, w: int, quarter_turns: int):
        """
        Args:
            h, w (int): size of the image before.
            quarter_turns (int): counterclockwise, as in :func:`numpy.rot90`.
        """
        super().__init__()
        self.h, self.w, self.quarter_turns = h, w, quarter_turns % 4

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        return np.rot90(img, self.quarter_turns)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        width, height = self.w, self.h
        for _ in range(self.quarter_turns):
            coords = np.stack([coords[:, 1], width - coords[:, 0]], axis=1)
            width, height = height, width
        return coords

    def inverse(self) -> Rotate90Transform:
        size = (self.w, self.h) if self.quarter_turns % 2 else (self.h, self.w)
        return Rotate90Transform(*size, -self.quarter_turns)


class MapperTTA(DatasetMapperTTA):
    """Makes the views of an image; see ``TEST.AUG`` in ``panet_d2/config.py``."""

    @configurable
    def __init__(
        self,
        min_sizes: Sequence[int],
        max_size: int,
        flip: bool,
        vflip: bool = False,
        rotations: Sequence[int] = (),
        aspect_ratios: Sequence[float] = (),
    ):
        """
        Args:
            min_sizes, max_size, flip: see :class:`DatasetMapperTTA`.
            vflip (bool): whether to flip vertically, too.
            rotations (sequence[int]): degrees counterclockwise: 90, 180 or 270.
            aspect_ratios (sequence[float]): factors of the width, beside 1.
        """
        super().__init__(min_sizes, max_size, flip)
        self.aspect_ratios = list(dict.fromkeys([1.0, *map(float, aspect_ratios)]))
        # Each view is a horizontal flip or none, followed by quarter turns. A vertical flip is a
        # horizontal one and half a turn, so many combinations are the same view.
        mirrors = [(0, False), *([(0, True)] if flip else []), *([(2, True)] if vflip else [])]
        if flip and vflip:
            mirrors.append((2, False))
        turns = [0, *(angle // 90 for angle in rotations)]
        views = {
            ((turn + half) % 4, mirrored) for turn, (half, mirrored) in product(turns, mirrors)
        }
        # Views of one shape follow each other, so that they make a batch.
        self.orientations = sorted(views, key=lambda view: (view[0] % 2, view))

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        aug = cfg.TEST.AUG
        ret = super().from_config(cfg)
        own = {"vflip": aug.VFLIP, "rotations": aug.ROTATIONS, "aspect_ratios": aug.ASPECT_RATIOS}
        return {**ret, **own}

    def __len__(self) -> int:
        """Number of views of an image."""
        return len(self.min_sizes) * len(self.aspect_ratios) * len(self.orientations)

    def __call__(self, dataset_dict: dict) -> List[dict]:
        """
        Args:
            dataset_dict (dict): one image, the model's input.

        Returns:
            list[dict]: for each view the same with another "image", its "min_size", and
            "transforms", a :class:`TransformList` from the original image to the view.

        Raises:
            DataError: if a view has no pixels.
        """
        image = dataset_dict["image"].permute(1, 2, 0).numpy()
        height, width = image.shape[:2]
        original = (dataset_dict["height"], dataset_dict["width"])
        first: Transform = NoOpTransform()
        if original != (height, width):
            first = ResizeTransform(*original, height, width)
        views = []
        for min_size, ratio in product(self.min_sizes, self.aspect_ratios):
            new_h, new_w = ResizeShortestEdge.get_output_shape(
                height, max(1, round(width * ratio)), min_size, self.max_size
            )
            if 0 in (new_h, new_w):
                raise DataError(
                    f"the image of {width}x{height} pixels is too narrow: TEST.AUG.MIN_SIZES and "
                    f"MAX_SIZE resize it to {new_w}x{new_h}."
                )
            resize = ResizeTransform(height, width, new_h, new_w)
            resized = resize.apply_image(np.copy(image))
            resized = resized.reshape(new_h, new_w, -1)  # one channel
            for turns, mirrored in self.orientations:
                oriented = [HFlipTransform(new_w)] if mirrored else []
                oriented += [Rotate90Transform(new_h, new_w, turns)] if turns else []
                view = TransformList(oriented).apply_image(resized) if oriented else resized
                view = torch.from_numpy(np.ascontiguousarray(view.transpose(2, 0, 1)))
                transforms = TransformList([first, resize, *oriented])
                views.append({**dataset_dict, "image": view})
                views[-1].update(transforms=transforms, min_size=min_size)
        return views


class RCNNWithTTA(TTAHooks):
    """
    :class:`GeneralizedRCNNWithTTA` with all views of :class:`MapperTTA`, keypoints, and boxes
    merged by the config's NMS, Soft-NMS and voting, or by weighted boxes fusion.

    Detectron2 pads views of different sizes to one batch. Here only views of one shape are a batch,
    because a norm over the whole map, such as GroupNorm, sees the padding.
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
        without_keypoints.MODEL.KEYPOINT_ON = False  # which the parent would reject
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
        """Number of forward passes that an image takes: masks and keypoints need a second one."""
        again = self.cfg.MODEL.MASK_ON or self.cfg.MODEL.KEYPOINT_ON
        return len(self.tta_mapper) * (2 if again else 1)

    def infer_image(self, image: dict) -> dict:
        shape = (image["height"], image["width"])
        views = self.tta_mapper(image)
        transforms = [view.pop("transforms") for view in views]
        sizes = [view.pop("min_size") for view in views]
        with ExitStack() as stack:
            stack.enter_context(self.without_heads(["mask_on", "keypoint_on"]))
            if self.cfg.TEST.AUG.MERGE == "nms":
                # All boxes, to be suppressed once: Soft-NMS would lower scores twice.
                stack.enter_context(_NoSuppression(self.model))
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
        """Return for each box of the original image whether views of this size count, (N,)."""
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
            outputs (list[Instances]): of each view, with boxes in pixels of the original image.
            sizes (list[int]): the one of ``TEST.AUG.MIN_SIZES`` of each view.
            shape (tuple[int, int]): height and width of the original image.

        Returns:
            Instances: the detections, by falling score.
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
        # Scores are lower for boxes that few views have found. Views that do not count must not.
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


class _NoSuppression(ExitStack):
    """Let heads with Soft-NMS or voting return all boxes."""

    def __init__(self, model: nn.Module):
        super().__init__()
        predictor = last_predictor(getattr(model.roi_heads, "box_predictor", nn.Module()))
        suppression = getattr(predictor, "suppression", None)
        if suppression is not None:
            predictor.suppression = None
            self.callback(setattr, predictor, "suppression", suppression)


def _to_original(output: Instances, transforms: TransformList) -> Instances:
    """The detections in a view, with boxes in pixels of the original image."""
    boxes = output.pred_boxes.tensor
    boxes = torch.from_numpy(transforms.inverse().apply_box(boxes.cpu().numpy())).to(boxes.device)
    output.pred_boxes = Boxes(boxes)
    return output


def _unturn(maps: torch.Tensor, transforms: TransformList) -> torch.Tensor:
    """Turn maps (N, C, S, S) of boxes in a view to those in the original image."""
    for transform in reversed(transforms.transforms):
        if isinstance(transform, HFlipTransform):
            maps = maps.flip(3)
        elif isinstance(transform, VFlipTransform):
            maps = maps.flip(2)
        elif isinstance(transform, Rotate90Transform):
            maps = torch.rot90(maps, -transform.quarter_turns, (2, 3))
    return maps


def _mean(maps: List[torch.Tensor], counted: torch.Tensor) -> torch.Tensor:
    """Mean over the views, for each box over those that count: bool of shape (views, N)."""
    stacked = torch.stack(maps)
    if counted.all():
        return stacked.mean(dim=0)
    weights = counted.to(stacked.dtype)[:, :, None, None, None]
    return (stacked * weights).sum(dim=0) / weights.sum(dim=0)


def _flipped_keypoints(cfg: CfgNode) -> Optional[List[int]]:
    """The order of the keypoints in a mirrored image, from the first dataset that names them."""
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
        ConfigError: naming the key.
    """
    aug, name = cfg.TEST.AUG, cfg.MODEL.META_ARCHITECTURE
    if not (aug.ENABLED or enabled):
        return
    # With a panoptic model, it returns only the instances, and the evaluators need the rest.
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


_stock_mapper_from_config = DatasetMapperTTA.from_config.__func__


def _mapper_from_config(cls: type, cfg: CfgNode, *args: Any) -> Dict[str, Any]:
    if cls is DatasetMapperTTA:
        aug = cfg.TEST.AUG
        asked = [f"TEST.AUG.{k}" for k, v in _OWN_KEYS.items() if aug.get(k, v) not in (v, [])]
        for key in (*asked, *suppression_keys(cfg)):
            raise ConfigError(
                f"{key} is set, but Detectron2's GeneralizedRCNNWithTTA ignores it; use "
                "panet_d2.modeling.RCNNWithTTA, or train_net.py, which does."
            )
    return _stock_mapper_from_config(cls, cfg, *args)


# Of a stock program's test-time augmentation, nothing else of this package would see the config.
DatasetMapperTTA.from_config = classmethod(_mapper_from_config)
