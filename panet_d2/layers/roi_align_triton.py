"""RoIAlign on CUDA, for many boxes and all levels of a pyramid in one launch; in Triton."""

from __future__ import annotations

from typing import List, Optional, Sequence, Tuple

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from .roi_align_check import DTYPES

# The fusions in the kernels, by number. "product" is not among them, because its gradient needs the
# pooled grids of all levels: a fused kernel would save no memory.
TRITON_FUSIONS = {None: 0, "max": 1, "sum": 2, "mean": 3}

MAX_LEVELS = 8  # the levels that win a maximum are kept as the bits of one byte
MAX_SAMPLING_RATIO = 4  # the kernels unroll their loops over samples

# Bins times channels that a program works on at once: 8 values per thread, which are one load of
# 16 bytes in half precision. Twice as many would double the registers and halve the occupancy.
_TILE = 1024
_MAX_CHANNELS = 256
_NUM_WARPS = 4


@triton.jit
def _neighbours(first, bin_size, bin, sample, extent, RATIO: tl.constexpr):
    """
    Return the two pixels around a sample of each bin along one axis, and their weights. As in
    torchvision, a sample up to one pixel outside takes the border's value. A sample further out is
    zero.
    """
    position = first + bin * bin_size + (sample + 0.5) * bin_size / RATIO
    counts = (position >= -1.0) & (position <= extent)  # false for NaN
    position = tl.where(counts, position, 0.0)
    position = tl.minimum(tl.maximum(position, 0.0), extent - 1.0)
    low = position.to(tl.int32)
    high = tl.minimum(low + 1, extent - 1)
    fraction = position - low.to(tl.float32)
    return low, high, tl.where(counts, 1.0 - fraction, 0.0), tl.where(counts, fraction, 0.0)


