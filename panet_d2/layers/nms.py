"""Suppression of duplicate boxes beside plain NMS: Soft-NMS and box voting."""

from __future__ import annotations

from typing import Tuple

import torch
from detectron2.structures import Boxes, pairwise_iou

SOFT_NMS_METHODS = ("linear", "gaussian")
VOTING_SCORES = ("id", "avg", "temp_avg")


def soft_nms(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    classes: torch.Tensor,
    *,
    method: str = "linear",
    iou_threshold: float = 0.5,
    sigma: float = 0.5,
    score_threshold: float = 0.001,
    limit: int = -1,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """
    Soft-NMS (Bodla et al., ICCV 2017). The box with the highest score is taken, the scores of the
    other boxes of its class are multiplied by a factor that decreases with their IoU with this box,
    and so on.

    Args:
        boxes (Tensor): shape (N, 4), x0, y0, x1, y1.
        scores (Tensor): shape (N,), from 0 to 1.
        classes (Tensor): shape (N,). Boxes of different classes do not affect each other.
        method (str): the factor. "linear": 1 - IoU, if the IoU is above ``iou_threshold``;
            "gaussian": exp(-IoU² / ``sigma``).
        score_threshold (float): leave out boxes whose score is not higher in the end.
        limit (int): take at most this many boxes; -1 for all. Time grows with their number.

    Returns:
        tuple[Tensor, Tensor]: indices of the boxes that are left, in the order of their new scores,
        and these scores. Of equal scores, the first in ``scores`` is taken first.

    Raises:
        ValueError: if a score is NaN, or for another ``method``.
    """
    if method not in SOFT_NMS_METHODS:
        raise ValueError(f"method is {method!r}; it must be one of {', '.join(SOFT_NMS_METHODS)}.")
    left = _check_scores(scores).clone()
    count = len(left) if limit < 0 else min(limit, len(left))
    keep = classes.new_zeros(count, dtype=torch.long)
    kept_scores = left.new_zeros(count)
    all_boxes = Boxes(boxes.float())
    # No value is copied to the host, so a GPU does not have to wait.
    for k in range(count):
        best = left.argmax().unsqueeze(0)
        keep[k], kept_scores[k] = best[0], left[best][0]
        iou = pairwise_iou(all_boxes[best], all_boxes)[0]
        if method == "linear":
            factor = torch.where(iou > iou_threshold, 1 - iou, 1)
        else:
            factor = torch.exp(-(iou**2) / sigma)
        left = torch.where(classes == classes[best], left * factor, left)
        left[best] = -1
    high = kept_scores > score_threshold
    return keep[high], kept_scores[high]


def box_voting(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    classes: torch.Tensor,
    keep: torch.Tensor,
    kept_scores: torch.Tensor,
    *,
    iou_threshold: float = 0.8,
    method: str = "id",
    temperature: float = 1.0,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """
    Box voting (Gidaris and Komodakis, ICCV 2015). Each box that NMS has kept becomes the mean of
    all boxes of its class with a high IoU, itself among them, weighted by their scores.

    Args:
        boxes, scores, classes (Tensor): shapes (N, 4), (N,) and (N,); all boxes before NMS.
        keep (Tensor): shape (M,), indices of the boxes that NMS has kept.
        kept_scores (Tensor): shape (M,), their scores.
        iou_threshold (float): boxes vote from this IoU on.
        method (str): the new scores. "id": ``kept_scores``; "avg": the mean score of the boxes that
            vote; "temp_avg": the same after each has been smoothed, see ``temperature``.
        temperature (float): "temp_avg" divides the log-odds of each score by it.

    Returns:
        tuple[Tensor, Tensor]: boxes of shape (M, 4) and scores of shape (M,), in the order of
        ``keep``.

    Raises:
        ValueError: if a score is NaN, or for another ``method``.
    """
    if method not in VOTING_SCORES:
        raise ValueError(f"method is {method!r}; it must be one of {', '.join(VOTING_SCORES)}.")
    scores = _check_scores(scores)
    votes = pairwise_iou(Boxes(boxes[keep]), Boxes(boxes)) >= iou_threshold
    votes &= classes[keep][:, None] == classes
    # A box without an area has no IoU, not even with itself.
    votes[torch.arange(len(keep), device=keep.device), keep] = True
    weights = votes * scores
    # A score of 0 would leave nothing to divide by.
    weights = torch.where(weights.sum(dim=1, keepdim=True) > 0, weights, votes.to(weights.dtype))
    # In float64, which neither autocast nor TF32 shortens: half a pixel is lost at 1000 pixels.
    shares = weights.double() / weights.sum(dim=1, keepdim=True)
    new_boxes = (shares @ boxes.double()).to(weights.dtype)
    if method == "id":
        return new_boxes, kept_scores
    if method == "temp_avg":
        scores = torch.sigmoid(torch.logit(scores) / temperature)
    return new_boxes, (votes * scores).sum(dim=1) / votes.sum(dim=1)


def _check_scores(scores: torch.Tensor) -> torch.Tensor:
    """Return the scores as float32 at least."""
    if scores.isnan().any():
        raise ValueError("scores has NaN; leave out these boxes before.")
    return scores if scores.dtype == torch.float64 else scores.float()
