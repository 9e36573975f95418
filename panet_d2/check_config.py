"""
Check config values before anything is built. Detectron2 checks the type of most values, and its
builders check some of the rest. Other wrong values fail hours later, or have another effect than
their key says.
"""

from __future__ import annotations

import fnmatch
import math
from functools import cache
from typing import Any, Callable, Container, Dict, Iterator, NamedTuple, Optional, Tuple

from detectron2.config import CfgNode, get_cfg

from .config import add_panet_config
from .errors import ConfigError

# Number of channels for each INPUT.FORMAT: Detectron2's formats, and useful modes of Pillow.
CHANNELS = {"BGR": 3, "RGB": 3, "YUV-BT.601": 3, "HSV": 3, "LAB": 3, "YCbCr": 3}
CHANNELS.update({"L": 1, "RGBA": 4, "CMYK": 4})

_INTEGERS = 2**31  # NumPy's generators take no larger seed, and no array has as many rows


class Rule(NamedTuple):
    """A condition on a value: as a function, and as the words after "must be"."""

    accepts: Callable[[Any], bool]
    text: str


def _number(low: float, high: float = math.inf, whole: bool = False) -> Rule:
    kinds = (int,) if whole else (int, float)
    if whole and high == math.inf:
        high = _INTEGERS
    bounds = f"from {low:g} to {high:g}" if high < _INTEGERS else f"at least {low:g}"
    return Rule(
        # Rejects NaN and infinity, too.
        lambda v: type(v) in kinds and low <= v <= high and abs(v) < math.inf,
        f"a {'whole ' if whole else ''}number, {bounds}",
    )


def _whole(low: int, high: float = math.inf) -> Rule:
    return _number(low, high, whole=True)


def _choice(*values: Any) -> Rule:
    return Rule(
        lambda v: any(type(v) is type(x) and v == x for x in values),
        f"one of {', '.join(map(repr, values))}",
    )


def _list(rule: Rule, *lengths: int) -> Rule:
    count = " or ".join(map(str, lengths))
    return Rule(
        lambda v: (
            isinstance(v, (list, tuple))
            and (not lengths or len(v) in lengths)
            and all(map(rule.accepts, v))
        ),
        f"a list{f' of {count}' if lengths else ''}, each {rule.text}",
    )


def _filled(rule: Rule) -> Rule:
    return Rule(lambda v: rule.accepts(v) and len(v) > 0, f"{rule.text}; not empty")


def _or(first: Rule, second: Rule) -> Rule:
    return Rule(lambda v: first.accepts(v) or second.accepts(v), f"{first.text}, or {second.text}")


_POSITIVE = Rule(lambda v: type(v) in (int, float) and 0 < v < math.inf, "a number greater than 0")
_SHARE = _number(0, 1)
_SIZE = _whole(1)
_COUNT = _whole(0)
# Above the size of any real model. A mistyped number would take all memory before training fails.
_LAYERS = _whole(0, 200)
_WIDTH = _whole(1, 100_000)
_GRID = _whole(1, 1000)
_WEIGHT = _number(0)
_TEXTS = _list(Rule(lambda v: isinstance(v, str), "text"))
_NOTHING = Rule(lambda v: v is None, "None")
_BOX_LOSS = _choice("smooth_l1", "giou", "diou", "ciou")
_BOX_WEIGHTS = _list(_POSITIVE, 4, 5)  # 5 for rotated boxes
_ANGLE = _number(-360, 360)
_ANCHORS = _filled(_list(_or(_POSITIVE, _filled(_list(_POSITIVE)))))
_EXPECTED = Rule(
    lambda v: (
        isinstance(v, (list, tuple))
        and len(v) == 4
        and all(isinstance(x, str) for x in v[:2])
        and all(type(x) in (int, float) for x in v[2:])
    ),
    "(task, metric, value, tolerance), such as ['segm', 'AP', 35.0, 0.5]",
)

