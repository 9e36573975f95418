"""PANet's mask head: the FCN path of Mask R-CNN plus a fully-connected path."""

from __future__ import annotations

from typing import Any, List, Optional, Tuple

import fvcore.nn.weight_init as weight_init
import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import ROI_HEADS_REGISTRY, ROI_MASK_HEAD_REGISTRY
from detectron2.modeling.roi_heads import Res5ROIHeads
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from torch import nn

from ...config import read_choice
from ...errors import ConfigError
from ..check_model import TrainingNotice


class FCFusionBranch(nn.Module):
    """
    The fully-connected path of PANet's mask head (Sec. 3.3): a 3x3 conv, a 3x3 conv that halves
    the channels, and one linear layer that predicts a class-agnostic mask. Every pixel of the mask
    sees the whole proposal.
    """

    def __init__(self, input_shape: ShapeSpec, norm: str = "", relu: bool = False):
        """
        Args:
            input_shape (ShapeSpec): channels, height and width of the input features.
            norm (str or callable): norm of the convs, see :func:`detectron2.layers.get_norm`.
            relu (bool): add a ReLU after the linear layer.

        Raises:
            ValueError: if ``input_shape`` has no height or width.
        """
        super().__init__()
        if not input_shape.height or not input_shape.width:
            raise ValueError(
                f"input_shape is {input_shape}; fully-connected fusion needs its height and width, "
                "those of the grid that the mask head gets."
            )
        channels, height, width = input_shape.channels, input_shape.height, input_shape.width
        self.conv1 = _conv(channels, channels, norm)
        self.conv2 = _conv(channels, channels // 2, norm)
        self.mask_size = (2 * height, 2 * width)  # as after the FCN path's deconv
        self.fc = nn.Linear((channels // 2) * height * width, 4 * height * width)
        # As in the authors' release. Small weights let the FCN path dominate at first.
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.constant_(self.fc.bias, 0)
        self.relu = nn.ReLU() if relu else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x (Tensor): shape (M, channels, R, R).

        Returns:
            Tensor: mask logits of shape (M, 1, 2R, 2R).
        """
        x = self.conv2(self.conv1(x)).flatten(start_dim=1)
        return self.relu(self.fc(x)).reshape(x.shape[0], 1, self.mask_size[0], self.mask_size[1])


def _conv(in_channels: int, out_channels: int, norm: str) -> Conv2d:
    conv = Conv2d(
        in_channels,
        out_channels,
        kernel_size=3,
        padding=1,
        bias=not norm,
        norm=get_norm(norm, out_channels),
        activation=nn.ReLU(),
    )
    weight_init.c2_msra_fill(conv)
    return conv


@ROI_MASK_HEAD_REGISTRY.register()
class PANetMaskHead(TrainingNotice, MaskRCNNConvUpsampleHead):
    """
    Detectron2's mask head with fully-connected fusion. The parent's layers keep their names.

    The fully-connected path branches off before the FCN path's last conv: after the third of the
    paper's four convs. With adaptive feature pooling, the pooler's adaptation layer is the first of
    the four convs, and the head has the other three.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        num_classes: int,
        conv_dims: List[int],
        conv_norm: str = "",
        fc_fusion: bool = True,
        fc_relu: bool = False,
        **kwargs: Any,
    ):
        """
        Args:
            input_shape, num_classes, conv_dims, conv_norm, kwargs: see
                :class:`detectron2.modeling.roi_heads.mask_head.MaskRCNNConvUpsampleHead`.
                ``input_shape`` needs its height and width.
            fc_fusion (bool): add the fully-connected path. If False, this head is the parent.
            fc_relu (bool): add a ReLU after the linear layer of this path. The authors' release
                has this ReLU. The paper does not mention one.

        Raises:
            ValueError: if ``fc_fusion`` is true and there is no conv before the deconv, or half of
                the channels cannot have this norm.
        """
        super().__init__(
            input_shape,
            num_classes=num_classes,
            conv_dims=conv_dims,
            conv_norm=conv_norm,
            **kwargs,
        )
        self.num_shared = len(conv_dims) - 2  # convs that both paths go through
        self.num_fcn_layers = len(self)
        self.fc_fusion_on = fc_fusion
        # Set to None first, because TorchScript leaves out an attribute that is None.
        self.fc_fusion: Optional[FCFusionBranch] = None
        if not fc_fusion:
            return
        if self.num_shared < 0:
            raise ValueError(
                f"conv_dims is {list(conv_dims)}; fully-connected fusion needs at least one conv "
                "before the deconv."
            )
        shared_dim = conv_dims[self.num_shared - 1] if self.num_shared else input_shape.channels
        shape = ShapeSpec(channels=shared_dim, height=input_shape.height, width=input_shape.width)
        # Added last, because the parent is an nn.Sequential in the order of use.
        self.fc_fusion = FCFusionBranch(shape, conv_norm, fc_relu)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        """
        Args:
            cfg (CfgNode): a Detectron2 config with :func:`panet_d2.add_panet_config`.
            input_shape (ShapeSpec): shape of the pooled features.

        Raises:
            ConfigError: if a value of ``MODEL.ROI_MASK_HEAD`` cannot work.
        """
        node, key = cfg.MODEL.ROI_MASK_HEAD, "MODEL.ROI_MASK_HEAD"
        ret = super().from_config(cfg, input_shape)
        ret["fc_fusion"] = read_choice(cfg, f"{key}.FC_FUSION.ENABLED", (True, False))
        ret["fc_relu"] = read_choice(cfg, f"{key}.FC_FUSION.RELU", (True, False))
        if not ret["fc_fusion"]:
            return ret
        heads = dict(ROI_HEADS_REGISTRY).get(cfg.MODEL.ROI_HEADS.NAME)
        if isinstance(heads, type) and issubclass(heads, Res5ROIHeads):
            # Res5ROIHeads give the shape before res5, which halves the grid.
            height, width = (input_shape.height + 1) // 2, (input_shape.width + 1) // 2
            input_shape = ShapeSpec(channels=input_shape.channels, height=height, width=width)
            ret["input_shape"] = input_shape
        if not isinstance(input_shape, ShapeSpec):
            raise ConfigError(
                f"{key}.POOLER_TYPE is empty; PANetMaskHead reads pooled features, so it must be "
                "ROIAlignV2 or ROIAlign."
            )
        if node.NUM_CONV < 1:
            raise ConfigError(
                f"{key}.NUM_CONV is {node.NUM_CONV}; with FC_FUSION it must be at least 1, because "
                "the fully-connected path leaves before the last conv."
            )
        if node.NORM == "GN" and node.NUM_CONV > 1 and node.CONV_DIM % 64:
            raise ConfigError(
                f"{key}.CONV_DIM is {node.CONV_DIM}; with NORM: GN and FC_FUSION it must be a "
                "multiple of 64, because half of the channels make 32 groups."
            )
        if node.NORM == "GN" and node.NUM_CONV == 1 and input_shape.channels % 64:
            raise ConfigError(
                f"{key}.NUM_CONV is 1, so the fully-connected path reads the pooled features, of "
                f"{input_shape.channels} channels; with NORM: GN these must be a multiple of 64, "
                "because half of them make 32 groups."
            )
        return ret

    def layers(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x (Tensor): pooled features of shape (M, C, R, R).

        Returns:
            Tensor: mask logits of shape (M, num_classes, 2R, 2R): the FCN path's plus, for every
            class, the fully-connected path's.
        """
        # Not super().layers, which TorchScript cannot compile.
        if self.fc_fusion is None:
            for layer in self:
                x = layer(x)
        else:
            fcn_logits, fc_logits = self.forward_paths(x)
            x = fcn_logits + fc_logits
        return x

    def forward_paths(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """
        Predict masks with each path separately.

        Args:
            x (Tensor): pooled features of shape (M, C, R, R).

        Returns:
            tuple[Tensor, Tensor]: logits of the FCN path, (M, num_classes, 2R, 2R), and of the
            fully-connected path, (M, 1, 2R, 2R).
        """
        assert self.fc_fusion is not None
        shared = x
        for i, layer in enumerate(self):
            if i == self.num_shared:
                shared = x
            if i < self.num_fcn_layers:
                x = layer(x)
        return x, self.fc_fusion(shared)
