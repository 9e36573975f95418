"""Calibration of adaptation layers that a warm start has copied from one layer."""

from __future__ import annotations

from typing import Any, Collection, Dict, Iterable, List, Optional, Tuple, Union

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Boxes
from torch import nn
from tqdm import tqdm

from ..layers import LevelwiseConv2d, LevelwiseLinear
from ..modeling import PAFPN, AdaptiveROIPooler, adaptive_poolers

_PROPOSALS = 64  # per image, those with the highest objectness: mostly objects
_PIXELS = 8  # per grid, because the pixels of one grid are similar
_STEPS, _ROWS, _LEARNING_RATE = 400, 2048, 0.02


def calibrate(
    model: GeneralizedRCNN,
    inputs: Iterable[List[dict]],
    names: Optional[Collection[str]] = None,
) -> Dict[str, float]:
    """
    Fit one scale and one shift per level and output channel of the adaptation layers.

    A warm start copies the first layer of a Mask R-CNN's head (the donor's layer) into every level.
    The next layers were trained with the output for one level, but the maximum over all levels is
    larger. The fit is by least squares on proposals of real images. The target is the output of the
    donor's layer for the level that FPN's rule assigns to each proposal.

    Args:
        model (GeneralizedRCNN): a PANet after :func:`warm_start`. Changed in place.
        inputs (iterable[list[dict]]): batches of images in the model's format for inference.
        names (collection[str] or None): the poolers to calibrate, such as "mask_pooler". None
            means all poolers with adaptation layers.

    Returns:
        dict[str, float]: for each pooler, the remaining squared error of the fused output, as a
        share of the target's variance.
    """
    poolers = adaptive_poolers(model.roi_heads)
    if names is not None:
        poolers = {name: pooler for name, pooler in poolers.items() if name in names}
    rows: Dict[str, List[torch.Tensor]] = {name: [] for name in poolers}
    training = model.training
    model.eval()
    for batch in tqdm(inputs, desc="calibration", unit="image"):
        with torch.no_grad():
            images = model.preprocess_image(batch)
            features = model.backbone(images.tensor)
            # The donor's heads read FPN's levels, before the bottom-up path.
            fpn = features
            if isinstance(model.backbone, PAFPN):
                fpn = model.backbone.top_down(model.backbone.bottom_up(images.tensor))
            proposals, _ = model.proposal_generator(images, features)
            boxes = [p.proposal_boxes[:_PROPOSALS] for p in proposals]
            ours, donors = ([x[f] for f in model.roi_heads.in_features] for x in (features, fpn))
            for name, pooler in poolers.items():
                rows[name].append(_rows(pooler, ours, donors, boxes))
    model.train(training)

    errors = {}
    for name, pooler in poolers.items():
        joined = torch.cat(rows[name], dim=1)
        scale, shift, errors[name] = _fit(pooler, joined[:-1], joined[-1])
        assert pooler.adaptation_layers is not None
        _scale_outputs(pooler.adaptation_layers, scale.flatten(), shift.flatten())
    return errors


def _rows(
    pooler: AdaptiveROIPooler,
    ours: List[torch.Tensor],
    donors: List[torch.Tensor],
    boxes: List[Boxes],
) -> torch.Tensor:
    """Return outputs of the levels' layers, then the target, at some pixels: (L + 1, N, D)."""
    levels, expected = (pooler.adapt(pooler.pool_levels(x, boxes)) for x in (ours, donors))
    home = pooler.fpn_levels(boxes)
    expected = expected[home, torch.arange(len(home), device=home.device)].relu()
    rows = torch.cat([levels, expected[None]])
    if rows.dim() == 5:
        rows = rows.flatten(3).transpose(2, 3)
        pixels = torch.randperm(rows.shape[2], device=rows.device)[:_PIXELS]
        rows = rows[:, :, pixels].flatten(1, 2)
    return rows


def _fit(
    pooler: AdaptiveROIPooler, levels: torch.Tensor, expected: torch.Tensor
) -> Tuple[torch.Tensor, torch.Tensor, float]:
    """Return scale and shift, (L, D), that fit the fused levels to ``expected``, and the error."""
    spread = expected.std(dim=0)
    spread = spread.clamp(min=1e-2 * spread.mean().item() + 1e-12)  # some channels are never active
    # All levels start equal, so that the fit finds out which of them matter.
    scale = torch.ones_like(levels[:, 0]).requires_grad_()
    shift = torch.zeros_like(scale).requires_grad_()
    optimizer = torch.optim.Adam([scale, shift], lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)

    def error(rows: torch.Tensor) -> torch.Tensor:
        moved = levels[:, rows] * scale[:, None] + (shift * spread)[:, None]
        return ((pooler.fuse(moved) - expected[rows]) / spread).square().mean()

    for _ in range(_STEPS):
        rows = torch.randint(len(expected), (_ROWS,), device=expected.device)
        optimizer.zero_grad()
        error(rows).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        chunks = torch.arange(len(expected), device=expected.device).split(_ROWS)
        left = sum(error(rows).item() * len(rows) for rows in chunks) / len(expected)
    return scale.detach(), (shift * spread).detach(), left


@torch.no_grad()
def _scale_outputs(
    layers: Union[LevelwiseConv2d, LevelwiseLinear], scale: torch.Tensor, shift: torch.Tensor
) -> None:
    """Scale and shift the layers' outputs by changing their last parameters."""
    last: Any = layers if layers.norm is None else layers.norm
    parts: List[Any] = list(last) if isinstance(last, nn.ModuleList) else [last]
    for part, a, b in zip(parts, scale.chunk(len(parts)), shift.chunk(len(parts))):
        part.weight.mul_(a.view(-1, *[1] * (part.weight.dim() - 1)))
        part.bias.mul_(a).add_(b)