# The first pattern that matches a key decides. Detectron2's builders check the names of registered
# classes, because users add their own classes.
_RULES: Dict[str, Rule] = {
    "MODEL.PIXEL_MEAN": _filled(_list(_number(-math.inf))),
    "MODEL.PIXEL_STD": _filled(_list(_POSITIVE)),
    "MODEL.BACKBONE.FREEZE_AT": _whole(0, 5),
    "MODEL.ANCHOR_GENERATOR.SIZES": _ANCHORS,
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": _ANCHORS,
    "MODEL.ANCHOR_GENERATOR.ANGLES": _filled(_list(_or(_ANGLE, _filled(_list(_ANGLE))))),
    "MODEL.ANCHOR_GENERATOR.OFFSET": _SHARE,
    "MODEL.RPN.BOUNDARY_THRESH": _whole(-1),
    "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": _WEIGHT,
    "MODEL.RPN.CONV_DIMS": _list(_or(_choice(-1), _WIDTH)),
    "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": _filled(_list(_BOX_WEIGHTS)),
    "MODEL.ROI_BOX_CASCADE_HEAD.IOUS": _filled(_list(_SHARE)),
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": _filled(_list(_WIDTH)),
    "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE": _COUNT,
    "MODEL.RETINANET.PRIOR_PROB": Rule(
        lambda v: _SHARE.accepts(v) and 0 < v < 1, "a number between 0 and 1"
    ),
    "MODEL.RESNETS.DEPTH": _choice(18, 34, 50, 101, 152),
    "MODEL.RESNETS.RES5_DILATION": _choice(1, 2),
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": _list(_choice(True, False), 4),
    "MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT": _WEIGHT,
    "MODEL.*.NUM_CLASSES": _whole(0, 1_000_000),  # 0: from the dataset
    "MODEL.FPN.IN_FEATURES": _TEXTS,  # empty without FPN
    "MODEL.FPN.FUSE_TYPE": _choice("sum", "avg"),
    "MODEL.*.IN_FEATURES": _filled(_TEXTS),
    "MODEL.*.OUT_FEATURES": _filled(_TEXTS),
    "MODEL.*.IOU_THRESHOLDS": _filled(_list(_SHARE)),
    "MODEL.*.IOU_LABELS": _filled(_list(_choice(-1, 0, 1))),
    "MODEL.*.BBOX_REG_WEIGHTS": _BOX_WEIGHTS,
    "MODEL.*.BBOX_REG_LOSS_TYPE": _BOX_LOSS,
    "MODEL.*.POOLER_SAMPLING_RATIO": _whole(0, 1000),
    "MODEL.*.NUM_FC": _LAYERS,
    "MODEL.*.NUM_CONV*": _LAYERS,
    "MODEL.*.LR_FACTOR": _POSITIVE,
    "MODEL.*_DIM": _WIDTH,
    "MODEL.*_CHANNELS": _WIDTH,
    "MODEL.*RESOLUTION": _GRID,
    "MODEL.*_STRIDE": _GRID,
    "MODEL.*NUM_GROUPS": _WIDTH,
    "MODEL.*PER_GROUP": _WIDTH,
    "MODEL.*.NUM_KEYPOINTS": _WIDTH,
    "MODEL.*FED_LOSS_NUM_CLASSES": _WIDTH,
    "MODEL.*BATCH_SIZE_PER_IMAGE": _SIZE,
    "MODEL.*TOPK*": _SIZE,
    "MODEL.*FRACTION": _SHARE,
    "MODEL.*THRESH*": _SHARE,
    "MODEL.*ALPHA": _SHARE,
    "MODEL.*LOSS_WEIGHT": _WEIGHT,
    "MODEL.*BETA": _WEIGHT,
    "MODEL.*GAMMA": _WEIGHT,
    "MODEL.*POWER": _WEIGHT,
    "INPUT.FORMAT": _choice(*CHANNELS),
    "INPUT.MASK_FORMAT": _choice("polygon", "bitmask"),
    "INPUT.MIN_SIZE_TRAIN": _filled(_list(_COUNT)),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": _choice("choice", "range"),
    "INPUT.MIN_SIZE_TEST": _COUNT,  # 0: not resized
    "INPUT.MAX_SIZE_*": _SIZE,
    "INPUT.RANDOM_FLIP": _choice("none", "horizontal", "vertical"),
    "INPUT.CROP.TYPE": _choice("relative", "relative_range", "absolute", "absolute_range"),
    "INPUT.CROP.SIZE": _list(_POSITIVE, 2),
    "DATASETS.TRAIN": _TEXTS,
    "DATASETS.TEST": _TEXTS,
    "DATASETS.PROPOSAL_FILES_*": _TEXTS,
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_*": _SIZE,
    "DATALOADER.NUM_WORKERS": _whole(0, 1000),
    "DATALOADER.REPEAT_THRESHOLD": _WEIGHT,
    "SOLVER.MAX_ITER": _SIZE,
    "SOLVER.BASE_LR": _POSITIVE,
    "SOLVER.BASE_LR_END": _WEIGHT,
    "SOLVER.MOMENTUM": _SHARE,
    "SOLVER.WEIGHT_DECAY_BIAS": _or(_WEIGHT, _NOTHING),
    "SOLVER.WEIGHT_DECAY*": _WEIGHT,
    "SOLVER.GAMMA": _POSITIVE,
    "SOLVER.STEPS": _list(_SIZE),
    "SOLVER.NUM_DECAYS": _GRID,
    "SOLVER.WARMUP_FACTOR": _SHARE,
    "SOLVER.WARMUP_ITERS": _COUNT,
    "SOLVER.WARMUP_METHOD": _choice("constant", "linear"),
    "SOLVER.CHECKPOINT_PERIOD": _SIZE,
    "SOLVER.IMS_PER_BATCH": _WIDTH,
    "SOLVER.REFERENCE_WORLD_SIZE": _COUNT,
    "SOLVER.BIAS_LR_FACTOR": _WEIGHT,
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": _choice("value", "norm"),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": _POSITIVE,
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": _or(_POSITIVE, _choice(math.inf)),
    "TEST.EXPECTED_RESULTS": _list(_EXPECTED),
    "TEST.EVAL_PERIOD": _COUNT,
    "TEST.KEYPOINT_OKS_SIGMAS": _list(_POSITIVE),
    "TEST.DETECTIONS_PER_IMAGE": _or(_SIZE, _choice(-1)),  # -1: all
    "TEST.AUG.MIN_SIZES": _filled(_list(_SIZE)),
    "TEST.AUG.MAX_SIZE": _SIZE,
    "TEST.AUG.ROTATIONS": _list(_choice(90, 180, 270)),
    "TEST.AUG.ASPECT_RATIOS": _list(_POSITIVE),
    "TEST.AUG.BOX_SIZES": _list(_POSITIVE, 0, 2),
    "TEST.AUG.MERGE": _choice("nms", "wbf"),
    "TEST.AUG.MASKS": _choice("probabilities", "logits"),
    "TEST.PRECISE_BN.NUM_ITER": _SIZE,
    "TEST.SOFT_NMS.METHOD": _choice("linear", "gaussian"),
    "TEST.SOFT_NMS.SIGMA": _POSITIVE,
    "TEST.SOFT_NMS.SCORE_THRESH": _SHARE,
    "TEST.BOX_VOTING.THRESH": _SHARE,
    "TEST.BOX_VOTING.SCORES": _choice("id", "avg", "temp_avg"),
    "TEST.BOX_VOTING.TEMPERATURE": _POSITIVE,
    "SEED": _whole(-1),
    "VIS_PERIOD": _COUNT,
}


