"""The authors' released checkpoints (github.com/ShuLiu1993/PANet), by their names."""

from __future__ import annotations

import re
from typing import Callable, List, Optional

import torch

from .rules import Rule

__all__ = ["release_may_initialise", "release_rules"]


def _layer(match: re.Match) -> str:
    """``0.weight`` is the layer's and ``1.weight`` its norm's, in an nn.Sequential."""
    return {"0": "", "1": "norm."}[match["part"]] + match["kind"]


def _levelwise(prefix: str, target: str) -> Rule:
    """A rule for a layer that each level has of its own, with its norm; ours is one layer."""
    return Rule(
        rf"{prefix}\.(?P<level>[0-3])\.(?P<part>[01])\.(?P<kind>weight|bias)",
        lambda match: f"{target}.{_layer(match)}[{match['level']}]",
    )


def _sequential(prefix: str, target: Callable[[re.Match], str]) -> Rule:
    """A rule for both parts of a layer with its norm; ``target`` names the layer."""
    pattern = rf"{prefix}\.(?P<part>[01])\.(?P<kind>weight|bias)"
    return Rule(pattern, lambda match: f"{target(match)}.{_layer(match)}")


def _plain(prefix: str, target: Callable[[re.Match], str]) -> Rule:
    """A rule for a layer without a norm."""
    return Rule(
        rf"{prefix}\.(?P<kind>weight|bias)", lambda match: f"{target(match)}.{match['kind']}"
    )


def _stacked(prefix: str, target: str) -> Rule:
    """Convs, norms and ReLUs in one nn.Sequential: 0, 1, 2 are the first's, and so on."""

    def name(match: re.Match) -> str:
        conv, part = divmod(int(match["index"]), 3)
        return f"{target}{conv + 1}.{('', 'norm.')[part]}{match['kind']}"

    # 2, 5, … are ReLUs and have no tensors.
    return Rule(rf"{prefix}\.(?P<index>[013467])\.(?P<kind>weight|bias)", name)


def _neck() -> List[Rule]:
    body = r"(?:Conv_Body\.)?"
    # Lists of the FPN begin with the coarsest level, those of the bottom-up path with N2 -> N3.
    places = [
        (rf"{body}conv_top", lambda m: "backbone.fpn_lateral5"),
        (
            rf"{body}topdown_lateral_modules\.(?P<i>[012])\.conv_lateral",
            lambda m: f"backbone.fpn_lateral{4 - int(m['i'])}",
        ),
        (
            rf"{body}posthoc_modules\.(?P<i>[0123])",
            lambda m: f"backbone.fpn_output{5 - int(m['i'])}",
        ),
        (
            rf"{body}panet_buttomup_conv1_modules\.(?P<i>[012])",
            lambda m: f"backbone.pafpn_downsample{3 + int(m['i'])}",
        ),
        (
            rf"{body}panet_buttomup_conv2_modules\.(?P<i>[012])",
            lambda m: f"backbone.pafpn_output{3 + int(m['i'])}",
        ),
    ]
    return [make(*place) for place in places for make in (_sequential, _plain)]


def _resnet() -> List[Rule]:
    stage = r"Conv_Body\.conv_body\.(res[2-5])\.(\d+)\."
    ours = r"backbone.bottom_up.\1.\2."
    affine = "the norm as scale and shift; its statistics are 0 and 1"
    return [
        Rule(r"Conv_Body\.conv_body\.res1\.conv1\.weight", "backbone.bottom_up.stem.conv1.weight"),
        Rule(
            r"Conv_Body\.conv_body\.res1\.bn1\.(weight|bias)",
            r"backbone.bottom_up.stem.conv1.norm.\1",
            note=affine,
        ),
        Rule(stage + r"(conv[123])\.weight", ours + r"\3.weight"),
        Rule(stage + r"bn([123])\.(weight|bias)", ours + r"conv\3.norm.\4", note=affine),
        Rule(stage + r"downsample\.0\.weight", ours + "shortcut.weight"),
        Rule(stage + r"downsample\.1\.(weight|bias)", ours + r"shortcut.norm.\3", note=affine),
    ]


def _background_last(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor[1:], tensor[:1]])


def release_rules() -> List[Rule]:
    """
    Returns:
        list[Rule]: for all names in the three released models, and in modules taken from them.
    """
    box, mask = "roi_heads.box_", "roi_heads.mask_"
    return [
        *_neck(),
        *_resnet(),
        _plain(r"RPN\.FPN_RPN_conv", lambda m: "proposal_generator.rpn_head.conv"),
        _plain(
            r"RPN\.FPN_RPN_cls_score", lambda m: "proposal_generator.rpn_head.objectness_logits"
        ),
        _plain(r"RPN\.FPN_RPN_bbox_pred", lambda m: "proposal_generator.rpn_head.anchor_deltas"),
        # 4conv1fc
        _levelwise(r"Box_Head\.conv1_head", f"{box}pooler.adaptation_layers"),
        _stacked(r"Box_Head\.convs", f"{box}head.conv"),
        _plain(r"Box_Head\.fc", lambda m: f"{box}head.fc1"),
        # 2fc
        _levelwise(r"Box_Head\.fc1", f"{box}pooler.adaptation_layers"),
        _sequential(r"Box_Head\.fc2", lambda m: f"{box}head.fc1"),
        Rule(
            r"Box_Outs\.cls_score\.(weight|bias)",
            rf"{box}predictor.cls_score.\1",
            _background_last,
            "background moved from first to last",
        ),
        Rule(
            r"Box_Outs\.bbox_pred\.(weight|bias)",
            rf"{box}predictor.bbox_pred.\1",
            lambda tensor: tensor[4:],
            "deltas of background left out",
        ),
        _levelwise(r"Mask_Head\.mask_conv1", f"{mask}pooler.adaptation_layers"),
        _stacked(r"Mask_Head\.conv_fcn", f"{mask}head.mask_fcn"),
        _sequential(r"Mask_Head\.mask_conv4", lambda m: f"{mask}head.mask_fcn3"),
        _sequential(r"Mask_Head\.mask_conv4_fc", lambda m: f"{mask}head.fc_fusion.conv1"),
        _sequential(r"Mask_Head\.mask_conv5_fc", lambda m: f"{mask}head.fc_fusion.conv2"),
        Rule(r"Mask_Head\.mask_fc\.0\.(weight|bias)", rf"{mask}head.fc_fusion.fc.\1"),
        _plain(r"Mask_Head\.upconv", lambda m: f"{mask}head.deconv"),
        Rule(
            r"Mask_Outs\.classify\.(weight|bias)",
            rf"{mask}head.predictor.\1",
            lambda tensor: tensor[1:],
            "mask of background left out",
        ),
    ]


def release_may_initialise(name: str) -> Optional[str]:
    """
    Args:
        name (str): a tensor of our model that the release has none for.

    Returns:
        str or None: why its initial value is exactly right; None if it is not.
    """
    # FrozenBatchNorm2d starts with mean 0 and variance 1 - eps, so that it is weight * x + bias.
    if re.fullmatch(r"backbone\.bottom_up\..*\.norm\.running_(mean|var)", name):
        return "so that the norm is scale and shift alone"
    return None
