"""What the parts of a trained PANet contribute."""

from __future__ import annotations

from typing import Dict, Iterable, List, Tuple

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Boxes

from ..modeling import PANetMaskHead, adaptive_poolers

__all__ = ["level_shares", "mask_paths"]


@torch.no_grad()
def level_shares(
    model: GeneralizedRCNN, inputs: Iterable[List[dict]], proposals: int = 100
) -> Dict[str, torch.Tensor]:
    """
    Which level gives the features that the maximum over levels keeps; the paper's figure 3.

    Args:
        model (GeneralizedRCNN): a PANet whose poolers fuse by "max".
        inputs (iterable[list[dict]]): batches of images, as the model takes them for inference.
        proposals (int): how many of an image count, those of the highest objectness.

    Returns:
        dict[str, Tensor]: for each pooler of :func:`adaptive_poolers`, of shape (L, L + 1): for
        proposals that FPN's rule would send to level i, in row i, the share of features that come
        from each level, which sum up to 1 (or are nan where there are no such proposals); and in
        the last column how many proposals these were. Features that are 0 on all levels come from
        none and do not count.
    """
    poolers = {n: p for n, p in adaptive_poolers(model.roi_heads).items() if p.fusion == "max"}
    counts = {n: torch.zeros(len(p.scales), len(p.scales) + 1) for n, p in poolers.items()}
    model.eval()
    for batch in inputs:
        images = model.preprocess_image(batch)
        features = model.backbone(images.tensor)
        found, _ = model.proposal_generator(images, features)
        boxes = [p.proposal_boxes[:proposals] for p in found]
        maps = [features[f] for f in model.roi_heads.in_features]
        for name, pooler in poolers.items():
            levels = pooler.adapt(pooler.pool_levels(maps, boxes)).flatten(2)  # (L, M, ...)
            home = pooler.fpn_levels(boxes).cpu()
            value, winner = levels.max(dim=0)
            for level in range(len(levels)):
                wins = ((winner == level) & (value > 0)).sum(dim=1).float().cpu()
                counts[name][:, level].index_add_(0, home, wins)
            counts[name][:, -1] += torch.bincount(home, minlength=len(levels))
    for table in counts.values():
        table[:, :-1] /= table[:, :-1].sum(dim=1, keepdim=True)
    return counts


@torch.no_grad()
def mask_paths(
    model: GeneralizedRCNN, image: dict, boxes: torch.Tensor, classes: torch.Tensor
) -> Tuple[torch.Tensor, torch.Tensor]:
    """
    The mask logits of both paths of the mask head for given boxes.

    Args:
        model (GeneralizedRCNN): with a :class:`PANetMaskHead` that has fully-connected fusion.
        image (dict): one image, as the model takes it for inference.
        boxes (Tensor): shape (M, 4), x0, y0, x1, y1 in pixels of ``image["image"]``.
        classes (Tensor): shape (M,), index of each box's class.

    Returns:
        tuple[Tensor, Tensor]: the FCN path's logits and the fully-connected path's, each of shape
        (M, S, S). Their sum is what the model predicts.

    Raises:
        ValueError: if the model has no fully-connected path.
    """
    head = getattr(model.roi_heads, "mask_head", None)
    if not (isinstance(head, PANetMaskHead) and head.fc_fusion_on):
        raise ValueError("the model's mask head has no fully-connected path.")
    model.eval()
    features = model.backbone(model.preprocess_image([image]).tensor)
    maps = [features[f] for f in model.roi_heads.mask_in_features]
    fcn, fc = head.forward_paths(model.roi_heads.mask_pooler(maps, [Boxes(boxes)]))
    if fcn.shape[1] > 1:
        fcn = fcn[torch.arange(len(fcn)), classes]
    else:  # class-agnostic
        fcn = fcn[:, 0]
    return fcn, fc[:, 0]