def flatten(
    node: CfgNode, prefix: str = "", leaves: Container[str] = ()
) -> Iterator[Tuple[str, Any]]:
    """Yield full key and value of every leaf; keys of ``leaves`` are leaves even with a dict."""
    for key, value in node.items():
        if isinstance(value, dict) and prefix + key not in leaves:
            yield from flatten(value, f"{prefix}{key}.", leaves)
        else:
            yield prefix + key, value


@cache
def _rules() -> Dict[str, Rule]:
    """Return the rule of every key of Detectron2 and of this package."""
    cfg = get_cfg()
    add_panet_config(cfg)
    rules = {}
    for key, default in flatten(cfg):
        rule = next((r for p, r in _RULES.items() if fnmatch.fnmatchcase(key, p)), None)
        rules[key] = rule or _like(default)
    return rules


def _like(default: Any) -> Rule:
    """Return the rule that yacs applies when it merges. Unlike yacs, the rule rejects None."""
    kinds = next((k for k in ((list, tuple), (int, float)) if type(default) in k), (type(default),))
    if type(default) is int:
        kinds = (int,)
    return Rule(lambda v: type(v) in kinds, f"of the type of its default, {default!r}")


def check_values(cfg: CfgNode) -> None:
    """
    Check every config value that can be checked without building anything.

    Args:
        cfg (CfgNode): the config. Keys that neither Detectron2 nor this package has are not
            checked.

    Raises:
        ConfigError: if a value is wrong. The message names the key, its value and what it must be.
    """
    rules = _rules()
    for key, value in flatten(cfg, leaves=rules):
        if key in rules and not rules[key].accepts(value):
            raise ConfigError(f"{key} is {value!r}; it must be {rules[key].text}.")
    for check in (_check_crop, _check_steps, _check_pixels, _check_box_sizes):
        problem = check(cfg)
        if problem:
            raise ConfigError(problem)


