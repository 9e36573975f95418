"""
Rules that plan classes, image sizes, anchors, detections and NMS from a dataset.

A rule takes the dataset's fingerprint, the config so far and the hardware. The rule returns the
keys that it decides, each with a value and a reason. A key that keeps its value has a reason, too.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Dict, List, NamedTuple, Tuple

import numpy as np
from detectron2.config import CfgNode
from detectron2.modeling import RetinaNet

from ..modeling.check_model import is_architecture, num_classes_node
from .anchors import anchor_overlaps, anchor_strides, scaled_sides, share_above
from .fingerprint import Fingerprint
from .hardware import Hardware


class Choice(NamedTuple):
    """A value of a config key, and the reason for it."""

    value: Any
    reason: str


Choices = Dict[str, Choice]

SMALL_SIDE = 24  # pixels to which small objects are enlarged: six cells of FPN's stride 4
SMALL = 0.1  # quantile: nine of ten objects are at least as large
_MOST_ENLARGED = 4  # beyond this, enlarging adds pixels but no information
# A smaller ratio of the edges must make objects larger by this factor.
_MUCH_LARGER = 1.1
_LARGER_AT_TEST = 2  # inference keeps no activations for gradients
_WORTH_CROPPING = 4 / 3  # test size over training size
_AUGMENTED = (0.75, 1, 1.5)  # test sizes of test-time augmentation over the test size
_GRID = 32  # FPN pads images to multiples of this
# Smaller anchors would be too far from objects that lie between two positions.
_STRIDES_PER_ANCHOR = 3
# Anchors change only if the share of objects with an IoU of 0.5 gains the first number, or if this
# share stays and the share with an IoU of 0.7 gains the second number.
_WORTH_IT = (0.01, 0.05)
# Below the first share of objects with an IoU of 0.5, more anchors are tried, up to the second.
# Detectron2's have 86 to 88 % of COCO's objects.
_COVERED = (0.84, 0.95)
# An anchor has an IoU of 0.5 with boxes of its area whose ratio is 0.44 to 2.25 times its own.
# Ratios a factor of 2 apart therefore leave no gap.
_MORE_RATIOS = [[0.25, 0.5, 1.0, 2.0, 4.0]]
_MOST_PROPOSALS = 4000  # unless three for each object are more
_LOST = 0.01  # share of objects that NMS may suppress


def get(cfg: CfgNode, key: str) -> Any:
    """Return the value of a config's full key."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def keep(cfg: CfgNode, reason: str, *keys: str) -> Choices:
    """Keep the values of keys, all for one reason."""
    return {key: Choice(get(cfg, key), reason) for key in keys}


def plan_classes(data: Fingerprint, cfg: CfgNode, hardware: Hardware) -> Choices:
    """The number of classes, and whether there are masks."""
    node = num_classes_node(cfg) or "ROI_HEADS"
    choices = {
        f"MODEL.{node}.NUM_CLASSES": Choice(len(data.categories), "categories of the data"),
    }
    if cfg.MODEL.MASK_ON and len(data.boxes) and not data.masks.keys() - {"none"}:
        choices["MODEL.MASK_ON"] = Choice(False, "the data has no masks")
    return choices


