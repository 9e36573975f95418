"""How well the anchors of a config overlap the objects of a dataset."""

from __future__ import annotations

import re
from typing import Dict, List, Optional

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling import RetinaNet
from detectron2.structures import Boxes
from detectron2.structures.boxes import matched_pairwise_iou

from ..modeling.anchor_generator import ANCHOR_GENERATORS
from ..modeling.check_model import is_architecture
from .fingerprint import Fingerprint


def anchor_strides(cfg: CfgNode) -> Optional[List[int]]:
    """
    Return the strides of the feature maps that have anchors, from the names of FPN's levels: "p2"
    has stride 4. Return None if other maps have anchors, or the generator is not one of
    :data:`ANCHOR_GENERATORS`.
    """
    names = (cfg.MODEL.RETINANET if is_architecture(cfg, RetinaNet) else cfg.MODEL.RPN).IN_FEATURES
    levels = [re.fullmatch(r"p(\d+)", name) for name in names]
    if cfg.MODEL.ANCHOR_GENERATOR.NAME not in ANCHOR_GENERATORS or not all(levels):
        return None
    return [2 ** int(level[1]) for level in levels if level]


def resized(cfg: CfgNode, sizes: np.ndarray) -> np.ndarray:
    """
    Compute the sizes of images after the resize at inference.

    Args:
        cfg (CfgNode): ``INPUT.MIN_SIZE_TEST`` and ``MAX_SIZE_TEST`` are used.
        sizes (np.ndarray): shape (N, 2), height and width of images in pixels.

    Returns:
        np.ndarray: shape (N, 2), height and width in pixels, at least 1.
    """
    shortest, longest = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    if shortest == 0 or not len(sizes):
        return sizes
    unique, inverse = np.unique(sizes, axis=0, return_inverse=True)
    new = [ResizeShortestEdge.get_output_shape(h, w, shortest, longest) for h, w in unique]
    return np.maximum(np.array(new, float), 1)[inverse.reshape(-1)]


def scaled_boxes(cfg: CfgNode, fingerprint: Fingerprint) -> np.ndarray:
    """Return the boxes in pixels of the :func:`resized` images, shape (M, 4)."""
    factors = (resized(cfg, fingerprint.sizes) / fingerprint.sizes)[fingerprint.images]
    return fingerprint.boxes * factors[:, [1, 0, 1, 0]]


def scaled_sides(cfg: CfgNode, fingerprint: Fingerprint) -> np.ndarray:
    """Return the root of the area of each of :func:`scaled_boxes`, shape (M,)."""
    boxes = scaled_boxes(cfg, fingerprint)
    return np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(axis=1))


def anchor_overlaps(cfg: CfgNode, fingerprint: Fingerprint) -> Optional[np.ndarray]:
    """
    Compute the highest IoU that an anchor of a config has with each object, at the test scale.

    Args:
        cfg (CfgNode): the sizes of ``INPUT`` and the anchors are used.
        fingerprint (Fingerprint): the dataset.

    Returns:
        np.ndarray or None: shape (M,). None if :func:`anchor_strides` returns None.
    """
    strides = anchor_strides(cfg)
    if strides is None:
        return None
    node = cfg.MODEL.ANCHOR_GENERATOR
    generator = ANCHOR_GENERATORS[node.NAME](
        sizes=node.SIZES, aspect_ratios=node.ASPECT_RATIOS, strides=strides, offset=node.OFFSET
    )
    boxes = torch.from_numpy(scaled_boxes(cfg, fingerprint)).float()
    shapes = torch.from_numpy(resized(cfg, fingerprint.sizes)[fingerprint.images]).float()
    centers = Boxes(boxes).get_centers()  # x, y
    best = torch.zeros(len(boxes))
    for stride, cells in zip(strides, generator.cell_anchors):
        # Among anchors of one shape, the one with the nearest center has the highest IoU, because
        # the intersection falls with the distance along each axis.
        last = (shapes.flip(1) / stride).ceil() - 1
        place = (centers / stride - node.OFFSET).round().clamp(min=0).minimum(last)
        nearest = ((place + node.OFFSET) * stride).repeat(1, 2)
        for cell in cells:
            best = torch.maximum(best, matched_pairwise_iou(Boxes(nearest + cell), Boxes(boxes)))
    return best.numpy().astype(float)


def share_above(overlaps: np.ndarray, threshold: float = 0.5) -> float:
    """Return the share of overlaps that reach the threshold; NaN if there are none."""
    return float((overlaps >= threshold).mean()) if len(overlaps) else float("nan")


def anchor_recall(cfg: CfgNode, fingerprint: Fingerprint) -> Dict[str, float]:
    """
    Predict the recall of the proposals at an IoU of 0.5 from boxes and anchors alone.

    Returns:
        dict[str, float]: the share of objects that some anchor overlaps with an IoU of 0.5 or more,
        in the form of :func:`panet_d2.analysis.object_recall`: in percent of "all" objects and of
        COCO's "small", "medium" and "large" objects; NaN if there are none. Empty if
        :func:`anchor_strides` returns None.
    """
    overlaps, areas = anchor_overlaps(cfg, fingerprint), fingerprint.areas
    if overlaps is None:
        return {}
    small, large = 32**2, 96**2
    groups = {
        "all": areas >= 0,
        "small": areas < small,
        "medium": (areas >= small) & (areas < large),
        "large": areas >= large,
    }
    return {name: 100 * share_above(overlaps[group]) for name, group in groups.items()}
