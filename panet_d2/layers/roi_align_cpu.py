"""RoIAlign on the CPU, for many boxes and levels at once and on all cores."""

from __future__ import annotations

from typing import Iterator, List, Tuple

import torch
import torch.nn.functional as F


def roi_align_levels_cpu(
    features: List[torch.Tensor],
    boxes: torch.Tensor,
    scales: List[float],
    output_size: Tuple[int, int],
    sampling_ratio: int,
    aligned: bool,
) -> Iterator[torch.Tensor]:
    """
    Compute torchvision's RoIAlign of the same boxes on several feature maps, map by map.

    torchvision's CPU kernel runs on one core. Here, an embedding bag computes each bin as a
    weighted sum of the pixels around the bin's samples. Its forward and backward are vectorised and
    use all cores.

    Args:
        features (list[Tensor]): L feature maps of shape (B, C, H_l, W_l), float32 or float64.
            Channels-last maps are not copied.
        boxes (Tensor): shape (M, 5), of the same type: index in the batch, x0, y0, x1, y1.
        scales (list[float]): L factors from box coordinates to each feature map's.
        output_size (tuple[int, int]): height h and width w of the grid.
        sampling_ratio (int): samples along each side of a bin, at least 1.
        aligned (bool): shift the boxes by half a pixel.

    Yields:
        Tensor: shape (M, C, h, w) for each level, channels last in memory.
    """
    boxes = boxes.detach()  # as in torchvision, there are no gradients for boxes
    num_boxes, (height, width) = len(boxes), output_size
    channels, samples = features[0].shape[1], (2 * sampling_ratio) ** 2
    for feature, scale in zip(features, scales):
        index, weight = _samples(
            boxes, (feature.shape[2], feature.shape[3]), scale, output_size, sampling_ratio, aligned
        )
        # (B, C, H, W) -> one row of C values for each pixel
        table = feature.permute(0, 2, 3, 1).contiguous().view(-1, channels)
        bins = F.embedding_bag(
            index.view(-1, samples),
            table,
            per_sample_weights=weight.view(-1, samples),
            mode="sum",
        )
        yield bins.view(num_boxes, height, width, channels).permute(0, 3, 1, 2)


def _samples(
    boxes: torch.Tensor,
    size: Tuple[int, int],
    scale: float,
    output_size: Tuple[int, int],
    ratio: int,
    aligned: bool,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """
    Return the pixels of each bin, as rows of the table, and their weights. Both have the shape
    (M, h, w, 2 ratio, 2 ratio), because every sample lies between two rows and two columns.
    """
    x0, y0, x1, y1 = (boxes[:, 1:] * scale - (0.5 if aligned else 0.0)).unbind(dim=1)
    sides = [y1 - y0, x1 - x0]
    if not aligned:  # the old RoIAlign makes every box at least one pixel large
        sides = [side.clamp(min=1.0) for side in sides]
    (rows, row_weights), (columns, column_weights) = (
        _axis_samples(start, side / bins, bins, ratio, extent)
        for start, side, bins, extent in zip((y0, x0), sides, output_size, size)
    )
    image = boxes[:, 0].to(rows.dtype)[:, None, None]
    rows = (image * size[0] + rows) * size[1]
    index = rows[:, :, None, :, None] + columns[:, None, :, None, :]
    weight = row_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]
    return index, weight


def _axis_samples(
    start: torch.Tensor, bin_size: torch.Tensor, bins: int, ratio: int, extent: int
) -> Tuple[torch.Tensor, torch.Tensor]:
    """
    Return the neighbours of the samples along one axis and their weights, both of shape (M, bins,
    2 ratio). As in torchvision, a sample up to one pixel outside takes the border's value. A sample
    further out is zero.
    """
    # In torchvision's order of operations, so that positions are rounded the same way.
    of_bin = start[:, None] + torch.arange(bins, dtype=start.dtype) * bin_size[:, None]
    in_bin = (torch.arange(ratio, dtype=start.dtype) + 0.5) * bin_size[:, None] / ratio
    position = of_bin[:, :, None] + in_bin[:, None, :]
    counts = (position >= -1.0) & (position <= extent)
    # Also keeps NaN and infinity out of the indices.
    position = torch.where(counts, position, 0.0).clamp(min=0.0, max=extent - 1)
    low = position.floor()
    fraction = position - low
    # In this order: the quotient of a bool and an int would be rounded to single precision.
    weight = torch.stack([1.0 - fraction, fraction], dim=-1) * counts[..., None] / ratio
    high = (low + 1).clamp(max=extent - 1)
    neighbours = torch.stack([low, high], dim=-1).to(torch.int64)
    return neighbours.flatten(start_dim=2), weight.to(start.dtype).flatten(start_dim=2)
