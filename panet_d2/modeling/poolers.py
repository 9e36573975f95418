"""Adaptive feature pooling: a ROIPooler that pools every proposal from every level."""

from __future__ import annotations

import math
from typing import Dict, List, Optional, Sequence, Union

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.poolers import (
    ROIPooler,
    assign_boxes_to_levels,
    convert_boxes_to_pooler_format,
)
from detectron2.structures import Boxes
from torch import nn

from ..config import read_choice
from ..errors import ConfigError
from ..layers import (
    FUSIONS,
    LevelwiseConv2d,
    LevelwiseLinear,
    fuse_levels,
    multilevel_roi_align,
    roi_align_choice,
)
from .check_model import warn_once

ADAPTATIONS = ("conv", "fc", "none")
POOLER_TYPES = ("ROIAlignV2", "ROIAlign", "ROIPool", "ROIAlignRotated")

# Config key for the width of the head's layer that the adaptation layer replaces. Both layers have
# this width.
_WIDTH_KEYS = {
    ("ROI_BOX_HEAD", "conv"): "CONV_DIM",
    ("ROI_BOX_HEAD", "fc"): "FC_DIM",
    ("ROI_MASK_HEAD", "conv"): "CONV_DIM",
    ("ROI_KEYPOINT_HEAD", "conv"): "CONV_DIMS",
}


