"""RoIAlign of the same boxes on every level of a feature pyramid."""

from __future__ import annotations

import os
from typing import List, Optional, Sequence, Tuple

import torch
from torchvision.ops import roi_align

from .roi_align_cpu import roi_align_levels_cpu

__all__ = ["FUSIONS", "fuse_levels", "multilevel_roi_align", "multilevel_roi_align_reference"]

# How the grids of one proposal become one. PANet (Sec. 3.2) uses "max"; it names "sum" beside it.
FUSIONS = ("max", "sum", "mean", "product")


def fuse_levels(levels: Sequence[torch.Tensor], fusion: str) -> torch.Tensor:
    """
    Fuse tensors of one shape element by element.

    Args:
        levels (sequence[Tensor]): at least one tensor, all of the same shape.
        fusion (str): one of :data:`FUSIONS`.

    Returns:
        Tensor: of the shape of one of ``levels``.

    Raises:
        ValueError: for another ``fusion``.
    """
    if fusion not in ("max", "sum", "mean", "product"):  # FUSIONS; spelled out for TorchScript
        raise ValueError(f"fusion is {fusion!r}; it must be one of max, sum, mean, product.")
    fused = levels[0]
    for level in levels[1:]:
        # One level at a time: stacking them first would double the memory of what is pooled.
        if fusion == "max":
            fused = torch.maximum(fused, level)
        elif fusion == "product":
            fused = fused * level
        else:
            fused = fused + level
    if fusion == "mean":
        fused = fused / len(levels)
    return fused


def multilevel_roi_align(
    features: List[torch.Tensor],
    boxes: torch.Tensor,
    scales: List[float],
    output_size: Tuple[int, int],
    sampling_ratio: int,
    aligned: bool,
    fuse: Optional[str] = None,
) -> torch.Tensor:
    """
    Pool every box from every level, as PANet's adaptive feature pooling does (Sec. 3.2).

    Half precision and bfloat16 are pooled in float32 and rounded once at the end, and box
    coordinates are never rounded to the features' type, in which a coordinate beyond 2048 would
    not even keep its whole pixels.

    What computes it is chosen by device: on the CPU :func:`roi_align_levels_cpu`, elsewhere
    :func:`multilevel_roi_align_reference`. The environment variable ``PANET_D2_ROI_ALIGN`` set to
    ``reference`` chooses the latter everywhere.

    Args:
        features (list[Tensor]): L feature maps of shape (B, C, H_l, W_l), from the finest level
            to the coarsest, of one floating-point type.
        boxes (Tensor): shape (M, 5): index of the image in the batch, then x0, y0, x1, y1 in
            pixels of the input image.
        scales (list[float]): L factors from the input image to the level, i.e. 1 / stride.
        output_size (tuple[int, int]): height h and width w of the grid.
        sampling_ratio (int): samples along each side of a bin; 0 takes as many as the box covers
            pixels of the level.
        aligned (bool): shift the boxes by half a pixel, see :class:`detectron2.layers.ROIAlign`.
        fuse (str or None): how to fuse the levels, one of :data:`FUSIONS`.

    Returns:
        Tensor: of the type of the features; shape (L, M, C, h, w) where ``fuse`` is None, else
        (M, C, h, w).

    Raises:
        ValueError: for another ``fuse``.
    """
    dtype = features[0].dtype
    # Double stays double, for gradient checks.
    pooled_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    features = [feature.to(pooled_dtype) for feature in features]
    boxes = boxes.to(pooled_dtype)
    if _covered_by_cpu(features[0], sampling_ratio):
        pooled = roi_align_levels_cpu(features, boxes, scales, output_size, sampling_ratio, aligned)
        result = pooled if fuse is None else fuse_levels(pooled.unbind(0), fuse)
    else:
        result = multilevel_roi_align_reference(
            features, boxes, scales, output_size, sampling_ratio, aligned, fuse
        )
    return result.to(dtype)


def _covered_by_cpu(feature: torch.Tensor, sampling_ratio: int) -> bool:
    return (
        feature.device.type == "cpu"
        and sampling_ratio > 0  # an adaptive number of samples is not the same for all boxes
        and not torch.jit.is_tracing()  # exporters know torchvision's op
        and os.environ.get("PANET_D2_ROI_ALIGN") != "reference"
    )


def multilevel_roi_align_reference(
    features: List[torch.Tensor],
    boxes: torch.Tensor,
    scales: List[float],
    output_size: Tuple[int, int],
    sampling_ratio: int,
    aligned: bool,
    fuse: Optional[str] = None,
) -> torch.Tensor:
    """
    The definition of :func:`multilevel_roi_align`: torchvision's RoIAlign, level by level.

    Arguments and result are the same, except that features and boxes are of one type, float32 or
    float64.
    """
    pooled = [
        roi_align(feature, boxes, output_size, scale, sampling_ratio, aligned)
        for feature, scale in zip(features, scales)
    ]
    return torch.stack(pooled) if fuse is None else fuse_levels(pooled, fuse)
