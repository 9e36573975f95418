import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import build_anchor_generator
from detectron2.structures import Boxes, pairwise_iou

from panet_d2.planning import anchor_overlaps, anchor_recall, measure

from ..common import tiny_cfg
from .common import content, squares


def random_data(rng, number=40):
    boxes = []
    for _ in range(number):
        w, h = rng.integers(2, 90, 2)
        boxes.append((int(rng.integers(0, 150 - w)), int(rng.integers(0, 100 - h)), int(w), int(h)))
    return measure(content([(100, 150, boxes)]))


def assert_overlaps_of_all_anchors(cfg, data):
    """For images of 100x150, resized to 128x192."""
    strides = [4, 8, 16, 32, 64]
    generator = build_anchor_generator(cfg, [ShapeSpec(stride=s) for s in strides])
    maps = [torch.zeros(1, 1, 128 // s, 192 // s) for s in strides]
    boxes = Boxes(torch.from_numpy(data.boxes * 1.28).float())
    expected = pairwise_iou(Boxes.cat(generator(maps)), boxes).max(dim=0).values
    torch.testing.assert_close(torch.from_numpy(anchor_overlaps(cfg, data)).float(), expected)


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_against_all_anchors(offset):
    """Detectron2's anchors on the whole grid, each compared with each object."""
    cfg = tiny_cfg("INPUT.MIN_SIZE_TEST", 128, "MODEL.ANCHOR_GENERATOR.OFFSET", offset)
    data = random_data(np.random.default_rng(0))
    assert_overlaps_of_all_anchors(cfg, data)


def test_recall_by_size():
    """Anchors of 8 and 16: squares of 12 have IoU 0.56 with 16 at most, those of 40 0.16."""
    cfg = tiny_cfg(
        *("INPUT.MIN_SIZE_TEST", 400, "INPUT.MAX_SIZE_TEST", 400),
        *("MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16]], "MODEL.RPN.IN_FEATURES", ["p2", "p3"]),
    )
    boxes = [(194, 194, 12, 12), (180, 180, 40, 40)]
    recall = anchor_recall(cfg, measure(content([(400, 400, boxes)])))
    assert recall["all"] == 50 and recall["small"] == 100 and recall["medium"] == 0
    assert np.isnan(recall["large"])


def test_other_anchors():
    data = measure(squares([10, 20]))
    assert anchor_overlaps(tiny_cfg("MODEL.RPN.IN_FEATURES", ["res4"]), data) is None
    assert anchor_recall(tiny_cfg("MODEL.RPN.IN_FEATURES", ["res4"]), data) == {}


def test_objects_at_the_border():
    """Narrow objects at the right and the lower border, where the nearest anchor is outside."""
    narrow = [(150 - w, 20, w, 4 * w) for w in (5, 8, 11)] + [
        (20, 100 - h, 4 * h, h) for h in (5, 8, 11)
    ]
    data = measure(content([(100, 150, narrow)]))
    cfg = tiny_cfg("INPUT.MIN_SIZE_TEST", 128)  # OFFSET is 0
    assert_overlaps_of_all_anchors(cfg, data)
