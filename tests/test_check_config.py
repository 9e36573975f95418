import math
from pathlib import Path

import detectron2.model_zoo
import pytest

from panet_d2.check_config import check_values
from panet_d2.engine import read_config
from panet_d2.errors import ConfigError

from .common import ROOT, tiny_cfg

CONFIGS = [*(ROOT / "configs").rglob("*.yaml")]
CONFIGS += [*(Path(detectron2.model_zoo.__file__).parent / "configs").rglob("*.yaml")]


def test_every_config_of_ours_and_of_detectron2_is_accepted():
    assert len(CONFIGS) > 100
    for path in CONFIGS:
        read_config(str(path))  # checks


WRONG = [
    ("TEST.SOFT_NMS.METHOD", "hard", "one of 'linear', 'gaussian'"),
    ("TEST.SOFT_NMS.SIGMA", 0.0, "greater than 0"),
    ("TEST.SOFT_NMS.SCORE_THRESH", 5.0, "from 0 to 1"),
    ("TEST.BOX_VOTING.THRESH", 80.0, "from 0 to 1"),
    ("TEST.BOX_VOTING.SCORES", "max", "one of 'id', 'avg', 'temp_avg'"),
    ("TEST.BOX_VOTING.TEMPERATURE", 0.0, "greater than 0"),
    ("TEST.AUG.ROTATIONS", [45], "each one of 90, 180, 270"),
    ("TEST.AUG.ASPECT_RATIOS", [0.0], "greater than 0"),
    ("TEST.AUG.BOX_SIZES", [32], "a list of 0 or 2"),
    ("TEST.AUG.BOX_SIZES", [96, 32], "the first must not be larger"),
    ("TEST.AUG.MERGE", "soft_nms", "one of 'nms', 'wbf'"),
    ("TEST.AUG.MASKS", "max", "one of 'probabilities', 'logits'"),
    ("SOLVER.CHECKPOINT_PERIOD", 0, "at least 1"),
    ("SOLVER.MAX_ITER", 0, "at least 1"),
    ("SOLVER.BASE_LR", math.nan, "greater than 0"),
    ("SOLVER.BASE_LR", -0.1, "greater than 0"),
    ("SOLVER.STEPS", [2, 1], "later than the one before"),
    ("SOLVER.MOMENTUM", None, "from 0 to 1"),
    ("TEST.EVAL_PERIOD", -1, "at least 0"),
    ("TEST.EXPECTED_RESULTS", [["segm", "AP", 35.0]], "tolerance"),
    ("MODEL.ROI_HEADS.NMS_THRESH_TEST", 50.0, "from 0 to 1"),
    ("MODEL.RPN.POST_NMS_TOPK_TRAIN", 0, "at least 1"),
    ("MODEL.RPN.IN_FEATURES", [], "not empty"),
    ("MODEL.RPN.BBOX_REG_LOSS_TYPE", "l1", "'smooth_l1', 'giou'"),
    ("MODEL.ANCHOR_GENERATOR.SIZES", [[8], [-16], [32], [64], [128]], "greater than 0"),
    ("MODEL.PIXEL_STD", [0.0, 1.0, 1.0], "greater than 0"),
    ("MODEL.PIXEL_MEAN", [110.0], "MODEL.PIXEL_STD .* for each channel"),
    ("MODEL.MASK_ON", "yes", "type of its default, True|type of its default, False"),
    ("MODEL.RESNETS.DEPTH", 20, "18, 34, 50, 101, 152"),
    ("INPUT.FORMAT", "rgb", "'BGR', 'RGB'"),
    ("INPUT.MASK_FORMAT", "rle", "'polygon', 'bitmask'"),
    ("INPUT.MIN_SIZE_TRAIN", ["64"], "each a whole number"),
    ("INPUT.RANDOM_FLIP", "both", "'horizontal', 'vertical'"),
    ("DATASETS.TRAIN", "name", "a list, each text"),
    ("MODEL.ROI_MASK_HEAD.NUM_CONV", 10**9, "from 0 to 200"),
    ("MODEL.ROI_BOX_HEAD.FC_DIM", 10**9, "from 1 to"),
    ("DATALOADER.NUM_WORKERS", 10**9, "from 0 to 1000"),
    ("SEED", 2**40, "whole number"),
]


@pytest.mark.parametrize("key, value, accepted", WRONG, ids=[f"{k}={v}" for k, v, _ in WRONG])
def test_wrong_value_is_named_with_what_it_must_be(key, value, accepted):
    cfg = tiny_cfg()
    *path, last = key.split(".")
    node = cfg
    for part in path:
        node = node[part]
    node[last] = value
    with pytest.raises(ConfigError, match=f"^{key} is .*({accepted})"):
        check_values(cfg)


@pytest.mark.parametrize(
    "kind, size, right",
    [
        ("relative", [0.5, 1.0], True),
        ("relative_range", [2.0, 0.5], False),
        ("absolute", [64, 64], True),
        ("absolute", [0.5, 0.5], False),
        ("absolute_range", [64, 32], False),
    ],
)
def test_size_of_a_crop_follows_its_type(kind, size, right):
    opts = ("INPUT.CROP.TYPE", kind, "INPUT.CROP.SIZE", size)
    check_values(tiny_cfg(*opts))  # not enabled
    cfg = tiny_cfg(*opts, "INPUT.CROP.ENABLED", True)
    if right:
        check_values(cfg)
    else:
        with pytest.raises(ConfigError, match="INPUT.CROP.SIZE"):
            check_values(cfg)


def test_keys_of_the_user_are_left_alone():
    cfg = tiny_cfg()
    cfg.MODEL.MINE = None
    cfg.MODEL.ROI_HEADS.MY_THRESH = 50
    check_values(cfg)


def test_box_sizes_need_sizes_to_choose_from():
    opts = ("TEST.AUG.BOX_SIZES", [32, 96], "TEST.AUG.MIN_SIZES")
    check_values(tiny_cfg(*opts, [64, 96]))
    with pytest.raises(ConfigError, match="MIN_SIZES has only one size"):
        check_values(tiny_cfg(*opts, [64, 64]))