class AdaptiveROIPooler(ROIPooler):
    """
    PANet's adaptive feature pooling (Sec. 3.2). Each proposal is pooled from *every* level, each
    level's grid goes through its own adaptation layer, and the results are fused element-wise.

    The head after the pooler sees one grid per proposal, as after a :class:`ROIPooler`, so any head
    works. :attr:`output_shape` is the shape of the grid.
    """

    @configurable
    def __init__(
        self,
        output_size: Union[int, Sequence[int]],
        scales: Sequence[float],
        sampling_ratio: int,
        pooler_type: str,
        *,
        in_channels: int,
        fusion: str = "max",
        adaptation: str = "conv",
        adaptation_dim: Optional[int] = None,
        norm: str = "",
    ):
        """
        Args:
            output_size, scales, sampling_ratio, pooler_type:
                see :class:`detectron2.modeling.poolers.ROIPooler`. A ``sampling_ratio`` of 0
                takes hundreds of samples a bin for a large proposal on the finest level; the
                authors use 2.
            in_channels (int): channels of every level.
            fusion (str): "max" (the paper's choice), "sum", "mean" or "product".
            adaptation (str): the adaptation layer of each level: "conv" (3x3, norm, ReLU), "fc"
                (linear over the whole grid, norm, ReLU) or "none".
            adaptation_dim (int or None): output channels of the adaptation layer; by default
                ``in_channels``.
            norm (str or callable): norm of the adaptation layer, see
                :func:`detectron2.layers.get_norm`.

        Raises:
            ValueError: if ``pooler_type``, ``fusion`` or ``adaptation`` is unknown, or the scales
                do not halve from one level to the next.
        """
        _check_scales(scales)
        for name, value, known in (
            ("fusion", fusion, FUSIONS),
            ("adaptation", adaptation, ADAPTATIONS),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(known)}.")
        super().__init__(output_size, scales, sampling_ratio, pooler_type)
        self.scales = [float(scale) for scale in scales]
        self.sampling_ratio = sampling_ratio
        self.pooler_type = pooler_type
        self.fusion = fusion
        self.adaptation = adaptation
        self.in_channels = in_channels
        dim = in_channels if adaptation_dim is None or adaptation == "none" else adaptation_dim
        self.out_channels = dim

        height, width = self.output_size
        self.grid_features = in_channels * height * width
        # The weights of the levels are independent (the paper's fig. 1c).
        # Set to None first, because TorchScript leaves out an attribute that is None.
        self.adaptation_layers: Optional[Union[LevelwiseConv2d, LevelwiseLinear]] = None
        if adaptation == "conv":
            self.adaptation_layers = LevelwiseConv2d(in_channels, dim, len(scales), norm)
        elif adaptation == "fc":
            self.adaptation_layers = LevelwiseLinear(self.grid_features, dim, len(scales), norm)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Dict[str, ShapeSpec], head: str) -> dict:
        """
        Args:
            cfg (CfgNode): a Detectron2 config with :func:`panet_d2.add_panet_config`.
            input_shape (dict[str, ShapeSpec]): shapes of the backbone's outputs.
            head (str): "ROI_BOX_HEAD", "ROI_MASK_HEAD" or "ROI_KEYPOINT_HEAD".

        Raises:
            ConfigError: if a value of the head's node, or the environment variable
                ``PANET_D2_ROI_ALIGN``, cannot work.
        """
        roi_align_choice()  # raises here, not in the first training step
        in_features = cfg.MODEL.ROI_HEADS.IN_FEATURES
        _check_levels(input_shape, in_features)
        node, key = cfg.MODEL[head], f"MODEL.{head}"
        # The mask and keypoint heads need a grid, which an fc layer does not leave.
        adaptations = [a for a in ADAPTATIONS if a == "none" or (head, a) in _WIDTH_KEYS]
        adaptation = read_choice(cfg, f"{key}.AFP.ADAPTATION", adaptations)
        if adaptation == "fc" and node.NUM_CONV > 0:
            raise ConfigError(
                f"{key}.AFP.ADAPTATION is 'fc' and {key}.NUM_CONV is {node.NUM_CONV}; after an fc "
                "layer the grid is 1x1, so NUM_CONV must be 0, or ADAPTATION 'conv'."
            )
        dim = None
        if adaptation != "none":
            width_key = _WIDTH_KEYS[head, adaptation]
            dim = node[width_key]
            if isinstance(dim, (list, tuple)):
                if not dim:
                    raise ConfigError(
                        f"{key}.{width_key} is empty; its first number is the width of the layer "
                        f"that AFP.ADAPTATION {adaptation!r} makes."
                    )
                dim = dim[0]
        pooler_type = read_choice(cfg, f"{key}.POOLER_TYPE", POOLER_TYPES)
        if node.POOLER_SAMPLING_RATIO <= 0 and pooler_type != "ROIPool":
            warn_once(
                f"{key}.POOLER_SAMPLING_RATIO is {node.POOLER_SAMPLING_RATIO}, with which adaptive "
                "feature pooling takes hundreds of samples a bin for a large proposal on the "
                "finest level and several times as long; set 2, as all PANet configs do."
            )
        return {
            "output_size": node.POOLER_RESOLUTION,
            "scales": [1.0 / input_shape[f].stride for f in in_features],
            "sampling_ratio": node.POOLER_SAMPLING_RATIO,
            "pooler_type": pooler_type,
            "in_channels": input_shape[in_features[0]].channels,
            "fusion": read_choice(cfg, f"{key}.AFP.FUSION", FUSIONS),
            "adaptation": adaptation,
            "adaptation_dim": dim,
            "norm": node.get("NORM", ""),
        }

    @property
    @torch.jit.unused
    def output_shape(self) -> ShapeSpec:
        """Channels, height and width of the grid that a head gets for each proposal."""
        height, width = (1, 1) if self.adaptation == "fc" else self.output_size
        return ShapeSpec(channels=self.out_channels, height=height, width=width)

    def forward(self, x: List[torch.Tensor], box_lists: List[Boxes]) -> torch.Tensor:
        """
        Args:
            x (list[Tensor]): feature maps of shape (B, in_channels, H_l, W_l), from fine to
                coarse, one for each of the ``scales``.
            box_lists (list[Boxes] | list[RotatedBoxes]): B lists of boxes, in pixels of the input
                image. Any of them may be empty.

        Returns:
            Tensor: shape (M, channels, height, width) for all M boxes of the batch, see
            :attr:`output_shape`.

        Raises:
            ValueError: if ``x`` does not have one feature map for each scale, or ``box_lists`` does
                not have one list for each image.
        """
        if len(x) != len(self.scales):
            raise ValueError(f"expected {len(self.scales)} feature maps, got {len(x)}.")
        if len(box_lists) != x[0].shape[0]:
            raise ValueError(f"{x[0].shape[0]} images, but boxes for {len(box_lists)}.")
        if len(box_lists) == 0:
            height, width = (1, 1) if self.adaptation == "fc" else self.output_size
            return x[0].new_zeros((0, self.out_channels, height, width))
        # Contiguous, like the stock pooler's result: some heads view the result in another shape.
        if self.adaptation_layers is None:
            fused = self._pool_and_fuse(x, box_lists)
        else:
            fused = self.fuse(self.adapt(self.pool_levels(x, box_lists)))
        return fused[:, :, None, None] if self.adaptation == "fc" else fused.contiguous()

    def pool_levels(self, x: List[torch.Tensor], box_lists: List[Boxes]) -> torch.Tensor:
        """
        Pool all boxes from all levels: the first step of :meth:`forward`, with its arguments.

        Returns:
            Tensor: shape (L, M, in_channels, height, width).
        """
        if torch.jit.is_scripting():
            return self._pool_scripted(x, box_lists)
        else:
            return self._pool(x, box_lists, None)

    def adapt(self, pooled: torch.Tensor) -> torch.Tensor:
        """
        Run the adaptation layers without their ReLU: the second step of :meth:`forward`.

        Args:
            pooled (Tensor): shape (L, M, in_channels, height, width).

        Returns:
            Tensor: shape (L, M, channels, height, width), or (L, M, channels) with "fc".
        """
        if self.adaptation == "fc":
            # Not flatten(), because its export to ONNX fails without proposals.
            pooled = pooled.reshape(pooled.shape[0], pooled.shape[1], self.grid_features)
        assert self.adaptation_layers is not None
        return self.adaptation_layers(pooled)

    def fuse(self, levels: torch.Tensor) -> torch.Tensor:
        """
        Apply the ReLU and fuse the levels: the last step of :meth:`forward`.

        Args:
            levels (Tensor): shape (L, M, ...), from :meth:`adapt`.

        Returns:
            Tensor: shape (M, ...).
        """
        if torch.jit.is_scripting():
            return _fuse_scripted(levels.relu(), self.fusion)
        elif self.fusion == "max":
            # The ReLU of the maximum is the maximum of the ReLUs, with one ReLU instead of L.
            return fuse_levels(levels.unbind(), "max").relu()
        else:
            return fuse_levels(levels.relu().unbind(), self.fusion)

    def fpn_levels(self, box_lists: List[Boxes]) -> torch.Tensor:
        """
        Args:
            box_lists (list[Boxes]): see :meth:`forward`.

        Returns:
            Tensor: shape (M,), the index of the level from which :class:`ROIPooler` would pool each
            box (FPN's rule).
        """
        return assign_boxes_to_levels(
            box_lists,
            self.min_level,
            self.max_level,
            self.canonical_box_size,
            self.canonical_level,
        )

    def _pool_and_fuse(self, x: List[torch.Tensor], box_lists: List[Boxes]) -> torch.Tensor:
        if torch.jit.is_scripting():
            return _fuse_scripted(self._pool_scripted(x, box_lists), self.fusion)
        else:
            return self._pool(x, box_lists, self.fusion)

    def _pool_scripted(self, x: List[torch.Tensor], box_lists: List[Boxes]) -> torch.Tensor:
        """Pool without fusion, with the parent's poolers, which TorchScript can compile."""
        boxes = convert_boxes_to_pooler_format(box_lists)
        pooled: List[torch.Tensor] = []
        for level, pooler in enumerate(self.level_poolers):
            pooled.append(pooler(x[level], boxes))
        return torch.stack(pooled)

    def _pool(
        self, x: List[torch.Tensor], box_lists: List[Boxes], fuse: Optional[str]
    ) -> torch.Tensor:
        """Pool all boxes from all levels, see :func:`panet_d2.layers.multilevel_roi_align`."""
        # Rows of image index and box. Detectron2's function for this step waits for the GPU.
        boxes = torch.cat(
            [F.pad(boxes.tensor, (1, 0), value=float(i)) for i, boxes in enumerate(box_lists)]
        )
        if self.pooler_type in ("ROIAlign", "ROIAlignV2"):
            aligned = self.pooler_type == "ROIAlignV2"
            return multilevel_roi_align(
                x, boxes, self.scales, self.output_size, self.sampling_ratio, aligned, fuse
            )
        pooled = [pooler(feature, boxes) for pooler, feature in zip(self.level_poolers, x)]
        return torch.stack(pooled) if fuse is None else fuse_levels(pooled, fuse)

    def extra_repr(self) -> str:
        return f"fusion={self.fusion!r}, adaptation={self.adaptation!r}"


