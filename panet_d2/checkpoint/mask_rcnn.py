"""Start a PANet from the weights of a Detectron2 Mask R-CNN with FPN."""

from __future__ import annotations

import re
from typing import Tuple

import torch
from torch import nn

from ..errors import CheckpointError
from .rules import Conversion, Tensors

# The adaptation layer replaces the first of these layers of a head. The key has the number of
# dimensions of the weight: 4 for a conv, 2 for an fc layer.
_STEMS = {
    ("box", 4): "roi_heads.box_head.conv",
    ("box", 2): "roi_heads.box_head.fc",
    ("mask", 4): "roi_heads.mask_head.mask_fcn",
    ("keypoint", 4): "roi_heads.keypoint_head.conv_fcn",
}
# The layers of the RPN whose width is the number of anchors at a position.
_OF_ANCHORS = tuple(
    f"proposal_generator.rpn_head.{n}." for n in ("objectness_logits", "anchor_deltas")
)
_STAGED = re.compile(r"(roi_heads\.box_(?:head|predictor)\.)(\d+)\.(.+)")  # of a cascade
_SMALL = 0.01  # not 0, where a ReLU has no gradient
_GROUPS = 32  # of Detectron2's GroupNorm


def warm_start(source: Tensors, model: Tensors, fc_relu: bool = False) -> Conversion:
    """
    Start a PANet from the weights of a Mask R-CNN with FPN.

    Tensors of the same name keep their values. The first layer of each head with adaptive feature
    pooling is copied into every level's adaptation layer, and the head's other layers move up by
    one. New layers start with little effect:

    - In the bottom-up path, each second conv is the identity and each first conv is scaled to a
      hundredth. N(i) is then close to P(i), or to its positive part if a ReLU follows. A GroupNorm
      after the second conv starts with the scale and shift that restore P(i).
    - The linear layer of fully-connected fusion is zero, so the masks are those of the FCN path.
      The layer learns, because its input is not zero.

    The stages of a cascade share the adaptation layers, which start from the first layer of the
    first stage. Without stages, a Mask R-CNN's box head starts every stage.

    The RPN's predictor starts from scratch if the model has another number of anchors at each
    position.

    The box heads do not match if only one of them begins with convs, because layers of the same
    name then read different inputs. In this case, the PANet's box head trains from scratch.

    Args:
        source (dict[str, Tensor]): weights of the Mask R-CNN, by Detectron2's names.
        model (dict[str, Tensor]): the PANet's state dict, with its initial values.
        fc_relu (bool): whether a ReLU follows the linear layer. Its bias is then 0.01.

    Returns:
        Conversion: the weights, and the account of every tensor of both models.

    Raises:
        CheckpointError: if the source is not a Mask R-CNN with FPN, or its architecture is not the
            model's.
    """
    if not any(name.startswith("backbone.fpn_lateral") for name in source):
        raise CheckpointError(
            "not a Detectron2 Mask R-CNN with FPN; no name starts with backbone.fpn_lateral."
        )
    if any("_pooler.adaptation_layers." in name for name in source):
        raise CheckpointError(
            "not a Mask R-CNN, but a PANet, which has adaptation layers; give it to MODEL.WEIGHTS."
        )
    # Names of the adaptation layers, by the names of the head's layers in _STEMS.
    pattern = r"(roi_heads\.(\w+)_pooler\.adaptation_layers)\.weight"
    matches = filter(None, (re.fullmatch(pattern, name) for name in model))
    adaptations = {_STEMS[m[2], model[m[0]].dim()]: m[1] for m in matches}
    convs = _STEMS["box", 4]
    first_convs = f"{convs}1.weight"
    begins_with_convs = convs in adaptations or any(_plain(n) == first_convs for n in model)
    other_box_head = begins_with_convs != any(_plain(n) == first_convs for n in source)
    stages = sorted({match[2] for match in map(_STAGED.fullmatch, model) if match})
    result = Conversion()
    for name, tensor in source.items():
        staged = _STAGED.fullmatch(name)
        stage = staged[2] if staged else ""
        if stage > "0" and not stages:
            result.leave_out(name, tensor, "a later stage of a cascade")
            continue
        if other_box_head and name.startswith("roi_heads.box_"):
            result.leave_out(name, tensor, "another kind of box head")
            continue
        target = _plain(name)
        match = re.fullmatch(r"(.+?)(\d+)\.((?:norm\.)?\w+)", target)
        if match and match[1] in adaptations:
            stem, number, rest = match.groups()
            if number == "1" and stage > "0":
                result.leave_out(name, tensor, "the stages share the adaptation layers")
                continue
            if number == "1":
                layer = f"{adaptations[stem]}.{rest}"
                if tensor.dim() and layer in model:
                    tensor = torch.cat([tensor] * (len(model[layer]) // max(1, len(tensor))))
                result.put("copied", name, layer, tensor, "into every level")
                continue
            target = f"{stem}{int(number) - 1}.{rest}"
        targets = [target]
        if stages and target.startswith(("roi_heads.box_head.", "roi_heads.box_predictor.")):
            into = [stage] if stage else stages
            targets = [re.sub(r"(box_(?:head|predictor)\.)", rf"\g<1>{s}.", target) for s in into]
        for target in targets:
            ours = model.get(target)
            if ours is None and not name.startswith("backbone."):
                result.leave_out(name, tensor, "PANet has no such layer")
                continue
            what = "classes" if "predictor" in target else "anchors"
            may_differ = what == "classes" or target.startswith(_OF_ANCHORS)
            if ours is not None and may_differ and tensor.shape != ours.shape:
                if "bbox_pred" in target:
                    what += ", or of boxes for each class"
                if target == targets[0]:
                    shape = "x".join(map(str, ours.shape))
                    result.leave_out(name, tensor, f"another number of {what}, {shape}")
            else:
                result.put("carried", name, target, tensor)
    may_be_new = [
        name
        for name in model
        if name.startswith(("backbone.pafpn_", "roi_heads."))
        or (name.startswith(_OF_ANCHORS) and name in source)
    ]
    new = [n for n in may_be_new if n not in result.state]
    result.check(model, new)
    for name in new:
        result.put("initialized", "", name, *_start(name, model, result.state, fc_relu))
    return result


def _plain(name: str) -> str:
    """Return the name of a layer without the stage of a cascade."""
    return _STAGED.sub(r"\1\3", name)


def _start(name: str, model: Tensors, donor: Tensors, fc_relu: bool) -> Tuple[torch.Tensor, str]:
    """Return the initial value of a tensor that the Mask R-CNN does not have, and a note."""
    value = model[name]
    match = re.fullmatch(r"(backbone\.pafpn_(\w+)(\d)\.)(norm\.)?(weight|bias)", name)
    if match:
        layer, step, level, norm, kind = match.groups()
        has_norm = f"{layer}norm.weight" in model
        if step == "output" and norm and f"{layer}norm.running_mean" not in model:
            return _restoring_norm(level, kind, donor), "restores what the norm removes"
        if step == "output" and not norm and kind == "weight":
            return nn.init.dirac_(torch.empty_like(value)), "the identity"
        # A norm cancels the scale of the conv before it, so the norm's scale is set instead.
        if step == "downsample" and kind == "weight" and bool(norm) == has_norm:
            return _SMALL * value, "a hundredth of its initial value"
    if name.endswith("fc_fusion.fc.weight"):
        return torch.zeros_like(value), "adds nothing to the masks"
    if name.endswith("fc_fusion.fc.bias"):
        return torch.full_like(value, _SMALL if fc_relu else 0.0), "adds nothing to the masks"
    return value, "as for training from scratch"


def _restoring_norm(level: str, kind: str, donor: Tensors) -> torch.Tensor:
    """Return the weight or bias of N(i)'s GroupNorm that restores the spread or mean of P(i)."""
    fpn = f"backbone.fpn_output{level}.norm"
    scale, shift = (donor[f"{fpn}.{k}"].view(_GROUPS, -1) for k in ("weight", "bias"))
    # The norm sets each group of channels to mean 0 and variance 1. P(i) comes out of a GroupNorm
    # too, so its mean and spread follow from that norm's scale and shift.
    mean = shift.mean(dim=1, keepdim=True)
    spread = (scale.square() + (shift - mean).square()).mean(dim=1, keepdim=True).sqrt()
    return (spread if kind == "weight" else mean).expand_as(shift).reshape(-1)