@triton.jit
def _corner(y, x, width, channels, CORNER: tl.constexpr):
    """Return offset and weight of one of the four pixels around a sample."""
    at_y, y_weight = y[CORNER // 2], y[2 + CORNER // 2]
    at_x, x_weight = x[CORNER % 2], x[2 + CORNER % 2]
    return (at_y.to(tl.int64) * width + at_x) * channels, y_weight * x_weight


@triton.jit
def _axis(start, end, scale, bins, ALIGNED: tl.constexpr):
    """Return the start of a box along one axis of a level, and the size of the box's bins."""
    offset = 0.5 if ALIGNED else 0.0
    first = start * scale - offset
    side = end * scale - offset - first
    if not ALIGNED:  # the old RoIAlign makes every box at least one pixel large
        side = tl.maximum(side, 1.0)
    return first, side / bins


@triton.jit
def _tile(box_tile, boxes, bins_h, bins_w, channels, BINS: tl.constexpr, CHANNELS: tl.constexpr):
    """Return the box, bins and channels of a program. Tiles of one box are consecutive."""
    tiles = (bins_h * bins_w + BINS - 1) // BINS
    box = (box_tile // tiles).to(tl.int64)
    bin = (box_tile % tiles) * BINS + tl.arange(0, BINS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (bin < bins_h * bins_w)[:, None] & (channel < channels)[None, :]
    image = tl.load(boxes + box * 5).to(tl.int64)
    x0 = tl.load(boxes + box * 5 + 1)
    y0 = tl.load(boxes + box * 5 + 2)
    x1 = tl.load(boxes + box * 5 + 3)
    y1 = tl.load(boxes + box * 5 + 4)
    return box, bin, channel, inside, image, x0, y0, x1, y1


@triton.jit
def _forward_kernel(
    features,  # tuple of (B, H_l, W_l, C)
    heights,  # tuple of H_l, as floats
    widths,  # tuple of W_l, as floats
    scales,
    boxes,  # (M, 5), float32
    out,  # (M, bins, C), or (M, bins, L, C) without a fusion
    winners,  # (M, bins, C), bytes: bit l is set where level l has the maximum
    channels,
    bins_h,
    bins_w,
    LEVELS: tl.constexpr,
    RATIO: tl.constexpr,
    ALIGNED: tl.constexpr,
    FUSE: tl.constexpr,
    KEEP_WINNERS: tl.constexpr,
    BINS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    box, bin, channel, inside, image, x0, y0, x1, y1 = _tile(
        tl.program_id(0), boxes, bins_h, bins_w, channels, BINS, CHANNELS
    )
    row, column = (bin // bins_w).to(tl.float32), (bin % bins_w).to(tl.float32)
    of_bin = box * bins_h * bins_w + bin
    fused = tl.zeros((BINS, CHANNELS), tl.float32)
    bits = tl.zeros((BINS, CHANNELS), tl.int32)
    for level in tl.static_range(LEVELS):
        height = tl.cast(heights[level], tl.int32)
        width = tl.cast(widths[level], tl.int32)
        first_y, bin_h = _axis(y0, y1, scales[level], bins_h, ALIGNED)
        first_x, bin_w = _axis(x0, x1, scales[level], bins_w, ALIGNED)
        pixels = features[level] + image * height * width * channels
        pooled = tl.zeros((BINS, CHANNELS), tl.float32)
        for iy in tl.static_range(RATIO):
            y = _neighbours(first_y, bin_h, row, iy, height, RATIO)
            for ix in tl.static_range(RATIO):
                x = _neighbours(first_x, bin_w, column, ix, width, RATIO)
                for corner in tl.static_range(4):
                    pixel, weight = _corner(y, x, width, channels, corner)
                    value = tl.load(
                        pixels + pixel[:, None] + channel[None, :], mask=inside, other=0.0
                    )
                    pooled += weight[:, None] * value.to(tl.float32)
        pooled = pooled / (RATIO * RATIO)
        if FUSE == 0:
            at = (of_bin * LEVELS + level) * channels
            tl.store(
                out + at[:, None] + channel[None, :],
                pooled.to(out.dtype.element_ty),
                mask=inside,
            )
        elif FUSE == 1:
            if level == 0:
                fused = pooled
                bits += 1
            else:
                # NaN wins, as in torch.maximum.
                wins = (pooled > fused) | (pooled != pooled)
                bits = tl.where(
                    wins, 1 << level, tl.where(pooled == fused, bits | (1 << level), bits)
                )
                fused = tl.where(wins, pooled, fused)
        else:
            fused += pooled
    if FUSE != 0:
        if FUSE == 3:
            fused = fused / LEVELS
        at = (of_bin * channels)[:, None] + channel[None, :]
        tl.store(out + at, fused.to(out.dtype.element_ty), mask=inside)
        if KEEP_WINNERS:
            tl.store(winners + at, bits.to(tl.uint8), mask=inside)


# Triton would compile an argument of 1 as a constant.
@triton.jit(do_not_specialize=["channel_step"])
def _backward_kernel(
    gradients,  # tuple of (B, H_l, W_l, C), float32, zero at first
    heights,
    widths,
    scales,
    boxes,
    upstream,  # of the shape of the forward kernel's out
    winners,
    channel_step,  # 1; see the atomics
    channels,
    bins_h,
    bins_w,
    LEVELS: tl.constexpr,
    RATIO: tl.constexpr,
    ALIGNED: tl.constexpr,
    FUSE: tl.constexpr,
    BINS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    box, bin, channel, inside, image, x0, y0, x1, y1 = _tile(
        tl.program_id(0), boxes, bins_h, bins_w, channels, BINS, CHANNELS
    )
    row, column = (bin // bins_w).to(tl.float32), (bin % bins_w).to(tl.float32)
    of_bin = box * bins_h * bins_w + bin
    at = (of_bin * channels)[:, None] + channel[None, :]
    bits = tl.zeros((BINS, CHANNELS), tl.int32)
    gradient = tl.zeros((BINS, CHANNELS), tl.float32)
    if FUSE != 0:
        gradient = tl.load(upstream + at, mask=inside, other=0.0).to(tl.float32)
        if FUSE == 1:
            bits = tl.load(winners + at, mask=inside, other=0).to(tl.int32)
        elif FUSE == 3:
            gradient = gradient / LEVELS
    # A warp should add to neighbouring channels, and not each thread to a run of channels. For
    # this, the compiler must not know that the channels are neighbours.
    target = channel * channel_step
    # From the last level to the first, as in the backward of a chain of torch.maximum: for equal
    # levels, each maximum gives half of its gradient to either input.
    for level in tl.static_range(LEVELS - 1, -1, -1):
        share = gradient
        if FUSE == 0:
            at_level = (of_bin * LEVELS + level) * channels
            share = tl.load(
                upstream + at_level[:, None] + channel[None, :], mask=inside, other=0.0
            ).to(tl.float32)
        elif FUSE == 1:
            wins = (bits >> level) & 1 != 0
            tied = bits & ((1 << level) - 1) != 0
            share = tl.where(wins, tl.where(tied, 0.5 * gradient, gradient), 0.0)
            gradient -= share
        share = share / (RATIO * RATIO)
        reached = inside & (share != 0.0)
        height = tl.cast(heights[level], tl.int32)
        width = tl.cast(widths[level], tl.int32)
        first_y, bin_h = _axis(y0, y1, scales[level], bins_h, ALIGNED)
        first_x, bin_w = _axis(x0, x1, scales[level], bins_w, ALIGNED)
        pixels = gradients[level] + image * height * width * channels
        for iy in range(RATIO):
            y = _neighbours(first_y, bin_h, row, iy, height, RATIO)
            for ix in tl.static_range(RATIO):
                x = _neighbours(first_x, bin_w, column, ix, width, RATIO)
                for corner in tl.static_range(4):
                    pixel, weight = _corner(y, x, width, channels, corner)
                    tl.atomic_add(
                        pixels + pixel[:, None] + target[None, :],
                        weight[:, None] * share,
                        mask=reached & (weight != 0.0)[:, None],
                        sem="relaxed",
                    )


class _RoIAlignLevels(torch.autograd.Function):
    """Both kernels. Each feature map is an argument, because autograd sees only arguments."""

    @staticmethod
    def forward(ctx, boxes, scales, output_size, ratio, aligned, fuse, *features):
        dtype, (_, channels, _, _) = features[0].dtype, features[0].shape
        # (B, H, W, C) in memory; channels-last features are not copied.
        maps = tuple(f.permute(0, 2, 3, 1).contiguous() for f in features)
        boxes = boxes.to(torch.float32).contiguous()
        ctx.shapes = [tuple(m.shape) for m in maps]
        ctx.scales, ctx.output_size = tuple(scales), tuple(output_size)
        ctx.ratio, ctx.aligned, ctx.fuse, ctx.dtype = ratio, aligned, fuse, dtype
        shape = (len(boxes), *output_size, channels)
        if fuse is None:
            shape = (*shape[:3], len(maps), channels)
        out = maps[0].new_empty(shape)
        keep_winners = fuse == "max" and any(ctx.needs_input_grad)
        winners = maps[0].new_empty(shape if keep_winners else (1,), dtype=torch.uint8)
        if len(boxes):
            grid, block = _launch(len(boxes), channels, output_size)
            _forward_kernel[grid](
                maps,
                *_sizes(ctx.shapes),
                ctx.scales,
                boxes,
                out,
                winners,
                channels,
                *output_size,
                LEVELS=len(maps),
                RATIO=ratio,
                ALIGNED=aligned,
                FUSE=TRITON_FUSIONS[fuse],
                KEEP_WINNERS=keep_winners,
                **block,
            )
        ctx.save_for_backward(boxes, winners)
        if fuse is None:
            return out.permute(3, 0, 4, 1, 2)  # (L, M, C, h, w)
        return out.permute(0, 3, 1, 2)  # (M, C, h, w)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        boxes, winners = ctx.saved_tensors
        back = (1, 3, 4, 0, 2) if ctx.fuse is None else (0, 2, 3, 1)
        upstream = upstream.permute(back).contiguous()
        # float32 for all types of features, because the sums have up to thousands of terms.
        gradients = tuple(
            torch.zeros(shape, dtype=torch.float32, device=upstream.device) for shape in ctx.shapes
        )
        channels = ctx.shapes[0][-1]
        if len(boxes):
            grid, block = _launch(len(boxes), channels, ctx.output_size)
            with torch.cuda.device_of(boxes):
                _backward_kernel[grid](
                    gradients,
                    *_sizes(ctx.shapes),
                    ctx.scales,
                    boxes,
                    upstream,
                    winners,
                    1,
                    channels,
                    *ctx.output_size,
                    LEVELS=len(gradients),
                    RATIO=ctx.ratio,
                    ALIGNED=ctx.aligned,
                    FUSE=TRITON_FUSIONS[ctx.fuse],
                    **block,
                )
        results = [g.permute(0, 3, 1, 2).to(ctx.dtype) for g in gradients]
        return (None, None, None, None, None, None, *results)


def covers(features: List[torch.Tensor], sampling_ratio: int) -> bool:
    """
    Whether :func:`roi_align_levels_triton` supports these feature maps.

    Args:
        features (list[Tensor]): feature maps on a CUDA device.
        sampling_ratio (int): samples along each side of a bin.
    """
    return (
        len(features) <= MAX_LEVELS
        and 1 <= sampling_ratio <= MAX_SAMPLING_RATIO
        and {f.dtype for f in features} <= {features[0].dtype}
        and features[0].dtype in DTYPES
    )


def _sizes(shapes: Sequence[Tuple[int, ...]]) -> Tuple[Tuple[float, ...], Tuple[float, ...]]:
    """
    Return heights and widths of maps of shape (B, H, W, C). They are floats, because Triton
    compiles again for integers that are multiples of 16, and so for almost every image size.
    """
    return tuple(float(s[1]) for s in shapes), tuple(float(s[2]) for s in shapes)


def _launch(num_boxes: int, channels: int, output_size: Tuple[int, int]) -> Tuple[tuple, dict]:
    """Return the grid of a launch, and the sizes of a program's tile."""
    block_channels = min(_MAX_CHANNELS, triton.next_power_of_2(channels))
    num_bins = output_size[0] * output_size[1]
    block_bins = min(max(1, _TILE // block_channels), triton.next_power_of_2(num_bins))
    grid = (num_boxes * triton.cdiv(num_bins, block_bins), triton.cdiv(channels, block_channels))
    return grid, {"BINS": block_bins, "CHANNELS": block_channels, "num_warps": _NUM_WARPS}


def roi_align_levels_triton(
    features: List[torch.Tensor],
    boxes: torch.Tensor,
    scales: List[float],
    output_size: Tuple[int, int],
    sampling_ratio: int,
    aligned: bool,
    fuse: Optional[str] = None,
) -> torch.Tensor:
    """
    Compute torchvision's RoIAlign of the same boxes on several feature maps, and fuse the results.

    All arithmetic is in float32. A fusion does not store the grids of single levels. The backward
    of "max" needs one byte per element of the result.

    Args:
        features (list[Tensor]): at most :data:`MAX_LEVELS` maps of shape (B, C, H_l, W_l), all
            float32, float16 or bfloat16. Channels-last maps are not copied.
        boxes (Tensor): shape (M, 5): index in the batch, x0, y0, x1, y1.
        scales (list[float]): factors from box coordinates to each feature map's.
        output_size (tuple[int, int]): height h and width w of the grid.
        sampling_ratio (int): samples along each side of a bin, 1 to :data:`MAX_SAMPLING_RATIO`.
        aligned (bool): shift the boxes by half a pixel.
        fuse (str or None): a key of :data:`TRITON_FUSIONS`.

    Returns:
        Tensor: of the type of the features, channels last in memory; shape (L, M, C, h, w) if
        ``fuse`` is None, else (M, C, h, w).
    """
    # Triton launches on the current device, which can differ from the tensors' device.
    with torch.cuda.device_of(boxes):
        return _RoIAlignLevels.apply(
            boxes.detach(), scales, output_size, sampling_ratio, aligned, fuse, *features
        )
