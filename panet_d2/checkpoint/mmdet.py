"""mmdetection's Faster R-CNN and Mask R-CNN with its PAFPN, by their names (version 3)."""

from __future__ import annotations

import re
from typing import List

from .rules import Rule

__all__ = ["mmdet_rules"]


def _resnet() -> List[Rule]:
    ours = "backbone.bottom_up."
    kinds = r"(weight|bias|running_mean|running_var)"
    stage = r"backbone\.layer(\d)\.(\d+)\."

    def block(match: re.Match, layer: str) -> str:
        return f"{ours}res{int(match[1]) + 1}.{match[2]}.{layer}"

    return [
        Rule(r"backbone\.conv1\.weight", f"{ours}stem.conv1.weight"),
        Rule(rf"backbone\.bn1\.{kinds}", rf"{ours}stem.conv1.norm.\1"),
        Rule(stage + r"conv(\d)\.weight", lambda m: block(m, f"conv{m[3]}.weight")),
        Rule(stage + rf"bn(\d)\.{kinds}", lambda m: block(m, f"conv{m[3]}.norm.{m[4]}")),
        Rule(stage + r"downsample\.0\.weight", lambda m: block(m, "shortcut.weight")),
        Rule(stage + rf"downsample\.1\.{kinds}", lambda m: block(m, f"shortcut.norm.{m[3]}")),
    ]


def _neck() -> List[Rule]:
    rules = []
    # Index 0 is the finest level of the FPN, and the step from N2 to N3.
    for theirs, ours, first in (
        ("lateral_convs", "fpn_lateral", 2),
        ("fpn_convs", "fpn_output", 2),
        ("downsample_convs", "pafpn_downsample", 3),
        ("pafpn_convs", "pafpn_output", 3),
    ):

        def name(match: re.Match, ours: str = ours, first: int = first) -> str:
            return f"backbone.{ours}{first + int(match[1])}.{match[2]}"

        rules.append(Rule(rf"neck\.{theirs}\.(\d)\.conv\.(weight|bias)", name))
    return rules


def mmdet_rules() -> List[Rule]:
    """
    Returns:
        list[Rule]: for all names of those models. Classes keep their order, since background is
        last in both.
    """
    wb = r"(weight|bias)"
    rpn, box, mask = "proposal_generator.rpn_head.", "roi_heads.box_", "roi_heads.mask_"
    return [
        Rule(r".*\.num_batches_tracked", None, note="a frozen norm counts no batches"),
        *_resnet(),
        *_neck(),
        Rule(rf"rpn_head\.rpn_conv\.{wb}", rf"{rpn}conv.\1"),
        Rule(rf"rpn_head\.rpn_cls\.{wb}", rf"{rpn}objectness_logits.\1"),
        Rule(rf"rpn_head\.rpn_reg\.{wb}", rf"{rpn}anchor_deltas.\1"),
        Rule(
            rf"roi_head\.bbox_head\.shared_fcs\.(\d)\.{wb}",
            lambda m: f"{box}head.fc{int(m[1]) + 1}.{m[2]}",
        ),
        Rule(rf"roi_head\.bbox_head\.fc_cls\.{wb}", rf"{box}predictor.cls_score.\1"),
        Rule(rf"roi_head\.bbox_head\.fc_reg\.{wb}", rf"{box}predictor.bbox_pred.\1"),
        Rule(
            rf"roi_head\.mask_head\.convs\.(\d)\.conv\.{wb}",
            lambda m: f"{mask}head.mask_fcn{int(m[1]) + 1}.{m[2]}",
        ),
        Rule(rf"roi_head\.mask_head\.upsample\.{wb}", rf"{mask}head.deconv.\1"),
        Rule(rf"roi_head\.mask_head\.conv_logits\.{wb}", rf"{mask}head.predictor.\1"),
    ]
