"""FPN with PANet's bottom-up path augmentation."""

from __future__ import annotations

import math
from typing import Dict, List, Optional

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import nn

from ...config import read_choice
from ...errors import ConfigError
from ..check_model import TrainingNotice, check_model

ACTIVATIONS = ("relu", "")
BOTTOM_UP_INPUTS = ("output", "sum")
MEMORY_FORMATS = ("auto", "contiguous", "channels_last")


class PAFPN(TrainingNotice, FPN):
    """
    The Path Aggregation FPN: FPN's levels P2…P5 and a bottom-up path N2…N5 (PANet, Sec. 3.1).
    N2 is P2, and

        N(i+1) = relu(conv3x3(relu(conv3x3, stride 2 (N(i))) + P(i+1)))

    The outputs keep FPN's names p2, p3, …, so that every ``IN_FEATURES`` of a Detectron2 config
    works. FPN's parameters keep their names, so that checkpoints of FPN load.
    """

    @configurable
    def __init__(
        self,
        bottom_up: Backbone,
        in_features: List[str],
        out_channels: int,
        norm: str = "",
        top_block: Optional[nn.Module] = None,
        fuse_type: str = "sum",
        square_pad: int = 0,
        *,
        activation: str = "relu",
        bottom_up_input: str = "output",
        bias_before_norm: bool = False,
        channels_last: bool = False,
    ):
        """
        Args:
            bottom_up, in_features, out_channels, norm, fuse_type, square_pad:
                see :class:`detectron2.modeling.FPN`. The bottom-up path has the same width and
                norm.
            top_block (nn.Module or None): see :class:`detectron2.modeling.FPN`. If the
                block reads a level of the pyramid, such as "p5", the block gets that level's N.
            activation (str): activation after each conv of the bottom-up path: "relu" (the paper)
                or "" for none (the authors' release without a norm).
            bottom_up_input (str): what each step reads from the previous level: "output" for
                N(i) (the paper), or "sum" for the input of N(i)'s 3x3 conv (mmdetection's PAFPN).
            bias_before_norm (bool): give the bottom-up convs a bias even before a norm, as in the
                authors' release.
            channels_last (bool): keep the feature maps of ``bottom_up`` and of the neck in the
                channels-last memory format.

        Raises:
            ValueError: if ``activation`` or ``bottom_up_input`` is unknown, or ``in_features`` are
                not levels of ``bottom_up`` that halve in size from one to the next.
        """
        _check_pyramid(bottom_up.output_shape(), in_features, "in_features")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; it must be one of {ACTIVATIONS}.")
        if bottom_up_input not in BOTTOM_UP_INPUTS:
            raise ValueError(
                f"bottom_up_input is {bottom_up_input!r}; it must be one of {BOTTOM_UP_INPUTS}."
            )
        super().__init__(
            bottom_up=bottom_up,
            in_features=in_features,
            out_channels=out_channels,
            norm=norm,
            top_block=top_block,
            fuse_type=fuse_type,
            square_pad=square_pad,
        )
        self.bottom_up_input = bottom_up_input
        names = list(self.output_shape())
        self.levels = names[: len(in_features)]  # "p2", "p3", …
        self.extra_levels = names[len(in_features) :]

        # From high to low resolution. Plain lists, as in FPN: the modules are registered below.
        self.downsample_convs: List[nn.Module] = []
        self.fusion_convs: List[nn.Module] = []
        for level in self.levels[1:]:
            pair = [
                Conv2d(
                    out_channels,
                    out_channels,
                    kernel_size=3,
                    stride=stride,
                    padding=1,
                    bias=norm == "" or bias_before_norm,
                    norm=get_norm(norm, out_channels),
                    activation=nn.ReLU() if activation else None,
                )
                for stride in (2, 1)
            ]
            for conv in pair:
                weight_init.c2_xavier_fill(conv)
            # Each name has the number of the level that the convs make, as in FPN: 3 for N3.
            self.add_module(f"pafpn_downsample{level[1:]}", pair[0])
            self.add_module(f"pafpn_output{level[1:]}", pair[1])
            self.downsample_convs.append(pair[0])
            self.fusion_convs.append(pair[1])
        self.channels_last = channels_last
        if channels_last:
            self.to(memory_format=torch.channels_last)

    @classmethod
    def from_config(cls, cfg: CfgNode, bottom_up: Backbone, top_block: Optional[nn.Module]) -> dict:
        """
        Args:
            cfg (CfgNode): a Detectron2 config with :func:`panet_d2.add_panet_config`.
            bottom_up (Backbone): the network before FPN.
            top_block (nn.Module or None): makes the levels after N5.

        Raises:
            ConfigError: if ``MODEL.FPN.IN_FEATURES`` are not a pyramid, a value of ``MODEL.PAFPN``
                is unknown, ``MEMORY_FORMAT`` is "channels_last" with deformable convs, or the
                number of classes is 0.
        """
        check_model(cfg)
        try:
            _check_pyramid(
                bottom_up.output_shape(), cfg.MODEL.FPN.IN_FEATURES, "MODEL.FPN.IN_FEATURES"
            )
        except ValueError as e:
            raise ConfigError(str(e)) from None
        memory_format = read_choice(cfg, "MODEL.PAFPN.MEMORY_FORMAT", MEMORY_FORMATS)
        deformable = any(cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE)
        if memory_format == "auto":
            # On CUDA the faster format has not been measured.
            on_cpu = torch.device(cfg.MODEL.DEVICE).type == "cpu"
            memory_format = "channels_last" if on_cpu and not deformable else "contiguous"
        if memory_format == "channels_last" and deformable:
            raise ConfigError(
                "MODEL.PAFPN.MEMORY_FORMAT is 'channels_last'; it must be 'auto' or 'contiguous' "
                "if MODEL.RESNETS.DEFORM_ON_PER_STAGE has deformable convs, which read contiguous "
                "feature maps only."
            )
        return {
            "bottom_up": bottom_up,
            "in_features": cfg.MODEL.FPN.IN_FEATURES,
            "out_channels": cfg.MODEL.FPN.OUT_CHANNELS,
            "norm": cfg.MODEL.FPN.NORM,
            "top_block": top_block,
            "fuse_type": cfg.MODEL.FPN.FUSE_TYPE,
            "activation": read_choice(cfg, "MODEL.PAFPN.ACTIVATION", ACTIVATIONS),
            "bottom_up_input": read_choice(cfg, "MODEL.PAFPN.BOTTOM_UP_INPUT", BOTTOM_UP_INPUTS),
            "bias_before_norm": read_choice(cfg, "MODEL.PAFPN.BIAS_BEFORE_NORM", (True, False)),
            "channels_last": memory_format == "channels_last",
        }

    def forward(self, x: torch.Tensor) -> Dict[str, torch.Tensor]:
        """
        Args:
            x (Tensor): images of shape (B, 3, H, W), padded to :attr:`size_divisibility`.

        Returns:
            dict[str, Tensor]: feature maps by level, from high to low resolution. "p2" holds N2,
            of shape (B, out_channels, H / 4, W / 4), and so on.
        """
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        features = self.bottom_up(x)
        pyramid = self.top_down(features)
        feature = pyramid[self.levels[0]]
        for i, (downsample, fusion) in enumerate(zip(self.downsample_convs, self.fusion_convs)):
            level = self.levels[i + 1]
            feature = downsample(feature) + pyramid[level]
            pyramid[level] = fusion(feature)
            if self.bottom_up_input == "output":
                feature = pyramid[level]
        if self.top_block is not None:
            name = self.top_block.in_feature
            # The paper's N6 comes from N5, RetinaNet's P6 from res5.
            source = pyramid[name] if name in pyramid else features[name]
            for i, extra in enumerate(self.top_block(source)):
                pyramid[self.extra_levels[i]] = extra
        return pyramid

    def top_down(self, features: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
        """
        Compute FPN's P2…P5. FPN's own forward also runs the top block, on P5.

        Args:
            features (dict[str, Tensor]): outputs of :attr:`bottom_up`.

        Returns:
            dict[str, Tensor]: feature maps by level, "p2" first.
        """
        upper = self.lateral_convs[0](features[self.in_features[-1]])
        outputs = [self.output_convs[0](upper)]
        for i, (lateral, output) in enumerate(zip(self.lateral_convs, self.output_convs)):
            if i > 0:
                upper = lateral(features[self.in_features[-i - 1]]) + F.interpolate(
                    upper, scale_factor=2.0, mode="nearest"
                )
                if self._fuse_type == "avg":
                    upper = upper / 2
                outputs.insert(0, output(upper))
        return {level: outputs[i] for i, level in enumerate(self.levels)}

    def __prepare_scriptable__(self) -> PAFPN:
        """Return a copy for TorchScript, with lists of modules, as Detectron2's FPN does."""
        import detectron2.export  # noqa: F401, gives FPN this method

        ret = super().__prepare_scriptable__()
        ret.downsample_convs = nn.ModuleList(ret.downsample_convs)
        ret.fusion_convs = nn.ModuleList(ret.fusion_convs)
        for level in self.levels[1:]:
            delattr(ret, f"pafpn_downsample{level[1:]}")
            delattr(ret, f"pafpn_output{level[1:]}")
        return ret


def _check_pyramid(shapes: Dict[str, ShapeSpec], in_features: List[str], name: str) -> None:
    """Raise a ValueError, with ``name`` for ``in_features``, if these are not a pyramid."""
    if any(f not in shapes for f in in_features):
        raise ValueError(
            f"{name} is {list(in_features)}, but the outputs of the bottom-up network are "
            f"{list(shapes)} (MODEL.RESNETS.OUT_FEATURES)."
        )
    strides = [shapes[f].stride for f in in_features]
    if not strides or any(b != 2 * a for a, b in zip(strides, strides[1:])):
        raise ValueError(
            f"{name} is {list(in_features)} with strides {strides}; it must list levels from fine "
            "to coarse, each with twice the stride of the one before, such as "
            "['res2', 'res3', 'res4', 'res5']."
        )


@BACKBONE_REGISTRY.register()
def build_resnet_pafpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> PAFPN:
    """
    Build ResNet, FPN and the bottom-up path, with N6 max-pooled from N5 for the RPN. Errors: see
    :meth:`PAFPN.from_config`.
    """
    bottom_up = build_resnet_backbone(cfg, input_shape)
    top_block = LastLevelMaxPool()
    # Detectron2's block always reads "p5"; this pyramid may end at another level. Levels are named
    # by their strides, which dilation changes.
    last = bottom_up.output_shape().get(next(reversed(cfg.MODEL.FPN.IN_FEATURES), ""))
    if last and last.stride:
        top_block.in_feature = f"p{int(math.log2(last.stride))}"
    return PAFPN(cfg, bottom_up, top_block)


@BACKBONE_REGISTRY.register()
def build_retinanet_resnet_pafpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> PAFPN:
    """
    Build ResNet, FPN and the bottom-up path, with RetinaNet's P6 and P7 made from res5. Errors: see
    :meth:`PAFPN.from_config`.
    """
    bottom_up = build_resnet_backbone(cfg, input_shape)
    outputs, in_features = bottom_up.output_shape(), cfg.MODEL.FPN.IN_FEATURES
    if "res5" not in outputs:
        raise ConfigError(
            f"MODEL.RESNETS.OUT_FEATURES is {list(outputs)}; it must contain 'res5', from which "
            "RetinaNet makes P6."
        )
    if list(in_features[-1:]) != ["res5"]:  # P6 and P7 would have other strides than FPN says
        raise ConfigError(
            f"MODEL.FPN.IN_FEATURES is {list(in_features)}; the last must be 'res5', from which "
            "RetinaNet makes P6."
        )
    top_block = LastLevelP6P7(outputs["res5"].channels, cfg.MODEL.FPN.OUT_CHANNELS)
    return PAFPN(cfg, bottom_up, top_block)
