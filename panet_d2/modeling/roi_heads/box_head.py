"""A box head whose fully-connected layers have a norm."""

from __future__ import annotations

from typing import List

import fvcore.nn.weight_init as weight_init
from detectron2.config import configurable
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import ROI_BOX_HEAD_REGISTRY
from detectron2.modeling.roi_heads import FastRCNNConvFCHead

from ...layers import Linear


@ROI_BOX_HEAD_REGISTRY.register()
class FastRCNNConvFCNormHead(FastRCNNConvFCHead):
    """
    Detectron2's box head with a norm after its fully-connected layers, too. The authors' release
    has a GroupNorm after both layers of its 2fc head. The layers keep their names. The norms are
    ``fc1.norm``, ….
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        conv_dims: List[int],
        fc_dims: List[int],
        conv_norm: str = "",
    ):
        """
        Args:
            input_shape, conv_dims, fc_dims: see
                :class:`detectron2.modeling.roi_heads.FastRCNNConvFCHead`.
            conv_norm (str or callable): norm of the convs and of the fc layers, see
                :func:`detectron2.layers.get_norm`.
        """
        super().__init__(input_shape, conv_dims=conv_dims, fc_dims=fc_dims, conv_norm=conv_norm)
        for k, fc in enumerate(self.fcs):
            # The parent's activation follows this layer in the sequence.
            normed = Linear(fc.in_features, fc.out_features, get_norm(conv_norm, fc.out_features))
            weight_init.c2_xavier_fill(normed)
            setattr(self, f"fc{k + 1}", normed)
            self.fcs[k] = normed
