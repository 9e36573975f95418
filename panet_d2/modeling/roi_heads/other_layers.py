"""Remove heads from a checkpoint whose layers have another position in the model."""

from __future__ import annotations

import logging
import re
from typing import Any, Dict, Mapping, MutableMapping

logger = logging.getLogger("panet_d2")

_ADAPTATION = re.compile(r"(.*(?:box|mask|keypoint))_pooler\.adaptation_layers\.weight")


def drop_other_layers(checkpoint: MutableMapping[str, Any], model: Mapping[str, Any]) -> None:
    """
    Remove heads from a checkpoint whose adaptation layers are of another kind than the model's, or
    that only one of them has. The adaptation layer replaces the head's first layer. Therefore
    "mask_fcn1" is the first conv of Mask R-CNN's mask head, but the second of PANet's. A warning
    names the heads.

    Args:
        checkpoint (dict[str, Tensor]): weights by name, changed in place.
        model (dict[str, Tensor]): the model's state dict.
    """
    theirs, ours = _adaptations(checkpoint), _adaptations(model)
    heads = []
    for branch in sorted(theirs.keys() | ours.keys()):
        layers = [name for name in checkpoint if name.startswith(f"{branch}_head.")]
        if layers and theirs.get(branch) != ours.get(branch):
            heads.append(f"{branch}_head")
            for name in layers:
                del checkpoint[name]
    if heads:
        logger.warning(
            "%s: the layers of the checkpoint are other layers of this model, because their "
            "adaptation layers (AFP) differ. They are not loaded. tools/convert_weights.py "
            "mask-rcnn makes a start for PANet from a Mask R-CNN.",
            ", ".join(heads),
        )


def _adaptations(weights: Mapping[str, Any]) -> Dict[str, int]:
    """
    Return the kind of the adaptation layers of each branch, such as "roi_heads.mask": the number of
    dimensions of their weights.
    """
    matches = ((_ADAPTATION.fullmatch(name), value) for name, value in weights.items())
    return {match[1]: value.ndim for match, value in matches if match}