def plan_scale(data: Fingerprint, cfg: CfgNode, hardware: Hardware) -> Choices:
    """Image sizes at which small objects are large enough for stride 4, within the budget."""
    node, name = cfg.INPUT, "INPUT."
    keys = [name + key for key in ("MIN_SIZE_TEST", "MIN_SIZE_TRAIN")]
    doubt = data.doubt()
    if doubt:
        return keep(cfg, doubt, *keys)
    small = float(np.quantile(data.relative_sides, SMALL))
    median = float(np.median(data.short_edges))
    before = node.MIN_SIZE_TEST or median
    needed = min(SMALL_SIDE / small, _MOST_ENLARGED * median)
    # Not smaller than the base's, because larger images cost nothing but time.
    wanted = max(needed, before)
    ratio = node.MAX_SIZE_TEST / node.MIN_SIZE_TEST if node.MIN_SIZE_TEST else 1
    budget = hardware.megapixels(cfg) * 1e6

    def fitting(ratio: float) -> int:
        """The shorter edge with which the images of this ratio have the budget."""
        longest = min(ratio, float(data.elongations.max()))
        return max(int(np.sqrt(budget / longest)) // _GRID * _GRID, _GRID)

    def scale(ratio: float) -> float:
        """The mean scale of the objects, up to a factor. Images above the ratio shrink."""
        shrunk = np.minimum(1, ratio / data.elongations[data.images])
        return np.log(min(wanted, fitting(ratio)) * shrunk).mean()

    # A few panoramas would make all images small, so they shrink alone if that gains much.
    *others, most = (max(ratio, float(np.quantile(data.elongations, q))) for q in (0.5, 0.75, 0.95))
    best = max(others, key=scale)
    ratio = best if scale(best) > scale(most) + np.log(_MUCH_LARGER) else most
    longest, fits = min(ratio, float(data.elongations.max())), fitting(ratio)
    train = test = min(int(np.ceil(wanted / _GRID)) * _GRID, fits)
    choices: Choices = {}
    reason = ""
    if wanted > fits:
        reason = f"; {wanted:.0f} would be better, but {hardware.budget_source(cfg)}"
        larger = min(round(needed) // _GRID * _GRID, _LARGER_AT_TEST * fits)
        # Not of images that only enlarging takes above the budget: that gained nothing on nuclei.
        if median**2 * longest > budget and larger >= _WORTH_CROPPING * fits:
            choices = _plan_crop(data, cfg, fits / larger)
            test = larger if choices["INPUT.CROP.ENABLED"].value else fits
            reason += "; see also sliced inference, on tiles of the image"
    effect = f"a tenth of the objects is below {small * test:.0f} px"
    if test != before:
        effect += f", with the base's {before:.0f} below {small * before:.0f} px"
    choices[keys[0]] = Choice(test, effect + reason)
    times = f"{ratio:.2f} times the shorter edge"
    choices["TEST.AUG.MIN_SIZES"] = Choice(
        [round(scale * test) for scale in _AUGMENTED],
        "for test-time augmentation, if it is enabled",
    )
    choices["INPUT.MAX_SIZE_TEST"] = Choice(round(test * ratio), times)
    sizes = [s / (node.MIN_SIZE_TEST or s) * train for s in node.MIN_SIZE_TRAIN if s] or [train]
    sizes = [max(round(s / _GRID) * _GRID, _GRID) for s in sizes]
    if node.MIN_SIZE_TRAIN_SAMPLING == "choice":
        sizes = list(dict.fromkeys(sizes))
    choices[keys[1]] = Choice(sizes, "as the test size, in the proportions of the base")
    choices["INPUT.MAX_SIZE_TRAIN"] = Choice(round(train * ratio), times)
    return choices


def _plan_crop(data: Fingerprint, cfg: CfgNode, share: float) -> Choices:
    """Crops of a share of the image's height and width, which show objects at the test scale."""
    key = "INPUT.CROP.ENABLED"
    if data.masks.get("polygon") and importlib.util.find_spec("shapely") is None:
        return keep(cfg, "polygons need the package shapely to be cropped", key)
    return {
        key: Choice(True, "the images are larger than the budget of pixels"),
        "INPUT.CROP.TYPE": Choice("relative", "a share of height and width"),
        "INPUT.CROP.SIZE": Choice([round(share, 2)] * 2, "objects have the test size in a crop"),
    }


def plan_anchors(data: Fingerprint, cfg: CfgNode, hardware: Hardware) -> Choices:
    """Anchor sizes and aspect ratios from the boxes at the planned scale."""
    keys = [f"MODEL.ANCHOR_GENERATOR.{key}" for key in ("SIZES", "ASPECT_RATIOS")]
    strides, doubt = anchor_strides(cfg), data.doubt()
    if strides is None or len(strides) < 2:
        doubt = "only anchors on several levels of an FPN are planned"
    if doubt or strides is None:
        return keep(cfg, doubt, *keys)
    sides, sizes = scaled_sides(cfg, data), cfg.MODEL.ANCHOR_GENERATOR.SIZES
    count = len(sizes[0]) if isinstance(sizes[0], (list, tuple)) else len(sizes)
    ratios = [[round(float(r), 2) for r in np.quantile(data.aspect_ratios, [1 / 6, 1 / 2, 5 / 6])]]
    own_ratios = len(np.ravel(get(cfg, keys[1]))) != 3  # a user's choice
    if own_ratios or len(set(ratios[0])) != 3:
        ratios = get(cfg, keys[1])
    trial, choices = cfg.clone(), {}
    before = _shares(trial, data)
    for key, value in zip(keys, (_sizes(sides, count, strides), ratios)):
        trial.merge_from_list([key, value])
        after = _shares(trial, data)
        reason = f"IoU of 0.5, 0.7 for {after[0]:.1%}, {after[1]:.1%} of the objects at this scale"
        gains = after[0] - before[0], after[1] - before[1]
        if gains[0] >= _WORTH_IT[0] or (gains[0] > -_WORTH_IT[0] and gains[1] >= _WORTH_IT[1]):
            reason += f"; with the base's {before[0]:.1%}, {before[1]:.1%}"
            choices[key] = Choice(value, reason)
            before = after
        else:
            trial.merge_from_list([key, get(cfg, key)])
            reason = f"values from the boxes, {value}, gain little: {reason}"
            choices.update(keep(cfg, reason, key))
    if before[0] >= _COVERED[0]:
        return choices
    more: List[Dict[str, Any]] = [{keys[0]: _sizes(sides, max(count, 2), strides)}]
    if not own_ratios:
        more += [{keys[1]: _MORE_RATIOS}, {**more[0], keys[1]: _MORE_RATIOS}]
    return {**choices, **_more_anchors(trial, data, before[0], more)}


def _more_anchors(
    cfg: CfgNode, data: Fingerprint, before: float, steps: List[Dict[str, Any]]
) -> Choices:
    """
    Return the first of the values in ``steps`` with which enough objects have an anchor, or else
    the last. Return none if they gain little over the share ``before`` of the config.
    """
    for step in steps:
        trial = cfg.clone()
        trial.merge_from_list([part for choice in step.items() for part in choice])
        after = _shares(trial, data)[0]
        if after >= _COVERED[1]:
            break
    if after - before < _WORTH_IT[1]:
        return {}
    reason = (
        f"IoU of 0.5 for {after:.1%} of the objects, with fewer anchors {before:.1%}; weights of "
        "the RPN for other anchors do not fit"
    )
    return {key: Choice(value, reason) for key, value in step.items()}


def _shares(cfg: CfgNode, data: Fingerprint) -> Tuple[float, float]:
    overlaps = anchor_overlaps(cfg, data)
    assert overlaps is not None  # plan_anchors has checked the strides
    return share_above(overlaps, 0.5), share_above(overlaps, 0.7)


def _sizes(sides: np.ndarray, count: int, strides: List[int]) -> List[List[int]]:
    """
    Return anchor sizes, ``count`` for each level, for objects of given sides.

    An anchor has an IoU of 0.5 with squares whose side is the anchor's, times or divided by the
    root of 2. Sizes a factor of 2 apart therefore leave no gap. The sizes of one level and the next
    are at least a factor of 2 apart, starting at the smallest objects. If the largest objects are
    out of reach, the sizes start higher, but nine of ten objects keep an anchor.
    """
    smallest, small, large = np.quantile(sides, [0.05, SMALL, 0.98])
    root, steps = 2**0.5, len(strides) * count - 1
    finest = _STRIDES_PER_ANCHOR * strides[0]
    low = max(smallest, large / root / 2**steps)
    low = round(float(max(min(low, root * small), finest)))  # so that the sizes double exactly
    step = max((large / root / low) ** (1 / steps), 2 ** (1 / count))
    sizes = [round(float(low * step**i)) for i in range(steps + 1)]
    return [sizes[i : i + count] for i in range(0, len(sizes), count)]


def plan_detections(data: Fingerprint, cfg: CfgNode, hardware: Hardware) -> Choices:
    """Numbers of proposals, samples and detections that crowded images need."""
    counts = data.objects_per_image
    most = int(counts.max(initial=0))
    if not most:
        return keep(cfg, data.doubt(), "TEST.DETECTIONS_PER_IMAGE")
    evaluated = max(most, data.most_at_test)
    detections = max(100, -(-int(evaluated * 1.05) // 100) * 100)
    choices = {
        "TEST.DETECTIONS_PER_IMAGE": Choice(detections, f"up to {evaluated} objects in an image"),
    }
    if is_architecture(cfg, RetinaNet):
        return choices
    # Detectron2's 1000 are ten for each object of COCO's fullest image. In training, three are
    # enough to sample from.
    at_test = max(3, min(10, _MOST_PROPOSALS // evaluated))
    for split, fullest, each in (("TRAIN", most, 3), ("TEST", evaluated, at_test)):
        proposals = -(-each * fullest // 100) * 100
        after, before = f"MODEL.RPN.POST_NMS_TOPK_{split}", f"MODEL.RPN.PRE_NMS_TOPK_{split}"
        if proposals > get(cfg, after):
            choices[after] = Choice(proposals, f"{each} for each object of the fullest image")
        least = 2 * choices.get(after, Choice(0, "")).value
        if least > get(cfg, before):
            choices[before] = Choice(least, "twice the proposals, because most can be on one level")
    usual = int(np.quantile(counts, 0.75))
    for node in ("RPN", "ROI_HEADS"):
        key = f"MODEL.{node}.BATCH_SIZE_PER_IMAGE"
        batch = get(cfg, key)
        while batch * cfg.MODEL[node].POSITIVE_FRACTION < usual and batch < 1024:
            batch *= 2
        if batch != get(cfg, key):
            room = int(batch * cfg.MODEL[node].POSITIVE_FRACTION)
            reason = f"the positive part has room for {usual} objects, enough for 3 of 4 images"
            if room < usual:
                reason = f"room for {room} objects; a quarter of the images have {usual} or more"
            choices[key] = Choice(batch, reason)
    return choices


def plan_nms(data: Fingerprint, cfg: CfgNode, hardware: Hardware) -> Choices:
    """NMS thresholds above the overlaps of neighbours."""
    if is_architecture(cfg, RetinaNet):
        keys = {"MODEL.RETINANET.NMS_THRESH_TEST": (data.class_overlaps, 0.7)}
    else:
        keys = {
            "MODEL.RPN.NMS_THRESH": (data.overlaps, 0.9),
            "MODEL.ROI_HEADS.NMS_THRESH_TEST": (data.class_overlaps, 0.7),
        }
    choices = {}
    for key, (overlaps, highest) in keys.items():
        threshold = before = get(cfg, key)
        lost = [share_above(overlaps, threshold)]
        while lost[-1] > _LOST and threshold + 0.05 <= highest + 1e-9:
            threshold = round(threshold + 0.05, 2)
            lost.append(share_above(overlaps, threshold))
        if threshold == before:
            choices.update(keep(cfg, f"NMS suppresses {lost[0]:.1%} of the objects", key))
        else:
            reason = (
                f"objects that overlap more are lost: {lost[-1]:.1%}; at {before}, {lost[0]:.1%}"
            )
            choices[key] = Choice(threshold, reason)
    return choices
