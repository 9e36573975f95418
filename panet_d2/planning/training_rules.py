"""Rules that plan masks, sampling and schedule; see :mod:`panet_d2.planning.rules`."""

from __future__ import annotations

import numpy as np
from detectron2.config import CfgNode

from .anchors import scaled_sides
from .fingerprint import Fingerprint
from .hardware import Hardware
from .rules import Choice, Choices, keep

# Detectron2's 1x schedule: 90000 steps of 16 images of COCO train2017.
_COCO_IMAGES, _COCO_PASSES = 118287, 12
_MOST_PASSES = 150
_STEPS = (2 / 3, 8 / 9)  # of the schedule, where the learning rate falls
_EVALUATIONS = 10
_FEW_IMAGES = 10  # images of a class in fewer images are repeated
_RARE = 0.001  # LVIS's threshold
_FINE_CORNERS = 12
_PIXELS_PER_CELL = 8  # of an object, per cell of its mask


def plan_masks(data: Fingerprint, cfg: CfgNode, hardware: Hardware) -> Choices:
    """The encoding of the masks, and the resolution of the mask head."""
    if not cfg.MODEL.MASK_ON or not data.masks.keys() - {"none"}:
        return {}
    rle, polygons = data.masks.get("rle", 0), data.masks.get("polygon", 0)
    text = " and ".join(f"{n} in {kind}" for n, kind in ((rle, "RLE"), (polygons, "polygons")) if n)
    choices = {"INPUT.MASK_FORMAT": Choice("bitmask" if rle else "polygon", f"masks: {text}")}
    key, head = "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", cfg.MODEL.ROI_MASK_HEAD
    side = float(np.quantile(scaled_sides(cfg, data), 0.75))
    fine = rle > polygons or data.corners >= _FINE_CORNERS
    needed = side > _PIXELS_PER_CELL * 2 * head.POOLER_RESOLUTION
    if data.doubt() or not (fine and needed):
        return choices
    reason = f"a quarter of the objects is above {side:.0f} px, with fine outlines"
    if head.NAME == "PANetMaskHead" and head.FC_FUSION.ENABLED:
        reason += "; not raised, because fully-connected fusion would be 16 times as large"
        choices.update(keep(cfg, reason, key))
    else:
        choices[key] = Choice(2 * head.POOLER_RESOLUTION, reason)
    return choices


def plan_sampling(data: Fingerprint, cfg: CfgNode, hardware: Hardware) -> Choices:
    """Whether empty images are trained on, and whether images of rare classes are repeated."""
    empty, images = data.empty_share, len(data.sizes)
    keep_empty = 0.02 <= empty <= 0.5
    reason = f"{empty:.1%} of the images are empty" + (
        "; set True if they have objects without annotations" if keep_empty else ""
    )
    choices = {"DATALOADER.FILTER_EMPTY_ANNOTATIONS": Choice(not keep_empty, reason)}
    counts = data.images_per_class
    counts, threshold = counts[counts > 0], max(_RARE, _FEW_IMAGES / images)
    rare = int((counts < threshold * images).sum())
    sampler = "DATALOADER.SAMPLER_TRAIN"
    if not rare or counts.max() < 2 * counts.min():
        return {**choices, **keep(cfg, "no class is much rarer than the others", sampler)}
    if 2 * rare > len(counts):  # nearly all images would be repeated
        return {**choices, **keep(cfg, "most classes are rare", sampler)}
    reason = f"{rare} of {len(counts)} classes are rare"
    choices[sampler] = Choice("RepeatFactorTrainingSampler", reason)
    choices["DATALOADER.REPEAT_THRESHOLD"] = Choice(
        float(f"{threshold:.2g}"), "images of classes in a smaller share of the images are repeated"
    )
    return choices


def plan_schedule(data: Fingerprint, cfg: CfgNode, hardware: Hardware) -> Choices:
    """Batch, learning rate, schedule, evaluation and precision."""
    solver, images = cfg.SOLVER, len(data.sizes)
    if not cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        trained = images
    else:
        trained = int((data.objects_per_image > 0).sum())
    batch = hardware.batch(cfg)
    adamw = solver.OPTIMIZER == "ADAMW"
    factor = (batch / solver.IMS_PER_BATCH) ** (0.5 if adamw else 1)
    rule = "scaled by the root of the batch, for AdamW" if adamw else "scaled by the batch"
    choices = {
        "SOLVER.IMS_PER_BATCH": Choice(
            batch, f"{batch // hardware.gpus} on each GPU" if hardware.gpus else "on a CPU"
        ),
        "SOLVER.BASE_LR": Choice(float(f"{solver.BASE_LR * factor:.3g}"), f"the base's, {rule}"),
    }
    if hardware.gpus:
        choices["SOLVER.AMP.ENABLED"] = Choice(True, "half the memory on a GPU")
    else:
        choices["SOLVER.AMP.ENABLED"] = Choice(False, "no mixed precision on a CPU")
    if cfg.TEST.EXPECTED_RESULTS:
        choices["TEST.EXPECTED_RESULTS"] = Choice([], "the base's are for another dataset")
    periods = "SOLVER.MAX_ITER", "SOLVER.STEPS"
    if not trained or data.doubt():
        return {**choices, **keep(cfg, data.doubt() or "no images", *periods)}
    passes = _COCO_PASSES
    if hardware.gpus:
        passes = min(round(passes * max((_COCO_IMAGES / trained) ** 0.5, 1)), _MOST_PASSES)
    steps = _rounded(passes * trained / batch)
    reason = f"{passes} passes over {trained} images"
    if not hardware.gpus:
        reason += ", as Detectron2's 1x; small datasets gain from more, which a GPU gets"
    choices["SOLVER.MAX_ITER"] = Choice(steps, reason)
    falls = [_rounded(s * steps) for s in _STEPS] if solver.STEPS else []
    choices["SOLVER.STEPS"] = Choice(
        sorted({s for s in falls if 0 < s < steps}), "at 2/3 and 8/9, as Detectron2's 1x"
    )
    choices["SOLVER.WARMUP_ITERS"] = Choice(
        min(1000, steps // 10), "a tenth of the schedule, at most 1000"
    )
    period = max(steps // _EVALUATIONS, 1)
    choices["SOLVER.CHECKPOINT_PERIOD"] = Choice(period, "a tenth of the schedule")
    evaluated = bool(cfg.DATASETS.TEST)
    choices["TEST.EVAL_PERIOD"] = Choice(
        period if evaluated else 0, "a tenth of the schedule" if evaluated else "no validation data"
    )
    return choices


def _rounded(value: float) -> int:
    """Round to two significant digits, at least 1."""
    return max(int(float(f"{value:.2g}")), 1)
