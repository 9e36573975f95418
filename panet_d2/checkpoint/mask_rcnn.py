"""A Detectron2 Mask R-CNN as the start of a PANet."""

from __future__ import annotations

import re
from typing import Dict, Optional, Tuple

import torch

from ..errors import CheckpointError
from .rules import Conversion, Tensors

__all__ = ["warm_start"]

# How the layers of each head are called, whose first one adaptation layers stand for: by the
# number of dimensions of the weight, which tells a conv from an fc.
_STEMS = {
    ("box", 4): "roi_heads.box_head.conv",
    ("box", 2): "roi_heads.box_head.fc",
    ("mask", 4): "roi_heads.mask_head.mask_fcn",
    ("keypoint", 4): "roi_heads.keypoint_head.conv_fcn",
}
# Small beside what it is added to, and not zero, behind which a ReLU would pass no gradient.
_WHISPER = 0.01
_GROUPS = 32  # of Detectron2's GroupNorm


def warm_start(source: Tensors, model: Tensors, fc_relu: bool = False) -> Conversion:
    """
    Carry a Mask R-CNN with FPN over into a PANet.

    What has the same name stays. The first layer of each head with adaptive feature pooling is
    copied into every level's adaptation layer, and the head's other layers move up by one. What is
    new starts so that it disturbs least:

    - in the bottom-up path, each second conv passes its input on, and each first one is scaled
      down to a hundredth, so that N(i) is P(i), or its positive part where a ReLU follows. A
      GroupNorm between them would undo P(i)'s scale, so it starts with what gives it back;
    - the linear layer of the fully-connected path is zero, so that the masks are the FCN path's.
      It learns all the same, since its input is not zero.

    A box head of fcs alone is no start for one that has convs in front of them, nor the other way
    round: layers of the same name have learned to read something else. It starts anew.

    Args:
        source (dict[str, Tensor]): weights of the Mask R-CNN, by Detectron2's names.
        model (dict[str, Tensor]): the PANet's state dict, with its initial values.
        fc_relu (bool): whether a ReLU follows that linear layer; then its bias is a little above
            zero instead.

    Returns:
        Conversion: whose account has every tensor of both sides.

    Raises:
        CheckpointError: if the source is not a Mask R-CNN with FPN that this PANet can start from.
    """
    if not any(name.startswith("backbone.fpn_lateral") for name in source):
        raise CheckpointError("it is not a Mask R-CNN with FPN by Detectron2's names.")
    adaptations = _adaptation_layers(model)
    result = Conversion()
    other_box_head = _begins_with_convs(source, {}) != _begins_with_convs(model, adaptations)
    for name, tensor in source.items():
        if other_box_head and name.startswith("roi_heads.box_"):
            result.leave_out(name, tensor, "another kind of box head")
            continue
        stem, number, rest = _numbered(name)
        if stem in adaptations and number == 1:
            layer = f"{adaptations[stem]}.{rest}"
            if tensor.dim() and layer in model:
                tensor = torch.cat([tensor] * (len(model[layer]) // max(1, len(tensor))))
            result.put("copied", name, layer, tensor, "into every level")
            continue
        target = f"{stem}{number - 1}.{rest}" if stem in adaptations else name
        if target not in model:
            if name.startswith("backbone."):
                raise CheckpointError(f"the model has no {name}: another architecture.")
            result.leave_out(name, tensor, "PANet has no such layer")
        elif model[target].shape == tensor.shape:
            result.put("carried", name, target, tensor)
        elif "predictor" in target:
            shape = "x".join(map(str, model[target].shape))
            result.leave_out(name, tensor, f"another number of classes, {shape}")
        else:
            raise CheckpointError(
                f"{name} is {tuple(tensor.shape)}, but the model's {target} is "
                f"{tuple(model[target].shape)}: another architecture."
            )
    for name, value in model.items():
        if name in result.state:
            continue
        if not name.startswith(("backbone.pafpn_", "roi_heads.")):
            raise CheckpointError(f"it has nothing for {name}: another architecture.")
        restored = _restoring_norm(name, result.state, model)
        result.put("initialised", "", name, *(restored or _start(name, value, model, fc_relu)))
    result.complete(model, lambda name: None)
    return result


def _adaptation_layers(model: Tensors) -> Dict[str, str]:
    """Stem of the head's layers -> name of the adaptation layers that stand for its first."""
    layers: Dict[str, str] = {}
    for name, value in model.items():
        match = re.fullmatch(r"(roi_heads\.(\w+)_pooler\.adaptation_layers)\.weight", name)
        if match:
            layers[_STEMS[match[2], value.dim()]] = match[1]
    return layers


def _begins_with_convs(state: Tensors, adaptations: Dict[str, str]) -> bool:
    """Whether the box head has convs in front of its fcs, or in the pooler instead of its first."""
    stem = _STEMS["box", 4]
    return stem in adaptations or f"{stem}1.weight" in state


def _numbered(name: str) -> Tuple[str, int, str]:
    """``roi_heads.box_head.fc2.weight`` -> stem, 2, ``weight``; else the name, 0, nothing."""
    match = re.fullmatch(r"(.+?)(\d+)\.((?:norm\.)?\w+)", name)
    if match and match[1] in _STEMS.values():
        return match[1], int(match[2]), match[3]
    return name, 0, ""


def _restoring_norm(
    name: str, state: Tensors, model: Tensors
) -> Optional[Tuple[torch.Tensor, str]]:
    """
    Scale and shift of the GroupNorm behind N(i) that give P(i) back the mean and spread that the
    norm takes from it, by group. P(i) comes out of a GroupNorm itself, so that they follow from
    that one's scale and shift.
    """
    match = re.fullmatch(r"backbone\.pafpn_output(\d)\.norm\.(weight|bias)", name)
    if not match or name.rsplit(".", 1)[0] + ".running_mean" in model:
        return None
    fpn = f"backbone.fpn_output{match[1]}.norm."
    scale, shift = (state[fpn + kind].view(_GROUPS, -1) for kind in ("weight", "bias"))
    mean = shift.mean(dim=1, keepdim=True)
    spread = (scale.square() + (shift - mean).square()).mean(dim=1, keepdim=True).sqrt()
    value = spread if match[2] == "weight" else mean
    return value.expand_as(shift).reshape(-1).clone(), "gives back what the norm takes"


def _start(
    name: str, value: torch.Tensor, model: Tensors, fc_relu: bool
) -> Tuple[torch.Tensor, str]:
    """The first value of a tensor that the donor has none for, and a word about it."""
    path: Optional[re.Match] = re.fullmatch(
        r"backbone\.pafpn_(downsample|output)\d\.(norm\.)?weight", name
    )
    if path and path[1] == "output" and not path[2]:
        identity = torch.zeros_like(value)
        centre = value.shape[-1] // 2
        channels = torch.arange(value.shape[0])
        identity[channels, channels, centre, centre] = 1.0
        return identity, "passes its input on"
    if path and path[1] == "downsample":
        # With a norm behind it, the conv's own scale does not matter; the norm's does.
        has_norm = name.replace(".weight", ".norm.weight") in model
        if path[2] or not has_norm:
            return _WHISPER * value, "a hundredth of its random start"
    if name.endswith("fc_fusion.fc.weight"):
        return torch.zeros_like(value), "adds nothing to the masks"
    if name.endswith("fc_fusion.fc.bias"):
        return torch.full_like(value, _WHISPER if fc_relu else 0.0), "adds nothing to the masks"
    return value, "as for training from scratch"
