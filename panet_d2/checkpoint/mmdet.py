"""Conversion rules for Faster R-CNN and Mask R-CNN with FPN or PAFPN of mmdetection 3."""

from __future__ import annotations

import re
from typing import List

from .rules import Rule


def _resnet() -> List[Rule]:
    kinds = r"(weight|bias|running_mean|running_var)"
    ours = "backbone.bottom_up."
    rules = [
        Rule(r"backbone\.conv1\.weight", f"{ours}stem.conv1.weight"),
        Rule(rf"backbone\.bn1\.{kinds}", rf"{ours}stem.conv1.norm.\1"),
    ]
    for i in range(1, 5):
        theirs, block = rf"backbone\.layer{i}\.(\d+)", rf"{ours}res{i + 1}.\1"
        rules += [
            Rule(rf"{theirs}\.conv(\d)\.weight", rf"{block}.conv\2.weight"),
            Rule(rf"{theirs}\.bn(\d)\.{kinds}", rf"{block}.conv\2.norm.\3"),
            Rule(rf"{theirs}\.downsample\.0\.weight", rf"{block}.shortcut.weight"),
            Rule(rf"{theirs}\.downsample\.1\.{kinds}", rf"{block}.shortcut.norm.\2"),
        ]
    return rules


def mmdet_rules() -> List[Rule]:
    """
    Return the rules for all names of these models. Classes keep their order, because background is
    the last class in both projects.
    """
    rpn, box, mask = "proposal_generator.rpn_head.", "roi_heads.box_", "roi_heads.mask_head."
    layers = {
        "rpn_head.rpn_conv": f"{rpn}conv",
        "rpn_head.rpn_cls": f"{rpn}objectness_logits",
        "rpn_head.rpn_reg": f"{rpn}anchor_deltas",
        "roi_head.bbox_head.fc_cls": f"{box}predictor.cls_score",
        "roi_head.bbox_head.fc_reg": f"{box}predictor.bbox_pred",
        "roi_head.mask_head.upsample": f"{mask}deconv",
        "roi_head.mask_head.conv_logits": f"{mask}predictor",
    }
    modules = {}  # a conv and perhaps a norm
    for i in range(10):
        # The finest level has index 0; in the bottom-up path, the step from N2 to N3.
        modules[f"neck.lateral_convs.{i}"] = f"backbone.fpn_lateral{i + 2}"
        modules[f"neck.fpn_convs.{i}"] = f"backbone.fpn_output{i + 2}"
        modules[f"neck.downsample_convs.{i}"] = f"backbone.pafpn_downsample{i + 3}"
        modules[f"neck.pafpn_convs.{i}"] = f"backbone.pafpn_output{i + 3}"
        modules[f"roi_head.mask_head.convs.{i}"] = f"{mask}mask_fcn{i + 1}"
        layers[f"roi_head.bbox_head.shared_fcs.{i}"] = f"{box}head.fc{i + 1}"
    layers.update((f"{theirs}.conv", ours) for theirs, ours in modules.items())
    norms = r"(?:gn|bn)\.(weight|bias|running_mean|running_var)"
    return [
        Rule(r".*\.num_batches_tracked", None, note="a frozen norm counts no batches"),
        *_resnet(),
        *(
            Rule(rf"{re.escape(theirs)}\.(weight|bias)", rf"{ours}.\1")
            for theirs, ours in layers.items()
        ),
        *(
            Rule(rf"{re.escape(theirs)}\.{norms}", rf"{ours}.norm.\1")
            for theirs, ours in modules.items()
        ),
    ]