def _check_crop(cfg: CfgNode) -> Optional[str]:
    crop = cfg.INPUT.CROP
    rule = _list(_SIZE, 2)
    if crop.TYPE.startswith("relative"):
        rule = _list(Rule(lambda v: v <= 1, "a share of the image, from 0 to 1"), 2)
    if crop.ENABLED and not rule.accepts(crop.SIZE):
        return (
            f"INPUT.CROP.SIZE is {crop.SIZE!r}; with INPUT.CROP.TYPE {crop.TYPE!r} it must be "
            f"{rule.text}."
        )
    if crop.ENABLED and crop.TYPE == "absolute_range" and crop.SIZE[0] > crop.SIZE[1]:
        return f"INPUT.CROP.SIZE is {crop.SIZE!r}; the first must not be larger than the second."
    return None


def _check_steps(cfg: CfgNode) -> Optional[str]:
    steps = list(cfg.SOLVER.STEPS)
    if any(a >= b for a, b in zip(steps, steps[1:])):
        return f"SOLVER.STEPS is {steps}; each step must be later than the one before."
    return None


def _check_pixels(cfg: CfgNode) -> Optional[str]:
    mean, std = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD
    if len(mean) != len(std):
        return (
            f"MODEL.PIXEL_MEAN is {mean!r} and MODEL.PIXEL_STD is {std!r}; both must have one "
            "number for each channel of an image."
        )
    return None


def _check_box_sizes(cfg: CfgNode) -> Optional[str]:
    sizes = list(cfg.TEST.AUG.get("BOX_SIZES", ()))
    if sizes and sizes[0] > sizes[1]:
        return f"TEST.AUG.BOX_SIZES is {sizes}; the first must not be larger than the second."
    if sizes and len(set(cfg.TEST.AUG.MIN_SIZES)) < 2:
        return (
            f"TEST.AUG.BOX_SIZES is {sizes}, but TEST.AUG.MIN_SIZES has only one size; give two or "
            "more."
        )
    return None
