"""RoIAlign of the same boxes on every level of a feature pyramid."""

from __future__ import annotations

import os
import sys
from typing import Iterable, List, Optional, Tuple

import torch
from torchvision.ops import roi_align

from ..errors import ConfigError, ExportError
from .roi_align_cpu import roi_align_levels_cpu

# Element-wise fusions of a proposal's grids. PANet (Sec. 3.2) uses "max" and also names "sum".
FUSIONS = ("max", "sum", "mean", "product")
# The first ONNX opset whose RoIAlign can shift boxes by half a pixel, as ROIAlignV2 does.
ONNX_OPSET = 16
# Values of the environment variable PANET_D2_ROI_ALIGN.
CHOICES = ("auto", "triton", "reference")

# torch 2.1 has no torch.compiler.is_compiling.
_is_compiling = getattr(torch.compiler, "is_compiling", torch.jit.is_tracing)


def fuse_levels(levels: Iterable[torch.Tensor], fusion: str) -> torch.Tensor:
    """
    Fuse tensors of one shape element by element.

    Args:
        levels (iterable[Tensor]): at least one, all of the same shape.
        fusion (str): one of :data:`FUSIONS`.

    Returns:
        Tensor: of the same shape.

    Raises:
        ValueError: if ``fusion`` is unknown.
    """
    if fusion not in FUSIONS:
        raise ValueError(f"fusion is {fusion!r}; it must be one of {', '.join(FUSIONS)}.")
    levels = iter(levels)
    fused, count = next(levels), 1
    # One level at a time: a stack would double the memory of the pooled grids.
    for level in levels:
        count += 1
        if fusion == "max":
            fused = torch.maximum(fused, level)
        elif fusion == "product":
            fused = fused * level
        else:
            fused = fused + level
    return fused / count if fusion == "mean" else fused


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
    Pool every box from every level, as in PANet's adaptive feature pooling (Sec. 3.2).

    float16 and bfloat16 features are pooled in float32 and rounded once, at the end. Box
    coordinates are never rounded to these types: above 2048 they would lose whole pixels.

    The device selects the implementation: :func:`roi_align_levels_triton` on CUDA,
    :func:`roi_align_levels_cpu` on the CPU, else :func:`multilevel_roi_align_reference`. The
    environment variable ``PANET_D2_ROI_ALIGN`` changes the selection:

    - ``auto`` (default): the Triton kernels are checked at their first use. The reference replaces
      kernels that fail.
    - ``triton``: the Triton kernels are not checked, and their errors are raised.
    - ``reference``: the reference is used on every device.

    On CUDA, the gradient is summed in no fixed order, as in torchvision.
    :func:`torch.use_deterministic_algorithms` selects torchvision's deterministic gradient.

    Args:
        features (list[Tensor]): L feature maps of shape (B, C, H_l, W_l), from fine to coarse, of
            one floating-point type.
        boxes (Tensor): shape (M, 5): index of the image in the batch, then x0, y0, x1, y1 in
            pixels of the input image.
        scales (list[float]): 1 / stride of each level.
        output_size (tuple[int, int]): height h and width w of the grid.
        sampling_ratio (int): samples along each side of a bin; 0 for one sample per pixel of the
            level.
        aligned (bool): shift the boxes by half a pixel, see :class:`detectron2.layers.ROIAlign`.
        fuse (str or None): how to fuse the levels, one of :data:`FUSIONS`.

    Returns:
        Tensor: of the type of the features; shape (L, M, C, h, w) if ``fuse`` is None, else
        (M, C, h, w). Channels are last in memory, except from the reference.

    Raises:
        ValueError: if ``fuse`` is unknown.
        ConfigError: if the value of ``PANET_D2_ROI_ALIGN`` is unknown.
        ExportError: during an export to an ONNX opset whose RoIAlign gives other results.
    """
    if aligned and torch.onnx.is_in_onnx_export():
        _check_opset()
    dtype = features[0].dtype
    chosen = implementation(features, sampling_ratio, output_size, aligned, fuse)
    if chosen == "triton":
        from .roi_align_triton import TRITON_FUSIONS, roi_align_levels_triton

        in_kernel = fuse if fuse in TRITON_FUSIONS else None
        result = roi_align_levels_triton(
            features, boxes, scales, output_size, sampling_ratio, aligned, in_kernel
        )
        return fuse_levels(result.unbind(), fuse) if fuse and not in_kernel else result

    # float64 is kept for gradient checks.
    pooled_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    args = (scales, output_size, sampling_ratio, aligned)
    features, boxes = [f.to(pooled_dtype) for f in features], boxes.to(pooled_dtype)
    if chosen == "reference":
        result = multilevel_roi_align_reference(features, boxes, *args, fuse)
    else:
        levels = roi_align_levels_cpu(features, boxes, *args)
        if fuse is None:
            grids = torch.stack([level.permute(0, 2, 3, 1) for level in levels], dim=3)
            result = grids.permute(3, 0, 4, 1, 2)
        else:
            result = fuse_levels(levels, fuse)
    return result.to(dtype)


def _check_opset() -> None:
    from torch.onnx import symbolic_helper

    # The module of the exporter's GLOBALS differs between versions of torch.
    module = sys.modules[symbolic_helper.parse_args.__module__]
    opset = vars(module)["GLOBALS"].export_onnx_opset_version
    if opset < ONNX_OPSET:
        raise ExportError(
            f"ONNX opset {opset} has no RoIAlign for POOLER_TYPE ROIAlignV2, so the exported model "
            f"would give other results; export with opset {ONNX_OPSET}, as tools/export_model.py "
            "of panet_d2 does."
        )


def roi_align_choice() -> str:
    """
    Return the environment variable ``PANET_D2_ROI_ALIGN``, one of :data:`CHOICES`.

    Raises:
        ConfigError: if the value is unknown.
    """
    choice = os.environ.get("PANET_D2_ROI_ALIGN") or "auto"
    if choice not in CHOICES:
        raise ConfigError(
            f"the environment variable PANET_D2_ROI_ALIGN is {choice!r}; it must be one of "
            f"{', '.join(CHOICES)}."
        )
    return choice


def implementation(
    features: List[torch.Tensor],
    sampling_ratio: int,
    output_size: Optional[Tuple[int, int]] = None,
    aligned: bool = True,
    fuse: Optional[str] = None,
) -> str:
    """
    Choose the implementation for these features: "triton", "cpu" or "reference".

    On a CUDA device, the first call checks the kernels, see
    :func:`panet_d2.layers.roi_align_check.triton_failure`. With an ``output_size``, the kernels of
    this use are checked too.

    Args:
        features, sampling_ratio, output_size, aligned, fuse: see :func:`multilevel_roi_align`.

    Raises:
        ConfigError: see :func:`roi_align_choice`.
    """
    choice = roi_align_choice()
    if (
        choice == "reference"
        or sampling_ratio <= 0  # the number of samples differs from box to box
        or torch.jit.is_tracing()  # exporters know torchvision's op
    ):
        return "reference"
    device, dtype = features[0].device, features[0].dtype
    if not _for_triton(device):
        return "cpu" if device.type == "cpu" else "reference"
    from .roi_align_check import DTYPES, Use, triton_failure

    if dtype not in DTYPES or torch.are_deterministic_algorithms_enabled() or _is_compiling():
        return "reference"
    if choice == "auto" and triton_failure(device, dtype):
        return "reference"
    from .roi_align_triton import TRITON_FUSIONS, covers

    if not covers(features, sampling_ratio):
        return "reference"
    if choice == "auto" and output_size is not None:
        fused = fuse if fuse in TRITON_FUSIONS else None
        size, channels = (output_size[0], output_size[1]), features[0].shape[1]
        use = Use(len(features), channels, size, sampling_ratio, aligned, fused)
        backward = torch.is_grad_enabled() and any(f.requires_grad for f in features)
        if triton_failure(device, dtype, use, backward):
            return "reference"
    return "triton"


def _for_triton(device: torch.device) -> bool:
    return device.type == "cuda"


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
    Reference for :func:`multilevel_roi_align`: torchvision's RoIAlign, level by level. Features and
    boxes must have the same type, float32 or float64.
    """
    pooled = [
        roi_align(feature, boxes, output_size, scale, sampling_ratio, aligned)
        for feature, scale in zip(features, scales)
    ]
    return torch.stack(pooled) if fuse is None else fuse_levels(pooled, fuse)
