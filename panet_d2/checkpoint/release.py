"""Conversion rules for the authors' released checkpoints (github.com/ShuLiu1993/PANet)."""

from __future__ import annotations

import re
from typing import List

import torch

from .rules import Conversion, Rule, Tensors

_KIND = r"(weight|bias)"


def _layer(prefix: str, target: str, index: str = "") -> List[Rule]:
    """Return rules for a layer, or for a layer and its norm: parts 0 and 1 of an nn.Sequential."""
    return [
        Rule(rf"{prefix}(?:\.0)?\.{_KIND}", rf"{target}.\1{index}"),
        Rule(rf"{prefix}\.1\.{_KIND}", rf"{target}.norm.\1{index}"),
    ]


def _levelwise(prefix: str, target: str) -> List[Rule]:
    """Return rules for one layer per level. The four layers become the parts of one layer."""
    return [rule for i in range(4) for rule in _layer(rf"{prefix}\.{i}", target, f"[{i}]")]


def _stacked(prefix: str, target: str) -> List[Rule]:
    """Return rules for conv, norm, ReLU, conv, norm, ReLU, … in one nn.Sequential."""
    return [
        Rule(rf"{prefix}\.{3 * i + part}\.{_KIND}", rf"{target}{i + 1}.{norm}\1")
        for i in range(3)
        for part, norm in enumerate(("", "norm."))
    ]


def _neck() -> List[Rule]:
    layers = {"conv_top": "fpn_lateral5", r"posthoc_modules\.0": "fpn_output5"}
    # FPN's lists begin with the coarsest level, those of the bottom-up path with N2 to N3.
    for i in range(3):
        layers[rf"topdown_lateral_modules\.{i}\.conv_lateral"] = f"fpn_lateral{4 - i}"
        layers[rf"posthoc_modules\.{i + 1}"] = f"fpn_output{4 - i}"
        layers[rf"panet_buttomup_conv1_modules\.{i}"] = f"pafpn_downsample{i + 3}"
        layers[rf"panet_buttomup_conv2_modules\.{i}"] = f"pafpn_output{i + 3}"
    return [
        rule
        for theirs, ours in layers.items()
        for rule in _layer(rf"(?:Conv_Body\.)?{theirs}", f"backbone.{ours}")
    ]


def _resnet() -> List[Rule]:
    stem, stage = r"Conv_Body\.conv_body\.res1", r"Conv_Body\.conv_body\.(res[2-5])\.(\d+)"
    ours, block = "backbone.bottom_up.stem.conv1", r"backbone.bottom_up.\1.\2"
    affine = "the norm as scale and shift; its statistics are 0 and 1"
    return [
        Rule(rf"{stem}\.conv1\.weight", f"{ours}.weight"),
        Rule(rf"{stem}\.bn1\.{_KIND}", rf"{ours}.norm.\1", note=affine),
        Rule(rf"{stage}\.(conv[123])\.weight", rf"{block}.\3.weight"),
        Rule(rf"{stage}\.bn([123])\.{_KIND}", rf"{block}.conv\3.norm.\4", note=affine),
        Rule(rf"{stage}\.downsample\.0\.weight", f"{block}.shortcut.weight"),
        Rule(rf"{stage}\.downsample\.1\.{_KIND}", rf"{block}.shortcut.norm.\3", note=affine),
    ]


def release_rules() -> List[Rule]:
    """Return the rules for all names in the three released models and in single modules of them."""
    rpn, box, mask = "proposal_generator.rpn_head.", "roi_heads.box_", "roi_heads.mask_"
    return [
        *_neck(),
        *_resnet(),
        *_layer(r"RPN\.FPN_RPN_conv", f"{rpn}conv"),
        *_layer(r"RPN\.FPN_RPN_cls_score", f"{rpn}objectness_logits"),
        *_layer(r"RPN\.FPN_RPN_bbox_pred", f"{rpn}anchor_deltas"),
        # The 4conv1fc box head.
        *_levelwise(r"Box_Head\.conv1_head", f"{box}pooler.adaptation_layers"),
        *_stacked(r"Box_Head\.convs", f"{box}head.conv"),
        *_layer(r"Box_Head\.fc", f"{box}head.fc1"),
        # The 2fc box head.
        *_levelwise(r"Box_Head\.fc1", f"{box}pooler.adaptation_layers"),
        *_layer(r"Box_Head\.fc2", f"{box}head.fc1"),
        Rule(
            rf"Box_Outs\.cls_score\.{_KIND}",
            rf"{box}predictor.cls_score.\1",
            lambda tensor: torch.cat([tensor[1:], tensor[:1]]),
            "background moved from first to last",
        ),
        Rule(
            rf"Box_Outs\.bbox_pred\.{_KIND}",
            rf"{box}predictor.bbox_pred.\1",
            lambda tensor: tensor[4:],
            "deltas of background left out",
        ),
        *_levelwise(r"Mask_Head\.mask_conv1", f"{mask}pooler.adaptation_layers"),
        *_stacked(r"Mask_Head\.conv_fcn", f"{mask}head.mask_fcn"),
        *_layer(r"Mask_Head\.mask_conv4", f"{mask}head.mask_fcn3"),
        *_layer(r"Mask_Head\.mask_conv4_fc", f"{mask}head.fc_fusion.conv1"),
        *_layer(r"Mask_Head\.mask_conv5_fc", f"{mask}head.fc_fusion.conv2"),
        *_layer(r"Mask_Head\.mask_fc", f"{mask}head.fc_fusion.fc"),
        *_layer(r"Mask_Head\.upconv", f"{mask}head.deconv"),
        Rule(
            rf"Mask_Outs\.classify\.{_KIND}",
            rf"{mask}head.predictor.\1",
            lambda tensor: tensor[1:],
            "mask of background left out",
        ),
    ]


def add_norm_statistics(result: Conversion, model: Tensors) -> None:
    """Initialize the statistics of the ResNet's norms, which the released models do not have."""
    for name, value in model.items():
        # FrozenBatchNorm2d starts with mean 0 and variance 1 - eps, so it is weight * x + bias.
        if re.fullmatch(r"backbone\.bottom_up\..*\.norm\.running_(mean|var)", name):
            result.put("initialized", "", name, value, "so that the norm is scale and shift alone")
