"""Benchmark of the multi-level RoIAlign and of torchvision's RoIAlign, called for each level."""

from __future__ import annotations

from statistics import median
from typing import Callable, Dict, List, Optional, Tuple

import torch

from panet_d2.layers import multilevel_roi_align
from panet_d2.layers.multilevel_roi_align import multilevel_roi_align_reference

from .timing import interleaved, peak_memory

__all__ = ["benchmark_op"]

_SCALES = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
_IMAGE = (800, 1344)  # 1333 as Detectron2 pads it


def _torchvision(features, boxes, *args) -> torch.Tensor:
    """One call for each level, a stack and the fusion."""
    *args, fuse = args
    pooled = multilevel_roi_align_reference(features, boxes, *args)
    if fuse is None:
        return pooled
    if fuse == "max":
        return pooled.amax(dim=0)
    return pooled.sum(dim=0) if fuse == "sum" else pooled.mean(dim=0)


def _inputs(num_boxes: int, dtype: torch.dtype, device: str):
    generator = torch.Generator().manual_seed(0)
    features = []
    for scale in _SCALES:
        size = (1, 256, int(_IMAGE[0] * scale), int(_IMAGE[1] * scale))
        feature = torch.randn(size, generator=generator).to(device, dtype)
        features.append(feature.to(memory_format=torch.channels_last))
    height, width = _IMAGE
    corner = torch.rand(num_boxes, 2, generator=generator) * torch.tensor([width, height]) * 0.8
    # Sides from 16 to 512 pixels, uniform in their logarithm.
    size = 16 * 2 ** (5 * torch.rand(num_boxes, 2, generator=generator))
    boxes = torch.cat([torch.zeros(num_boxes, 1), corner, corner + size], dim=1)
    return features, boxes.to(device)


def benchmark_op(
    boxes: List[int],
    fusions: List[Optional[str]],
    dtype: torch.dtype,
    device: str,
    repeats: int,
    report: Callable[[str], object] = print,
) -> List[Dict]:
    """
    Time this package's RoIAlign and torchvision's, forward and backward, in turn.

    torchvision gets contiguous feature maps, this package channels-last ones: what is fastest for
    each.

    Args:
        boxes (list[int]): numbers of boxes.
        fusions (list[str or None]): fusions.
        dtype, device: of the features, which have 256 channels on four levels of an 800 x 1344
            image.
        repeats (int): number of rounds. The result is their median.
        report (callable): called with a line of text for each result.

    Returns:
        list[dict]: milliseconds and bytes of both, for each number of boxes and fusion.
    """
    rows = []
    for num_boxes in boxes:
        features, rois = _inputs(num_boxes, dtype, device)
        contiguous = [f.contiguous() for f in features]
        for fuse in fusions:
            args = (rois.to(dtype), _SCALES, (7, 7), 2, True, fuse)
            ours = _passes(multilevel_roi_align, features, (rois, *args[1:]))
            theirs = _passes(_torchvision, contiguous, args)
            times = interleaved(
                {
                    "forward": ours[0],
                    "forward torchvision": theirs[0],
                    "backward": ours[1],
                    "backward torchvision": theirs[1],
                },
                device,
                repeats,
            )
            row: Dict = {"boxes": num_boxes, "fusion": fuse}
            row["milliseconds"] = {name: 1e3 * median(t) for name, t in times.items()}
            row["bytes"] = {
                "forward": peak_memory(ours[0], device),
                "forward torchvision": peak_memory(theirs[0], device),
            }
            rows.append(row)
            report(f"{num_boxes} boxes, fusion {fuse}: {row['milliseconds']}")
    return rows


def _passes(op: Callable, features: List[torch.Tensor], args: tuple) -> Tuple[Callable, Callable]:
    """Functions that run the forward without gradients, and the backward alone."""
    leaves = [f.detach().requires_grad_() for f in features]
    out = op(leaves, *args)
    upstream = torch.ones_like(out)

    @torch.no_grad()
    def forward():
        op(features, *args)

    def backward():
        torch.autograd.grad(out, leaves, upstream, retain_graph=True)

    return forward, backward