def _fuse_scripted(levels: torch.Tensor, fusion: str) -> torch.Tensor:
    """Fuse the levels of one tensor (L, ...), as :func:`panet_d2.layers.fuse_levels` does."""
    if fusion == "max":
        return levels.amax(0)
    if fusion == "product":
        return levels.prod(0)
    return levels.mean(0) if fusion == "mean" else levels.sum(0)


def adaptive_poolers(roi_heads: nn.Module) -> Dict[str, AdaptiveROIPooler]:
    """Return the poolers with adaptation layers of any ROI heads, by name."""
    return {
        name: module
        for name, module in roi_heads.named_children()
        if isinstance(module, AdaptiveROIPooler) and module.adaptation != "none"
    }


def _check_scales(scales: Sequence[float]) -> None:
    """Raise a ValueError unless the scales are those of a pyramid, as ROIPooler asserts."""
    levels = [-math.log2(s) if s > 0 else math.nan for s in scales]
    ok = bool(levels) and all(level >= 0 and level == int(level) for level in levels)
    if not ok or any(b != a + 1 for a, b in zip(levels, levels[1:])):
        raise ValueError(
            f"scales is {list(scales)}; they must be 1 / stride of levels from fine to coarse, "
            "each half of the one before, such as [1/4, 1/8, 1/16, 1/32]."
        )


def _check_levels(shapes: Dict[str, ShapeSpec], in_features: List[str]) -> None:
    """Raise a ConfigError unless the levels are those of a pyramid, all of one width."""
    key = f"MODEL.ROI_HEADS.IN_FEATURES is {list(in_features)}"
    if not in_features or any(f not in shapes for f in in_features):
        raise ConfigError(f"{key}; it must list outputs of the backbone: {', '.join(shapes)}.")
    strides = [shapes[f].stride for f in in_features]
    if any(b != 2 * a for a, b in zip(strides, strides[1:])):
        raise ConfigError(
            f"{key} with strides {strides}; it must list levels from fine to coarse without a gap, "
            "such as ['p2', 'p3', 'p4', 'p5']."
        )
    channels = {f: shapes[f].channels for f in in_features}
    if len(set(channels.values())) > 1:
        raise ConfigError(f"{key} with levels of different width ({channels}); all must be equal.")
