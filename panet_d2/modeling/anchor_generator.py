"""The anchors of Detectron, for models that were trained with it."""

from __future__ import annotations

from typing import Any, List

import torch
from detectron2.config import configurable
from detectron2.modeling import ANCHOR_GENERATOR_REGISTRY
from detectron2.modeling.anchor_generator import BufferList, DefaultAnchorGenerator

from .._detectron2 import broadcast_params


@ANCHOR_GENERATOR_REGISTRY.register()
class DetectronAnchorGenerator(DefaultAnchorGenerator):
    """
    Anchors as in Detectron (``generate_anchors``), on which the authors' release builds. For each
    aspect ratio, width and height are rounded for an anchor whose size is the stride, and then
    scaled to the size: 48x24 pixels instead of 45.3x22.6 for size 32 and stride 4. With an
    ``OFFSET`` of 0.5 the centers are Detectron's, too.
    """

    @configurable
    def __init__(
        self,
        *,
        sizes: Any,
        aspect_ratios: Any,
        strides: List[int],
        offset: float = 0.5,
    ):
        """
        Args:
            sizes, aspect_ratios, strides, offset: see :class:`DefaultAnchorGenerator`.
        """
        super().__init__(sizes=sizes, aspect_ratios=aspect_ratios, strides=strides, offset=offset)
        sizes = broadcast_params(sizes, len(strides), "sizes")
        aspect_ratios = broadcast_params(aspect_ratios, len(strides), "aspect_ratios")
        cells = []
        for stride, of_level, ratios in zip(strides, sizes, aspect_ratios):
            corners = []
            for size in of_level:
                for ratio in ratios:
                    width = round(stride / ratio**0.5)
                    corner = torch.tensor([width, round(width * ratio)]) * (size / stride / 2)
                    corners.append(torch.cat([-corner, corner]))
            cells.append(torch.stack(corners))
        self.cell_anchors = BufferList(cells)


# Generators of upright anchors whose grid starts at OFFSET.
ANCHOR_GENERATORS = {c.__name__: c for c in (DefaultAnchorGenerator, DetectronAnchorGenerator)}
