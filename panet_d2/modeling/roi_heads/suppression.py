"""Soft-NMS and box voting in place of the NMS of Detectron2's box predictors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Optional

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec, batched_nms
from detectron2.structures import Boxes, Instances
from torch import nn

from ..._detectron2 import HeadHooks
from ...config import read_choice
from ...errors import ConfigError
from ...layers.nms import SOFT_NMS_METHODS, VOTING_SCORES, box_voting, soft_nms
from ..check_model import suppression_keys


@dataclass(frozen=True)
class Suppression:
    """
    Selection of the detections of an image from all boxes with a score above the threshold.

    Attributes:
        iou_threshold (float): IoU threshold of NMS and of linear Soft-NMS.
        limit (int): maximum number of detections of an image, applied before voting; negative for
            all.
        soft_nms (str): a method of :func:`soft_nms`; "" for NMS.
        sigma, score_threshold (float): see :func:`soft_nms`.
        voting (str): a method of :func:`box_voting`; "" for no voting.
        voting_threshold, temperature (float): see :func:`box_voting`.
    """

    iou_threshold: float
    limit: int
    soft_nms: str = ""
    sigma: float = 0.5
    score_threshold: float = 0.001
    voting: str = ""
    voting_threshold: float = 0.8
    temperature: float = 1.0

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Suppression:
        """
        Raises:
            ConfigError: if a method is unknown.
        """
        asked = suppression_keys(cfg)
        options: Dict[str, Any] = {}
        if "TEST.SOFT_NMS.ENABLED" in asked:
            options["soft_nms"] = read_choice(cfg, "TEST.SOFT_NMS.METHOD", SOFT_NMS_METHODS)
            options["sigma"] = cfg.TEST.SOFT_NMS.SIGMA
            options["score_threshold"] = cfg.TEST.SOFT_NMS.SCORE_THRESH
        if "TEST.BOX_VOTING.ENABLED" in asked:
            options["voting"] = read_choice(cfg, "TEST.BOX_VOTING.SCORES", VOTING_SCORES)
            options["voting_threshold"] = cfg.TEST.BOX_VOTING.THRESH
            options["temperature"] = cfg.TEST.BOX_VOTING.TEMPERATURE
        thresh, limit = cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST, cfg.TEST.DETECTIONS_PER_IMAGE
        return cls(thresh, limit, **options)

    def __call__(self, found: Instances) -> Instances:
        """
        Args:
            found (Instances): all boxes of an image: "pred_boxes", "scores" and "pred_classes".

        Returns:
            Instances: the detections, by decreasing score.
        """
        boxes, scores, classes = found.pred_boxes.tensor, found.scores, found.pred_classes
        if self.soft_nms:
            keep, kept_scores = soft_nms(
                boxes,
                scores,
                classes,
                method=self.soft_nms,
                iou_threshold=self.iou_threshold,
                sigma=self.sigma,
                score_threshold=self.score_threshold,
                limit=self.limit,
            )
        else:
            keep = batched_nms(boxes, scores, classes, self.iou_threshold)
            keep = keep[: self.limit] if self.limit >= 0 else keep
            kept_scores = scores[keep]
        new = Instances(found.image_size)
        new.pred_boxes, new.scores, new.pred_classes = (
            Boxes(boxes[keep]),
            kept_scores,
            classes[keep],
        )
        if self.voting:
            new_boxes, new.scores = box_voting(
                boxes,
                scores,
                classes,
                keep,
                kept_scores,
                iou_threshold=self.voting_threshold,
                method=self.voting,
                temperature=self.temperature,
            )
            new.pred_boxes = Boxes(new_boxes)
            new = new[new.scores.argsort(descending=True, stable=True)]
        return new


class SuppressionMixin(HeadHooks):
    """
    A mixin for ROI heads derived from :class:`StandardROIHeads` that applies ``TEST.SOFT_NMS`` and
    ``TEST.BOX_VOTING``. The box predictor then returns all boxes with a score above the threshold.
    The predictor's attribute ``suppression``, a :class:`Suppression`, selects the detections.
    """

    box_predictor: nn.Module

    @classmethod
    def init_head(
        cls,
        parent: Callable[[CfgNode, Dict[str, ShapeSpec]], dict],
        cfg: CfgNode,
        input_shape: Dict[str, ShapeSpec],
        branch: str,
    ) -> dict:
        ret = super().init_head(parent, cfg, input_shape, branch)
        asked = suppression_keys(cfg)
        if branch == "box" and asked:
            predictors = ret.get("box_predictors") or [ret.get("box_predictor")]
            for predictor in predictors:
                if not hasattr(predictor, "test_nms_thresh"):
                    raise ConfigError(
                        f"{asked[0]} is True; it needs a box predictor derived from "
                        f"FastRCNNOutputLayers, not a {type(predictor).__name__}."
                    )
            set_suppression(predictors[-1], Suppression.from_config(cfg))
        return ret

    def forward_box(
        self,
        features: Dict[str, torch.Tensor],
        proposals: List[Instances],
        *targets: Optional[List[Instances]],
    ) -> Any:
        result = super().forward_box(features, proposals, *targets)
        suppression = getattr(last_predictor(self.box_predictor), "suppression", None)
        if self.training or suppression is None:
            return result
        return [suppression(found) for found in result]


def last_predictor(predictor: nn.Module) -> Any:
    """Return the box predictor of the final detections: in a cascade, the last one."""
    return predictor[-1] if isinstance(predictor, nn.ModuleList) else predictor


def set_suppression(predictor: Any, suppression: Suppression) -> None:
    """
    Let a box predictor of heads with :class:`SuppressionMixin` use Soft-NMS or voting.

    Args:
        predictor (FastRCNNOutputLayers): the heads' predictor, or the last one of a cascade.
        suppression (Suppression): selects the detections.
    """
    predictor.suppression = suppression
    predictor.test_nms_thresh = 1.0  # no IoU is higher
    predictor.test_topk_per_image = -1
