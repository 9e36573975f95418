"""Adaptation layers that are copies of one layer, set so that their fusion gives its output."""

from __future__ import annotations

from typing import Any, Collection, Dict, Iterable, List, Optional, Tuple, Union

import torch
from detectron2.modeling import FPN, GeneralizedRCNN
from detectron2.structures import Boxes
from torch import nn
from tqdm import tqdm

from ..layers import LevelwiseConv2d, LevelwiseLinear
from ..modeling import PAFPN, AdaptiveROIPooler, adaptive_poolers

__all__ = ["calibrate"]

_PROPOSALS = 64  # of each image, those of the highest objectness: mostly objects
_PIXELS = 8  # of each grid; its pixels have much in common
_STEPS, _ROWS, _LEARNING_RATE = 400, 2048, 0.02


def calibrate(
    model: GeneralizedRCNN,
    inputs: Iterable[List[dict]],
    names: Optional[Collection[str]] = None,
) -> Dict[str, float]:
    """
    Scale and shift the output channels of every level's adaptation layer so that what comes out
    of the fusion is as near as can be to what the layer gives for the one level that FPN's rule
    picks for a proposal.

    A warm-started PANet has the donor's first layer in every level, but the donor has only ever
    seen the level of that rule: the maximum over four levels is larger than what the layers
    behind it know, and so are its masks. The scales and shifts of each level and channel are
    fitted to proposals of real images, by least squares.

    Args:
        model (GeneralizedRCNN): a PANet with adaptation layers that are copies of one; changed in
            place.
        inputs (iterable[list[dict]]): batches of images as the model takes them for inference.
        names (collection[str] or None): the poolers whose layers are such copies, as "mask_pooler";
            None for all that have adaptation layers.

    Returns:
        dict[str, float]: for each of these poolers, by its name, the squared error of
        the fused output that is left, as a share of the variance.
    """
    poolers = adaptive_poolers(model.roi_heads)
    if names is not None:
        poolers = {name: pooler for name, pooler in poolers.items() if name in names}
    rows: Dict[str, List[Tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name in poolers}
    training = model.training
    model.eval()
    for batch in tqdm(inputs, desc="calibration", unit="image"):
        with torch.no_grad():
            images = model.preprocess_image(batch)
            features = model.backbone(images.tensor)
            # What the donor's heads see: the pyramid without the bottom-up path.
            donors = features
            if isinstance(model.backbone, PAFPN):
                donors = FPN.forward(model.backbone, images.tensor)
            proposals, _ = model.proposal_generator(images, features)
            boxes = [p.proposal_boxes[:_PROPOSALS] for p in proposals]
            maps, donors = ([x[f] for f in model.roi_heads.in_features] for x in (features, donors))
            for name, pooler in poolers.items():
                rows[name].append(_rows(pooler, maps, donors, boxes))
    model.train(training)

    errors = {}
    for name, pooler in poolers.items():
        levels = torch.cat([levels for levels, _ in rows[name]], dim=1)
        expected = torch.cat([expected for _, expected in rows[name]])
        scale, shift, errors[name] = _fit(pooler, levels, expected)
        _scale_outputs(pooler.adaptation_layers, scale.flatten(), shift.flatten())
    return errors


def _rows(
    pooler: AdaptiveROIPooler,
    maps: List[torch.Tensor],
    donors: List[torch.Tensor],
    boxes: List[Boxes],
) -> Tuple[torch.Tensor, torch.Tensor]:
    """What the layers give for some pixels, (L, N, D), and what the donor's gave, (N, D)."""
    home = pooler.fpn_levels(boxes)
    levels, expected = (pooler.adapt(pooler.pool_levels(x, boxes)) for x in (maps, donors))
    index = home.view(1, -1, *[1] * (expected.dim() - 2)).expand(1, *expected.shape[1:])
    expected = expected.gather(0, index).relu()
    if levels.dim() == 5:
        pixels = torch.randperm(levels[0, 0, 0].numel(), device=levels.device)[:_PIXELS]
        levels, expected = (
            x.flatten(3)[..., pixels].transpose(2, 3).flatten(1, 2) for x in (levels, expected)
        )
    return levels, expected[0]


def _fit(
    pooler: AdaptiveROIPooler, levels: torch.Tensor, expected: torch.Tensor
) -> Tuple[torch.Tensor, torch.Tensor, float]:
    """Scale and shift, (L, D), that bring the fused levels near to ``expected``, and the error."""
    spread = expected.std(dim=0)
    spread = spread.clamp(min=1e-2 * spread.mean().item() + 1e-12)  # some channels never speak
    # Starting from equal levels, so that which of them counts is found and not given.
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
    """Multiply the outputs by ``scale`` and add ``shift``, by the last parameters on the way."""
    last: Any = layers if layers.norm is None else layers.norm
    parts: List[Any] = list(last) if isinstance(last, nn.ModuleList) else [last]
    for part, a, b in zip(parts, scale.chunk(len(parts)), shift.chunk(len(parts))):
        part.weight.mul_(a.view(-1, *[1] * (part.weight.dim() - 1)))
        part.bias.mul_(a).add_(b)
