"""The authors' released modules and ours, with the same weights, to 1e-4."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.roi_heads import FastRCNNConvFCHead
from detectron2.structures import Boxes

from panet_d2 import PAFPN, AdaptiveROIPooler, PANetMaskHead
from panet_d2.modeling import FastRCNNConvFCNormHead

from . import golden

pytestmark = golden.needs_golden

CHANNELS = 64


class Stages(Backbone):
    """Stands for a ResNet whose outputs are known already."""

    def __init__(self, features):
        super().__init__()
        self._out_features = list(features)
        self._out_feature_channels = {k: v.shape[1] for k, v in features.items()}
        self._out_feature_strides = {k: 2 ** int(k[-1]) for k in features}

    def forward(self, x):
        return x


@pytest.mark.parametrize("name, norm", [("official_neck_gn", "GN"), ("official_neck_plain", "")])
def test_neck(name, norm):
    weights, inputs, outputs = golden.load(name)
    neck = PAFPN(
        Stages(inputs),
        list(inputs),
        CHANNELS,
        norm=norm,
        top_block=LastLevelMaxPool(),
        activation="relu" if norm else "",
        bias_before_norm=True,
    )
    neck.load_state_dict({golden.neck_name(k): v for k, v in weights.items()})
    with torch.no_grad():
        result = neck(inputs)
    assert list(result) == ["p2", "p3", "p4", "p5", "p6"]
    for level, n in result.items():
        torch.testing.assert_close(n, outputs[level.replace("p", "n")], rtol=1e-4, atol=1e-4)


def pooler_and_inputs(inputs, resolution, **kwargs):
    """
    A pooler whose RoIAlign gives back the recorded grids: one image per proposal, every level's
    map holding the grid, and a box that lies on it exactly with one sample a bin.
    """
    pooler = AdaptiveROIPooler(
        resolution, [1 / 4, 1 / 8, 1 / 16, 1 / 32], 1, "ROIAlign", in_channels=CHANNELS, **kwargs
    )
    features = [inputs[f"pooled_p{level}"] for level in (2, 3, 4, 5)]
    # A bin's one sample lies at its middle; without the half-pixel shift a box from -0.5 to
    # resolution - 0.5 would put it on the pixels. RoIAlign takes one box for all levels, so each
    # level is pooled with a pooler of stride 1 of its own.
    pooler.scales = [1.0] * 4
    boxes = [Boxes(torch.tensor([[-0.5, -0.5, resolution - 0.5, resolution - 0.5]]))] * len(
        features[0]
    )
    return pooler, features, boxes


def test_pooling_trick_is_exact():
    inputs = golden.load("official_box_head_2fc_gn")[1]
    pooler, features, boxes = pooler_and_inputs(inputs, 7, adaptation="none", fusion="max")
    expected = torch.stack(features).amax(0)
    torch.testing.assert_close(pooler(features, boxes), expected, rtol=0, atol=1e-6)


def load_adaptation(pooler, weights, prefix):
    levels = {}
    for key in sorted(weights):  # level by level
        if key.startswith(prefix):
            rest = key.removeprefix(prefix).split(".", 1)[1]
            name = f"adaptation_layers.{golden.conv_norm_name(rest)}"
            levels.setdefault(name, []).append(weights[key])
    pooler.load_state_dict({name: torch.cat(values) for name, values in levels.items()})


def test_box_head_4conv1fc():
    weights, inputs, outputs = golden.load("official_box_head_4conv1fc_gn")
    pooler, features, boxes = pooler_and_inputs(inputs, 7, adaptation="conv", norm="GN")
    load_adaptation(pooler, weights, "conv1_head.")
    head = FastRCNNConvFCHead(
        pooler.output_shape, conv_dims=[CHANNELS] * 3, fc_dims=[96], conv_norm="GN"
    )
    state = {"fc1.weight": weights["fc.weight"], "fc1.bias": weights["fc.bias"]}
    for i in range(3):
        state[f"conv{i + 1}.weight"] = weights[f"convs.{3 * i}.weight"]
        state[f"conv{i + 1}.norm.weight"] = weights[f"convs.{3 * i + 1}.weight"]
        state[f"conv{i + 1}.norm.bias"] = weights[f"convs.{3 * i + 1}.bias"]
    head.load_state_dict(state)
    with torch.no_grad():
        result = head(pooler(features, boxes))
    torch.testing.assert_close(result, outputs["features"], rtol=1e-4, atol=1e-4)


def test_box_head_2fc():
    weights, inputs, outputs = golden.load("official_box_head_2fc_gn")
    pooler, features, boxes = pooler_and_inputs(
        inputs, 7, adaptation="fc", adaptation_dim=CHANNELS, norm="GN"
    )
    load_adaptation(pooler, weights, "fc1.")
    head = FastRCNNConvFCNormHead(
        pooler.output_shape, conv_dims=[], fc_dims=[CHANNELS], conv_norm="GN"
    )
    head.load_state_dict(
        {
            f"fc1.{golden.conv_norm_name(k.removeprefix('fc2.'))}": v
            for k, v in weights.items()
            if k.startswith("fc2.")
        }
    )
    with torch.no_grad():
        result = head(pooler(features, boxes))
    torch.testing.assert_close(result, outputs["features"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fc_fusion", [False, True])
def test_mask_head(fc_fusion):
    weights, inputs, outputs = golden.load(f"official_mask_head_{'ff' if fc_fusion else 'afp'}_gn")
    pooler, features, boxes = pooler_and_inputs(inputs, 7, adaptation="conv", norm="GN")
    load_adaptation(pooler, weights, "Mask_Head.mask_conv1.")
    head = PANetMaskHead(
        ShapeSpec(channels=CHANNELS, height=7, width=7),
        num_classes=6,
        conv_dims=[CHANNELS] * 4,
        conv_norm="GN",
        fc_fusion=fc_fusion,
        fc_relu=True,
    )
    layers = {f"mask_fcn{i + 1}": (f"conv_fcn.{3 * i}", f"conv_fcn.{3 * i + 1}") for i in range(3)}
    if fc_fusion:
        layers["mask_fcn3"] = ("mask_conv4.0", "mask_conv4.1")
        layers["fc_fusion.conv1"] = ("mask_conv4_fc.0", "mask_conv4_fc.1")
        layers["fc_fusion.conv2"] = ("mask_conv5_fc.0", "mask_conv5_fc.1")
    state = {
        "deconv.weight": weights["Mask_Head.upconv.weight"],
        "deconv.bias": weights["Mask_Head.upconv.bias"],
        "predictor.weight": weights["Mask_Outs.classify.weight"],
        "predictor.bias": weights["Mask_Outs.classify.bias"],
    }
    if fc_fusion:
        state["fc_fusion.fc.weight"] = weights["Mask_Head.mask_fc.0.weight"]
        state["fc_fusion.fc.bias"] = weights["Mask_Head.mask_fc.0.bias"]
    for ours, (conv, norm) in layers.items():
        state[f"{ours}.weight"] = weights[f"Mask_Head.{conv}.weight"]
        state[f"{ours}.norm.weight"] = weights[f"Mask_Head.{norm}.weight"]
        state[f"{ours}.norm.bias"] = weights[f"Mask_Head.{norm}.bias"]
    head.load_state_dict(state)
    with torch.no_grad():
        result = head.layers(pooler(features, boxes))
    torch.testing.assert_close(result, outputs["mask_logits"], rtol=1e-4, atol=1e-4)
